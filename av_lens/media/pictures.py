"""Decoded video frames become an array and their times: those inside the window, thinned to a rate, in one pass."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from av_lens.media.arrays import TOLERANCE
from av_lens.media.border import Budget

_SLACK = Fraction(1, 1_000_000)
_GROWTH = 256 << 20


class Pictures:
    """Takes frames in presentation order, keeps the wanted ones, and knows when the window is full.

    With `fps`, the wanted times are start + k / fps; each takes the nearest source frame, which keeps its
    true time, and no frame is taken twice. So a candidate is converted to RGB only once it is proved nearest.
    """

    def __init__(
        self, stream: Any, *, zero: Fraction, start: float, end: float | None, fps: float | None, budget: Budget
    ):
        """Prepare for a stream.

        Args:
            stream: PyAV's video stream.
            zero: the container time, in seconds, that the file's clock calls 0.
            start: the window's start in seconds of the file's clock.
            end: its end, or None.
            fps: frames per second wanted, or None for all.
            budget: what may be decoded.
        """
        from av.video.reformatter import Interpolation, VideoReformatter

        self.zero, self.start, self.budget = zero, Fraction(str(start)), budget
        self.end = None if end is None else Fraction(str(end))
        self.step = None if fps is None else 1 / Fraction(str(fps))
        rate = stream.average_rate or stream.guessed_rate
        self.spacing = float(1 / rate) if rate else 0.0
        self.done = False
        self.first_time: Fraction | None = None
        self.last_end = 0.0
        self.notes: list[str] = []
        shape = stream.sample_aspect_ratio
        if shape and shape != 1:
            self.notes.append(f"its pixels are not square ({shape}); kept as stored")
        self.rotation = 0
        self._reformatter = VideoReformatter()
        # Full chroma, exact rounding: the same colours on every machine.
        wide = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT
        self._interpolation = wide | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        self._buffer: np.ndarray | None = None
        self._times: list[float] = []
        self._before: Any = None
        self._held: tuple[Fraction, Any] | None = None
        self._wanted = 0
        self._last: Fraction | None = None
        self._odd = 0
        self._scarce = self._resized = False

    def add(self, frame: Any) -> None:
        """Take the next frame.

        Args:
            frame: PyAV's frame.
        """
        time = self._time(frame)
        if time is None or (self._last is not None and time <= self._last):
            self._odd += 1
            return
        self._last = time
        self.first_time = time if self.first_time is None else self.first_time
        self.last_end = max(self.last_end, float(time if self.end is None else min(time, self.end)))
        if self.end is not None and time >= self.end - _SLACK:
            self.done = True
            return
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        self.last_end = float(time) + (length if length > 0 else self.spacing)
        if time < self.start - _SLACK:
            self._before = frame
            return
        self._choose(time, frame)

    def _time(self, frame: Any) -> Fraction | None:
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is None or not frame.time_base:
            return None if self._last is None else self._last + Fraction(self.spacing)
        return stamp * Fraction(frame.time_base) - self.zero

    def _choose(self, time: Fraction, frame: Any) -> None:
        if self.step is None:
            self._keep(time, frame)
            return
        if self._held is not None:
            # Wanted times up to the middle between the held frame and this one are nearest to the held one.
            reached = ((self._held[0] + time) / 2 - self.start) // self.step + 1
            self._settle(reached)
        self._held = (time, frame)

    def _settle(self, reached: int) -> None:
        if self._held is not None and reached > self._wanted:
            self._keep(*self._held)
            self._scarce = self._scarce or reached > self._wanted + 1
            self._wanted = reached

    def _keep(self, time: Fraction, frame: Any) -> None:
        height, width = (frame.height, frame.width) if self._buffer is None else self._buffer.shape[1:3]
        count = len(self._times)
        self.budget.take(height * width * 3, f"{count + 1} frames of {width}x{height}")
        picture = self._rgb(frame, height, width)
        if self._buffer is None:
            self.rotation = _rotation(frame)
            self._buffer = np.empty((1, *picture.shape), dtype=np.uint8)
        if count == len(self._buffer):
            grown = min(2 * count, count + max(8, _GROWTH // picture.nbytes))
            self._buffer.resize((grown, *picture.shape), refcheck=False)
        self._buffer[count] = picture
        self._times.append(max(0.0, float(time - self.start)))

    def _rgb(self, frame: Any, height: int, width: int) -> np.ndarray:
        if (height, width) != (frame.height, frame.width) and not self._resized:
            self._resized = True
            self.notes.append(f"the picture changes size; scaled to its first, {width}x{height}")
        rgb = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation=self._interpolation,
            threads=1,
        )
        return rgb.to_ndarray()

    def finish(self) -> tuple[np.ndarray | None, np.ndarray]:
        """Close the window.

        Returns:
            Frames uint8 [time, height, width, 3], or None, and their times from the window's start.
        """
        if self._held is not None and self.step is not None:
            stop = Fraction(self.last_end) if self.end is None else min(self.end, Fraction(self.last_end))
            self._settle(math.ceil((stop - _SLACK - self.start) / self.step))
            self._held = None
        if self._scarce:
            self.notes.append("the source has fewer frames than fps= asks for in places; each is taken once")
        if not self._times and self._before is not None and self.last_end > float(self.start) + TOLERANCE:
            self.notes.append("no frame begins inside the window; the one on display at its start is kept, at time 0")
            self._keep(self.start, self._before)
        self._before = None
        if self._odd:
            self.notes.append(f"{self._odd} frames without an increasing time were left out")
        if self._buffer is None:
            return None, np.zeros(0)
        if len(self._buffer) != len(self._times):
            self._buffer.resize((len(self._times), *self._buffer.shape[1:]), refcheck=False)
        frames = self._buffer
        if self.rotation:
            self.notes.append(f"turned by {self.rotation} degrees, as the file asks")
            frames = np.ascontiguousarray(np.rot90(frames, k=self.rotation // 90, axes=(1, 2)))
        return frames, np.array(self._times, dtype=np.float64)


def _rotation(frame: Any) -> int:
    return round(frame.rotation / 90) * 90 % 360
