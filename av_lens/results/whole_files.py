"""Files that are there whole or not at all: written beside their place, and moved there when they are done.

A process that is killed while it writes leaves a `.NAME.part` beside the file and the file as it was; `sweep_partials`
removes such leftovers.
"""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".part"


def write_whole(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file; its folder exists.
        content: what it holds.
        sync: wait until it is on the disk, so that it survives a power cut too (milliseconds).
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)


def sweep_partials(folder: Path) -> int:
    """Remove what killed writers left in a folder.

    Args:
        folder: the folder; its subfolders are left alone.

    Returns:
        How many files were removed.
    """
    found = list(folder.glob(f".*{PARTIAL}"))
    for leftover in found:
        leftover.unlink(missing_ok=True)
    return len(found)
