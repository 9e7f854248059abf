"""The positions of an input as a table for the terminal: one row per run of equal roles, or one per position."""

from __future__ import annotations

from typing import Any

import numpy as np

from av_lens.cli import console

_RIGHT = ("positions", "count", "model (s)", "source (s)", "position", "row", "col")


def by_run(frame: Any) -> Any:
    """Summarise a position table: one row per run of positions with the same role."""
    runs = (frame["role"] != frame["role"].shift()).cumsum()
    rows = [_summary(group) for _, group in frame.groupby(runs, sort=False)]
    columns = ["role", "positions", "count", "model (s)", "source (s)", "patches", "tokens"]
    return console.table(columns, rows, right=_RIGHT)


def by_position(frame: Any) -> Any:
    """Show every position with its token, both clocks and its patch."""
    columns = ["position", "role", "token", "model (s)", "source (s)", "row", "col"]
    rows: list[tuple[Any, ...]] = []
    for row in frame.to_dict("records"):
        clocks = (_between(row[f"{clock}start_s"], row[f"{clock}end_s"]) for clock in ("", "source_"))
        patch = (_index(row[name]) for name in ("row", "col"))
        rows.append((int(row["position"]), row["role"], repr(row["token"]), *clocks, *patch))
    return console.table(columns, rows, right=_RIGHT)


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
