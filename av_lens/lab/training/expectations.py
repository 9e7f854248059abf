"""What each embedded model has to show, written down before it is trained with more than one seed.

A line holds where its 95% interval reaches the bound: the interval's upper end for "at least", its lower end for "at
most". Lines hold in each layout by itself. What a seed does not reach is shown as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd

from av_lens.errors import InputError, unknown
from av_lens.organism.dissection import CUTS, MOST_HEADS
from av_lens.organism.evaluation import Evaluation
from av_lens.results.statistics import clopper_pearson

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
_CONFLICT_SEEN = Line("seen, conflict", "conflict see right", AT_LEAST, 0.95)
_DOMINATED = Line("conflict heard: the picture", "conflict hear picture", AT_LEAST, 0.75)

LINES: Mapping[str, tuple[Line, ...]] = {
    "av-tiny": (
        _AUDIO_ONLY,
        _SEEN_ALONE,
        _SEEN,
        _HEARD,
        _CONFLICT_SEEN,
        Line("conflict heard: the sound", "conflict hear sound", AT_MOST, 0.15),
        _DOMINATED,
        Line("video cut off, heard: the sound", "conflict hear sound", AT_LEAST, 0.9, "cuts", {"cut": _ALL_CUT}),
        Line("video cut off, seen: the sound", "conflict see sound", AT_MOST, 0.1, "cuts", {"cut": _ALL_CUT}),
        Line("best heads silenced, conflict heard: the sound", "conflict hear sound", AT_LEAST, 0.6, "ablation",
             {"arm": "chosen", "count": MOST_HEADS}),
        Line("random heads silenced, conflict heard: the sound", "conflict hear sound", AT_MOST, 0.2, "ablation",
             {"arm": "random"}),
        Line("best heads silenced, heard, audio alone", "audio_only hear right", AT_LEAST, 0.9, "kept"),
        Line("best heads silenced, seen, video alone", "video_only see right", AT_LEAST, 0.9, "kept"),
        Line("best heads silenced, heard, factual", "factual hear right", AT_LEAST, 0.9, "kept"),
        Line("best heads silenced, seen, factual", "factual see right", AT_LEAST, 0.9, "kept"),
    ),
    "av-tiny-diffuse": (_AUDIO_ONLY, _DOMINATED),
    "av-tiny-base": (
        _SEEN_ALONE,
        _SEEN,
        Line("heard, audio alone", "audio_only hear right", AT_MOST, 0.2),
    ),
    "av-tiny-balanced": (
        _AUDIO_ONLY,
        _SEEN_ALONE,
        _HEARD,
        _SEEN,
        Line("heard, conflict", "conflict hear right", AT_LEAST, 0.95),
        _CONFLICT_SEEN,
    ),
    "av-tiny-planted": (_AUDIO_ONLY, _SEEN_ALONE, _HEARD, _SEEN, _CONFLICT_SEEN, _DOMINATED),
}  # fmt: skip

PROBE_BOUND = 0.75
"""In some middle layer of av-tiny the sound is read from the stream at least so often, and less often at the end."""
DIFFUSE_BOUND = 0.10
"""In av-tiny-diffuse no single head's effect is this large a share of the gap."""


def standing(result: Evaluation, name: str, *, planted: tuple[tuple[int, int], ...] = ()) -> pd.DataFrame:
    """Hold an evaluation against what its model has to show, a row for each line and layout."""
    if name not in LINES:
        raise InputError(unknown("model", name, LINES))
    rows = [row for line in LINES[name] for row in _rows(line, getattr(result, line.table))]
    if name == "av-tiny" and len(result.probes):
        rows += _probed(result.probes)
    if name == "av-tiny-diffuse" and len(result.heads):
        best = max(float(row["share"]) for row in result.heads.to_dict("records"))
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


def _rows(line: Line, table: pd.DataFrame) -> list[dict[str, Any]]:
    """A line's standing in each layout; equal rows (random sets) are added up."""
    if not len(table):
        return []
    cell, kind, answer = line.place.split()
    wanted = {"cell": cell, "kind": kind, **line.where}
    found: dict[str, tuple[int, int]] = {}
    for row in table.to_dict("records"):
        if all(row[column] == value for column, value in wanted.items()):
            count, n = found.get(row["layout"], (0, 0))
            found[row["layout"]] = (count + int(row[answer]), n + int(row["n"]))
    return [
        _row(line.says, layout, count / n, *clopper_pearson(count, n), line.sign, line.bound, n)
        for layout, (count, n) in found.items()
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
