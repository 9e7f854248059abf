"""Maps: heads by layers, attention token by token, and what each position of an input is.

`heads`: nothing is clipped, normalised or sorted. `attention_patterns`: circuitsvis's own notebook view calls a web
server and loads its script from a CDN; the view returned here carries the installed script. `spans`: solid is the time
on the model's clock (what the position ids say), dotted on the source's (when the frames or samples really were).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style
from av_lens.spans import SpanMap, role_runs


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
    found = _planes(grid_or_frame, (value, low, high))
    values = found[0]
    unit = unit or str(getattr(grid_or_frame, "unit", None) or "effect")
    n_layers, n_heads = values.shape
    top = _style.limit(values)
    fig = _style.figure(title=title, height=int(min(900, max(260, 130 + 34 * n_layers))))
    small = n_layers * n_heads <= 144
    text: dict[str, Any] = {"text": _labels(values, top), "texttemplate": "%{text}"} if small else {}
    said = [[_say(layer, head, found[:, layer, head], unit) for head in range(n_heads)] for layer in range(n_layers)]
    hover: dict[str, Any] = {"customdata": said, "hoverongaps": False}
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


def _planes(x: Any, columns: tuple[str, str, str]) -> np.ndarray:
    """Bring what was given to `[3, layer, head]`: the values, and the ends of the intervals that came with them."""
    if hasattr(x, "columns"):
        return _from_frame(x, *columns)
    if hasattr(x, "effects"):
        effects = x.effects
        if not {"layer", "head"} <= set(effects.dims):
            raise InputError(
                f"heads draws layers by heads; this grid has the axes {tuple(map(str, effects.dims))}. "
                "Measure it with over='layer head'."
            )
        x = effects.mean([dim for dim in effects.dims if dim not in ("layer", "head")]).transpose("layer", "head")
    values = np.asarray(x, dtype=float)
    if values.ndim != 2:
        raise InputError(f"heads draws an array [layer, head]; this one has the shape {values.shape}.")
    return np.stack([values, np.full(values.shape, np.nan), np.full(values.shape, np.nan)])


def _from_frame(frame: Any, value: str, low: str, high: str) -> np.ndarray:
    if missing := [name for name in ("layer", "head", value) if name not in frame.columns]:
        needs = f"heads needs the columns layer, head and {value!r}"
        raise InputError(f"{needs}; missing: {missing}. Found: {list(frame.columns)}.")
    rows = frame[frame["head"].notna()]
    for first in rows[rows.duplicated(["layer", "head"])].to_dict("records")[:1]:
        place = f"layer {int(first['layer'])} head {int(first['head'])}"
        raise InputError(f"the frame has more than one row for {place}; choose one site and role first.")
    layer, head = (rows[name].to_numpy(int) for name in ("layer", "head"))
    found = np.full((3, layer.max(initial=0) + 1, head.max(initial=0) + 1), np.nan)
    found[0, layer, head] = rows[value]
    if {low, high} <= set(rows.columns):
        found[1:, layer, head] = rows[[low, high]].T
    return found


def _labels(values: np.ndarray, top: float) -> list[list[str]]:
    """Write a number only where it is at least a tenth of the largest: the map shows the rest."""
    return [
        [f"{v:.2f}".replace("-", "−") if np.isfinite(v) and abs(v) >= 0.1 * top else "" for v in row] for row in values
    ]


def _say(layer: int, head: int, figures: np.ndarray, unit: str) -> str:
    value, low, high = figures
    text = f"<b>{_style.head_label(layer, head)}</b><br>{value:+.3f} {unit}"
    return text + (f"<br>95% interval {low:+.3f} to {high:+.3f}" if np.isfinite([low, high]).all() else "")


def _mark_missing(fig: Any, values: np.ndarray) -> None:
    missing = [(float(head), float(layer)) for layer, head in np.argwhere(~np.isfinite(values))]
    if not missing:
        return
    xs, ys = _style.hatch(missing)
    line = {"color": colours.GREY, "width": 1}
    mark: dict[str, Any] = {"mode": "lines", "line": line, "hoverinfo": "skip", "meta": {"palette": "hatch"}}
    fig.add_scatter(x=xs, y=ys, name="not measured", **mark)
    text = [f"<b>{_style.head_label(y, x)}</b><br>not measured" for x, y in missing]
    x, y = zip(*missing, strict=True)
    _style.marks(fig, x, y, text, marker={"size": 18, "opacity": 0}, showlegend=False)
    fig.update_layout(showlegend=True)


_LESS = "lessThanSignOfAToken"  # circuitsvis writes tokens into a script as they are; "</script>" would end it


@dataclass(frozen=True)
class PatternView:
    """A drawn pattern: shows itself in Jupyter, and `html` (markup and script, self-contained) goes into any page."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def attention_patterns(
    pattern: Any, tokens: Sequence[str], *, names: Sequence[str] | None = None, bound: float | int | None = None
) -> PatternView:
    """Draw the attention patterns of some heads over named tokens.

    Args:
        pattern: attention weights `[head, query pos, key pos]`, an array or a tensor.
        tokens: one name per position; shown as they are.
        names: one name per head, such as "L5 H2".
        bound: the weight drawn in full colour; None takes the largest in the pattern.

    Returns:
        A view that Jupyter draws; `.html` for a page.

    Raises:
        InputError: if the shapes do not fit the tokens or the names.
    """
    from circuitsvis.attention import attention_heads

    weights = np.asarray(pattern.detach().cpu().float() if hasattr(pattern, "detach") else pattern, dtype=np.float32)
    if weights.ndim != 3 or weights.shape[1] != weights.shape[2] or weights.shape[1] != len(tokens):
        raise InputError(
            f"attention_patterns draws [head, pos, pos] over as many tokens; got {weights.shape} "
            f"and {len(tokens)} tokens."
        )
    if names is not None and len(names) != len(weights):
        raise InputError(f"{len(names)} names were given for {len(weights)} heads.")
    view = attention_heads(
        attention=weights.round(4),
        tokens=[f"{token}".replace("<", _LESS) for token in tokens],
        attention_head_names=[name.replace("<", _LESS) for name in names] if names is not None else None,
        min_value=0.0,
        max_value=float(bound if bound is not None else weights.max()),
        negative_color=colours.PICTURE,
        positive_color=colours.SOUND,
    )
    return PatternView(html=str(view.local_src).replace(_LESS, "\\u003c"))


def spans(x: Any, *, title: str | None = None) -> Any:
    """Draw the strip of spans over the positions of an input.

    Args:
        x: a `SpanMap`, or anything with one as `.spans`, such as `AVInputs`.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure`; one bar per run of equal roles, then the two clocks of the media positions.

    Raises:
        InputError: if `x` has no span map.
    """
    found = x if isinstance(x, SpanMap) else getattr(x, "spans", None)
    if not isinstance(found, SpanMap):
        raise InputError(f"spans draws a SpanMap or an input that has one; this is a {type(x).__name__}.")
    roles = found.roles
    timed = bool(np.isfinite(found.start_s).any())
    fig = _style.figure(title=title, height=340 if timed else 170)
    seen: set[str] = set()
    for role, start, stop in role_runs(roles):
        bar: dict[str, Any] = {"x": [stop - start], "base": [start - 0.5], "y": ["role"], "orientation": "h"}
        look = {"color": colours.ROLE_COLOURS[role], "line": {"width": 0}}
        shown: dict[str, Any] = {"name": role, "legendgroup": role, "showlegend": role not in seen}
        says = _say_run(found, role, start, stop) + "<extra></extra>"
        fig.add_bar(**bar, marker=look, hovertemplate=says, yaxis="y", **shown)
        seen.add(role)
    fig.update_layout(barmode="overlay", bargap=0.1)
    fig.update_xaxes(title={"text": "position"}, range=[-0.5, len(roles) - 0.5], showgrid=False)
    fig.update_yaxes(showticklabels=False, ticks="", showgrid=False, domain=[0.72, 1.0] if timed else [0.0, 1.0])
    if timed:
        _add_clocks(fig, found)
    return fig


def _say_run(found: SpanMap, role: str, start: int, stop: int) -> str:
    where = f"position {start}" if stop - start == 1 else f"positions {start} to {stop - 1} ({stop - start})"
    begin, end = found.start_s[start:stop], found.end_s[start:stop]
    seconds = f"<br>{np.nanmin(begin):.2f} s to {np.nanmax(end):.2f} s" if np.isfinite(begin).any() else ""
    return f"<b>{role}</b><br>{where}{seconds}"


def _add_clocks(fig: Any, found: SpanMap) -> None:
    clocks = (
        ("model's clock", found.start_s, found.end_s, "solid", 3.0),
        ("source's clock", found.source_start_s, found.source_end_s, "dot", 1.5),
    )
    for role in ("video", "image", "audio"):
        for clock, starts, ends, dash, width in clocks:
            timed = [i for i in found[role] if np.isfinite([starts[i], ends[i]]).all()]
            xs = [x for i in timed for x in (i, i, None)]
            ys = [y for i in timed for y in (float(starts[i]), float(ends[i]), None)]
            line = {"color": colours.ROLE_COLOURS[role], "width": width, "dash": dash}
            look: dict[str, Any] = {"mode": "lines", "line": line, "name": f"{role}, {clock}", "showlegend": False}
            if timed:
                fig.add_scatter(x=xs, y=ys, yaxis="y2", **look)
    time = _style.panel("time (s)", domain=[0.0, 0.62], anchor="x", rangemode="tozero")
    fig.update_layout(yaxis2=time, xaxis={"anchor": "y2"})
