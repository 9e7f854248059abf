"""`load_clip`: one pass over a file, from the key frame before the window to the window's end, into a `Clip`.

The file's clock starts at 0 as its container says (mp4, mkv and their kin), or at its earliest stream where containers
count from anywhere (transport streams, mp3), or where the first picture or sound comes more than five seconds late (fragments).
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from av_lens.errors import MediaError
from av_lens.media.arrays import TOLERANCE, check_seconds, check_window
from av_lens.media.border import (
    DEFAULT_MAX_BYTES,
    Budget,
    border,
    describe,
    foreign_errors,
    is_image_format,
    opened,
    regular_file,
)
from av_lens.media.clip import Clip
from av_lens.media.encoding import CROP_MARK
from av_lens.media.pictures import Pictures
from av_lens.media.sounds import Sounds

_LATEST_START = 5
_PREROLL = 0.5
_INTERLEAVE = 30.0
_STEPS_BACK = (0.0, 2.0, 10.0, math.inf)


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
        return _facts(text, container, *_streams(text, container))


def load_clip(
    path: str | os.PathLike[str],
    *,
    start: float = 0.0,
    end: float | None = None,
    fps: float | None = None,
    sound_rate: int = 16000,
    max_bytes: int = DEFAULT_MAX_BYTES,
    damaged: str = "refuse",
) -> Clip:
    """Read a medium, or a window of it, into a clip.

    Any container or codec that PyAV's FFmpeg knows: video with or without sound, sound alone, an image. Decoding starts at the
    key frame before `start` and stops at `end`; what lies outside is never held. The whole file is read once more
    for its hash.

    Args:
        path: the file.
        start: seconds of the file's clock; becomes 0 of the clip's.
        end: seconds of the file's clock, or None for its end.
        fps: keep the source frames nearest to start + k / fps, with their own true times; None keeps all.
        sound_rate: Hz of the waveform, resampled by a windowed sinc.
        max_bytes: refuse a clip whose decoded frames and samples would take more.
        damaged: "refuse" a file that ends early or does not decode cleanly, or "keep" what decodes, noted.

    Returns:
        The clip. Its sound is mono, its sample 0 at the clip's 0: silence is put before a sound that starts late.

    Raises:
        MediaError: the file is missing, empty, no medium, damaged or too large, or the window is not in it.
    """
    start, end = check_window(start, end)
    if fps is not None and not 0 < check_seconds("fps", fps) <= 1e6:
        raise MediaError(f"fps= must be above 0 (or None for every frame), found {fps:g}.")
    if isinstance(sound_rate, bool) or not isinstance(sound_rate, int) or not 1_000 <= sound_rate <= 768_000:
        raise MediaError(f"sound_rate= must be a whole number of Hz from 1000 to 768000, found {sound_rate!r}.")
    if damaged not in ("refuse", "keep"):
        raise MediaError(f'damaged= is "refuse" or "keep", found {damaged!r}.')
    text, size = regular_file(path)
    with border(text, "decode"):
        reading = _Reading(text, start, end, fps, max_bytes, damaged)
        for back in _STEPS_BACK:
            if reading.attempt(back):
                break
        return reading.clip(sound_rate, _file_hash(os.path.abspath(text), size, os.stat(text).st_mtime_ns))


@lru_cache(maxsize=1024)
def _file_hash(path: str, size: int, modified_ns: int) -> str:
    del size, modified_ns  # part of the cache's key: a file that changed is read again
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _streams(path: str, container: Any) -> tuple[Any, Any]:
    """The best video stream that is no cover picture, and the best audio stream."""
    import av

    pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    pictures = [s for s in pictures if s.codec_context is not None]
    sounds = [s for s in container.streams.audio if s.codec_context is not None]
    best = (container.streams.best("video"), container.streams.best("audio"))
    picture = best[0] if best[0] in pictures else next(iter(pictures), None)
    sound = best[1] if best[1] in sounds else next(iter(sounds), None)
    if picture is None and sound is None:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise MediaError(f"{path} has neither a picture nor a sound that can be decoded (found: {', '.join(kinds)}).")
    return picture, sound


def _facts(path: str, container: Any, picture: Any, sound: Any) -> MediaFacts:
    starts = [
        s.start_time * s.time_base
        for s in (picture, sound)
        if s is not None and s.start_time is not None and s.time_base
    ]
    earliest = min(starts, default=Fraction(0))
    anchored = not {"mov", "mp4", "matroska", "webm"}.isdisjoint(container.format.name.split(","))
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


class _Reading:
    """One request for one file: attempts to seek and decode, then the clip."""

    def __init__(
        self, path: str, start: float, end: float | None, fps: float | None, max_bytes: int, damaged: str
    ) -> None:
        self.path, self.start, self.end, self.fps = path, start, end, fps
        self.max_bytes, self.damaged = max_bytes, damaged
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.ended = False

    def attempt(self, back: float) -> bool:
        """Seek `back` seconds before the window and decode it; False if the seek landed inside the window."""
        self.faults, self.notes, self.ended = [], [], False
        with opened(self.path) as container:
            picture, sound = _streams(self.path, container)
            self.facts = _facts(self.path, container, picture, sound)
            self.crop = _crop(container)
            self._check_start(back)
            budget = Budget(self.path, self.max_bytes)
            self._check_size(budget)
            zero = self.facts.zero
            self.pictures = self.sounds = None
            if picture is not None:
                self.pictures = Pictures(
                    picture, zero=zero, start=self.start, end=self.end, fps=self.fps, budget=budget
                )
                picture.codec_context.thread_count = 1 if picture.width * picture.height <= 1 << 16 else 0
            if sound is not None:
                self.sounds = Sounds(self.path, zero=zero, start=self.start, end=self.end, budget=budget)
                if sound.duration and "mp4" in self.facts.format:
                    self.sounds.stream_end = float(((sound.start_time or 0) + sound.duration) * sound.time_base - zero)
            sought = self._seek(container, picture, sound, back)
            return self._decode(container, picture, sound, sought)

    def _check_start(self, back: float) -> None:
        duration = self.facts.duration
        if not back and duration <= self.start and self.start > 0:
            raise MediaError(
                f"start={self.start:g} s is past the end of {self.path}, which lasts {duration:.3f} s: start earlier."
            )

    def _check_size(self, budget: Budget) -> None:
        facts = self.facts
        seconds = min(facts.duration, math.inf if self.end is None else self.end) - self.start
        rate = facts.frame_rate if self.fps is None else min(self.fps, facts.frame_rate)
        n_bytes = facts.width * facts.height * 3 * max(1.0, rate * seconds)
        if math.isfinite(n_bytes):
            Budget(self.path, budget.max_bytes).take(
                n_bytes, f"{seconds:.1f} s of {facts.width}x{facts.height} at {rate:.3g} fps"
            )

    def _seek(self, container: Any, picture: Any, sound: Any, back: float) -> bool:
        target = self.start - _PREROLL - back
        if target <= 0:
            return False
        stream = picture if picture is not None else sound
        try:
            container.seek(
                math.floor((Fraction(target) + self.facts.zero) / stream.time_base), stream=stream, backward=True
            )
        except foreign_errors():
            # No index: decode from the beginning, holding nothing before the window.
            return False
        return True

    def _decode(self, container: Any, picture: Any, sound: Any, sought: bool) -> bool:
        takers = {s.index: t for s, t in ((picture, self.pictures), (sound, self.sounds)) if s is not None}
        late = self.start - _PREROLL
        packets = container.demux([s for s in (picture, sound) if s is not None])
        while True:
            try:
                packet = next(packets, None)
            except foreign_errors() as error:
                self.faults.append(f"reading stopped: {describe(error)}")
                packet = None
            if packet is None:
                self.ended = True
                return True
            taker = takers[packet.stream_index]
            time = _seconds(packet, self.facts.zero)
            if taker is self.sounds and time is not None and time < late - 1.0 and sound.codec_context is not None:
                continue
            self._take(packet, taker)
            if sought and self._landed_late():
                return False
            if all(t.done for t in takers.values()):
                return True
            if self.end is not None and time is not None and time > self.end + _INTERLEAVE:
                return True

    def _take(self, packet: Any, taker: Any) -> None:
        if taker.done:
            return
        try:
            frames = packet.decode()
        except foreign_errors() as error:
            time = _seconds(packet, self.facts.zero)
            if time is None or time >= self.start - TOLERANCE:
                where = "" if time is None else f" at {time:.3f} s"
                self.faults.append(f"a {packet.stream.type} packet{where} does not decode: {describe(error)}")
            return
        for frame in frames:
            if not taker.done:
                taker.add(frame)

    def _landed_late(self) -> bool:
        first = self.pictures.first_time if self.pictures is not None else None
        if first is None or float(first) <= self.start + TOLERANCE:
            return False
        return True

    def clip(self, sound_rate: int, sha256: str) -> Clip:
        """Assemble what the last successful attempt decoded."""
        frames, times = self.pictures.finish() if self.pictures is not None else (None, np.zeros(0))
        waveform = self.sounds.finish(sound_rate) if self.sounds is not None else None
        picture_end = self.pictures.last_end if self.pictures is not None else 0.0
        sound_end = min(self.sounds.last_end, self.sounds.stream_end) if self.sounds is not None else 0.0
        found = max(picture_end, sound_end)
        self._check_damage(found, empty=frames is None and waveform is None)
        if frames is not None and self.crop is not None:
            width, height = self.crop
            if 0 <= frames.shape[2] - width <= 1 and 0 <= frames.shape[1] - height <= 1:
                frames = frames[:, :height, :width]
        asked = math.inf if self.end is None else self.end
        heard = 0.0 if waveform is None else len(waveform) / sound_rate
        still = self.facts.is_image and len(times) == 1
        length = 0.0 if still else max(min(asked, found) - self.start, heard, float(times[-1]) if len(times) else 0.0)
        if (
            self.end is not None
            and found < self.end - max(TOLERANCE, self.pictures.spacing if self.pictures else 0.0)
            and not still
        ):
            self.notes.append(f"asked to {self.end:g} s; the file ends at {found:.3f} s")
        for name, stream, taken in (("picture", self.pictures, frames), ("sound", self.sounds, waveform)):
            if stream is not None:
                self.notes.extend(stream.notes)
                if taken is None:
                    self.notes.append(f"the file has a {name}, but none of it lies in the window")
        if self.facts.zero > 0 and float(self.facts.zero) > 1e-3:
            self.notes.append(f"the file's clock starts at {float(self.facts.zero):.3f} s of its container's")
        return Clip(
            frames,
            times,
            waveform,
            sound_rate,
            length,
            self.path,
            sha256,
            (self.start, self.start + length),
            tuple(self.notes),
        )

    def _check_damage(self, found: float, *, empty: bool) -> None:
        declared = self.facts.duration
        if self.ended and math.isfinite(declared) and "mp3" not in self.facts.format and not self.facts.is_image:
            wanted = min(declared, math.inf if self.end is None else self.end)
            spacing = self.pictures.spacing if self.pictures is not None else 0.0
            if wanted - found > max(0.25, 2 * spacing):
                self.faults.append(
                    f"the header promises {declared:.3f} s and the data end at {found:.3f} s (truncated?)"
                )
        if empty and not self.faults:
            lasts = f"lasts {found:.3f} s" if found > 0 else "holds no frame and no sample"
            raise MediaError(f"nothing of {self.path} lies in {self.start:g}-{self.end or math.inf:g} s: it {lasts}.")
        if self.faults and (empty or self.damaged == "refuse"):
            more = f", and {len(self.faults) - 1} more faults" if len(self.faults) > 1 else ""
            raise MediaError(
                f"{self.path} is damaged: {self.faults[-1]}{more}. Get a whole copy"
                + ("." if empty else ', or keep what decodes with damaged="keep".')
            )
        self.notes.extend(self.faults[:8])


def _seconds(packet: Any, zero: Fraction) -> float | None:
    stamp = packet.pts if packet.pts is not None else packet.dts
    return None if stamp is None or not packet.time_base else float(stamp * Fraction(packet.time_base) - zero)


def _crop(container: Any) -> tuple[int, int] | None:
    """The true size of an odd-sized picture that `Clip.save` padded."""
    comment = container.metadata.get("comment", "")
    if not comment.startswith(CROP_MARK):
        return None
    width, _, height = comment.removeprefix(CROP_MARK).partition("x")
    return (
        (int(width), int(height)) if width.isdecimal() and height.isdecimal() and int(width) and int(height) else None
    )
