"""What a file's own bytes promise and FFmpeg does not check: how long it is, whether it ends, whether more follows.

A file that promises nothing (a transport stream, a bare AAC or MP3 stream) cannot be told from a shorter one.
"""

import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

_UNFILLED = 0x7FFFF000
_BOXES = frozenset(
    b"ftyp styp moov moof mdat free skip wide uuid meta mfra sidx ssix prft emsg pnot PICT pdin udta".split()
)
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_SEGMENT = bytes.fromhex("18538067")
_READ_ON = frozenset({b".snd", b"GIF8"})  # FFmpeg decodes what is joined to such files
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_TAGS_AT_END = 1 << 16
_LARGEST_IMAGE = 1 << 28
_FARTHEST = 1 << 42


def shortfall(path: str, name: str) -> str:
    """Say what a file promises and lacks."""
    with open(path, "rb") as source:
        size, end = os.fstat(source.fileno()).st_size, _end(source, name)
    if math.isinf(end):
        return "it stops before its end mark (truncated?)"
    return f"its header promises {int(end) - size} bytes more than it has (truncated?)" if end > size else ""


def left_behind(path: str, name: str) -> list[str]:
    """Say what a file holds that FFmpeg passes over."""
    notes: list[str] = []
    with open(path, "rb") as source:
        if name == "ogg" and not any(flags & 4 for flags, _ in _pages(source)):
            notes.append("no page of it is marked as its last: its end may be missing (truncated?)")
        end, magic = _end(source, name), _read(source, 0, 12)
        kind = slice(4, 8) if magic[4:8] == b"ftyp" else slice(0, 4)
        if _has_more_pictures(source, magic):
            notes.append("left out: further pictures of the file; the first is taken")
        elif 0 < end < math.inf and magic[:4] not in _READ_ON and _read(source, int(end), 12)[kind] == magic[kind]:
            notes.append(f"left out: another file that is joined to it, from byte {int(end)} on")
    return notes


def is_chained(path: str) -> bool:
    """Whether an Ogg file holds several streams one after the other, each with a clock of its own."""
    with open(path, "rb") as source:
        firsts = [bool(flags & 2) for flags, _ in _pages(source)]
    return firsts != sorted(firsts, reverse=True)


def is_animated_webp(path: str) -> bool:
    """Whether a file is a WebP that moves, which FFmpeg does not decode."""
    with open(path, "rb") as source:
        head = _read(source, 0, 21)
    return head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def counts_its_frames(path: str) -> bool:
    """Whether an MP3 says how long it is: only then is FFmpeg's duration more than a guess from its bit rate."""
    with open(path, "rb") as source:
        size, (counted, end) = os.fstat(source.fileno()).st_size, _mp3_count(source)
    return counted and (not end or size - end <= max(_TAGS_AT_END, size // 20))


def _end(source: BinaryIO, name: str) -> float:
    """Find the byte at which the file should end: 0 where it does not say, infinite where its end mark is missing."""
    if name == "mp3":
        return _mp3_count(source)[1]
    head = _read(source, 0, 16)
    for at, magic, check in _CHECKS:
        if head[at : at + len(magic)] == magic:
            return check(source)
    return 0


def _read(source: BinaryIO, at: int, count: int) -> bytes:
    source.seek(min(at, _FARTHEST))  # a damaged size may point anywhere
    return source.read(count)


def _riff(source: BinaryIO) -> float:
    """Follow RIFF chunks (an AVI above 1 GB has several); of a wav, the data chunk."""
    head = _read(source, 0, 12)
    if head[8:] == b"WAVE":
        return _wav(source)
    at = 0
    while head[:4] == b"RIFF" and 0 < (size := int.from_bytes(head[4:8], "little")) < _UNFILLED:
        at += 8 + size + size % 2
        head = _read(source, at, 8)
    return at


def _wav(source: BinaryIO) -> float:
    at, wide = 12, 0
    while len(head := _read(source, at, 8)) == 8 and any(head[:4]):
        size = int.from_bytes(head[4:], "little")
        if head[:4] == b"ds64":
            wide = int.from_bytes(_read(source, at + 16, 8), "little")
        if head[:4] == b"data":
            size = wide or (size if size < _UNFILLED else 0)
            return at + 8 + size if size else 0
        at += 8 + size + size % 2
    return 0


def _au(source: BinaryIO) -> float:
    start, size = struct.unpack(">II", _read(source, 4, 8).ljust(8, b"\xff"))
    return start + size if size < _UNFILLED else 0


def _caf(source: BinaryIO) -> float:
    at = 8
    while len(head := _read(source, at, 12)) == 12 and any(head[:4]):
        size = int.from_bytes(head[4:], "big", signed=True)
        if size < 0:
            return 0
        at += 12 + size
        if head[:4] == b"data":
            return at
    return 0


def _asf(source: BinaryIO) -> float:
    at = 0
    while len(head := _read(source, at, 24)) == 24 and (size := int.from_bytes(head[16:], "little")) > 24:
        at += size
        if head[:16] == _ASF_DATA:
            return at if size > 50 else 0
    return 0


def _boxes(source: BinaryIO) -> float:
    at = 0
    while len(head := _read(source, at, 16)) >= 8 and head[4:8] in _BOXES:
        size = int.from_bytes(head[:4], "big")
        size = int.from_bytes(head[8:], "big") if size == 1 else size
        if size < 8 or (at and head[4:8] == b"ftyp"):
            return at if size >= 8 else 0
        at += size
    return at


def _matroska(source: BinaryIO) -> float:
    at, size = _element(source, 4)
    if _read(source, at + size, 4) != _SEGMENT:
        return 0
    at, size = _element(source, at + size + 4)
    return at + size if size else 0


def _element(source: BinaryIO, at: int) -> tuple[int, int]:
    """Read an EBML size at `at`: where the element's body begins, and how long it is (0 where that is unknown)."""
    head = _read(source, at, 8)
    width = 9 - head[0].bit_length() if head and head[0] else 8
    size = int.from_bytes(head[:width], "big") & ((1 << 7 * width) - 1)
    return at + width, 0 if size == (1 << 7 * width) - 1 else size


def _mxf(source: BinaryIO) -> float:
    at = 0
    while len(head := _read(source, at, 25)) > 16 and head[:4] == b"\x06\x0e\x2b\x34":
        width = head[16] & 0x7F if head[16] & 0x80 else 0
        at += 17 + width + (int.from_bytes(head[17 : 17 + width], "big") if width else head[16])
    return at


def _flv(source: BinaryIO) -> float:
    head = _read(source, 0, _TAGS_AT_END)
    at = head.find(b"\x00\x08filesize\x00")
    size = struct.unpack(">d", head[at + 11 : at + 19])[0] if 0 <= at <= len(head) - 19 else 0
    return size if 0 < size < 1 << 50 else 0


def _pages(source: BinaryIO) -> Iterator[tuple[int, int]]:
    """Walk an Ogg file: of each page its flags (2 first, 4 last of its stream), and its end."""
    at = 0
    while len(head := _read(source, at, 27)) == 27 and head[:4] == b"OggS":
        at += 27 + head[26] + sum(_read(source, at + 27, head[26]))
        yield head[5], at


def _jpeg(source: BinaryIO) -> float:
    """Go from marker to marker; scans are searched for the next one."""
    data, at = _read(source, 0, _LARGEST_IMAGE), 2
    while (found := _MARKER.search(data, at)) is not None:
        if found[1] == b"\xd9":
            return found.end()
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return math.inf if len(data) < _LARGEST_IMAGE else 0


def _gif(source: BinaryIO) -> float:
    """Go from block to block."""
    data = _read(source, 0, _LARGEST_IMAGE)
    try:
        at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
        while data[at] in (0x21, 0x2C):
            palette = data[at + 9] if data[at] == 0x2C else 0
            at += 2 if data[at] == 0x21 else 11 + (3 << (palette & 7) + 1 if palette & 0x80 else 0)
            while data[at]:
                at += data[at] + 1
            at += 1
        return at + 1 if data[at] == 0x3B else 0
    except IndexError:
        return math.inf if len(data) < _LARGEST_IMAGE else 0


def _mp3_count(source: BinaryIO) -> tuple[bool, int]:
    """Read the count in an MP3's first frame: whether there is one, and the byte at which it says the sound ends."""
    at = 0
    while (head := _read(source, at, 10))[:3] == b"ID3" and len(head) == 10:
        at += 10 + sum(byte << 7 * k for k, byte in enumerate(reversed(head[6:]))) + (10 if head[5] & 0x10 else 0)
    frame = _read(source, at, 192)
    found = re.search(rb"Xing|Info|VBRI", frame[:64])
    if frame[:1] != b"\xff" or found is None:
        return False, 0
    if found[0] == b"VBRI":
        return True, at + int.from_bytes(frame[found.end() + 6 : found.end() + 10], "big")
    flags = int.from_bytes(frame[found.end() : found.end() + 4], "big")
    counted = found.end() + (8 if flags & 1 else 4)
    return bool(flags & 1), at + int.from_bytes(frame[counted : counted + 4], "big") if flags & 2 else 0


def _has_more_pictures(source: BinaryIO, magic: bytes) -> bool:
    """Whether a TIFF has a second page, or a JPEG is the first of several (MPO)."""
    if magic[:3] == b"\xff\xd8\xff":
        return b"MPF\x00" in _read(source, 0, _TAGS_AT_END)
    if magic[:4] not in (b"II*\x00", b"MM\x00*"):
        return False
    order = "little" if magic[:2] == b"II" else "big"
    at = int.from_bytes(magic[4:8], order)
    return any(_read(source, at + 2 + 12 * int.from_bytes(_read(source, at, 2), order), 4))


_CHECKS: tuple[tuple[int, bytes, Callable[[BinaryIO], float]], ...] = (
    (0, b"RIFF", _riff),
    (0, b"RF64", _wav),
    (0, b"FORM", lambda source: 8 + int.from_bytes(_read(source, 4, 4), "big")),
    (0, b".snd", _au),
    (0, b"caff", _caf),
    (0, b"riff\x2e\x91\xcf\x11", lambda source: int.from_bytes(_read(source, 16, 8), "little")),
    (0, b"\x30\x26\xb2\x75", _asf),
    (4, b"ftyp", _boxes),
    (0, b"\x1aE\xdf\xa3", _matroska),
    (0, b"\x06\x0e\x2b\x34", _mxf),
    (0, b"FLV", _flv),
    (0, b"OggS", lambda source: max((end for _, end in _pages(source)), default=0)),
    (0, b"\xff\xd8\xff", _jpeg),
    (0, b"GIF8", _gif),
)
