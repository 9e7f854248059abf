"""What a clip's arrays, times and rates must be; each refusal says what was found and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral

import numpy as np

from av_lens.errors import MediaError, unknown


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
    if not np.isfinite(times).all():
        k = _first(~np.isfinite(times))
        raise MediaError(f"times must be finite, found {times[k]} at frame {k}.")
    if times[0] < 0:
        raise MediaError(
            f"times count from the clip's start and cannot be negative, found {times[0]:g} s: subtract it."
        )
    steps = np.diff(times)
    if (steps <= 0).any():
        k = _first(steps <= 0)
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
        k = _first(~np.isfinite(waveform))
        raise MediaError(f"the waveform must be finite, found NaN or infinity at sample {k}.")
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
    if isinstance(found, np.ndarray):
        return f"{found.dtype} of shape {found.shape}"
    return type(found).__name__


def _first(flags: np.ndarray) -> int:
    return int(np.argmax(flags))


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
    if end is None:
        return start, None
    end = check_seconds("end", end)
    if end <= start:
        raise MediaError(f"end= must come after start=, found start={start:g} s and end={end:g} s.")
    return start, end
