"""How an input shows itself: a summary for the terminal, a coloured strip for notebooks.

The strip is one inline SVG without scripts or outside files; text and lines take the page's own colour, so it reads in
light and in dark.
"""

from __future__ import annotations

import html
import itertools
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from av_lens.colours import ROLE_COLOURS
from av_lens.spans import ROLES, SpanMap

if TYPE_CHECKING:
    from av_lens.inputs.model_inputs import AVInputs

_WIDTH, _HEIGHT = 760.0, 26.0
_MOST_RUNS = 22


def runs_of(spans: SpanMap) -> list[tuple[str, int, int]]:
    """Cut a map into runs of equal roles: role, start and stop of each, in order."""
    borders = [0, *(i for i in range(1, len(spans)) if spans.roles[i] != spans.roles[i - 1]), len(spans)]
    return [(spans.roles[a], a, b) for a, b in itertools.pairwise(borders) if b > a]


def _interval(spans: SpanMap, start: int, stop: int, prefix: str) -> str:
    starts, ends = getattr(spans, f"{prefix}start_s")[start:stop], getattr(spans, f"{prefix}end_s")[start:stop]
    known = np.isfinite(starts) & np.isfinite(ends)
    return f"{starts[known].min():.2f}-{ends[known].max():.2f} s" if known.any() else ""


def _what(spans: SpanMap, start: int, stop: int) -> str:
    rows = spans.row[start:stop]
    if (rows >= 0).any():
        return f"{int(rows.max()) + 1} x {int(spans.col[start:stop].max()) + 1} patches"
    text = repr("".join(spans.tokens[start : min(stop, start + 24)]))
    if spans.roles[start] == "audio":
        return ""
    return text if len(text) <= 44 else text[:43] + "…"


def summary(x: AVInputs) -> str:
    """Summarise an input on one screen."""
    lines = [repr(x).split(":")[0] + ")"]
    for question, clip in list(zip(x.questions, x.clips, strict=True))[:3]:
        lines.append(f"  question {question!r}  clip {clip!r}" if clip is not None else f"  question {question!r}")
    if len(x) > 3:
        lines.append(f"  ... and {len(x) - 3} more examples")
    shapes = [f"{name} {list(v.shape) if isinstance(v, Tensor) else v}" for name, v in x.tensors.items()]
    lines += [
        "  tensors: " + "; ".join(shapes),
        f"  {'positions':>12}  {'role':<10} {'count':>6}  model clock      source clock",
    ]
    runs = runs_of(x.spans)
    shown = runs if len(runs) <= _MOST_RUNS else [*runs[: _MOST_RUNS - 8], None, *runs[-8:]]
    for run in shown:
        if run is None:
            lines.append(f"  {'...':>12}  {len(runs) - _MOST_RUNS} more runs")
            continue
        role, start, stop = run
        where = f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
        clocks = f"{_interval(x.spans, start, stop, ''):<15}  {_interval(x.spans, start, stop, 'source_'):<15}"
        lines.append(f"  {where:>12}  {role:<10} {stop - start:>6}  {clocks}  {_what(x.spans, start, stop)}".rstrip())
    return "\n".join(lines)


def strip(x: AVInputs) -> str:
    """Draw the positions left to right as a coloured strip: HTML with one inline SVG and a legend."""
    spans = x.spans
    scale = _WIDTH / max(1, len(spans))
    bars: list[str] = []
    for role, start, stop in runs_of(spans):
        seconds = _interval(spans, start, stop, "")
        title = f"{role} {start}-{stop - 1} ({stop - start}) {seconds} {_what(spans, start, stop)}".strip()
        bars.append(
            f'<rect x="{start * scale:.2f}" y="0" width="{max((stop - start) * scale, 0.6):.2f}" height="{_HEIGHT:g}" '
            f'fill="{ROLE_COLOURS[role]}"><title>{html.escape(title)}</title></rect>'
        )
    legend = " ".join(
        f'<span style="white-space:nowrap;margin-right:1em"><span style="display:inline-block;width:.8em;height:.8em;'
        f'background:{ROLE_COLOURS[role]};margin-right:.3em"></span>{role} {spans.roles.count(role)}</span>'
        for role in ROLES
        if role in spans.roles
    )
    heading = html.escape(f"{len(spans)} positions, {x.layout}" + (f", {len(x)} examples" if len(x) > 1 else ""))
    asked = html.escape(" | ".join(dict.fromkeys(x.questions)))
    return (
        '<div style="font-family:sans-serif;font-size:13px;color:inherit;max-width:780px">'
        f'<div style="margin-bottom:4px"><b>{heading}</b> <span style="opacity:.75">{asked}</span></div>'
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" width="100%" height="{_HEIGHT:g}" preserveAspectRatio="none" '
        f'role="img" aria-label="spans">{"".join(bars)}</svg>'
        f'<div style="margin-top:4px">{legend}</div></div>'
    )
