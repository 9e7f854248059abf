"""What is written comes back: frames, exact times, exact samples, the same bytes each time."""

from __future__ import annotations

import base64
import re
from fractions import Fraction
from pathlib import Path

import media_samples as made
import numpy as np
import pytest

from av_lens.errors import MediaError
from av_lens.media import Clip, load_clip
from av_lens.media.encoding import time_base


def test_two_seconds_come_back_exactly(tmp_path: Path):
    clip = made.clip()
    back = load_clip(clip.save(tmp_path / "clip.mp4"))
    assert back.frames is not None
    assert back.waveform is not None
    assert back.times.tolist() == [k / 8 for k in range(16)]
    assert made.index_of(back.frames) == list(range(16))
    assert len(back.waveform) == 32000
    assert back.duration == 2.0
    assert back.rate == 16000
    assert made.lag(back.waveform, made.chirp()) == 0
    assert np.corrcoef(back.waveform, made.chirp())[0, 1] > 0.999
    assert np.abs(back.frames.astype(int) - made.picture()).mean() < 3
    assert back.window == (0.0, 2.0)
    assert back.notes == ()


def test_the_same_clip_gives_the_same_bytes(tmp_path: Path):
    first, second = made.clip().to_mp4_bytes(), made.clip().to_mp4_bytes()
    assert first == second
    assert Path(made.clip().save(tmp_path / "a.mp4")).read_bytes() == first
    assert made.clip(waveform=-made.chirp()).to_mp4_bytes() != first
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"], "no temporary file may stay behind"


@pytest.mark.parametrize(
    "times",
    [
        [0.0, 0.1, 0.15, 0.9],
        [0.25, 0.5, 1.0, 1.75],
        [k * 1001 / 30000 for k in range(4)],
        [0.0, 0.04, 0.08, 0.12],
    ],
    ids=["uneven", "late", "ntsc", "pal"],
)
def test_uneven_times_come_back_exactly(tmp_path: Path, times: list[float]):
    clip = made.clip(frames=made.picture(4), fps=None, times=np.array(times))
    back = load_clip(clip.save(tmp_path / "clip.mp4"))
    np.testing.assert_allclose(back.times, times, rtol=0, atol=1e-12)
    assert back.frames is not None
    assert made.index_of(back.frames) == [0, 1, 2, 3]
    assert back.duration == pytest.approx(clip.duration, abs=1e-9)


def test_times_without_a_common_base_come_back_to_a_microsecond(tmp_path: Path):
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.1, size=16))
    back = load_clip(made.clip(fps=None, times=times).save(tmp_path / "clip.mp4"))
    np.testing.assert_allclose(back.times, times, rtol=0, atol=0.6e-6)


def test_time_base_is_the_least_common_denominator():
    assert time_base([0.0, 0.5, 1 / 3]) == Fraction(1, 6)
    assert time_base([0.0, 1001 / 30000]) == Fraction(1, 30000)
    assert time_base([0.0, np.pi]) == Fraction(1, 1_000_000)


@pytest.mark.parametrize(("height", "width"), [(83, 85), (84, 85), (83, 84), (1, 1), (3, 200)])
def test_odd_sizes_come_back(tmp_path: Path, height: int, width: int):
    frames = np.full((4, height, width, 3), 100, dtype=np.uint8)
    back = load_clip(Clip.from_arrays(frames=frames, fps=4).save(tmp_path / "clip.mp4"))
    assert back.frames is not None
    assert back.frames.shape == frames.shape
    assert np.abs(back.frames.astype(int) - 100).max() <= 3


@pytest.mark.parametrize("samples", [1, 100, 1023, 1024, 1025, 16001])
def test_any_number_of_samples_comes_back(tmp_path: Path, samples: int):
    sound = made.chirp()[:samples]
    back = load_clip(Clip.from_arrays(waveform=sound).save(tmp_path / "sound.mp4"))
    assert back.waveform is not None
    assert len(back.waveform) == samples
    assert back.frames is None


def test_a_rate_that_aac_lacks_is_resampled(tmp_path: Path):
    clip = Clip.from_arrays(waveform=made.chirp(rate=10000), rate=10000)
    back = load_clip(clip.save(tmp_path / "sound.mp4"), sound_rate=10000)
    assert back.waveform is not None
    assert len(back.waveform) == 20000
    assert abs(made.lag(back.waveform, made.chirp(rate=10000))) == 0


def test_wav_and_png_lose_nothing(tmp_path: Path):
    sound = Clip.from_arrays(waveform=made.chirp())
    back = load_clip(sound.save(tmp_path / "sound.wav"))
    assert back.sound_hash == sound.sound_hash
    still = Clip.from_arrays(frames=made.picture(1))
    found = load_clip(still.save(tmp_path / "still.png"))
    assert found.picture_hash == still.picture_hash
    assert found.is_image
    assert found.duration == 0.0


def test_a_still_with_a_sound_lasts_as_long(tmp_path: Path):
    clip = Clip.from_arrays(frames=made.picture(1)).with_sound(made.clip())
    back = load_clip(clip.save(tmp_path / "clip.mp4"))
    assert back.is_image
    assert back.duration == 2.0
    assert back.waveform is not None
    assert len(back.waveform) == 32000


def test_colours_survive(tmp_path: Path):
    colours = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 255, 255], [0, 0, 0], [90, 40, 200]]
    )
    frames = np.broadcast_to(colours[:, None, None, :], (7, 64, 64, 3)).astype(np.uint8)
    back = load_clip(Clip.from_arrays(frames=frames, fps=5).save(tmp_path / "clip.mp4", crf=1))
    assert back.frames is not None
    error = np.abs(back.frames[:, 16:48, 16:48].astype(int) - frames[:, 16:48, 16:48])
    assert error.max() <= 5


def test_quality_is_a_choice():
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    clip = Clip.from_arrays(frames=noise, fps=4)
    assert len(clip.to_mp4_bytes(crf=40)) < len(clip.to_mp4_bytes()) / 3
    with pytest.raises(MediaError, match=r"crf= runs from 0 \(best\) to 51 \(worst\), found 60"):
        clip.to_mp4_bytes(crf=60)


def test_previews_shrink(tmp_path: Path):
    clip = made.clip(frames=made.picture(16, 120, 200))
    (tmp_path / "small.mp4").write_bytes(clip.to_mp4_bytes(max_side=50))
    back = load_clip(tmp_path / "small.mp4")
    assert back.frames is not None
    assert back.frames.shape == (16, 30, 50, 3)


def test_unknown_suffixes_and_lost_streams_are_refused(tmp_path: Path):
    with pytest.raises(MediaError, match=r"unknown suffix '\.mp5'\. Did you mean '\.mp4'\? Known: \.mp4, \.wav, \.png"):
        made.clip().save(tmp_path / "clip.mp5")
    with pytest.raises(MediaError, match=r"a wav holds a sound alone, and this clip has 16 frames: save it as \.mp4"):
        made.clip().save(tmp_path / "clip.wav")
    with pytest.raises(
        MediaError, match=r"a png holds one still frame alone, and this clip has a sound: save it as \.mp4"
    ):
        made.clip().save(tmp_path / "clip.png")
    with pytest.raises(MediaError, match=r"cannot write .*nowhere/clip\.mp4: No such file .* must be a folder"):
        made.clip().save(tmp_path / "nowhere" / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "clip.mp4"
    made.clip().save(path)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("av_lens.whole_files.os.replace", full)
    with pytest.raises(MediaError, match="No space left on device"):
        made.clip(waveform=-made.chirp()).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_players_carry_their_medium(tmp_path: Path):
    page = made.clip().muted()._repr_html_()
    assert "<video controls" in page
    assert "muted (silence)" in page
    (tmp_path / "inside.mp4").write_bytes(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]))  # type: ignore[index]
    inside = load_clip(tmp_path / "inside.mp4")
    assert len(inside.times) == 16
    assert inside.has_sound
    assert "<audio controls" in Clip.from_arrays(waveform=made.chirp())._repr_html_()
    assert "data:image/png" in Clip.from_arrays(frames=made.picture(1))._repr_html_()
    long = Clip.from_arrays(frames=np.zeros((100, 8, 8, 3), dtype=np.uint8), fps=1)
    assert "the first 60 s are shown" in long._repr_html_()
    assert "http" not in page
