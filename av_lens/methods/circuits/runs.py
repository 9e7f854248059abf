"""What is a circuit made of and for, and what does the model still do when only some of its nodes are its own?

A *node* is a head (its z) or an MLP (what it writes) at the site's positions; m is a sum of *terms*, weight x metric of
one run. Every node outside the circuit is replaced, at the site, by its *empty donor*; what is kept is recomputed.

    conflicts   m = C or G (protocol section 2); empty donors are the conflict's own `blank_muted`, or zero
    pairs       m = metric(clean run); empty donors are the pair's corrupt run, or zero
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core import Progress, run
from av_lens.core.budget import GIGABYTE, input_stacks, listed
from av_lens.errors import InputError
from av_lens.families.decoder import hook_name
from av_lens.inputs import AVInputs, Conflict, Pair
from av_lens.inputs.conflict import clip_key
from av_lens.interventions import Edit, Plan, Site, replace
from av_lens.interventions.edits import resolve_positions
from av_lens.methods.shared.frame import Examples
from av_lens.metrics import Metric, as_metric, each, logit_diff, require_numbers
from av_lens.replay import measure_plans
from av_lens.replay.traces import Trace, record
from av_lens.results.circuit import Scale
from av_lens.results.provenance import linked
from av_lens.results.statistics import Bootstrap
from av_lens.spans import Span

ZERO = "zero"
MIRRORED = {"C": ("va", "av"), "G": ("blank_a", "blank_v")}


@dataclass(frozen=True)
class Nodes:
    """The candidates of a circuit, layer by layer, heads before the MLP."""

    names: tuple[str, ...]  # "L3H5", "L3 mlp"
    layers: tuple[int, ...]  # the layer of each
    heads: tuple[int | None, ...]  # the head of each, None for an MLP

    @classmethod
    def of(cls, spec: Any, over: str) -> Nodes:
        """List a model's nodes."""
        require_choice("kind of node, over=", over, ("head", "head mlp", "edge"))
        inside = [*range(spec.n_heads), *([None] if "mlp" in over else [])]
        layers, heads = zip(*product(range(spec.n_layers), inside), strict=True)
        named = zip(layers, heads, strict=True)
        return cls(tuple(f"L{la} mlp" if h is None else f"L{la}H{h}" for la, h in named), layers, heads)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def all(self) -> frozenset[int]:
        """Every node's number."""
        return frozenset(range(len(self)))

    @property
    def mlps(self) -> bool:
        """Whether MLPs are nodes."""
        return None in self.heads

    def within_layers(self) -> list[list[int]]:
        """Group the nodes that may stand for one another in a matched control."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for node, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
            groups.setdefault((layer, head is None), []).append(node)
        return list(groups.values())

    def sites(self, positions: tuple[int, ...]) -> list[Site]:
        """List where the nodes write."""
        parts = ("z", "mlp_out") if self.mlps else ("z",)
        return [Site(part, layer, positions=positions) for part in parts for layer in range(max(self.layers) + 1)]


@dataclass(frozen=True, eq=False)
class Measured:
    """What a circuit is a circuit of: m, as weighted runs, and what its examples share."""

    # weight, the inputs that are run, and those that empty donors are taken from, one for each example
    terms: tuple[tuple[float, tuple[AVInputs, ...], tuple[AVInputs, ...]], ...]
    metric: Metric  # of one run, bound
    empties: tuple[str, str]  # the names of the empty donors
    what: str  # m in words
    groups: tuple[int, ...]  # the conflicts that share clips with each other, one number for each example
    # the sound's and the picture's source clip of each conflict; empty for pairs
    clips: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @classmethod
    def of(cls, model: Any, given: Any, *, metric: Any, of: str, layout: str) -> Measured:
        """Read what a caller handed in."""
        items = listed(given)
        require_choice("measure, of=", of, MIRRORED)
        if items and all(isinstance(item, Conflict) for item in items):
            asked = metric or logit_diff(*(each([one.answers[side] for one in items]) for side in (0, 1)))
            return cls._of_conflicts(model, items, asked, of, layout)
        if items and all(isinstance(item, Pair) for item in items):
            if metric is None:
                raise InputError("a circuit of pairs needs a metric, such as metric=logit_diff('siren', 'dog').")
            bound = as_metric(metric, model, items)
            sides = ([one.clean for one in items], [one.corrupt for one in items])
            clean, corrupt = (tuple(x[i] for x in side for i in range(len(x))) for side in sides)
            what, groups = f"{bound.name} of the clean run", Examples.paired("find_circuit", items).clusters
            return cls(((1.0, clean, corrupt),), bound, ("corrupt", ZERO), what, groups)
        kinds = sorted({type(item).__name__ for item in items}) or ["nothing"]
        raise InputError(f"a circuit is found on conflicts or on aligned pairs, not on {' and '.join(kinds)}.")

    @classmethod
    def _of_conflicts(cls, model: Any, items: list[Conflict], asked: Any, of: str, layout: str) -> Measured:
        cells = [one.cells(model, layout=layout) for one in items]
        empty = tuple(one["blank_muted"] for one in cells)
        base, mirror = MIRRORED[of]
        metric = as_metric(asked, model, [one[base] for one in cells])
        terms = tuple((w, tuple(one[cell] for one in cells), empty) for w, cell in ((0.5, base), (-0.5, mirror)))
        clips = tuple(clip_key(one.sound) for one in items), tuple(clip_key(one.picture) for one in items)
        what = f"{of} = [M({base}) - M({mirror})] / 2, M = {metric.name}"
        return cls(terms, metric, ("blank_muted", ZERO), what, linked(list(zip(*clips, strict=True))), clips)

    def bootstrap(self, seed: int) -> Bootstrap:
        """Draw weights of the examples: of components or source clips for conflicts, of clusters for pairs."""
        if self.clips[0]:
            return Bootstrap.draw(self.groups, *self.clips, seed=seed)
        names, group = np.unique(np.asarray(self.groups), return_inverse=True)
        drawn = Bootstrap.of_clusters(len(names), seed=seed)
        return Bootstrap(drawn.weights[:, group], drawn.unit, drawn.n_clips)


Values = dict[tuple[str, int], Tensor]  # what nodes write at the site, by component and layer


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
        edits = list[Edit]()
        for group in nodes.within_layers():
            gone = [node for node in group if node not in kept]
            if not gone:
                continue
            layer, heads = nodes.layers[gone[0]], tuple(h for node in gone if (h := nodes.heads[node]) is not None)
            value = self.given[empty]["z" if heads else "mlp_out", layer]
            part = value[:, :, list(heads)] if heads and len(heads) < value.shape[2] else value
            edits.append(replace(Site("z" if heads else "mlp_out", layer, heads or None, self.positions), part))
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
        parts = [(*one.resid, *one.keys, *one.values) for one in (made, *self._traces.values())]
        if sum(part.nbytes for one in parts for part in one) <= self.keep_gb * GIGABYTE:
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
        trace, held = self.trace(number), sum(value.nbytes for value in one.given[empty].values())
        size = int(max(1, min(512, self.budget_gb * GIGABYTE // max(held, 1))))  # what the plans themselves hold
        parts = (circuits[start : start + size] for start in range(0, len(circuits), size))
        plans = ([one.plan(self.nodes, empty, kept) for kept in part] for part in parts)
        scores = torch.cat([measure_plans(trace, some, one.metric, budget_gb=self.budget_gb) for some in plans])
        scores = scores.double().cpu()
        if self.nodes.all in circuits:
            require_numbers(scores[list(circuits).index(self.nodes.all)], one.metric.name)
        return scores.numpy()
