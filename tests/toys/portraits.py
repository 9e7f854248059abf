"""What a trained model must show, and its portrait as a page.

A line holds where its 95% interval reaches the bound: the interval's upper end for "at least", its lower end for "at
most". Lines hold in each layout by itself. What a seed does not reach is shown as it is.

Documentation shows what `markdown(shares_table())` gives, so that the table cannot drift from the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd

from av_lens.checkpoints import index
from av_lens.checks import require_choice
from av_lens.lab import pages
from av_lens.lab.calibration import FREE_RIDER, TRUTH
from av_lens.organism import anatomy
from av_lens.organism.dissection import CUTS, MOST_HEADS
from av_lens.organism.evaluation import Evaluation
from av_lens.results.statistics import clopper_pearson
from av_lens.whole_files import read_object

AT_LEAST, AT_MOST = ">=", "<="
_ALL_CUT = next(iter(CUTS))


class Line(NamedTuple):
    """A share of answers and its bound: in words, its "cell kind answer", at least or at most what.

    `table` is that of the evaluation, `where` what further columns must hold.
    """

    says: str
    place: str
    sign: str
    bound: float
    table: str = "counts"
    where: Mapping[str, Any] = MappingProxyType({})


_AUDIO_ONLY = Line("heard, audio alone", "audio_only hear right", AT_LEAST, 0.95)
_SEEN_ALONE = Line("seen, video alone", "video_only see right", AT_LEAST, 0.95)
_SEEN = Line("seen, factual", "factual see right", AT_LEAST, 0.95)
_HEARD = Line("heard, factual", "factual hear right", AT_LEAST, 0.95)
_CONFLICT_HEARD = Line("heard, conflict", "conflict hear right", AT_LEAST, 0.95)
_CONFLICT_SEEN = Line("seen, conflict", "conflict see right", AT_LEAST, 0.95)
_DOMINATED = Line("conflict heard: the picture", "conflict hear picture", AT_LEAST, 0.75)
_CHOSEN = Line("best heads silenced, conflict heard: the sound", "conflict hear sound", AT_LEAST, 0.6, "ablation")
_RANDOM = Line("random heads silenced, conflict heard: the sound", "conflict hear sound", AT_MOST, 0.2, "ablation")
_KEPT = [
    line._replace(says=f"best heads silenced, {line.says}", bound=0.9, table="kept")
    for line in (_AUDIO_ONLY, _SEEN_ALONE, _HEARD, _SEEN)
]

LINES: Mapping[str, tuple[Line, ...]] = {
    "av-tiny": (
        *(_AUDIO_ONLY, _SEEN_ALONE, _SEEN, _HEARD, _CONFLICT_SEEN),
        Line("conflict heard: the sound", "conflict hear sound", AT_MOST, 0.15),
        _DOMINATED,
        Line("video cut off, heard: the sound", "conflict hear sound", AT_LEAST, 0.9, "cuts", {"cut": _ALL_CUT}),
        Line("video cut off, seen: the sound", "conflict see sound", AT_MOST, 0.1, "cuts", {"cut": _ALL_CUT}),
        _CHOSEN._replace(where={"arm": "chosen", "count": MOST_HEADS}),
        _RANDOM._replace(where={"arm": "random"}),
        *_KEPT,
    ),
    "av-tiny-diffuse": (_AUDIO_ONLY, _DOMINATED),
    "av-tiny-base": (_SEEN_ALONE, _SEEN, Line("heard, audio alone", "audio_only hear right", AT_MOST, 0.2)),
    "av-tiny-balanced": (_AUDIO_ONLY, _SEEN_ALONE, _HEARD, _SEEN, _CONFLICT_HEARD, _CONFLICT_SEEN),
    "av-tiny-planted": (_AUDIO_ONLY, _SEEN_ALONE, _HEARD, _SEEN, _CONFLICT_SEEN, _DOMINATED),
}

PROBE_BOUND = 0.75
"""In some middle layer of av-tiny the sound is read from the stream at least so often, and less often at the end."""
DIFFUSE_BOUND = 0.10
"""In av-tiny-diffuse no single head's effect is this large a share of the gap."""


def standing(result: Evaluation, name: str, *, planted: tuple[tuple[int, int], ...] = ()) -> pd.DataFrame:
    """Hold an evaluation against what its model has to show, a row for each line and layout."""
    require_choice("model", name, LINES)
    rows = [row for line in LINES[name] for row in _rows(line, getattr(result, line.table))]
    if name == "av-tiny" and len(result.probes):
        rows += _probed(result.probes)
    if name == "av-tiny-diffuse" and len(result.heads):
        best = max(map(float, result.heads["share"]))
        rows.append(_row("best single head's share of the gap", "both", best, best, best, AT_MOST, DIFFUSE_BOUND, 0))
    if planted and len(result.heads):
        ranked = list(zip(result.heads["layer"], result.heads["head"], strict=True))[: len(planted)]
        share = len(set(ranked) & set(planted)) / len(planted)
        rows.append(_row("planted heads ranked first", "both", share, share, share, AT_LEAST, 1.0, len(planted)))
    return pd.DataFrame(rows)


def _row(
    says: str, layout: str, share: float, low: float, high: float, sign: str, bound: float, n: int
) -> dict[str, Any]:
    """One line's standing in one layout."""
    holds = bool(high >= bound if sign == AT_LEAST else low <= bound)
    values = (says, layout, share, low, high, sign, bound, n, holds)
    return dict(zip(["line", "layout", "share", "low", "high", "sign", "bound", "n", "holds"], values, strict=True))


def _rows(line: Line, table: Any) -> list[dict[str, Any]]:
    """A line's standing in each layout; equal rows (random sets) are added up."""
    if not len(table):
        return []
    cell, kind, answer = line.place.split()
    for column, value in {"cell": cell, "kind": kind, **line.where}.items():
        table = table[table[column] == value]
    found = table.groupby("layout", sort=False)[[answer, "n"]].sum().astype(int).to_dict("split")
    return [
        _row(line.says, layout, count / n, *clopper_pearson(count, n), line.sign, line.bound, n)
        for layout, (count, n) in zip(found["index"], found["data"], strict=True)
    ]


def _probed(probes: pd.DataFrame) -> list[dict[str, Any]]:
    """Is the sound there in the middle, and less so at the end?"""
    rows: list[dict[str, Any]] = []
    sound = [row for row in probes.to_dict("records") if row["target"] == "sound"]
    for layout in dict.fromkeys(row["layout"] for row in sound):
        by_layer = sorted((row for row in sound if row["layout"] == layout), key=lambda row: row["layer"])
        peak, last = max(by_layer[1:-1], key=lambda row: row["accuracy"]), by_layer[-1]
        says = f"sound read from the stream after layer {peak['layer'] - 1}"
        for row, words, sign, bound in (
            (peak, says, AT_LEAST, PROBE_BOUND),
            (last, "... and at the end", AT_MOST, peak["accuracy"]),
        ):
            interval = clopper_pearson(round(row["accuracy"] * row["n"]), row["n"])
            rows.append(_row(words, layout, row["accuracy"], *interval, sign, bound, row["n"]))
    return rows


COLUMNS: dict[str, tuple[str, str, str]] = {
    "heard, audio alone": ("audio_only", "hear", "right"),
    "seen, video alone": ("video_only", "see", "right"),
    "heard": ("factual", "hear", "right"),
    "seen": ("factual", "see", "right"),
    "conflict heard: sound": ("conflict", "hear", "sound"),
    "conflict heard: picture": ("conflict", "hear", "picture"),
    "conflict seen": ("conflict", "see", "picture"),
    "conflict colour": ("conflict", "colour", "colour"),
    "heard, blank picture": ("blank_picture", "hear", "sound"),
}
MEASURED = ("adds", "alone", "direct_share", "reads_picture", "reads_sound")
WORDS = {">=": "at least", "<=": "at most"}


def shipped_evaluations() -> dict[str, Evaluation]:
    """Read the evaluations of the listed models that have one, by short name."""
    paths = {name: anatomy.shipped() / entry["folder"] / "evaluation.json" for name, entry in index().items()}
    return {name: Evaluation.load(path) for name, path in paths.items() if path.exists()}


def standing_table() -> pd.DataFrame:
    """Say for every model and training seed which of its written lines hold, and what those that do not came to."""
    found = {(name, 0): result for name, result in shipped_evaluations().items()}
    for path in anatomy.shipped().glob("*/evaluation-seed*.json"):
        found[path.parent.name, int(path.stem.removeprefix("evaluation-seed"))] = Evaluation.load(path)
    rows: list[dict[str, object]] = []
    for (name, seed), result in sorted(found.items()):
        truth = anatomy.shipped() / name / TRUTH
        planted = read_object(truth)["heads"] if truth.exists() else []
        lines = standing(result, name, planted=tuple((head["layer"], head["head"]) for head in planted))
        short = [
            f"{row['line']} ({row['layout']}) {row['share']:.3f} [{row['low']:.3f}, {row['high']:.3f}], wanted "
            f"{WORDS[row['sign']]} {row['bound']:.2f}"
            for row in lines.to_dict("records")
            if not row["holds"]
        ]
        counts = {"lines": len(lines), "hold": len(lines) - len(short), "does not hold": "; ".join(short) or "-"}
        rows.append({"model": name, "seed": seed, **counts})
    return pd.DataFrame(rows)


def shares_table(evaluations: dict[str, Evaluation] | None = None) -> pd.DataFrame:
    """Put the main shares of every model (those that ship by default) into one table.

    One row for each model and layout, a column for each of `COLUMNS`; cells of one layout stand in both rows.
    """
    rows: list[dict[str, object]] = []
    for name, result in (shipped_evaluations() if evaluations is None else evaluations).items():
        counted = {(row["cell"], row["layout"], row["kind"]): row for row in result.counts.to_dict("records")}
        for layout in ("in_video", "separate"):
            row: dict[str, object] = {"model": name, "layout": layout}
            for column, (cell, kind, answer) in COLUMNS.items():
                at = next(key for key in ((cell, layout, kind), (cell, cell.split("_")[0], kind)) if key in counted)
                row[column] = counted[at][answer] / counted[at]["n"]
            rows.append(row)
    return pd.DataFrame(rows)


def planted_table() -> pd.DataFrame:
    """Say of every planted model that ships what its heads were measured to be; NaN where there is no figure."""
    rows: list[dict[str, Any]] = []
    for path in sorted(anatomy.shipped().glob(f"*/{TRUTH}")):
        found, name = read_object(path), path.parent.name
        for head in found["heads"]:
            figures = {key: float(head[key]) for key in MEASURED}
            if head["kind"] == FREE_RIDER:  # shares of next to nothing say nothing
                figures["direct_share"] = math.nan
            row = {"model": name, "head": _place(head), "kind": head["kind"]}
            rows.append(row | {key.replace("_", " "): value for key, value in figures.items()})
        rows += [{"model": name, "head": _place(decoy), "kind": "decoy"} for decoy in found.get("decoys", [])]
    return pd.DataFrame(rows)


def _place(head: dict[str, Any]) -> str:
    return f"L{head['layer']}H{head['head']}"


def markdown(table: pd.DataFrame) -> str:
    """Write a table as markdown: shares with three decimals, a dash for NaN."""
    rows = [[_cell(value) for value in row.values()] for row in table.to_dict("records")]
    return pages.markdown(([str(column) for column in table.columns], rows), left=range(len(table.columns)))


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"
