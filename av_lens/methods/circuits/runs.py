"""What does the model still do when only some of its nodes are its own?

In a circuit's run every node that is not in the circuit is replaced, at the site, by its *empty donor*: the same node
in a run in which there is nothing to compute on, or zero. What is kept is recomputed from the stream that it then
finds; norms, embeddings and everything outside the site's positions stay the model's own. `circuit_terms` says what is
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

from av_lens.core.execution import run
from av_lens.core.layouts import input_stacks
from av_lens.core.progress import Progress
from av_lens.errors import InputError
from av_lens.families.hook_names import hook_name
from av_lens.inputs.model_inputs import AVInputs
from av_lens.interventions import Plan, Site, replace
from av_lens.interventions.sites import resolve_positions
from av_lens.methods.circuits.terms import ZERO, Measured, Nodes
from av_lens.metrics.finite import require_numbers
from av_lens.metrics.metric import Metric
from av_lens.replay.measurement import measure_plans
from av_lens.replay.traces import Trace, record
from av_lens.spans import Span

GIGABYTE = 1e9


@dataclass(frozen=True, eq=False)
class TermRun:
    """One term on one stack of examples.

    Attributes:
        weight: of the term.
        base: the inputs that are run.
        donor: the inputs that empty donors come from.
        metric: of these examples.
        rows: their numbers.
        positions: of the site.
        given: empty donor -> component and layer -> values at the site, `[batch or 1, pos, (head,) d]`.
    """

    weight: float
    base: AVInputs
    donor: AVInputs
    metric: Metric
    rows: Int[np.ndarray, " example"]
    positions: tuple[int, ...]
    given: dict[str, dict[tuple[str, int], Tensor]]

    def plan(self, nodes: Nodes, empty: str, kept: frozenset[int]) -> Plan:
        """Write a circuit as a plan: everything else replaced at the site.

        Args:
            nodes: the candidates.
            empty: the empty donor.
            kept: the circuit.

        Returns:
            The plan; empty for the whole model.
        """
        values, edits = self.given[empty], list[Any]()
        for layer, heads, mlp in nodes.outside(kept):
            if heads:
                z = values["z", layer]
                part = z if len(heads) == z.shape[2] else z[:, :, list(heads)]
                edits.append(replace(Site("z", layer, heads, self.positions), part))
            if mlp:
                edits.append(replace(Site("mlp_out", layer, positions=self.positions), values["mlp_out", layer]))
        return Plan(edits)

    def sites(self, nodes: Nodes) -> list[Site]:
        """List where the nodes write.

        Args:
            nodes: the candidates.

        Returns:
            Every layer's z at the site, then every layer's MLP where MLPs are nodes.
        """
        layers = range(max(nodes.layers) + 1)
        parts = ("z", "mlp_out") if nodes.mlps else ("z",)
        return [Site(part, layer, positions=self.positions) for part in parts for layer in layers]


@dataclass(eq=False)
class CircuitRuns:
    """m of any circuit, by replay, each measured once. Build it with `CircuitRuns.of`.

    Attributes:
        model: a `HookedAVLLM`.
        nodes: the candidates.
        n: examples.
        runs: the terms' stacks.
        budget_gb: memory for the activations of circuits that run together.
        keep_gb: memory for records that are kept; beyond it a run is recorded anew each time.
    """

    model: Any
    nodes: Nodes
    n: int
    runs: list[TermRun]
    budget_gb: float
    keep_gb: float
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
        budget_gb: float,
        keep_gb: float,
    ) -> CircuitRuns:
        """Run every term's donor, and get ready.

        Args:
            model: a `HookedAVLLM`.
            measured: what is measured.
            nodes: the candidates.
            at: the site.
            stack: examples that run together.
            budget_gb: memory for circuits that run together.
            keep_gb: memory for records.

        Returns:
            The runs.

        Raises:
            InterventionError: positions outside an input.
        """
        found: list[TermRun] = []
        for members in input_stacks(measured.terms[0][1], stack):
            metric = measured.metric.chosen(members) if measured.metric.n_answers > 1 else measured.metric
            for weight, bases, donors in measured.terms:
                base, donor = (AVInputs.stack([side[i] for i in members]) for side in (bases, donors))
                positions = resolve_positions(at, base.spans, what="a circuit at").index
                if not positions:
                    raise InputError(f"at={at!r} names no position of these inputs; they have {base.spans!r}.")
                one = TermRun(weight, base, donor, metric, np.array(members), positions, {})
                one.given.update(_given(model, one, nodes, measured.empties))
                found.append(one)
        return cls(model, nodes, len(measured.groups), found, float(budget_gb), float(keep_gb))

    def trace(self, number: int) -> Trace:
        """Give the record of one run.

        Args:
            number: its place among `runs`.

        Returns:
            The record, kept where memory allows.
        """
        if number in self._traces:
            return self._traces[number]
        made = record(self.model, self.runs[number].base)
        if sum(map(_bytes, (made, *self._traces.values()))) <= self.keep_gb * GIGABYTE:
            self._traces[number] = made
        return made

    def measure(
        self, empty: str, circuits: Iterable[frozenset[int]], *, show: Progress, stage: str
    ) -> Float[np.ndarray, "circuit example"]:
        """Measure m of circuits.

        Args:
            empty: the empty donor.
            circuits: the nodes that each keeps.
            show: called as `show(stage, done, total)`.
            stage: the stage's name.

        Returns:
            m of each.

        Raises:
            InputError: the metric gives no number on an unedited run.
        """
        keys = [("" if kept == self.nodes.all else empty, kept) for kept in circuits]
        new = [key for key in dict.fromkeys(keys) if key not in self._found]
        total = np.zeros((len(new), self.n))
        for number, one in enumerate(self.runs if new else ()):
            total[:, one.rows] += one.weight * self._scores(number, one, empty, [kept for _, kept in new])
            show(stage, number + 1, len(self.runs))
        self._found |= dict(zip(new, total, strict=True))
        return np.array([self._found[key] for key in keys]).reshape(len(keys), self.n)

    def _scores(self, number: int, one: TermRun, empty: str, circuits: Sequence[frozenset[int]]) -> np.ndarray:
        trace, parts = self.trace(number), list[np.ndarray]()
        held = sum(value.nbytes for value in one.given[empty].values())
        size = int(max(1, min(512, self.budget_gb * GIGABYTE // max(held, 1))))  # what the plans themselves hold
        for start in range(0, len(circuits), size):
            plans = [one.plan(self.nodes, empty, kept) for kept in circuits[start : start + size]]
            found = measure_plans(trace, plans, one.metric, budget_gb=self.budget_gb)
            parts.append(found.double().cpu().numpy())
        scores = np.concatenate(parts)
        for kept, row in zip(circuits, scores, strict=True):
            if kept == self.nodes.all:
                require_numbers(torch.from_numpy(row), one.metric.name)
        return scores


def _given(model: Any, one: TermRun, nodes: Nodes, empties: Sequence[str]) -> dict[str, dict[tuple[str, int], Tensor]]:
    sites = one.sites(nodes)
    with torch.no_grad():
        cache = run(model, one.donor, capture=sites).cache
    found = {
        (site.component, site.layer or 0): cache[hook_name(site.component, site.layer)] for site in one.sites(nodes)
    }
    nothing = {key: torch.zeros_like(value[:1]) for key, value in found.items()}
    return {name: nothing if name == ZERO else found for name in empties}


def _bytes(trace: Trace) -> int:
    return sum(part.nbytes for layers in (trace.resid, trace.keys, trace.values) for part in layers)
