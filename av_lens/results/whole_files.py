"""Files that are there whole or not at all: written beside their place, and moved there when they are done.

A process that is killed while it writes leaves a `.NAME.part` beside the file and the file as it was; `sweep_partials`
removes such leftovers.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np

PARTIAL = ".part"
MOST_BYTES, TIMES = 1 << 30, 8
"""A saved result may take this much memory, and so many times its size on disk; a file that would take more is refused
before it is unpacked."""


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


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Open an npz file of numbers, whose arrays must be what their headers and the archive's list say.

    Args:
        path: the file.

    Returns:
        The arrays by name.

    Raises:
        ValueError: it would unpack to more than `MOST_BYTES` and `TIMES` its size, is damaged, or holds no numbers.
    """
    found: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        total, most = sum(entry.file_size for entry in archive.infolist()), MOST_BYTES + TIMES * path.stat().st_size
        if total > most:
            raise ValueError(f"it would unpack to {total / 2**30:.1f} GiB, and at most {most / 2**30:.1f} are taken")
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as packed:
                content = io.BytesIO(packed.read(entry.file_size))
            major = np.lib.format.read_magic(content)[0]
            header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = header(content)
            length = math.prod(shape) * dtype.itemsize
            if dtype.kind not in "biuf" or length != entry.file_size - content.tell():
                raise ValueError(f"{name} holds no numbers, or others than its header says")
            flat = np.frombuffer(content.getbuffer(), dtype=dtype, offset=content.tell())
            found[name] = flat.reshape(shape, order="F" if by_column else "C").copy()
    return found
