"""Foreign matter: what is no clip is refused by name, in bounded time and memory; long files are read in part."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import media_samples as made
import numpy as np
import pytest
from damaged_media import EDITS, OPTIONS, STARTS, SUFFIXES, attempt, mutated, victims
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import av_lens.media.pictures
import av_lens.media.sounds
from av_lens.errors import BudgetError, MediaError
from av_lens.media import Clip, ClipFile, MediaBudgetError, load_clip, probe_media

EIGHTH = Fraction(1, 8)


def whole_then_cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: round(len(data) * share)])
    return path


@pytest.mark.parametrize(
    "reader", [load_clip, probe_media, lambda path: ClipFile(str(path)).load()], ids=["load", "probe", "file"]
)
def test_what_is_not_a_medium(tmp_path: Path, reader: Any):
    with pytest.raises(MediaError, match=r"no media file at .*nothing\.mp4: check its spelling"):
        reader(tmp_path / "nothing.mp4")
    with pytest.raises(MediaError, match=r"the folder .*nowhere does not exist either"):
        reader(tmp_path / "nowhere" / "nothing.mp4")
    with pytest.raises(MediaError, match="is a directory, not a media file: name a file inside it"):
        reader(tmp_path)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(
        MediaError, match=r"empty\.mp4 is empty \(0 bytes\): it was never written, or its download failed"
    ):
        reader(tmp_path / "empty.mp4")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(MediaError, match=r"noise\.mp4 cannot be read as media: .* It is no audio, video or image file"):
        reader(tmp_path / "noise.mp4")
    (tmp_path / "text.txt").write_text("A letter, not a film.\n" * 100)
    with pytest.raises(MediaError, match=r"text\.txt (is not media|cannot be read as media)"):
        reader(tmp_path / "text.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        MediaError, match=r"is not a regular file \(a device, pipe or socket\): copy it to a file first"
    ):
        reader(tmp_path / "pipe")
    with pytest.raises(MediaError, match="cannot look at the media path"):
        reader("nul\0byte.mp4")


def test_what_is_no_path_is_told_what_to_do(tmp_path: Path):
    path = Path(made.clip().save(tmp_path / "clip.mp4"))
    program = """
import io, json, sys
import numpy as np
from av_lens.media import load_clip, probe_media
from av_lens.errors import MediaError
path = sys.argv[1]
data = open(path, "rb").read()
given = [data, io.BytesIO(), open(path, "rb"), np.zeros(3), {"bytes": data}, None, "https://a.org/a.mp4", "s3://a/a.mp4"]
said = []
for reader in (load_clip, probe_media):
    for each in given:
        try:
            said.append(repr(reader(each)))
        except MediaError as error:
            said.append(str(error))
print(json.dumps(said))
"""
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    path_of = "a medium is named by the path of its file, found "
    wanted = [
        f"{path_of}{path.stat().st_size} bytes: write them to a file first.",
        f"{path_of}an open BytesIO: give its path, or write it to a file first.",
        f"{path_of}an open BufferedReader: give its path, or write it to a file first.",
        f"{path_of}ndarray: make a clip of arrays by Clip.from_arrays().",
        f"{path_of}dict: give a string or a pathlib.Path.",
        f"{path_of}NoneType: give a string or a pathlib.Path.",
        "https://a.org/a.mp4 is an address, not a file: download it first, then give its path.",
        "s3://a/a.mp4 is an address, not a file: download it first, then give its path.",
    ]
    assert json.loads(run.stdout) == wanted * 2


def test_a_play_list_does_not_reach_other_files(tmp_path: Path):
    made.clip().save(tmp_path / "secret.mp4")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.ffconcat", "list.m3u8"):
        with pytest.raises(MediaError, match=r"is not media|cannot be read as media"):
            load_clip(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"start": 2.0}, r"start=2 s is past the end of .*clip\.mp4, which lasts 2\.000 s: start earlier"),
        ({"start": 1.0, "end": 1.0}, r"end= must come after start=, found start=1 s and end=1 s"),
        ({"start": 1.0, "end": 0.5}, r"end= must come after start="),
        ({"start": -1.0}, r"start= counts from the beginning and cannot be negative, found -1 s"),
        ({"start": float("nan")}, r"start= must be a finite number of seconds, found nan"),
        ({"end": float("inf")}, r"end= must be a finite number of seconds, found inf"),
        ({"fps": 0}, r"fps= must be above 0 \(or None for every frame\), found 0"),
        ({"fps": -2.0}, r"fps= must be above 0 .* found -2"),
        ({"fps": float("nan")}, r"fps= must be a finite number"),
        ({"sound_rate": 0}, r"sound_rate= must be a whole number of Hz from 1000 to 768000, found 0"),
        ({"damaged": "maybe"}, r'damaged= is "refuse" or "keep", found \'maybe\''),
    ],
)
def test_windows_and_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], text: str):
    path = made.clip().save(tmp_path / "clip.mp4")
    with pytest.raises(MediaError, match=text):
        load_clip(path, **options)


def test_a_lazy_clip_refuses_as_early(tmp_path: Path):
    path = made.clip().save(tmp_path / "clip.mp4")
    with pytest.raises(MediaError, match="end= must come after start="):
        ClipFile(path, start=2, end=1)
    with pytest.raises(MediaError, match="start=5 s is past the end"):
        ClipFile(path, start=5).probe()


def test_no_audio_stream_where_sound_is_asked(tmp_path: Path):
    path = Clip.from_arrays(frames=made.picture(), fps=8).save(tmp_path / "silent.mp4")
    with pytest.raises(
        MediaError, match=r"sound is asked of silent\.mp4, which has none: give a clip with an audio stream"
    ):
        load_clip(path).require_sound()
    with pytest.raises(MediaError, match=r"sound is asked of silent\.mp4"):
        made.clip().with_sound(load_clip(path))


@pytest.mark.parametrize("kind", ["mp4 index last", "mp4 index first", "mkv", "wav", "png", "flac"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 88200)).astype(np.float32)
    if kind == "mp4 index last":
        path = Path(made.clip().save(tmp_path / "cut.mp4"))
    elif kind == "mp4 index first":
        options = {"movflags": "+faststart"}
        path = made.write_video(
            tmp_path / "cut.mp4", made.picture(), list(range(16)), EIGHTH, noise, container_options=options
        )
    elif kind == "wav":
        path = tmp_path / "cut.wav"
        path.write_bytes(made.wav(noise, 44100, "f"))
    elif kind == "png":
        path = Path(
            Clip.from_arrays(frames=np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)).save(
                tmp_path / "c.png"
            )
        )
    elif kind == "flac":
        path = made.write_video(tmp_path / "cut.flac", None, [], EIGHTH, noise, codecs=("", "flac"))
    else:
        path = made.write_video(tmp_path / "cut.mkv", made.picture(), list(range(16)), EIGHTH, noise)
    whole = load_clip(path)
    whole_then_cut(path, 0.6)
    with pytest.raises(
        MediaError, match=r"is damaged: .*Get a whole copy|cannot be read as media: .* damaged or cut off"
    ):
        load_clip(path)
    if kind in ("mp4 index first", "mkv", "wav", "flac"):
        part = load_clip(path, damaged="keep")
        assert 0.2 < part.duration < whole.duration - 0.2
        assert any("truncated" in note or "does not decode" in note or "reading stopped" in note for note in part.notes)
        early = load_clip(path, end=0.25)
        assert early.duration == pytest.approx(0.25), "a window before the damage is whole"


def test_a_damaged_picture_is_said(tmp_path: Path):
    path = made.write_video(
        tmp_path / "hurt.mkv", made.picture(), list(range(16)), EIGHTH, made.chirp(rate=44100)[None]
    )
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for at in rng.integers(len(data) // 3, len(data), 400):
        data[at] = int(rng.integers(256))
    path.write_bytes(bytes(data))
    with pytest.raises(MediaError, match="is damaged: "):
        load_clip(path)


def test_sounds_that_are_no_sound(tmp_path: Path):
    bad = made.chirp()[None].copy()
    bad[0, 5] = np.nan
    (tmp_path / "nan.wav").write_bytes(made.wav(bad, 16000, "f"))
    with pytest.raises(MediaError, match="the sound holds NaN or infinity: it is damaged"):
        load_clip(tmp_path / "nan.wav")
    (tmp_path / "slow.wav").write_bytes(made.wav(made.chirp()[None], 3, "f"))
    with pytest.raises(MediaError, match="a sound of 3 samples a second is damage, not sound"):
        load_clip(tmp_path / "slow.wav")


def test_the_budget_refuses_before_memory_is_taken(tmp_path: Path):
    path = made.clip(frames=made.picture(16, 240, 320)).save(tmp_path / "clip.mp4")
    need = 16 * 240 * 320 * 3
    with pytest.raises(
        MediaBudgetError,
        match=r"2\.0 s of 320x240 at 8 frames a second would take 3\.5 MiB decoded, .*3\.5 MiB.*fps=.*max_bytes=",
    ):
        load_clip(path, max_bytes=need - 1)
    assert issubclass(MediaBudgetError, BudgetError)
    assert len(load_clip(path, max_bytes=2 * need).times) == 16
    assert len(load_clip(path, max_bytes=need // 2, end=0.5).times) == 4
    assert len(load_clip(path, max_bytes=need // 2, fps=2).times) == 4


def test_the_budget_holds_where_the_header_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = made.clip(frames=made.picture(16, 240, 320)).save(tmp_path / "clip.mp4")
    monkeypatch.setattr("av_lens.media.source._Reading._check_request", lambda self: None)
    with pytest.raises(MediaBudgetError, match="4 frames of 320x240 would take"):
        load_clip(path, max_bytes=3 * 240 * 320 * 3 + 220_000)


def test_a_header_of_gigapixels_is_refused(tmp_path: Path):
    path = tmp_path / "bomb.png"
    Clip.from_arrays(frames=made.picture(1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(bytes(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaError, match=r"bomb\.png"):
        load_clip(path, max_bytes=1 << 40)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An hour of film: ten seconds, their packets repeated 360 times, in mp4 and mkv."""
    import av

    folder = tmp_path_factory.mktemp("hour")
    frames = made.picture(16, 48, 64).repeat(5, axis=0)
    short = Clip.from_arrays(frames=frames, fps=8, waveform=np.tile(made.chirp(), 5)[: 156 * 1024]).save(
        folder / "short.mp4"
    )
    paths = {}
    for kind in ("mp4", "mkv"):
        with av.open(short) as source, av.open(str(folder / f"hour.{kind}"), "w") as out:
            streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
            packets = [p for p in source.demux() if p.dts is not None and (p.pts or 0) >= 0]
            kept = [(p, bytes(p), p.pts, p.dts, p.time_base, p.is_keyframe, p.duration) for p in packets]
            counts = {s.index: 0 for s in source.streams}
            for turn in range(360):
                for p, data, pts, dts, base, key, duration in kept:
                    offset = round(turn * 10 / base) if p.stream.type == "video" else turn * 156 * 1024
                    packet = av.Packet(data)
                    packet.stream, packet.time_base, packet.is_keyframe = streams[p.stream_index], base, key
                    packet.pts, packet.dts, packet.duration = pts + offset, dts + offset, duration
                    counts[p.stream_index] += 1
                    out.mux(packet)
        paths[kind] = folder / f"hour.{kind}"
    return paths


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_ten_seconds_of_an_hour(hour: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch):
    counted = {"frames": 0, "sounds": 0}
    for name, room in (("frames", av_lens.media.pictures.Pictures), ("sounds", av_lens.media.sounds.Sounds)):
        plain = room.add

        def add(self: Any, frame: Any, plain: Any = plain, name: str = name) -> None:
            counted[name] += 1
            plain(self, frame)

        monkeypatch.setattr(room, "add", add)
    assert probe_media(hour[kind]).duration == pytest.approx(3600, abs=10)
    load_clip(hour[kind], start=1000, end=1001)
    counted.update(frames=0, sounds=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    clip = load_clip(hour[kind], start=2003, end=2013)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert clip.frames is not None
    assert clip.waveform is not None
    assert made.index_of(clip.frames) == [((k + 24) % 80) // 5 for k in range(80)]
    assert clip.times.tolist() == [k / 8 for k in range(80)]
    assert len(clip.waveform) == 160000
    assert clip.duration == 10.0
    assert counted["frames"] < 80 + 100, "from the key frame before the window to its end"
    assert counted["sounds"] < 157 + 40
    assert peak < 16 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_an_hour_at_once_is_refused_by_its_header(hour: dict[str, Path]):
    with pytest.raises(MediaBudgetError, match=r"36\d\d\.\d s of 64x48 at 8 frames a second would take 25\d\.\d MiB"):
        load_clip(hour["mp4"], max_bytes=64 << 20)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return victims(tmp_path_factory.mktemp("victims"))


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    suffix=st.sampled_from(SUFFIXES),
    head=st.booleans(),
    edits=EDITS,
    keep=st.floats(0.01, 1) | st.just(1.0),
    options=OPTIONS,
)
def test_mutated_and_truncated_media(
    files: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    head: bool,
    edits: list[Any],
    keep: float,
    options: dict[str, Any],
):
    data = mutated(files[suffix], edits, head=head, keep=keep)
    attempt(tmp_path_factory.getbasetemp() / f"mutated{suffix}", data, options)


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    magic=st.sampled_from(STARTS),
    body=st.binary(min_size=1, max_size=3000),
    suffix=st.sampled_from(["", ".mp4", ".wav", ".txt", ".png", ".mp3"]),
)
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, magic: bytes, body: bytes, suffix: str):
    attempt(tmp_path_factory.getbasetemp() / f"random{suffix}", magic + body, {})


def test_libav_does_not_chatter(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = Path(made.clip().save(tmp_path / "clip.mp4"))
    data = bytearray(path.read_bytes())
    data[3000:3400] = bytes(400)
    path.write_bytes(bytes(data))
    with pytest.raises(MediaError):
        load_clip(path)
    made.clip().to_mp4_bytes()
    assert capfd.readouterr() == ("", "")
