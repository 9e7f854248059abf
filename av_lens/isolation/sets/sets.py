"""Sets of heads edited together, and the sets that they are compared with.

* Random sets, at least 200, matched by layer: for each member a head outside the set within one layer whose mean norm
  of z W_O is within a factor 2 of the member's, else the 3 nearest in norm. Where fewer sets exist all are used.
* As many top heads for `see`: those whose zeroing most lowers score(picture's answer) - score(sound's) under `see`,
  mirrored like every effect.
* Cumulative edits: the first member, the first two, ... in the order in which the search took them in.

How sets are found is `set_search`; how they are confirmed, `set_confirmation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.donors import MIRROR
from av_lens.isolation.measuring.effects import edited_readings, measure_requests, mirrored
from av_lens.isolation.measuring.estimands import Request
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.recordings import Head
from av_lens.isolation.measuring.scoring import UNREAD
from av_lens.isolation.naming.role_tests import head_means

RANDOM_SETS = 200
NORM_FACTOR, NEAREST = 2.0, 3
FEWEST_SETS = 20
MOST_LISTED = 20_000
"""Sets of as many heads as the members' pools hold are listed one by one up to so many, else drawn."""


@dataclass(frozen=True, eq=False)
class SetEffect:
    """What editing sets together does, per set and example: the effect on C, and which answer `va` then gets."""

    release: Float[np.ndarray, "set example"]
    says_sound: Float[np.ndarray, "set example"]
    says_picture: Float[np.ndarray, "set example"]


def release_of_sets(
    chunks: Sequence[Chunk],
    sets: Sequence[Sequence[Head]],
    donors: Sequence[str],
    examples: Int[np.ndarray, " example"],
    stage: str = "",
) -> SetEffect:
    """Edit sets together in `va` and `av`, each by its donor, and measure the release."""
    depends = {"sets": [list(one) for one in sets], "donors": list(donors)}
    compute = partial(_chunk_release, sets=sets, donors=donors)
    found = gathered(chunks, examples, "sets", depends, compute, stage)
    return SetEffect(**{name: np.ascontiguousarray(values.T) for name, values in found.items()})


def _chunk_release(chunk: Chunk, sets: Sequence[Sequence[Head]], donors: Sequence[str]) -> dict[str, np.ndarray]:
    """Edit the sets in `va` and `av` of one stack: `[batch, set]` of each figure."""
    candidates, changes = chunk.bench.candidates, list[np.ndarray]()
    out: dict[str, np.ndarray] = {}
    for base in ("va", MIRROR["va"]):
        read = edited_readings(chunk, base, sets, donors)
        scores, top = np.stack([one.scores for one in read]), np.stack([one.top for one in read])
        changes.append(candidates.margin(scores, chunk.examples) - chunk.margin(base))
        if base == "va":
            for answer in ("sound", "picture"):
                # An edit that this conflict lacks (a mean that leaves every other conflict out) says nothing.
                said = top == getattr(candidates, answer)[chunk.examples]
                out[f"says_{answer}"] = np.where(top == UNREAD, np.nan, said).T
    return {"release": mirrored(changes[0], changes[1]).T, **out}


def top_see_heads(chunks: Sequence[Chunk], n: int) -> list[Head]:
    """Find the heads that `see` needs most, by zeroing each: those whose zeroing moves M towards the sound's answer."""
    heads = chunks[0].bench.engine.heads
    zeroed = Request("va", "zero", question="see")
    examples = np.concatenate([chunk.examples for chunk in chunks])
    found = measure_requests(chunks, [zeroed], heads=heads, examples=examples)
    mean = head_means(found[zeroed].margin).ravel()
    return [heads[j] for j in np.argsort(-mean, kind="stable")[:n]]


def random_sets(
    members: Sequence[Head], norms: Float[np.ndarray, "layer head"], *, seed: int, n: int = RANDOM_SETS
) -> tuple[list[tuple[Head, ...]], int]:
    """Draw control sets matched to a set by layer and by how much each member writes.

    Where members share so few matching heads that no set of distinct heads can be drawn, each member's pool is widened
    by its next nearest heads within one layer, one at a time, until there are 20 sets (so that p can fall below .05) or
    no more heads.
    """
    found = _drawn(_pools(members, norms, 0), seed=seed, n=n)
    wider, most = 0, 3 * norms.shape[1]
    while wider < most and (not found if not wider else len(found) < FEWEST_SETS):
        wider += 1
        found = _drawn(_pools(members, norms, wider), seed=seed, n=n)
    return found, wider if found else 0


def _pools(members: Sequence[Head], norms: np.ndarray, wider: int) -> list[list[Head]]:
    """Each member's candidates: within one layer and a factor 2 in norm, else the 3 nearest; and some more."""
    pools: list[list[Head]] = []
    for layer, head in members:
        near = [
            (other_layer, other)
            for other_layer in range(max(0, layer - 1), min(norms.shape[0], layer + 2))
            for other in range(norms.shape[1])
            if (other_layer, other) not in members
        ]
        ratio = {h: abs(np.log(max(norms[h], 1e-12) / max(norms[layer, head], 1e-12))) for h in near}
        near.sort(key=lambda h: ratio[h])
        within = sum(ratio[h] <= np.log(NORM_FACTOR) for h in near)
        pools.append(near[: (within or NEAREST) + wider])
    return pools


def _drawn(pools: Sequence[Sequence[Head]], *, seed: int, n: int) -> list[tuple[Head, ...]]:
    """All distinct sets where there are few, else n drawn ones."""
    if not pools or not all(pools):
        return []
    rng = np.random.default_rng(seed)
    heads = sorted({head for pool in pools for head in pool})
    if math.comb(len(heads), len(pools)) <= MOST_LISTED:
        found = [one for one in combinations(heads, len(pools)) if _matched(one, pools)]
        return [found[i] for i in rng.permutation(len(found))[:n]] if len(found) > n else found
    drawn: dict[tuple[Head, ...], None] = {}
    for _ in range(100 * n):
        one = tuple(pool[int(rng.integers(len(pool)))] for pool in pools)
        if len(set(one)) == len(one):
            drawn.setdefault(tuple(sorted(one)))
        if len(drawn) == n:
            break
    return list(drawn)


def _matched(heads: Sequence[Head], pools: Sequence[Sequence[Head]]) -> bool:
    """Whether every member can have one of these heads from its own pool."""
    allowed = csr_matrix(np.array([[head in pool for pool in pools] for head in heads], dtype=np.int8))
    return bool((maximum_bipartite_matching(allowed, perm_type="column") >= 0).all())


def cumulative(members: Sequence[Head]) -> list[tuple[Head, ...]]:
    """List a set's beginnings: the first member, the first two, ..."""
    return [tuple(members[: k + 1]) for k in range(len(members))]


def doubling(n: int) -> list[int]:
    """List 1, 2, 4, ... up to n, n included."""
    sizes = [2**k for k in range(n.bit_length()) if 2**k < n]
    return [*sizes, n] if n else []


@dataclass(eq=False)
class BuiltSet:
    """A set built on discovery: members in the order of the search, donor, release there, the start that led to it."""

    members: tuple[Head, ...]
    donor: str
    discovery_release: float
    screen: str = ""
    chosen: bool = False
    random: list[tuple[Head, ...]] = field(default_factory=list)
    widened: int = 0

    @property
    def name(self) -> str:
        """What the set is called in the tables."""
        return f"searched set ({self.donor})"

    @property
    def names(self) -> str:
        """The members as words."""
        return head_names(self.members)


def head_names(heads: Sequence[Head]) -> str:
    """Write heads as words."""
    return " ".join(f"L{layer}H{head}" for layer, head in heads)


def curve_row(
    arm: str, members: Sequence[Head], donor: str, effect: SetEffect, row: int, draw: int, half: Half
) -> dict[str, Any]:
    """Write one row of the ablation table."""
    release = effect.release[row]
    out: dict[str, Any] = {"arm": arm, "k": len(members), "draw": draw, "members": head_names(members), "donor": donor}
    out |= {name: float(np.nanmean(getattr(effect, name)[row])) for name in ("says_sound", "says_picture")}
    bounds, share = half.boot.mean(release), half.shares(release)
    out |= {"low": float(bounds.low), "high": float(bounds.high), "share": float(share.value)}
    return out | {"release": float(np.nanmean(release))}
