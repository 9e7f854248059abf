"""What a clip's arrays, times and rates must be and what is done to them; the border to FFmpeg, and what is refused.

A media file is foreign matter: it is opened with limits (pixels in a frame, no network, no play lists), what it yields
is counted against a `Budget`, and whatever is raised on the way becomes one kind of error that names the file.
"""

import hashlib
import math
import os
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float32, Float64, UInt8

from av_lens.errors import AvLensError, BudgetError, MediaError, unknown

DEFAULT_MAX_BYTES = 4 << 30  # decoded bytes that one clip may hold unless its caller says more

MAX_PIXELS = 1 << 27  # pixels of one frame beyond which libav refuses to allocate it (16384 x 8192)

# Demuxers that read other files, draw text as pictures, or need a caller to say what the bytes mean.
_NOT_MEDIA = frozenset(
    {
        *("tty", "xbin", "bin", "adf", "idf", "webvtt", "srt", "vobsub", "ffmetadata", "data", "rawvideo"),
        *("concat", "hls", "dash", "imf", "sdp", "rtsp", "rtp", "lavfi"),
    }
)


class MediaBudgetError(MediaError, BudgetError):
    """A clip that would take more memory than `max_bytes` allows."""


@dataclass
class Budget:
    """Counts decoded bytes and refuses before they are allocated."""

    path: str  # the file, for the message
    max_bytes: int  # how many bytes may be decoded
    used: int = 0  # how many have been

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

    limits: dict[str, Any] = {"options": {"max_pixels": str(MAX_PIXELS)}}
    limits["container_options"] = {"protocol_whitelist": "file"}
    try:
        # An absolute path, so that "http:x.mp4" in this folder is a file name and never a protocol.
        container = av.open(os.path.abspath(path), metadata_errors="ignore", **limits)
    except foreign_errors() as error:
        raise MediaError(
            f"{path} cannot be read as media: {describe(error)}. It is no audio, video or image file that FFmpeg "
            "knows, or its header is damaged or cut off (an mp4 whose recording was interrupted has none)."
        ) from error
    with container:
        if (name := container.format.name) in _NOT_MEDIA:
            other = f"FFmpeg would read it as {name!r}"
            raise MediaError(f"{path} is not media: {other}. Give an audio, video or image file.")
        yield container


def check_picture(frames: object, times: object) -> None:
    """Refuse frames and times that do not make a picture."""
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
        raise MediaError(
            f"frames must be a uint8 NumPy array [time, height, width, 3] of 0..255, found {_what(frames)}."
        )
    if frames.ndim != 4 or frames.shape[3] != 3:
        hint = ": add the time axis with frames[None]" if frames.ndim == 3 else ""
        raise MediaError(f"frames must have the axes [time, height, width, 3], found shape {frames.shape}{hint}.")
    if 0 in frames.shape:
        raise MediaError(f"frames are empty, found shape {frames.shape}: leave them out (frames=None) for sound alone.")
    if not isinstance(times, np.ndarray) or times.dtype != np.float64 or times.ndim != 1:
        raise MediaError(f"times must be a float64 NumPy array [time] in seconds, found {_what(times)}.")
    if len(times) != len(frames):
        raise MediaError(f"each frame needs one time, found {len(frames)} frames and {len(times)} times.")
    if not (finite := np.isfinite(times)).all():
        k = finite.argmin()
        raise MediaError(f"times must be finite, found {times[k]} at frame {k}.")
    if times[0] < 0:
        found = f"found {times[0]:g} s: subtract it"
        raise MediaError(f"times count from the clip's start and cannot be negative, {found}.")
    steps = np.diff(times)
    if (steps <= 0).any():
        k = (steps <= 0).argmax()
        raise MediaError(
            f"times must increase, found {times[k]:g} s then {times[k + 1]:g} s at frames {k} and {k + 1}: sort them."
        )


def check_sound(waveform: object, rate: object) -> None:
    """Refuse a waveform that is not sound."""
    check_rate("rate", rate)
    if waveform is None:
        return
    if not isinstance(waveform, np.ndarray) or waveform.dtype != np.float32:
        whole = isinstance(waveform, np.ndarray) and waveform.dtype.kind in "iu"
        hint = " (for int16, divide by 32768)" if whole else ""
        raise MediaError(
            f"the waveform must be a float32 NumPy array [sample] in [-1, 1], found {_what(waveform)}{hint}."
        )
    if waveform.ndim != 1:
        raise MediaError(f"the waveform must be mono [sample], found shape {waveform.shape}: average the channels.")
    if len(waveform) == 0:
        raise MediaError("the waveform is empty: leave it out (waveform=None) for pictures alone.")
    peak = float(np.max(np.abs(waveform)))
    if not math.isfinite(peak):
        where = f"at sample {np.isfinite(waveform).argmin()}"
        raise MediaError(f"the waveform must be finite, found NaN or infinity {where}.")
    if peak > 1.0:
        raise MediaError(
            f"the waveform must lie in [-1, 1], found a peak of {peak:g}: scale it down, or clip it on purpose."
        )


def check_rate(name: str, rate: object, *, low: int = 1, high: int = 768_000) -> int:
    """Refuse a sampling rate that is none."""
    if isinstance(rate, bool) or not isinstance(rate, Integral) or not low <= int(rate) <= high:
        raise MediaError(f"{name}= must be a whole number of Hz from {low} to {high}, found {rate!r}.")
    return int(rate)


def check_stream(stream: object) -> dict[str, int]:
    """Refuse a choice of streams that is none."""
    if stream is None:
        return {}
    if not isinstance(stream, Mapping):
        raise MediaError(f'stream= must say what is chosen, such as {{"sound": 2}}, found {stream!r}.')
    chosen: dict[str, int] = {}
    for kind, index in stream.items():
        if kind not in ("picture", "sound"):
            raise MediaError("stream=: " + unknown("kind of stream", str(kind), ("picture", "sound")))
        if isinstance(index, bool) or not isinstance(index, Integral):
            raise MediaError(f"stream={{{kind!r}: ...}} takes a stream's number, found {index!r}.")
        chosen[kind] = int(index)
    return chosen


def _what(found: object) -> str:
    return f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__


def check_seconds(name: str, value: float) -> float:
    """Refuse a time that is not a finite number."""
    try:
        seconds = float(value)
    except (TypeError, ValueError) as error:
        raise MediaError(f"{name}= must be a number of seconds, found {value!r}.") from error
    if not math.isfinite(seconds):
        raise MediaError(f"{name}= must be a finite number of seconds, found {seconds}.")
    return seconds


def check_window(start: float, end: float | None) -> tuple[float, float | None]:
    """Refuse a window that runs backwards."""
    start = check_seconds("start", start)
    if start < 0:
        raise MediaError(f"start= counts from the beginning and cannot be negative, found {start:g} s.")
    end = None if end is None else check_seconds("end", end)
    if end is not None and end <= start:
        raise MediaError(f"end= must come after start=, found start={start:g} s and end={end:g} s.")
    return start, end


TOLERANCE = 1e-6  # seconds below which two times are the same time


def prepared(
    frames: object, times: object, fps: float | None, waveform: object, rate: int
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None]:
    """Copy and check the arrays of a new clip."""
    sound = None if waveform is None else as_array("waveform", waveform)
    if sound is not None:  # a copy, float64 as float32; anything else is left for the check to refuse
        sound = sound.astype(np.float32) if sound.dtype.kind == "f" else sound.copy()
    check_sound(sound, rate)
    if frames is None:
        if times is not None or fps is not None:
            raise MediaError("times= and fps= belong to frames, and frames= is missing.")
        return None, np.zeros(0), sound
    picture = as_array("frames", frames).copy()
    stamps = frame_times(picture, times, fps)
    check_picture(picture, stamps)
    return picture, stamps, sound


def as_array(name: str, values: object) -> np.ndarray:
    """Make an array of what was given; a tensor may need gradients, live on another device or be in bfloat16."""
    tensor: Any = values
    try:
        if hasattr(values, "detach"):
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if tensor.is_floating_point() else tensor
        return np.asarray(tensor)
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"{type(values).__name__}: {str(error).rstrip('.')}"
        raise MediaError(f"{name}= cannot be made an array of numbers, found {found}.") from error


def frame_times(frames: np.ndarray, times: object, fps: float | None) -> Float64[np.ndarray, " time"]:
    """Say when each frame is shown, from its times or from an even rate."""
    if fps is not None and (times is not None or check_seconds("fps", fps) <= 0):
        both = " together with times=" if times is not None else ""
        raise MediaError(f"frames need times= or a fps= above 0, found fps={fps:g}{both}.")
    if times is not None:
        stamps = as_array("times", times)
        if stamps.dtype.kind not in "iuf":
            raise MediaError(f"times must be numbers of seconds, found {stamps.dtype}.")
        return stamps.astype(np.float64)
    count = len(frames) if frames.ndim == 4 else 1
    if fps is None and count > 1:
        raise MediaError(f"{count} frames need their times: give times= (seconds, one each) or fps=.")
    return np.arange(count) / (fps or 1.0)


def typical_step(times: Float64[np.ndarray, " time"], alone: float) -> float:
    """Give the median time between frames."""
    return float(np.median(np.diff(times))) if len(times) > 1 else alone


def window_of_frames(times: Float64[np.ndarray, " time"], start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the frames whose time lies in [start, end); where none begins inside, the one on display, at time 0."""
    keep = np.flatnonzero((times >= start - TOLERANCE) & (times < end - TOLERANCE))
    if len(keep):
        return keep, np.maximum(times[keep] - start, 0.0)
    shown = np.flatnonzero(times < start)
    return shown[-1:], np.zeros(len(shown[-1:]))


def scrambled(
    frames: UInt8[np.ndarray, "time height width 3"], *, seed: int, patch: int
) -> UInt8[np.ndarray, "time height width 3"]:
    """Deal the patches of the picture anew: one permutation for all frames, so that colours and motion stay."""
    height, width = frames.shape[1:3]
    rows, cols = height // patch, width // patch
    if rows * cols < 2:
        raise MediaError(f"cannot scramble {height}x{width} frames in patches of {patch} px: take a smaller patch=.")
    order = np.random.default_rng(seed).permutation(rows * cols)
    body = frames[:, : rows * patch, : cols * patch]
    cells = rearrange(body, "t (r p) (c q) rgb -> t (r c) p q rgb", p=patch, q=patch)[:, order]
    out = frames.copy()
    out[:, : rows * patch, : cols * patch] = rearrange(cells, "t (r c) p q rgb -> t (r p) (c q) rgb", r=rows)
    return out


def blanked(kind: str, frames: UInt8[np.ndarray, "time height width 3"], *, seed: int, patch: int) -> np.ndarray:
    """Make a picture that shows nothing."""
    if kind not in ("dark", "scrambled"):
        raise MediaError(unknown("kind of blank", kind, ("dark", "scrambled")))
    return np.zeros_like(frames) if kind == "dark" else scrambled(frames, seed=seed, patch=patch)


def quiet(kind: str, n_samples: int, *, seed: int) -> Float32[np.ndarray, " sample"]:
    """Make a sound that says nothing."""
    if kind not in ("silence", "noise"):
        raise MediaError(unknown("kind of mute", kind, ("silence", "noise")))
    if kind == "silence":
        return np.zeros(n_samples, dtype=np.float32)
    noise = np.random.default_rng(seed).standard_normal(n_samples, dtype=np.float32)
    return noise * np.float32(0.003)  # -50 dB
