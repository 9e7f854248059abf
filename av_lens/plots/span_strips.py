"""What each position of an input is: a strip of its spans, and under it the second that each media position covers.

The upper strip colours every position by its leaf role, left to right as the model reads them. The lower panel draws,
for positions that stand for media, the time they cover: solid on the model's clock (what the position ids say), dotted
on the source's clock (when the frames or samples behind the token really were). The two differ where a layout shifts
time; nothing else is derived here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style
from av_lens.spans import SpanMap


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
    roles = [str(role) for role in found.roles]
    timed = bool(np.isfinite(found.start_s).any())
    fig = _style.figure(title=title, height=340 if timed else 170)
    seen: set[str] = set()
    for role, start, stop in runs_of(roles):
        bar: dict[str, Any] = {"x": [stop - start], "base": [start - 0.5], "y": ["role"], "orientation": "h"}
        look = {"color": colours.ROLE_COLOURS.get(role, colours.GREY), "line": {"width": 0}}
        shown: dict[str, Any] = {"name": role, "legendgroup": role, "showlegend": role not in seen}
        says = _say_run(found, role, start, stop) + "<extra></extra>"
        fig.add_bar(**bar, marker=look, hovertemplate=says, yaxis="y", **shown)
        seen.add(role)
    fig.update_layout(barmode="overlay", bargap=0.1)
    fig.update_xaxes(title={"text": "position"}, range=[-0.5, len(roles) - 0.5], showgrid=False)
    fig.update_yaxes(showticklabels=False, ticks="", showgrid=False, domain=[0.72, 1.0] if timed else [0.0, 1.0])
    if timed:
        _add_clocks(fig, found, roles)
    return fig


def runs_of(roles: list[str]) -> list[tuple[str, int, int]]:
    """Cut a list of roles into its runs."""
    cuts = [0, *(i for i in range(1, len(roles)) if roles[i] != roles[i - 1]), len(roles)]
    return [(roles[a], a, b) for a, b in pairwise(cuts) if b > a]


def _say_run(found: SpanMap, role: str, start: int, stop: int) -> str:
    where = f"position {start}" if stop - start == 1 else f"positions {start} to {stop - 1} ({stop - start})"
    begin, end = np.asarray(found.start_s[start:stop]), np.asarray(found.end_s[start:stop])
    if not np.isfinite(begin).any():
        return f"<b>{role}</b><br>{where}"
    return f"<b>{role}</b><br>{where}<br>{np.nanmin(begin):.2f} s to {np.nanmax(end):.2f} s"


def _add_clocks(fig: Any, found: SpanMap, roles: list[str]) -> None:
    """Add the lower panel: each media position's interval on the model's and on the source's clock."""
    clocks = (
        ("model's clock", found.start_s, found.end_s, "solid", 3.0),
        ("source's clock", found.source_start_s, found.source_end_s, "dot", 1.5),
    )
    for role in ("video", "image", "audio"):
        where = [i for i, name in enumerate(roles) if name == role]
        for clock, starts, ends, dash, width in clocks:
            timed = [i for i in where if np.isfinite([starts[i], ends[i]]).all()]
            xs = [x for i in timed for x in (i, i, None)]
            ys = [y for i in timed for y in (float(starts[i]), float(ends[i]), None)]
            if timed:
                line = {"color": colours.ROLE_COLOURS[role], "width": width, "dash": dash}
                name = f"{role}, {clock}"
                fig.add_scatter(x=xs, y=ys, mode="lines", line=line, name=name, yaxis="y2", showlegend=False)
    time = _style.panel("time (s)", domain=[0.0, 0.62], anchor="x", rangemode="tozero")
    fig.update_layout(yaxis2=time, xaxis={"anchor": "y2"})
