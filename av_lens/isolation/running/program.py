"""Which program measures? The hash of the code that what is kept depends on.

Measurements on disk are opened again by a later session only if the same code would make them: what plots, reports,
trains or parses a command line may change meanwhile.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

MEASURES = (
    "spans.py", "media", "families", "inputs", "interventions", "core", "metrics", "replay", "model", "methods",
    "isolation",
)  # fmt: skip
_PACKAGE = Path(__file__).resolve().parents[2]


@cache
def measuring_hash(package: Path = _PACKAGE) -> str:
    """Hash the python files of the rooms that measure."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] in MEASURES:
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
