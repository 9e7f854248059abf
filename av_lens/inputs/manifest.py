"""`conflicts`: the conflicts of a manifest, which `av_lens.media.manifest` reads and checks."""

from __future__ import annotations

import os
from collections.abc import Iterable

from av_lens.inputs.conflict import Conflict
from av_lens.media.manifest import Entry, read_manifest


def conflicts(path: str | os.PathLike[str]) -> list[Conflict]:
    """Read a manifest of conflicts.

    Args:
        path: a jsonl file.

    Returns:
        One conflict per line, its clips not yet decoded.

    Raises:
        ManifestError: listing every fault of every line.
    """
    return conflicts_of(read_manifest(path))


def conflicts_of(entries: Iterable[Entry]) -> list[Conflict]:
    """Make conflicts of the lines of a manifest."""
    return [Conflict(**vars(entry)) for entry in entries]
