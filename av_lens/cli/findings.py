"""The findings of an isolation, short enough for a terminal: behaviour first, then the heads."""

from __future__ import annotations

from typing import Any

from av_lens.cli import console


def behaviour_table(found: Any) -> Any:
    """Show the figures of behaviour with their intervals.

    Args:
        found: an `Isolation`.

    Returns:
        A rich table.
    """
    rows = [
        (r["name"], r["half"], r["value"], r["low"], r["high"], r["unit"]) for r in found.behaviour.to_dict("records")
    ]
    return console.table(["figure", "half", "value", "low", "high", "unit"], rows, right=("value", "low", "high"))


def head_table(found: Any, *, rows: int = 12) -> Any:
    """Show the ranked heads.

    Args:
        found: an `Isolation`.
        rows: how many to show.

    Returns:
        A rich table, largest effect first.
    """
    columns = ["layer", "head", "site", "role", "donor", "effect", "low", "high", "direct_share", "q", "confirmed"]
    shown = found.heads.head(rows)[columns].to_dict("records")
    right = ("layer", "head", "effect", "low", "high", "direct_share", "q")
    title = f"heads, largest effect first ({min(rows, len(found.heads))} of {len(found.heads)} rows)"
    return console.table(columns, [tuple(row.values()) for row in shown], title=title, right=right)
