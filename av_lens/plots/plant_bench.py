"""Which methods find what was planted? One row a method, one mark with its interval for each group of models."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style

Bounded = tuple[float, float, float]
ABSENT: Bounded = (math.nan, math.nan, math.nan)
ROW, LEFT, RIGHT, TOP, WIDTH = 26, 210, 20, 46, 780


def plant_bench_svg(
    rows: Mapping[str, Mapping[str, Bounded]], *, label: str, low: float | int = 0.0, high: float | int = 1.0
) -> str:
    """Draw rows of marks with intervals."""
    if not rows:
        raise InputError("plant_bench_svg needs at least one method to draw.")
    groups = list(dict.fromkeys(group for found in rows.values() for group in found))
    shades = _colours(groups)
    height = TOP + ROW * len(rows) + 44
    scale = (WIDTH - LEFT - RIGHT) / (high - low)

    def x(value: float) -> float:
        return LEFT + (min(max(value, low), high) - low) * scale

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="{escape(_style.FONT)}" font-size="12" fill="{colours.INK}">'
    ]
    bottom = TOP + ROW * len(rows)
    for step in range(11):
        value = low + (high - low) * step / 10
        at = f"{x(value):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}" stroke="{colours.GRID}"/>')
        if step % 2 == 0:
            parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{value:.1f}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 34}" text-anchor="middle">{escape(label)}</text>'
    )
    place = float(LEFT)
    for group in groups:
        parts.append(f'<circle cx="{place:.1f}" cy="18" r="4" fill="{shades[group]}"/>')
        parts.append(f'<text x="{place + 8:.1f}" y="22">{escape(group)}</text>')
        place += 24 + 6.6 * len(group)
    for row, (method, found) in enumerate(rows.items()):
        middle = TOP + ROW * (row + 0.5)
        weight = ' font-weight="bold"' if row == 0 else ""
        parts.append(f'<text x="{LEFT - 10}" y="{middle + 4:.1f}" text-anchor="end"{weight}>{escape(method)}</text>')
        for number, group in enumerate(groups):
            y = middle + (number - (len(groups) - 1) / 2) * (ROW - 8) / max(1, len(groups) - 1)
            parts += _mark(found.get(group, ABSENT), x, y, shades[group], f"{method}, {group}")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _colours(groups: Sequence[str]) -> dict[str, str]:
    """A role's own colour where a group is named by one; the others take what is left, ink first."""
    own = {group: colours.HEAD_COLOURS[group] for group in groups if group in colours.HEAD_COLOURS}
    free = itertools.cycle([colours.INK, *(colour for colour in colours.FREE if colour not in own.values())])
    return {group: own.get(group) or next(free) for group in groups}


def _mark(found: Bounded, x: Callable[[float], float], y: float, colour: str, words: str) -> list[str]:
    """A mark, its interval, and words for whoever rests on it."""
    value, low, high = found
    if math.isnan(value):
        return []
    title = f"<title>{escape(words)}: {value:.3f}</title>"
    mark = f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="3" fill="{colour}">{title}</circle>'
    if math.isnan(low):
        return [mark]
    ends = f'x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
    return [f'<line {ends} stroke="{colour}" stroke-width="1.2" stroke-opacity="0.6"/>', mark]
