"""What a cut does beside what its controls do: one row for each edge, one dot with its interval for each condition.

A cut that matters stands apart from the dots of its controls. What was not measured (a control that could not be
matched, a role that is not there) has no dot and says so at its row's end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "cross", "x")


def conditions(grid: Any, *, of: str = "effects", unit: str | None = None, title: str | None = None) -> Any:
    """Draw a grid of edges and conditions as dots with intervals.

    Args:
        grid: a `Grid` over `[example, edge, condition]`, such as `knockout` gives; other axes are averaged.
        of: "effects", "values" or "normalized".
        unit: what the numbers are in; None takes the grid's own.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure` with one trace per condition; y is the edge, x the mean.

    Raises:
        InputError: the grid has no conditions.
    """
    if "condition" not in grid.values.dims:
        raise InputError(f"conditions draws the axis condition; this grid has {tuple(map(str, grid.values.dims))}.")
    mean, bounds = grid.mean(of), grid.interval(of=of)
    others = [dim for dim in mean.dims if dim not in ("edge", "condition")]
    mean, bounds = mean.mean(others), bounds.mean(others)
    edges = mean.coords["edge"].values.tolist() if "edge" in mean.dims else [""]
    named = mean.coords["condition"].values.tolist()
    unit = unit or str(grid.unit or "effect")
    fig = _style.figure(title=title, height=130 + 16 * (len(named) + 1) * len(edges))
    spread = _style.apart(len(named), 0.36)
    for number, name in enumerate(named):
        values = np.atleast_1d(mean.sel(condition=name).values)
        ends = bounds.sel(condition=name)
        low, high = (np.atleast_1d(ends.sel(bound=bound).values) for bound in ("low", "high"))
        kept = np.flatnonzero(np.isfinite(values))
        colour = colours.CONDITION_COLOURS.get(str(name), colours.FREE[number % len(colours.FREE)])
        text = [
            f"<b>{edges[i]}</b><br>{name}<br>{values[i]:+.3f} {unit}"
            + (f"<br>95% interval {low[i]:+.3f} to {high[i]:+.3f}" if np.isfinite(low[i]) else "")
            for i in kept
        ]
        look = {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9, "color": colour}
        bars = _style.intervals(*(column[kept].tolist() for column in (values, low, high)), colour=colour)
        _style.marks(fig, values[kept], kept + spread[number], text, name=str(name), marker=look, error_x=bars)
    for row, edge in enumerate(edges):
        part = mean.sel(edge=edge) if "edge" in mean.dims else mean
        absent = [str(name) for name in named if not np.isfinite(float(part.sel(condition=name)))]
        if absent:
            note = {"xref": "paper", "x": 1, "y": row + 0.48, "xanchor": "right", "showarrow": False, "name": "ink"}
            fig.add_annotation(text="not measured: " + ", ".join(absent), font={"size": 11}, **note)
    fig.update_yaxes(_style.rows(edges))
    fig.update_xaxes(title={"text": f"{grid.metric} without the edge, change in {unit}"}, **_style.ZERO)
    return fig
