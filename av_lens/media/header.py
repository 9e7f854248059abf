"""What a file's header says before anything is decoded: streams, sizes, and where its clock starts.

The file's clock starts at 0 as its container says (mp4, mkv and their kin), or at its earliest stream where
containers count from anywhere (transport streams, mp3), or where the first picture or sound comes over five seconds
late (fragments).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from av_lens.errors import MediaError
from av_lens.media.border import border, is_image_format, opened, regular_file
from av_lens.media.encoding import CROP_MARK

_LATEST_START = 5
_ABSOLUTE = frozenset({"mov", "mp4", "matroska", "webm"})
_ATTACHED_PICTURE = 0x400
_UNFILLED = 0x7FFFF000


@dataclass(frozen=True)
class MediaFacts:
    """What a file's header says, nothing decoded.

    Attributes:
        path: the file.
        format: FFmpeg's name of the container.
        duration: seconds, or NaN where the header does not say.
        width: pixels, or 0 without a picture.
        height: pixels, or 0 without a picture.
        frame_rate: frames per second on average, or NaN.
        sound_rate: Hz, or 0 without sound.
        zero: the container time that the file's clock calls 0, in seconds.
    """

    path: str
    format: str
    duration: float
    width: int
    height: int
    frame_rate: float
    sound_rate: int
    zero: Fraction

    @property
    def has_picture(self) -> bool:
        """Whether there is a video stream."""
        return self.width > 0

    @property
    def has_sound(self) -> bool:
        """Whether there is an audio stream."""
        return self.sound_rate > 0

    @property
    def is_image(self) -> bool:
        """Whether the file holds a still image."""
        return is_image_format(self.format)


def probe_media(path: str | os.PathLike[str]) -> MediaFacts:
    """Read a file's header.

    Args:
        path: the file.

    Returns:
        Its facts.

    Raises:
        MediaError: it is missing, empty or no medium.
    """
    text, _ = regular_file(path)
    with border(text, "read the header of"), opened(text) as container:
        return read_facts(text, container, *choose_streams(text, container))


def choose_streams(path: str, container: Any) -> tuple[Any, Any]:
    """Choose the best video stream that is no cover picture, and the best audio stream.

    Args:
        path: the file, for the message.
        container: PyAV's input container.

    Returns:
        The video stream or None, the audio stream or None.

    Raises:
        MediaError: there is neither.
    """
    pictures = [s for s in container.streams.video if not int(s.disposition) & _ATTACHED_PICTURE]
    pictures = [s for s in pictures if s.codec_context is not None]
    sounds = [s for s in container.streams.audio if s.codec_context is not None]
    best = (container.streams.best("video"), container.streams.best("audio"))
    picture = best[0] if best[0] in pictures else next(iter(pictures), None)
    sound = best[1] if best[1] in sounds else next(iter(sounds), None)
    if picture is None and sound is None:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise MediaError(f"{path} has neither a picture nor a sound that can be decoded (found: {', '.join(kinds)}).")
    return picture, sound


def read_facts(path: str, container: Any, picture: Any, sound: Any) -> MediaFacts:
    """Read the header of an open container.

    Args:
        path: the file.
        container: PyAV's input container.
        picture: the chosen video stream, or None.
        sound: the chosen audio stream, or None.

    Returns:
        Its facts.
    """
    starts = [
        s.start_time * s.time_base
        for s in (picture, sound)
        if s is not None and s.start_time is not None and s.time_base
    ]
    earliest = min(starts, default=Fraction(0))
    anchored = not _ABSOLUTE.isdisjoint(container.format.name.split(","))
    zero = Fraction(0) if anchored and earliest <= _LATEST_START else earliest
    if picture is not None and picture.start_time is not None and picture.time_base:
        zero = min(zero, picture.start_time * picture.time_base)
    seconds = math.nan
    if container.duration is not None and not is_image_format(container.format.name):
        seconds = float(Fraction(container.duration + (container.start_time or 0), 1_000_000) - zero)
    rate = (picture.average_rate or picture.guessed_rate) if picture is not None else None
    return MediaFacts(
        path, container.format.name, seconds if seconds > 0 else math.nan,
        picture.width if picture is not None else 0, picture.height if picture is not None else 0,
        float(rate) if rate else math.nan, sound.rate if sound is not None else 0, zero,
    )  # fmt: skip


def missing_bytes(path: str, name: str) -> int:
    """Count what a wav's header promises and the file lacks; FFmpeg reads such a file without a word.

    Args:
        path: the file.
        name: libav's name of its format.

    Returns:
        Bytes; 0 for other formats, and where the size was never filled in (a recording that was streamed).
    """
    if name != "wav":
        return 0
    with open(path, "rb") as source:
        size = os.fstat(source.fileno()).st_size
        source.seek(12)
        while len(head := source.read(8)) == 8:
            length = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return max(0, source.tell() + length - size) if 0 < length < _UNFILLED else 0
            source.seek(length + length % 2, os.SEEK_CUR)
    return 0


def true_size(container: Any) -> tuple[int, int] | None:
    """Read the true size of an odd-sized picture that `Clip.save` padded.

    Args:
        container: PyAV's input container.

    Returns:
        Width and height in pixels, or None.
    """
    comment = container.metadata.get("comment", "")
    if not comment.startswith(CROP_MARK):
        return None
    width, _, height = comment.removeprefix(CROP_MARK).partition("x")
    return (
        (int(width), int(height)) if width.isdecimal() and height.isdecimal() and int(width) and int(height) else None
    )
