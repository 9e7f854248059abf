"""Which clip is it? A source clip is its file's hash and its time window, so that it is known again in any conflict."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def clip_key(source: Any) -> str:
    """Name a source clip by its file's hash and its time window (by its content where it has no file).

    Args:
        source: a `Clip` or a `ClipFile`.

    Returns:
        A key, equal for equal clips.
    """
    start, end = getattr(source, "window", None) or (getattr(source, "start", 0.0), getattr(source, "end", None))
    sha = getattr(source, "sha256", None)
    if sha is None and hasattr(source, "load") and Path(str(source.path)).exists():
        sha = hashlib.sha256(Path(str(source.path)).read_bytes()).hexdigest()
    if sha is None:
        return f"{getattr(source, 'picture_hash', None)}:{getattr(source, 'sound_hash', None)}"
    return f"{sha}:{start}:{end}"
