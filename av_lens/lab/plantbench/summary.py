"""One model's scores, judged, and many models' figures with their intervals: what the bench's page is made of.

Intervals resample models (5,000 draws, percentile, 95%; NaN below 5 models), because heads of one model are not
independent. A method that has no figure for a model (NaN) is averaged over the others.

*Does it matter what a head's output is replaced by?* For every pair of donors: the rank correlation of all heads' mean
releases, the share of equal signs among the heads that matter (above 1% of G in size by either donor), and the overlap
(Jaccard) of the heads above delta. Where donors disagree about a head, a report says so: `always on` (zero alone finds
it), and the three releases stand side by side in the table of heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from av_lens.isolation.explaining.robustness import rank_correlation
from av_lens.lab.plantbench.bench import plain_figure, scores_of
from av_lens.lab.plantbench.methods import IN_LOGITS
from av_lens.lab.plantbench.scores import Table, kinds_right, naming, place_of, ranking
from av_lens.lab.plantbench.truth import PlantTruth, mask_of
from av_lens.results.statistics import DRAWS

FEWEST_MODELS = 5
MATTERS = 0.01
Summary = dict[str, Any]
KINDS = ("picture writer", "sound opponent", "gate")
GROUPS = ("planted", *KINDS, "redundant", "beside a decoy")
DONORS: Mapping[str, str] = {
    "blank_muted": "release, blank_muted",
    "mean_other": "release, mean_other",
    "zero": "zero ablation",
    "mean_task": "mean ablation",
    "blank_a": "exact patching, blank picture",
    "audio_only": "exact patching, audio alone",
}
"""Donor to the bench's method that replaces z by it."""


def number(value: float | None) -> float:
    """A stored figure: NaN where none is."""
    return math.nan if value is None else float(value)


def _plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: plain_figure(value) for name, value in figures.items()}


def summary_of(entry: Mapping[str, Any]) -> Summary:
    """Judge one of `Scored.models`: its truth, each method's figures, who was named, how the donors agree."""
    truth, scores = PlantTruth.of_dict(entry["truth"]), scores_of(entry)
    g, delta = (number(entry["summary"][name]) for name in ("G", "delta"))
    shape, named = (int(entry["n_layers"]), int(entry["n_heads"])), list(entry["named"])
    methods: dict[str, dict[str, float | None]] = {}
    for method, table in scores.items():
        figures = ranking(table, truth)
        if method == "isolate":
            figures |= naming(mask_of([place_of(row) for row in named], shape), truth) | kinds_right(named, truth)
            held = naming(mask_of([place_of(row) for row in named if row["confirmed"]], shape), truth)
            figures |= {f"confirmed {name}": held[name] for name in ("named", "false", "precision", "recall")}
        elif method in IN_LOGITS:
            figures |= naming(np.nan_to_num(table, nan=-math.inf) > delta, truth)
        methods[method] = _plain(figures | {"seconds": float(entry["seconds"][method])})
    by_donor = {donor: scores[method] for donor, method in DONORS.items()}
    agree = agreement(by_donor, g=g, delta=delta)
    heads: list[dict[str, Any]] = []
    for head in sorted({*truth.kinds, *(place_of(row) for row in named)}):
        shares = _plain({donor: float(table[head]) / g for donor, table in by_donor.items()})
        seen = seen_by(by_donor, head, delta=delta)
        heads.append({"layer": head[0], "head": head[1], "shares": shares, "seen by": seen})
    kept = {name: entry[name] for name in ("truth", "summary", "verdict_kind", "stamps", "named", "exchanged")}
    about = {"model": entry["model"], "n heads": shape[0] * shape[1], **kept, "named": named}
    donors = {pair: _plain(figures) for pair, figures in agree.items()}
    return {**about, "methods": methods, "donors": donors, "heads": heads}


def agreement(tables: Mapping[str, Table], *, g: float, delta: float) -> dict[str, dict[str, float]]:
    """Compare every pair of donors' mean releases: "one, other" to `rank correlation`, `equal signs`, `overlap`."""
    out: dict[str, dict[str, float]] = {}
    for one, other in itertools.combinations(tables, 2):
        first, second = tables[one].ravel(), tables[other].ravel()
        known = ~(np.isnan(first) | np.isnan(second))
        first, second = first[known], second[known]
        matters = np.maximum(abs(first), abs(second)) > MATTERS * g
        large, also = first > delta, second > delta
        either = int((large | also).sum())
        out[f"{one}, {other}"] = {
            "rank correlation": rank_correlation(first, second),
            "equal signs": float((np.sign(first) == np.sign(second))[matters].mean()) if matters.any() else math.nan,
            "overlap": float((large & also).sum() / either) if either else math.nan,
        }
    return out


def seen_by(tables: Mapping[str, Table], head: tuple[int, int], *, delta: float) -> list[str]:
    """List the donors by which a head's mean release is above delta."""
    return [name for name, table in tables.items() if table[head] > delta]


def chosen(models: Sequence[Summary], group: str) -> list[Summary]:
    """Choose the planted models of one of `GROUPS`; a model may be of several."""

    def inside(truth: PlantTruth) -> bool:
        if group in ("redundant", "beside a decoy"):
            return truth.redundant if group == "redundant" else truth.beside_a_decoy
        return bool(truth.kinds) if group == "planted" else group in truth.kinds.values()

    return [one for one in models if inside(PlantTruth.of_dict(one["truth"]))]


def nulls(models: Sequence[Summary]) -> list[Summary]:
    """Choose the models in which nothing is to be found: balanced ones and those with decoys alone."""
    return [one for one in models if PlantTruth.of_dict(one["truth"]).null]


def mean_over(models: Sequence[Summary], method: str, figure: str, *, seed: int = 0) -> tuple[float, float, float]:
    """Average a method's figure over models: mean and 95% interval; NaN where there is none, or below 5 models."""
    values = np.array([number(one["methods"].get(method, {}).get(figure)) for one in models], dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) < FEWEST_MODELS:
        return float(values.mean()) if len(values) else math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
