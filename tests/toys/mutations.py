"""Files that something happened to: bits flipped, cut short, filled, swapped, or edited so that they still parse."""

from __future__ import annotations

import io
import json
import random
import re
import struct
from typing import Any

import numpy as np

HUGE = (-1, 0, 2**31 - 1, 2**31, 2**63, 10**30, 1e308, -0.5)
STRANGE: tuple[Any, ...] = (None, True, "", "x", "\ud800", [], {}, [[]], {"a": 1}, float("nan"), "<b>", *HUGE)


def mutated(content: bytes, seed: int) -> bytes:
    """The file after something that the seed draws."""
    draw = random.Random(seed)
    kinds = [_flipped, _cut, _filled, _inserted, _removed, _words_swapped, _numbers_changed, _nested]
    if content[:3] == b"CDF":
        kinds += [_header_edited] * 8
    if content[:2] == b"PK":
        kinds += [_arrays_edited] * 8
    if content[:1] == b"{":
        kinds += [_json_edited] * 8
    if content[8:9] == b"{":
        kinds += [_safetensors_edited] * 8
    return draw.choice(kinds)(content, draw)


def _flipped(content: bytes, draw: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(draw.choice((1, 2, 20))):
        made[draw.randrange(len(made) if draw.random() < 0.5 else min(len(made), 400))] ^= 1 << draw.randrange(8)
    return bytes(made)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _filled(content: bytes, draw: random.Random) -> bytes:
    at, n = draw.randrange(len(content)), draw.choice((1, 4, 64, 4096))
    return content[:at] + draw.choice((b"\x00", b"\xff", b"9"))[:1] * min(n, len(content) - at) + content[at + n :]


def _inserted(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + draw.randbytes(draw.choice((1, 4, 100))) + content[at:]


def _removed(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + content[at + draw.choice((1, 4, 100)) :]


def _words_swapped(content: bytes, draw: random.Random) -> bytes:
    """Two names of equal length change places, so that every offset still holds."""
    found: dict[int, list[re.Match[bytes]]] = {}
    for match in re.finditer(rb"[A-Za-z_]{4,}", content):
        found.setdefault(len(match[0]), []).append(match)
    some = [listed for listed in found.values() if len({match[0] for match in listed}) > 1]
    if not some:
        return _flipped(content, draw)
    first, second = sorted(draw.sample(draw.choice(some), 2), key=lambda match: match.start())
    between = content[first.end() : second.start()]
    return content[: first.start()] + second[0] + between + first[0] + content[second.end() :]


def _numbers_changed(content: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb"\d+", content))
    if not found:
        return _flipped(content, draw)
    match = draw.choice(found)
    number = draw.choice((b"0", b"-1", b"99999999999", b"1e400", b"7" * 5000, b"0.5"))
    return content[: match.start()] + number + content[match.end() :]


def _nested(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + draw.choice((b"[", b'{"a":', b"(")) * 20_000 + content[at:]


def _header_edited(content: bytes, draw: random.Random) -> bytes:
    """One of the whole numbers of a netCDF file's header: a length, a count, a type, an offset."""
    made, at = bytearray(content), 4 * draw.randrange(1, min(len(content), 3000) // 4)
    made[at : at + 4] = struct.pack(">I", draw.choice((0, 1, 2, 3, 5, 6, 11, 12, 255, 2**20, 2**31 - 1, 2**32 - 1)))
    return bytes(made)


def _json_edited(content: bytes, draw: random.Random) -> bytes:
    try:
        tree: Any = json.loads(content)
    except ValueError:
        return _flipped(content, draw)
    places: list[tuple[Any, Any]] = []

    def walk(level: Any) -> None:
        listed = level.items() if isinstance(level, dict) else enumerate(level) if isinstance(level, list) else ()
        for key, value in listed:
            places.append((level, key))
            walk(value)

    walk(tree)
    for _ in range(draw.choice((1, 1, 3))):
        level, key = draw.choice(places)
        what = draw.random()
        if what < 0.2 and isinstance(level, dict):
            level.pop(key, None)
        elif what < 0.4 and isinstance(level, dict):
            other = draw.choice(list(level)) if level else key
            level[key], level[other] = level.get(other), level.get(key)
        elif isinstance(level, dict) or key < len(level):
            level[key] = draw.choice(STRANGE)
    return json.dumps(tree).encode()


def _safetensors_edited(content: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = _json_edited(content[8 : 8 + length], draw)
    if draw.random() < 0.3:  # what it says of itself is json within json
        whole = json.loads(content[8 : 8 + length])
        about = whole.get("__metadata__", {})
        if "about" in about:
            about["about"] = _json_edited(about["about"].encode(), draw).decode()
            header = json.dumps(whole).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _arrays_edited(content: bytes, draw: random.Random) -> bytes:
    with np.load(io.BytesIO(content), allow_pickle=False) as data:
        arrays = {key: data[key] for key in data.files}
    name = draw.choice(list(arrays))
    old = arrays.pop(name)
    made: Any = draw.choice(
        [old.astype("U8"), old.astype(complex), old[..., :0], old[None], old.ravel(), old > 0, old.astype(">f4"),
         np.array(["a"], dtype="S3"), np.zeros(2, "datetime64[s]"), np.asfortranarray(old)]
    )  # fmt: skip
    arrays[draw.choice((name, name, "../" + name, "\x00", "a" * 3000))] = made
    held = io.BytesIO()
    np.savez_compressed(held, allow_pickle=False, **arrays)
    return held.getvalue()
