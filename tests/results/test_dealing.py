"""Dealing sources: against a plain second implementation and by hand; what a design can show; planning from a pilot."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from av_lens.errors import InputError
from av_lens.results.dealing import Member, deal_sources, design_of, doubled, grown_half, rank_hash, standing
from av_lens.results.power import conflicts_needed

EDGES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=22)


def members(pairs, **more):
    return [Member(f"c{i}", f"s{a}", f"s{b}", "dog", **more) for i, (a, b) in enumerate(pairs)]


def ring(n):
    """One permutation of n clips."""
    return [(i, (i + 1) % n) for i in range(n)]


def across(edges, half):
    return sum((one in half) != (two in half) for one, two in edges)


def plainly_grown(edges, seed):
    """The protocol's words, one comparison at a time."""
    names = sorted({name for edge in edges for name in edge})

    def order(name):
        return rank_hash(seed, name)

    half = {min(names, key=order)} if len(names) > 1 else set()
    while len(half) < len(names) // 2:
        rest = [name for name in names if name not in half]
        half.add(
            min(
                rest,
                key=lambda name: (
                    -sum((a == name and b in half) or (b == name and a in half) for a, b in edges),
                    sum(name in edge for edge in edges),
                    order(name),
                ),
            )
        )
    while True:
        rest = [name for name in names if name not in half]
        now = across(edges, half)
        saved = {(one, two): now - across(edges, half - {one} | {two}) for one in half for two in rest}
        if not saved or max(saved.values()) <= 0:
            return half
        one, two = min(saved, key=lambda pair: (-saved[pair], order(pair[0]), order(pair[1])))
        half = half - {one} | {two}


@settings(deadline=None, max_examples=80)
@given(EDGES, st.integers(0, 3))
def test_sources_are_dealt_as_a_plain_second_implementation_does(pairs, seed):
    edges = [(f"s{a}", f"s{b}") for a, b in pairs]
    assert grown_half(edges, seed=seed) == plainly_grown(edges, seed)


@settings(deadline=None, max_examples=30)
@given(EDGES, st.integers(0, 3))
def test_dealt_halves_share_no_source(pairs, seed):
    conflicts = members(pairs)
    halves = deal_sources(conflicts, seed=seed)
    assert halves.rule == "dyadic"  # so few conflicts never make 20 components a half
    sides = [{s for i in halves.members(name) for s in conflicts[i].sources} for name in ("discovery", "confirmation")]
    assert not sides[0] & sides[1]
    for i, j in itertools.combinations(range(len(pairs)), 2):
        if halves.half[i] == halves.half[j] != "lost" and set(conflicts[i].sources) & set(conflicts[j].sources):
            assert halves.component[i] == halves.component[j]
    assert {c for c, half in zip(halves.component, halves.half, strict=True) if half == "lost"} <= {-1}


def test_a_swap_mends_what_growth_left():
    # Two cliques of four; growth from one of them stays in it, and nothing lies across.
    cliques = [*itertools.combinations(range(4), 2), *itertools.combinations(range(4, 8), 2)]
    for seed in range(5):
        assert across([(f"s{a}", f"s{b}") for a, b in cliques], grown_half(
            [(f"s{a}", f"s{b}") for a, b in cliques], seed=seed)) == 0  # fmt: skip


def test_disjoint_conflicts_keep_the_components_rule():
    halves = deal_sources(members([(2 * i, 2 * i + 1) for i in range(40)]), seed=0)
    assert halves.rule == "components"
    assert halves.n_lost == 0
    # 20 components a half, one of them with 3 of its 22 conflicts: above a tenth, so sources are dealt.
    hub = [(0, 1), (0, 1000), (0, 1001), *[(2 * i, 2 * i + 1) for i in range(1, 40)]]
    assert deal_sources(members(hub), seed=0).rule == "dyadic"
    assert deal_sources(members([(2 * i, 2 * i + 1) for i in range(38)]), seed=0).rule == "dyadic"  # 19 a half


def test_pairs_that_come_twice_are_found_either_way_round():
    pairs = [(0, 1), (2, 3), (1, 0), (0, 1), (0, 2)]
    assert doubled(members(pairs)) == [2, 3]
    asked = [Member(f"c{i}", f"s{a}", f"s{b}", "", question=str(i)) for i, (a, b) in enumerate(pairs)]
    assert doubled(asked) == []


def test_what_designs_can_show():
    apart = design_of(members([(2 * i, 2 * i + 1) for i in range(140)]))
    assert (apart.rule, apart.standing, apart.n_conflicts, apart.n_sources) == (
        "components",
        "firm",
        (70, 70),
        (140, 140),
    )
    assert apart.n_components == (70, 70)
    assert apart.sentence() == (
        "70 and 70 conflicts of 140 and 140 sources in the halves; 70 and 70 components, which are resampled and "
        "flipped: enough for a verdict. Of 10,000 tests (some 900 heads) one finds, four times in five, an effect that "
        "exceeds the threshold by 0.63 standard deviations."
    )
    assert apart.smallest == pytest.approx((stats.norm.isf(0.05 / 10_000) + stats.norm.ppf(0.8)) / math.sqrt(70))
    one = design_of(members(ring(280)), seed=1)
    assert (one.rule, one.standing, one.n_across) == ("dyadic", "firm", 2)
    assert sum(one.n_conflicts) == 278
    assert one.n_sources == (140, 140)
    few = design_of([*members(ring(60)), Member("again", "s1", "s0", "dog")])
    assert (few.standing, few.n_doubled) == ("exploratory", 1)
    assert "2 across the halves and 1 doubled left out" in few.sentence()
    assert few.sentence().endswith("let `av-lens pairs` make disjoint conflicts of them (one a pair of clips).")
    assert design_of(members(ring(30))).standing == "refused"
    with pytest.raises(InputError, match=r"two conflicts have the id 'c0'"):
        design_of([*members(ring(3)), *members([(7, 8)])])


def test_standing_counts_sources_where_they_are_shared():
    assert standing([60, 60], [1, 1], n_sources=[40, 40]) == "firm"
    assert standing([60, 60], [1, 1], n_sources=[39, 60]) == "exploratory"
    assert standing([59, 60], [30, 30], n_sources=[60, 60]) == "exploratory"
    assert standing([19, 60], [30, 30], n_sources=[60, 60]) == "refused"


# ---- planning


def test_so_many_conflicts_as_the_plan_says_find_the_effect():
    rng = np.random.default_rng(0)
    pilot = rng.normal(size=20)
    pilot = 0.45 + (pilot - pilot.mean()) / pilot.std(ddof=1)  # mean .45, sd 1
    plan = conflicts_needed(pilot, family=700)
    n = int(plan.conflicts) // 2
    x = rng.normal(0.45, 1, size=(n, 4000))
    t = x.mean(0) / (x.std(0, ddof=1) / math.sqrt(n))
    assert (stats.t.sf(t, (n - 1) / 2) < 0.05 / 700).mean() == pytest.approx(0.8, abs=0.03)
    assert plan.cautious > plan.conflicts
    assert plan.sentence().startswith("With these 20 pilot conflicts (0.45 above the threshold, sd 1.00): ")
    assert f"{plan.conflicts:.0f} disjoint conflicts, and {plan.cautious:.0f} if" in plan.sentence()


def test_plans_that_need_no_more_than_a_verdict_does_or_have_no_end():
    assert conflicts_needed(np.linspace(4, 6, 20), family=700).conflicts == 120
    none = conflicts_needed(np.linspace(-2, 1, 20), family=700)
    assert math.isinf(none.conflicts)
    assert "no number of conflicts, for the effect is not above the threshold" in none.sentence()
    weak = conflicts_needed(np.array([0.3, -2, 2, 1, -1.0, 0]), family=700)
    assert math.isinf(weak.cautious)
    assert "no number is enough if the effect is at its lower 80% bound" in weak.sentence()
    with pytest.raises(
        InputError, match="at least 5 pilot conflicts and a family of at least 1 test; found 2 conflicts"
    ):
        conflicts_needed(np.array([1.0, 2, np.nan]), family=10)
