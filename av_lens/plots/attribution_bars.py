"""Which parts of the model write the answer: direct shares of the logit difference, largest magnitude first.

Blue writes for the sound's answer, vermilion for the picture's. Shares add up: what is not shown is one bar of its own,
so that the bars' sum is the logit difference (for a grid) or the sum over all heads (for an isolation).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style


def attribution(
    x: Any, *, top: int = 20, half: str = "discovery", site: str = "", unit: str = "logits", title: str | None = None
) -> Any:
    """Draw direct attribution as ranked bars.

    Args:
        x: a `Grid` of `direct_attribution`, an `Isolation`, or a pandas frame with columns `name` (or `layer` and
            `head`), `value` and, where known, `low` and `high`.
        top: how many bars before the rest is summed.
        half: of an isolation, which half.
        site: of an isolation, the site set; empty takes the first that was measured.
        unit: what the numbers are in.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure`; the first trace's x are the shares, its y their names.

    Raises:
        InputError: if there is nothing to draw.
    """
    names, values, low, high = _bars(x, half=half, site=site)
    if not names:
        raise InputError("there is no direct attribution here to draw.")
    order = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")
    shown, rest = order[:top], order[top:]
    labels = [names[i] for i in shown]
    numbers, lows, highs = (column[shown].tolist() for column in (values, low, high))
    if len(rest):
        labels.append(f"all {len(rest)} others")
        for column, one in ((numbers, np.nansum(values[rest])), (lows, np.nan), (highs, np.nan)):
            column.append(float(one))
    fig = _style.figure(title=title, height=110 + 24 * len(labels))
    shades = [colours.SOUND if v >= 0 else colours.PICTURE for v in numbers]
    bars = _style.intervals(numbers, lows, highs, colour=colours.INK)
    says = "%{y}: %{x:+.3f} " + unit + "<extra></extra>"
    look: dict[str, Any] = {"orientation": "h", "marker": {"color": shades}, "showlegend": False}
    fig.add_bar(x=numbers, y=labels, error_x=bars, hovertemplate=says, **look)
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="", type="category")
    axis = f"direct share of the logit difference ({unit}); towards the sound +"
    fig.update_xaxes(title={"text": axis}, **_style.ZERO)
    return fig


def _bars(x: Any, *, half: str, site: str) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    if hasattr(x, "evidence"):
        frame = x.evidence
        frame = frame[(frame["estimand"] == "dla") & (frame["half"] == half)]
        if len(frame):
            frame = frame[frame["site"] == (site or frame["site"].iloc[0])]
        frame = frame.rename(columns={"mean": "value"})
    elif hasattr(x, "effects"):
        return _grid_bars(x.effects)
    else:
        frame = x
    if "value" not in frame.columns:
        raise InputError(f"attribution needs the column 'value'; found {list(frame.columns)}.")
    rows = frame.to_dict("records")
    names = [str(row["name"]) if "name" in row else _name({k: row[k] for k in ("layer", "head")}) for row in rows]
    value, low, high = (np.array([float(row.get(name, np.nan)) for row in rows]) for name in ("value", "low", "high"))
    return names, value, low, high


def _grid_bars(effects: Any) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Name every cell of a grid by its coordinates and take its mean over examples."""
    mean = effects.mean("example") if "example" in effects.dims else effects
    places = np.argwhere(np.isfinite(mean.values))
    names = [
        _name({str(d): mean[d].values[i] if d in mean.coords else i for d, i in zip(mean.dims, place, strict=True)})
        for place in places
    ]
    blank = np.full(len(places), np.nan)
    return names, mean.values[np.isfinite(mean.values)].astype(float), blank, blank


def _name(where: dict[str, Any]) -> str:
    parts = dict(where)
    if "layer" in parts and "head" in parts:
        text = _style.head_label(int(parts.pop("layer")), int(parts.pop("head")))
        return " ".join([text, *(str(value) for value in parts.values())])
    return " ".join(f"L{value}" if key == "layer" else str(value) for key, value in parts.items())
