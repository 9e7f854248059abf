"""Media files to which something happened: bytes written over, put in, cut out, or cut short."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import media_samples as made
import numpy as np
from hypothesis import strategies as st

from av_lens.errors import AvLensError
from av_lens.media import Clip, load_clip

EIGHTH = Fraction(1, 8)
SUFFIXES = (".mp4", ".wav", ".png", ".gif", ".jpeg", ".mkv", ".mp3", ".flac")


def mutated(whole: bytes, edits: Sequence[Any], *, head: bool, keep: float) -> bytes:
    """A file with some edits (of its first 400 bytes, if `head`), of which a share is kept."""
    data = bytearray(whole)
    for where, kind, word in edits:
        at = int(where * (min(len(data), 400) if head else len(data)))
        if kind == "write":
            data[at : at + len(word)] = word
        elif kind == "insert":
            data[at:at] = word
        else:
            del data[at : at + len(word)]
    return bytes(data[: max(1, round(len(data) * keep))])


def seeds_of_damage() -> dict[str, bytes]:
    """Small real files of nine kinds."""
    from PIL import Image

    pictures, sound = made.picture(4, 32, 48), made.chirp(0.5)
    found = {".mp4": Clip.from_arrays(frames=pictures, fps=8, waveform=sound).to_mp4_bytes()}
    found[".wav"] = made.wav(np.stack([sound, sound]), 16000, "f")
    for suffix in ("png", "gif", "jpeg"):
        sink = io.BytesIO()
        Image.fromarray(pictures[0]).save(sink, format=suffix)
        found["." + suffix] = sink.getvalue()
    return found


def victims(folder: Path) -> dict[str, bytes]:
    """Whole files of eight kinds, by suffix."""
    found = seeds_of_damage()
    sound = made.chirp(0.5, rate=16000)[None]
    for name, codecs in {"a.mkv": ("libx264", "aac"), "a.mp3": ("", "libmp3lame"), "a.flac": ("", "flac")}.items():
        frames = made.picture(4, 32, 48) if codecs[0] else None
        path = made.write_video(folder / name, frames, [0, 1, 2, 3], EIGHTH, sound, rate=16000, codecs=codecs)
        found[path.suffix] = path.read_bytes()
    return found


STARTS = (
    b"",
    b"RIFF\xff\xff\xff\xffWAVEfmt ",
    b"\x89PNG\r\n\x1a\n",
    b"\0\0\0\x18ftypmp42",
    b"\x1aE\xdf\xa3",
    b"GIF89a",
    b"ID3",
)
WORDS = st.sampled_from([b"\x00", b"\xff", b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\x80\x00\x00\x00"])
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["write", "insert", "cut"]),
        WORDS | st.binary(min_size=1, max_size=16),
    ),
    max_size=12,
)
OPTIONS = st.sampled_from(
    [{}, {"fps": 2.0}, {"start": 0.125, "end": 0.3}, {"damaged": "keep"}, {"start": 0.2, "damaged": "keep"}]
)


def attempt(path: Path, data: bytes, options: dict[str, Any]) -> None:
    """Only an AvLensError may come out, and a clip that does come out is one."""
    path.write_bytes(data)
    clip, error = None, None
    try:
        clip = load_clip(path, max_bytes=32 << 20, **options)
    except AvLensError as caught:
        error = caught
    assert error is None or str(path) in str(error), "an error names its file"
    assert clip is None or clip.has_picture or clip.has_sound
    assert clip is None or clip.duration < 4000
