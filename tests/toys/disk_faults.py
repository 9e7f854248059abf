"""A disk that fails at one file: full while it writes or syncs, read-only, or refusing the move."""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from av_lens import whole_files

KINDS = {
    "full": errno.ENOSPC,
    "full at the sync": errno.ENOSPC,
    "read-only": errno.EROFS,
    "forbidden": errno.EACCES,
    "refuses the move": errno.EIO,
}


def named(path) -> str:
    """The file that is being written, whether at its place or beside it."""
    name = os.path.basename(path)
    beside = re.fullmatch(r"\.(.*)\.[0-9a-f]{12}\.part", name)
    return beside[1] if beside else name


class Half:
    """An open file that takes half of what it is given, and is full."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *caught):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def failing(target: str | None, kind: str = ""):
    """Fail whenever `target` is written; yields the names of all files that are written, in order."""
    seen: list[str] = []
    opened, replace, fsync = Path.open, os.replace, os.fsync

    def fail(path=None):
        raise OSError(KINDS[kind], os.strerror(KINDS[kind]), *([str(path)] if path else []))

    def failing_open(self, mode="r", *more, **options):
        name = named(self)
        if not set(mode) & set("wa"):
            return opened(self, mode, *more, **options)
        seen.append(name)
        if name == target and kind in ("read-only", "forbidden"):
            fail(self)
        file = opened(self, mode, *more, **options)
        return Half(file) if name == target and kind == "full" else file

    def failing_fsync(file):
        if kind == "full at the sync" and named(os.readlink(f"/proc/self/fd/{file}")) == target:
            fail()
        fsync(file)

    def failing_replace(source, place):
        if kind == "refuses the move" and named(place) == target:
            fail(place)
        replace(source, place)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "open", failing_open)
        patched.setattr(whole_files.os, "fsync", failing_fsync)
        patched.setattr(whole_files.os, "replace", failing_replace)
        yield seen


def kinds_at(target: str, lock: str) -> list[str]:
    """The faults that can happen at a file; the lock is only opened."""
    return ["read-only", "forbidden"] if target == lock else list(KINDS)
