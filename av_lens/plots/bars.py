"""Numbers with their intervals, one row or bar each: shares, answers, cuts beside controls, releases.

Blue writes for the sound's answer, vermilion for the picture's. Shares add up: what is not shown is one bar of its own,
so that the bars' sum is the logit difference (for a grid) or the sum over all heads (for an isolation).

Above, in logits: E_A and E_V, what the sound and the picture do to the answer; G and C, hearing with nothing to see and
under conflict; the gap between them. Positive is towards the sound. Below: how often the sound's answer is the best, by
cell (picture first, sound second). Filled marks are the discovery half, open ones the confirmation half; lines are 95%
intervals; a figure without a mark was not measured.

A cut that matters stands apart from the dots of its controls. What was not measured (a control that could not be
matched, a role that is not there) has no dot and says so at its row's end.

Release is the rise of hearing under conflict (C) when the head's output is replaced by what it would have been had it
neither seen nor heard (`blank_muted`), had something else been asked (`mean_other`), or by nothing (`zero`). It is
drawn as a share of G, hearing with nothing to see; positive gives hearing back. A head counts only beyond the dotted
line, the share that was fixed beforehand. Heads are ranked by their largest release on discovery; where the
confirmation half was measured, its figures are drawn.
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


def release(
    found: Any, *, top: int = 16, site: str = "suffix", half: str | None = None, title: str | None = None
) -> Any:
    """Draw the ranked heads with the intervals of their release, one mark per donor.

    Args:
        found: an `Isolation`.
        top: how many heads to show.
        site: the site set.
        half: "discovery" or "confirmation"; None takes confirmation where it holds all that is shown.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure` with one trace per donor; y is the head, x the share of G.

    Raises:
        InputError: if the record holds no release at that site.
    """
    frame = found.evidence
    frame = frame[(frame["estimand"] == "release") & (frame["site"] == site)]
    ranking = frame[frame["half"] == "discovery"] if (frame["half"] == "discovery").any() else frame
    if not len(frame):
        raise InputError(
            f"this isolation holds no release at the site {site!r}; sites: {sorted(set(found.evidence['site']))}."
        )
    best = ranking.groupby(["layer", "head"])["share"].max().sort_values(ascending=False, kind="stable")
    shown = [(int(layer), int(head)) for layer, head in best.index[:top]]
    half = half or _half(frame, shown)
    roles = _roles(found, site)
    names = {key: _style.head_label(*key) + (f"  {roles[key]}" if key in roles else "") for key in shown}
    fig = _style.figure(title=title, height=120 + 40 * len(shown))
    donors = [d for d in colours.DONOR_COLOURS if (frame["donor"] == d).any()]
    for donor, offset in zip(donors, _style.apart(len(donors), 0.24), strict=False):
        rows = frame[(frame["donor"] == donor) & (frame["half"] == half)].set_index(["layer", "head"])
        kept = [(place, key) for place, key in enumerate(shown) if key in rows.index]
        values, low, high, logits = (
            [float(rows.loc[key, name]) for _, key in kept] for name in ("share", "share_low", "share_high", "mean")
        )
        text = [
            f"<b>{names[key]}</b><br>{donor}, {half}<br>{v:.1%} of G ({a:.1%} to {b:.1%})<br>{m:+.3f} logits"
            for (_, key), v, a, b, m in zip(kept, values, low, high, logits, strict=True)
        ]
        colour = colours.DONOR_COLOURS[donor]
        look = {"symbol": _style.DONOR_SYMBOLS[donor], "size": 9, "color": colour}
        bars = _style.intervals(values, low, high, colour=colour)
        _style.marks(fig, values, [place + offset for place, _ in kept], text, name=donor, marker=look, error_x=bars)
    fig.update_yaxes(_style.rows([names[key] for key in shown]))
    axis = {"text": f"release, share of G ({half})"}
    fig.update_xaxes(title=axis, tickformat=".0%", rangemode="tozero", **_style.ZERO)
    if found.protocol.get("s") is not None:
        _style.reference_line(fig, x=float(found.protocol["s"]), text=f"δ = {float(found.protocol['s']):.0%} of G")
    return fig


def _half(frame: Any, shown: list[tuple[int, int]]) -> str:
    """Prefer confirmation, if it measured every head that is shown."""
    held = frame[frame["half"] == "confirmation"]
    measured = {(int(layer), int(head)) for layer, head in zip(held["layer"], held["head"], strict=True)}
    return "confirmation" if shown and set(shown) <= measured else "discovery"


def _roles(found: Any, site: str) -> dict[tuple[int, int], str]:
    roles: dict[tuple[int, int], str] = {}
    for row in found.heads[found.heads["site"] == site].to_dict("records"):
        sign = " ✓" if row["confirmed"] else ""
        roles.setdefault((int(row["layer"]), int(row["head"])), f"{row['role']}{sign}")
    return roles
