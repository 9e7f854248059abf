"""Sections 6 and 8 of the protocol, sets and their controls, written a second time from the text.

`release` is whatever gives the mean release of a set of nodes by one donor, in any order.

Read out of the text where it leaves a choice: of equals the first by layer and head is added, the last taken out; after
twelve heads nothing is dropped but by the backward steps; the pools of random sets widen step upon step.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from plain_forward import MLP, Node

Members = tuple[Node, ...]
Release = Callable[[Members], float]
PATIENCE, MOST = 3, 12


def place(node: Node) -> tuple[int, float]:
    """By layer and head; a layer's MLP comes after its heads."""
    return node[0], math.inf if node[1] == MLP else float(node[1])


# Section 6.


def synergies(release: Release, candidates: Sequence[Node]) -> list[tuple[float, Members]]:
    """Every pair's synergy, the largest first."""
    found = []
    for pair in itertools.combinations(sorted(candidates, key=place), 2):
        alone = [max(0.0, release((node,))) for node in pair]
        found.append((release(pair) - sum(alone), pair))
    return sorted(found, key=lambda one: (-one[0], [place(node) for node in one[1]]))


def forward(release: Release, candidates: Sequence[Node], start: Members, delta: float) -> Members:
    """Add the largest gain; stop after three gains in a row below delta, which are dropped, or at twelve."""
    members, small = start, 0
    while len(members) < MOST and small < PATIENCE:
        rest = [node for node in sorted(candidates, key=place) if node not in members]
        if not rest:
            break
        best = max(rest, key=lambda node: release((*members, node)))
        gain = release((*members, best)) - release(members)
        members, small = (*members, best), small + 1 if gain < delta else 0
    return members[:-PATIENCE] if small == PATIENCE else members


def backward(release: Release, members: Members, delta: float) -> Members:
    """Take out the cheapest while it costs less than delta."""
    while members:

        def cost(node: Node, members: Members = members) -> float:
            return release(members) - (release(without(members, node)) if len(members) > 1 else 0.0)

        cheapest = min(sorted(members, key=place, reverse=True), key=cost)
        if cost(cheapest) >= delta:
            break
        members = without(members, cheapest)
    return members


def without(members: Members, node: Node) -> Members:
    """A set less one of its members."""
    return tuple(one for one in members if one != node)


def best_set(release: Release, candidates: Sequence[Node], delta: float, *, pairs: bool = True) -> Members:
    """From the best head and from the five best synergies; the set of largest release wins."""
    starts = [(max(sorted(candidates, key=place), key=lambda node: release((node,))),)]
    if pairs:
        starts += [pair for _, pair in synergies(release, candidates)[:5]]
    built = [backward(release, forward(release, candidates, start, delta), delta) for start in starts]
    return min(built, key=lambda one: (-release(one) if one else 0.0, sorted(place(node) for node in one)))


# Section 8: random sets.

WIDENINGS = ((2.0, 1), (4.0, 1), (4.0, 2), (4.0, math.inf), (math.inf, math.inf))
"""How far a norm (a factor) and a layer may be off."""


def pool(
    member: Node, members: Members, norms: Mapping[Node, float], factor: float, layers: float
) -> list[frozenset[Node]]:
    """The heads (for an MLP: the MLPs) outside the set that match a member."""
    return [
        frozenset([node])
        for node in norms
        if node not in members
        and (node[1] == MLP) == (member[1] == MLP)
        and abs(node[0] - member[0]) <= layers
        and norms[member] / factor <= norms[node] <= norms[member] * factor
    ]


def subsets(norm: float, members: Members, joint: Mapping[frozenset[Node], float]) -> list[frozenset[Node]]:
    """Subsets of one layer's heads, of the size whose median joint norm is nearest an MLP's."""
    sizes = {len(one) for one in joint}
    middle = {size: float(np.median([x for one, x in joint.items() if len(one) == size])) for size in sizes}
    best = min(sorted(sizes), key=lambda size: abs(middle[size] - norm))
    return [one for one in joint if len(one) == best and not one & set(members)]


def random_sets(
    members: Members, norms: Mapping[Node, float], joint: Mapping[frozenset[Node], float], *, fewest: int = 20
) -> tuple[set[frozenset[Node]], int]:
    """All sets with a match of its own for each member, and how often the pools had to be widened.

    `joint` are the norms of subsets of one layer's heads.
    """
    found: set[frozenset[Node]] = set()
    for step, (factor, layers) in enumerate(WIDENINGS):
        pools = [pool(member, members, norms, factor, layers) for member in members]
        found = all_of(pools)
        if len(found) >= fewest:
            return found, step
    if any(which == MLP for _, which in members):
        pools = [
            matches + (subsets(norms[member], members, joint) if member[1] == MLP else [])
            for member, matches in zip(members, pools, strict=True)
        ]
        return all_of(pools), len(WIDENINGS)
    return found, len(WIDENINGS) - 1


def all_of(pools: Sequence[Sequence[frozenset[Node]]]) -> set[frozenset[Node]]:
    """Every set that takes one of each pool, none of them twice."""
    chosen = itertools.product(*pools)
    return {frozenset().union(*one) for one in chosen if len(frozenset().union(*one)) == sum(map(len, one))}


def p_random(release: float, random: Sequence[float]) -> float:
    """(1 + k) / (1 + N), k the random sets that release as much."""
    return (1 + sum(one >= release - 1e-9 for one in random)) / (1 + len(random))


# Section 8: captions.


def names(caption: str, words: Sequence[str]) -> bool:
    """Whether a caption says one of the words, as whole words, in any case."""
    said = re.findall(r"[a-z0-9']+", caption.lower())
    wanted = [re.findall(r"[a-z0-9']+", word.lower()) for word in words]
    return any(said[i : i + len(one)] == one for one in wanted for i in range(len(said)))


def judged(caption: str, sounds: str, shows: str, lists: Mapping[str, Sequence[str]]) -> dict[str, bool]:
    """Heard, seen, hallucinated: by the word lists of the sounding answer, of the shown one, of any other."""
    said = {answer for answer, words in lists.items() if names(caption, words)}
    return {"heard": sounds in said, "seen": shows in said, "hallucinated": bool(said - {sounds, shows})}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(b < a for b in values) + 0.5 * sum(b == a for b in values) for a in values]

    one, two = ranks(x), ranks(y)
    mean = len(x) / 2
    cross = sum((a - mean) * (b - mean) for a, b in zip(one, two, strict=True))
    return cross / math.sqrt(sum((a - mean) ** 2 for a in one) * sum((b - mean) ** 2 for b in two))
