"""What can be refused at once: words, paths, manifests and names are checked before torch is imported, and all told.

A wrong letter should cost a second, not the ten of loading a model. The choices come from the modules that know them,
read from their source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from av_lens.checkpoints import check_checkpoint
from av_lens.checks import near_file, require_choice
from av_lens.cli.defaults import constant
from av_lens.errors import AvLensError, InputError

_DTYPES = ("float32", "bfloat16", "float16")
_CHOICES: dict[str, tuple[str, str]] = {
    "layout": ("inputs.conflict", "LAYOUTS"),
    "cell": ("inputs.conflict", "CELLS"),
    "gate": ("isolation.running.preparing", "GATES"),
    "site": ("isolation.measuring.recordings", "SITES"),
}


def all_told(*checks: Callable[[], Any]) -> list[Any]:
    """Make every check, and tell all that failed in one error."""
    found: list[Any] = []
    faults: list[AvLensError] = []
    for check in checks:
        try:
            found.append(check())
        except AvLensError as fault:
            faults.append(fault)
    if faults:
        raise faults[0] if len(faults) == 1 else AvLensError("\n".join(map(str, faults)))
    return found


def words(*, dtype: str | None = None, **given: Iterable[str]) -> None:
    """Refuse words that are not among the choices."""
    if dtype is not None:
        require_choice("dtype", dtype, _DTYPES)
    for kind, listed in given.items():
        for word in listed:
            require_choice(kind, word, constant(*_CHOICES[kind]))


def manifest(path: Path, limit: int | None) -> list[Any]:
    """Read a manifest, with the headers of its files."""
    from av_lens.media.manifest import read_manifest

    found = read_manifest(path)
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit} leaves no conflict; leave it out for all.")
    return found[:limit]


def model(name: str) -> None:
    """Refuse a model's name, or a folder, that cannot be loaded."""
    check_checkpoint(name)


def clip(path: Path, start: float, end: float | None) -> None:
    """Refuse a media file whose header cannot be read."""
    from av_lens.media.files import ClipFile

    ClipFile(str(path), start=start, end=end).probe()


def file(path: Path | None, what: str) -> None:
    """Refuse a file that is not there."""
    if path is not None and not path.is_file():
        raise InputError(f"cannot read the {what} {path}: no such file. {near_file(path)}")
