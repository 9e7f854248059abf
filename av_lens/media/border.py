"""The one border between av_lens and libav: files are opened here, and every failure leaves as a `MediaError`.

A media file is foreign matter: its headers can promise a terabyte, its packets can be noise. So a file is
opened with limits (pixels in a frame, no network, no play lists), what it yields is counted against a `Budget`, and
whatever PyAV, NumPy or the system raise on the way is turned into one kind of error that names the file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from av_lens.errors import AvLensError, BudgetError, MediaError

DEFAULT_MAX_BYTES = 4 << 30
"""Decoded bytes that one clip may hold unless its caller says more."""

MAX_PIXELS = 1 << 27
"""Pixels of one frame beyond which libav refuses to allocate it (16384 x 8192)."""

# Demuxers that read other files, draw text as pictures, or need a caller to say what the bytes mean.
_NOT_MEDIA = frozenset(
    {
        *("tty", "xbin", "bin", "adf", "idf", "webvtt", "srt", "vobsub", "ffmetadata", "data", "rawvideo"),
        *("concat", "hls", "dash", "imf", "sdp", "rtsp", "rtp", "lavfi"),
    }
)
_IMAGE_FORMATS = frozenset({"image2", "image2pipe", "ico"})


class MediaBudgetError(MediaError, BudgetError):
    """A clip that would take more memory than `max_bytes` allows."""


@dataclass
class Budget:
    """Counts decoded bytes and refuses before they are allocated.

    Attributes:
        path: the file, for the message.
        max_bytes: how many bytes may be decoded.
        used: how many have been.
    """

    path: str
    max_bytes: int
    used: int = 0

    def take(self, n_bytes: float, what: str) -> None:
        """Book `n_bytes`, or refuse."""
        if self.used + n_bytes > self.max_bytes:
            raise MediaBudgetError(
                f"{self.path}: {what} would take {_amount(self.used + n_bytes)} decoded, over the budget of "
                f"{_amount(self.max_bytes)}. Read less (start=, end=), thin the frames (fps=), or raise max_bytes=."
            )
        self.used += int(n_bytes)


def _amount(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.1f} MiB"


def foreign_errors() -> tuple[type[BaseException], ...]:
    """List what reading or writing foreign media may raise: PyAV's tree, the system's, and numbers out of range."""
    from av.error import FFmpegError

    return (FFmpegError, OSError, ValueError, ArithmeticError, LookupError, MemoryError, TypeError, RuntimeError)


@contextmanager
def border(path: str, doing: str) -> Generator[None]:
    """Let only `AvLensError` out."""
    try:
        yield
    except AvLensError:
        raise
    except foreign_errors() as error:
        raise MediaError(
            f"could not {doing} {path}: {describe(error)}. Check that it plays, or convert it "
            "(`ffmpeg -i IN -c:v libx264 -c:a aac OUT.mp4`)."
        ) from error


def describe(error: BaseException) -> str:
    """Name an exception in a few words."""
    text = getattr(error, "strerror", None) or str(error) or "no further text"
    return f"{text} ({type(error).__name__})"


def regular_file(path: str | os.PathLike[str]) -> tuple[str, int]:
    """Check what can be checked of a path without reading it."""
    if not isinstance(path, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MediaError(_no_path(path))
    try:
        text = os.fsdecode(path)
        found = os.stat(text)
    except FileNotFoundError as error:
        if "://" in (given := os.fsdecode(path)):
            raise MediaError(f"{given} is an address, not a file: download it first, then give its path.") from error
        near = os.path.dirname(os.path.abspath(os.fspath(path)))
        hint = "check its spelling" if os.path.isdir(near) else f"the folder {near} does not exist either"
        raise MediaError(f"no media file at {os.fspath(path)}: {hint}.") from error
    except (OSError, ValueError, TypeError) as error:
        raise MediaError(f"cannot look at the media path {path!r}: {describe(error)}.") from error
    if stat.S_ISDIR(found.st_mode):
        raise MediaError(f"{text} is a directory, not a media file: name a file inside it.")
    if not stat.S_ISREG(found.st_mode):
        raise MediaError(f"{text} is not a regular file (a device, pipe or socket): copy it to a file first.")
    if found.st_size == 0:
        raise MediaError(f"{text} is empty (0 bytes): it was never written, or its download failed.")
    return text, found.st_size


def _no_path(given: object) -> str:
    """Say what to do with bytes, file objects, arrays and whatever else is no path."""
    kind, mend = type(given).__name__, "give a string or a pathlib.Path"
    if isinstance(given, bytes | bytearray | memoryview):
        kind, mend = f"{len(given)} {kind}", "write them to a file first"
    elif hasattr(given, "read"):
        kind, mend = f"an open {kind}", "give its path, or write it to a file first"
    elif hasattr(given, "shape"):
        mend = "make a clip of arrays by Clip.from_arrays()"
    return f"a medium is named by the path of its file, found {kind}: {mend}."


def file_hash(path: str | os.PathLike[str]) -> str:
    """Hash what a file holds; a file of the same size and time as when it was hashed is not read again."""
    found = os.stat(path)
    return _hashed(os.path.abspath(path), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _hashed(path: str, size: int, modified_ns: int) -> str:
    del size, modified_ns  # part of the cache's key
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


@contextmanager
def opened(path: str) -> Generator[Any]:
    """Open a media file for reading, silently and with limits."""
    import av

    options = {"max_pixels": str(MAX_PIXELS)}
    limits = {"protocol_whitelist": "file"}
    try:
        # An absolute path, so that "http:x.mp4" in this folder is a file name and never a protocol.
        container = av.open(os.path.abspath(path), options=options, container_options=limits, metadata_errors="ignore")
    except foreign_errors() as error:
        raise MediaError(
            f"{path} cannot be read as media: {describe(error)}. It is no audio, video or image file that FFmpeg "
            "knows, or its header is damaged or cut off (an mp4 whose recording was interrupted has none)."
        ) from error
    with container:
        name = container.format.name
        if name in _NOT_MEDIA:
            raise MediaError(
                f"{path} is not media: FFmpeg would read it as {name!r}. Give an audio, video or image file."
            )
        yield container


def is_image_format(name: str) -> bool:
    """Whether a container's name means still images."""
    return name in _IMAGE_FORMATS or name.endswith("_pipe")
