"""How are conflicts dealt to two halves that share no source, and what can a design show? Protocol section 7.

The deal depends on the sources, the ids and the seed alone, never on a model, so that two models are searched and
confirmed on the same halves.

Example:
    ```python
    design_of([Member("c0", "clip1", "clip2", "dog"), ...]).standing    # "firm", "exploratory" or "refused"
    ```
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from av_lens.errors import InputError
from av_lens.results.dyadic import Dyadic
from av_lens.results.provenance import linked
from av_lens.results.statistics import smallest_effect

DISCOVERY, CONFIRMATION, LOST = "discovery", "confirmation", "lost"
COMPONENTS, DYADIC = "components", "dyadic"
"""Rules of a deal, and of the inference that follows from it."""
LARGEST_SHARE, LARGEST_OF_A_HALF = 0.4, 0.1
FEWEST, FIRM_CONFLICTS, FIRM_COMPONENTS, FIRM_SOURCES = 20, 60, 20, 40
TESTS = 10_000
"""The family that a design is told for: what a model is searched by is not known yet."""
MORE_SOURCES = "Use more sources, or let `av-lens pairs` make disjoint conflicts of them (one a pair of clips)."


@dataclass(frozen=True)
class Member:
    """What dealing needs to know of a conflict; in the first edition the sources are the clips themselves."""

    id: str
    sound_clip: str
    picture_clip: str
    sound_answer: str
    question: str = ""

    @property
    def sources(self) -> tuple[str, str]:
        """The sound's source, the picture's."""
        return self.sound_clip, self.picture_clip


@dataclass(frozen=True)
class Halves:
    """Where every conflict went: `half` and `component` (-1 where lost), in the order that was given; by which rule."""

    half: tuple[str, ...]
    component: tuple[int, ...]
    seed: int
    rule: str = COMPONENTS

    @property
    def n_lost(self) -> int:
        """How many conflicts were given up to part the halves."""
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
        group = max(groups, key=len, default=[])
        # Three components are needed before all can be within 40%; nothing is left to part in a single conflict.
        if len(group) <= max(1, LARGEST_SHARE * len(edges)):
            return groups
        cut = bridges({number: edges[number] for number in group}) or set(group)
        del edges[min(cut, key=lambda number: order[number])]


def deal(conflicts: Sequence[Member], *, seed: int) -> Halves:
    """Deal conflicts to two halves that share no clip, as the first edition does."""
    order = _hashes(conflicts, seed)
    edges = {i: conflict.sources for i, conflict in enumerate(conflicts)}
    return _dealt(conflicts, _part_large_ones(edges, order), order, seed)


def _hashes(conflicts: Sequence[Member], seed: int) -> dict[int, str]:
    ids = [conflict.id for conflict in conflicts]
    if twice := next((name for name, times in Counter(ids).items() if times > 1), None):
        raise InputError(f"two conflicts have the id {twice!r}; ids order the deal and must differ. Give each its own.")
    return {i: rank_hash(seed, name) for i, name in enumerate(ids)}


def _dealt(conflicts: Sequence[Member], groups: list[list[int]], order: Mapping[int, str], seed: int) -> Halves:
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


def deal_sources(conflicts: Sequence[Member], *, seed: int) -> Halves:
    """Deal conflicts to two halves that share no source (protocol section 7)."""
    order = _hashes(conflicts, seed)
    edges = {i: conflict.sources for i, conflict in enumerate(conflicts)}
    whole = _dealt(conflicts, components(edges), order, seed)
    sizes = [Counter(whole.component[i] for i in whole.members(name)) for name in (DISCOVERY, CONFIRMATION)]
    if all(_apart(list(size.values())) for size in sizes):
        return whole
    first = grown_half(list(edges.values()), seed=seed)
    half = [
        LOST if (one in first) != (two in first) else DISCOVERY if one in first else CONFIRMATION
        for one, two in edges.values()
    ]
    kept = {i: edge for i, edge in edges.items() if half[i] != LOST}
    component = [-1] * len(conflicts)
    for number, group in enumerate(components(kept)):
        for i in group:
            component[i] = number
    return Halves(tuple(half), tuple(component), seed, DYADIC)


def _apart(sizes: Sequence[int]) -> bool:
    return len(sizes) >= FIRM_COMPONENTS and max(sizes) <= LARGEST_OF_A_HALF * sum(sizes)


def grown_half(edges: Sequence[tuple[str, str]], *, seed: int) -> set[str]:
    """Choose half of the sources, rounded down, so that few conflicts join them to the rest."""
    order = {name: rank_hash(seed, name) for edge in edges for name in edge}
    names = sorted(order, key=order.__getitem__)  # of equals the first is the one of smallest hash
    at = {name: number for number, name in enumerate(names)}
    between = np.zeros((len(names), len(names)))
    for one, two in edges:
        between[at[one], at[two]] += 1
        between[at[two], at[one]] += one != two
    inside = np.zeros(len(names), dtype=bool)
    in_all = between.sum(1)
    into = np.zeros(len(names))
    chosen = 0
    for _ in range(len(names) // 2):
        inside[chosen] = True
        into += between[chosen]
        chosen = int(np.lexsort((in_all, np.where(inside, np.inf, -into)))[0])
    _swap(inside, between)
    return {name for name, taken in zip(names, inside, strict=True) if taken}


def _swap(inside: Bool[np.ndarray, " source"], between: Float[np.ndarray, "source source"]) -> None:
    own = between - np.diag(np.diag(between))
    while True:
        side = np.where(inside, 1.0, -1.0)
        outward = -side * (own @ side)  # conflicts with the other side less those with the own
        ours, theirs = np.flatnonzero(inside), np.flatnonzero(~inside)
        saved = outward[ours][:, None] + outward[theirs] - 2 * own[np.ix_(ours, theirs)]
        if not saved.size or saved.max() <= 0:
            return
        one, two = divmod(int(saved.argmax()), len(theirs))
        inside[[ours[one], theirs[two]]] = False, True


def doubled(conflicts: Sequence[Member]) -> list[int]:
    """Find the conflicts that an earlier one makes superfluous: same pair of sources, either way, same question."""
    seen: set[tuple[frozenset[str], str]] = set()
    out: list[int] = []
    for i, one in enumerate(conflicts):
        key = (frozenset(one.sources), one.question)
        if key in seen:
            out.append(i)
        seen.add(key)
    return out


def standing(n_conflicts: Sequence[int], n_components: Sequence[int], *, n_sources: Sequence[int] | None = None) -> str:
    """Say what the size of the halves allows; sources are counted where the rule is dyadic."""
    if min(n_conflicts) < FEWEST:
        return "refused"
    few = min(n_components) < FIRM_COMPONENTS if n_sources is None else min(n_sources) < FIRM_SOURCES
    return "exploratory" if min(n_conflicts) < FIRM_CONFLICTS or few else "firm"


@dataclass(frozen=True)
class Design:
    """What conflicts can show, for each half; `smallest` is in standard deviations, infinite where none could pass."""

    n_conflicts: tuple[int, int]
    n_components: tuple[int, int]
    n_sources: tuple[int, int]
    n_across: int
    n_doubled: int
    rule: str
    standing: str
    smallest: float

    def sentence(self) -> str:
        """The design in words."""
        (one, two), (first, second), (some, others) = self.n_conflicts, self.n_sources, self.n_components
        left = [f"{self.n_across} across the halves"] * bool(self.n_across)
        left += [f"{self.n_doubled} doubled"] * bool(self.n_doubled)
        said = f"{one} and {two} conflicts of {first} and {second} sources in the halves"
        said += f" ({' and '.join(left)} left out)" if left else ""
        how = f"{some} and {others} components, which are resampled and flipped"
        how = how if self.rule == COMPONENTS else "sources are shared, inference is dyadic"
        means = {"firm": "enough for a verdict", "exploratory": "exploratory, no verdict", "refused": "too few"}
        mend = "" if self.standing == "firm" else f" {MORE_SOURCES}"
        finds = f"No effect, however large, could pass {TESTS:,} tests (some 900 heads)."
        if math.isfinite(self.smallest):
            finds = (
                f"Of {TESTS:,} tests (some 900 heads) one finds, four times in five, an effect that exceeds the "
                f"threshold by {self.smallest:.2f} standard deviations."
            )
        return f"{said}; {how}: {means[self.standing]}. {finds}{mend}"


def design_of(conflicts: Sequence[Member], *, seed: int = 0) -> Design:
    """Say what conflicts can show, if the model is competent in all of them.

    Args:
        conflicts: their ids, sources, sounds' answers and questions.
        seed: of the deal.

    Returns:
        The counts, the rule and the standing.

    Raises:
        InputError: two conflicts have one id.
    """
    twice = set(doubled(conflicts))
    kept = [one for i, one in enumerate(conflicts) if i not in twice]
    halves = deal_sources(kept, seed=seed)
    rows = [halves.members(name) for name in (DISCOVERY, CONFIRMATION)]
    n = (len(rows[0]), len(rows[1]))
    parts = [len({halves.component[i] for i in side}) for side in rows]
    sources = [len({name for i in side for name in kept[i].sources}) for side in rows]
    counted = (sources[0], sources[1]) if halves.rule == DYADIC else None
    stands = standing(n, parts, n_sources=counted)
    both = (parts[0], parts[1]), (sources[0], sources[1])
    shared = Dyadic.of([kept[i].sources for i in rows[0]]).smallest_effect(family=TESTS)
    smallest = shared if halves.rule == DYADIC else smallest_effect(parts[0], family=TESTS)
    return Design(n, *both, halves.n_lost, len(twice), halves.rule, stands, smallest)


def third_sources(
    sound_answers: Sequence[str], picture_answers: Sequence[str], *, ids: Sequence[str], seed: int
) -> np.ndarray:
    """Draw each conflict's third clip w: another conflict's sound source whose answer differs from both of its own."""
    drawn = np.full(len(ids), -1, dtype=np.int64)
    for i, name in enumerate(ids):
        known = {sound_answers[i], picture_answers[i]}
        others = [j for j, answer in enumerate(sound_answers) if j != i and answer not in known]
        if others:
            drawn[i] = min(others, key=lambda j: rank_hash(seed, f"{name}:w:{ids[j]}"))
    return drawn
