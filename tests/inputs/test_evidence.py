"""Does the model read at a position what the map says it stands for? Paint pixels and mel, watch the embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from av_lens.inputs import AVInputs, Encoder
from av_lens.media import Clip


def embeddings(hf: Any, x: AVInputs, **changed: torch.Tensor) -> torch.Tensor:
    """What the fusion layers are given: text, sound and picture scattered together, `[pos, d_model]`."""
    caught: list[torch.Tensor] = []

    def catch(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        caught.append(kwargs["inputs_embeds"].detach().clone())

    handle = hf.model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            hf(**{**x.tensors, **changed})
    finally:
        handle.remove()
    return caught[0][0]


def moved(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    return np.flatnonzero((a != b).any(dim=-1).numpy()).tolist()


@pytest.mark.parametrize("sound", ["in_video", "separate"])
def test_a_painted_block_is_where_its_position_says(encoder: Encoder, make_clip, sound: str):
    clip = make_clip(3.0, fps=2.0)
    for patch, row, col in ((0, 0, 0), (1, 1, 2), (2, 0, 1)):
        frames = np.zeros((6, 56, 84, 3), dtype=np.uint8)
        frames[2 * patch : 2 * patch + 2, 28 * row : 28 * row + 28, 28 * col : 28 * col + 28] = 255
        painted = Clip.from_arrays(frames=frames, fps=2.0, waveform=np.array(clip.waveform))
        x = encoder.encode(painted, "What?", sound=sound)
        [position] = x.spans.video.between(patch, patch + 1).box(row, col)
        # The j-th video position reads the j-th group of merge x merge = 4 patches.
        j = x.spans.video.positions.tolist().index(position)
        bright = x.tensors["pixel_values_videos"].amax(dim=1) > 0
        assert np.flatnonzero(bright.numpy()).tolist() == [4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3]


@pytest.mark.parametrize("sound", ["in_video", "separate"])
def test_a_second_of_video_moves_exactly_its_positions(encoder: Encoder, hf: Any, make_clip, sound: str):
    x = encoder.encode(make_clip(3.0), "What?", sound=sound)
    base = embeddings(hf, x)
    for second in range(3):
        pixels = x.tensors["pixel_values_videos"].clone()
        pixels[24 * second : 24 * second + 24] += 1.0
        changed = moved(base, embeddings(hf, x, pixel_values_videos=pixels))
        assert changed == x.spans.video.between(second, second + 1).positions.tolist()


@pytest.mark.parametrize("sound", ["in_video", "separate"])
def test_two_seconds_of_mel_move_exactly_their_positions(encoder: Encoder, hf: Any, make_clip, sound: str):
    # The audio tower mixes within blocks of 2 s (200 mel frames) and not beyond.
    x = encoder.encode(make_clip(5.0), "What?", sound=sound)
    base = embeddings(hf, x)
    for block in range(3):
        mel = x.tensors["input_features"].clone()
        mel[..., 200 * block : 200 * block + 200] += 0.5
        changed = moved(base, embeddings(hf, x, input_features=mel))
        assert changed == x.spans.audio.between(2 * block, 2 * block + 2).positions.tolist()


def test_each_frame_reaches_the_positions_of_its_true_time(encoder: Encoder, hf: Any, make_clip):
    clip = make_clip(3.0, fps=10.0)
    assert clip.frames is not None
    base = encoder.encode(clip, "What?")
    still = embeddings(hf, base)
    sampled = {0: 0, 5: 0, 10: 1, 15: 1, 20: 2, 25: 2}
    for frame in (0, 5, 7, 20):
        frames = np.array(clip.frames)
        frames[frame] = 255 - frames[frame]
        x = encoder.encode(Clip.from_arrays(frames=frames, fps=10.0, waveform=np.array(clip.waveform)), "What?")
        changed = moved(still, embeddings(hf, x))
        if frame not in sampled:
            assert changed == []
        else:
            shown = base.spans.video.between(frame / 10, frame / 10 + 0.1, clock="source")
            assert (
                changed
                == shown.positions.tolist()
                == base.spans.video.between(sampled[frame], sampled[frame] + 1).positions.tolist()
            )
