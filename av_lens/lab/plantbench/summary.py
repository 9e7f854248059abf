"""One model's scores, judged, and many models' figures with their intervals: what the bench's page is made of.

Intervals resample models (5,000 draws, percentile, 95%; NaN below 5 models), because heads of one model are not
independent. A method that has no figure for a model (NaN) is averaged over the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from av_lens.lab.plantbench.bench import scores_of
from av_lens.lab.plantbench.donors import DONORS, agreement, seen_by
from av_lens.lab.plantbench.methods import IN_LOGITS
from av_lens.lab.plantbench.scores import kinds_right, mask_of, naming, ranking
from av_lens.lab.plantbench.truth import PlantTruth
from av_lens.results.statistics import DRAWS

FEWEST_MODELS = 5
Summary = dict[str, Any]
KINDS = ("picture writer", "sound opponent", "gate")


def summary_of(entry: Mapping[str, Any]) -> Summary:
    """Judge one model's scores.

    Args:
        entry: one of `Scored.models`.

    Returns:
        Plain data: the truth, each method's figures, who was named, how the donors agree.
    """
    truth = PlantTruth.of_dict(entry["truth"])
    scores = scores_of(entry)
    g, delta = (_number(entry["summary"][name]) for name in ("G", "delta"))
    shape = (int(entry["n_layers"]), int(entry["n_heads"]))
    named = [row for row in entry["named"]]
    methods: dict[str, dict[str, float | None]] = {}
    for method, table in scores.items():
        figures = ranking(table, truth)
        if method == "isolate":
            figures |= naming(mask_of([_place(row) for row in named], shape), truth) | kinds_right(named, truth)
            held = naming(mask_of([_place(row) for row in named if row["confirmed"]], shape), truth)
            figures |= {f"confirmed {name}": held[name] for name in ("named", "false", "precision", "recall")}
        elif method in IN_LOGITS:
            figures |= naming(np.nan_to_num(table, nan=-math.inf) > delta, truth)
        figures["seconds"] = float(entry["seconds"][method])
        methods[method] = {name: _plain(value) for name, value in figures.items()}
    by_donor = {donor: scores[method] for donor, method in DONORS.items()}
    shown = sorted({*truth.kinds, *(_place(row) for row in named)})
    return {
        "model": entry["model"],
        "n heads": shape[0] * shape[1],
        "truth": entry["truth"],
        "summary": entry["summary"],
        "verdict_kind": entry["verdict_kind"],
        "stamps": entry["stamps"],
        "named": named,
        "exchanged": entry["exchanged"],
        "methods": methods,
        "donors": {
            pair: {name: _plain(value) for name, value in figures.items()}
            for pair, figures in agreement(by_donor, g=g, delta=delta).items()
        },
        "heads": [
            {
                "layer": head[0],
                "head": head[1],
                "shares": {donor: _plain(float(table[head]) / g) for donor, table in by_donor.items()},
                "seen by": seen_by(by_donor, head, delta=delta),
            }
            for head in shown
        ],
    }


def group_of(name: str) -> Callable[[Summary], bool]:
    """Find a group of planted models; a model may be of several.

    Args:
        name: "planted" (some true head), "redundant", "beside a decoy", or a kind that some true head is of.

    Returns:
        Whether a model is of it.
    """

    def inside(one: Summary) -> bool:
        truth = PlantTruth.of_dict(one["truth"])
        if name == "redundant":
            return truth.redundant
        if name == "beside a decoy":
            return truth.beside_a_decoy
        return bool(truth.kinds) if name == "planted" else name in truth.kinds.values()

    return inside


GROUPS = ("planted", *KINDS, "redundant", "beside a decoy")


def chosen(models: Sequence[Summary], group: str) -> list[Summary]:
    """Choose the planted models of a group.

    Args:
        models: summaries.
        group: one of `GROUPS`.

    Returns:
        Those of the group.
    """
    inside = group_of(group)
    return [one for one in models if inside(one)]


def nulls(models: Sequence[Summary]) -> list[Summary]:
    """Choose the models in which nothing is to be found.

    Args:
        models: summaries.

    Returns:
        Balanced models and those with decoys alone.
    """
    return [one for one in models if PlantTruth.of_dict(one["truth"]).null]


def mean_over(models: Sequence[Summary], method: str, figure: str, *, seed: int = 0) -> tuple[float, float, float]:
    """Average a figure over models.

    Args:
        models: summaries.
        method: whose.
        figure: such as "auroc".
        seed: of the resampling.

    Returns:
        Mean and 95% interval; NaN where no model has the figure, or bounds below 5 models.
    """
    values = np.array([_number(one["methods"].get(method, {}).get(figure)) for one in models], dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan, math.nan
    if len(values) < FEWEST_MODELS:
        return float(values.mean()), math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def _place(row: Mapping[str, Any]) -> tuple[int, int]:
    return int(row["layer"]), int(row["head"])


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
