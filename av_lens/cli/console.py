"""What the terminal shows: progress bars, short tables, findings, positions, one clear message for an error."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

_UNWATCHED = 120  # columns, where the output goes to a file or a pipe


def _console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_UNWATCHED)


OUT, ERR = _console(stderr=False), _console(stderr=True)


def bars() -> Any:
    """Bars for callbacks `(stage, done, total)`, on standard output."""
    from av_lens.core.budget import Bars

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


_SHOWN = ("G", "C", "gap", "reversal rate", "E_A", "E_V", "shortcut index")
_CELLS = ("va", "blank_a", "audio_only", "v_muted", "video_only")


def behaviour_table(found: Any) -> Any:
    """Show the main figures of behaviour with their intervals; the report has all of them."""
    frame = found.behaviour
    chosen = "competent" if (frame["chosen"] == "competent").any() else "all"
    rows: list[tuple[Any, ...]] = []
    for r in frame[frame["chosen"] == chosen].to_dict("records"):
        right = r["quantity"] == "accuracy" and r["rule"] == "vocabulary" and r["cell"] in _CELLS
        if r["quantity"] in _SHOWN or right:
            name = f"right in {r['cell']}" if right else r["quantity"]
            rows.append((name, r["half"], float(r["value"]), float(r["low"]), float(r["high"]), int(r["n"])))
    columns = ["behaviour", "half", "value", "low", "high", "n"]
    return table(columns, rows, right=("value", "low", "high", "n"))


def head_table(found: Any, *, rows: int = 12) -> Any:
    """Show the ranked heads."""
    right = ("effect", "low", "high", "of G", "direct share", "q")
    names = ["head", "role", "in the set", "donor", *right, "held out"]
    columns = ("effect", "low", "high", "share", "direct_share", "q")
    shown = [
        (
            f"L{r['layer']} H{r['head']}",
            r["role"],
            r["role_in_set"] or None,
            r["donor"],
            *(float(r[c]) for c in columns),
            r["status"] or None,
        )
        for r in found.heads.head(rows).to_dict("records")
    ]
    title = f"named heads, largest effect first ({len(shown)} of {len(found.heads)}; effects in logits, held out)"
    return table(names, shown, title=title, right=right)


_CHANGE = ("n", "a", "b", "change", "low", "high")


def change_table(found: Any) -> Any:
    """Show what changed in behaviour and captions."""
    captions = found.captions.assign(half=found.captions["arm"], quantity=found.captions["figure"])
    rows = [tuple(row[name] for name in ("quantity", "half", *_CHANGE))
            for frame in (found.behaviour, captions) for row in frame.to_dict("records")]  # fmt: skip
    return table(["figure", "half or edit", "n", "in A", "in B", "B - A", "low", "high"], rows, right=_CHANGED)


_CHANGED = ("n", "in A", "in B", "B - A", "low", "high", "p, Holm")


def node_table(found: Any) -> Any:
    """Show what is named in either."""
    names = ("name", "role_a", "role_b", "outcome", "donor", *_CHANGE, "p_holm")
    headings = ["node", "role in A", "role in B", "outcome", "donor", *_CHANGED]
    rows = [tuple(row[name] for name in names) for row in found.nodes.to_dict("records")]
    return table(headings, rows, title=f"nodes named in either ({len(rows)}), held out", right=_CHANGED)


_RIGHT = ("positions", "count", "model (s)", "source (s)", "position", "row", "col")


def by_run(frame: Any) -> Any:
    """Summarise a position table: one row per run of positions with the same role."""
    runs = (frame["role"] != frame["role"].shift()).cumsum()
    rows = [_summary(group) for _, group in frame.groupby(runs, sort=False)]
    columns = ["role", "positions", "count", "model (s)", "source (s)", "patches", "tokens"]
    return table(columns, rows, right=_RIGHT)


def by_position(frame: Any) -> Any:
    """Show every position with its token, both clocks and its patch."""
    columns = ["position", "role", "token", "model (s)", "source (s)", "row", "col"]
    rows: list[tuple[Any, ...]] = []
    for row in frame.to_dict("records"):
        clocks = (_between(row[f"{clock}start_s"], row[f"{clock}end_s"]) for clock in ("", "source_"))
        patch = (_index(row[name]) for name in ("row", "col"))
        rows.append((int(row["position"]), row["role"], repr(row["token"]), *clocks, *patch))
    return table(columns, rows, right=_RIGHT)


def _summary(group: Any) -> tuple[Any, ...]:
    first, last = int(group["position"].iloc[0]), int(group["position"].iloc[-1])
    patched = group[group["row"] >= 0]
    box = f"{patched['row'].max() + 1} x {patched['col'].max() + 1}" if len(patched) else "–"
    clocks = (_between(group[f"{clock}start_s"].min(), group[f"{clock}end_s"].max()) for clock in ("", "source_"))
    where = str(first) if first == last else f"{first}–{last}"
    return group["role"].iloc[0], where, len(group), *clocks, box, _tokens([str(token) for token in group["token"]])


def _between(start: float, end: float) -> str:
    return f"{start:.2f}–{end:.2f}" if np.isfinite([start, end]).all() else "–"


def _index(value: Any) -> str:
    return "–" if not np.isfinite(value) or value < 0 else str(int(value))


def _tokens(tokens: list[str], *, shown: int = 12) -> str:
    if len(set(tokens)) == 1 and len(tokens) > 1:
        return f"{tokens[0]!r} x {len(tokens)}"
    return repr("".join(tokens[:shown])) + (" ..." if len(tokens) > shown else "")
