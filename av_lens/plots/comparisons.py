"""Two checkpoints on one manifest: what changed, and in which nodes.

A is open, B filled, the change's interval drawn at B, the dotted line A's threshold. A node whose change holds is blue
where the model hears more for it and vermilion where it hears less. What was not measured has no mark.
"""

from typing import Any

from av_lens import colours
from av_lens.plots import _style

SHADES = {"gone": colours.SOUND, "weaker": colours.SOUND, "new": colours.PICTURE, "stronger": colours.PICTURE}


def changes(found: Any, *, title: str | None = None) -> Any:
    """Draw a comparison: changes of behaviour, and every node in both models.

    Args:
        found: a `Comparison`.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure`; the first trace holds the changes of behaviour, the next two the nodes' effects
        in A and in B.
    """
    shown, nodes = found.behaviour[found.behaviour["half"] == "both"], found.nodes
    names = [f"{row.name}  {row.role_a or row.role_b}" for row in nodes.itertuples(index=False)]
    height = 170 + 34 * (len(shown) + len(nodes))
    fig = _style.figure(title=title, height=height)
    split = 1.0 if not len(nodes) else 1 - (len(shown) / (len(shown) + len(nodes))) * (1 - 80 / height)
    quantities = [f"{name}: B - A" for name in shown["quantity"]]
    values, low, high = (shown[column].astype(float).tolist() for column in ("change", "low", "high"))
    text = [
        f"{name} {v:+.3f} ({a:+.3f} to {b:+.3f})" for name, v, a, b in zip(quantities, values, low, high, strict=True)
    ]
    look = {"size": 9, "color": colours.INK}
    bars = _style.intervals(values, low, high, colour=colours.INK)
    _style.marks(fig, values, list(range(len(shown))), text, name="change", marker=look, error_x=bars, showlegend=False)
    top = {"domain": [split if len(nodes) else 0, 1], "zeroline": False, "automargin": True}
    fig.update_layout(
        yaxis=_style.rows(quantities) | top, xaxis=_style.panel("change in logits", anchor="y", **_style.ZERO)
    )
    if len(nodes):
        _nodes(fig, nodes, names, found, height=height, split=split)
    return fig


def _nodes(fig: Any, nodes: Any, names: list[str], found: Any, *, height: int, split: float) -> None:
    shades = [SHADES.get(outcome, colours.GREY) for outcome in nodes["outcome"]]
    for letter, name, symbol in (("a", found.a, "circle-open"), ("b", found.b, "circle")):
        values = nodes[letter].astype(float).tolist()
        text = [f"<b>{row.name}</b><br>{letter.upper()}: {v:+.3f} logits<br>{row.outcome}"
                for row, v in zip(nodes.itertuples(index=False), values, strict=True)]  # fmt: skip
        look = {"symbol": symbol, "size": 9, "color": shades, "line": {"width": 2, "color": shades}}
        more: dict[str, Any] = {"xaxis": "x2", "yaxis": "y2", "name": f"{letter.upper()}: {name}"}
        if letter == "b":
            low, high = ((nodes[end] + nodes["a"]).astype(float).tolist() for end in ("low", "high"))
            more["error_x"] = _style.intervals(values, low, high, colour=colours.INK)
        _style.marks(fig, values, list(range(len(nodes))), text, marker=look, **more)
    place = {"domain": [0, max(0.0, split - 80 / height)], "anchor": "x2", "zeroline": False, "automargin": True}
    axis = _style.panel("effect in logits, held out", anchor="y2", **_style.ZERO)
    fig.update_layout(yaxis2=_style.rows(names) | place, xaxis2=axis)
    line = {"color": colours.INK, "width": 1, "dash": "dot"}
    ends = {"y0": 0, "y1": 1, "yref": "y2 domain", "xref": "x2", "name": "ink"}
    fig.add_shape(type="line", x0=float(nodes["delta"].iloc[0]), x1=float(nodes["delta"].iloc[0]), line=line, **ends)
