"""Sixty files as people own them, each against a plain loop over PyAV's packets (or PIL), or refused in true words.

Containers x orders of streams x starts x orientations x truncations. What the loop decodes is held against what
`load_clip` gives: every frame, every time, every sample. Nothing else may happen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import media_samples as made
import numpy as np
import pytest
from PIL import Image, ImageOps

import av_lens.media.source
from av_lens.errors import MediaError
from av_lens.media import load_clip, probe_media
from av_lens.media.arrays import Budget
from av_lens.media.sounds import Sounds

CODECS = {
    "mp4": ("libx264", "aac", 44100),
    "mov": ("libx264", "aac", 44100),
    "3gp": ("libx264", "aac", 44100),
    "mkv": ("libx264", "aac", 44100),
    "webm": ("libvpx", "libopus", 48000),
    "ts": ("libx264", "aac", 44100),
    "nut": ("libx264", "aac", 44100),
    "avi": ("mpeg4", "libmp3lame", 44100),
    "flv": ("flv", "libmp3lame", 44100),
    "wmv": ("wmv2", "wmav2", 44100),
    "mpg": ("mpeg2video", "mp2", 44100),
    "mxf": ("mpeg2video", "pcm_s16le", 48000),
}
SOUNDS = {
    "mp3": "libmp3lame", "flac": "flac", "opus": "libopus", "m4a": "aac", "aac": "aac", "wav": "pcm_s16le",
    "ac3": "ac3", "aiff": "pcm_s16be", "au": "pcm_s16be", "caf": "pcm_s16be", "w64": "pcm_s16le", "wma": "wmav2",
}  # fmt: skip
FLIPS: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "left-right": ((-1, 0, 0, 1), lambda x: x[:, :, ::-1]),
    "top-bottom": ((1, 0, 0, -1), lambda x: x[:, ::-1]),
    "half turn": ((-1, 0, 0, -1), lambda x: x[:, ::-1, ::-1]),
    "diagonal": ((0, 1, 1, 0), lambda x: x.swapaxes(1, 2)),
    "clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1, (1, 2))),
    "counter-clockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1, (1, 2))),
    "other diagonal": ((0, -1, -1, 0), lambda x: x.swapaxes(1, 2)[:, ::-1, ::-1]),
}


def film(
    path: Path,
    order: str = "va",
    *,
    starts: tuple[float, float] = (0.0, 0.0),
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    matrix: tuple[int, int, int, int] | None = None,
    codecs: tuple[str, str, int] | None = None,
    size: tuple[int, int] = (48, 64),
) -> Path:
    """Write pictures ("v"), sounds ("a") and subtitles ("s") in this order of streams, interleaved, with PyAV alone."""
    import av

    suffix = path.suffix[1:]
    video, audio, rate = codecs or CODECS.get(suffix) or ("", SOUNDS[suffix], 48000 if suffix == "opus" else 44100)
    fps = 25 if suffix in ("mpg", "mxf") else 8
    packets: list[Any] = []
    with av.open(str(path), "w", options=container or {}) as out:
        streams = []
        for kind in order:
            if kind == "v":
                stream = out.add_stream(video, rate=fps, options=options or {})
                stream.height, stream.width = size
                stream.pix_fmt = "yuv420p"
                stream.codec_context.thread_count = 1
                stream.time_base = stream.codec_context.time_base = Fraction(1, fps)
                if matrix is not None:
                    a, b, c, d = (v << 16 for v in matrix)
                    stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
            elif kind == "a":
                stream = out.add_stream(audio, rate=rate, layout="mono")
                stream.bit_rate = 96_000
                stream.codec_context.options = {"aac_pns": "0"} if audio == "aac" else {}
            else:
                stream = out.add_stream("ass" if suffix == "mkv" else "mov_text")
            streams.append(stream)
        out.start_encoding()
        for k, (kind, stream) in enumerate(zip(order, streams, strict=True)):
            if kind == "v":
                for n, frame in enumerate(made.picture(16, *size)):
                    image = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
                    image.pts, image.time_base = n + round(starts[0] * fps), Fraction(1, fps)
                    packets += stream.encode(image)
            elif kind == "a":
                tone = made.chirp(16 / fps, rate)[None] * np.float32(1 / (1 + k))
                block = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                block.sample_rate, block.time_base, block.pts = rate, Fraction(1, rate), round(starts[1] * rate)
                shaped = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate)
                for piece in [*shaped.resample(block), *shaped.resample(None)]:
                    packets += stream.encode(piece)
            packets += stream.encode(None) if kind != "s" else []
        for packet in sorted(packets, key=lambda p: (p.dts or 0) * p.time_base):
            out.mux(packet)
    return path


@dataclass
class Plain:
    """What a loop over packets finds in one stream of each kind."""

    zero: Fraction
    times: list[float]
    frames: list[np.ndarray]
    sound: np.ndarray
    begins: float
    rate: int


def plain(path: Path, picture: int | None, sound: int | None) -> Plain:
    """Decode everything in a plain loop, one thread; the clock is 0 where mp4 and mkv say, else at the earliest."""
    import av

    pictures: list[tuple[Fraction, np.ndarray]] = []
    sounds: list[tuple[Fraction | None, np.ndarray]] = []
    rate = 0
    with av.open(str(path)) as container:
        chosen = [container.streams[k] for k in (picture, sound) if k is not None]
        starts = [s.start_time * s.time_base for s in chosen if s.start_time is not None]
        zero = min(starts, default=Fraction(0))
        anchored = "mp4" in container.format.name or "matroska" in container.format.name
        zero = Fraction(0) if anchored and 0 <= zero <= 5 else zero
        for stream in container.streams.video:
            stream.codec_context.thread_count = 1
        for packet in container.demux(chosen):
            for frame in packet.decode():
                if packet.stream.index == picture:
                    stamp = frame.pts if frame.pts is not None else frame.dts
                    pictures.append((stamp * frame.time_base - zero, frame.to_ndarray(format="rgb24")))
                else:
                    rate = frame.sample_rate
                    values = frame.to_ndarray().astype(np.float64).reshape(1, -1)[0]
                    values /= 1.0 if frame.format.name.startswith(("flt", "dbl")) else 2.0**15
                    sounds.append((None if frame.pts is None else frame.pts * frame.time_base - zero, values))
    waveform = np.concatenate([values for _, values in sounds]) if sounds else np.zeros(0)
    begins = float(sounds[0][0] or 0) if sounds else 0.0
    return Plain(zero, [float(t) for t, _ in pictures], [frame for _, frame in pictures], waveform, begins, rate)


def same_as_plain(
    path: Path,
    *,
    picture: int | None,
    sound: int | None,
    padding: int = 0,
    turned: Callable[[np.ndarray], np.ndarray] = lambda frames: frames,
    **asked: Any,
) -> None:
    """Hold a clip against the loop; `padding`: samples of the last AAC packet that the file's own count leaves out."""
    truth = plain(path, picture, sound)
    clip = load_clip(path, sound_rate=truth.rate or 16000, **asked)
    if picture is None:
        assert clip.frames is None
    else:
        assert clip.frames is not None
        np.testing.assert_allclose(clip.times, truth.times, atol=1e-6)
        wanted = turned(np.stack(truth.frames)).astype(int)
        assert clip.frames.shape == wanted.shape
        assert np.abs(clip.frames - wanted).mean(axis=(1, 2, 3)).max() < 3, "a frame beside it differs by 12"
    if sound is None:
        assert clip.waveform is None
        return
    assert clip.waveform is not None
    silence = np.zeros(max(0, round(truth.begins * truth.rate)))
    wanted = np.concatenate([silence, truth.sound[max(0, -round(truth.begins * truth.rate)) :]]).clip(-1, 1)
    # mkv and flv round time stamps to 1 ms: the sound may be set right by up to half of that.
    reach = round(0.0006 * truth.rate)
    near = min(range(-reach, reach + 1), key=lambda k: (mismatch(clip.waveform, wanted, k), abs(k)))
    assert mismatch(clip.waveform, wanted, near) < 1e-3
    assert -padding - abs(near) <= len(clip.waveform) - len(wanted) <= abs(near)


def mismatch(found: np.ndarray, wanted: np.ndarray, late: int) -> float:
    """The largest difference between two sounds, the first of them `late` samples later than the second."""
    found, wanted = found[max(late, 0) :], wanted[max(-late, 0) :]
    count = min(len(found), len(wanted))
    return float(np.abs(found[:count] - wanted[:count]).max())


AAC = 1024
ORDERS_AND_STARTS = [
    *((suffix, order, starts) for suffix in ("mp4", "mov", "mkv", "webm", "ts", "flv", "nut", "wmv")
      for order, starts in (("av", (0.0, 0.0)), ("va", (3.0, 3.0)), ("av", (0.0, 0.5)), ("va", (10.0, 10.0)))),
    ("3gp", "av", (0.5, 0.0)), ("mkv", "av", (0.5, 0.0)), ("ts", "va", (0.5, 0.0)), ("webm", "va", (0.5, 0.0)),
    ("avi", "av", (0.0, 0.0)), ("avi", "va", (0.0, 0.0)), ("mpg", "av", (0.0, 0.0)), ("mxf", "va", (0.0, 0.0)),
]  # fmt: skip
IN_SHORT = {("mkv", "va", (3.0, 3.0)), ("ts", "av", (0.0, 0.5)), ("wmv", "va", (10.0, 10.0))}


@pytest.mark.parametrize(
    ("suffix", "order", "starts"),
    [pytest.param(*case, marks=[] if case in IN_SHORT else pytest.mark.slow) for case in ORDERS_AND_STARTS],
)
def test_orders_and_starts(tmp_path: Path, suffix: str, order: str, starts: tuple[float, float]):
    path = film(tmp_path / f"film.{suffix}", order, starts=starts)
    padding = AAC if suffix in ("mp4", "mov", "3gp") else 0
    if suffix == "flv":  # has no table of streams: they come in the order of their first packets
        order = "va" if starts[0] < starts[1] else "av"
    same_as_plain(path, picture=order.index("v"), sound=order.index("a"), padding=padding)


SLOW = pytest.mark.slow
OTHERS = [
    pytest.param("sva", "mkv", 1, 2, ("subtitle 0 (ssa)",), id="subtitles first"),
    pytest.param("ava", "mp4", 1, 0, ("sound 2 (aac)", "stream={'sound': 2} takes it"), id="a second sound"),
    pytest.param("avva", "mkv", 1, 0, ("picture 2 (h264), sound 3 (aac)",), id="two of each", marks=SLOW),
    pytest.param("saav", "mkv", 3, 1, ("subtitle 0 (ssa), sound 2 (aac)",), id="picture last", marks=SLOW),
]


@pytest.mark.parametrize(("order", "suffix", "picture", "sound", "said"), OTHERS)
def test_streams_beside(tmp_path: Path, order: str, suffix: str, picture: int, sound: int, said: tuple[str, ...]):
    path = film(tmp_path / f"film.{suffix}", order)
    same_as_plain(path, picture=picture, sound=sound, padding=AAC)
    notes = load_clip(path).notes
    left = next(note for note in notes if note.startswith("left out: "))
    assert all(words in left for words in said), left


@pytest.mark.parametrize("flip", [pytest.param(k, marks=[] if k == "diagonal" else SLOW) for k in FLIPS])
def test_display_matrices(tmp_path: Path, flip: str):
    matrix, turned = FLIPS[flip]
    suffix = ("mp4", "mkv", "mov", "webm")[list(FLIPS).index(flip) % 4]
    path = film(tmp_path / f"film.{suffix}", "v", matrix=matrix)
    same_as_plain(path, picture=0, sound=None, turned=turned)
    assert any(re.fullmatch(r"(turned|mirrored) .*, as the file asks", note) for note in load_clip(path).notes)


@pytest.mark.parametrize("suffix", ["jpg", *(pytest.param(s, marks=SLOW) for s in ("png", "webp", "tiff", "avif"))])
def test_eight_exif_orientations(tmp_path: Path, suffix: str):
    picture = made.picture(1, 48, 64)[0].copy()
    picture[30:, 40:] = (0, 0, 200)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        path = tmp_path / f"still{orientation}.{suffix}"
        Image.fromarray(picture).save(path, exif=exif, quality=95)
        wanted = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
        clip = load_clip(path)
        assert clip.frames is not None
        assert clip.frames[0].shape == wanted.shape
        assert np.abs(clip.frames[0] - wanted).mean() < 2, orientation
        assert (clip.duration, len(clip.notes)) == (0.0, int(orientation > 1))


@pytest.mark.parametrize("suffix", [pytest.param(s, marks=SLOW) for s in ("mp4", "mkv", "ts", "mov")])
def test_frames_that_are_stored_out_of_order(tmp_path: Path, suffix: str):
    path = film(tmp_path / f"film.{suffix}", "av", options={"bf": "3", "g": "5"})
    same_as_plain(path, picture=1, sound=0, padding=AAC if suffix in ("mp4", "mov") else 0)


@pytest.mark.parametrize("suffix", ["mp4", *(pytest.param(s, marks=SLOW) for s in ("mkv", "ts", "webm", "avi"))])
def test_as_many_frames_on_any_number_of_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str):
    options = {"bf": "3", "g": "5"} if suffix != "webm" else {}
    path = film(tmp_path / f"film.{suffix}", "av", options=options)
    monkeypatch.setattr(av_lens.media.source, "_SMALL_PICTURE", 0)
    for asked in ({}, {"start": 0.55, "end": 1.3}):
        found = set[object]()
        for threads in (1, 2, 16):
            monkeypatch.setattr(av_lens.media.source, "_THREADS", threads)
            clip = load_clip(path, **asked)
            found.add((len(clip.times), clip.picture_hash, clip.sound_hash, clip.notes))
        assert len(found) == 1
        assert asked or next(iter(found))[0] == 16  # type: ignore[index]


PROMISED = r"promises \d+ bytes more than it has \(truncated\?\)"
CUT = [
    *((suffix, "va", 0.9, PROMISED) for suffix in ("mkv", "webm", "avi", "flv", "wmv", "mxf")),
    *((suffix, "a", 0.95, PROMISED) for suffix in ("mp3", "opus", "wav", "aiff", "au", "caf", "w64", "wma")),
    ("mp4", "va", 0.95, PROMISED), ("flac", "a", 0.9, r"header promises 2\.000 s, its data end at 1\.\d+ s"),
    ("m4a", "a", 0.8, "its header is damaged or cut off"), ("aac", "a", 0.777, "a packet of the sound at .* does not"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "order", "kept", "said"),
    [pytest.param(*case, marks=[] if case[0] in ("mkv", "avi", "mp3", "opus") else SLOW) for case in CUT],
)
def test_truncated_files(tmp_path: Path, suffix: str, order: str, kept: float, said: str):
    container = {"movflags": "+faststart"} if suffix == "mp4" else {}
    path = film(tmp_path / f"film.{suffix}", order, container=container)
    whole = load_clip(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(MediaError, match=said):
        load_clip(path)
    if "its header is" in said:
        return
    part = load_clip(path, damaged="keep")
    assert len(part.times) + part.sound_end < len(whole.times) + whole.sound_end
    assert any(re.search(said, note) for note in part.notes)
    assert load_clip(path, end=0.25, damaged="refuse").duration == pytest.approx(0.25), "before the cut it is whole"


@pytest.mark.parametrize("suffix", ["jpg", pytest.param("gif", marks=SLOW)])
def test_truncated_pictures(tmp_path: Path, suffix: str):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"still.{suffix}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    assert load_clip(path).notes == ()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(MediaError, match=r"is damaged: it stops before its end mark \(truncated\?\)"):
        load_clip(path)
    assert "it stops before its end mark (truncated?)" in load_clip(path, damaged="keep").notes


def test_an_ogg_without_a_last_page_says_so(tmp_path: Path):
    path = film(tmp_path / "sound.opus", "a")
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"OggS")])
    assert "no page of it is marked as its last: its end may be missing (truncated?)" in load_clip(path).notes


def twice(path: Path) -> Path:
    """Join a file to itself, as `cat` does."""
    path.write_bytes(path.read_bytes() * 2)
    return path


@pytest.mark.parametrize("suffix", ["opus", pytest.param("aac", marks=SLOW)])
def test_joined_sounds_are_read_to_the_end(tmp_path: Path, suffix: str):
    path = film(tmp_path / f"sound.{suffix}", "a")
    rate = 48000 if suffix == "opus" else 44100
    one = load_clip(path, sound_rate=rate)
    two = load_clip(twice(path), sound_rate=rate)
    assert one.waveform is not None
    assert two.waveform is not None
    assert len(two.waveform) == 2 * len(one.waveform)
    half = len(one.waveform) + rate // 20
    assert np.corrcoef(two.waveform[half:], one.waveform[rate // 20 :])[0, 1] > 0.999
    assert suffix != "opus" or "several recordings one after the other; they are joined" in two.notes
    late = load_clip(path, start=2.5, end=3.0, sound_rate=rate)
    assert late.waveform is not None
    assert made.lag(late.waveform, two.waveform[round(2.5 * rate) : round(3.0 * rate)]) == 0


@pytest.mark.parametrize(
    ("suffix", "order"),
    [("ts", "va"), *(pytest.param(*c, marks=SLOW) for c in (("mkv", "av"), ("mpg", "va"), ("flac", "a")))],
)
def test_joined_recordings_whose_clock_starts_anew_are_refused(tmp_path: Path, suffix: str, order: str):
    path = twice(film(tmp_path / f"film.{suffix}", order))
    with pytest.raises(MediaError, match=r"(picture|sound)'s time stamps run back from .* \(recordings joined"):
        load_clip(path)
    assert load_clip(path, damaged="keep").duration < 2.2


@pytest.mark.parametrize("suffix", ["mp4", *(pytest.param(s, marks=SLOW) for s in ("wav", "aiff", "m4a"))])
def test_a_second_file_that_is_passed_over_is_said(tmp_path: Path, suffix: str):
    path = film(tmp_path / f"film.{suffix}", "va" if suffix == "mp4" else "a")
    size = path.stat().st_size
    assert f"left out: another file that is joined to it, from byte {size} on" in load_clip(twice(path)).notes


@pytest.mark.parametrize("suffix", ["h264", *(pytest.param(s, marks=SLOW) for s in ("m2v", "mjpeg", "hevc"))])
def test_bare_pictures_are_refused(tmp_path: Path, suffix: str):
    import av

    codec = {"h264": "libx264", "m2v": "mpeg2video", "mjpeg": "mjpeg", "hevc": "libx265"}[suffix]
    path = tmp_path / f"bare.{suffix}"
    with av.open(str(path), "w") as out:
        options = {"x265-params": "log-level=none"} if suffix == "hevc" else {}
        stream = out.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = 48, 64
        stream.pix_fmt = "yuvj420p" if suffix == "mjpeg" else "yuv420p"
        for frame in made.picture(5, 48, 64):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    for reader in (load_clip, probe_media):
        with pytest.raises(MediaError, match=r"is a bare \w+ stream: nothing in it says when its frames are shown"):
            reader(path)


def test_frames_whose_order_is_unknown_are_refused(tmp_path: Path):
    path = film(tmp_path / "film.avi", "v", options={"bf": "3"}, codecs=("libx264", "", 0))
    with pytest.raises(MediaError, match=r"time stamps run back from .* frames that are not in the order of display"):
        load_clip(path)


@pytest.mark.parametrize("suffix", ["png", *(pytest.param(s, marks=SLOW) for s in ("gif", "avif"))])
def test_moving_images(tmp_path: Path, suffix: str):
    path = tmp_path / f"moving.{suffix}"
    first, *rest = [Image.fromarray(frame) for frame in made.picture(5, 48, 64)]
    first.save(path, save_all=True, append_images=rest, duration=[100, 200, 100, 300, 100], loop=0)
    clip = load_clip(path)
    assert clip.frames is not None
    np.testing.assert_allclose(clip.times, [0, 0.1, 0.3, 0.4, 0.7], atol=1e-6)
    with Image.open(path) as moving:
        for k in range(5):
            moving.seek(k)
            assert np.abs(clip.frames[k].astype(int) - np.asarray(moving.convert("RGB"))).mean() < 3
    assert clip.duration == pytest.approx(0.8)


def test_a_moving_webp_is_refused_as_what_it_is(tmp_path: Path):
    path = tmp_path / "moving.webp"
    first, *rest = [Image.fromarray(frame) for frame in made.picture(3, 48, 64)]
    first.save(path, save_all=True, append_images=rest, duration=100)
    for reader in (load_clip, probe_media):
        with pytest.raises(MediaError, match=r"is an animated WebP, which FFmpeg does not decode: make it a GIF first"):
            reader(path)
    with Image.open(path) as moving:
        moving.save(tmp_path / "moving.gif", save_all=True)
    assert load_clip(tmp_path / "moving.gif").times.tolist() == [0.0, 0.1, 0.2], "the mend works"


@pytest.mark.parametrize("suffix", ["tiff", "mpo", "ico"])
def test_images_with_several_pictures_say_that_the_first_is_taken(tmp_path: Path, suffix: str):
    path = tmp_path / f"several.{suffix}"
    first, *rest = [Image.fromarray(frame) for frame in made.picture(3, 48, 64)]
    if suffix == "ico":
        first.save(path, sizes=[(16, 16), (32, 32)])
    else:
        first.save(path, save_all=True, append_images=rest)
    clip = load_clip(path)
    assert clip.is_image
    assert clip.duration == 0.0
    assert any(note.startswith("left out: ") for note in clip.notes)


def test_a_window_of_a_bare_ac3_is_where_its_samples_are(tmp_path: Path):
    path = tmp_path / "sound.ac3"
    film(path, "a")
    whole, part = load_clip(path, sound_rate=44100), load_clip(path, start=1.5, end=1.75, sound_rate=44100)
    assert whole.waveform is not None
    assert part.waveform is not None
    np.testing.assert_allclose(part.waveform, whole.waveform[66150:77175], atol=1e-6)


def test_a_sound_that_begins_before_the_clock_says_what_is_left_out(tmp_path: Path):
    import av

    path = film(tmp_path / "sound.wav", "a")
    sounds = Sounds(probe_media(path), start=0.0, end=None, budget=Budget(str(path), 1 << 20))
    block = av.AudioFrame.from_ndarray(made.chirp()[None], format="fltp", layout="mono")
    block.sample_rate, block.time_base, block.pts = 16000, Fraction(1, 16000), -8000
    sounds.add(block)
    waveform = sounds.finish(16000)
    assert waveform is not None
    assert np.array_equal(waveform, made.chirp()[8000:])
    assert "the sound starts 0.500 s before the file's 0; that much is left out" in sounds.notes
