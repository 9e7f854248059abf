"""A comparison of two checkpoints as one page, in the look of an isolation's: verdict, figure, tables, provenance."""

from pathlib import Path
from typing import Any

from av_lens.plots import changes
from av_lens.reports.blocks import Block, Sheet
from av_lens.reports.drawings import Drawing
from av_lens.reports.page import rendered
from av_lens.reports.sections import MISSING, STAMP_MEANINGS, flat, interval, number, small
from av_lens.results.comparison import Comparison
from av_lens.whole_files import make_folder, write_whole

_CAPTION = (
    "Above: the change B - A of hearing under conflict (C), with nothing to see (G) and of the gap. Below: each node "
    "that is named in either, held out: open in A, filled in B with the interval of the change; dotted: A's threshold. "
    "Blue: the model hears more for the change; vermilion: less; grey: no change is shown."
)
_CHANGES = (("n", True), ("in A", True), ("in B", True), ("B - A", True), ("95% interval", True))
_PAIRED = "Conflicts that are competent in both, paired: each change is B - A of the same conflict."
_NODES = (
    "Held-out conflicts, at A's donor and site. A node is gone where the change holds (Holm over the nodes named in "
    "either, below .05) and leads from above A's threshold to within it, new the other way round."
)


def write_comparison(found: Comparison, path: str | Path, *, title: str | None = None) -> Path:
    """Write a comparison as one self-contained page."""
    path, model = Path(path), f"{found.a} and {found.b}"
    drawn = {"changes": Drawing("changes", "What changed from A to B", _CAPTION, changes(found))}
    context: dict[str, Any] = {
        "title": title or f"What changed between {model}?",
        "model": model,
        "what": "comparison",
        "when": str(found.provenance.get("created", "")).replace("T", " "),
        "stamps": [{"name": stamp, "meaning": STAMP_MEANINGS.get(stamp, "")} for stamp in found.stamps],
        "kind": found.verdict_kind,
        "verdict": found.verdict,
        "reasons": list(found.reasons),
        "blocks": _blocks(found),
        "provenance": flat(found.provenance),
    }
    make_folder(path.parent)
    write_whole(path, rendered("comparison.html.j2", drawn, context))
    return path


def _blocks(found: Any) -> list[Block]:
    words = {"behaviour": ("quantity", "half"), "captions": ("figure", "arm")}
    titles = {"behaviour": "What the models do", "captions": "What their captions name"}
    made = [
        Block(name, name.capitalize(), titles[name], (_PAIRED,),
              (Sheet(titles[name], (*((word, False) for word in of), *_CHANGES), _rows(getattr(found, name), of)),))
        for name, of in words.items()
    ]  # fmt: skip
    of = ("name", "role_a", "role_b", "outcome", "estimand", "donor", "site")
    named = (("node", False), ("role in A", False), ("role in B", False), *((name, False) for name in of[3:]))
    p = tuple((small(row["p"]), small(row["p_holm"])) for row in found.nodes.to_dict("records"))
    rows = tuple(row + more for row, more in zip(_rows(found.nodes, of), p, strict=True))
    sheet = Sheet("Nodes named in either", (*named, *_CHANGES, ("p", True), ("p, Holm", True)), rows)
    made.insert(1, Block("nodes", "Nodes", "Are they the same nodes?", (_NODES,), (sheet,)))
    return [block for block in made if block.sheets[0].rows]


def _rows(frame: Any, words: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (*(str(row[name]) or MISSING for name in words), str(row["n"]),
         *(number(float(row[name]), sign=name == "change") for name in ("a", "b", "change")),
         interval(float(row["low"]), float(row["high"]), sign=True))
        for row in frame.to_dict("records")
    )  # fmt: skip
