"""The clip itself: what it refuses to be, and what each change does, by hand-computed values."""

from __future__ import annotations

from typing import Any

import media_samples as made
import numpy as np
import pytest

from av_lens.errors import AvLensError, MediaError
from av_lens.media import Clip


def small(n: int = 4, fps: float = 4.0, samples: int = 8, rate: int = 8) -> Clip:
    """A clip whose every number can be read off: frame k is all k, sample n is n / 100."""
    frames = np.zeros((n, 4, 4, 3), dtype=np.uint8) + np.arange(n, dtype=np.uint8)[:, None, None, None]
    return Clip.from_arrays(frames=frames, fps=fps, waveform=np.arange(samples) / 100, rate=rate)


def levels(clip: Clip) -> list[int]:
    assert clip.frames is not None
    return clip.frames[:, 0, 0, 0].tolist()


def hundredths(clip: Clip) -> list[int]:
    assert clip.waveform is not None
    return np.round(clip.waveform * 100).astype(int).tolist()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "found neither"),
        (
            {"frames": np.zeros((2, 4, 4, 3)), "fps": 2},
            r"frames must be a uint8 .* found float64 of shape \(2, 4, 4, 3\)",
        ),
        ({"frames": np.zeros((4, 4, 3), np.uint8)}, r"found shape \(4, 4, 3\): add the time axis with frames\[None\]"),
        (
            {"frames": np.zeros((2, 4, 4, 4), np.uint8), "fps": 2},
            r"\[time, height, width, 3\], found shape \(2, 4, 4, 4\)",
        ),
        ({"frames": np.zeros((0, 4, 4, 3), np.uint8), "fps": 2}, "frames are empty"),
        ({"frames": np.zeros((2, 4, 4, 3), np.uint8)}, r"2 frames need their times: give times= .* or fps="),
        ({"frames": np.zeros((2, 4, 4, 3), np.uint8), "times": np.zeros(3)}, "found 2 frames and 3 times"),
        (
            {"frames": np.zeros((2, 4, 4, 3), np.uint8), "times": np.array([0.0, 0.0])},
            r"must increase, found 0 s then 0 s",
        ),
        (
            {"frames": np.zeros((2, 4, 4, 3), np.uint8), "times": np.array([1.0, 0.5])},
            "found 1 s then 0.5 s at frames 0 and 1",
        ),
        (
            {"frames": np.zeros((2, 4, 4, 3), np.uint8), "times": np.array([-1.0, 0.5])},
            "cannot be negative, found -1 s",
        ),
        ({"frames": np.zeros((2, 4, 4, 3), np.uint8), "times": np.array([0, np.nan])}, "finite, found nan at frame 1"),
        ({"frames": np.zeros((2, 4, 4, 3), np.uint8), "fps": 0}, "fps= above 0, found fps=0"),
        (
            {"frames": np.zeros((2, 4, 4, 3), np.uint8), "fps": np.nan},
            "fps= must be a finite number of seconds, found nan",
        ),
        (
            {"frames": np.zeros((1, 4, 4, 3), np.uint8), "fps": 2, "times": np.zeros(1)},
            "found fps=2 together with times=",
        ),
        ({"times": np.zeros(1), "waveform": np.zeros(4)}, "belong to frames, and frames= is missing"),
        ({"waveform": np.zeros((2, 4))}, r"must be mono \[sample\], found shape \(2, 4\): average the channels"),
        ({"waveform": np.zeros(4, np.int16)}, r"found int16 of shape \(4,\) \(for int16, divide by 32768\)"),
        ({"waveform": np.zeros(0)}, "the waveform is empty"),
        ({"waveform": np.array([0.0, np.inf])}, "found NaN or infinity at sample 1"),
        ({"waveform": np.array([0.0, np.nan, 0.0])}, "found NaN or infinity at sample 1"),
        ({"waveform": np.array([0.0, -1.5])}, r"must lie in \[-1, 1\], found a peak of 1\.5: scale it down"),
        ({"waveform": np.zeros(4), "rate": 0}, r"rate= must be a whole number of Hz from 1 .*, found 0"),
        (
            {"waveform": np.zeros(16000), "duration": 0.5},
            r"must be finite and reach the last frame and sample \(0\.99.* s\), found 0\.5",
        ),
        ({"waveform": np.zeros(16000), "duration": np.inf}, "duration= must be a finite number of seconds, found inf"),
    ],
)
def test_arrays_that_are_no_clip_are_refused(given: dict[str, Any], text: str):
    with pytest.raises(MediaError, match=text):
        Clip.from_arrays(**given)


def test_tensors_lists_and_numpy_integers_are_taken():
    import torch

    wanted = np.array([0.0, 0.5, -0.25], dtype=np.float32)
    kinds = [
        torch.tensor(wanted, requires_grad=True),
        torch.tensor(wanted).bfloat16(),
        wanted.tolist(),
        wanted.astype("f2"),
    ]
    for given in kinds:
        clip = Clip.from_arrays(waveform=given, rate=np.int64(8000))
        assert clip.waveform is not None
        assert clip.waveform.tolist() == wanted.tolist()
        assert type(clip.rate) is int
    frames = torch.zeros((2, 4, 4, 3), dtype=torch.uint8)
    timed = Clip.from_arrays(frames=frames, times=torch.tensor([0.0, 0.5], requires_grad=True))
    assert timed.times.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"waveform": [[0.1], [0.1, 0.2]]}, "waveform= cannot be made an array of numbers, found list: setting an"),
        ({"waveform": np.zeros(4, np.float32), "rate": True}, r"rate= must be a whole number of Hz .* found True"),
        (
            {"frames": np.zeros((2, 4, 4, 3), np.uint8), "times": ["a", "b"]},
            "times must be numbers of seconds, found <U1",
        ),
    ],
)
def test_what_is_no_array_is_refused_in_words(given: dict[str, Any], text: str):
    with pytest.raises(MediaError, match=text):
        Clip.from_arrays(**given)


def test_a_tensor_without_data_is_refused_in_words():
    import torch

    with pytest.raises(
        MediaError, match="waveform= cannot be made an array of numbers, found Tensor: Cannot copy out of"
    ):
        Clip.from_arrays(waveform=torch.zeros(3, device="meta"))


def test_from_arrays_copies_and_clips_cannot_be_changed():
    sound = made.chirp()
    clip = Clip.from_arrays(waveform=sound)
    before = clip.sound_hash
    sound[:] = 0
    assert clip.waveform is not None
    assert clip.waveform.any()
    assert Clip.from_arrays(waveform=clip.waveform).sound_hash == before
    with pytest.raises(ValueError, match="read-only"):
        clip.waveform[0] = 1
    with pytest.raises(AttributeError):
        clip.rate = 8000  # type: ignore[misc]


def test_durations_by_hand():
    clip = small(n=4, fps=4, samples=8, rate=8)
    assert (clip.duration, clip.picture_end, clip.sound_end, clip.frame_duration) == (1.0, 1.0, 1.0, 0.25)
    longer = small(samples=16)
    assert (longer.duration, longer.picture_end, longer.sound_end) == (2.0, 1.0, 2.0)
    shorter = small(samples=4)
    assert (shorter.duration, shorter.picture_end, shorter.sound_end) == (1.0, 1.0, 0.5)
    still = Clip.from_arrays(frames=made.picture(1))
    assert (still.duration, still.is_image, still.has_sound, still.picture_end) == (0.0, True, False, 0.0)
    sound = Clip.from_arrays(waveform=np.zeros(8), rate=8)
    assert (sound.duration, sound.has_picture, sound.picture_end, sound.is_image) == (1.0, False, 0.0, False)
    assert np.isnan(sound.frame_duration)


def test_hashes_say_what_is_equal():
    a, b = small(), small()
    assert (a.picture_hash, a.sound_hash) == (b.picture_hash, b.sound_hash)
    assert a.muted().picture_hash == a.picture_hash
    assert a.muted().sound_hash != a.sound_hash
    assert a.blank().sound_hash == a.sound_hash
    assert a.blank().picture_hash != a.picture_hash
    faster = Clip.from_arrays(frames=a.frames, fps=5, waveform=a.waveform, rate=16)
    assert faster.picture_hash != a.picture_hash, "times belong to a picture"
    assert faster.sound_hash != a.sound_hash, "the rate belongs to a sound"
    assert Clip.from_arrays(waveform=np.zeros(4)).picture_hash is None
    flat, tall = np.zeros((1, 2, 8, 3), np.uint8), np.zeros((1, 8, 2, 3), np.uint8)
    assert Clip.from_arrays(frames=flat).picture_hash != Clip.from_arrays(frames=tall).picture_hash


def test_with_sound_cuts_both_to_the_shorter_and_says_so():
    joined = small(n=8, fps=4).with_sound(small(samples=12))
    assert levels(joined) == [0, 1, 2, 3, 4, 5]
    assert hundredths(joined) == list(range(12))
    assert joined.duration == 1.5
    assert "picture cut from 2.000 to 1.500 s, the sound's length" in joined.notes
    other = small(n=4, fps=4).with_sound(small(samples=12))
    assert levels(other) == [0, 1, 2, 3]
    assert hundredths(other) == list(range(8))
    assert "sound cut from 1.500 to 1.000 s, the picture's length" in other.notes
    assert (other.path, other.sha256) == (None, None), "a joined clip is no file"
    equal = small().with_sound(small())
    assert not [note for note in equal.notes if "cut" in note]


def test_with_sound_holds_a_still_and_keeps_the_other_rate():
    still = Clip.from_arrays(frames=made.picture(1)).with_sound(small(samples=12, rate=8))
    assert (still.duration, still.rate, len(still.times)) == (1.5, 8, 1)


def test_with_sound_needs_both():
    sound = Clip.from_arrays(waveform=np.zeros(8), rate=8)
    silent = Clip.from_arrays(frames=made.picture(4), fps=4)
    with pytest.raises(
        MediaError, match=r"sound is asked of a clip of 4 frames of 84x84, which has none: give a clip with"
    ):
        small().with_sound(silent)
    with pytest.raises(MediaError, match=r"a picture is asked of a clip of 1\.000 s of sound at 8 Hz, which has none"):
        sound.with_sound(small())
    with pytest.raises(MediaError, match="which has none"):
        silent.muted()
    with pytest.raises(MediaError, match="which has none"):
        silent.shifted(1)
    with pytest.raises(MediaError, match="which has none"):
        sound.blank()
    assert small().require_sound().require_picture().has_sound


def test_mutes():
    clip = made.clip()
    silence, noise = clip.muted(), clip.muted(kind="noise", seed=3)
    assert silence.waveform is not None
    assert noise.waveform is not None
    assert len(silence.waveform) == 32000
    assert not silence.waveform.any()
    assert 20 * np.log10(np.std(noise.waveform)) == pytest.approx(-50.5, abs=0.2)
    assert (
        noise.sound_hash == clip.muted(kind="noise", seed=3).sound_hash != clip.muted(kind="noise", seed=4).sound_hash
    )
    assert silence.notes[-1] == "muted (silence)"
    with pytest.raises(MediaError, match=r"unknown kind of mute 'silense'\. Did you mean 'silence'\?"):
        clip.muted(kind="silense")


def test_blanks():
    clip = made.clip()
    dark, dealt = clip.blank(), clip.blank(kind="scrambled", seed=1)
    assert dark.frames is not None
    assert dealt.frames is not None
    assert clip.frames is not None
    assert not dark.frames.any()
    assert dark.times.tolist() == clip.times.tolist()
    assert (dealt.frames != clip.frames).any()
    for k in (0, 7):
        assert np.array_equal(np.sort(dealt.frames[k], axis=None), np.sort(clip.frames[k], axis=None)), (
            "the same pixels"
        )
    patches = [
        f.reshape(6, 14, 6, 14, 3).transpose(0, 2, 1, 3, 4).reshape(36, -1) for f in (clip.frames[3], dealt.frames[3])
    ]
    assert sorted(map(bytes, patches[0])) == sorted(map(bytes, patches[1])), "whole patches move"
    assert dealt.picture_hash != clip.blank(kind="scrambled", seed=2).picture_hash
    with pytest.raises(MediaError, match=r"unknown kind of blank 'drak'\. Did you mean 'dark'\?"):
        clip.blank(kind="drak")
    with pytest.raises(MediaError, match=r"cannot scramble 84x84 frames in patches of 60 px: take a smaller patch="):
        clip.blank(kind="scrambled", patch=60)


def test_shifts_by_hand():
    clip = small(samples=8, rate=8)
    assert hundredths(clip.shifted(0.25)) == [0, 0, 0, 1, 2, 3, 4, 5]
    assert hundredths(clip.shifted(-0.25)) == [2, 3, 4, 5, 6, 7, 0, 0]
    assert hundredths(clip.shifted(0)) == list(range(8))
    assert levels(clip.shifted(0.25)) == [0, 1, 2, 3]
    assert clip.shifted(0.25).notes == ("sound shifted by +0.25 s, silence in the gap",)
    with pytest.raises(MediaError, match=r"shifted\(-1\) would move all 1 s of sound out of the clip: shift by less"):
        clip.shifted(-1)
    with pytest.raises(MediaError, match="finite number of seconds, found nan"):
        clip.shifted(float("nan"))


def test_trims_by_hand():
    clip = small(n=4, fps=4, samples=8, rate=8)
    part = clip.trimmed(0.25, 0.75)
    assert (levels(part), part.times.tolist(), hundredths(part), part.duration) == (
        [1, 2],
        [0.0, 0.25],
        [2, 3, 4, 5],
        0.5,
    )
    between = clip.trimmed(0.3, 0.4)
    assert (levels(between), between.times.tolist()) == ([1], [0.0]), "the frame on display stands for the window"
    tail = clip.trimmed(0.5)
    assert (levels(tail), hundredths(tail), tail.duration) == ([2, 3], [4, 5, 6, 7], 0.5)
    assert clip.trimmed().picture_hash == clip.picture_hash
    assert "asked to 9 s, past its end" in clip.trimmed(0, 9).notes[-1]
    with pytest.raises(MediaError, match=r"trimmed\(start=1\) starts past the end of .*, which lasts 1 s"):
        clip.trimmed(1.0)
    with pytest.raises(MediaError, match=r"end= must come after start=, found start=0.5 s and end=0.5 s"):
        clip.trimmed(0.5, 0.5)
    with pytest.raises(MediaError, match="cannot be negative, found -1 s"):
        clip.trimmed(-1)


def test_changes_compose_and_are_remembered():
    clip = small(n=8, fps=4, samples=16).trimmed(0.5).shifted(0.25).muted().blank()
    assert clip.notes == (
        "trimmed to 0.5-2 s",
        "sound shifted by +0.25 s, silence in the gap",
        "muted (silence)",
        "blanked (dark)",
    )
    assert repr(clip) == "Clip(6 frames of 4x4 and 1.500 s of sound at 8 Hz, 1.500 s)"


def test_every_refusal_is_one_family():
    assert issubclass(MediaError, AvLensError)
