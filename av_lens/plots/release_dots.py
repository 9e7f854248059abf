"""Which heads keep the sound from being said: every head's release, three donors side by side, largest first.

Release is the rise of hearing under conflict (C) when the head's output is replaced by what it would have been had it
neither seen nor heard (`blank_muted`), had something else been asked (`mean_other`), or by nothing (`zero`). It is
drawn as a share of G, hearing with nothing to see; positive gives hearing back. A head counts only beyond the dotted
line, the share that was fixed beforehand. Heads are ranked by their largest release on discovery; where the
confirmation half was measured, its figures are drawn.
"""

from __future__ import annotations

from typing import Any

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style


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
