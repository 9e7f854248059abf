"""The one look of every figure: colours by meaning, readable in light and dark, no global template touched.

The ink is a grey that reads on white and on near-black; a page that knows its theme sharpens it (`THEMES`, by the
report's script, in traces and shapes that say so in `meta`). But for a few tags of ours, what looks like markup in
labels is shown, not obeyed.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from av_lens.colours import CLEAR, DIVERGING, GRID, INK

_TAG = re.compile(r"<(?!/?(?:b|i|br|sub|sup|extra)>)")
ZERO = {"zeroline": True, "zerolinecolor": INK, "zerolinewidth": 1}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DONOR_SYMBOLS = {"blank_muted": "circle", "mean_other": "diamond", "zero": "square"}


def limit(values: Any) -> float:
    """Find the symmetric limit of a diverging scale: the largest finite magnitude, 1 where there is none."""
    sizes = np.abs(np.asarray(values, dtype=float))
    return float(sizes[np.isfinite(sizes)].max(initial=0.0)) or 1.0


def figure(*, title: str | None = None, height: int = 360) -> Any:
    """Make an empty figure in the house look; plotly's global template is neither read nor changed."""
    import plotly.graph_objects as go

    axis = panel() | {"linecolor": GRID, "ticks": "outside", "tickcolor": GRID, "ticklen": 4}
    axis["title"] = {"standoff": 10, "font": {"size": 13}}
    layout = go.Layout(
        template=go.layout.Template(),
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        margin={"l": 64, "r": 24, "t": 48 if title else 16, "b": 52},
        height=height,
        xaxis=axis,
        yaxis=axis,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": CLEAR},
        hoverlabel={"font": {"family": FONT, "size": 13}},
    )
    named = {"title": {"text": title, "x": 0, "xref": "paper", "font": {"size": 15}}} if title else {}
    return _figure_class()(layout=layout.update(named))


@cache
def _figure_class() -> Any:
    import plotly.graph_objects as go

    class Figure(go.Figure):
        """A figure whose texts show as they are: whatever is drawn or written passes through `to_dict`."""

        def to_dict(self) -> Any:
            return shown_plainly(super().to_dict())

        def __reduce__(self) -> Any:  # a copy that travels is plotly's own, its texts escaped
            return go.Figure, super().__reduce__()[1]

    return Figure


def shown_plainly(value: Any) -> Any:
    """Escape every tag but those that figures set text with: plotly makes links, and more, of what a label says."""
    if isinstance(value, str):
        return _TAG.sub("&lt;", value)
    if isinstance(value, Mapping):
        return {name: shown_plainly(part) for name, part in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype.kind in "OU"):
        return [shown_plainly(part) for part in value]
    return value


def layer_axis(n_layers: int) -> dict[str, Any]:
    """Give the axis over layers that heat maps and lens curves share: a tick at every layer that fits."""
    return {"title": {"text": "layer"}, "tickmode": "linear", "tick0": 0, "dtick": max(1, -(-n_layers // 16))}


def head_label(layer: Any, head: Any) -> str:
    """Name a head, or the layer's MLP (head -1), the way all figures and tables do."""
    return f"L{int(layer)} H{int(head)}" if head >= 0 else f"MLP {int(layer)}"


def hatch(cells: Sequence[tuple[float, float]]) -> tuple[list[float | None], list[float | None]]:
    """Draw diagonal strokes over unit cells, for a line trace that marks what was not measured."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for x, y in cells:
        for offset in (-0.5, 0.0, 0.5):
            low, high = max(-0.5, -0.5 + offset), min(0.5, 0.5 + offset)
            xs += [x + low, x + high, None]
            ys += [y + low - offset, y + high - offset, None]
    return xs, ys


def marks(fig: Any, x: Any, y: Any, said: Any, *, mode: str = "markers", **look: Any) -> None:
    """Add a trace of marks that say something under the pointer; whatever else a plotly scatter takes is its look."""
    fig.add_scatter(x=x, y=y, mode=mode, text=said, hovertemplate="%{text}<extra></extra>", **look)


def rows(labels: Sequence[str]) -> dict[str, Any]:
    """Name the rows of a figure, the first on top: keywords for a vertical axis."""
    ticks = {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": labels, "ticks": ""}
    return ticks | {"range": [len(labels) - 0.5, -0.5], "showgrid": False}


def apart(n: int, width: float) -> np.ndarray:
    """Spread n marks of one row evenly, `width` to either side."""
    return np.linspace(-width, width, n) if n > 1 else np.zeros(1)


def panel(title: str = "", **more: Any) -> dict[str, Any]:
    """Give an axis of a figure with several panels."""
    named = {"title": {"text": title, "font": {"size": 13}}} if title else {}
    return {"gridcolor": GRID, "zeroline": False, "automargin": True} | named | more


def heat(top: float, unit: str, *, signed: bool = True, **words: Any) -> dict[str, Any]:
    """Give a heat map its scale, which is symmetric about 0 where numbers have both signs, and its colour bar."""
    bar = {"title": {"text": unit, "side": "right", **words}, "thickness": 12, "outlinewidth": 0, "nticks": 5}
    colours = DIVERGING if signed else DIVERGING[3:]
    spread = [[index / (len(colours) - 1), colour] for index, colour in enumerate(colours)]
    scale = {"zmin": -top if signed else 0.0, "zmax": top, "colorscale": spread, "colorbar": bar}
    return scale | ({"meta": {"palette": "diverging"}} if signed else {})


def intervals(values: Sequence[float], low: Sequence[float], high: Sequence[float], *, colour: str) -> dict[str, Any]:
    """Give the error bars of a trace from the ends of its intervals."""
    ends = {"array": np.subtract(high, values).tolist(), "arrayminus": np.subtract(values, low).tolist()}
    return {"type": "data", **ends, "color": colour, "thickness": 1.5, "width": 0}


def band(fig: Any, at: Any, low: Any, high: Any, colour: str, group: str, **place: int) -> None:
    """Draw an interval along a curve."""
    edge: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"} | place
    shade = f"rgba({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)}, 0.18)"
    fig.add_scatter(x=at, y=high, legendgroup=group, **edge)
    fig.add_scatter(x=at, y=low, fill="tonexty", fillcolor=shade, legendgroup=group, **edge)
