"""What does the model still do when only some of its nodes are its own?

In a circuit's run every node that is not in the circuit is replaced, at the site, by its *empty donor*: the same node
in a run in which there is nothing to compute on, or zero. What is kept is recomputed from the stream that it then
finds; norms, embeddings and everything outside the site's positions stay the model's own. `terms` says what is
measured.

All circuits are replayed from one record of each term's run, and each is measured once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.core import Progress, run
from av_lens.core.budget import GIGABYTE
from av_lens.core.layouts import input_stacks
from av_lens.errors import InputError
from av_lens.families.hook_names import hook_name
from av_lens.inputs import AVInputs
from av_lens.interventions import Plan, Site, replace
from av_lens.interventions.sites import resolve_positions
from av_lens.methods.circuits.terms import ZERO, Measured, Nodes
from av_lens.metrics import Metric, require_numbers
from av_lens.replay import measure_plans
from av_lens.replay.traces import Trace, record
from av_lens.results.faithfulness import Scale
from av_lens.spans import Span

Values = dict[tuple[str, int], Tensor]
"""What nodes write at the site, by component and layer."""


def written(model: Any, x: AVInputs, sites: Sequence[Site]) -> Values:
    """Run once and keep what nodes write."""
    with torch.no_grad():
        cache = run(model, x, capture=list(sites)).cache
    return {(site.component, site.layer or 0): cache[hook_name(site.component, site.layer)] for site in sites}


@dataclass(frozen=True, eq=False)
class TermRun:
    """One term on one stack of examples: its weight in m, its run, and what nodes write in each empty donor's."""

    weight: float
    base: AVInputs
    donor: AVInputs
    metric: Metric
    rows: Int[np.ndarray, " example"]
    positions: tuple[int, ...]
    given: dict[str, Values]

    def plan(self, nodes: Nodes, empty: str, kept: frozenset[int]) -> Plan:
        """Write a circuit as a plan: everything else replaced at the site."""
        values, edits = self.given[empty], list[Any]()
        for layer, heads, mlp in nodes.outside(kept):
            if heads:
                z = values["z", layer]
                part = z if len(heads) == z.shape[2] else z[:, :, list(heads)]
                edits.append(replace(Site("z", layer, heads, self.positions), part))
            if mlp:
                edits.append(replace(Site("mlp_out", layer, positions=self.positions), values["mlp_out", layer]))
        return Plan(edits)


@dataclass(eq=False)
class CircuitRuns:
    """m of any circuit, by replay, each measured once. Build it with `CircuitRuns.of`."""

    model: Any
    measured: Measured
    nodes: Nodes
    runs: list[TermRun]
    budget_gb: float
    keep_gb: float
    show: Progress
    _found: dict[tuple[str, frozenset[int]], np.ndarray] = field(default_factory=dict)
    _traces: dict[int, Trace] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Any,
        measured: Measured,
        nodes: Nodes,
        *,
        at: str | Span,
        stack: int,
        budget_gb: float | int,
        keep_gb: float | int,
        show: Progress = lambda *_: None,
    ) -> CircuitRuns:
        """Run every term's donor, and get ready."""
        found: list[TermRun] = []
        for members in input_stacks(measured.terms[0][1], stack):
            metric = measured.metric.chosen(members) if measured.metric.n_answers > 1 else measured.metric
            for weight, bases, donors in measured.terms:
                base, donor = (AVInputs.stack([side[i] for i in members]) for side in (bases, donors))
                positions = resolve_positions(at, base.spans, what="a circuit at").index
                if not positions:
                    raise InputError(f"at={at!r} names no position of these inputs; they have {base.spans!r}.")
                own = written(model, donor, nodes.sites(positions))
                nothing = {key: torch.zeros_like(value[:1]) for key, value in own.items()}
                given = {name: nothing if name == ZERO else own for name in measured.empties}
                found.append(TermRun(weight, base, donor, metric, np.array(members), positions, given))
        return cls(model, measured, nodes, found, float(budget_gb), float(keep_gb), show)

    @property
    def n(self) -> int:
        """How many examples."""
        return len(self.measured.groups)

    def scales(self, seed: int) -> dict[str, Scale]:
        """The scale of f for each empty donor."""
        boot, ends = self.measured.bootstrap(seed), [self.nodes.all, frozenset[int]()]
        return {e: Scale(boot, *self.measure(e, ends, stage="whole and empty")) for e in self.measured.empties}

    def trace(self, number: int) -> Trace:
        """Give the record of one run, kept where it fits."""
        if number in self._traces:
            return self._traces[number]
        made = record(self.model, self.runs[number].base)
        if sum(map(_bytes, (made, *self._traces.values()))) <= self.keep_gb * GIGABYTE:
            self._traces[number] = made
        return made

    def measure(
        self, empty: str, circuits: Iterable[frozenset[int]], *, stage: str = ""
    ) -> Float[np.ndarray, "circuit example"]:
        """Measure m of circuits; without a stage nothing is said of it."""
        keys = [("" if kept == self.nodes.all else empty, kept) for kept in circuits]
        new = [key for key in dict.fromkeys(keys) if key not in self._found]
        total = np.zeros((len(new), self.n))
        for number, one in enumerate(self.runs if new else ()):
            total[:, one.rows] += one.weight * self._scores(number, one, empty, [kept for _, kept in new])
            if stage:
                self.show(stage, number + 1, len(self.runs))
        self._found |= dict(zip(new, total, strict=True))
        return np.array([self._found[key] for key in keys]).reshape(len(keys), self.n)

    def _scores(self, number: int, one: TermRun, empty: str, circuits: Sequence[frozenset[int]]) -> np.ndarray:
        trace, parts = self.trace(number), list[Tensor]()
        held = sum(value.nbytes for value in one.given[empty].values())
        size = int(max(1, min(512, self.budget_gb * GIGABYTE // max(held, 1))))  # what the plans themselves hold
        for start in range(0, len(circuits), size):
            plans = [one.plan(self.nodes, empty, kept) for kept in circuits[start : start + size]]
            parts.append(measure_plans(trace, plans, one.metric, budget_gb=self.budget_gb).double().cpu())
        scores = torch.cat(parts)
        if self.nodes.all in circuits:
            require_numbers(scores[list(circuits).index(self.nodes.all)], one.metric.name)
        return scores.numpy()


def _bytes(trace: Trace) -> int:
    return sum(part.nbytes for layers in (trace.resid, trace.keys, trace.values) for part in layers)
