"""How results reach rooms above them, to draw, report and plan: by a resolver that the package installs.

`results` is imported without torch and without plotly, and knows no later room; what `grid.plot()` draws with is asked
for here, when it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_resolvers: list[Callable[[str], Any]] = []


def install(resolver: Callable[[str], Any]) -> None:
    """Say how rooms are found by name; the package does so once, on import."""
    _resolvers[:] = [resolver]


def upstairs(room: str) -> Any:
    """Give a later room by its name below the package, such as "plots"."""
    return _resolvers[0](room)
