"""Real-size media behind the true processors: every position's times and boxes against an independent derivation.

The derivation reads the tensors (grids, lengths of mels, seconds), HuggingFace's own position ids and the frames' true
times, and uses nothing of the package's layouts.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import reference
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import _get_feat_extract_output_lengths as qwen3s
from transformers.video_utils import VideoMetadata
from true_processors import SETTINGS, true_model

from av_lens.media import Clip, load_clip

RATES = {"qwen2_5_omni": 25, "qwen3_omni_moe": 13, "qwen2_5_vl": 2}  # position ids a second
HEARING = ("qwen2_5_omni", "qwen3_omni_moe")
HOW = {"in_video": {"sound": "in_video"}, "separate": {"sound": "separate"}, "video_only": {"sound": None}}
HOW |= {"audio_only": {"picture": None}, "image": {"picture": "image", "sound": None}}
SMALL = (2.1, 10.0, (180, 320), 2.0)
CLIPS = [  # seconds, the source's frames a second, height and width, the asked frames a second
    (6.0, 8.0, (720, 1280), 2.0),
    (4.3, 10.0, (1280, 720), 2.0),  # upright; an odd number of frames
    (3.3, 24.0, (480, 640), 4.0),
    (7.7, 5.0, (360, 640), 1.0),
    (2.1, 25.0, (144, 1008), 5.0),
    (31.13, 2.0, (90, 160), 2.0),  # longer than what the extractor's class would take
]


def made(seconds: float, fps: float, size: tuple[int, int]) -> Clip:
    """A clip whose frames differ, with a sound whose length is no whole number of mel frames."""
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    frames = np.stack([np.roll(still, 7 * number, axis=1) for number in range(round(seconds * fps))])
    waveform = rng.normal(0.0, 0.1, round(seconds * 16000) - 37).clip(-1, 1).astype(np.float32)
    return Clip.from_arrays(frames=frames, fps=fps, waveform=waveform)


def cases() -> list[Any]:
    found = []
    for name in SETTINGS:
        for layout in HOW if name in HEARING else ("video_only", "image"):
            quick = layout in (("in_video", "audio_only") if name in HEARING else ("video_only",))
            chosen = {"separate": (0, 5), "image": (0, 1), "audio_only": (3, 5)}.get(layout, range(len(CLIPS)))
            for number in ("small", *chosen):
                marks = () if quick and number == "small" else pytest.mark.slow
                clip = SMALL if number == "small" else CLIPS[number]
                found.append(pytest.param(name, layout, clip, id=f"{name}-{layout}-{number}", marks=marks))
    return found


def sampled(clip: Clip, fps: float) -> list[int]:
    """Of each target k / fps before the picture's last half frame, the nearest frame, the earlier of two."""
    end, every = clip.picture_end, clip.frame_duration
    targets = [k / fps for k in range(10_000) if k / fps <= end - every / 2 + 1e-9]
    return [int(np.argmin(np.round(np.abs(clip.times - target), 9))) for target in targets]


def by_the_processor(model: Any, clip: Clip, layout: str, fps: float) -> dict[str, Any]:
    """One call of the whole processor on the sampled frames and the whole sound."""
    processor = model.processor
    video, audio, image = ({"type": kind, kind: "-"} for kind in ("video", "audio", "image"))
    content = {"in_video": [video], "separate": [video, audio], "video_only": [video], "audio_only": [audio]}
    content |= {"image": [image]}
    text = processor.apply_chat_template(
        [{"role": "user", "content": [*content[layout], {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    said: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    assert clip.frames is not None
    if video in content[layout]:
        taken = sampled(clip, fps)
        said["videos"] = [np.array(clip.frames[taken])]
        said["videos_kwargs"] = {"fps": fps, "do_sample_frames": False, "cap_pixels_per_frame": True}
        if not hasattr(processor, "audio_token"):  # these two are told the rate by metadata alone
            shown = VideoMetadata(total_num_frames=len(taken), fps=fps, frames_indices=[*range(len(taken))])
            said["videos_kwargs"] = said["videos_kwargs"] | {"video_metadata": [shown], "return_metadata": True}
    if image in content[layout]:
        middle = (clip.times[0] + clip.times[-1]) / 2
        said["images"] = [np.array(clip.frames[int(np.argmin(np.round(np.abs(clip.times - middle), 6)))])]
    if audio in content[layout] or layout == "in_video":
        said["audio"] = [np.array(clip.waveform)]
    if layout == "in_video":
        said |= {"audio_from_video_indices": [0], "load_audio_from_video": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(processor(**said))


@pytest.mark.parametrize(("name", "layout", "how"), cases())
@torch.no_grad()
def test_every_position_has_the_right_times_and_box(name, layout, how):
    seconds, source, size, fps = how
    check(name, layout, made(seconds, source, size), fps)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("fps", [1.0, 2.0])
@torch.no_grad()
def test_a_recording_too(name, fps, real_clip_path):
    for layout in HOW if name in HEARING else ("video_only", "image"):
        check(name, layout, load_clip(real_clip_path), fps)


def check(name: str, layout: str, clip: Clip, fps: float) -> None:
    model = true_model(name)
    x = model.encode(clip, "What?", fps=fps, **HOW[layout])
    assert x.layout == layout
    whole = by_the_processor(model, clip, layout, fps)
    same_tensors(x.tensors, whole)
    table, ids = x.table(), huggingfaces_ids(name, whole, layout)
    tokens, config = x.tensors["input_ids"][0].numpy(), model.config
    expected = np.full((len(tokens), 6), np.nan)
    expected[:, 4:] = -1
    media = [config.video_token_id, config.image_token_id, getattr(config, "audio_token_id", -1)]
    first = int(np.flatnonzero(np.isin(tokens, media))[0])
    for token, rows in zip(media, (watched, watched, heard), strict=True):
        at = np.flatnonzero(tokens == token)
        if len(at):
            start = ids[0, first if layout == "in_video" else at[0]]
            expected[at] = rows(name, layout, clip, fps, whole, ids[:, at] - start, len(at))
    found = table[["start_s", "end_s", "source_start_s", "source_end_s", "row", "col"]].to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for clock in ("model", "source"):
        assert len(x.spans.media.between(0.0, 1e6, clock=clock)) == len(x.spans.media)
    if name == "qwen3_vl" and layout == "video_only":
        written_seconds(x, table, clip, fps)


def same_tensors(mine: Any, whole: dict[str, Any]) -> None:
    """What the model is given is what one call of the processor makes, the mel's silence apart."""
    for key in mine:
        if key in ("input_features", "feature_attention_mask"):
            n = int(whole["feature_attention_mask"].sum())
            assert mine[key].shape[-1] == n
            assert torch.equal(mine[key], whole[key][..., :n].to(mine[key].dtype))
        elif isinstance(mine[key], torch.Tensor):
            assert torch.equal(mine[key], torch.as_tensor(whole[key]).to(mine[key].dtype)), key


def huggingfaces_ids(name: str, whole: dict[str, Any], layout: str) -> np.ndarray:
    """The model's own position ids, `[stream, pos]`, of the processor's tensors."""
    inner = reference(name).model
    told: dict[str, Any] = {one: whole.get(one) for one in ("image_grid_thw", "video_grid_thw", "attention_mask")}
    if name in HEARING:
        mask, step = whole.get("feature_attention_mask"), whole.get("video_second_per_grid")
        told |= {"use_audio_in_video": layout == "in_video", "audio_seqlens": None if mask is None else mask.sum(-1)}
        told |= {"second_per_grids": None if step is None else torch.as_tensor(step)}
    else:
        told |= {"mm_token_type_ids": whole["mm_token_type_ids"]}
        if name == "qwen2_5_vl":
            told |= {"second_per_grid_ts": whole.get("second_per_grid_ts")}
    return inner.get_rope_index(whole["input_ids"], **told)[0][:, 0].numpy()


def watched(name: str, layout: str, clip: Clip, fps: float, whole: Any, ids: np.ndarray, n: int) -> np.ndarray:
    """Rows of the table for the tokens of a picture, in their order."""
    image = layout == "image"
    deep, high, wide = (int(side) for side in whole["image_grid_thw" if image else "video_grid_thw"][0])
    high, wide = high // 2, wide // 2  # four patches a token
    assert n == deep * high * wide
    patch, row, col = (part.reshape(-1) for part in np.indices((deep, high, wide)))
    if name != "qwen3_vl" or image:  # whose patches of a video stand apart
        assert np.array_equal(ids[1], row)
        assert np.array_equal(ids[2], col)
    lasts = 1.0 if image else 2 / fps
    if name == "qwen3_vl":
        starts = patch * lasts
        ends = starts + lasts
    else:
        starts = ids[0] / RATES[name]
        assert np.abs(starts - patch * lasts).max() < 1.0 / RATES[name] + 1e-6  # ids are whole numbers in some
        beyond = deep * lasts * RATES[name]
        if name != "qwen3_omni_moe":
            beyond = np.floor(beyond + 1e-4)
        every = np.unique(ids[0])  # a patch lasts until a later id
        later = np.append(every[1:], beyond if beyond > every[-1] else every[-1] + 1)
        ends = later[np.searchsorted(every, ids[0])] / RATES[name]
    if image:
        shown = [int(np.argmin(np.round(np.abs(clip.times - (clip.times[0] + clip.times[-1]) / 2), 6)))] * 2
    else:
        shown = sampled(clip, fps)
        shown += shown[-1:] * (len(shown) % 2)
        assert len(shown) == 2 * deep
    gone = np.append(clip.times[1:], clip.picture_end)
    came, left = clip.times[shown[::2]], gone[shown[1::2]]
    return np.stack([starts, ends, came[patch], left[patch], row, col], axis=1)


def heard(name: str, layout: str, clip: Clip, fps: float, whole: Any, ids: np.ndarray, n: int) -> np.ndarray:
    """Rows of the table for the tokens of a sound."""
    frames = int(whole["feature_attention_mask"].sum())
    k = np.arange(n)
    assert np.array_equal(ids, np.stack([k] * 3))
    if name == "qwen2_5_omni":
        assert n == ((frames - 1) // 2 + 1 - 2) // 2 + 1  # a stride of 2, then pairs
        begins, ends = k * 0.04, (k + 1) * 0.04
    else:  # seconds apart, each 13 tokens: 12 of 80 ms and what is left
        assert n == int(qwen3s(torch.tensor(frames)))
        begins = k // 13 + k % 13 * 0.08
        ends = np.minimum(begins + 0.08, k // 13 + 1)
    ends = np.minimum(ends, clip.sound_end)
    return np.stack([k / RATES[name], (k + 1) / RATES[name], begins, ends, -np.ones(n), -np.ones(n)], axis=1)


def written_seconds(x: Any, table: Any, clip: Clip, fps: float) -> None:
    """Before each patch stands the middle of its two frames, to a tenth of a second, inside the patch's time."""
    text = "".join(x.tokens)
    said = [float(one) for one in re.findall(r"<([\d.]+) seconds>", text)]
    starts, ends = (sorted(set(table.loc[table["role"] == "video", key])) for key in ("start_s", "end_s"))
    n = len(sampled(clip, fps))
    middles = [(2 * t + min(2 * t + 1, n - 1)) / 2 / fps for t in range(len(starts))]
    np.testing.assert_allclose(said, middles, atol=0.0501)
    assert all(start - 0.05 <= one <= end + 0.05 for start, one, end in zip(starts, said, ends, strict=True))


@pytest.mark.parametrize("name", HEARING)
@torch.no_grad()
def test_towers_give_as_many_rows_as_the_prompt_has_tokens(name):
    """At lengths around every border of a chunk, and at others."""
    model, tower = true_model(name), reference(name).model.audio_tower
    lengths = [*range(5, 30), *range(95, 110), *range(195, 210), *range(395, 405), 799, 800, 801, 1234, 3000, 3113]
    for n in lengths:
        mel = torch.randn(32, n, generator=torch.Generator().manual_seed(n))
        told = {"feature_lens": torch.tensor([n])}
        if name == "qwen2_5_omni":
            told["aftercnn_lens"] = torch.tensor([(n - 1) // 2 + 1])
        assert len(tower(mel, **told).last_hidden_state) == model.encoder.layout.sound_tokens(n), n
