"""How are conflicts dealt to a discovery half and a confirmation half, so that the halves share no clip?

Clips are the nodes of a graph (a clip is its file's hash and its time window) and conflicts its edges: a conflict joins
its sound's clip to its picture's. Conflicts that share a clip, directly or through others, form a *component*, and
components are dealt whole:

1. A component with more than 40% of the remaining conflicts loses the conflict of smallest hash among its bridges
   (edges whose removal parts it), or, where it has none, the conflict of smallest hash, until none is above 40%.
2. Components are dealt largest first, ties by hash(seed, id), each to the half with fewer conflicts of the component's
   sound answers, then to the half with fewer conflicts, then to discovery.

The hash is sha256 of "seed:id"; a component's is the smallest of its conflicts'. The deal depends on the clips, the
ids and the seed alone, never on a model, so that two models are searched and confirmed on the same halves.

Example:
    ```python
    halves = deal([Member("c0", "clip1", "clip2", "dog"), ...], seed=0)
    halves.half        # "discovery", "confirmation" or "lost" per conflict
    ```
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from av_lens.errors import InputError
from av_lens.results.provenance import linked

DISCOVERY, CONFIRMATION, LOST = "discovery", "confirmation", "lost"
LARGEST_SHARE = 0.4
FEWEST, FIRM_CONFLICTS, FIRM_COMPONENTS = 20, 60, 20


@dataclass(frozen=True)
class Member:
    """What dealing needs to know of a conflict: its id, its two source clips and its sound's answer."""

    id: str
    sound_clip: str
    picture_clip: str
    sound_answer: str


@dataclass(frozen=True)
class Halves:
    """Where every conflict went: `half` and `component` (-1 where lost), in the order that was given."""

    half: tuple[str, ...]
    component: tuple[int, ...]
    seed: int

    @property
    def n_lost(self) -> int:
        """How many conflicts were given up to part a component above 40%."""
        return sum(half == LOST for half in self.half)

    def members(self, half: str) -> list[int]:
        """List one half."""
        return [i for i, name in enumerate(self.half) if name == half]


def rank_hash(seed: int, name: str) -> str:
    """Hash a name with the seed: the order that breaks every tie."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def components(edges: Mapping[int, tuple[str, str]]) -> list[list[int]]:
    """Find the connected components of a graph given by its edges."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, group in zip(edges, linked(list(edges.values())), strict=True):
        groups[group].append(number)
    return list(groups.values())


def bridges(edges: Mapping[int, tuple[str, str]]) -> set[int]:
    """Find the edges whose removal parts a connected component (parallel edges and loops are none)."""
    import networkx

    graph: Any = networkx.MultiGraph()
    graph.add_edges_from((one, two, number) for number, (one, two) in edges.items())
    return {number for one, two in networkx.bridges(graph) if one != two for number in graph[one][two]}


def _part_large_ones(edges: dict[int, tuple[str, str]], order: Mapping[int, str]) -> list[list[int]]:
    """Give up edges (in place) until no component has more than 40% of those that remain."""
    while True:
        groups = components(edges)
        large = [group for group in groups if len(group) > LARGEST_SHARE * len(edges)]
        # Three components are needed before all can be within 40%; nothing is left to part in a single conflict.
        large = [group for group in large if len(group) > 1]
        if not large:
            return groups
        group = max(large, key=len)
        cut = bridges({number: edges[number] for number in group}) or set(group)
        del edges[min(cut, key=lambda number: order[number])]


def deal(conflicts: Sequence[Member], *, seed: int) -> Halves:
    """Deal conflicts to two halves that share no clip, as the module says."""
    ids = [conflict.id for conflict in conflicts]
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"two conflicts have the id {twice!r}; ids order the deal and must differ. Give each its own.")
    order = {i: rank_hash(seed, name) for i, name in enumerate(ids)}
    edges = {i: (conflict.sound_clip, conflict.picture_clip) for i, conflict in enumerate(conflicts)}
    groups = _part_large_ones(edges, order)
    groups.sort(key=lambda group: (-len(group), min(order[i] for i in group)))
    half, component = [LOST] * len(conflicts), [-1] * len(conflicts)
    dealt: dict[str, list[str]] = {DISCOVERY: [], CONFIRMATION: []}
    for number, group in enumerate(groups):
        answers = {conflicts[i].sound_answer for i in group}
        name = min(dealt, key=lambda side: (sum(answer in answers for answer in dealt[side]), len(dealt[side])))
        for i in group:
            half[i], component[i] = name, number
            dealt[name].append(conflicts[i].sound_answer)
    return Halves(tuple(half), tuple(component), seed)


def standing(n_conflicts: Sequence[int], n_components: Sequence[int]) -> str:
    """Say what the size of the halves allows."""
    if min(n_conflicts) < FEWEST:
        return "refused"
    if min(n_conflicts) < FIRM_CONFLICTS or min(n_components) < FIRM_COMPONENTS:
        return "exploratory"
    return "firm"


def third_sources(
    sound_answers: Sequence[str], picture_answers: Sequence[str], *, ids: Sequence[str], seed: int
) -> np.ndarray:
    """Draw each conflict's third clip w: another conflict's sound source whose answer differs from both of its own."""
    drawn = np.full(len(ids), -1, dtype=np.int64)
    for i, name in enumerate(ids):
        known = {sound_answers[i], picture_answers[i]}
        others = [j for j in range(len(ids)) if j != i and sound_answers[j] not in known]
        if others:
            drawn[i] = min(others, key=lambda j: rank_hash(seed, f"{name}:w:{ids[j]}"))
    return drawn
