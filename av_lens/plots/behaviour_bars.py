"""What the model does before anything is edited: its logits' main effects, and its answers cell by cell.

Above, in logits: E_A and E_V, what the sound and the picture do to the answer; G and C, hearing with nothing to see and
under conflict; the gap between them. Positive is towards the sound. Below: how often the sound's answer is the best, by
cell (picture first, sound second). Filled marks are the discovery half, open ones the confirmation half; lines are 95%
intervals; a figure without a mark was not measured.
"""

from __future__ import annotations

from typing import Any

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
COLOURS = {"E_A": _style.SOUND, "E_V": _style.PICTURE}
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
    height = 120 + 30 * (len(effects) + len(cells))
    fig = _style.figure(title=title, height=height)
    share = len(effects) / max(1, len(effects) + len(cells))
    split = 1 - share * (1 - 80 / height)
    _panel(fig, frame, effects, [MEANINGS[name] for name in effects], axis="", legend=not cells)
    labels = [_label(cell) for cell in cells]
    _panel(fig, frame, cells, labels, axis="2", legend=True)
    y = {"automargin": True, "showgrid": False, "ticks": "", "tickmode": "array", "zeroline": False}
    x = {"gridcolor": _style.GRID, "automargin": True, "zeroline": False}
    named = [MEANINGS[name] for name in effects]
    fig.update_layout(
        yaxis={**y, **_places(named), "domain": [split, 1]},
        xaxis={
            **x,
            "title": {"font": {"size": 13}, "text": "logits, towards the sound +"},
            "anchor": "y",
            **_style.ZERO,
        },
        yaxis2={**y, **_places(labels), "domain": [0, max(0.0, split - 80 / height)], "anchor": "x2"},
        xaxis2={
            **x,
            "title": {"font": {"size": 13}, "text": "rate of right answers"},
            "anchor": "y2",
            "range": [-0.03, 1.03],
            "zeroline": False,
        },
    )
    return fig


def _label(cell: str) -> str:
    return f"{cell.removesuffix(' (see)')}: asked what is seen" if cell.endswith(" (see)") else CELLS.get(cell, cell)


def _places(labels: list[str]) -> dict[str, Any]:
    return {"tickvals": list(range(len(labels))), "ticktext": labels, "range": [len(labels) - 0.5, -0.5]}


def _panel(fig: Any, frame: Any, quantities: list[str], labels: list[str], *, axis: str, legend: bool) -> None:
    """Add one panel: a mark and an interval per quantity and half."""
    import plotly.graph_objects as go

    for half, symbol, offset in (("discovery", "circle", -0.14), ("confirmation", "circle-open", 0.14)):
        rows = frame[frame["half"] == half].drop_duplicates("key").set_index("key")
        kept = [
            (name, label, place)
            for place, (name, label) in enumerate(zip(quantities, labels, strict=True))
            if name in rows.index
        ]
        if not kept:
            continue
        values = [float(rows.loc[name, "value"]) for name, _, _ in kept]
        low = [float(rows.loc[name, "low"]) for name, _, _ in kept]
        high = [float(rows.loc[name, "high"]) for name, _, _ in kept]
        colours = [COLOURS.get(name, _style.GREEN if axis else _style.INK) for name, _, _ in kept]
        text = [
            f"<b>{label}</b><br>{half}: {v:.3f} ({a:.3f} to {b:.3f})"
            for (_, label, _), v, a, b in zip(kept, values, low, high, strict=True)
        ]
        fig.add_trace(
            go.Scatter(
                x=values,
                y=[place + offset for _, _, place in kept],
                mode="markers",
                marker={"symbol": symbol, "size": 9, "color": colours, "line": {"width": 2, "color": colours}},
                error_x=_style.intervals(values, low, high, colour=_style.INK),
                name=half,
                legendgroup=half,
                showlegend=legend,
                text=text,
                hovertemplate="%{text}<extra></extra>",
                xaxis=f"x{axis}",
                yaxis=f"y{axis}",
            )
        )
