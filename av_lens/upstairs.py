"""How results reach rooms above them, to draw, report and plan: by name, since `results` is imported without torch."""

import importlib
from typing import Any


def upstairs(room: str) -> Any:
    """Give a room by its name below the package, such as "plots"."""
    return importlib.import_module(f"av_lens.{room}")
