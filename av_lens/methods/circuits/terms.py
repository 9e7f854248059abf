"""What is a circuit made of, and what is it a circuit for?

A *node* is a head (its z) or an MLP (what it writes) at the site's positions. What is measured, m, is a sum of
*terms*: weight x metric of one run. Two recipes make one:

    conflicts   m = C = (M(va) - M(av)) / 2 (hearing under conflict) or G = (M(blank_a) - M(blank_v)) / 2 (hearing with
                nothing to see); empty donors are the conflict's own `blank_muted`, or zero
    pairs       m = metric(clean run); empty donors are the pair's corrupt run, or zero
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from av_lens.checks import require_choice
from av_lens.core.layouts import listed
from av_lens.errors import InputError
from av_lens.inputs import AVInputs, Conflict, Pair
from av_lens.inputs.sources import clip_key
from av_lens.interventions import Site
from av_lens.methods.shared.frame import Examples
from av_lens.metrics import Metric, as_metric, each, logit_diff
from av_lens.results.provenance import linked
from av_lens.results.statistics import DRAWS, Bootstrap

ZERO = "zero"
MIRRORED = {"C": ("va", "av"), "G": ("blank_a", "blank_v")}
UNITS = ("head", "head mlp")


@dataclass(frozen=True)
class Nodes:
    """The candidates of a circuit, layer by layer, heads before the MLP.

    Attributes:
        names: "L3H5", "L3 mlp".
        layers: the layer of each.
        heads: the head of each, None for an MLP.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int | None, ...]

    @classmethod
    def of(cls, spec: Any, over: str) -> Nodes:
        """List a model's nodes."""
        require_choice("kind of node, over=", over, UNITS)
        inside = [*range(spec.n_heads), *([None] if "mlp" in over else [])]
        found = [(layer, head) for layer in range(spec.n_layers) for head in inside]
        names = (f"L{layer} mlp" if head is None else f"L{layer}H{head}" for layer, head in found)
        return cls(tuple(names), tuple(layer for layer, _ in found), tuple(head for _, head in found))

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

    def outside(self, kept: frozenset[int]) -> Iterator[tuple[int, tuple[int, ...], bool]]:
        """List what a circuit leaves out."""
        gone: dict[int, list[int | None]] = {}
        for node, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
            if node not in kept:
                gone.setdefault(layer, []).append(head)
        for layer, members in gone.items():
            yield layer, tuple(head for head in members if head is not None), None in members


@dataclass(frozen=True, eq=False)
class Measured:
    """What a circuit is a circuit of: m, as weighted runs, and what its examples share.

    Attributes:
        terms: weight, the inputs that are run, and those that empty donors are taken from, one for each example.
        metric: of one run, bound.
        empties: the names of the empty donors.
        what: m in words.
        groups: the conflicts that share clips with each other, one number for each example.
        clips: the sound's and the picture's source clip of each conflict; empty for pairs.
    """

    terms: tuple[tuple[float, tuple[AVInputs, ...], tuple[AVInputs, ...]], ...]
    metric: Metric
    empties: tuple[str, str]
    what: str
    groups: tuple[int, ...]
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
            return cls._of_pairs(items, as_metric(metric, model, items))
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

    @classmethod
    def _of_pairs(cls, items: list[Pair], metric: Metric) -> Measured:
        examples = Examples.paired("find_circuit", items)
        clean, corrupt = (
            tuple(side[i] for side in sides for i in range(len(side)))
            for sides in ([one.clean for one in items], [one.corrupt for one in items])
        )
        what = f"{metric.name} of the clean run"
        return cls(((1.0, clean, corrupt),), metric, ("corrupt", ZERO), what, examples.clusters)

    def bootstrap(self, seed: int) -> Bootstrap:
        """Draw weights of the examples: of components or source clips for conflicts, of clusters for pairs."""
        if self.clips[0]:
            return Bootstrap.draw(self.groups, *self.clips, seed=seed)
        names, group = np.unique(np.asarray(self.groups), return_inverse=True)
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS).astype(np.float64)
        return Bootstrap(counts[:, group], "cluster", len(names))
