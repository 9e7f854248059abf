"""How results reach rooms above them, to draw, report and plan: by name, when they are asked to.

`results` is imported without torch and without plotly, and knows no later room; what `grid.plot()` draws with is looked
up here, when it is drawn.
"""

import importlib
from typing import Any


def upstairs(room: str) -> Any:
    """Give a room by its name below the package, such as "plots"."""
    return importlib.import_module(f"av_lens.{room}")
