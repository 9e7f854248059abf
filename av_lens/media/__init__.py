"""Media files become clips: decode, cut, swap, mute, blank, shift, write. PyAV loads on first use."""

from av_lens.media.arrays import MediaBudgetError
from av_lens.media.clip import Clip
from av_lens.media.header import MediaFacts, probe_media
from av_lens.media.source import ClipFile, load_clip

__all__ = ["Clip", "ClipFile", "MediaBudgetError", "MediaFacts", "load_clip", "probe_media"]
