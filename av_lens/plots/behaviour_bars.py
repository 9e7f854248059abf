"""What the model does before anything is edited: its logits' main effects, and its answers cell by cell.

Above, in logits: E_A and E_V, what the sound and the picture do to the answer; G and C, hearing with nothing to see and
under conflict; the gap between them. Positive is towards the sound. Below: how often the sound's answer is the best, by
cell (picture first, sound second). Filled marks are the discovery half, open ones the confirmation half; lines are 95%
intervals; a figure without a mark was not measured.
"""

from __future__ import annotations

from typing import Any

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style

MEANINGS = {
    "E_A": "E_A: what the sound does",
    "E_V": "E_V: what the picture does",
    "I": "I: interaction of the two",
    "G": "G: hearing, nothing to see",
    "C": "C: hearing under conflict",
    "gap": "gap: G − C",
}
COLOURS = {"E_A": colours.SOUND, "E_V": colours.PICTURE}
CELLS = {
    "aa": "aa: both show the sound's",
    "vv": "vv: both show the picture's",
    "va": "va: the conflict",
    "av": "av: the mirrored conflict",
    "blank_a": "blank_a: nothing to see",
    "blank_v": "blank_v: nothing to see",
    "v_muted": "v_muted: nothing to hear",
    "a_muted": "a_muted: nothing to hear",
    "audio_only": "audio_only: no picture at all",
}


def behaviour(found: Any, *, chosen: str = "competent", rule: str = "two", title: str | None = None) -> Any:
    """Draw the behaviour table of an isolation: effects in logits above, accuracies by cell below.

    Args:
        found: an `Isolation`.
        chosen: "competent" for the conflicts that were chosen by competence, "all" for every one.
        rule: "two" for the best of the two answers, "vocabulary" for the best of all words.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure` with one trace per half and panel.

    Raises:
        InputError: if the record holds no behaviour for that choice.
    """
    every = found.behaviour
    frame = every[(every["chosen"] == chosen) & ((every["quantity"] != "accuracy") | (every["rule"] == rule))]
    if not len(frame):
        raise InputError(
            f"this isolation holds no behaviour for chosen={chosen!r}; it has {sorted(set(every['chosen']))}."
        )
    effects = [name for name in MEANINGS if (frame["quantity"] == name).any()]
    frame = frame[frame["quantity"].isin([*effects, "accuracy"])]
    frame = frame.assign(
        key=[c if q == "accuracy" else q for q, c in zip(frame["quantity"], frame["cell"], strict=True)]
    )
    cells = [str(cell) for cell in dict.fromkeys(frame["cell"]) if cell]
    named, labels = [MEANINGS[name] for name in effects], [_label(cell) for cell in cells]
    height = 120 + 30 * (len(effects) + len(cells))
    fig = _style.figure(title=title, height=height)
    share = len(effects) / max(1, len(effects) + len(cells))
    split = 1 - share * (1 - 80 / height)
    _panel(fig, frame, effects, named, axis="", legend=not cells)
    _panel(fig, frame, cells, labels, axis="2", legend=True)
    y = {"automargin": True, "zeroline": False}
    low = {"domain": [0, max(0.0, split - 80 / height)], "anchor": "x2"}
    fig.update_layout(
        yaxis=y | _style.rows(named) | {"domain": [split, 1]},
        xaxis=_style.panel("logits, towards the sound +", anchor="y", **_style.ZERO),
        yaxis2=y | _style.rows(labels) | low,
        xaxis2=_style.panel("rate of right answers", anchor="y2", range=[-0.03, 1.03]),
    )
    return fig


def _label(cell: str) -> str:
    return f"{cell.removesuffix(' (see)')}: asked what is seen" if cell.endswith(" (see)") else CELLS.get(cell, cell)


def _panel(fig: Any, frame: Any, quantities: list[str], labels: list[str], *, axis: str, legend: bool) -> None:
    """Add one panel: a mark and an interval per quantity and half."""
    for half, symbol, offset in (("discovery", "circle", -0.14), ("confirmation", "circle-open", 0.14)):
        rows = frame[frame["half"] == half].drop_duplicates("key").set_index("key")
        kept = [
            (name, label, place)
            for place, (name, label) in enumerate(zip(quantities, labels, strict=True))
            if name in rows.index
        ]
        if not kept:
            continue
        chosen = rows.loc[[name for name, _, _ in kept]]
        values, low, high = (chosen[column].astype(float).tolist() for column in ("value", "low", "high"))
        shades = [COLOURS.get(name, colours.GREEN if axis else colours.INK) for name, _, _ in kept]
        text = [
            f"<b>{label}</b><br>{half}: {v:.3f} ({a:.3f} to {b:.3f})"
            for (_, label, _), v, a, b in zip(kept, values, low, high, strict=True)
        ]
        look = {"symbol": symbol, "size": 9, "color": shades, "line": {"width": 2, "color": shades}}
        bars = _style.intervals(values, low, high, colour=colours.INK)
        shown: dict[str, Any] = {"name": half, "legendgroup": half, "showlegend": legend}
        shown |= {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
        _style.marks(fig, values, [place + offset for *_, place in kept], text, marker=look, error_x=bars, **shown)
