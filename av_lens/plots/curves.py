"""Curves with their intervals: over layers, of what is known where, and of a set on held-out conflicts.

Bands are 95% intervals over clusters of examples (absent below five). `layers`: heads are averaged; an axis of more
than twelve labels is drawn as a map. `knowledge`: dotted is the null. `confirmation`: members are edited in the order
fixed on discovery; grey marks are random sets, the diamond as many top heads for what is seen, the dotted curve the
heads of largest single release together.
"""

from dataclasses import replace
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
    chosen, kept = _reduced(grid)
    by_line, by_panel = _axes(chosen, lines, panels)
    unit = unit or str(grid.unit or "effect")
    labels = [None] if by_panel is None else chosen.values.coords[by_panel].values.tolist()
    names = [", ".join([*kept, *([] if label is None else [f"{by_panel} {label}"])]) for label in labels]
    titles = names if any(names) else None
    fig = _panels(title, 360, rows=1, cols=len(labels), subplot_titles=titles)
    for column, label in enumerate(labels, 1):
        part = chosen if by_panel is None else chosen.sel(**{by_panel: label})
        if by_line is not None and part.values.sizes[by_line] > MOST_CURVES:
            _map(fig, part, by_line, of, unit, column)
        else:
            _curves(fig, part, by_line, of, unit, column)
    return fig


def _panels(title: str | None, height: int, **panels: Any) -> Any:
    from plotly.subplots import make_subplots

    base = _style.figure(title=title, height=height)
    look = {k: v for k, v in base.layout.xaxis.to_plotly_json().items() if k not in ("anchor", "domain")}
    fig = make_subplots(shared_yaxes=True, figure=base, **panels)
    fig.update_xaxes(**look)
    fig.update_yaxes(**look)
    fig.update_annotations(font={"size": 13})
    if fig.layout.annotations:
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
    values = values.mean("head") if "head" in values.dims else values
    single = [str(dim) for dim in values.dims[1:] if values.sizes[dim] == 1 and dim != "layer"]
    kept = [f"{dim} {values.coords[dim].values[0]}" for dim in single]
    return replace(grid, values=values.squeeze(single, drop=True)), kept


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
    named = {"title": {"text": unit}} if column == 1 else {}
    fig.update_yaxes(**_style.ZERO, rangemode="tozero", **named, **here)


def _map(fig: Any, grid: Any, by_line: str, of: str, unit: str, column: int) -> None:
    here: dict[str, Any] = {"row": 1, "col": column}
    mean = grid.mean(of).transpose("layer", by_line)
    labels = [str(label) for label in mean.coords[by_line].values.tolist()]
    says = f"layer %{{y}}, {by_line} %{{x}}<br>%{{z:.3g}} {unit}<extra></extra>"
    look = _style.heat(_style.limit(mean), unit, signed=bool((mean < 0).any()))
    look |= {"showscale": column == 1, "hovertemplate": says}
    fig.add_heatmap(z=mean.values, x=labels, y=mean.coords["layer"].values.tolist(), **look, **here)
    fig.update_xaxes(title={"text": by_line}, showgrid=False, type="category", nticks=16, **here)
    fig.update_yaxes(**_style.layer_axis(len(mean)), showgrid=False, autorange="reversed", **here)


_ROWS = (("lens", "va", "word in the lens"), ("probe", "va, av", "class told by a probe"))
_WORDS = (("sound", colours.SOUND), ("picture", colours.PICTURE))


def knowledge(found: Any, *, title: str | None = None) -> Any:
    """Draw what the lens and the probes read, layer by layer.

    Args:
        found: an `Isolation`.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure`; the lens above, probes below, a column for each span.

    Raises:
        InputError: the isolation did not ask what is known (nothing was measured).
    """
    frame = drawn(found)
    if not len(frame):
        raise InputError("this isolation holds no lens and no probes, so there is nothing to draw.")
    spans = list(dict.fromkeys(frame["span"]))
    spaced: dict[str, Any] = {"shared_xaxes": True, "vertical_spacing": 0.1, "horizontal_spacing": 0.02}
    fig = _panels(title, 520, rows=2, cols=len(spans), column_titles=spans, **spaced)
    fig.update_yaxes(range=[-0.04, 1.04], tickformat=".0%")
    for row, (method, cell, label) in enumerate(_ROWS, 1):
        here = frame[(frame["method"] == method) & (frame["cell"] == cell)]
        fig.update_yaxes(title_text=label, row=row, col=1)
        for column, span in enumerate(spans, 1):
            for word, colour in _WORDS:
                part = here[(here["span"] == span) & (here["word"] == word)].sort_values("layer")
                if len(part):
                    _curve(fig, part, word, colour, row=row, col=column)
    fig.update_xaxes(title_text="layers passed", row=2)
    return fig


def drawn(found: Any) -> Any:
    """Choose the rows that `knowledge` draws."""
    frame = found.knowledge
    return frame[frame["method"].isin([method for method, *_ in _ROWS]) & (frame["layer"] >= 0)]


def _curve(fig: Any, part: Any, word: str, colour: str, *, row: int, col: int) -> None:
    at = part["layer"]
    columns = (part[name] for name in ("value", "low", "high", "null"))
    said = [
        f"<b>{word}</b>, {layers} layers passed<br>{value:.2f} ({low:.2f} to {high:.2f})<br>null {null:.2f}"
        for layers, value, low, high, null in zip(at, *columns, strict=True)
    ]
    here: dict[str, Any] = {"row": row, "col": col}
    _style.band(fig, at, part["low"], part["high"], colour, word, **here)
    here |= {"legendgroup": word, "showlegend": row == 1 and col == 1}
    dots = {"color": colour, "dash": "dot", "width": 1}
    fig.add_scatter(x=at, y=part["null"], mode="lines", name=f"{word}, null", line=dots, hoverinfo="skip", **here)
    _style.marks(fig, at, part["value"], said, mode="lines+markers", name=word, line={"color": colour}, **here)


def confirmation(found: Any, *, title: str | None = None) -> Any:
    """Draw the cumulative edit of the set against random heads matched by layer.

    Args:
        found: an `Isolation`.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure`; release above, what is said below.

    Raises:
        InputError: if nothing was confirmed, because no set was found.
    """
    frame = found.ablation
    arm = frame[frame["arm"] == "set"].sort_values("k")
    ranked = frame[frame["arm"] == "ranked heads"].sort_values("k")
    if not len(arm) and not len(ranked):
        raise InputError(
            "this isolation edited no set on held-out conflicts: none was found, so there is nothing to draw."
        )
    fig = _style.figure(title=title, height=600)
    random = frame[frame["arm"] == "random"]
    last = int(max([*arm["k"], *random["k"], 1]))
    if len(arm):
        ranked = ranked[ranked["k"] <= max(8, 2 * last)]
    name = f"random heads of the same layers ({len(random)} sets)"
    look: dict[str, Any] = {"size": 6, "color": colours.GREY, "opacity": 0.55}
    text = "random heads {members}<br>k = {k}: {release:+.3f} logits"
    _dots(fig, random, _spread(random), text, name=name, marker=look)
    if len(ranked):
        _arm_curve(fig, ranked, name="the heads of largest single release", colour=colours.AMBER, dash="dot")
    if len(arm):
        _arm_curve(fig, arm, name="the set, in its order", colour=colours.SOUND, dash="solid")
    see, look = (
        frame[frame["arm"].isin(["see heads", "hear heads"])],
        {"symbol": "diamond", "size": 11, "color": colours.PICTURE},
    )
    text, seen = "{members}: {release:+.3f} logits", "heard" if "hear heads" in set(frame["arm"]) else "seen"
    _dots(fig, see, see["k"], text, name=f"as many heads for what is {seen}", marker=look)
    _said(fig, found, arm if len(arm) else ranked, random, start=bool(len(arm)))
    _scale(fig, last=int(max([last, *ranked["k"]])), log=not len(arm))
    return fig


def _scale(fig: Any, *, last: int, log: bool) -> None:
    """Lay the two panels out over one axis of k: logarithmic where only the ranked heads reach far."""
    ticks: dict[str, Any] = {"tickmode": "linear", "tick0": 0, "dtick": max(1, last // 12), "range": [-0.4, last + 0.6]}
    if log:
        powers = [2**i for i in range(int(np.log2(last)) + 1)]
        ticks = {"type": "log", "tickmode": "array", "tickvals": powers, "ticktext": [str(k) for k in powers]}
    fig.update_layout(
        xaxis=_style.panel(anchor="y", matches="x2", showticklabels=False, **ticks),
        yaxis=_style.panel("release (logits)", domain=[0.53, 1.0], rangemode="tozero", **_style.ZERO),
        xaxis2=_style.panel("heads edited together (k)", anchor="y2", **ticks),
        yaxis2=_style.panel("rate", domain=[0.0, 0.4], anchor="x2", range=[-0.04, 1.04]),
        legend2={"orientation": "h", "x": 0, "y": 0.4, "yanchor": "bottom", "bgcolor": colours.CLEAR},
    )


def _spread(random: Any) -> np.ndarray:
    """Set marks of one k sideways, always in the same way."""
    return random["k"].to_numpy(float) + 0.16 * (((np.arange(len(random)) * 0.6180339887) % 1.0) * 2 - 1)


def _dots(fig: Any, rows: Any, x: Any, text: str, **look: Any) -> None:
    if len(rows):
        _style.marks(fig, x, rows["release"], [text.format(**row) for row in rows.to_dict("records")], **look)


def _arm_curve(fig: Any, arm: Any, *, name: str, colour: str, dash: str) -> None:
    values, low, high = (arm[column].astype(float).tolist() for column in ("release", "low", "high"))
    text = [
        f"<b>k = {k}</b>: {_shortened(str(m))}<br>{v:+.3f} logits ({a:+.3f} to {b:+.3f})<br>{s:.1%} of G"
        for k, m, v, a, b, s in zip(arm["k"], arm["members"], values, low, high, arm["share"], strict=True)
    ]
    bars = _style.intervals(values, low, high, colour=colour)
    look = {"line": {"color": colour, "width": 2.5, "dash": dash}, "marker": {"size": 9}}
    _style.marks(fig, arm["k"], values, text, mode="lines+markers", name=name, error_y=bars, **look)


def _shortened(members: str) -> str:
    names = members.split()
    return " ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _said(fig: Any, found: Any, arm: Any, random: Any, *, start: bool) -> None:
    below = {"xaxis": "x2", "yaxis": "y2"}
    chosen = found.sets[found.sets["chosen"]]
    for word, colour in _WORDS:
        column, name = f"says_{word}", f"says the {word}"
        before = float(chosen[f"{column}_before"].iloc[0]) if len(chosen) else float("nan")
        known = start and np.isfinite(before)
        x, y = ([0, *arm["k"]], [before, *arm[column]]) if known else (arm["k"], arm[column])
        look: dict[str, Any] = {"line": {"color": colour, "width": 2.5}, "marker": {"size": 8}, "legend": "legend2"}
        says = f"{name}: %{{y:.3f}} at k = %{{x}}<extra></extra>"
        fig.add_scatter(x=x, y=y, mode="lines+markers", name=name, hovertemplate=says, **look, **below)
        if len(random):
            look = {"marker": {"size": 5, "color": colour, "opacity": 0.45, "symbol": "circle-open"}}
            says = f"random heads, {name}: %{{y:.3f}}<extra></extra>"
            look |= {"mode": "markers", "showlegend": False, "hovertemplate": says}
            fig.add_scatter(x=_spread(random), y=random[column], **look, **below)
