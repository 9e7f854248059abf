"""What is a set compared with? Random sets, matched by layer and by how much each member writes. Protocol section 8.

Of layers with more than `MOST_SUBSETS` subsets of a size so many are drawn. First edition: where no set of distinct
heads can be drawn, every pool grows by its next nearest heads within one layer.
"""

import math
from collections.abc import Callable, Sequence
from itertools import chain, combinations

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from av_lens.isolation.measuring.bench import Chunk, averaged
from av_lens.isolation.measuring.engine import MLP, Node

RANDOM_SETS = 200
NORM_FACTOR, NEAREST = 2.0, 3
FEWEST_SETS = 20
MOST_LISTED = 20_000
"""Sets of as many stand-ins as the members' pools hold are listed one by one up to so many, else drawn."""
MOST_SUBSETS = 300
WIDENINGS = (
    ("", NORM_FACTOR, 1.0),
    ("norms within a factor 4", 4.0, 1.0),
    ("two layers", 4.0, 2.0),
    ("any layer", 4.0, math.inf),
    ("any norm", math.inf, math.inf),
)
SUBSETS = "an MLP's subsets of one layer's heads"
Norms = Float[np.ndarray, "layer node"]
StandIn = tuple[Node, ...]
"""What takes a member's place: one node, or several heads in an MLP's."""
Joint = Callable[[], tuple[list[tuple[int, ...]], Float[np.ndarray, "layer subset"]]]


def random_sets(
    chunks: Sequence[Chunk], members: Sequence[Node], *, seed: int, n: int = RANDOM_SETS
) -> tuple[list[tuple[Node, ...]], str]:
    """Draw control sets, and say how far the pool was widened for them."""
    mlps = chunks[0].bench.mlps
    norms = averaged(chunks, "norms of z W_O", lambda one: one.bench.engine.write_norms(one.run("va"), mlps=mlps))
    if not mlps:
        return first_edition(members, norms, seed=seed, n=n)

    def joint() -> tuple[list[tuple[int, ...]], Float[np.ndarray, "layer subset"]]:
        subsets = subsets_of(chunks[0].bench.engine.n_heads)
        measured = averaged(
            chunks, "joint norms of heads", lambda one: one.bench.engine.joint_norms(one.run("va"), subsets)
        )
        return subsets, measured

    return matched_sets(members, norms, joint, seed=seed, n=n)


def matched_sets(
    members: Sequence[Node], norms: Norms, joint: Joint, *, seed: int, n: int = RANDOM_SETS
) -> tuple[list[tuple[Node, ...]], str]:
    """Draw control sets from what each node writes, its layer's MLP last; `joint` measures subsets where needed."""
    found: list[tuple[Node, ...]] = []
    where = ""
    for where, factor, away in WIDENINGS:
        found = _drawn([_pool(one, members, norms, factor, away) for one in members], seed=seed, n=n)
        if len(found) >= FEWEST_SETS:
            return found, where
    if any(head == MLP for _, head in members):
        subsets, measured, where = *joint(), SUBSETS
        pools = [_pool(one, members, norms, math.inf, math.inf) for one in members]
        for (layer, head), pool in zip(members, pools, strict=True):
            if head == MLP:
                pool += _alike(float(norms[layer, MLP]), members, subsets, measured)
        found = _drawn(pools, seed=seed, n=n)
    return found, where


def _pool(member: Node, members: Sequence[Node], norms: Norms, factor: float, away: float) -> list[StandIn]:
    heads = [MLP] if member[1] == MLP else range(norms.shape[1] - 1)
    layers = [layer for layer in range(len(norms)) if abs(layer - member[0]) <= away]
    near = [(layer, head) for layer in layers for head in heads if (layer, head) not in members]
    return [(one,) for one in near if _ratio(norms, one, member) <= math.log(factor)]


def _ratio(norms: Norms, one: Node, other: Node) -> float:
    return float(abs(np.log(max(norms[one], 1e-12) / max(norms[other], 1e-12))))


def subsets_of(n_heads: int) -> list[tuple[int, ...]]:
    """List the subsets of a layer's heads, of every size; of many a part, drawn."""
    rng, out = np.random.default_rng(0), list[tuple[int, ...]]()
    for size in range(1, n_heads + 1):
        if math.comb(n_heads, size) <= MOST_SUBSETS:
            out += combinations(range(n_heads), size)
        else:
            drawn = (tuple(sorted(rng.permutation(n_heads)[:size].tolist())) for _ in range(MOST_SUBSETS))
            out += dict.fromkeys(drawn)
    return out


def _alike(
    norm: float,
    members: Sequence[Node],
    subsets: Sequence[tuple[int, ...]],
    measured: Float[np.ndarray, "layer subset"],
) -> list[StandIn]:
    """Subsets of one layer's heads, of the size whose median joint norm is nearest an MLP's."""
    sizes = np.array([len(one) for one in subsets])
    of_size = {int(size): float(np.median(measured[:, sizes == size])) for size in np.unique(sizes)}
    best = min(of_size, key=lambda size: abs(of_size[size] - norm))
    layers = range(len(measured))
    listed = [tuple((layer, head) for head in one) for layer in layers for one in subsets if len(one) == best]
    return [one for one in listed if not set(one) & set(members)]


def _drawn(pools: Sequence[Sequence[StandIn]], *, seed: int, n: int) -> list[tuple[Node, ...]]:
    """All distinct sets where there are few, else n drawn ones."""
    if not pools or not all(pools):
        return []
    rng = np.random.default_rng(seed)
    every = sorted({one for pool in pools for one in pool})
    if math.comb(len(every), len(pools)) <= MOST_LISTED:
        listed = (one for one in combinations(every, len(pools)) if _disjoint(one) and _matched(one, pools))
        found = list(dict.fromkeys(_joined(one) for one in listed))
        return [found[i] for i in rng.permutation(len(found))[:n]] if len(found) > n else found
    drawn: dict[tuple[Node, ...], None] = {}
    for _ in range(100 * n):
        one = [pool[int(rng.integers(len(pool)))] for pool in pools]
        if _disjoint(one):
            drawn.setdefault(_joined(one))
        if len(drawn) == n:
            break
    return list(drawn)


def _joined(stand_ins: Sequence[StandIn]) -> tuple[Node, ...]:
    return tuple(sorted(chain(*stand_ins)))


def _disjoint(stand_ins: Sequence[StandIn]) -> bool:
    return len(set(chain(*stand_ins))) == sum(map(len, stand_ins))


def _matched(stand_ins: Sequence[StandIn], pools: Sequence[Sequence[StandIn]]) -> bool:
    allowed = csr_matrix(np.array([[one in pool for pool in pools] for one in stand_ins], dtype=np.int8))
    return bool((maximum_bipartite_matching(allowed, perm_type="column") >= 0).all())


def first_edition(
    members: Sequence[Node], norms: Norms, *, seed: int, n: int = RANDOM_SETS
) -> tuple[list[tuple[Node, ...]], str]:
    """Draw control sets as the first edition does."""

    def drawn(wider: int) -> list[tuple[Node, ...]]:
        pools: list[list[StandIn]] = []
        for member in members:
            layers = range(max(0, member[0] - 1), min(norms.shape[0], member[0] + 2))
            near = [(layer, head) for layer in layers for head in range(norms.shape[1])]
            near = sorted((one for one in near if one not in members), key=lambda one: _ratio(norms, one, member))
            within = sum(_ratio(norms, one, member) <= math.log(NORM_FACTOR) for one in near)
            pools.append([(one,) for one in near[: (within or NEAREST) + wider]])
        return _drawn(pools, seed=seed, n=n)

    found, wider, most = drawn(0), 0, 3 * norms.shape[1]
    while wider < most and (not found if not wider else len(found) < FEWEST_SETS):
        wider += 1
        found = drawn(wider)
    return found, f"the {wider} next nearest in norm" if wider and found else ""
