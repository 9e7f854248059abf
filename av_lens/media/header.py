"""What a file's header says before anything is decoded: streams, which are taken, sizes, and where its clock starts.

The file's clock starts at 0 as its container says (mp4, mkv and their kin), or at its earliest stream where
containers count from anywhere (transport streams, mp3), or where the first picture or sound comes over five seconds
late (fragments).
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from av_lens.errors import MediaError
from av_lens.media import promises
from av_lens.media.arrays import border, opened, regular_file
from av_lens.media.encoding import CROP_MARK

_LATEST_START = 5
_ABSOLUTE = frozenset({"mov", "mp4", "matroska", "webm"})
# Their durations count from the container's 0, whenever the first stream begins.
_FROM_ZERO = frozenset({"matroska", "webm", "asf", "nut"})
# FFmpeg guesses their durations from a bit rate, or from the last time stamps that it comes across.
_GUESSED = frozenset({"aac", "ac3", "eac3", "dts", "loas"})
# Their time stamps are rounded frame by frame, so that the error grows; the count of samples is exact.
_DRIFTING = frozenset({"ac3", "eac3", "dts", "truehd", "mlp", "loas"})
_ESTIMATED = frozenset({"mpeg", "mpegts"})
_ESTIMATED_TO = 1.0
_BY_BYTES = frozenset({"matroska", "webm", "asf", "avi", "caf", "w64"}) | _ESTIMATED
# Bare pictures, one after the other: nothing in them says when each is shown, and FFmpeg would assume 25 a second.
_UNDATED = frozenset(
    {
        *("h264", "hevc", "vvc", "evc", "obu", "m4v", "mpegvideo", "mjpeg", "h261", "h263"),
        *("vc1", "dirac", "dnxhd", "cavsvideo", "avs2", "avs3"),
    }
)
_STILL_BRANDS = frozenset({"avif", "heic", "heix", "heim", "heis", "mif1", "mif2"})
_ATTACHED_PICTURE = 0x400
_MOST_NAMED = 8
_KINDS = {"video": "picture", "audio": "sound"}


@dataclass(frozen=True)
class MediaFacts:
    """What a file's header says, nothing decoded."""

    path: str  # the file
    format: str  # FFmpeg's name of the container
    duration: float  # seconds, or NaN where the header does not say
    width: int  # pixels, or 0 without a picture
    height: int  # pixels, or 0 without a picture
    frame_rate: float  # frames per second on average, or NaN
    sound_rate: int  # hz, or 0 without sound
    zero: Fraction  # the container time that the file's clock calls 0, in seconds
    is_image: bool = False  # whether the file holds a still image
    is_chained: bool = False  # whether it is several recordings one after the other, each with a clock of its own (Ogg)

    @property
    def has_picture(self) -> bool:
        """Whether there is a video stream."""
        return self.width > 0

    @property
    def has_sound(self) -> bool:
        """Whether there is an audio stream."""
        return self.sound_rate > 0

    @property
    def is_timed_by_count(self) -> bool:
        """Whether its samples must be counted from the first, because its time stamps start anew or drift."""
        return self.is_chained or self.format in _DRIFTING

    def check_start(self, start: float) -> None:
        """Refuse a window that starts past the end."""
        more = _ESTIMATED_TO if self.format in _ESTIMATED else 0.0
        if self.duration + more <= start and start > 0:
            lasts = f"which lasts {self.duration:.3f} s"
            raise MediaError(f"start={start:g} s is past the end of {self.path}, {lasts}: start earlier.")


def probe_media(path: str | os.PathLike[str], *, stream: Mapping[str, int] | None = None) -> MediaFacts:
    """Read a file's header."""
    text, _ = regular_file(path)
    with border(text, "read the header of"), opened(text) as container:
        check_readable(text, container.format.name)
        return read_facts(text, container, *choose_streams(text, container, stream))


def choose_streams(path: str, container: Any, wanted: Mapping[str, int] | None = None) -> tuple[Any, Any]:
    """Choose the best video stream that is no cover picture, and the best audio stream, or those that are asked for."""
    pictures = [s for s in container.streams.video if s.codec_context is not None]
    sounds = [s for s in container.streams.audio if s.codec_context is not None]
    moving = [s for s in pictures if not is_cover(s)]
    taken: list[Any] = []
    for kind, called, able, usual in (("picture", "video", pictures, moving), ("sound", "audio", sounds, sounds)):
        if wanted and kind in wanted:
            usual = [stream for stream in able if stream.index == wanted[kind]]
            if not usual:
                asked, there = f"stream={{{kind!r}: {wanted[kind]}}}", ", ".join(map(_named, able)) or "none"
                raise MediaError(f"{asked} is no {kind} of {path} that can be decoded; there: {there}.")
        best = container.streams.best(called)
        taken.append(best if best in usual else next(iter(usual), None))
    if taken == [None, None]:
        kinds = ", ".join(map(_named, container.streams)) or "nothing"
        raise MediaError(f"{path} has neither a picture nor a sound that can be decoded (found: {kinds}).")
    return taken[0], taken[1]


def stream_kind(stream: Any) -> str:
    """Name a stream's kind as `stream=` does."""
    return _KINDS.get(stream.type, str(stream.type))


def is_cover(stream: Any) -> bool:
    """Whether a stream is a picture attached to a sound or a film, such as an album's cover."""
    return stream.type == "video" and bool(int(stream.disposition) & _ATTACHED_PICTURE)


def _named(stream: Any) -> str:
    """Name a stream by its kind, its index and what is known of it."""
    codec = stream.codec_context.name if stream.codec_context is not None else "no decoder"
    words = [codec, "cover" if is_cover(stream) else "", stream.metadata.get("language", "und")]
    return f"{stream_kind(stream)} {stream.index} ({', '.join(w for w in words if w not in ('', 'und'))})"


def streams_left_out(container: Any, *taken: Any) -> list[str]:
    """Say which streams of a file are not read."""
    left = [s for s in container.streams if s not in taken]
    if not left:
        return []
    names = ", ".join(map(_named, left[:_MOST_NAMED]))
    more = f" and {len(left) - _MOST_NAMED} more" if len(left) > _MOST_NAMED else ""
    other = next((s for s in left if s.type in _KINDS and s.codec_context is not None), None)
    hint = "" if other is None else f"; stream={{'{_KINDS[other.type]}': {other.index}}} takes it"
    return [f"left out: {names}{more}{hint}"]


def read_facts(path: str, container: Any, picture: Any, sound: Any) -> MediaFacts:
    """Read the header of an open container."""
    name = container.format.name
    chained = name == "ogg" and promises.is_chained(path)
    if chained and picture is not None:
        raise MediaError(f"{path} is several films one after the other (a chained Ogg): cut them apart.")
    known = [s for s in (picture, sound) if s is not None and s.start_time is not None and s.time_base]
    starts = {s.type: s.start_time * s.time_base for s in known}
    earliest, kinds = min(starts.values(), default=Fraction(0)), _kinds(name)
    zero = Fraction(0) if kinds & _ABSOLUTE and earliest <= _LATEST_START else earliest
    zero = min(zero, starts.get("video", zero))
    images = name in ("image2", "image2pipe", "ico") or name.endswith("_pipe")
    still = images or container.metadata.get("major_brand") in _STILL_BRANDS
    seconds = math.nan
    guessed = chained or name in _GUESSED or (name == "mp3" and not promises.counts_its_frames(path))
    if container.duration is not None and not still and not guessed:
        begins = 0 if kinds & _FROM_ZERO else container.start_time or 0
        seconds = float(Fraction(container.duration + begins, 1_000_000) - zero)
    rate = (picture.average_rate or picture.guessed_rate) if picture is not None else None
    size = (0, 0) if picture is None else (picture.width, picture.height)
    rates = (float(rate) if rate else math.nan, sound.rate if sound is not None else 0)
    return MediaFacts(path, name, seconds if seconds > 0 else math.nan, *size, *rates, zero, still, chained)


def promised_end(facts: MediaFacts, taken: list[Any]) -> float:
    """Say when the header promises that the streams end which are read."""
    kinds = _kinds(facts.format)
    if kinds & _ABSOLUTE and not kinds & _FROM_ZERO:
        ends = [((s.start_time or 0) + s.duration) * s.time_base for s in taken if s.duration]
        return float(max(ends) - facts.zero) if len(ends) == len(taken) else facts.duration
    return math.nan if kinds & _BY_BYTES else facts.duration


def _kinds(name: str) -> frozenset[str]:
    return frozenset(name.split(","))


def check_readable(path: str, name: str) -> None:
    """Refuse what FFmpeg opens and cannot rightly decode."""
    if name in _UNDATED:
        raise MediaError(
            f"{path} is a bare {name} stream: nothing in it says when its frames are shown. Put it into a container "
            "at its own rate (`ffmpeg -r RATE -i IN -c copy OUT.mkv`)."
        )
    if name == "webp_pipe" and promises.is_animated_webp(path):
        raise MediaError(
            f"{path} is an animated WebP, which FFmpeg does not decode: make it a GIF first "
            '(`from PIL import Image; Image.open(IN).save("OUT.gif", save_all=True)`), or a clip of its frames by '
            "Clip.from_arrays()."
        )


def true_size(container: Any) -> tuple[int, int] | None:
    """Read the true size of an odd-sized picture that `Clip.save` padded."""
    found = re.fullmatch(rf"{CROP_MARK}(\d+)x(\d+)", container.metadata.get("comment", ""))
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    return size if all(size) else None
