"""`Clip`: frames with their true times and a waveform with its rate, and where both came from; it plays in a notebook.

A clip's clock starts at 0. Frame k is shown from `times[k]` until `times[k + 1]`; sample n sounds at n / rate.
The picture ends at `picture_end`, the sound at `sound_end`, the clip at `duration`. Nothing is padded at the end: a
sound may be shorter than its picture. Every change that a clip has undergone stands in its `notes`.

Example:
    >>> import numpy as np
    >>> from av_lens.media import Clip
    >>> beep = np.sin(np.arange(16000) / 5).astype(np.float32) / 2
    >>> frames = np.zeros((8, 28, 28, 3), dtype=np.uint8)
    >>> clip = Clip.from_arrays(frames=frames, fps=8, waveform=beep)
    >>> clip.duration, clip.shifted(0.25).waveform[:4000].any()
    (1.0, np.False_)
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from av_lens.errors import MediaError
from av_lens.media import arrays, encoding
from av_lens.whole_files import write_whole

_PREVIEW_SECONDS = 60.0
_PREVIEW_SIDE = 480


def player(clip: Any) -> str:
    """Draw a clip as HTML that needs no network."""
    shown = clip if clip.duration <= _PREVIEW_SECONDS else clip.trimmed(0.0, _PREVIEW_SECONDS)
    if not clip.has_picture:
        element = f'<audio controls src="{data_uri("audio/mp4", shown.to_mp4_bytes())}"></audio>'
    elif clip.is_image and not clip.has_sound:
        uri = data_uri("image/png", encoding.png_bytes(clip.frames[0]))
        element = f'<img alt="one frame" style="max-width:480px" src="{uri}">'
    else:
        data = shown.to_mp4_bytes(crf=20.0, max_side=_PREVIEW_SIDE)
        width = max(240, min(_PREVIEW_SIDE, clip.frames.shape[2]))
        element = f'<video controls loop playsinline width="{width}" src="{data_uri("video/mp4", data)}"></video>'
    preview = f" (the first {_PREVIEW_SECONDS:g} s are shown)" if shown is not clip else ""
    notes = "".join(f"<br>{html.escape(note)}" for note in clip.notes)
    caption = f"<figcaption><small>{html.escape(repr(clip))}{preview}{notes}</small></figcaption>"
    return f'<figure class="av-lens-clip" style="margin:0">{element}{caption}</figure>'


def data_uri(kind: str, data: bytes) -> str:
    """Write a medium of this kind, such as "video/mp4", into an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """An audio-visual clip: either stream may be absent, not both. Its arrays are read-only.

    Attributes:
        frames: uint8 [time, height, width, 3], or None for a sound alone.
        times: float64 [time], when each frame is shown, in seconds from the clip's start; empty without frames.
        waveform: float32 [sample] in [-1, 1], mono, or None for pictures alone.
        rate: the waveform's rate in Hz.
        duration: seconds. Of a file: the window that was asked for where the file fills it, else the later of
            `picture_end` and `sound_end`. A still picture without sound has duration 0.
        path: the source file, or None.
        sha256: the source file's hash, or None.
        window: the seconds (start, end) of the file that were read, or None.
        notes: what was done to it: cut, padded, clamped, muted.
    """

    frames: UInt8[np.ndarray, "time height width 3"] | None
    times: Float64[np.ndarray, " time"]
    waveform: Float32[np.ndarray, " sample"] | None
    rate: int
    duration: float
    path: str | None = None
    sha256: str | None = None
    window: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.frames is None and self.waveform is None:
            raise MediaError("a clip needs frames, a waveform, or both; found neither.")
        object.__setattr__(self, "rate", arrays.check_rate("rate", self.rate))
        arrays.check_sound(self.waveform, self.rate)
        if self.frames is not None:
            arrays.check_picture(self.frames, self.times)
        elif len(self.times):
            raise MediaError(f"a clip without frames has no frame times, found {len(self.times)}.")
        least = max(self.times[-1] if len(self.times) else 0.0, self.sound_end - 1.5 / self.rate)
        if not np.isfinite(self.duration) or self.duration < least:
            raise MediaError(
                f"duration must be finite and reach the last frame and sample ({least:g} s), found {self.duration}."
            )
        for name in ("frames", "times", "waveform"):
            if (array := getattr(self, name)) is not None:
                object.__setattr__(self, name, array.view())
                getattr(self, name).flags.writeable = False

    @classmethod
    def from_arrays(
        cls,
        *,
        frames: object = None,
        times: object = None,
        waveform: object = None,
        rate: SupportsIndex = 16000,
        fps: float | None = None,
        duration: float | None = None,
    ) -> Clip:
        """Build a clip from arrays, tensors or lists, which are copied.

        Args:
            frames: uint8 [time, height, width, 3], or None.
            times: seconds [time], increasing from 0 or later; give these or `fps`. One frame needs neither.
            waveform: float [sample] in [-1, 1], or None.
            rate: its rate in Hz.
            fps: frames per second, where they are evenly spaced from 0.
            duration: seconds; by default the later of the picture's end (its last frame lasts the median frame's time)
                and the sound's.

        Returns:
            The clip.

        Raises:
            MediaError: an array has the wrong type, shape or values, or the lengths disagree.
        """
        hertz = arrays.check_rate("rate", rate)
        picture, stamps, sound = arrays.prepared(frames, times, fps, waveform, hertz)
        if duration is None:
            step = arrays.typical_step(stamps, 0.0 if fps is None else 1 / fps)
            shown = float(stamps[-1]) + step if len(stamps) else 0.0
            duration = max(shown, 0.0 if sound is None else len(sound) / hertz)
        return cls(picture, stamps, sound, hertz, arrays.check_seconds("duration", duration))

    @property
    def has_picture(self) -> bool:
        """Whether there are frames."""
        return self.frames is not None

    @property
    def has_sound(self) -> bool:
        """Whether there is a waveform (silence counts)."""
        return self.waveform is not None

    @property
    def is_image(self) -> bool:
        """Whether the picture is one still frame."""
        return len(self.times) == 1

    @property
    def frame_duration(self) -> float:
        """Seconds from frame to frame (the median); for a still, all that remains; NaN without frames."""
        if not len(self.times):
            return float("nan")
        return arrays.typical_step(self.times, self.duration - float(self.times[0]))

    @property
    def sound_end(self) -> float:
        """Seconds at which the sound ends; 0 without sound."""
        return 0.0 if self.waveform is None else len(self.waveform) / self.rate

    @property
    def picture_end(self) -> float:
        """Seconds at which the last frame's display ends; 0 without frames."""
        if not len(self.times):
            return 0.0
        if self.sound_end < self.duration - 1.5 / self.rate:
            return self.duration
        return min(self.duration, float(self.times[-1]) + self.frame_duration)

    @cached_property
    def picture_hash(self) -> str | None:
        """SHA-256 of the frames and their times; equal pictures have equal hashes wherever they came from."""
        return None if self.frames is None else _digest(self.frames.shape, self.frames, self.times)

    @cached_property
    def sound_hash(self) -> str | None:
        """SHA-256 of the waveform and its rate."""
        return None if self.waveform is None else _digest(self.rate, self.waveform)

    def require_sound(self) -> Clip:
        """Refuse to go on without a sound.

        Returns:
            The clip itself.

        Raises:
            MediaError: it has no sound.
        """
        self._heard()
        return self

    def _heard(self) -> Float32[np.ndarray, " sample"]:
        if self.waveform is None:
            raise MediaError(
                f"sound is asked of {self._name()}, which has none: give a clip with an audio stream, "
                "or add one by with_sound()."
            )
        return self.waveform

    def require_picture(self) -> Clip:
        """Refuse to go on without a picture.

        Returns:
            The clip itself.

        Raises:
            MediaError: it has no picture.
        """
        self._seen()
        return self

    def _seen(self) -> UInt8[np.ndarray, "time height width 3"]:
        if self.frames is None:
            raise MediaError(
                f"a picture is asked of {self._name()}, which has none: give a clip with a video stream or an image."
            )
        return self.frames

    def with_sound(self, other: Clip) -> Clip:
        """Join this clip's picture with another's sound.

        Both start together and are cut to the shorter; a still picture lasts as long as the sound.

        Args:
            other: the clip whose sound is taken.

        Returns:
            The joined clip; its notes name both sources and what was cut.

        Raises:
            MediaError: this clip has no picture or the other no sound.
        """
        frames, waveform = self._seen(), other._heard()
        end = other.sound_end if self.is_image else min(self.picture_end, other.sound_end)
        keep = max(1, int(np.searchsorted(self.times, end - arrays.TOLERANCE)))
        sound = waveform[: max(1, round(end * other.rate))]
        notes = [*self.notes, *other.notes, f"picture of {self._name()}", f"sound of {other._name()}"]
        if end < self.picture_end - arrays.TOLERANCE and not self.is_image:
            notes.append(f"picture cut from {self.picture_end:.3f} to {end:.3f} s, the sound's length")
        if end < other.sound_end - arrays.TOLERANCE:
            notes.append(f"sound cut from {other.sound_end:.3f} to {end:.3f} s, the picture's length")
        length = max(end, len(sound) / other.rate)
        times = np.minimum(self.times[:keep], length)
        return Clip(frames[:keep], times, sound, other.rate, length, notes=tuple(dict.fromkeys(notes)))

    def muted(self, *, kind: str = "silence", seed: int = 0) -> Clip:
        """Replace the sound by one that says nothing, of the same length.

        Args:
            kind: "silence", or "noise" (Gaussian, -50 dB).
            seed: of the noise.

        Returns:
            The muted clip.

        Raises:
            MediaError: there is no sound, or the kind is unknown.
        """
        return self._noted(f"muted ({kind})", waveform=arrays.quiet(kind, len(self._heard()), seed=seed))

    def blank(self, *, kind: str = "dark", seed: int = 0, patch: int = 14) -> Clip:
        """Replace the picture by one that shows nothing, of the same size and times.

        Args:
            kind: "dark" (black), or "scrambled" (the patches dealt anew by one permutation for all frames).
            seed: of the permutation.
            patch: side of a patch in pixels.

        Returns:
            The blanked clip.

        Raises:
            MediaError: there is no picture, the kind is unknown, or no two patches fit.
        """
        return self._noted(f"blanked ({kind})", frames=arrays.blanked(kind, self._seen(), seed=seed, patch=patch))

    def shifted(self, seconds: float) -> Clip:
        """Shift the sound against the picture; what leaves the clip is lost, what is missing is silence.

        Args:
            seconds: positive: the sound comes later; negative: earlier.

        Returns:
            The shifted clip, its sound as long as before.

        Raises:
            MediaError: there is no sound, or the shift leaves nothing of it.
        """
        sound = self._heard()
        step = round(arrays.check_seconds("seconds", seconds) * self.rate)
        if abs(step) >= len(sound):
            raise MediaError(
                f"shifted({seconds:g}) would move all {self.sound_end:g} s of sound out of the clip: shift by less."
            )
        waveform = np.zeros_like(sound)
        waveform[max(step, 0) : len(sound) + min(step, 0)] = sound[max(-step, 0) : len(sound) - max(step, 0)]
        return self._noted(f"sound shifted by {seconds:+g} s, silence in the gap", waveform=waveform)

    def trimmed(self, start: float = 0.0, end: float | None = None) -> Clip:
        """Keep a part, and start the clock anew.

        Args:
            start: seconds.
            end: seconds, or None for the end.

        Returns:
            The frames whose time lies in [start, end) (where none begins inside, the one on display) and the samples.

        Raises:
            MediaError: the window is empty, runs backwards, or lies past the clip's end.
        """
        start, asked = arrays.check_window(start, end)
        if start >= max(self.duration, arrays.TOLERANCE):
            raise MediaError(
                f"trimmed(start={start:g}) starts past the end of {self._name()}, which lasts {self.duration:g} s."
            )
        stop = self.duration if asked is None else min(asked, self.duration)
        keep, times = arrays.window_of_frames(self.times, start, max(stop, 2 * arrays.TOLERANCE))
        frames = self.frames[keep[0] : keep[-1] + 1] if self.frames is not None and len(keep) else None
        sound = None if self.waveform is None else self.waveform[round(start * self.rate) : round(stop * self.rate)]
        sound = None if sound is None or not len(sound) else sound
        if frames is None and sound is None:
            raise MediaError(f"trimmed({start:g}, {stop:g}) leaves nothing of {self._name()}: widen it.")
        late = asked is not None and asked > self.duration + arrays.TOLERANCE
        past = f" (asked to {asked:g} s, past its end)" if late else ""
        changes: dict[str, Any] = {"frames": frames, "times": times, "waveform": sound}
        changes["duration"] = max(stop - start, 0.0 if sound is None else len(sound) / self.rate)
        if self.window is not None:
            changes["window"] = (self.window[0] + start, self.window[0] + stop)
        return self._noted(f"trimmed to {start:g}-{stop:g} s{past}", **changes)

    def _noted(self, note: str, **changes: Any) -> Clip:
        return replace(self, notes=(*self.notes, note), **changes)

    def to_mp4_bytes(self, *, crf: float = 17.0, max_side: int | None = None) -> bytes:
        """Encode the clip as an mp4 in memory, deterministically.

        Args:
            crf: x264's quality: 0 lossless in YUV, 17 visually clean, 23 small.
            max_side: scale the picture down so that no side is longer (for previews), or None.

        Returns:
            h264 (yuv420p) and AAC; frame times and the number of samples come back exactly.

        Raises:
            MediaError: libav cannot encode it.
        """
        crf = arrays.check_seconds("crf", crf)
        if not 0 <= crf <= 51:
            raise MediaError(f"crf= runs from 0 (best) to 51 (worst), found {crf:g}.")
        end = self.picture_end if self.picture_end > 0 else 1.0
        streams = (self.frames, self.times, self.waveform)
        return encoding.mp4_bytes(*streams, rate=self.rate, picture_end=end, crf=crf, max_side=max_side)

    def save(self, path: str | os.PathLike[str], *, crf: float = 17.0) -> str:
        """Write the clip to a file, whole or not at all; the same clip gives the same bytes.

        Args:
            path: ending in .mp4 (h264 and AAC), .wav (a clip without picture; float32, lossless) or .png (a still
                without sound; lossless).
            crf: x264's quality for mp4.

        Returns:
            The path as text.

        Raises:
            MediaError: another suffix, a suffix that would lose a stream, or a folder that cannot be written.
        """
        text = os.fspath(path)
        suffix = os.path.splitext(text)[1].lower()
        encoding.check_suffix(text, suffix, picture=self.has_picture, sound=self.has_sound, frames=len(self.times))
        if suffix == ".wav" and self.waveform is not None:
            data = encoding.wav_bytes(self.waveform, rate=self.rate)
        elif suffix == ".png" and self.frames is not None:
            data = encoding.png_bytes(self.frames[0])
        else:
            data = self.to_mp4_bytes(crf=crf)
        folder = os.path.dirname(os.path.abspath(text))
        write_whole(Path(text), data, error=MediaError, mend=f"{folder} must be a folder that can be written.")
        return text

    def _streams(self) -> str:
        size = "" if self.frames is None else f"{self.frames.shape[2]}x{self.frames.shape[1]}"
        picture = f"{len(self.times)} frames of {size}" if size else ""
        sound = f"{self.sound_end:.3f} s of sound at {self.rate} Hz" if self.has_sound else ""
        return " and ".join(filter(None, (picture, sound)))

    def _name(self) -> str:
        return os.path.basename(self.path) if self.path else f"a clip of {self._streams()}"

    def __repr__(self) -> str:
        where = f" from {os.path.basename(self.path)!r}" if self.path else ""
        return f"Clip({self._streams()}, {self.duration:.3f} s{where})"

    def _repr_html_(self) -> str:
        return player(self)


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()
