"""Numbers with their intervals, one row or bar each: shares, answers, cuts beside controls, releases.

Lines are 95% intervals; positive is towards the sound. `attribution`'s last bar is what is not shown, so that the bars'
sum is the logit difference (of a grid) or the sum over all heads (of an isolation). Of `behaviour` filled marks are
discovery, open ones confirmation. What was not measured has no mark. `release`: a head counts only beyond the dotted
line, the share of G that was fixed beforehand.
"""

from typing import Any

import numpy as np
import pandas as pd

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
    frame = _bars(x, half=half, site=site)
    if not len(frame):
        raise InputError("there is no direct attribution here to draw.")
    frame = frame.iloc[np.argsort(-np.abs(np.nan_to_num(frame["value"])), kind="stable")]
    if rest := len(frame[top:]):
        others = {"name": f"all {rest} others", "value": np.nansum(frame["value"].to_numpy()[top:])}
        frame = pd.concat([frame[:top], pd.DataFrame([others])])
    fig = _style.figure(title=title, height=110 + 24 * len(frame))
    numbers, low, high = (frame[column].tolist() for column in ("value", "low", "high"))
    bars = _style.intervals(numbers, low, high, colour=colours.INK)
    says = "%{y}: %{x:+.3f} " + unit + "<extra></extra>"
    shades = [colours.SOUND if v >= 0 else colours.PICTURE for v in numbers]
    look: dict[str, Any] = {"orientation": "h", "marker": {"color": shades}, "showlegend": False}
    fig.add_bar(x=numbers, y=frame["name"].tolist(), error_x=bars, hovertemplate=says, **look)
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="", type="category")
    axis = f"direct share of the logit difference ({unit}); towards the sound +"
    fig.update_xaxes(title={"text": axis}, **_style.ZERO)
    return fig


def _bars(x: Any, *, half: str, site: str) -> pd.DataFrame:
    """Bring what was given to the columns `name value low high`; a grid's cells are named by their coordinates."""
    frame: Any = x
    if hasattr(x, "effects"):
        mean = x.effects.mean("example") if "example" in x.effects.dims else x.effects
        finite = np.isfinite(mean.values)
        at = [zip(mean.dims, place, strict=True) for place in np.argwhere(finite)]
        names = [_name({str(d): mean[d].values[i] if d in mean.coords else i for d, i in place}) for place in at]
        frame = pd.DataFrame({"name": names, "value": mean.values[finite]})
    elif hasattr(x, "evidence"):
        frame = x.evidence[(x.evidence["estimand"] == "dla") & (x.evidence["half"] == half)]
        site = site or next(iter(frame["site"]), "")
        frame = frame[frame["site"] == site].rename(columns={"mean": "value"})
    if "value" not in frame.columns:
        raise InputError(f"attribution needs the column 'value'; found {list(frame.columns)}.")
    if "name" not in frame.columns:
        heads = zip(frame["layer"], frame["head"], strict=True)
        frame = frame.assign(name=[_style.head_label(layer, head) for layer, head in heads])
    numbers = frame.reindex(columns=["value", "low", "high"]).astype(float)
    return numbers.assign(name=frame["name"].astype(str))


def _name(parts: dict[str, Any]) -> str:
    if "layer" in parts and "head" in parts:
        text = _style.head_label(parts.pop("layer"), parts.pop("head"))
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
    frame = frame.assign(key=frame["quantity"].where(frame["quantity"] != "accuracy", frame["cell"]))
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
    for half, symbol, offset in (("discovery", "circle", -0.14), ("confirmation", "circle-open", 0.14)):
        rows = frame[frame["half"] == half].drop_duplicates("key").set_index("key")
        kept = [place for place, name in enumerate(quantities) if name in rows.index]
        if not kept:
            continue
        chosen = rows.loc[[quantities[place] for place in kept]]
        values, low, high = (chosen[column].astype(float).tolist() for column in ("value", "low", "high"))
        shades = [COLOURS.get(name, colours.GREEN if axis else colours.INK) for name in chosen.index]
        text = [
            f"<b>{labels[place]}</b><br>{half}: {v:.3f} ({a:.3f} to {b:.3f})"
            for place, v, a, b in zip(kept, values, low, high, strict=True)
        ]
        look = {"symbol": symbol, "size": 9, "color": shades, "line": {"width": 2, "color": shades}}
        bars = _style.intervals(values, low, high, colour=colours.INK)
        shown: dict[str, Any] = {"name": half, "legendgroup": half, "showlegend": legend}
        shown |= {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
        _style.marks(fig, values, [place + offset for place in kept], text, marker=look, error_x=bars, **shown)


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
    if "edge" not in mean.dims:
        mean, bounds = mean.expand_dims(edge=[""]), bounds.expand_dims(edge=[""])
    edges = mean.coords["edge"].values.tolist()
    named = mean.coords["condition"].values.tolist()
    unit = unit or str(grid.unit or "effect")
    fig = _style.figure(title=title, height=130 + 16 * (len(named) + 1) * len(edges))
    spread = _style.apart(len(named), 0.36)
    for number, name in enumerate(named):
        values = mean.sel(condition=name).values
        low, high = (bounds.sel(condition=name, bound=bound).values for bound in ("low", "high"))
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
        absent = [str(name) for name in named if not np.isfinite(float(mean.sel(edge=edge, condition=name)))]
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
    every = found.evidence
    frame = every[(every["estimand"] == "release") & (every["site"] == site)]
    ranking = frame[frame["half"] == "discovery"] if (frame["half"] == "discovery").any() else frame
    if not len(frame):
        raise InputError(f"this isolation holds no release at the site {site!r}; sites: {sorted(set(every['site']))}.")
    best = ranking.groupby(["layer", "head"])["share"].max().sort_values(ascending=False, kind="stable")
    shown = [(int(layer), int(head)) for layer, head in best.index[:top]]
    held = frame[frame["half"] == "confirmation"]
    measured = shown and set(shown) <= set(zip(held["layer"], held["head"], strict=True))
    half = half or ("confirmation" if measured else "discovery")
    firsts = found.nodes[found.nodes["site"] == site].drop_duplicates(["layer", "head"]).to_dict("records")
    roles = {(row["layer"], row["head"]): row["role"] + (" ✓" if row["confirmed"] else "") for row in firsts}
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
    if (least := found.protocol.get("s")) is not None:
        note = {"annotation": {"text": f"δ = {float(least):.0%} of G", "font": {"size": 11}, "yshift": 2}}
        line = {"color": colours.INK, "width": 1, "dash": "dot"}
        fig.add_vline(x=float(least), line=line, name="ink", annotation_position="top", **note)
    return fig
