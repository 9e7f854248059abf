"""One number per head, as a map of layers by heads: where in the model does it happen?

Blue raises the sound's answer, vermilion the picture's; zero is the neutral middle, whatever the range. A head that was
not measured is hatched and says so when pointed at. Values are drawn as given: means over conflicts, in the unit that
the colour bar names. Nothing is clipped, normalised or sorted.

```python
import numpy as np
from av_lens import plots
fig = plots.heads(np.array([[0.0, 1.5], [np.nan, -0.5]]), unit="logits")
```
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style

Bounds = dict[tuple[int, int], tuple[float, float]]


def heads(
    grid_or_frame: Any,
    *,
    value: str = "effect",
    unit: str | None = None,
    title: str | None = None,
    named: Collection[tuple[int, int]] = (),
    low: str = "low",
    high: str = "high",
) -> Any:
    """Draw one number per head as a heat map, layers down and heads across.

    Args:
        grid_or_frame: a `Grid` over layer and head (its mean effect is drawn), a pandas frame with columns `layer`,
            `head` and `value`, or an array `[layer, head]`; NaN where not measured.
        value: the frame's column to draw.
        unit: what the numbers are in; None takes the grid's own, else "effect".
        title: the figure's title.
        named: heads to outline, as (layer, head).
        low: the frame's column with the lower bound, shown on hover where it exists.
        high: the frame's column with the upper bound.

    Returns:
        A `plotly.graph_objects.Figure` whose first trace, a heat map, holds the numbers.

    Raises:
        InputError: if there is no axis of layers and heads to draw, or a frame has two rows for one head.
    """
    values, bounds = _matrix(grid_or_frame, value=value, low=low, high=high)
    unit = unit or str(getattr(grid_or_frame, "unit", None) or "effect")
    n_layers, n_heads = values.shape
    top = _style.limit(values)
    fig = _style.figure(title=title, height=int(min(900, max(260, 130 + 34 * n_layers))))
    small = n_layers * n_heads <= 144
    text: dict[str, Any] = {"text": _labels(values, top), "texttemplate": "%{text}"} if small else {}
    hover: dict[str, Any] = {"customdata": _hover(values, bounds, unit), "hoverongaps": False}
    hover["hovertemplate"] = "%{customdata}<extra></extra>"
    look = _style.heat(top, unit, font={"size": 13})
    axes = {"x": list(range(n_heads)), "y": list(range(n_layers)), "xgap": 1.5, "ygap": 1.5}
    fig.add_heatmap(z=values, **axes, **look, **text, **hover)
    _mark_missing(fig, values)
    for layer, head in sorted(named):
        box = {"x0": head - 0.48, "x1": head + 0.48, "y0": layer - 0.48, "y1": layer + 0.48}
        fig.add_shape(type="rect", line={"color": colours.INK, "width": 2.5}, name="ink", **box)
    ticks = {"tickmode": "linear", "dtick": max(1, n_heads // 16), "range": [-0.5, n_heads - 0.5]}
    fig.update_xaxes(title={"text": "head"}, showgrid=False, **ticks)
    fig.update_yaxes(**_style.layer_axis(n_layers), showgrid=False, range=[n_layers - 0.5, -0.5])
    return fig


def _matrix(x: Any, *, value: str, low: str, high: str) -> tuple[np.ndarray, Bounds]:
    """Bring what was given to `[layer, head]` and the intervals that came with it."""
    if hasattr(x, "effects"):
        effects = x.effects
        if not {"layer", "head"} <= set(effects.dims):
            raise InputError(
                f"heads draws layers by heads; this grid has the axes {tuple(map(str, effects.dims))}. "
                "Measure it with over='layer head'."
            )
        mean = effects.mean([dim for dim in effects.dims if dim not in ("layer", "head")])
        return np.asarray(mean.transpose("layer", "head").values, dtype=float), {}
    if hasattr(x, "columns"):
        return _from_frame(x, value=value, low=low, high=high)
    values = np.asarray(x, dtype=float)
    if values.ndim != 2:
        raise InputError(f"heads draws an array [layer, head]; this one has the shape {values.shape}.")
    return values, {}


def _from_frame(frame: Any, *, value: str, low: str, high: str) -> tuple[np.ndarray, Bounds]:
    if missing := [name for name in ("layer", "head", value) if name not in frame.columns]:
        needs = f"heads needs the columns layer, head and {value!r}"
        raise InputError(f"{needs}; missing: {missing}. Found: {list(frame.columns)}.")
    rows = frame[frame["head"].notna()]
    for first in rows[rows.duplicated(["layer", "head"])].to_dict("records")[:1]:
        place = f"layer {int(first['layer'])} head {int(first['head'])}"
        raise InputError(f"the frame has more than one row for {place}; choose one site and role first.")
    shape = (int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1) if len(rows) else (1, 1)
    values = np.full(shape, np.nan)
    bounds: Bounds = {}
    for row in rows.to_dict("records"):
        key = (int(row["layer"]), int(row["head"]))
        values[key] = float(row[value])
        if low in row and high in row:
            bounds[key] = (float(row[low]), float(row[high]))
    return values, bounds


def _labels(values: np.ndarray, top: float) -> list[list[str]]:
    """Write a number only where it is at least a tenth of the largest: the map shows the rest."""
    return [
        [f"{v:.2f}".replace("-", "−") if np.isfinite(v) and abs(v) >= 0.1 * top else "" for v in row] for row in values
    ]


def _hover(values: np.ndarray, bounds: Bounds, unit: str) -> list[list[str]]:
    def say(layer: int, head: int) -> str:
        text = f"<b>{_style.head_label(layer, head)}</b><br>{values[layer, head]:+.3f} {unit}"
        low, high = bounds.get((layer, head), (np.nan, np.nan))
        return text + (f"<br>95% interval {low:+.3f} to {high:+.3f}" if np.isfinite([low, high]).all() else "")

    return [[say(layer, head) for head in range(values.shape[1])] for layer in range(values.shape[0])]


def _mark_missing(fig: Any, values: np.ndarray) -> None:
    """Hatch what was not measured, and name it in the legend and on hover."""
    missing = [(float(head), float(layer)) for layer, head in np.argwhere(~np.isfinite(values))]
    if not missing:
        return
    xs, ys = _style.hatch(missing)
    line = {"color": colours.GREY, "width": 1}
    mark: dict[str, Any] = {"mode": "lines", "line": line, "hoverinfo": "skip", "meta": {"palette": "hatch"}}
    fig.add_scatter(x=xs, y=ys, name="not measured", **mark)
    text = [f"<b>{_style.head_label(int(y), int(x))}</b><br>not measured" for x, y in missing]
    x, y = zip(*missing, strict=True)
    _style.marks(fig, x, y, text, marker={"size": 18, "opacity": 0}, showlegend=False)
    fig.update_layout(showlegend=True)
