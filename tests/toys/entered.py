"""How far one has to read: the files of the package that a call enters, each with the functions entered there.

Whatever is called counts, lazily imported modules too; what a module does while it is imported does not. A function of
Python is entered when its frame begins, so that C code and the checkers of types under which tests run count nothing.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import av_lens

ROOT = Path(av_lens.__file__).parent


def import_everything() -> None:
    """Import every module, so that nothing is imported while a call is watched."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        importlib.import_module(".".join(part for part in parts if part != "__init__"))


def entered(call: Callable[[], Any]) -> dict[str, set[str]]:
    """File, as written from the package's root, to the functions that a call enters, in all its threads."""
    import_everything()
    codes: set[Any] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    found: dict[str, set[str]] = {}
    for code in codes:
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT) and code.co_name != "<module>":
            found.setdefault(path.relative_to(ROOT).as_posix(), set()).add(code.co_qualname)
    return dict(sorted(found.items()))


def shown(found: dict[str, set[str]]) -> str:
    """A line for each file."""
    lines = [f"  {len(names):3d} functions  {path}" for path, names in found.items()]
    return "\n".join([f"{len(found)} files, {sum(map(len, found.values()))} functions", *lines])
