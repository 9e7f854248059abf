"""Does the set do on held-out conflicts what it promised, and do random heads of the same layers not?

The members are edited one after another, in the order fixed on discovery. Above: the release of the first k members,
in logits, with its interval; the grey marks are random sets of the same size, matched by layer, the diamond is as many
top heads for what is seen, and the dotted curve the heads of largest single release together (how spread is the
effect?). Below: how often the model then says the sound's and the picture's answer, among all words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style

_SAYS = (("says_sound", "says the sound", colours.SOUND), ("says_picture", "says the picture", colours.PICTURE))


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
    _random(fig, random)
    if len(ranked):
        _curve(fig, ranked, name="the heads of largest single release", colour=colours.AMBER, dash="dot")
    if len(arm):
        _curve(fig, arm, name="the set, in its order", colour=colours.SOUND, dash="solid")
    _see(fig, frame[frame["arm"] == "see heads"])
    _said(fig, found, arm if len(arm) else ranked, random, start=bool(len(arm)))
    _axes(fig, last=int(max([last, *ranked["k"]])), log=not len(arm))
    return fig


def _axes(fig: Any, *, last: int, log: bool) -> None:
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


def _jitter(n: int, *, width: float = 0.16) -> np.ndarray:
    """Spread marks of one k sideways, always in the same way."""
    return width * (((np.arange(n) * 0.6180339887) % 1.0) * 2 - 1)


def _random(fig: Any, random: Any) -> None:
    if not len(random):
        return
    ks = random["k"].to_numpy(float)
    text = [
        f"random heads {m}<br>k = {k}: {r:+.3f} logits"
        for m, k, r in zip(random["members"], random["k"], random["release"], strict=True)
    ]
    look = {"size": 6, "color": colours.GREY, "opacity": 0.55}
    name = f"random heads of the same layers ({len(ks)} sets)"
    _style.marks(fig, ks + _jitter(len(ks)), random["release"], text, name=name, marker=look)


def _curve(fig: Any, arm: Any, *, name: str, colour: str, dash: str) -> None:
    values, low, high = (arm[column].astype(float).tolist() for column in ("release", "low", "high"))
    text = [
        f"<b>k = {k}</b>: {_shortened(str(m))}<br>{v:+.3f} logits ({a:+.3f} to {b:+.3f})<br>{s:.1%} of G"
        for k, m, v, a, b, s in zip(arm["k"], arm["members"], values, low, high, arm["share"], strict=True)
    ]
    bars = _style.intervals(values, low, high, colour=colour)
    look = {"line": {"color": colour, "width": 2.5, "dash": dash}, "marker": {"size": 9}}
    _style.marks(fig, arm["k"], values, text, mode="lines+markers", name=name, error_y=bars, **look)


def _shortened(members: str, *, most: int = 8) -> str:
    names = members.split()
    return " ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _see(fig: Any, rows: Any) -> None:
    if not len(rows):
        return
    text = [f"{m}: {r:+.3f} logits" for m, r in zip(rows["members"], rows["release"], strict=True)]
    look = {"symbol": "diamond", "size": 11, "color": colours.PICTURE}
    _style.marks(fig, rows["k"], rows["release"], text, name="as many heads for what is seen", marker=look)


def _said(fig: Any, found: Any, arm: Any, random: Any, *, start: bool) -> None:
    """Add the lower panel: what the model says, from no head edited to all of the set."""
    below = {"xaxis": "x2", "yaxis": "y2"}
    chosen = found.sets[found.sets["chosen"]]
    for column, name, colour in _SAYS:
        before = float(chosen[f"{column}_before"].iloc[0]) if len(chosen) else float("nan")
        known = start and np.isfinite(before)
        x, y = ([0, *arm["k"]], [before, *arm[column]]) if known else (arm["k"], arm[column])
        look: dict[str, Any] = {"line": {"color": colour, "width": 2.5}, "marker": {"size": 8}, "legend": "legend2"}
        says = f"{name}: %{{y:.3f}} at k = %{{x}}<extra></extra>"
        fig.add_scatter(x=x, y=y, mode="lines+markers", name=name, hovertemplate=says, **look, **below)
        if len(random):
            x = random["k"].to_numpy(float) + _jitter(len(random))
            look = {"marker": {"size": 5, "color": colour, "opacity": 0.45, "symbol": "circle-open"}}
            says = f"random heads, {name}: %{{y:.3f}}<extra></extra>"
            look |= {"mode": "markers", "showlegend": False, "hovertemplate": says}
            fig.add_scatter(x=x, y=random[column], **look, **below)
