"""`ClipFile`: a clip that stays on disk until it is needed. Manifests hold thousands of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from av_lens.media.border import regular_file
from av_lens.media.clip import Clip
from av_lens.media.header import MediaFacts, probe_media
from av_lens.media.source import load_clip
from av_lens.media.validation import check_rate, check_stream, check_window

_MOST_CLIPS = 16
_MOST_BYTES = 1 << 30


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
        file = (os.path.abspath(path), size, os.stat(path).st_mtime_ns)
        asked = (self.start, self.end, self.fps, self.sound_rate)
        key = (*file, *asked, *sorted((self.stream or {}).items()))
        clip = _LAST.get(key)
        if clip is None:
            start, end, fps, rate = asked
            clip = load_clip(path, start=start, end=end, fps=fps, sound_rate=rate, stream=self.stream)
        with _LOCK:
            _LAST.pop(key, None)
            _LAST[key] = clip
            while len(_LAST) > _MOST_CLIPS or sum(map(_size, _LAST.values())) > _MOST_BYTES:
                _LAST.pop(next(iter(_LAST)))
        return clip


_LAST: dict[tuple[object, ...], Clip] = {}
"""The clips loaded last, the latest at the end: at most 16, and at most 1 GiB of them."""
_LOCK = threading.Lock()


def _size(clip: Clip) -> int:
    arrays = (clip.frames, clip.times, clip.waveform)
    return sum(array.nbytes for array in arrays if array is not None)
