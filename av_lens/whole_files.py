"""Files that are there whole or not at all, and what becomes of a file that cannot be written or read back.

What av_lens writes goes into a `.NAME.*.part` beside the file, onto the disk, and from there to its place. A process
that is killed leaves at most the part; `sweep_partials` removes it. What is read again goes through `reading`.
"""

import io
import math
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError

from av_lens.checks import foreign_file, parse_json, whole_object
from av_lens.errors import FileError

PARTIAL = ".part"
MEND = "Make room, or give a place that can be written; the file is as it was before."
REMADE = "Put it back as it was, or delete it: then it is made again."
_OURS = re.compile(rf"\..*\.[0-9a-f]{{12}}{re.escape(PARTIAL)}")
Made = TypeVar("Made")
MOST_BYTES, TIMES = 1 << 30, 8
"""A saved result may take this much memory, and so many times its size on disk; a file that would take more is refused
before it is unpacked."""


def write_whole(path: Path, content: str | bytes, *, error: type[Exception] = FileError, mend: str = MEND) -> None:
    """Write a file whole or not at all."""
    with whole_file(path, error=error, mend=mend) as partial, partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path, *, error: type[Exception] = FileError, mend: str = MEND) -> Generator[Path]:
    """Let a library write a file that takes its place only when it is whole and on the disk."""
    target = Path(os.path.realpath(path))  # through a link, not in its place
    plain = not target.exists() or target.is_file()
    partial = _beside(target) if plain else Path(path)
    with writing(path, error, mend):
        try:
            yield partial
            if plain:
                _sync(partial)
                os.replace(partial, target)
        finally:
            if plain:
                with suppress(OSError):
                    partial.unlink()


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """Let several files be written that take their places together; other files of the folder stay."""
    target = Path(os.path.realpath(folder))
    partial = _beside(target)
    make_folder(partial)
    with writing(folder, FileError, MEND):
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _sync(file)
            if not target.exists():
                os.replace(partial, target)
                return
            for file in sorted(partial.rglob("*")):
                place = target / file.relative_to(partial)
                if file.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    os.replace(file, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def append_line(path: Path, line: str, *, error: type[Exception] = FileError, mend: str = MEND) -> None:
    """Add a line to a file; where that fails nothing of it stays."""
    with writing(path, error, mend), path.open("ab") as file:
        size = file.tell()
        try:
            file.write(f"{line}\n".encode())
            file.flush()
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            raise


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it, where they are not there."""
    with writing(folder, FileError, "Give another folder."):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def writing(path: Path, error: type[Exception] = FileError, mend: str = MEND) -> Generator[None]:
    """Turn what the system raises while something is written into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as raised:
        other = str(getattr(raised, "filename", None) or path)
        where = "" if PARTIAL in other or other == str(path) else f" ({other})"
        raise error(f"cannot write {path}: {describe(raised)}{where}. {mend}") from raised


@contextmanager
def reading(path: Path, *, mend: str = REMADE) -> Generator[None]:
    """Turn whatever foreign bytes raise into a sentence."""
    with foreign_file(path, "what av_lens wrote there", mend=mend, error=FileError):
        yield


def read_object(path: Path, *, mend: str = REMADE) -> dict[str, Any]:
    """Read a json object that was written whole."""
    with reading(path, mend=mend):
        return whole_object(parse_json(path.read_bytes(), finite=False), "it")


def stored(path: Path, made_of: Callable[[dict[str, Any]], Made]) -> Made | None:
    """Read what can be made again: a file that is absent, damaged or foreign counts as none."""
    with suppress(FileError), reading(path):
        return made_of(read_object(path))
    return None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Open an npz file of numbers, whose arrays must be what their headers and the archive's list say."""
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


def describe(error: BaseException) -> str:
    """Name what the system or a library raised in a few words."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__).rstrip(".")


def sweep_partials(folder: Path, *, of: str = "*") -> int:
    """Remove what killed writers left in a folder."""
    found = [place for place in folder.glob(f".{of}.*{PARTIAL}") if _OURS.fullmatch(place.name)]
    for leftover in found:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
    return len(found)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _beside(target: Path) -> Path:
    name = target.name.encode(errors="replace")[:200].decode(errors="ignore")  # names end at 255 bytes
    return target.with_name(f".{name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
