"""Draw the rooms of av_lens from its imports: `python .ci/rooms.py` writes docs/architecture.svg.

A box is a folder of av_lens (the files beside the folders are one box, the ground), with the first sentence of its
docstring. An arrow says that files of the upper room import files of the lower; arrows that follow from others are left
out. A room stands as low as its imports allow.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PICTURE = ROOT / "av_lens", ROOT / "docs" / "architecture.svg"
GROUND = "the ground"
WIDTH, HEIGHT, ACROSS, GAP, LETTERS = 262, 62, 22, 30, 40
STYLE = """
    .box { fill: #ffffff; stroke: #7a8288; } .name { fill: #14181b; font-weight: 600; font-size: 14px; }
    .says { fill: #4a5257; font-size: 11px; } .arrow { stroke: #7a8288; fill: none; } .tip { fill: #7a8288; }
    text { font-family: system-ui, sans-serif; }
    @media (prefers-color-scheme: dark) { .box { fill: #1d2226; stroke: #8b949b; } .name { fill: #eef1f3; }
      .says { fill: #b9c1c7; } .arrow { stroke: #8b949b; } .tip { fill: #8b949b; } }
"""


def room_of(module: list[str]) -> str | None:
    """The room that a dotted name below av_lens leads to; None for the package itself."""
    if (PACKAGE / module[0]).is_dir():
        return module[0]
    return GROUND if (PACKAGE / f"{module[0]}.py").is_file() else None


def imports() -> dict[str, set[str]]:
    """Every room and the rooms that its files import."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        own = room_of(list(path.relative_to(PACKAGE).with_suffix("").parts))
        if own is None or path == PACKAGE / "__init__.py":
            continue
        found.setdefault(own, set())
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "av_lens":
                below = (node.module or "").split(".")[1:]
                names = [below] if below else [[alias.name] for alias in node.names]
                found[own] |= {room for name in names if (room := room_of(name)) and room != own}
    return found


def direct(rooms: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """The imports that do not follow from others."""

    @cache
    def reached(room: str) -> frozenset[str]:
        return frozenset(rooms[room]).union(*(reached(below) for below in rooms[room]))

    return {
        room: sorted(below for below in needs if not any(below in reached(other) for other in needs - {below}))
        for room, needs in rooms.items()
    }


def levels(rooms: Mapping[str, set[str]]) -> list[list[str]]:
    """The rooms from the top down, each as low as its imports allow."""

    @cache
    def height(room: str) -> int:
        return 1 + max((height(below) for below in rooms[room]), default=-1)

    top = max(map(height, rooms))
    return [[room for room in sorted(rooms) if height(room) == level] for level in range(top, -1, -1)]


def said(room: str) -> str:
    """The first sentence about a room."""
    if room == GROUND:
        names = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
        return ", ".join(names)
    doc = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8"))) or ""
    return doc.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")


def picture() -> str:
    """The drawing, as an svg."""
    rooms = imports()
    rows = levels(rooms)
    most = max(map(len, rows))
    total = most * WIDTH + (most - 1) * ACROSS + 2 * ACROSS
    place: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        left = (total - len(row) * WIDTH - (len(row) - 1) * ACROSS) / 2
        for number, room in enumerate(row):
            place[room] = left + number * (WIDTH + ACROSS), GAP / 2 + level * (HEIGHT + GAP)
    arrows: list[str] = []
    boxes: list[str] = []
    for room, needs in sorted(direct(rooms).items()):
        x, y = place[room]
        for number, below in enumerate(needs):
            start = x + WIDTH * (number + 1) / (len(needs) + 1)
            end, down = place[below][0] + WIDTH / 2, place[below][1]
            middle = (y + HEIGHT + down) / 2
            curve = (
                f"M{start:.0f},{y + HEIGHT:.0f} C{start:.0f},{middle:.0f} {end:.0f},{middle:.0f} {end:.0f},{down:.0f}"
            )
            arrows.append(f'<path class="arrow" marker-end="url(#tip)" d="{curve}"/>')
        lines = wrap(said(room), LETTERS, max_lines=2, placeholder=" …")
        says = "".join(
            f'<text class="says" x="{x + 10:.0f}" y="{y + 36 + 14 * number:.0f}">{escape(line)}</text>'
            for number, line in enumerate(lines)
        )
        boxes.append(
            f'<rect class="box" x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
            f'<text class="name" x="{x + 10:.0f}" y="{y + 19:.0f}">{room}</text>{says}'
        )
    size = f'viewBox="0 0 {total} {len(rows) * (HEIGHT + GAP)}" width="{total}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}><title>The rooms of av_lens</title>'
    tip = '<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    tip = f'<defs>{tip}<path class="tip" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    return "\n".join([head, f"<style>{STYLE}</style>", tip, *arrows, *boxes, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
