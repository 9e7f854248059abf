"""`load_clip`: one pass over a file into a `Clip`; and `ClipFile`, which stays on disk until it is needed."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, SupportsIndex

import numpy as np

from av_lens.errors import MediaError
from av_lens.media import arrays, header
from av_lens.media.arrays import TOLERANCE, check_rate, check_seconds, check_stream, check_window, regular_file
from av_lens.media.clip import Clip
from av_lens.media.header import MediaFacts, probe_media
from av_lens.media.pictures import Pictures
from av_lens.media.promises import left_behind, shortfall
from av_lens.media.sounds import Sounds

_PREROLL = 0.5
_INTERLEAVE = 30.0
_STEPS_BACK = (0.0, 2.0, 10.0, math.inf)
_SMALL_PICTURE = 1 << 16
_THREADS = 0  # of the decoder of larger pictures; 0: one a core
_SHOWN_FAULTS = 8


def load_clip(
    path: str | os.PathLike[str],
    *,
    start: float = 0.0,
    end: float | None = None,
    fps: float | None = None,
    sound_rate: SupportsIndex = 16000,
    max_bytes: int = arrays.DEFAULT_MAX_BYTES,
    damaged: str = "refuse",
    stream: Mapping[str, int] | None = None,
) -> Clip:
    """Read a medium, or a window of it, into a clip.

    Any container or codec that PyAV's FFmpeg knows: video with or without sound, sound alone, an image. Decoding starts
    at the key frame before `start` and stops at `end`; what lies outside is never held. The whole file is read once
    more for its hash. Whatever is chosen, mixed, changed or left out on the way stands in the clip's notes.

    Args:
        path: the file.
        start: seconds of the file's clock; becomes 0 of the clip's.
        end: seconds of the file's clock, or None for its end.
        fps: keep the source frames nearest to start + k / fps, with their own true times; None keeps all.
        sound_rate: Hz of the waveform, resampled by a windowed sinc.
        max_bytes: refuse a clip whose decoded frames and samples would take more.
        damaged: "refuse" a file that ends early or does not decode cleanly, or "keep" what decodes, noted.
        stream: which of several streams to read, such as `{"sound": 2}` or `{"picture": 0, "sound": 3}`, numbered as in
            the clip's notes and by ffprobe; by default the best picture that is no cover, and the best sound.

    Returns:
        The clip. Its sound is mono, its sample 0 at the clip's 0: silence is put before a sound that starts late.

    Raises:
        MediaError: the file is missing, empty, no medium, damaged or too large, or the window or stream is not in it.
    """
    start, end = check_window(start, end)
    if fps is not None and not 0 < check_seconds("fps", fps) <= 1e6:
        raise MediaError(f"fps= must be above 0 (or None for every frame), found {fps:g}.")
    rate = check_rate("sound_rate", sound_rate, low=1_000)
    if damaged not in ("refuse", "keep"):
        raise MediaError(f'damaged= is "refuse" or "keep", found {damaged!r}.')
    text, _ = arrays.regular_file(path)
    request = _Request(text, start, end, fps, max_bytes, damaged, check_stream(stream))
    with arrays.border(text, "decode"):
        return _read(request).clip(rate, arrays.file_hash(text))


def _read(request: _Request) -> _Reading:
    """Decode the window; where a seek lands inside it, go further back, at last to the beginning."""
    for back in _STEPS_BACK:
        with arrays.opened(request.path) as container:
            reading = _Reading(request, container)
            if reading.run(back) or back == _STEPS_BACK[-1]:
                return reading
    raise AssertionError("the last way back leads to the beginning")


@dataclass(frozen=True)
class _Request:
    """What was asked."""

    path: str
    start: float
    end: float | None
    fps: float | None
    max_bytes: int
    damaged: str
    stream: Mapping[str, int]


class _Reading:
    """One pass over an open file: seek, decode into the takers, then assemble the clip."""

    def __init__(self, request: _Request, container: Any) -> None:
        self.request, self.container = request, container
        self.stop = math.inf if request.end is None else request.end
        self.faults: list[str] = []
        self.ended = False
        header.check_readable(request.path, container.format.name)
        picture, sound = header.choose_streams(request.path, container, request.stream)
        self.facts = header.read_facts(request.path, container, picture, sound)
        self.crop = header.true_size(container)
        self._check_request()
        self.streams = [stream for stream in (picture, sound) if stream is not None]
        self.left_out = header.streams_left_out(container, *self.streams)
        self.promised = header.promised_end(self.facts, self.streams)
        self.takers: dict[int, Pictures | Sounds] = {}
        self.budget = arrays.Budget(request.path, request.max_bytes)
        self.pictures = None if picture is None else self._pictures(picture)
        self.sounds = None if sound is None else self._sounds(sound)
        self.spacing = 0.0 if self.pictures is None else self.pictures.spacing

    def _pictures(self, stream: Any) -> Pictures:
        asked, budget = self.request, self.budget
        taker = Pictures(stream, facts=self.facts, start=asked.start, end=asked.end, fps=asked.fps, budget=budget)
        # Threads cost more than they give on small pictures.
        stream.codec_context.thread_count = 1 if stream.width * stream.height <= _SMALL_PICTURE else _THREADS
        stream.codec_context.thread_type = "AUTO"
        self.takers[stream.index] = taker
        return taker

    def _sounds(self, stream: Any) -> Sounds:
        asked, facts = self.request, self.facts
        taker = Sounds(facts, start=asked.start, end=asked.end, budget=self.budget)
        if stream.duration and "mp4" in facts.format:
            # The last AAC packet is padded; the track's duration says where the sound truly ends.
            taker.stream_end = float(((stream.start_time or 0) + stream.duration) * stream.time_base - facts.zero)
        self.takers[stream.index] = taker
        return taker

    def _check_request(self) -> None:
        """Refuse, by the header alone, a window past the end and a clip past the budget."""
        asked, facts = self.request, self.facts
        facts.check_start(asked.start)
        seconds = min(facts.duration, self.stop) - asked.start
        rate = facts.frame_rate if asked.fps is None else min(asked.fps, facts.frame_rate)
        n_bytes = facts.width * facts.height * 3 * max(1.0, rate * seconds)
        if math.isfinite(n_bytes):
            size = f"{seconds:.1f} s of {facts.width}x{facts.height} at {rate:.3g} frames a second"
            arrays.Budget(asked.path, asked.max_bytes).take(n_bytes, size)

    def run(self, back: float) -> bool:
        """Decode the window, from a key frame at least `back` seconds before; False where the seek landed inside."""
        sought = self._seek(back)
        packets = self.container.demux(self.streams)
        while True:
            try:
                packet = next(packets, None)
            except arrays.foreign_errors() as error:
                self.faults.append(f"reading stopped: {arrays.describe(error)}")
                packet = None
            if packet is None:
                self.ended = True
                return True
            taker = self.takers[packet.stream.index]
            time = _seconds(packet, self.facts.zero)
            if not packet.size and time is not None:
                # It carries only side data (FLAC's last packet); the true flush has no time.
                continue
            early = time is not None and time < self.request.start - 2 * _PREROLL
            if early and taker is self.sounds and not self.facts.is_timed_by_count:
                continue
            self._take(packet, taker)
            if sought and self._landed_late(back):
                return False
            late = time is not None and time > self.stop + _INTERLEAVE
            if late or all(t.done for t in self.takers.values()):
                return True

    def _seek(self, back: float) -> bool:
        target = self.request.start - _PREROLL - back
        if target <= 0 or self.facts.is_timed_by_count:
            return False
        stream = self.streams[0]
        ticks = math.floor((Fraction(target) + self.facts.zero) / stream.time_base)
        try:
            self.container.seek(ticks, stream=stream, backward=True)
        except arrays.foreign_errors():
            # No index: decode from the beginning, holding nothing before the window.
            return False
        return True

    def _take(self, packet: Any, taker: Pictures | Sounds) -> None:
        if taker.done:
            return
        try:
            frames = packet.decode()
        except arrays.foreign_errors() as error:
            time = _seconds(packet, self.facts.zero)
            # Before the window, a decoder that lacks what came before the seek may complain.
            if time is None or time >= self.request.start - TOLERANCE:
                where = header.stream_kind(packet.stream) + ("" if time is None else f" at {time:.3f} s")
                self.faults.append(f"a packet of the {where} does not decode: {arrays.describe(error)}")
            return
        for frame in frames:
            if not taker.done:
                taker.add(frame)

    def _landed_late(self, back: float) -> bool:
        start = self.request.start
        picture, sound = (taker and taker.first_time for taker in (self.pictures, self.sounds))
        if picture is not None and picture > start + TOLERANCE:
            return True
        # A sound may have a true hole here; two longer ways back are enough to believe it.
        return sound is not None and sound > start + _PREROLL / 10 and back < _STEPS_BACK[2]

    def clip(self, sound_rate: int, sha256: str) -> Clip:
        """Assemble what was decoded."""
        asked = self.request
        frames, times = (None, np.zeros(0)) if self.pictures is None else self.pictures.finish()
        waveform = None if self.sounds is None else self.sounds.finish(sound_rate)
        found = max(taker.last_end for taker in self.takers.values())
        self._check_damage(found, empty=frames is None and waveform is None)
        if frames is not None and self.crop is not None:
            width, height = self.crop
            if 0 <= frames.shape[2] - width <= 1 and 0 <= frames.shape[1] - height <= 1:
                frames = frames[:, :height, :width]
        heard = 0.0 if waveform is None else len(waveform) / sound_rate
        shown = float(times[-1]) if len(times) else 0.0
        still = self.facts.is_image and len(times) == 1
        length = 0.0 if still else max(min(self.stop, found) - asked.start, heard, shown)
        notes = [*self.faults[:_SHOWN_FAULTS], *self.left_out]
        if self.ended or asked.end is None:
            notes += left_behind(asked.path, self.facts.format)
        if asked.end is not None and found < asked.end - max(TOLERANCE, self.spacing) and not still:
            notes.append(f"asked to {asked.end:g} s; the file ends at {found:.3f} s")
        for name, taker, taken in (("picture", self.pictures, frames), ("sound", self.sounds, waveform)):
            if taker is not None:
                notes.extend(taker.notes)
                if taken is None:
                    notes.append(f"the file has a {name}, but none of it lies in the window")
        if self.facts.zero > TOLERANCE:
            notes.append(f"the file's clock starts at {float(self.facts.zero):.3f} s of its container's")
        window = (asked.start, asked.start + length)
        return Clip(frames, times, waveform, sound_rate, length, asked.path, sha256, window, tuple(notes))

    def _check_damage(self, found: float, *, empty: bool) -> None:
        asked = self.request
        if self.ended:
            if min(self.promised, self.stop) - found > max(0.25, 2 * self.spacing):
                ends = f"its header promises {self.promised:.3f} s, its data end at {found:.3f} s"
                self.faults.append(f"{ends} (truncated?)")
            self.faults += filter(None, [shortfall(asked.path, self.facts.format)])
        joined = [taker.restart for taker in self.takers.values() if taker.restart]
        if joined and asked.damaged == "refuse":
            raise MediaError(
                f"{asked.path}: {joined[0]}. Write it anew, each recording by itself, or keep what comes in order with "
                'damaged="keep".'
            )
        self.faults += joined
        if empty and not self.faults:
            nothing = "its data end before that" if asked.start > 0 else "it holds no frame and no sample"
            lasts = f"it lasts {found:.3f} s" if found > 0 else nothing
            raise MediaError(f"nothing of {asked.path} lies in {asked.start:g}-{self.stop:g} s: {lasts}.")
        if self.faults and (empty or asked.damaged == "refuse"):
            more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
            keep = "" if empty else ', or keep what decodes with damaged="keep"'
            raise MediaError(f"{asked.path} is damaged: {self.faults[-1]}{more}. Get a whole copy{keep}.")


def _seconds(packet: Any, zero: Fraction) -> float | None:
    stamp = packet.pts if packet.pts is not None else packet.dts
    return None if stamp is None or not packet.time_base else float(stamp * Fraction(packet.time_base) - zero)


_MOST_BYTES = 1 << 29


@dataclass(frozen=True)
class ClipFile:
    """A window of a media file, not yet decoded.

    Attributes:
        path: the file.
        start: seconds of the file's clock.
        end: seconds of the file's clock, or None for its end.
        fps: keep the nearest source frames at this rate, or None for all (as `load_clip`).
        sound_rate: Hz of the waveform.
        stream: which of several streams to read, or None (as `load_clip`).
    """

    path: str
    start: float = 0.0
    end: float | None = None
    fps: float | None = None
    sound_rate: int = 16000
    stream: Mapping[str, int] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_window(self.start, self.end)
        check_rate("sound_rate", self.sound_rate, low=1_000)
        object.__setattr__(self, "stream", check_stream(self.stream) or None)

    def probe(self) -> MediaFacts:
        """Check that the window can be read, from the header alone.

        Returns:
            The file's facts.

        Raises:
            MediaError: the file is missing, empty or no medium, or the window starts past its end.
        """
        facts = probe_media(self.path, stream=self.stream)
        facts.check_start(self.start)
        return facts

    def load(self) -> Clip:
        """Decode the window, or take it from the few that were decoded last.

        Returns:
            The clip; the same object while it stays in the cache and the file does not change.

        Raises:
            MediaError: as `load_clip`.
        """
        path, size = regular_file(self.path)
        asked = {name: getattr(self, name) for name in ("start", "end", "fps", "sound_rate")}
        file = (os.path.abspath(path), size, os.stat(path).st_mtime_ns)
        key = (*file, *asked.values(), *sorted((self.stream or {}).items()))
        clip = _LAST.get(key) or load_clip(path, **asked, stream=self.stream)
        with _LOCK:
            _LAST.pop(key, None)
            _LAST[key] = clip
            while _LAST and sum(map(_size, _LAST.values())) > _MOST_BYTES:
                _LAST.pop(next(iter(_LAST)))
        return clip


_LAST: dict[tuple[object, ...], Clip] = {}
"""The clips loaded last, the latest at the end: at most 16, and at most 1 GiB of them."""
_LOCK = threading.Lock()


def _size(clip: Clip) -> int:
    return sum(array.nbytes for array in (clip.frames, clip.times, clip.waveform) if array is not None)
