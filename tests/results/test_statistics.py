"""Statistics against scipy, closed forms, brute force and simulated coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from av_lens.errors import InputError
from av_lens.results.statistics import (
    Bootstrap,
    benjamini_hochberg,
    clopper_pearson,
    holm,
    interval,
    non_inferiority,
    sign_flips,
    smallest_effect,
)


def separate(n, seed=0, draws=5000):
    return Bootstrap.draw(range(n), [f"s{i}" for i in range(n)], [f"p{i}" for i in range(n)], seed=seed, draws=draws)


# ---- bootstrap


def test_bootstrap_of_separate_conflicts_is_the_plain_bootstrap_of_the_mean():
    x = np.random.default_rng(0).exponential(size=60)
    mean, low, high = interval(separate(60), x)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert mean == pytest.approx(x.mean())
    assert low == pytest.approx(theirs.low, abs=0.03)
    assert high == pytest.approx(theirs.high, abs=0.03)


def test_coverage_is_near_its_level():
    rng = np.random.default_rng(1)
    x = rng.normal(1.0, 2.0, size=(40, 400))  # 400 experiments at once
    found = separate(40, draws=1000).mean(x)
    covered = ((found.low <= 1.0) & (found.high >= 1.0)).mean()
    assert 0.90 <= covered <= 0.98


def test_components_are_resampled_whole():
    # 20 components of 5 equal conflicts are 20 observations, not 100.
    x = np.repeat(np.random.default_rng(2).normal(size=20), 5)
    boot = Bootstrap.draw(np.repeat(np.arange(20), 5).tolist(), [f"s{i}" for i in range(100)], ["p"] * 100, seed=0)
    assert boot.unit == "component"
    _, low, high = interval(boot, x)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(20), rel=0.15)


def test_below_20_components_clips_are_resampled_and_weigh_by_their_product():
    sound, picture = ["a", "a", "b", "c", "d"], ["b", "c", "e", "e", "a"]
    boot = Bootstrap.draw([0] * 5, sound, picture, seed=7, draws=50)
    assert boot.unit == "clip"
    rng = np.random.default_rng(7)
    counts = rng.multinomial(5, np.full(5, 0.2), size=50)
    at = {name: k for k, name in enumerate("abcde")}
    by_hand = np.array([[row[at[s]] * row[at[p]] for s, p in zip(sound, picture, strict=True)] for row in counts])
    np.testing.assert_array_equal(boot.weights, by_hand)


def test_below_5_clips_there_is_no_interval():
    boot = Bootstrap.draw([0, 0], ["a", "c"], ["b", "d"], seed=0)
    mean, low, high = interval(boot, np.array([1.0, 3.0]))
    assert mean == 2.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_ratios_are_resampled_as_ratios():
    rng = np.random.default_rng(3)
    y = rng.uniform(1, 9, size=50)
    boot = separate(50)
    exact = boot.ratio(0.3 * y, y)
    assert (float(exact.value), float(exact.low), float(exact.high)) == pytest.approx((0.3, 0.3, 0.3))
    x = y + rng.normal(size=50)
    found = boot.ratio(x[:, None], y)
    drawn = (boot.weights @ x) / (boot.weights @ y)
    assert found.value[0] == pytest.approx(x.sum() / y.sum())
    assert (found.low[0], found.high[0]) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_shapes_and_missing_values():
    boot = separate(30)
    x = np.random.default_rng(4).normal(size=(30, 2, 3))
    x[:, 0, 1] = np.nan
    x[4, 1, 2] = np.nan
    found = boot.mean(x)
    assert found.value.shape == (2, 3)
    assert np.isnan([found.value[0, 1], found.low[0, 1], found.high[0, 1]]).all()
    assert found.value[1, 2] == pytest.approx(np.nanmean(x[:, 1, 2]))
    assert not np.isnan(found.low[1, 2])


# ---- sign flips


def brute_force(x, components):
    groups = np.unique(components)
    sums = np.array([x[np.asarray(components) == g].sum() for g in groups])
    flipped = [
        sum(s * v for s, v in zip(signs, sums, strict=True)) for signs in itertools.product((1, -1), repeat=len(sums))
    ]
    return np.mean(np.array(flipped) >= sums.sum() - 1e-12)


def test_exact_flips_are_brute_force_by_component():
    rng = np.random.default_rng(0)
    components = [0, 0, 1, 2, 3, 3, 4, 5]
    x = rng.normal(0.5, 1, size=(8, 3))
    found = sign_flips(x, components)
    assert found.exact
    assert found.n_flips == 2**6
    for j in range(3):
        assert found.p[j] == pytest.approx(brute_force(x[:, j], components))


def test_exact_flips_agree_with_scipys_paired_permutation_test():
    x = np.random.default_rng(5).normal(0.4, 1, size=12)
    theirs = stats.permutation_test(
        (x,), np.sum, permutation_type="samples", alternative="greater", n_resamples=np.inf
    ).pvalue
    assert float(sign_flips(x, range(12)).p) == pytest.approx(theirs)


def test_sampled_flips_agree_with_the_exact_ones_nearly():
    rng = np.random.default_rng(6)
    x = rng.normal(0.3, 1, size=16)
    exact = float(sign_flips(x, range(16)).p)
    x17 = np.append(x, 0.0)  # a component of 0 changes no sum, but makes the test sample
    sampled = sign_flips(x17, range(17), family=500)
    assert not sampled.exact
    assert sampled.n_flips == 100_000
    assert float(sampled.p) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 100_000))


def test_max_t_is_brute_force():
    rng = np.random.default_rng(7)
    x = rng.normal(0.6, 1, size=(7, 4)) * np.array([1, 10, 0.1, 1])
    found = sign_flips(x, range(7))
    scaled = x / np.sqrt((x**2).sum(0))
    largest = np.array([(np.array(s)[:, None] * scaled).sum(0).max() for s in itertools.product((1, -1), repeat=7)])
    np.testing.assert_allclose(found.p_maxt, [(largest >= t - 1e-9).mean() for t in scaled.sum(0)])
    assert (found.p_maxt >= found.p - 1e-12).all()


def test_p_is_uniform_under_the_null_and_small_under_an_effect():
    rng = np.random.default_rng(8)
    null = sign_flips(rng.normal(size=(14, 2000)), range(14)).p
    assert (null < 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert float(sign_flips(np.full(20, 1.0), range(20)).p) == pytest.approx(
        1e-4, rel=0.01
    )  # 9999 flips, none as large
    assert float(sign_flips(np.full(10, 1.0), range(10)).p) == pytest.approx(2**-10)
    assert float(sign_flips(np.full(10, -1.0), range(10)).p) == 1.0


def test_familywise_error_of_max_t():
    rng = np.random.default_rng(9)
    any_found = [sign_flips(rng.normal(size=(10, 20)), range(10)).p_maxt.min() < 0.05 for _ in range(200)]
    assert np.mean(any_found) < 0.1


def test_unmeasured_columns_stay_nan():
    x = np.ones((6, 2))
    x[:, 1] = np.nan
    found = sign_flips(x, range(6))
    assert np.isnan(found.p[1])
    assert np.isnan(found.p_maxt[1])
    assert found.p[0] == pytest.approx(2**-6)


# ---- families


def test_benjamini_hochberg_is_scipys():
    p = np.random.default_rng(0).uniform(size=50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))
    shaped = benjamini_hochberg(p.reshape(5, 10))
    np.testing.assert_allclose(shaped.ravel(), stats.false_discovery_control(p))


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, np.nan])), [0.03, 0.06, 0.06, np.nan])


def test_a_larger_family_costs_more():
    p = np.array([0.001, 0.02])
    np.testing.assert_allclose(benjamini_hochberg(p, family=10), [0.01, 0.1])
    np.testing.assert_allclose(holm(p, family=10), [0.01, 0.18])


# ---- exact shares and harm


def test_clopper_pearson_is_scipys():
    for count, n in [(0, 10), (3, 20), (20, 20), (1, 59)]:
        theirs = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
        assert clopper_pearson(count, n) == pytest.approx((theirs.low, theirs.high))
        upper = stats.binomtest(count, n, alternative="less").proportion_ci(0.95, method="exact").high
        assert clopper_pearson(count, n, side="upper")[1] == pytest.approx(upper)
    with pytest.raises(InputError, match="3 of 2"):
        clopper_pearson(3, 2)


def test_59_items_are_the_fewest_that_can_show_no_harm():
    assert clopper_pearson(0, 59, side="upper")[1] < 0.05 < clopper_pearson(0, 58, side="upper")[1]
    ones = np.ones(59)
    assert non_inferiority(ones, ones, separate(59)).verdict == "specific"
    assert non_inferiority(ones[:58], ones[:58], separate(58)).verdict == "untested"


def test_many_items_of_four_clips_show_no_harm_either():
    ones, clips = np.ones(70), [["a", "b"][i % 2] for i in range(70)]
    few = Bootstrap.draw(range(70), clips, ["c", "d"] * 35, seed=0)
    found = non_inferiority(ones, ones, few)
    assert found.verdict == "untested"
    assert np.isnan(found.bound)


def test_a_figure_known_on_few_clips_has_no_interval():
    values = np.ones((30, 2)) * np.arange(30)[:, None]
    values[2:, 1] = np.nan
    found = separate(30).mean(values)
    assert np.isfinite(found.low[0])
    assert found.value[1] == 0.5
    assert np.isnan(found.low[1])


def test_harm_takes_the_larger_bound():
    before = np.ones(100)
    after = before.copy()
    after[:4] = 0
    found = non_inferiority(before, after, separate(100))
    assert found.fall == pytest.approx(0.04)
    assert found.bound == pytest.approx(clopper_pearson(4, 100, side="upper")[1])
    assert found.verdict == "not specific"
    # Gains elsewhere lower the fall and the bootstrap's bound, not Clopper-Pearson's on what was broken.
    before[50:60] = 0
    gained = non_inferiority(before, after, separate(100))
    assert gained.fall < 0
    assert gained.bound >= clopper_pearson(4, 100, side="upper")[1] - 1e-12


# ---- power


def test_power_by_simulation():
    n, family = 40, 100
    effect = smallest_effect(n, family=family)
    rng = np.random.default_rng(0)
    x = rng.normal(effect, 1, size=(n, 300))
    t = x.mean(0) / (x.std(0, ddof=1) / math.sqrt(n))
    found = (stats.norm.sf(t) < 0.05 / family).mean()
    assert found == pytest.approx(0.8, abs=0.08)
    assert smallest_effect(5, family=100) == math.inf
