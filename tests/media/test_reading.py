"""`load_clip` against files written by PyAV or by hand: times, windows, thinning, alignment, colours, containers."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import media_samples as made
import numpy as np
import pytest

import av_lens.media.source
from av_lens.errors import MediaError
from av_lens.media import Clip, ClipFile, load_clip, probe_media
from av_lens.media.arrays import check_stream

EIGHTH = Fraction(1, 8)
STEREO = np.array([[1.0], [0.5]], dtype=np.float32)


def stereo(rate: int) -> np.ndarray:
    """A chirp at full and at half level: its mono mean is three quarters."""
    return np.stack([made.chirp(rate=rate)] * 2) * STEREO


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reading")


@pytest.mark.parametrize(
    ("name", "codecs", "rate", "tail"),
    [
        ("a.mp4", ("libx264", "aac"), 44100, 0),
        ("a.mov", ("libx264", "aac"), 44100, 0),
        ("a.mkv", ("libx264", "aac"), 44100, 1024 / 44100),
        ("a.webm", ("libvpx", "libopus"), 48000, 0),
        ("b.mkv", ("mpeg4", "flac"), 44100, 0),
        ("b.avi", ("mjpeg", "pcm_s16le"), 22050, 0),
    ],
)
def test_every_container_gives_the_same_clip(folder: Path, name: str, codecs: tuple[str, str], rate: int, tail: float):
    pix_fmt = "yuvj420p" if codecs[0] == "mjpeg" else "yuv420p"
    path = made.write_video(
        folder / name, made.picture(), list(range(16)), EIGHTH, stereo(rate), rate=rate, codecs=codecs, pix_fmt=pix_fmt
    )
    clip = load_clip(path)
    assert clip.frames is not None
    assert clip.waveform is not None
    assert clip.times.tolist() == [k / 8 for k in range(16)]
    assert made.index_of(clip.frames) == list(range(16))
    assert abs(len(clip.waveform) - 32000) <= tail * 16000 + 1
    assert made.lag(clip.waveform, made.chirp()) == 0
    assert np.corrcoef(clip.waveform[:32000], made.chirp()[: len(clip.waveform)])[0, 1] > 0.99
    assert np.std(clip.waveform) / np.std(made.chirp()) == pytest.approx(0.75, abs=0.02), "channels are averaged"
    assert clip.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert clip.path == str(path)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp3", "libmp3lame"), ("a.flac", "flac"), ("a.m4a", "aac"), ("a.ogg", "flac")]
)
def test_sound_files(folder: Path, name: str, codec: str):
    path = made.write_video(folder / name, None, [], EIGHTH, stereo(44100), codecs=("", codec))
    clip = load_clip(path)
    assert clip.frames is None
    assert clip.waveform is not None
    assert clip.times.shape == (0,)
    assert len(clip.waveform) == 32000
    assert clip.duration == 2.0
    assert made.lag(clip.waveform, made.chirp()) == 0
    part = load_clip(path, start=0.7, end=1.3)
    assert part.waveform is not None
    assert len(part.waveform) == 9600
    assert made.lag(part.waveform, made.chirp()[11200:20800]) == 0


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif"])
def test_images(folder: Path, suffix: str):
    from PIL import Image

    picture = made.picture(1, 30, 41)[0]
    Image.fromarray(picture).save(folder / f"still.{suffix}")
    clip = load_clip(folder / f"still.{suffix}")
    assert clip.frames is not None
    assert clip.is_image
    assert clip.times.tolist() == [0.0]
    assert clip.waveform is None
    assert clip.frames.shape == (1, 30, 41, 3)
    assert np.abs(clip.frames[0].astype(int) - picture).max() <= (0 if suffix != "gif" else 40)
    assert clip.duration == 0.0 or suffix == "gif"


def test_moving_gif_keeps_its_delays(folder: Path):
    ticks = [0, 10, 15, 90]
    path = made.write_video(
        folder / "moving.gif", made.picture(4), ticks, Fraction(1, 100), codecs=("gif", ""), pix_fmt="rgb8"
    )
    clip = load_clip(path)
    assert clip.times.tolist() == [0.0, 0.1, 0.15, 0.9]
    assert not clip.is_image


def test_wavs_by_hand(folder: Path):
    values = np.array([[0, 16384, -32768, 32767], [0, 0, -32768, 32767]])
    cases = {
        "h": (values, [0, 0.25, -1, 32767 / 32768]),
        "B": (np.array([[128, 192, 0, 255], [128, 128, 0, 255]]), [0, 0.25, -1, 127 / 128]),
        "i": (values * 65536, [0, 0.25, -1, 32767 / 32768]),
        "f": (np.array([[0, 0.5, -1, 1], [0, 0, -1, 1]]), [0, 0.25, -1, 1]),
    }
    for kind, (samples, wanted) in cases.items():
        (folder / f"{kind}.wav").write_bytes(made.wav(samples, 16000, kind))
        clip = load_clip(folder / f"{kind}.wav")
        assert clip.waveform is not None
        np.testing.assert_allclose(clip.waveform, wanted, atol=1e-7, err_msg=kind)
        assert clip.duration == 4 / 16000


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 44101])
def test_resampling_keeps_level_and_time(folder: Path, rate: int):
    t = np.arange(rate) / rate
    path = folder / f"{rate}.wav"
    path.write_bytes(made.wav(0.5 * np.sin(2 * np.pi * 1000 * t)[None], rate, "f"))
    clip = load_clip(path)
    assert clip.waveform is not None
    assert len(clip.waveform) == 16000
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(clip.waveform - wanted)[400:-400].max() < 1e-3


def test_resampling_removes_what_would_alias(folder: Path):
    t = np.arange(44100) / 44100
    (folder / "high.wav").write_bytes(made.wav(0.9 * np.sin(2 * np.pi * 9000 * t)[None], 44100, "f"))
    clip = load_clip(folder / "high.wav")
    assert clip.waveform is not None
    assert np.abs(clip.waveform[400:-400]).max() < 1e-3


def test_overshoot_is_clamped_and_said(folder: Path):
    (folder / "loud.wav").write_bytes(made.wav(np.array([[0.0, 1.5, -2.0]]), 16000, "f"))
    clip = load_clip(folder / "loud.wav")
    assert clip.waveform is not None
    assert clip.waveform.tolist() == [0.0, 1.0, -1.0]
    assert clip.notes == ("the sound peaked at 2.000; clamped to [-1, 1]",)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_sound_that_starts_late_stays_late(folder: Path, container: str):
    path = made.write_video(
        folder / f"late.{container}", made.picture(), list(range(16)), EIGHTH, stereo(44100)[:, :44100], sound_start=0.4
    )
    clip = load_clip(path)
    assert clip.waveform is not None
    assert not clip.waveform[: round(0.37 * 16000)].any()
    assert abs(made.lag(clip.waveform[6400:], 0.75 * made.chirp()[:16000])) <= 16, "within a millisecond"
    assert any("the sound starts 0.4" in note or "the sound starts 0.3" in note for note in clip.notes)
    part = load_clip(path, start=1.0)
    assert part.waveform is not None
    assert abs(made.lag(part.waveform, 0.75 * made.chirp()[9600:16000])) <= 16


def test_a_picture_that_starts_late_keeps_its_times(folder: Path):
    path = made.write_video(folder / "late_picture.mp4", made.picture(8), list(range(8, 16)), EIGHTH, stereo(44100))
    clip = load_clip(path)
    assert clip.times.tolist() == [1 + k / 8 for k in range(8)]
    assert clip.waveform is not None
    assert made.lag(clip.waveform, made.chirp()) == 0


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.5, 1.5), (0.3, 1.17), (1.25, None)])
def test_windows(folder: Path, container: str, start: float, end: float | None):
    path = folder / f"window.{container}"
    if not path.exists():
        options = {"g": "4", "bf": "2"}
        made.write_video(path, made.picture(), list(range(16)), EIGHTH, stereo(44100), options=options)
    whole = load_clip(path)
    part = load_clip(path, start=start, end=end)
    stop = whole.duration if end is None else end
    inside = (whole.times >= start - 1e-9) & (whole.times < stop - 1e-9)
    np.testing.assert_allclose(part.times, whole.times[inside] - start, atol=1e-9)
    assert part.frames is not None
    assert whole.frames is not None
    assert np.array_equal(part.frames, whole.frames[inside]), "a seek must give the same pictures"
    assert part.waveform is not None
    assert whole.waveform is not None
    expected = whole.waveform[round(start * 16000) : round(stop * 16000)]
    assert abs(len(part.waveform) - len(expected)) <= 1
    n = min(len(part.waveform), len(expected))
    assert made.lag(part.waveform, expected) == 0
    error = np.abs(part.waveform[:n] - expected[:n])[64:-64].max()
    assert error < 2e-3, "a window sounds like the same seconds of the whole"
    assert part.window == (start, pytest.approx(start + part.duration))
    assert end is None or part.duration == pytest.approx(end - start)


def test_window_between_two_frames_shows_the_one_on_display(folder: Path):
    path = made.write_video(folder / "slow.mp4", made.picture(3), [0, 2, 4], Fraction(1, 1))
    clip = load_clip(path, start=2.5, end=3.5)
    assert clip.frames is not None
    assert made.index_of(clip.frames) == [1]
    assert clip.times.tolist() == [0.0]
    assert "the one on display at its start is kept" in clip.notes[0]


def test_window_that_reaches_past_the_end_says_so(folder: Path):
    path = Path(made.clip().save(folder / "two.mp4"))
    clip = load_clip(path, start=1.5, end=9)
    assert clip.duration == 0.5
    assert "asked to 9 s; the file ends at 2.000 s" in clip.notes


@pytest.mark.parametrize(
    ("fps", "wanted"), [(2, [0, 4, 8, 12]), (1, [0, 8]), (4, [0, 2, 4, 6, 8, 10, 12, 14]), (3, [0, 3, 5, 8, 11, 13])]
)
def test_thinning_takes_the_nearest_frames_with_their_true_times(folder: Path, fps: float, wanted: list[int]):
    clip = load_clip(made.clip().save(folder / "thin.mp4"), fps=fps)
    targets = np.arange(2 * fps) / fps
    nearest = [int(np.argmin(np.abs(np.arange(16) / 8 - t))) for t in targets]
    assert nearest == wanted, "the expectation, derived twice"
    assert clip.frames is not None
    assert made.index_of(clip.frames) == wanted
    assert clip.times.tolist() == [k / 8 for k in wanted]
    assert clip.duration == 2.0
    assert clip.notes == ()


def test_thinning_beyond_the_source_takes_each_frame_once(folder: Path):
    clip = load_clip(made.clip().save(folder / "thick.mp4"), fps=30)
    assert len(clip.times) == 16
    assert clip.notes == ("the source has fewer frames than fps= asks for in places; each is taken once",)


def test_thinning_counts_from_the_window(folder: Path):
    clip = load_clip(made.clip().save(folder / "thin_window.mp4"), start=0.5, end=1.75, fps=2)
    assert clip.frames is not None
    assert made.index_of(clip.frames) == [4, 8, 12]
    assert clip.times.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(folder: Path, degrees: int):
    corner = np.zeros((2, 64, 96, 3), dtype=np.uint8)
    corner[:, :32, :32] = 255
    path = made.write_video(folder / f"turned{degrees}.mp4", corner, [0, 1], EIGHTH, rotation=degrees)
    clip = load_clip(path)
    turned = np.rot90(corner, k=degrees // 90, axes=(1, 2))
    assert clip.frames is not None
    assert clip.frames.shape == turned.shape
    assert np.abs(clip.frames.astype(int) - turned).mean() < 3
    assert f"turned by {degrees} degrees, as the file asks" in clip.notes


@pytest.mark.parametrize("full_range", [False, True])
def test_both_ranges_of_colour_are_understood(folder: Path, full_range: bool):
    grey = np.repeat(np.array([0, 60, 128, 200, 255], np.uint8), 64 * 64 * 3).reshape(5, 64, 64, 3)
    path = made.write_video(folder / f"range{full_range}.mp4", grey, list(range(5)), EIGHTH, full_range=full_range)
    clip = load_clip(path)
    assert clip.frames is not None
    assert np.abs(clip.frames.astype(int) - grey).max() <= 4


@pytest.mark.parametrize(
    ("layout", "channels", "codec"), [("5.1", 6, "aac"), ("7.1", 8, "aac"), ("hexadecagonal", 16, "pcm_f32le")]
)
def test_many_channels_are_averaged(folder: Path, layout: str, channels: int, codec: str):
    import av

    path = folder / f"{layout}.mkv"
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    levels = np.arange(1, channels + 1) / channels
    levels[3] = 0  # the low-frequency channel cannot carry the tone
    with av.open(str(path), "w") as out:
        audio = out.add_stream(codec, rate=48000, layout=layout)
        audio.bit_rate = 64000 * channels
        packed = np.ascontiguousarray((tone[:, None] * levels).astype(np.float32).reshape(1, -1))
        block = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
        block.sample_rate = 48000
        resampler = av.AudioResampler(format=audio.format.name, layout=layout, rate=48000)
        for piece in [*resampler.resample(block), *resampler.resample(None)]:
            out.mux(audio.encode(piece))
        out.mux(audio.encode(None))
    clip = load_clip(path)
    assert clip.waveform is not None
    wanted = levels.mean() * 0.5 / np.sqrt(2)
    assert np.std(clip.waveform[2000:14000]) == pytest.approx(wanted, rel=0.05)


def test_pixels_that_are_not_square_are_said(folder: Path):
    options = {"x264-params": "sar=4/3"}
    path = made.write_video(folder / "wide.mp4", made.picture(2), [0, 1], EIGHTH, options=options)
    assert "its pixels are not square (4/3); kept as stored" in load_clip(path).notes


def test_a_cover_picture_is_no_video(folder: Path):
    import av

    path = folder / "cover.mp3"
    with av.open(str(path), "w") as out:
        audio = out.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = out.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = 0x400
        out.mux(cover.encode(av.VideoFrame.from_ndarray(made.picture(1, 32, 32)[0], format="rgb24")))
        block = av.AudioFrame.from_ndarray(made.chirp(rate=44100)[None], format="fltp", layout="mono")
        block.sample_rate = 44100
        out.mux(audio.encode(block))
        out.mux(audio.encode(None))
    clip = load_clip(path)
    assert not clip.has_picture
    assert clip.has_sound


@pytest.fixture(scope="module")
def two_sounds(folder: Path) -> Path:
    """A film with a picture (stream 1) between two sounds, the later of them at half level and in French."""
    import av

    path = folder / "two_sounds.mkv"
    with av.open(str(path), "w") as out:
        first = out.add_stream("flac", rate=16000, layout="mono")
        video = out.add_stream("libx264", rate=8)
        video.height, video.width, video.pix_fmt = 84, 84, "yuv420p"
        second = out.add_stream("flac", rate=16000, layout="mono")
        second.metadata["language"] = "fre"
        out.start_encoding()
        for k, frame in enumerate(made.picture()):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            image.pts, image.time_base = k, EIGHTH
            out.mux(video.encode(image))
        out.mux(video.encode(None))
        for stream, level in ((first, 1.0), (second, 0.5)):
            tone = np.ascontiguousarray(made.chirp()[None] * np.float32(level) * 32767).astype(np.int16)
            block = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            block.sample_rate, block.pts, block.time_base = 16000, 0, Fraction(1, 16000)
            out.mux(stream.encode(block))
            out.mux(stream.encode(None))
    return path


def test_of_several_streams_another_can_be_taken(two_sounds: Path):
    usual, other = load_clip(two_sounds), load_clip(two_sounds, stream={"sound": 2})
    assert usual.waveform is not None
    assert other.waveform is not None
    np.testing.assert_allclose(usual.waveform, made.chirp(), atol=1e-4)
    np.testing.assert_allclose(other.waveform, made.chirp() / 2, atol=1e-4)
    assert usual.picture_hash == other.picture_hash
    assert usual.notes == ("left out: sound 2 (flac, fre); stream={'sound': 2} takes it",)
    assert other.notes == ("left out: sound 0 (flac); stream={'sound': 0} takes it",)
    lazy = ClipFile(str(two_sounds), stream={"sound": 2})
    assert lazy.load().sound_hash == other.sound_hash
    assert ClipFile(str(two_sounds)).load().sound_hash == usual.sound_hash
    assert lazy.probe() == probe_media(two_sounds, stream={"sound": 2})
    assert len({lazy, ClipFile(str(two_sounds)), ClipFile(str(two_sounds), stream={"sound": 2})}) == 2


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        ({"sound": 1}, r"stream={'sound': 1} is no sound of .*; there: sound 0 \(flac\), sound 2 \(flac, fre\)"),
        ({"picture": 7}, r"stream={'picture': 7} is no picture of .*; there: picture 1 \(h264\)\."),
        ({"sond": 2}, r"unknown kind of stream 'sond'\. Did you mean 'sound'\?"),
    ],
)
def test_streams_that_are_not_there(two_sounds: Path, stream: dict[str, int], text: str):
    with pytest.raises(MediaError, match=text):
        load_clip(two_sounds, stream=stream)
    with pytest.raises(MediaError, match=text):
        ClipFile(str(two_sounds), stream=stream).probe()


def test_a_choice_of_streams_that_is_none():
    with pytest.raises(MediaError, match=r"stream={'sound': \.\.\.} takes a stream's number, found 'fre'"):
        check_stream({"sound": "fre"})
    with pytest.raises(MediaError, match=r'stream= must say what is chosen, such as {"sound": 2}, found 2'):
        check_stream(2)
    assert check_stream({"sound": np.int64(2)}) == {"sound": 2}


def test_a_cover_is_a_picture_where_it_is_asked_for(folder: Path):
    import av

    path = folder / "cover.m4a"
    with av.open(str(path), "w", format="mp4") as out:
        audio, cover = out.add_stream("aac", rate=44100, layout="mono"), out.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt, cover.disposition = "yuvj420p", 0x400
        out.mux(cover.encode(av.VideoFrame.from_ndarray(made.picture(1, 32, 32)[0], format="rgb24")))
        block = av.AudioFrame.from_ndarray(made.chirp(rate=44100)[None], format="fltp", layout="mono")
        block.sample_rate = 44100
        out.mux(audio.encode(block))
        out.mux(audio.encode(None))
    clip = load_clip(path, stream={"picture": 1})
    assert (clip.is_image, clip.has_sound, clip.duration) == (True, True, load_clip(path).duration)
    assert "left out: picture 1 (mjpeg, cover); stream={'picture': 1} takes it" in load_clip(path).notes


def test_what_is_mixed_rounded_or_left_out_is_said(folder: Path):
    from PIL import Image

    said = load_clip(made.write_video(folder / "mixed.wav", None, [], EIGHTH, stereo(44100), codecs=("", "pcm_s16le")))
    assert said.notes == ("2 channels of sound are averaged into one", "sound resampled from 44100 to 16000 Hz")
    clear = made.picture(1, 30, 41)[0]
    Image.fromarray(np.dstack([clear, np.full((30, 41), 9, np.uint8)])).save(folder / "clear.png")
    clip = load_clip(folder / "clear.png")
    assert clip.frames is not None
    assert np.array_equal(clip.frames[0], clear)
    assert clip.notes == ("its transparency is left out; the colours below it are shown",)
    Image.fromarray(np.dstack([clear, np.full((30, 41), 255, np.uint8)])).save(folder / "opaque.png")
    assert load_clip(folder / "opaque.png").notes == ()
    deep = made.write_video(
        folder / "deep.mkv", made.picture(2), [0, 1], EIGHTH, codecs=("ffv1", ""), pix_fmt="yuv420p10le"
    )
    assert load_clip(deep).notes == ("its 10 bits a colour are rounded to 8",)


def test_clip_files_load_once_and_notice_changes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = folder / "lazy.mp4"
    made.clip().save(path)
    lazy = ClipFile(str(path), start=0.5, end=1.5)
    first = lazy.load()
    assert first.duration == 1.0
    assert ClipFile(str(path), start=0.5, end=1.5).load() is first
    assert ClipFile(str(path)).load() is not first
    made.clip(waveform=made.chirp(1.5)).muted().save(path)
    changed = lazy.load()
    assert changed.sound_hash != first.sound_hash
    monkeypatch.setattr("av_lens.media.source._MOST_BYTES", 0)
    other = ClipFile(str(path), start=0.25).load()
    assert ClipFile(str(path), start=0.25).load() is not other, "over the budget nothing is kept"


def test_clip_files_notice_a_change_of_equal_size(folder: Path):
    path = folder / "same_size.wav"
    path.write_bytes(made.wav(np.zeros((1, 100)), 16000))
    os.utime(path, ns=(10**18, 10**18))
    before = ClipFile(str(path)).load()
    path.write_bytes(made.wav(np.ones((1, 100)), 16000))
    os.utime(path, ns=(10**18, 10**18 + 10**9))
    after = ClipFile(str(path)).load()
    assert (after.sound_hash, after.sha256) != (before.sound_hash, before.sha256)
    assert after.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_probes_decode_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = made.clip(frames=made.picture(16, 40, 60)).save(folder / "probe.mp4")
    monkeypatch.setattr(av_lens.media.source, "load_clip", None)
    facts = probe_media(path)
    assert (facts.duration, facts.width, facts.height, facts.frame_rate, facts.sound_rate) == (2.0, 60, 40, 8.0, 16000)
    assert facts.has_picture
    assert facts.has_sound
    assert not facts.is_image
    assert ClipFile(path, start=1.0).probe() == facts


def test_names_that_look_like_protocols_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http:x.mp4", "pipe:0.mp4", "pattern%03d.mp4", "späce name.mp4"):
        made.clip().save(name)
        assert load_clip(name).duration == 2.0


def test_the_room_is_light_and_silent():
    heavy = ("av", "torch", "scipy", "torchaudio", "PIL")
    code = f"import sys, av_lens.media; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_the_real_clip(real_clip_path: Path):
    clip = load_clip(real_clip_path)
    assert clip.frames is not None
    assert clip.waveform is not None
    assert clip.frames.shape == (250, 360, 640, 3)
    np.testing.assert_allclose(clip.times, np.arange(250) / 25, atol=1e-12)
    assert clip.duration == 10.0
    assert len(clip.waveform) == 158639, "427 AAC frames of 1024 samples at 44100 Hz; the 428th is priming"
    part = load_clip(real_clip_path, start=3.3, end=5.1, fps=2)
    np.testing.assert_allclose(part.times, [0.02, 0.5, 0.98, 1.5], atol=1e-9)
    assert part.frames is not None
    assert np.array_equal(part.frames[1], clip.frames[95])
    back = Clip.from_arrays(frames=clip.frames[:10, :90, :121], times=clip.times[:10], waveform=clip.waveform[:6400])
    assert len(back.to_mp4_bytes()) > 1000
