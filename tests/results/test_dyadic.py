"""Dyadic inference against loops over ordered pairs, root finding, closed forms and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from av_lens.results.dyadic import Components, Dyadic, by_components, corrected, drawn_again, inverted, smallest_of
from av_lens.results.statistics import Bootstrap, sign_flips, smallest_effect


def plain_spread(e, sets):
    """The module's formulas, a loop at a time: v, g, df."""
    n, sources = len(e), sorted(set().union(*sets))
    pairs = itertools.product(range(n), repeat=2)
    v = max(sum(e[i] * e[j] for i, j in pairs if sets[i] & sets[j]), sum(e**2)) / n**2
    v *= len(sources) / (len(sources) - 1)
    cubes = sum(sum(e[i] for i in range(n) if s in sets[i]) ** 3 for s in sources)
    for one in {frozenset(of) for of in sets}:
        cubes -= (len(one) - 1) * sum(e[i] for i in range(n) if sets[i] == one) ** 3
    w = [sum(s in of for of in sets) for s in sources]
    return v, cubes / n**3 / v**1.5, max(3, 0.5 * (sum(w) ** 2 / sum(k * k for k in w) - 1))


def drawn_sets(rng, n=25, sources=12, places=2):
    return [set(map(str, rng.choice(sources, size=rng.integers(1, places + 1), replace=False))) for _ in range(n)]


@pytest.mark.parametrize(("places", "seed"), [(1, 0), (2, 1), (2, 2), (3, 3)])
def test_variance_and_skewness_are_those_of_loops_over_ordered_pairs(places, seed):
    rng = np.random.default_rng(seed)
    sets = [*drawn_sets(rng, places=places), {"0", "1"}, {"0", "1"}, {"1", "0"}]  # one set three times
    x = rng.exponential(size=(len(sets), 2)) - 0.4
    x[3:6, 1] = np.nan
    seen, spread = Dyadic.of([sorted(one) for one in sets]).pivots(x)
    for column in (0, 1):
        known = ~np.isnan(x[:, column])
        left = [one for one, there in zip(sets, known, strict=True) if there]
        e = x[known, column] - x[known, column].mean()
        v, g, df = plain_spread(e, left)
        assert (spread.error[column] ** 2, spread.g[column], spread.df[column]) == pytest.approx((v, g, df))
        t = x[known, column].mean() / math.sqrt(v)
        assert seen[column] == pytest.approx(t + g / 6 + g * t**2 / 3 + g**2 * t**3 / 27)


def test_with_two_sources_each_and_no_pair_twice_the_variance_is_the_protocols_short_form():
    rng = np.random.default_rng(4)
    order = rng.permutation(30)
    rule = Dyadic.of([(str(a), str(b)) for a, b in zip(order, np.roll(order, 1), strict=True)])
    x = rng.normal(size=30) + np.repeat(rng.normal(size=3), 10)
    e = x - x.mean()
    u = np.array([e[i] + e[(i + 1) % 30] for i in range(30)])  # each source is in two conflicts
    v = max((u**2).sum() - (e**2).sum(), (e**2).sum()) / 30**2 * 30 / 29
    assert rule.pivots(x[:, None])[1].error[0] ** 2 == pytest.approx(v)


def test_one_source_a_conflict_is_students_t():
    x = np.random.default_rng(5).normal(0.3, 1, size=40)
    x = np.concatenate([x, 2 * x.mean() - x])  # symmetric about its mean: no skewness
    rule = Dyadic.of([(str(i),) for i in range(80)])
    theirs = stats.ttest_1samp(x, 0, alternative="greater")
    assert rule.pivots(x[:, None])[0][0] == pytest.approx(theirs.statistic)
    assert float(rule.test(x).p) == pytest.approx(stats.t.sf(theirs.statistic, 39.5))  # df is halved, by the rule


@pytest.mark.parametrize("g", [-0.9, -0.3, -1e-12, 0.0, 0.2, 0.8])
def test_the_inverse_is_the_root_of_the_correction(g):
    for c in (-3.2, -2.0, 0.0, 1.7, 4.0):
        root = optimize.brentq(lambda t, c=c: corrected(np.array([t]), np.array([g]))[0] - c, -60, 60, xtol=1e-13)
        assert inverted(np.array([c]), np.array([g]))[0] == pytest.approx(root, abs=1e-6)


def test_an_interval_holds_the_means_that_t_does_not_reject():
    rng = np.random.default_rng(6)
    sets = [tuple(sorted(one)) for one in drawn_sets(rng, n=40, sources=30)]
    rule, x = Dyadic.of(sets), np.random.default_rng(7).exponential(size=40)
    found = rule.mean(x, level=0.9)

    def pivot(mu):
        return float(rule.pivots((x - mu)[:, None])[0][0])

    c = float(stats.t.ppf(0.95, rule.pivots(x[:, None])[1].df[0]))
    assert float(found.low) == pytest.approx(optimize.brentq(lambda mu: pivot(mu) - c, -20, x.mean()))
    assert float(found.high) == pytest.approx(optimize.brentq(lambda mu: pivot(mu) + c, x.mean(), 20))
    assert found.low < found.value < found.high


def test_ratios_and_derived_figures_are_bounded_to_first_order():
    rng = np.random.default_rng(8)
    rule = Dyadic.of([(str(i), str((i + 1) % 50)) for i in range(50)])
    y = rng.uniform(1, 9, size=50)
    exact = rule.ratio(0.3 * y, y)
    assert (float(exact.value), float(exact.low), float(exact.high)) == pytest.approx((0.3, 0.3, 0.3))
    x = y + rng.normal(size=50)
    found = rule.ratio(np.stack([x, -x], axis=1), y)
    r = x.mean() / y.mean()
    by_hand = rule.mean((x - r * y) / y.mean())
    assert (found.low[0], found.high[0]) == pytest.approx((r + float(by_hand.low), r + float(by_hand.high)))
    assert (found.low[1], found.high[1]) == pytest.approx((-found.high[0], -found.low[0]))
    assert rule.derived(lambda a, b: a / b, x, y) == pytest.approx((r, found.low[0], found.high[0]), rel=1e-6)


def test_max_t_draws_sources_and_takes_the_largest():
    rng = np.random.default_rng(9)
    sets = [(str(i), str(j)) for i, j in rng.integers(0, 12, size=(30, 2)) if i != j]
    x = rng.normal(0.4, 1, size=(len(sets), 4)) * np.array([1, 10, 0.1, 1])
    rule = Dyadic.of(sets)
    found, (seen, spread) = rule.test(x, seed=3), rule.pivots(x)
    drawn = np.random.default_rng(3).multinomial(rule.n_sources, np.full(rule.n_sources, 1 / rule.n_sources), size=5000)
    weights = np.array([drawn[:, a] * drawn[:, b] for a, b in rule.members]).T
    usable = weights[weights.sum(1) > 0]
    largest = (((usable @ x) / usable.sum(1, keepdims=True) - x.mean(0)) / spread.error).max(1)
    np.testing.assert_allclose(found.p_maxt, [(1 + (largest >= t - 1e-9).sum()) / 5001 for t in seen], atol=1e-12)
    assert (found.p_maxt >= found.p - 0.02).all()


def test_what_is_not_measured_is_nan_and_what_never_varies_is_certain():
    rule = Dyadic.of([(str(i), str((i + 1) % 20)) for i in range(20)])
    x = np.random.default_rng(1).normal(size=(20, 4))
    x[:, 1], x[:, 2], x[3:, 3] = np.nan, 2.0, np.nan
    found, bounds = rule.test(x), rule.mean(x)
    assert np.isnan(found.p[1])
    assert (found.p[2], found.p_maxt[2]) == (0.0, 1 / 5001)
    assert float(rule.test(np.full(20, -2.0)).p) == float(rule.test(np.zeros(20)).p) == 1.0
    assert (bounds.low[2], bounds.high[2]) == (2.0, 2.0)
    assert bounds.value[3] == pytest.approx(x[:3, 3].mean())
    assert np.isnan([bounds.low[3], found.p[3]]).all()  # 3 conflicts of 4 sources
    assert rule.derived(lambda a: a, x[:, 1]) == pytest.approx((math.nan, math.nan, math.nan), nan_ok=True)


# ---- components


def test_components_flip_signs_but_where_they_are_skewed_to_the_left():
    rng = np.random.default_rng(2)
    x = np.stack([rng.exponential(size=30) - 0.7, 1.4 - rng.exponential(size=30)], axis=1)
    names = [str(i) for i in range(30)]
    rule = by_components(range(30), (names, names), seed=0)
    assert isinstance(rule, Components)
    found, flips = rule.test(x, family=10, seed=5), sign_flips(x, range(30), family=10, seed=5)
    bent = Dyadic.of([(name,) for name in names]).test(x, seed=5)
    assert (found.p[0], found.p_maxt[0]) == (flips.p[0], flips.p_maxt[0])
    assert (found.p[1], found.p_maxt[1]) == (bent.p[1], bent.p_maxt[1])
    assert found.p[1] > flips.p[1]
    np.testing.assert_array_equal(rule.mean(x).low, Bootstrap.draw(range(30), names, names, seed=0).mean(x).low)
    few = by_components(range(19), (names[:19], names[:19]), seed=0)
    assert isinstance(few, Dyadic)
    assert few.unit == "component"


def test_type_one_error_where_flips_fail():
    rng = np.random.default_rng(0)
    x = 1 - rng.exponential(size=(60, 1500))  # skewness -2
    rule = Dyadic.of([(str(i),) for i in range(60)])
    t, spread = rule.pivots(x)
    assert (stats.t.sf(t, spread.df) < 0.05).mean() < 0.07
    assert (sign_flips(x, range(60)).p < 0.05).mean() > 0.07


# ---- drawn again, and power


def test_sources_are_drawn_again_with_all_that_hangs_on_them():
    rule = Dyadic.of([("a", "b"), ("b", "c"), ("c", "d"), ("d", "a"), ("a", "c")])
    rows, again = rule.drawn(np.random.default_rng(3))
    counts = np.random.default_rng(3).multinomial(4, np.full(4, 0.25))
    times = [counts[list(one)].prod() for one in rule.members]
    assert np.bincount(rows, minlength=5).tolist() == times
    for i, j in itertools.combinations(range(len(rows)), 2):
        if set(again.members[i]) & set(again.members[j]):  # two that share a copy share its source
            assert set(rule.members[rows[i]]) & set(rule.members[rows[j]])
    third = Dyadic.of([("a", "b", "x")] * 5)
    picked, _, drawn, with_third = drawn_again(rule, third, [0] * 5, np.random.default_rng(3), seed=0)
    np.testing.assert_array_equal(picked, rows)
    assert isinstance(with_third, Dyadic)
    assert len(with_third.members) == len(drawn.members) == len(rows)


def test_power_counts_shared_conflicts_for_less():
    ring = Dyadic.of([(str(i), str((i + 1) % 60)) for i in range(60)])
    apart = Dyadic.of([(f"a{i}", f"b{i}") for i in range(60)])
    # A ring's conflicts are worth half as many: 60 x 120 / (60 x 4) = 30, with 29.5 degrees of freedom.
    assert ring.smallest_effect(family=100) == pytest.approx(smallest_of(30, 29.5, family=100))
    assert apart.smallest_effect(family=100) == pytest.approx(smallest_of(60, 59.5, family=100))
    assert smallest_of(1e6, 1e6, family=100) == pytest.approx(smallest_effect(10**6, family=100), rel=1e-3)
    x = np.random.default_rng(0).normal(size=(60, 3))
    error = ring.pivots(x)[1].error
    np.testing.assert_allclose(ring.deviation(x) / math.sqrt(30), error)
