"""The real recording at the true processor's settings: counts, times and boxes against an independent derivation."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from noise import model_positions

from av_lens.inputs import AVInputs, Encoder
from av_lens.media import Clip, load_clip


@pytest.fixture(scope="module")
def clip(real_clip_path: Path) -> Clip:
    return load_clip(real_clip_path)


@pytest.fixture(scope="module")
def truth(real_clip_path: Path) -> dict[str, Any]:
    """Frame times, frame size and length of the sound, read with PyAV alone."""
    import av

    with av.open(str(real_clip_path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = sorted(float(frame.pts * Fraction(frame.time_base)) for frame in frames)
        size = frames[0].height, frames[0].width
        every = float(1 / stream.average_rate)
    with av.open(str(real_clip_path)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=16000)
        samples = 0
        for frame in [*container.decode(audio=0), None]:
            samples += sum(part.samples for part in resampler.resample(frame))
    return {"times": np.array(times), "size": size, "every": every, "samples": samples}


@pytest.fixture(scope="module")
def true_encoder(hf: Any) -> Encoder:
    """The tiny model with the sizes that `Qwen2_5OmniProcessor` itself fixes, as a hub checkpoint has them."""
    from transformers import Qwen2_5OmniProcessor

    processor = copy.copy(tiny.tiny_processor())
    processor.videos_kwargs = {"size": dict(Qwen2_5OmniProcessor.videos_kwargs["size"])}
    return Encoder(processor, hf.config, model_positions(hf))


@pytest.fixture(scope="module", params=["in_video", "separate"])
def x(request: pytest.FixtureRequest, clip: Clip, true_encoder: Encoder) -> AVInputs:
    return true_encoder.encode(clip, "What do you hear?", sound=request.param)


def smart_resize_by_hand(height: int, width: int) -> tuple[int, int]:
    """Both sides rounded to whole tokens of 28 pixels; 128 to 768 tokens a frame, so nothing else applies."""
    rows, cols = round(height / 28), round(width / 28)
    assert 128 <= rows * cols <= 768
    return rows, cols


def test_counts_at_the_true_settings(x: AVInputs):
    assert len(x.spans.video) == 2990
    assert len(x.spans.audio) == 248
    assert x.tensors["video_grid_thw"].tolist() == [[10, 26, 46]]
    assert x.tensors["input_features"].shape[-1] == 992


def test_every_position_has_the_right_times_and_box(x: AVInputs, truth: dict[str, Any], hf: Any):
    table = x.table()
    rows, cols = smart_resize_by_hand(*truth["size"])
    sampled = [int(np.argmin(np.round(np.abs(truth["times"] - k / 2), 9))) for k in range(20)]
    ids = model_positions(hf)(x.tensors)[:, 0].numpy()
    expected: list[tuple[float, ...]] = []
    seen = {"video": 0, "audio": 0}
    blocks = {
        name: ids[0, np.flatnonzero((table["role"] == name).to_numpy())[0]] for name in ("video", "audio")
    }  # each modality's first id; one clock when interleaved
    for position, role in enumerate(table["role"]):
        if role == "video":
            j = seen["video"]
            seen["video"] += 1
            patch, row, col = j // (rows * cols), j % (rows * cols) // cols, j % cols
            first, last = truth["times"][sampled[2 * patch]], truth["times"][sampled[2 * patch + 1]]
            assert ids[0, position] - blocks["video"] == 25 * patch
            assert ids[1, position] - blocks["video"] == row
            assert ids[2, position] - blocks["video"] == col
            expected.append((patch, patch + 1.0, first, last + truth["every"], row, col))
        elif role == "audio":
            k = seen["audio"]
            seen["audio"] += 1
            assert ids[0, position] - blocks["audio"] == k
            end = min((k + 1) * 0.04, truth["samples"] / 16000)
            expected.append((k * 0.04, (k + 1) * 0.04, k * 0.04, end, -1, -1))
        else:
            expected.append((np.nan,) * 4 + (-1, -1))
    found = table[["start_s", "end_s", "source_start_s", "source_end_s", "row", "col"]].to_numpy()
    np.testing.assert_allclose(found, np.array(expected), atol=1e-4)
    assert seen == {"video": 2990, "audio": 248}


def test_interleaved_chunks_are_two_seconds_each(x: AVInputs):
    runs = [(x.spans.roles[start], stop - start) for start, stop in _runs(x.spans.roles)]
    media = [run for run in runs if run[0] in ("video", "audio")]
    if x.layout == "in_video":
        assert media == [("video", 598), ("audio", 50)] * 4 + [("video", 598), ("audio", 48)]
    else:
        assert media == [("video", 2990), ("audio", 248)]


def _runs(roles: tuple[str, ...]) -> list[tuple[int, int]]:
    borders = [0, *(i for i in range(1, len(roles)) if roles[i] != roles[i - 1]), len(roles)]
    return list(itertools.pairwise(borders))


def test_the_table_prints(x: AVInputs):
    table = x.table()
    assert table.columns.tolist() == (
        ["position", "token", "role", "start_s", "end_s", "source_start_s", "source_end_s", "row", "col"]
    )
    assert len(table) == len(x.spans) == x.ids.shape[1]
    assert "<|VIDEO|>" in table.iloc[40:60].to_string()
    assert "3315" in str(table)
    lines = x.describe().splitlines()
    assert len(lines) <= 40
    assert any("13 x 23 patches" in line for line in lines)
    assert max(map(len, lines)) < 400


def test_seconds_and_boxes_select(x: AVInputs):
    second = x.spans.video.between(3.0, 4.0)
    assert len(second) == 13 * 23
    assert len(second.box(row=slice(0, 2), col=range(5, 8))) == 6
    assert len(x.spans.audio.between(1.2, 2.0)) == 20
    # True times: behind the fourth second stand the frames at 3.0 and 3.48 s, the latter on screen until 3.52 s.
    assert len(x.spans.video.between(3.6, 3.9, clock="source")) == 0
    assert len(x.spans.video.between(3.0, 3.1, clock="source")) == 13 * 23
