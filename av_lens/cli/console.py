"""What the terminal shows: progress bars, short tables, one clear message for an error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_UNWATCHED = 120  # columns, where the output goes to a file or a pipe


def _console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_UNWATCHED)


OUT, ERR = _console(stderr=False), _console(stderr=True)


def bars() -> Any:
    """Bars for callbacks `(stage, done, total)`, on standard output."""
    from av_lens.core.progress import Bars

    return Bars(OUT)


def say(line: str) -> None:
    """Print one line on standard output, as it is; bars that are shown move below it."""
    OUT.print(line, markup=False, soft_wrap=True)


def fail(error: BaseException) -> None:
    """Print one error as one message on standard error."""
    ERR.print("[bold red]error:[/bold red] ", end="")
    ERR.print(str(error) or type(error).__name__, markup=False, soft_wrap=True)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None, right: Sequence[str] = ()
) -> Table:
    """Build a plain table, numbers to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell(value) for value in row))
    return made


def show(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a blank line and a table whose first column is names and whose others are numbers."""
    OUT.print()
    OUT.print(table(columns, rows, title=title, right=columns[1:]))


def cell(value: Any) -> str:
    """Say a value in a table's cell: three figures for a float, a dash for what was not measured."""
    from rich.markup import escape

    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return escape(str(value))


def quiet_loading() -> None:
    """Silence the bar that transformers draws while it opens weights, where these are too small to wait for."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def say_path(path: str | Path) -> None:
    """Say where something was written."""
    OUT.print(f"\nwritten: {Path(path).resolve()}", soft_wrap=True, markup=False)
