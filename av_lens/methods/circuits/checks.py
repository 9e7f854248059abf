"""Is a circuit complete, is every member needed, is it the same on other conflicts, and would a random one do as well?

Each check is a table; f is the share of m(whole) - m(empty) (`results.faithfulness`).

    completeness  |f(C without K) - f(model without K)| is small for every set K of members: what is taken from the
                  circuit is missed as it is in the model. K: none, all members, and random halves of them
    minimality    each member v has a K for which f(C without K) - f(C without K and v) is large
    links         for two members, f(C) - f(C without u) - f(C without v) + f(C without both): what one adds beside the
                  other less what it adds without it. They need each other where together they add more in size beside
                  each other (they act through one another), else they stand in for each other
    random        the nodes of each layer change places at random (heads with heads), so that a random order takes as
                  many nodes from every layer as the scores' own
    stability     the ranking is made anew from resampled conflicts; Jaccard = shared / either

Source: completeness and minimality: Wang et al. (2022), who search for the worst K; here K is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float

from av_lens.methods.circuits.runs import CircuitRuns
from av_lens.methods.circuits.terms import Nodes
from av_lens.results.faithfulness import Scale
from av_lens.results.statistics import Bootstrap

RESAMPLED = 500
TIE = 1e-5
ROUNDING = 1e-6
COMPLETENESS = ("removed", "size", "circuit", "model", "difference", "low", "high")
LINKS = ("first", "second", "interaction", "low", "high", "how")
NEED, STAND_IN = "need each other", "stand in for each other"
MOST_LINKED = 24
MINIMALITY = ("node", "adds", "low", "high", "removed", "needed")


def drawn_subsets(members: Sequence[int], n: int, seed: int) -> list[frozenset[int]]:
    """Draw sets of members, each member with probability a half: all different, none of them empty or whole."""
    rng = np.random.default_rng(seed)
    found: dict[frozenset[int], None] = {}
    for _ in range(20 * n):
        chosen = frozenset(int(node) for node in np.asarray(members)[rng.random(len(members)) < 0.5])
        if 0 < len(chosen) < len(members) and len(found) < n:
            found.setdefault(chosen)
    return list(found)


def completeness(
    runs: CircuitRuns, scale: Scale, empty: str, members: Sequence[int], subsets: Sequence[frozenset[int]]
) -> pd.DataFrame:
    """Take sets of members from the circuit and from the model."""
    if not scale.usable:
        return pd.DataFrame(columns=pd.Index(COMPLETENESS))
    circuit, model = frozenset(members), runs.nodes.all
    listed = [frozenset[int](), circuit, *subsets]
    both = [base - removed for removed in listed for base in (circuit, model)]
    found = runs.measure(empty, both, stage="completeness").reshape(len(listed), 2, -1)
    difference = scale.ratio(found[:, 0] - found[:, 1])
    return pd.DataFrame(
        {
            "removed": [_words(runs.nodes, removed, members) for removed in listed],
            "size": [len(removed) for removed in listed],
            "circuit": scale.share(found[:, 0]).value,
            "model": scale.share(found[:, 1]).value,
            "difference": difference.value,
            "low": difference.low,
            "high": difference.high,
        }
    )


def minimality(
    runs: CircuitRuns, scale: Scale, empty: str, members: Sequence[int], subsets: Sequence[frozenset[int]]
) -> pd.DataFrame:
    """Find beside which removed set each member adds most."""
    if not scale.usable:
        return pd.DataFrame(columns=pd.Index(MINIMALITY))
    circuit = frozenset(members)
    listed = [frozenset[int](), *subsets]
    pairs = [(circuit - removed, circuit - removed - {node}) for node in members for removed in listed]
    found = runs.measure(empty, [one for pair in pairs for one in pair], stage="minimality")
    found = found.reshape(len(members), len(listed), 2, -1)
    rows: list[tuple[str, float, float, float, str, str]] = []
    for node, changes in zip(members, found[:, :, 0] - found[:, :, 1], strict=True):
        adds = scale.ratio(changes)
        best = int(np.argmax(np.nan_to_num(np.abs(adds.value), nan=-1.0)))
        low, high = float(adds.low[best]), float(adds.high[best])
        needed = "untested" if np.isnan(low) else "no" if low <= 0 <= high else "yes"
        removed = _words(runs.nodes, listed[best] - {node}, members)
        rows.append((runs.nodes.names[node], float(adds.value[best]), low, high, removed, needed))
    return pd.DataFrame(rows, columns=pd.Index(MINIMALITY))


def links(runs: CircuitRuns, scale: Scale, empty: str, members: Sequence[int]) -> pd.DataFrame:
    """Measure how every two members of a circuit act together; none where there are too many of them."""
    pairs = list(combinations(sorted(members), 2))
    if not scale.usable or not pairs or len(members) > MOST_LINKED:
        return pd.DataFrame(columns=pd.Index(LINKS))
    circuit = frozenset(members)
    wanted = [circuit - set(gone) for one, two in pairs for gone in ((), (one,), (two,), (one, two))]
    found = runs.measure(empty, wanted, stage="links").reshape(len(pairs), 4, -1)
    interaction = scale.ratio(found[:, 0] - found[:, 1] - found[:, 2] + found[:, 3])
    both, neither_one, neither_two, none = (scale.share(found[:, i]).value for i in range(4))
    beside = np.abs(both - neither_one) + np.abs(both - neither_two)
    alone = np.abs(neither_two - none) + np.abs(neither_one - none)
    names = runs.nodes.names
    return pd.DataFrame(
        {
            "first": [names[one] for one, _ in pairs],
            "second": [names[two] for _, two in pairs],
            "interaction": interaction.value,
            "low": interaction.low,
            "high": interaction.high,
            "how": np.where(beside + ROUNDING >= alone, NEED, STAND_IN),
        }
    )


def shuffled_orders(nodes: Nodes, order: Sequence[int], n: int, seed: int) -> list[list[int]]:
    """Let the nodes of each layer change places in an order, heads with heads."""
    rng = np.random.default_rng(seed)
    found: list[list[int]] = []
    for _ in range(n):
        other = np.arange(len(nodes))
        for group in nodes.within_layers():
            other[group] = rng.permutation(group)
        found.append([int(other[node]) for node in order])
    return found


def stability(
    scores: Float[np.ndarray, "example node"], boot: Bootstrap, order: str, sizes: Sequence[int]
) -> tuple[pd.DataFrame, Float[np.ndarray, "size node"]]:
    """Rank the nodes anew on resampled examples: overlap of the k first, and how often each node is among them."""
    overlap = np.full((len(sizes), 3), np.nan)
    share = np.full((len(sizes), scores.shape[1]), np.nan)
    if len(scores) >= 2 and len(scores) == boot.weights.shape[1]:
        weights = boot.weights[:RESAMPLED]
        whole = places(scores.mean(0), order)
        drawn = np.stack([places(row @ scores, order) for row in weights[weights.sum(1) > 0]])
        for i, k in enumerate(sizes):
            first = drawn < k
            shared = (first & (whole < k)).sum(1)
            jaccard = shared / (2 * k - shared)
            share[i] = first.mean(0)
            overlap[i] = (jaccard.mean(), *np.percentile(jaccard, [2.5, 97.5]))
    columns = dict(zip(("jaccard", "low", "high"), overlap.T, strict=True))
    return pd.DataFrame({"k": list(sizes), **columns}), share


def places(mean: Float[np.ndarray, " node"], order: str) -> Float[np.ndarray, " node"]:
    """Rank nodes by signed mean or by size, 0 for the best; ties stay in the nodes' own order."""
    key = np.abs(mean) if order == "magnitude" else mean
    found, unit = np.empty(len(mean)), TIE * float(np.abs(mean).max(initial=0.0)) or 1.0
    found[np.argsort(-np.round(key / unit), kind="stable")] = np.arange(len(mean))
    return found


def _words(nodes: Nodes, chosen: frozenset[int], members: Sequence[int]) -> str:
    if not chosen:
        return "none"
    return "all" if len(chosen) == len(members) else " ".join(nodes.names[node] for node in members if node in chosen)
