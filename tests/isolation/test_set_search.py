"""The search for sets on games whose every release is written down: redundancy, patience, backward steps, ties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from av_lens.isolation.measuring.engine import MLP, listed_nodes
from av_lens.isolation.sets.confirmation import between
from av_lens.isolation.sets.search import climb, pair_synergies, screened, search, thin
from av_lens.isolation.sets.sets import SetReleases

GAP, DELTA = 20.0, 1.0  # delta = .1 G, with G = 10


class Game(SetReleases):
    """Releases as a function of which heads are edited."""

    def __init__(self, rule):
        self.rule, self.asked = rule, set()

    def mean(self, members):
        self.asked.add(frozenset(members))
        return float(self.rule(frozenset(members)))

    def added(self, members, heads):
        return [self.mean((*members, head)) for head in heads]

    def measure(self, sets):
        for one in sets:
            self.mean(one)


def heads(n, layer=0):
    return [(layer, head) for head in range(n)]


def additive(weights):
    return Game(lambda members: sum(weights.get(head, 0.0) for head in members))


def found(game, candidates, *, quick=False, delta=DELTA):
    synergies = [] if quick else pair_synergies(game, candidates)
    return search(game, candidates, synergies, delta=delta)


def test_a_sum_is_climbed_largest_first_and_three_small_gains_in_a_row_are_dropped():
    weights = dict(zip(heads(8), [0.9, 6, 0.3, 3, 0.8, 2, -4, 0.7], strict=True))
    members, steps = climb(additive(weights), heads(8), ((0, 1),), delta=DELTA)
    assert members == ((0, 1), (0, 3), (0, 5))
    actions = [(step.action, step.head[1], round(step.gain, 9)) for step in steps]
    assert actions[:6] == [("start", 1, 6), ("add", 3, 3), ("add", 5, 2), ("add", 0, 0.9), ("add", 4, 0.8),
                           ("add", 7, 0.7)]  # fmt: skip
    assert [(action, head) for action, head, _ in actions[6:]] == [("drop", 7), ("drop", 4), ("drop", 0)]
    assert [step.release for step in steps] == pytest.approx([6, 9, 11, 11.9, 12.7, 13.4, 11, 11, 11])


def test_two_small_gains_before_a_large_one_do_not_stop_the_climb():
    # A planted OR of two pairs of writers; steps of .05 .10 .23 .82 of the gap, the first two made smaller still.
    total = [0.0, 0.04, 0.08, 0.12, 1.20]
    writers = {(5, 4), (5, 5), (6, 2), (6, 3)}
    game = Game(lambda members: GAP * total[len(members & writers)])
    candidates = [*heads(3), *sorted(writers)]
    winner, paths = found(game, candidates)
    assert set(winner.members) == writers
    assert winner.release == pytest.approx(24)
    alone = next(path for path in paths if path.start.startswith("best head"))
    assert [round(step.gain, 6) for step in alone.steps if step.action == "add"][:3] == [0.8, 0.8, 21.6]


def test_the_prototypes_writers_are_found_whole():
    total = [0.0, 0.05, 0.15, 0.38, 1.20]
    writers = {(5, 4), (5, 5), (6, 2), (6, 3)}
    game = Game(lambda members: GAP * total[len(members & writers)])
    winner, _ = found(game, [*heads(6), *sorted(writers)], quick=True)
    assert set(winner.members) == writers


GATES, OTHERS = {(3, 0), (3, 1)}, {(3, 4), (3, 5)}
MEDIATORS = [(6, head) for head in range(5)]


def gates(members):
    """Two pairs of gates, each pair enough alone; mediators that climb slowly, .03 of the gap each, the first .045."""
    one, two = len(members & GATES), len(members & OTHERS)
    opened = 1.0 if one + two == 4 else 0.4 if one + two == 3 else 0.1 if one and two else 0.0
    climbed = 0.03 * len(members & set(MEDIATORS)) + (0.015 if MEDIATORS[0] in members else 0.0)
    return GAP * max(opened, climbed)


def test_redundant_gates_are_found_by_synergy_and_not_without_it():
    candidates = [*MEDIATORS, *GATES, *OTHERS, *heads(8)]
    game = Game(gates)
    assert all(gates(frozenset({gate})) == 0 for gate in GATES | OTHERS)
    synergies = pair_synergies(game, candidates)
    assert {synergies[0].pair, *(one.pair for one in synergies[1:4])} == set(itertools.product(GATES, OTHERS))
    assert synergies[0].synergy == pytest.approx(2)
    winner, paths = found(game, candidates)
    assert set(winner.members) == GATES | OTHERS
    assert winner.release == pytest.approx(20)
    assert winner.start == "synergy L3H0 L3H4"
    assert len(paths) == 6
    blind, _ = found(Game(gates), candidates, quick=True)
    assert not set(blind.members) & (GATES | OTHERS)


def test_what_the_rest_has_made_useless_is_taken_out_again():
    def rule(members):  # (0, 0) does 3 alone, and nothing where (0, 1) and (0, 2) are edited
        pair = {(0, 1), (0, 2)} <= members
        return 5.0 if pair else 3.0 * ((0, 0) in members) + 1.5 * ((0, 1) in members)

    members, steps = thin(Game(rule), ((0, 0), (0, 1), (0, 2)), delta=DELTA)
    assert members == ((0, 1), (0, 2))
    assert [(step.action, step.head, step.release) for step in steps] == [("take out", (0, 0), 5.0)]
    winner, _ = found(Game(rule), heads(4))
    assert set(winner.members) == {(0, 1), (0, 2)}


def test_costs_are_measured_again_after_each_head_is_taken_out():
    # Either of two stands in for the other: each costs nothing while both are in, and the last costs everything.
    game = Game(lambda members: 8.0 * bool(members & {(0, 0), (0, 1)}))
    members, steps = thin(game, ((0, 0), (0, 1)), delta=DELTA)
    assert members == ((0, 0),)
    assert len(steps) == 1


def test_nothing_that_releases_less_than_delta_is_a_set():
    winner, paths = found(additive({(0, 0): 0.9, (0, 1): 0.2}), heads(6))
    assert winner.members == ()
    assert winner.release == 0
    assert all(path.members == () for path in paths)


def test_twelve_heads_are_the_most():
    winner, _ = found(additive(dict.fromkeys(heads(15), 1.5)), heads(15))
    assert winner.members == tuple(heads(12))  # ties by layer and head


def test_ties_are_broken_by_layer_and_head():
    game = Game(lambda members: 4.0 * bool(members & {(0, 3), (1, 0)}))
    winner, _ = found(game, [(1, 0), (0, 3), (0, 5)])
    assert winner.members == ((0, 3),)


def test_synergy_is_what_neither_head_has_alone():
    rule = {frozenset({(0, 0)}): 2.0, frozenset({(0, 1)}): -3.0, frozenset({(0, 0), (0, 1)}): 2.5}
    (one,) = pair_synergies(Game(lambda members: rule[members]), heads(2))
    assert (one.release, one.synergy) == (2.5, 0.5)  # 2.5 - max(0, 2) - max(0, -3)


def best_of_all(game, candidates):
    """The largest release of all sets whose every member costs delta or more, by trying every set."""
    best, winner = 0.0, frozenset()
    for size in range(1, len(candidates) + 1):
        for one in map(frozenset, itertools.combinations(candidates, size)):
            release = game.mean(one)
            if release > best + 1e-9 and all(release - game.mean(one - {head}) >= DELTA for head in one):
                best, winner = release, one
    return best, winner


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_what_trying_every_set_finds(seed):
    rng = np.random.default_rng(seed)
    candidates = heads(9)
    weights = dict(zip(candidates, rng.choice([-2.0, -0.5, 0.2, 0.4, 1.5, 4.0], size=9), strict=True))
    pairs = rng.permutation(9)[:4]
    one, two = ({candidates[i] for i in part} for part in (pairs[:2], pairs[2:]))

    def rule(members):  # a sum, and an OR of two pairs that hides four of the heads
        hidden = 6.0 * (one | two <= members) + 1.2 * bool(members & one and members & two)
        return hidden + sum(weights[head] for head in members if head not in one | two)

    winner, _ = found(Game(rule), candidates)
    best, members = best_of_all(Game(rule), candidates)
    assert winner.release == pytest.approx(best)
    assert frozenset(winner.members) == members


def test_up_to_64_heads_are_all_candidates():
    heads, nodes = listed_nodes(8, 8, False), listed_nodes(8, 8, True)
    assert screened({"release": np.zeros((8, 8))}, heads) == dict.fromkeys(heads, "all heads")
    assert screened({"release": np.zeros((8, 8))}, nodes) == dict.fromkeys(nodes, "all heads and MLPs")
    assert nodes[7:9] == [(0, MLP), (1, 0)]


def test_beyond_64_heads_the_forty_of_best_rank_on_any_screen():
    release, sufficiency = np.zeros((10, 10)), np.zeros((10, 10))
    release[9] = np.arange(10, 0, -1)  # L9H0 first
    sufficiency[8] = np.arange(10, 0, -1)
    attention = np.full((10, 10), np.nan)
    attention[9, 0], attention[7, 3] = 1.0, 2.0
    chosen = screened(
        {"release": release, "sufficiency": sufficiency, "attention to the video": attention},
        listed_nodes(10, 10, False),
    )
    assert len(chosen) == 40
    assert chosen[9, 0] == "release (rank 1)"
    assert chosen[8, 4] == "sufficiency (rank 5)"
    assert chosen[7, 3] == "attention to the video (rank 1)"
    assert {(9, head) for head in range(10)} | {(8, head) for head in range(10)} <= set(chosen)


@pytest.mark.parametrize("crossing", [1, 2, 3, 5, 11, 31, 32, 33, 56])
def test_halving_finds_the_number_of_heads_that_restore_half(crossing):
    measured = {size: float(size >= crossing) for size in (1, 2, 4, 8, 16, 32, 56)}
    while (size := between(measured, 0.5)) is not None:
        assert size not in measured
        measured[size] = float(size >= crossing)
    assert min(size for size, release in measured.items() if release >= 0.5) == crossing
    assert len(measured) <= 7 + 5


def test_no_number_of_heads_is_looked_for_where_none_is_enough():
    assert between({1: 0.1, 2: 0.2}, 0.5) is None
    assert between({1: 0.1, 2: 0.2}, -1.0) is None
