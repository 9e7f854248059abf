"""A number at every layer: curves with their intervals, one for each label of an axis, in panels for another.

Attention by role, words under the lens, cuts in windows of layers. Bands are 95% intervals over clusters of examples
(absent below five clusters). Roles keep the colours that they have in every figure. Heads are averaged. An axis of more
than twelve labels (positions, windows of time) is drawn as a map of layers by labels instead.

```python
fig = plots.layers(attention_flow(model, conflicts, queries=("question", "generation")))
```
"""

from __future__ import annotations

from typing import Any

import numpy as np

from av_lens import colours
from av_lens.errors import InputError, unknown
from av_lens.plots import _style

MOST_CURVES = 12
LINES = ("key", "word", "figure", "condition", "span", "component")
MEANINGS = {
    **colours.ROLE_COLOURS,
    **colours.CONDITION_COLOURS,
    "sound": colours.SOUND,
    "picture": colours.PICTURE,
    "others": colours.GREY,
    "excess": colours.GREEN,
    "said": colours.PURPLE,
    "sinks": colours.AMBER,
}


def layers(
    grid: Any,
    *,
    of: str = "effects",
    lines: str | None = None,
    panels: str | None = None,
    unit: str | None = None,
    title: str | None = None,
) -> Any:
    """Draw a grid over layers.

    Args:
        grid: a `Grid` with the axis layer and at most two others of more than one label (heads not counted).
        of: "effects", "values" or "normalized".
        lines: the axis that gives the curves; None takes roles, words or conditions where there are some.
        panels: the axis that gives the panels; None takes the other one.
        unit: what the numbers are in; None takes the grid's own.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure`; curves by name, in each panel, or one heat map in each.

    Raises:
        InputError: no layers, an unknown axis, or more axes than can be drawn.
    """
    from plotly.subplots import make_subplots

    chosen, kept = _reduced(grid)
    by_line, by_panel = _axes(chosen, lines, panels)
    unit = unit or str(grid.unit or "effect")
    labels = [None] if by_panel is None else chosen.values.coords[by_panel].values.tolist()
    names = [", ".join([*kept, *([] if label is None else [f"{by_panel} {label}"])]) for label in labels]
    base = _style.figure(title=title, height=360)
    look = _style.copied(base)
    titles = names if any(names) else None
    fig = make_subplots(rows=1, cols=len(labels), shared_yaxes=True, subplot_titles=titles, figure=base)
    fig.update_xaxes(**look)
    fig.update_yaxes(**look)
    fig.update_annotations(font={"size": 13})
    for column, label in enumerate(labels, 1):
        part = chosen if by_panel is None else chosen.sel(**{by_panel: label})
        if by_line is not None and part.values.sizes[by_line] > MOST_CURVES:
            _map(fig, part, by_line, of, unit, column)
        else:
            _curves(fig, part, by_line, of, unit, column)
    if any(names):
        fig.update_layout(margin={"t": 96 if title else 70}, legend={"y": 1.1})
    return fig


def _reduced(grid: Any) -> tuple[Any, list[str]]:
    """Average heads, and take out axes of one label; say which."""
    values = grid.values
    if "layer" not in values.dims:
        raise InputError(
            f"layers draws grids over layers; this one has the axes {tuple(map(str, values.dims))}. Measure it with "
            "over='layer', or by='layer'."
        )
    if "head" in values.dims:
        values = values.mean("head")
    single = [str(dim) for dim in values.dims[1:] if values.sizes[dim] == 1 and dim != "layer"]
    kept = [f"{dim} {values.coords[dim].values[0]}" for dim in single]
    fields = {name: getattr(grid, name) for name in ("baseline", "donor", "clusters", "metric", "unit", "shares")}
    return type(grid)(values.squeeze(single, drop=True), **fields), kept


def _axes(grid: Any, lines: str | None, panels: str | None) -> tuple[str | None, str | None]:
    free = [str(dim) for dim in grid.values.dims[1:] if dim != "layer"]
    for name in (lines, panels):
        if name is not None and name not in free:
            raise InputError(unknown("axis", name, free))
    if len(free) > 2:
        raise InputError(f"layers draws at most two axes beside layer; this grid has {free}. Choose: grid.sel(...).")
    by_line = lines or next((name for name in LINES if name in free and name != panels), None)
    by_line = by_line or next((name for name in free if name != panels), None)
    return by_line, panels or next((name for name in free if name != by_line), None)


def _curves(fig: Any, grid: Any, by_line: str | None, of: str, unit: str, column: int) -> None:
    here: dict[str, Any] = {"row": 1, "col": column}
    mean, bounds = grid.mean(of), grid.interval(of=of)
    at = mean.coords["layer"].values.tolist()
    labels = [None] if by_line is None else mean.coords[by_line].values.tolist()
    for number, label in enumerate(labels):
        part, ends = (mean, bounds) if label is None else (mean.sel({by_line: label}), bounds.sel({by_line: label}))
        name = grid.metric if label is None else str(label)
        colour = MEANINGS.get(name, colours.FREE[number % len(colours.FREE)])
        values, low, high = part.values, ends.sel(bound="low").values, ends.sel(bound="high").values
        if np.isnan(values).all():
            continue
        if not np.isnan(low).all():
            _style.band(fig, at, low, high, colour, name, **here)
        say = [
            f"<b>{name}</b>, layer {layer}<br>{v:.3g} {unit}" + (f" ({a:.3g} to {b:.3g})" if np.isfinite(a) else "")
            for layer, v, a, b in zip(at, values, low, high, strict=True)
        ]
        shown = {"name": name, "legendgroup": name, "showlegend": column == 1 and label is not None}
        look = {"line": {"color": colour, "width": 2}, "marker": {"color": colour, "size": 6}}
        _style.marks(fig, at, values, say, mode="lines+markers", **shown, **look, **here)
    fig.update_xaxes(**_style.layer_axis(int(max(at)) + 1), **here)
    fig.update_yaxes(**_style.ZERO, rangemode="tozero", **here)
    if column == 1:
        fig.update_yaxes(title={"text": unit}, row=1, col=1)


def _map(fig: Any, grid: Any, by_line: str, of: str, unit: str, column: int) -> None:
    here: dict[str, Any] = {"row": 1, "col": column}
    mean = grid.mean(of).transpose("layer", by_line)
    labels = [str(label) for label in mean.coords[by_line].values.tolist()]
    top = _style.limit(grid.mean(of).values)
    signed = bool((grid.mean(of).values < 0).any())
    says = f"layer %{{y}}, {by_line} %{{x}}<br>%{{z:.3g}} {unit}<extra></extra>"
    look = _style.heat(top, unit, signed=signed) | {"showscale": column == 1, "hovertemplate": says}
    fig.add_heatmap(z=mean.values, x=labels, y=mean.coords["layer"].values.tolist(), **look, **here)
    fig.update_xaxes(title={"text": by_line}, showgrid=False, type="category", nticks=16, **here)
    fig.update_yaxes(**_style.layer_axis(len(mean)), showgrid=False, autorange="reversed", **here)
