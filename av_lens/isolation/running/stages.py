"""What follows once heads are named and confirmed, part by part in the protocol's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from av_lens.isolation.explaining.edge_cuts import cut_rows
from av_lens.isolation.explaining.knowledge import knowledge_rows
from av_lens.isolation.explaining.known import Known
from av_lens.isolation.explaining.mechanisms import cards
from av_lens.isolation.explaining.repair import repair
from av_lens.isolation.explaining.robustness import robustness_rows
from av_lens.isolation.explaining.routes import route_rows
from av_lens.isolation.explaining.units import unit_rows
from av_lens.isolation.running.preparing import Run

NAMED_ONLY = "Left out, as asked (named_only): all that explains the named heads and tests the finding's robustness."
QUICK = "Left out, as asked (quick): robustness, and pairs of heads in the search for sets."
EXPLAINED: dict[str, Callable[[Known], list[dict[str, Any]]]] = {
    "cards": cards,
    "cuts": cut_rows,
    "routes": route_rows,
    "knowledge": knowledge_rows,
}


Further = tuple[dict[str, list[dict[str, Any]]], dict[str, np.ndarray]]
"""Rows of further tables by name, and further arrays of the record."""


def further(run: Run, known: Known) -> Further:
    """Measure what follows the search and its confirmation; what is left out, as asked, is said in the reasons."""
    if run.options.quick:
        run.reasons.append(QUICK)
    if run.options.named_only:
        run.reasons.append(NAMED_ONLY)
        return {}, {}
    sites = known.searched.sites.items()
    rows = {"units": [row for name, site in sites for row in unit_rows(site.chunks, known.discovery, site=name)]}
    rows |= {name: rows_of(known) for name, rows_of in EXPLAINED.items()}
    rows["repair"], arrays = repair(known)
    if not run.options.quick:
        rows["robustness"] = robustness_rows(known)
    return rows, arrays
