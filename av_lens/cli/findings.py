"""The findings of an isolation, short enough for a terminal: behaviour first, then the heads."""

from __future__ import annotations

from typing import Any

from av_lens.cli import console

_SHOWN = ("G", "C", "gap", "E_A", "E_V", "shortcut index")
_CELLS = ("va", "blank_a", "audio_only")


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
    return console.table(columns, rows, right=("value", "low", "high", "n"))


def head_table(found: Any, *, rows: int = 12) -> Any:
    """Show the ranked heads."""
    right = ("effect", "low", "high", "of G", "direct share", "q")
    names = ["head", "role", "donor", *right, "confirmed"]
    columns = ("effect", "low", "high", "share", "direct_share", "q")
    shown = [
        (f"L{r['layer']} H{r['head']}", r["role"], r["donor"], *(float(r[c]) for c in columns), bool(r["confirmed"]))
        for r in found.heads.head(rows).to_dict("records")
    ]
    title = f"named heads, largest effect first ({len(shown)} of {len(found.heads)}; effects in logits, held out)"
    return console.table(names, shown, title=title, right=right)
