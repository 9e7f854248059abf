"""Two people agree on sections 6 and 8: synergies, the search for a set, random sets, captions by word lists.

Sets are searched on games whose every release is drawn; `plain_sets` was written from the protocol's text.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from plain_forward import MLP
from plain_sets import best_set, judged, names, p_random, place, random_sets, rank_correlation, synergies
from scipy import stats

from av_lens.isolation.sets.matching import matched_sets, subsets_of
from av_lens.isolation.sets.search import pair_synergies, search
from av_lens.isolation.sets.sets import SetReleases
from av_lens.results.events import Lexicon

DELTA = 1.0


class Game(SetReleases):
    """Releases as a function of which nodes are edited."""

    def __init__(self, rule):
        self.rule = rule

    def mean(self, members):
        return float(self.rule(frozenset(members)))

    def added(self, members, heads):
        return [self.mean((*members, head)) for head in heads]

    def measure(self, sets):
        pass


def drawn_game(seed, nodes):
    """A sum, pairs that need each other, pairs of which one is enough, and a group that only works whole."""
    rng = np.random.default_rng(seed)
    alone = dict(zip(nodes, rng.choice([0.0, 0.2, 0.4, 0.8, 1.5, 3.0], size=len(nodes)), strict=True))
    pairs = list(itertools.combinations(nodes, 2))
    drawn = [pairs[i] for i in rng.choice(len(pairs), size=6, replace=False)]
    worth = rng.uniform(-2, 5, size=6)
    group = [nodes[i] for i in rng.choice(len(nodes), size=4, replace=False)]
    noise = np.random.default_rng(seed + 100)
    kept = {}

    def rule(members):
        if members not in kept:
            found = sum(alone[node] for node in sorted(members))
            found += sum(x for x, pair in zip(worth, drawn, strict=True) if set(pair) <= members)
            found += (0, 0.1, 0.3, 1.0, 8.0)[len(members & set(group))]
            kept[members] = found + noise.normal(0, 0.01)
        return kept[members]

    return rule


def theirs_of(node):
    return node[0], -1 if node[1] == MLP else node[1]


NODES = [(layer, which) for layer in range(3) for which in (0, 1, 2, MLP)]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_search_for_a_set(seed, quick):
    rule = drawn_game(seed, [theirs_of(node) for node in NODES])
    game, candidates = Game(rule), [theirs_of(node) for node in NODES]

    def release(members):
        return float(rule(frozenset(theirs_of(node) for node in members)))

    pairs = [] if quick else pair_synergies(game, candidates)
    winner, _ = search(game, candidates, pairs, delta=DELTA)
    ours = best_set(release, NODES, DELTA, pairs=not quick)
    assert {theirs_of(node) for node in ours} == set(winner.members)
    assert release(ours) == pytest.approx(winner.release)
    if not quick:
        mine = synergies(release, NODES)
        found = {frozenset(one.pair): one.synergy for one in pairs}
        assert {frozenset(map(theirs_of, pair)): value for value, pair in mine} == pytest.approx(found)


def test_games_need_pairs():
    """What the agreement is about: pairs find what the best head alone does not, in some draw."""
    different = 0
    for seed in range(24):
        rule = drawn_game(seed, [theirs_of(node) for node in NODES])
        found = [
            best_set(lambda m, r=rule: r(frozenset(map(theirs_of, m))), NODES, DELTA, pairs=p) for p in (True, False)
        ]
        different += set(found[0]) != set(found[1])
    assert different > 1


def norms_drawn(seed, layers, heads, spread):
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(0, spread, (layers, heads + 1)))


def joint_of(layers, heads, seed):
    """Subsets of a layer's heads, and their joint norms: growing with their size."""
    rng = np.random.default_rng(seed)
    listed = [one for size in range(1, heads + 1) for one in itertools.combinations(range(heads), size)]
    return listed, np.array([[len(one) * 0.5 + rng.uniform(0, 0.1) for one in listed] for _ in range(layers)])


def test_all_subsets_of_a_layer():
    assert sorted(subsets_of(4)) == sorted(joint_of(1, 4, 0)[0])


@pytest.mark.parametrize(
    ("layers", "heads", "spread", "members"),
    [
        (3, 8, 0.3, [(1, 2), (1, 3)]),
        (6, 4, 0.9, [(2, 0), (3, 1)]),
        (8, 2, 1.5, [(0, 0), (7, 1)]),
        (8, 1, 0.8, [(4, 0)]),
        (6, 3, 2.5, [(3, 0)]),
        (3, 4, 0.5, [(1, MLP)]),
        (3, 4, 0.5, [(1, MLP), (0, 2)]),
        (12, 3, 0.5, [(4, MLP), (5, MLP)]),
    ],
)
def test_random_sets(layers, heads, spread, members):
    steps = set()
    for seed in range(3):
        table = norms_drawn(seed, layers, heads, spread)
        norms = {
            (layer, MLP if head == heads else head): table[layer, head]
            for layer in range(layers)
            for head in range(heads + 1)
        }
        drawn = joint_of(layers, heads, seed)
        joint = {
            frozenset((layer, head) for head in one): drawn[1][layer, i]
            for layer in range(layers)
            for i, one in enumerate(drawn[0])
        }
        ours, step = random_sets(tuple(members), norms, joint)
        theirs, widened = matched_sets([theirs_of(one) for one in members], table, lambda d=drawn: d, seed=0)
        mine = {frozenset(map(theirs_of, one)) for one in ours}
        found = set(map(frozenset, theirs))
        assert found <= mine
        assert len(found) == min(200, len(mine))
        assert (widened == "") == (step == 0)
        steps.add(step)
    assert steps


def test_the_p_of_a_set():
    assert p_random(3.0, [1.0, 2.0, 4.0]) == 0.5
    assert p_random(3.0, [1.0] * 19) == 0.05


LISTS = {
    "dog": ("dog", "dogs", "barking"),
    "church bell": ("church bell", "bell", "tolling"),
    "cat": ("cat", "meow"),
    "train": ("train", "steam whistle"),
}


@pytest.mark.parametrize(
    "caption",
    [
        "A dog is barking while a cat sleeps.",
        "Hotdogs, a category of catastrophe.",
        "Church bells? No: a Church-bell tolling!",
        "The steam of a whistle; then a steam whistle.",
        "MEOW",
        "",
        "A train's steam whistle, and bell.",
    ],
)
def test_captions_by_word_lists(caption):
    lexicon = Lexicon(tuple(LISTS.items()))
    found = {match.event for match in lexicon.found(caption)}
    assert found == {answer for answer, words in LISTS.items() if names(caption, words)}
    said = judged(caption, "dog", "cat", LISTS)
    assert said == {"heard": "dog" in found, "seen": "cat" in found, "hallucinated": bool(found - {"dog", "cat"})}


def test_rank_correlation():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 20).tolist(), rng.integers(0, 6, 20).tolist()
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isclose(rank_correlation(x, x), 1.0)


def test_order_of_nodes():
    assert sorted(reversed(NODES), key=place) == NODES
