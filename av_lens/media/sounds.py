"""Decoded audio frames become one mono waveform whose sample 0 sounds at the window's start."""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from av_lens.errors import MediaError
from av_lens.media.arrays import Budget
from av_lens.media.encoding import resample
from av_lens.media.header import MediaFacts

_JITTER = 0.05
_LONGEST_OVERLAP = 1.0
_MOST_OVERLAPS = 3
_LONGEST_HOLE = 600.0
_MARGIN = 0.05
_FULL_PLANES = 8


class Sounds:
    """Takes audio frames in order, places them by their times, and resamples once at the end.

    Time stamps that differ from the running sample count by less than 50 ms are rounding and are ignored; a longer hole
    is filled with silence, an overlap is cut, both noted. Where the stamps start anew with each part (chained
    files) or drift (bare AC-3), the samples are counted. Channels are averaged.
    """

    def __init__(self, facts: MediaFacts, *, start: float, end: float | None, budget: Budget):
        """Prepare for a stream."""
        self.path, self.facts, self.start, self.budget = facts.path, facts, start, budget
        self.end = math.inf if end is None else end
        self.rate = 0
        self.first_time: float | None = None
        self.stream_end = math.inf
        self.done = False
        self.restart = ""
        self.notes = ["several recordings one after the other; they are joined"] if facts.is_chained else []
        self._pieces: list[np.ndarray] = []
        self._count = 0
        self._channels: set[int] = set()
        self._repairs = self._in_a_row = 0
        self._drifts: list[float] = []
        self._tick = 0.0
        self._packer: Any = None

    @property
    def last_end(self) -> float:
        """Seconds of the file's clock at which the sound so far ends."""
        return min(self._reached, self.stream_end)

    @property
    def _reached(self) -> float:
        return 0.0 if self.first_time is None else self.first_time + self._count / self.rate

    def add(self, frame: Any) -> None:
        """Take the next frame."""
        rate = frame.sample_rate
        if not self.rate and not 1_000 <= rate <= 768_000:
            raise MediaError(f"{self.path}: a sound of {rate} samples a second is damage, not sound: write it anew.")
        self.rate = self.rate or rate
        if rate != self.rate:
            changes = f"the sound's rate changes from {self.rate} to {rate} Hz on the way"
            raise MediaError(f"{self.path}: {changes}: convert it to one.")
        time = self._time(frame)
        early = time + frame.samples / rate < self.start - 2 * _MARGIN
        if early and self.first_time is None and not self.facts.is_timed_by_count:
            return
        self._channels.add(frame.layout.nb_channels)
        mono = _mono(self._packed(frame))
        if self.first_time is None:
            self.first_time = time
        elif frame.time_base and frame.time_base * rate > 1 and not self._repairs:
            self._tick = float(frame.time_base)
            self._drifts.append(time - self._reached)
        self._append(self._placed(mono, time))
        self.done = self._reached >= self.end + _MARGIN or self._reached >= self.stream_end

    def _packed(self, frame: Any) -> Any:
        """Interleave eight or more planes: PyAV reads past the end of a frame's list of planes where it is full."""
        if not frame.format.is_planar or frame.layout.nb_channels < _FULL_PLANES:
            return frame
        import av

        if self._packer is None:
            self._packer = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
        frames = self._packer.resample(frame)
        if len(frames) != 1 or frames[0].samples != frame.samples:
            many = f"a sound of {frame.layout.nb_channels} channels"
            raise MediaError(f"{self.path}: {many} does not decode: mix it down.")
        return frames[0]

    def _time(self, frame: Any) -> float:
        if frame.pts is None or not frame.time_base or (self.facts.is_timed_by_count and self.first_time is not None):
            return self._reached
        return float(frame.pts * Fraction(frame.time_base) - self.facts.zero)

    def _placed(self, mono: np.ndarray, time: float) -> np.ndarray:
        gap = time - self._reached
        if abs(gap) <= _JITTER:
            self._in_a_row = 0
            return mono
        self._repairs += 1
        if gap < 0:
            self._in_a_row += 1
            if (-gap > _LONGEST_OVERLAP or self._in_a_row == _MOST_OVERLAPS) and not self.restart:
                back = f"run back from {self._reached:.3f} to {time:.3f} s"
                self.restart = f"the sound's time stamps {back} (recordings joined?)"
            return mono[round(-gap * self.rate) :]
        if gap > _LONGEST_HOLE:
            hole = f"the sound has a hole of {gap:.0f} s at {self.last_end:.3f} s"
            raise MediaError(f"{self.path}: {hole}: its time stamps are damaged; write it anew.")
        self._append(np.zeros(round(gap * self.rate), dtype=np.float32))
        return mono

    def _append(self, mono: np.ndarray) -> None:
        self.budget.take(mono.nbytes, f"{self.last_end:.0f} s of sound at {self.rate} Hz")
        self._pieces.append(mono)
        self._count += len(mono)

    def finish(self, sound_rate: int) -> np.ndarray | None:
        """Close the window and resample."""
        if self.first_time is None or not self._count:
            return None
        sound = np.concatenate(self._pieces)
        self._pieces.clear()
        self.first_time += self._first_error()
        if not np.isfinite(sound).all():
            raise MediaError(f"{self.path}: the sound holds NaN or infinity: it is damaged; write it anew.")
        if self._repairs:
            repaired = "holes or overlaps in the sound's time stamps were filled with silence or cut"
            self.notes.append(f"{self._repairs} {repaired}")
        if (most := max(self._channels)) > 1:
            self.notes.append(f"{most} channels of sound are averaged into one")
        if self.rate != sound_rate:
            self.notes.append(f"sound resampled from {self.rate} to {sound_rate} Hz")
        if self.start == 0 and self.first_time < -1e-3:
            self.notes.append(f"the sound starts {-self.first_time:.3f} s before the file's 0; that much is left out")
        return self._cut(sound, self.first_time, sound_rate)

    def _first_error(self) -> float:
        """Where stamps are rounded (mkv: to 1 ms), the least error of the first on which all stamps agree."""
        if not self._drifts:
            return 0.0
        low, high = max(self._drifts) - self._tick / 2, min(self._drifts) + self._tick / 2
        return min(max(0.0, low), high) if low <= high else 0.0

    def _cut(self, sound: np.ndarray, first_time: float, sound_rate: int) -> np.ndarray | None:
        """Align to `start` in whole blocks that both rates share, so that resampling moves nothing."""
        shared = math.gcd(self.rate, sound_rate)
        block_in, block_out = self.rate // shared, sound_rate // shared
        lead = round((self.start - first_time) * self.rate)
        skipped = 0
        if lead >= len(sound):
            return None
        if lead < 0:
            late = -lead / self.rate
            if late > _LONGEST_HOLE:
                starts = f"the sound starts {late:.0f} s after the picture"
                raise MediaError(f"{self.path}: {starts}: its time stamps are damaged.")
            self.budget.take(-lead * 4, f"{late:.0f} s of silence before the sound")
            sound = np.concatenate([np.zeros(-lead, dtype=np.float32), sound])
            if late > 1e-3:
                self.notes.append(f"the sound starts {late:.3f} s after the clip; silence before it")
        elif lead:
            skipped = min(lead // block_in, math.ceil(_MARGIN * self.rate / block_in))
            sound = sound[lead - skipped * block_in :]
        self.budget.take(math.ceil(len(sound) * sound_rate / self.rate) * 4, f"the sound at {sound_rate} Hz")
        out = resample(sound, self.rate, sound_rate)[skipped * block_out :]
        if math.isfinite(stop := min(self.end, self.stream_end)):
            out = out[: max(0, round((stop - self.start) * sound_rate))]
        if not len(out):
            return None
        peak = float(np.abs(out).max())
        if peak > 1.0:
            self.notes.append(f"the sound peaked at {peak:.3f}; clamped to [-1, 1]")
            out = np.clip(out, -1.0, 1.0)
        return np.ascontiguousarray(out, dtype=np.float32)


def _mono(frame: Any) -> np.ndarray:
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    kind = samples.dtype
    if kind == np.uint8:
        samples = (samples.astype(np.float32) - 128.0) / 128.0
    elif kind.kind == "i":
        samples = samples.astype(np.float32) / np.float32(2.0 ** (8 * kind.itemsize - 1))
    with np.errstate(all="ignore"):
        # Damaged floats may overflow here; `finish` refuses what is not finite.
        samples = samples.astype(np.float32, copy=False)
        return samples[0].copy() if len(samples) == 1 else samples.mean(axis=0)
