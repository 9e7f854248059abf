"""Where a result came from: versions, time, and what the caller adds, as plain data.

A result without its provenance cannot be repeated; every saved result carries one, with a schema version.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("av-lens", "torch", "transformers", "transformer-lens", "numpy")
_PACKAGE = Path(__file__).resolve().parents[1]


def stamp(**more: Any) -> dict[str, Any]:
    """Note when, by which versions, and under which choices a result was made."""
    made = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version()}
    return made | {"versions": versions()} | {name: plain(value) for name, value in more.items()}


def versions() -> dict[str, str]:
    """Find the installed versions of what computes."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@cache
def source_hash() -> str:
    """Hash the package's own python files, so that a changed program never passes off an earlier one's numbers."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Turn a value into plain data: dictionaries, lists, strings, numbers, None."""
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset | range):
        return [plain(item) for item in value]
    return str(value)


def linked(groups: Sequence[Iterable[str]]) -> tuple[int, ...]:
    """Find which examples belong together because they share a source, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    named: dict[str, int] = {}
    ends = [
        (i, len(groups) + named.setdefault(source, len(named))) for i, group in enumerate(groups) for source in group
    ]
    size = len(groups) + len(named)
    joined = coo_array((np.ones(len(ends)), np.array(ends, dtype=np.int32).reshape(-1, 2).T), shape=(size, size))
    order: dict[int, int] = {}
    labels = connected_components(joined, directed=False)[1][: len(groups)].tolist() if groups else []
    return tuple(order.setdefault(label, len(order)) for label in labels)
