"""A circuit as a graph: which nodes, in which layers, how strong, and which of them act through one another.

Members are discs whose area grows with their score's size, the rest small grey points; blue raises m, vermilion lowers
it. Members joined by a solid line need each other, by a dotted one stand in for each other; lines whose interval holds
0 are left out.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style

RAISES, LOWERS, NO_ROLE, MLP = "raises m", "lowers m", "no role", "MLP"
SMALLEST, LARGEST = 10.0, 34.0
FEWEST = 0.02


def circuit(
    found: Any, *, roles: Mapping[Any, str] | Any = None, least: float | int = FEWEST, title: str | None = None
) -> Any:
    """Draw a circuit by layer, and by head or role.

    Args:
        found: a `Circuit`.
        roles: the role of each head, by (layer, head) or by name such as "L3H5"; or an `Isolation`, whose first role
            of a head counts. None colours by sign.
        least: the smallest interaction that is drawn, as a share of m(whole) - m(empty).
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure`.

    Raises:
        InputError: a role of a node that the circuit does not know.
    """
    nodes = found.nodes
    named = _named(roles, set(nodes["node"]))
    kinds = [_kind(row, named, roles is not None, found.figure("span")[0]) for row in nodes.to_dict("records")]
    lanes, rows = _lanes(nodes, kinds, roles is not None)
    n_layers = int(nodes["layer"].max()) + 1
    fig = _style.figure(title=title, height=150 + 34 * len(lanes))
    members = nodes["member"].to_numpy(dtype=bool)
    x, y = nodes["layer"].to_numpy(dtype=float), np.array(rows, dtype=float)
    if roles is not None:
        x = _spread(x, y, members)
    _draw_links(fig, found, dict(zip(nodes["node"], zip(x, y, strict=True), strict=True)), float(least))
    rest = np.flatnonzero(~members)
    texts = _texts(found)
    small = {"size": 5, "color": colours.GREY, "opacity": 0.5}
    _style.marks(fig, x[rest], y[rest], [texts[i] for i in rest], name="not in the circuit", marker=small)
    scores = nodes["score"].to_numpy(dtype=float)
    shades = {RAISES: colours.SOUND, LOWERS: colours.PICTURE, NO_ROLE: colours.GREY} | colours.HEAD_COLOURS
    for kind in dict.fromkeys(np.array(kinds)[members].tolist()):
        chosen = [i for i in np.flatnonzero(members) if kinds[i] == kind]
        share = np.sqrt(np.abs(scores[chosen]) / _style.limit(scores))
        size = SMALLEST + (LARGEST - SMALLEST) * np.nan_to_num(share)
        look = {"size": size, "color": shades.get(kind, colours.OLIVE), "line": {"width": 1, "color": colours.INK}}
        names = nodes["node"].iloc[chosen].tolist()
        written: dict[str, Any] = {"text": names, "textposition": "middle right", "textfont": {"size": 10}}
        says = {"customdata": [texts[i] for i in chosen], "hovertemplate": "%{customdata}<extra></extra>"}
        fig.add_scatter(x=x[chosen], y=y[chosen], mode="markers+text", name=kind, marker=look, **written, **says)
    fig.update_xaxes(**_style.layer_axis(n_layers), range=[-0.6, n_layers - 0.4])
    fig.update_yaxes(_style.rows(lanes) | {"range": [-0.6, len(lanes) - 0.4], "showgrid": None})
    fig.update_yaxes(title={"text": "role" if named else "head"})
    return fig


def _named(roles: Any, known: set[str]) -> dict[str, str]:
    if roles is None:
        return {}
    listed: Any = roles
    if not isinstance(roles, Mapping):
        listed = {(row["layer"], row["head"]): row["role"] for row in roles.heads[::-1].to_dict("records")}
    found: dict[str, str] = {}
    for place, role in listed.items():
        name = place if isinstance(place, str) else f"L{place[0]}H{place[1]}"
        if name not in known:
            raise InputError(f"a role is given to {name}, which is no node of this circuit: {sorted(known)[:6]}, ...")
        found.setdefault(name, str(role))
    return found


def _kind(row: Mapping[str, Any], roles: dict[str, str], by_role: bool, span: float) -> str:
    if by_role:
        return roles.get(str(row["node"]), MLP if int(row["head"]) < 0 else NO_ROLE)
    return RAISES if float(row["score"]) * span > 0 else LOWERS


def _lanes(nodes: Any, kinds: list[str], by_role: bool) -> tuple[list[str], list[int]]:
    """The rows of the figure from below, and each node's row."""
    if by_role:
        order = [*(role for role in reversed(colours.HEAD_COLOURS) if role in kinds)]
        lanes = [*(kind for kind in dict.fromkeys(kinds) if kind not in order), *order]
        return lanes, [lanes.index(kind) for kind in kinds]
    heads = nodes["head"].tolist()
    lanes = [f"H{head}" for head in range(max(heads) + 1)]
    return lanes + (["MLP"] if min(heads) < 0 else []), [len(lanes) if head < 0 else head for head in heads]


def _spread(x: np.ndarray, y: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Set nodes of one layer and one row beside each other, members first."""
    moved = x.copy()
    for layer, row in set(zip(x, y, strict=True)):
        here = np.flatnonzero((x == layer) & (y == row))
        moved[here[np.argsort(~members[here], kind="stable")]] = layer + _style.apart(len(here), 0.32)
    return moved


def _draw_links(fig: Any, found: Any, at: dict[str, tuple[float, float]], least: float) -> None:
    links = found.links[found.links["interaction"].abs() >= least].to_dict("records")
    rows = [row for row in links if not row["low"] <= 0 <= row["high"]]
    largest = _style.limit([row["interaction"] for row in rows])
    for row in rows:
        x, y = zip(at[row["first"]], at[row["second"]], strict=True)
        words = f"{row['first']} and {row['second']} {row['how']}"
        line = {"width": 1 + 5 * abs(row["interaction"]) / largest, "color": colours.BAND}
        line["dash"] = "solid" if str(row["how"]).startswith("need") else "dot"
        text = f"{words}: {row['interaction']:+.2f}"
        _style.marks(fig, x, y, text, mode="lines", line=line, showlegend=False, name=words)


def _texts(found: Any) -> list[str]:
    needed = {row["node"]: row for row in found.minimality.to_dict("records")}
    texts: list[str] = []
    for row in found.nodes.to_dict("records"):
        bounds = f" ({row['low']:+.3f} to {row['high']:+.3f})" if np.isfinite(row["low"]) else ""
        text = f"<b>{row['node']}</b>, place {row['place']}<br>score {row['score']:+.3f}{bounds} {found.unit}"
        if np.isfinite(row["kept"]):
            text += f"<br>chosen in {row['kept']:.0%} of bootstraps"
        if adds := needed.get(row["node"]):
            text += f"<br>adds {adds['adds']:+.2f} to f without {adds['removed']}"
        texts.append(text)
    return texts
