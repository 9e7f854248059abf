"""Are two files the same recording? Hashes of what is decoded, which no container, name or tag changes.

The first 20 seconds of a file's sound and of its picture's grey levels are hashed. A stream that says nothing (any
constant sound, a picture that never changes by more than an encoder changes a still, or frames of one colour) has no
fingerprint. Not done: copies that were encoded anew, cut or scaled.
"""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

from av_lens.media import arrays, header

SECONDS = 20.0
FLAT_PICTURE, FLAT_SOUND = 4, 1e-3
"""Within these (grey levels of 256; full scale 1) a frame is of one colour, a sound is constant."""
STILL = 32  # within so many grey levels everywhere a frame is like the first one


class _Stream:
    """The hash of a stream so far, and whether it has said anything."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.first: np.ndarray | None = None
        self.changes = self.shaped = False

    def add(self, part: np.ndarray, flat: float, still: float) -> None:
        """Take one more frame."""
        self.digest.update(np.ascontiguousarray(part).data)
        self.first = part if self.first is None else self.first
        if not self.shaped:
            self.shaped = float(np.ptp(part)) > flat
        if not self.changes:
            self.changes = part.shape != self.first.shape or _differ(part, self.first) > still

    def hash(self) -> str | None:
        """Give the hash of a stream that says something."""
        return self.digest.hexdigest() if self.changes and self.shaped else None


def _differ(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float64) - two).max(initial=0.0))


def fingerprint(path: str, sha256: str) -> tuple[str | None, str | None]:
    """Fingerprint a file's sound and picture; `sha256` is its hash (a file is decoded once)."""
    return _decoded(path, sha256)


@lru_cache(maxsize=1 << 14)
def _decoded(path: str, sha256: str) -> tuple[str | None, str | None]:
    del sha256  # part of the cache's key
    from av.video.reformatter import VideoReformatter

    sound, picture = _Stream(), _Stream()
    reformatter = VideoReformatter()  # kept, and of one thread: else each frame starts a pool of threads
    with arrays.opened(path) as container:
        moving, heard = header.choose_streams(path, container)
        streams = [stream for stream in (moving, heard) if stream is not None]
        done: set[int] = set()
        starts: dict[int, float] = {}
        try:
            for packet in container.demux(streams):
                if packet.stream.index in done:
                    continue
                for frame in packet.decode():
                    at = float(frame.time or 0.0)
                    if at - starts.setdefault(packet.stream.index, at) >= SECONDS:
                        done.add(packet.stream.index)
                        break
                    if packet.stream is moving:
                        grey = reformatter.reformat(frame, format="gray", threads=1).to_ndarray()
                        picture.add(grey, FLAT_PICTURE, STILL)
                    else:
                        _add(frame, sound)
                if len(done) == len(streams):
                    break
        except arrays.foreign_errors():
            pass  # a damaged file is refused where it is read; what was decoded of it is what it is known by
    return sound.hash(), picture.hash()


def _add(frame: Any, sound: _Stream) -> None:
    samples = frame.to_ndarray()
    scale = 1.0 if samples.dtype.kind == "f" else float(np.iinfo(samples.dtype).max)
    sound.add(samples, FLAT_SOUND * scale, 0.0)


def says_nothing(clip: Any, kind: str) -> bool:
    """Say whether a clip in memory has a "sound" or "picture" that is no evidence."""
    if kind == "sound":
        return not len(clip.waveform) or float(np.ptp(clip.waveform)) <= FLAT_SOUND
    frames = clip.frames
    flat = all(float(np.ptp(frame)) <= FLAT_PICTURE for frame in frames)
    return flat or all(_differ(frame, frames[0]) <= STILL for frame in frames)
