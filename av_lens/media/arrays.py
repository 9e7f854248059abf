"""What a clip's arrays must be, and how they are cut, blanked and muted: NumPy in, NumPy out."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from av_lens.errors import MediaError, unknown

TOLERANCE = 1e-6
"""Seconds below which two times are the same time."""

_NOISE_LEVEL = 0.003


def check_picture(frames: object, times: object) -> None:
    """Refuse frames and times that do not make a picture.

    Args:
        frames: should be uint8 [time, height, width, 3].
        times: should be float64 [time], seconds, increasing from 0 or later.

    Raises:
        MediaError: they are not; the message says what was found and how to mend it.
    """
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
        raise MediaError(
            f"times must be finite, found {times[~np.isfinite(times)][0]} at frame {_first(~np.isfinite(times))}."
        )
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
    """Refuse a waveform that is not sound.

    Args:
        waveform: should be float32 [sample] in [-1, 1].
        rate: should be a positive whole number of Hz.

    Raises:
        MediaError: it is not; the message says what was found and how to mend it.
    """
    if isinstance(rate, bool) or not isinstance(rate, int) or rate <= 0:
        raise MediaError(f"the sound's rate must be a positive whole number of Hz, found {rate!r}.")
    if waveform is None:
        return
    if not isinstance(waveform, np.ndarray) or waveform.dtype != np.float32:
        hint = (
            " (for int16, divide by 32768)" if isinstance(waveform, np.ndarray) and waveform.dtype.kind in "iu" else ""
        )
        raise MediaError(
            f"the waveform must be a float32 NumPy array [sample] in [-1, 1], found {_what(waveform)}{hint}."
        )
    if waveform.ndim != 1:
        raise MediaError(f"the waveform must be mono [sample], found shape {waveform.shape}: average the channels.")
    if len(waveform) == 0:
        raise MediaError("the waveform is empty: leave it out (waveform=None) for pictures alone.")
    peak = float(np.max(np.abs(waveform)))
    if not math.isfinite(peak):
        raise MediaError(
            f"the waveform must be finite, found NaN or infinity at sample {_first(~np.isfinite(waveform))}."
        )
    if peak > 1.0:
        raise MediaError(
            f"the waveform must lie in [-1, 1], found a peak of {peak:g}: scale it down, or clip it on purpose."
        )


def _what(found: object) -> str:
    if isinstance(found, np.ndarray):
        return f"{found.dtype} of shape {found.shape}"
    return type(found).__name__


def _first(flags: np.ndarray) -> int:
    return int(np.argmax(flags))


def check_seconds(name: str, value: float) -> float:
    """Refuse a time that is not a finite number.

    Args:
        name: the argument's name, for the message.
        value: its value in seconds.

    Returns:
        The value as a float.

    Raises:
        MediaError: it is NaN, infinite or no number.
    """
    try:
        seconds = float(value)
    except (TypeError, ValueError) as error:
        raise MediaError(f"{name}= must be a number of seconds, found {value!r}.") from error
    if not math.isfinite(seconds):
        raise MediaError(f"{name}= must be a finite number of seconds, found {seconds}.")
    return seconds


def check_window(start: float, end: float | None) -> tuple[float, float | None]:
    """Refuse a window that runs backwards.

    Args:
        start: its start in seconds.
        end: its end in seconds, or None for "to the end".

    Returns:
        Both as floats.

    Raises:
        MediaError: start < 0 or end <= start.
    """
    start = check_seconds("start", start)
    if start < 0:
        raise MediaError(f"start= counts from the beginning and cannot be negative, found {start:g} s.")
    if end is None:
        return start, None
    end = check_seconds("end", end)
    if end <= start:
        raise MediaError(f"end= must come after start=, found start={start:g} s and end={end:g} s.")
    return start, end


def window_of_frames(times: Float64[np.ndarray, "time"], start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the frames whose time lies in [start, end).

    Where no frame begins inside, the frame that is on display at `start` stands for the window, at time 0.

    Args:
        times: seconds [time].
        start: seconds.
        end: seconds.

    Returns:
        The indices of the frames, and their times from `start`.
    """
    keep = np.flatnonzero((times >= start - TOLERANCE) & (times < end - TOLERANCE))
    if len(keep):
        return keep, np.maximum(times[keep] - start, 0.0)
    shown = np.flatnonzero(times < start)
    return shown[-1:], np.zeros(len(shown[-1:]))


def scrambled(
    frames: UInt8[np.ndarray, "time height width 3"], *, seed: int, patch: int
) -> UInt8[np.ndarray, "time height width 3"]:
    """Deal the patches of the picture anew: one permutation for all frames, so that colours and motion stay.

    Args:
        frames: uint8 [time, height, width, 3].
        seed: of the permutation.
        patch: the patch's side in pixels; a rim that is no whole patch stays where it is.

    Returns:
        Frames of the same shape.

    Raises:
        MediaError: fewer than two patches fit.
    """
    t, height, width, _ = frames.shape
    rows, cols = height // patch, width // patch
    if rows * cols < 2:
        raise MediaError(f"cannot scramble {height}x{width} frames in patches of {patch} px: take a smaller patch=.")
    order = np.random.default_rng(seed).permutation(rows * cols)
    body = frames[:, : rows * patch, : cols * patch].reshape(t, rows, patch, cols, patch, 3)
    cells = body.transpose(0, 1, 3, 2, 4, 5).reshape(t, rows * cols, patch, patch, 3)[:, order]
    out = frames.copy()
    dealt = cells.reshape(t, rows, cols, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    out[:, : rows * patch, : cols * patch] = dealt.reshape(t, rows * patch, cols * patch, 3)
    return out


def quiet(kind: str, n_samples: int, *, seed: int) -> Float32[np.ndarray, "sample"]:
    """Make a sound that says nothing.

    Args:
        kind: "silence" (zeros) or "noise" (Gaussian, -50 dB of full scale).
        n_samples: how long.
        seed: of the noise.

    Returns:
        float32 [sample].

    Raises:
        MediaError: the kind is unknown.
    """
    if kind == "silence":
        return np.zeros(n_samples, dtype=np.float32)
    if kind == "noise":
        noise = np.random.default_rng(seed).standard_normal(n_samples, dtype=np.float32)
        return noise * np.float32(_NOISE_LEVEL)
    raise MediaError(unknown("kind of mute", kind, ("silence", "noise")))
