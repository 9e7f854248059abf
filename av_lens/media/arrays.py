"""How a clip's arrays are made ready, cut, blanked and muted: NumPy in, NumPy out."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from av_lens.errors import MediaError, unknown
from av_lens.media.validation import check_picture, check_seconds, check_sound

TOLERANCE = 1e-6
"""Seconds below which two times are the same time."""

_NOISE_LEVEL = 0.003


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
        kind = type(values).__name__
        raise MediaError(
            f"{name}= cannot be made an array of numbers, found {kind}: {str(error).rstrip('.')}."
        ) from error


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


def natural_end(times: Float64[np.ndarray, " time"], fps: float | None, sound_end: float) -> float:
    """Say when a clip ends of which nothing is said."""
    alone = 1 / fps if fps is not None else 0.0
    return max(float(times[-1]) + typical_step(times, alone) if len(times) else 0.0, sound_end)


def window_of_frames(times: Float64[np.ndarray, " time"], start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the frames whose time lies in [start, end).

    Where no frame begins inside, the frame that is on display at `start` stands for the window, at time 0.
    """
    keep = np.flatnonzero((times >= start - TOLERANCE) & (times < end - TOLERANCE))
    if len(keep):
        return keep, np.maximum(times[keep] - start, 0.0)
    shown = np.flatnonzero(times < start)
    return shown[-1:], np.zeros(len(shown[-1:]))


def scrambled(
    frames: UInt8[np.ndarray, "time height width 3"], *, seed: int, patch: int
) -> UInt8[np.ndarray, "time height width 3"]:
    """Deal the patches of the picture anew: one permutation for all frames, so that colours and motion stay."""
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


def blanked(kind: str, frames: UInt8[np.ndarray, "time height width 3"], *, seed: int, patch: int) -> np.ndarray:
    """Make a picture that shows nothing."""
    if kind == "dark":
        return np.zeros_like(frames)
    if kind == "scrambled":
        return scrambled(frames, seed=seed, patch=patch)
    raise MediaError(unknown("kind of blank", kind, ("dark", "scrambled")))


def quiet(kind: str, n_samples: int, *, seed: int) -> Float32[np.ndarray, " sample"]:
    """Make a sound that says nothing."""
    if kind == "silence":
        return np.zeros(n_samples, dtype=np.float32)
    if kind == "noise":
        noise = np.random.default_rng(seed).standard_normal(n_samples, dtype=np.float32)
        return noise * np.float32(_NOISE_LEVEL)
    raise MediaError(unknown("kind of mute", kind, ("silence", "noise")))
