"""Does it matter what a head's output is replaced by? How far the donors agree, model by model.

For every pair of donors: the rank correlation of all heads' mean releases, the share of equal signs among the heads
that matter (above 1% of G in size by either donor), and the overlap (Jaccard) of the heads above delta. On a planted
model each donor also has its AUROC. Where donors disagree about a head, a report says so: `always on` (zero alone
finds it), and the three releases stand side by side in the table of heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np

from av_lens.isolation.explaining.robustness import rank_correlation
from av_lens.lab.plantbench.scores import Table

DONORS: Mapping[str, str] = {
    "blank_muted": "release, blank_muted",
    "mean_other": "release, mean_other",
    "zero": "zero ablation",
    "mean_task": "mean ablation",
    "blank_a": "exact patching, blank picture",
    "audio_only": "exact patching, audio alone",
}
"""Donor to the bench's method that replaces z by it."""
MATTERS = 0.01


def agreement(tables: Mapping[str, Table], *, g: float, delta: float) -> dict[str, dict[str, float]]:
    """Compare every pair of donors.

    Args:
        tables: each donor's mean release.
        g: G, hearing with nothing to see.
        delta: the threshold.

    Returns:
        "one, other" to `rank correlation`, `equal signs`, `overlap`; NaN where there is nothing to compare.
    """
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
    """List the donors by which a head's mean release is above delta.

    Args:
        tables: each donor's mean release.
        head: the head.
        delta: the threshold.

    Returns:
        Their names.
    """
    return [name for name, table in tables.items() if table[head] > delta]
