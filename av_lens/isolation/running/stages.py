"""What follows once heads are named and confirmed, part by part in the protocol's order.

Each part gives the rows of one table of the record (the plan of repair also arrays). A part that fails stops the run: a
gap in a record would look like a finding. What is not measured for a reason says so in its rows or in `run.reasons`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from av_lens.isolation.explaining.edge_cuts import cut_rows
from av_lens.isolation.explaining.knowledge import knowledge_rows
from av_lens.isolation.explaining.mechanisms import cards
from av_lens.isolation.explaining.repair import repair_rows, repair_values
from av_lens.isolation.explaining.robustness import robustness_rows
from av_lens.isolation.explaining.routes import route_rows
from av_lens.isolation.explaining.units import unit_rows
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.plan_effects import model_of
from av_lens.isolation.naming.evidence import Searched, chunks_of
from av_lens.isolation.running.preparing import Run
from av_lens.isolation.sets.confirmation import Held

NAMED_ONLY = "Left out, as asked (named_only): all that explains the named heads and tests the finding's robustness."
QUICK = "Left out, as asked (quick): robustness, and pairs of heads in the search for sets."

NO_MODEL = "Not measured: mechanisms, cuts and routes need a model behind the engine, and this engine has none."
EXPLAINED: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "cards": cards,
    "cuts": cut_rows,
    "routes": route_rows,
    "knowledge": knowledge_rows,
}


@dataclass(eq=False)
class Further:
    """The rows of further tables by name, and further arrays of the record."""

    rows: dict[str, Sequence[dict[str, Any]]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def further(run: Run, halves: tuple[Half, Half], searched: Searched, held: Held) -> Further:
    """Measure what follows the search and its confirmation.

    Args:
        run: the run.
        halves: discovery and confirmation.
        searched: what discovery found.
        held: what confirmation found.

    Returns:
        Rows and arrays for the record.
    """
    out = Further()
    if run.options.quick:
        run.reasons.append(QUICK)
    if run.options.named_only:
        run.reasons.append(NAMED_ONLY)
        return out
    out.rows["units"] = [
        row
        for name, site in searched.sites.items()
        for row in unit_rows(site.chunks, halves[0], site=name, progress=run.progress)
    ]
    if model_of(run.bench) is None:
        run.reasons.append(NO_MODEL)
    for name, rows_of in EXPLAINED.items():
        out.rows[name] = rows_of(run.bench, halves, searched, held, seed=run.options.seed, progress=run.progress)
    _repair(run, halves, searched, held, out)
    if not run.options.quick:
        out.rows["robustness"] = robustness_rows(
            run.bench, halves, searched, seed=run.options.seed, progress=run.progress
        )
    return out


def _repair(run: Run, halves: tuple[Half, Half], searched: Searched, held: Held, out: Further) -> None:
    """The chosen set's edit as constants from discovery, measured on confirmation."""
    chosen = next((built for built in held.sets if built.chosen), None)
    if chosen is None:
        return
    values = repair_values(searched.first.chunks, chosen.members, chosen.donor)
    chunks = chunks_of(run.bench, searched, halves[1], searched.first.site)
    out.arrays |= values
    out.rows["repair"] = repair_rows(chunks, halves[1], chosen.members, values, progress=run.progress)
