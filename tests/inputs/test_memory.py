"""What is remembered, what goes first, and how much memory an input takes."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from av_lens.families import media_layout
from av_lens.families.media_layout import Features
from av_lens.media import ClipFile, MediaBudgetError, load_clip, source
from av_lens.memory import Bounded, Memory


def test_the_least_recently_used_goes_first():
    made: list[str] = []

    def make(name: str):
        made.append(name)
        return name * 3

    memory: Memory[str] = Memory(9, len)
    for name in ("a", "b", "c", "a", "d", "a", "b"):
        assert memory.once(name, lambda name=name: make(name)) == name * 3
    # a b c fill 9; d pushes out b (a was used since); the last b pushes out c.
    assert made == ["a", "b", "c", "d", "b"]
    assert memory.hits == 2
    assert len(memory) == 3


def test_one_value_is_kept_whatever_it_costs():
    memory: Memory[str] = Memory(2, len)
    assert memory.once("x", lambda: "long") == "long"
    assert len(memory) == 1
    assert memory.once("y", lambda: "longer") == "longer"
    assert len(memory) == 1


@pytest.mark.parametrize("tokens", [128000, 200], ids=["own size", "the size of a share"])
def test_a_video_in_parts_gives_the_same_pixels(monkeypatch, processor, make_clip, tokens: int):
    clip = make_clip(7.5, size=(100, 130))  # 15 frames: the last part repeats one
    monkeypatch.setattr(processor.video_processor, "max_video_tokens", tokens)
    monkeypatch.setattr(processor, "videos_kwargs", {"size": {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}})
    whole = Features(processor).video(clip, 2)
    given: list[int] = []
    plain = type(processor.video_processor).__call__

    def counted(self, videos, **options):
        given.append(len(videos[0]) if videos[0].device.type == "cpu" else 0)
        return plain(self, videos, **options)

    monkeypatch.setattr(type(processor.video_processor), "__call__", counted)
    monkeypatch.setattr(media_layout, "_TOGETHER", 4 * clip.frames[0].nbytes)
    parts = Features(processor).video(clip, 2)
    assert given == [0, 4, 4, 4, 3]
    assert parts.grid == whole.grid
    assert torch.equal(parts.pixels, whole.pixels)


def test_a_file_too_large_to_decode_whole_is_read_at_the_asked_rate(monkeypatch, tmp_path, encoder, make_clip):
    path = make_clip(4.0, fps=8.0, size=(112, 168)).save(tmp_path / "long.mp4")
    wanted = encoder.encode(ClipFile(path), "What?", fps=2)
    small = partial(load_clip, max_bytes=1_300_000)  # the sound and 13 of the 32 frames
    monkeypatch.setattr(source, "load_clip", small)
    source._LAST.clear()
    x = encoder.encode(ClipFile(path), "What?", fps=2)
    assert len(x.clips[0].frames) == 8 < len(wanted.clips[0].frames)
    assert torch.equal(x.tensors["pixel_values_videos"], wanted.tensors["pixel_values_videos"])
    assert "read at 2 frames a second, as asked" in x.clips[0].notes[-1]
    assert x.provenance["notes"] == list(x.clips[0].notes)
    with pytest.raises(MediaBudgetError, match=r"thin the frames \(fps=\)"):
        encoder.encode(ClipFile(path), "What?", picture="image")
    with pytest.raises(MediaBudgetError):
        encoder.encode(ClipFile(path, fps=7.0), "What?", fps=2)


LONG = """
import resource, sys
import transformers
from tiny import tiny_model, tiny_processor
import av_lens as avl

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

model = tiny_model()
model.processor.videos_kwargs = {"size": dict(transformers.Qwen2_5OmniProcessor.videos_kwargs["size"])}
clip = avl.load_clip(sys.argv[1], fps=2) if sys.argv[2] == "clip" else avl.media.ClipFile(sys.argv[1])
x = model.encode(clip, "What do you hear?", fps=2)
assert x.layout == "in_video" and x.tensors["video_grid_thw"].tolist() == [[100, 40, 72]], x.tensors["video_grid_thw"]
print(len(x.spans), peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize("given", ["clip", "file"])
def test_a_long_clip_of_full_size_is_encoded_in_little_memory(tmp_path, given: str):
    """1.24 GB of frames and 1.35 GB of patches, out of a file whose frames would take 6 GB."""
    path = tmp_path / "long.mp4"
    write_long(path)
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests / "toys")])
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(path), given], cwd=tests.parent, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 4.0, done.stdout


def write_long(path: Path, *, seconds: int = 100, fps: int = 10) -> None:
    """A moving bar and a tone."""
    import av

    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "40"})
        video.width, video.height, video.pix_fmt = 1920, 1080, "yuv420p"
        audio = out.add_stream("aac", rate=16000, layout="mono")
        for number in range(seconds * fps):
            picture = np.full((1620, 1920), 128, dtype=np.uint8)
            picture[:1080, 8 * number % 1856 :][:, :64] = 220
            frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        tone = (0.2 * np.sin(np.arange(16000 * seconds) / 20)).astype(np.float32)[None]
        for start in range(0, tone.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(tone[:, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            out.mux(audio.encode(frame))
        out.mux(audio.encode())


def test_the_least_recently_used_goes_and_what_grew_counts():
    kept, made = Bounded[np.ndarray](100), list[str]()

    def make(name, size):
        return lambda: made.append(name) or np.zeros(size, np.uint8)

    first = kept.once("a", make("a", 40))
    kept.once("b", make("b", 40))
    assert kept.once("a", make("a again", 40)) is first
    kept.once("c", make("c", 40))  # b goes
    kept.once("a", make("a again", 40))
    kept.once("b", make("b again", 40))
    assert made == ["a", "b", "c", "b again"]
    kept.forget(lambda key: key != "a")
    kept.once("large", make("large", 1000))  # one is kept, however large
    assert kept.once("large", make("large again", 1000)).nbytes == 1000
    assert made[-1] == "large"
