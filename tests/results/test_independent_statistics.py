"""Two people agree on section 7 of the protocol: `plain_statistics`, written from its text, against the package."""

from __future__ import annotations

import math

import numpy as np
import plain_statistics as plain
import pytest

from av_lens.inputs import sources
from av_lens.results import dealing
from av_lens.results.dealing import CONFIRMATION, DISCOVERY, LOST, Member
from av_lens.results.dyadic import WORD, Dyadic, by_components
from av_lens.results.statistics import benjamini_hochberg, holm, sign_flips

WORDS = [f"word{i}" for i in range(9)]


def permuted(n, rng):
    order = rng.permutation(n)
    return [(f"s{a}", f"s{b}") for a, b in zip(order, np.roll(order, 1), strict=True)]


def crossed(n, n_sources, rng):
    pairs = set()
    while len(pairs) < n:
        a, b = rng.choice(n_sources, size=2, replace=False)
        pairs.add((f"s{a}", f"s{b}"))
    return sorted(pairs)


def disjoint(n, rng):
    return [(f"s{i}", f"p{i}") for i in rng.permutation(n)]


DESIGNS = {
    "one permutation": lambda rng: permuted(30, rng),
    "clips used several times": lambda rng: crossed(40, 14, rng),
    "disjoint": lambda rng: disjoint(46, rng),
    "a few share": lambda rng: [*disjoint(50, rng), ("s1", "p2"), ("s3", "s4"), ("p9", "p8")],
}


@pytest.fixture(params=DESIGNS)
def pairs(request):
    return DESIGNS[request.param](np.random.default_rng(5))


def units_of(pairs, thirds=None):
    return [frozenset(pair) | ({third} if third else set()) for pair, third in
            zip(pairs, thirds or [None] * len(pairs), strict=True)]  # fmt: skip


def values_of(n, *, left=False, unknown=False):
    rng = np.random.default_rng(n)
    drawn = rng.exponential(size=(n, 3)) * (-1 if left else 1) + (1.3 if left else -0.6)
    if unknown:
        drawn[2:7, 1] = np.nan
    return drawn


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_deal(pairs, seed):
    rng = np.random.default_rng(8)
    ids = [f"c{i}" for i in rng.permutation(len(pairs))]
    answers = rng.choice(WORDS, size=len(pairs)).tolist()
    members = [Member(name, *pair, answer) for name, pair, answer in zip(ids, pairs, answers, strict=True)]
    found = dealing.deal_sources(members, seed=seed)
    units = units_of(pairs)
    ours = plain.deal_components(ids, answers, units, seed=seed)
    names = [DISCOVERY if half == 0 else CONFIRMATION for half in ours]
    shared = plain.sources_are_shared(units, ours)
    if shared:
        first = plain.deal_sources(pairs, seed=seed)
        names = [{0: CONFIRMATION, 1: LOST, 2: DISCOVERY}[sum(one in first for one in pair)] for pair in pairs]
    assert list(found.half) == names
    assert found.rule == ("dyadic" if shared else "components")


def test_the_swaps_are_made():
    """A deal in which growing alone leaves more conflicts across than the best swap does."""
    rng = np.random.default_rng(0)
    mended = 0
    for seed in range(12):
        pairs = crossed(26, 18, rng)
        ours = plain.deal_sources(pairs, seed=seed)
        assert ours == dealing.grown_half(pairs, seed=seed)
        mended += ours != plain.deal_sources(pairs, seed=seed, swap=False)
    assert mended > 1


class Recorded:
    """A clip of a file, of which is known what its streams hold; None says nothing."""

    def __init__(self, file, start, end, sound, frames):
        self.path, self.start, self.end, self.streams = f"{file}.mp4", start, end, (sound, frames)

    def load(self):
        raise AssertionError


@pytest.mark.parametrize("seed", range(6))
def test_sources_of_windows_and_copies(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    streams = {f"f{i}": (rng.choice(["s0", "s1", "s2", "s3", None]), rng.choice(["p0", "p1", "p2", "p3", None]))
               for i in range(6)}  # fmt: skip
    clips, ours = {}, []
    for number in range(40):
        file = f"f{rng.integers(6)}"
        start = float(rng.integers(0, 300))
        end = start + float(rng.integers(1, 12))
        clips[f"{file}:{start}:{end}:{number}"] = Recorded(file, start, end, *streams[file])
        ours.append(plain.Window(file, start, end, *streams[file]))
    known = {f"{file}.mp4": held for file, held in streams.items()}
    monkeypatch.setattr(sources, "fingerprint", lambda path, sha: known[path])
    named = sources._recorded(clips)
    found = [named[key] for key in clips]
    mine = plain.sources(ours)
    assert [found.index(name) for name in found] == [mine.index(name) for name in mine]
    assert 5 < len(set(mine)) < 35


def test_a_given_source_overrules():
    windows = [plain.Window("f", 0, 1, given="x"), plain.Window("f", 0.5, 2), plain.Window("g", 0, 1, given="x")]
    assert [one == plain.sources(windows)[0] for one in plain.sources(windows)] == [True, False, True]


def test_doubles():
    pairs = [("a", "b"), ("c", "d"), ("b", "a"), ("a", "b"), ("d", "c")]
    questions = ["What?", "What?", "What?", "Who?", "What?"]
    listed = zip("abcde", pairs, questions, strict=True)
    members = [Member(name, *pair, "dog", question) for name, pair, question in listed]
    assert plain.doubles(pairs, questions) == dealing.doubled(members) == [2, 4]


@pytest.mark.parametrize("thirds", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("unknown", [False, True])
def test_means_and_shares_of_conflicts_that_share_sources(pairs, thirds, left, unknown):
    rng = np.random.default_rng(3)
    drawn = [f"s{i}" for i in rng.integers(12, size=len(pairs))] if thirds else None
    units, values = units_of(pairs, drawn), values_of(len(pairs), left=left, unknown=unknown)
    below = values_of(len(pairs) + 1)[: len(pairs), 0] + 2
    rule = Dyadic.of([sorted(one) for one in units])
    mean, share, negative = rule.mean(values), rule.ratio(values, below[:, None]), rule.ratio(values, -below[:, None])
    p = rule.test(values).p
    for column in range(3):
        mine = values[:, column].tolist()
        ours = plain.dyadic(mine, units)
        assert_same(ours, mean, column)
        assert p[column] == pytest.approx(ours.p, rel=1e-6)
        assert_same(plain.dyadic(mine, units, below.tolist()), share, column)
        assert_same(plain.dyadic(mine, units, (-below).tolist()), negative, column)


def assert_same(ours, theirs, column):
    seen = (theirs.value[column], theirs.low[column], theirs.high[column])
    assert seen == pytest.approx((ours.value, *ours.interval), rel=1e-9)


def test_words_are_units_as_sources_are():
    rng = np.random.default_rng(6)
    words = [tuple(rng.choice(WORDS, size=2, replace=False)) for _ in range(40)]
    values = values_of(40)
    found = Dyadic.of(words, unit=WORD).mean(values)
    for column in range(3):
        ours = plain.dyadic(values[:, column].tolist(), [frozenset(pair) for pair in words])
        assert_same(ours, found, column)


def test_max_t():
    """The same draws of the sources: the largest over rows, its count against each t'."""
    pairs = crossed(30, 12, np.random.default_rng(1))
    units, values = units_of(pairs), values_of(30)
    rule = Dyadic.of(pairs)
    found = rule.test(values, seed=4)
    names = dict.fromkeys(one for pair in pairs for one in sorted(pair))
    drawn = np.random.default_rng(4).multinomial(12, np.full(12, 1 / 12), size=5000)
    rows = values.T.tolist()
    counts = [dict(zip(names, one, strict=True)) for one in drawn[:400].tolist()]
    largest = plain.drawn_maximum(rows, units, counts)
    error = rule.pivots(values)[1].error
    theirs = rule._largest(values, error, np.random.default_rng(4))[:400]
    np.testing.assert_allclose(largest, theirs, rtol=1e-9)
    every = rule._largest(values, error, np.random.default_rng(4)).tolist()
    for column, row in enumerate(rows):
        ours = plain.largest_as_large(plain.dyadic(row, units).t, every)
        assert found.p_maxt[column] == pytest.approx(ours, abs=1e-12)


def test_where_sources_are_not_shared():
    """Left-skewed: t' with every component one source; else the exact flips, and the bootstrap's interval."""
    label = np.repeat(np.arange(12), 2)
    values = np.stack([values_of(24, left=left)[:, 0] for left in (False, True)], axis=1)
    exact = sign_flips(values, label.tolist())
    for column in range(2):
        assert exact.p[column] == pytest.approx(plain.flipped(values[:, column].tolist(), label.tolist()), abs=1e-12)
    apart = np.repeat(np.arange(24), 2)
    clips = [f"a{i}" for i in range(48)], [f"b{i}" for i in range(48)]
    rule = by_components(apart.tolist(), clips, seed=3)
    wide = np.stack([values_of(48, left=left)[:, 0] for left in (False, True)], axis=1)
    units = [frozenset([int(i)]) for i in apart]
    ours = [plain.dyadic(wide[:, column].tolist(), units) for column in (0, 1)]
    assert (ours[0].g > 0, ours[1].g < 0) == (True, True)
    found = rule.test(wide, seed=2)
    assert found.p[0] == sign_flips(wide, apart.tolist(), seed=2).p[0]
    assert found.p[1] == pytest.approx(ours[1].p, rel=1e-9)
    drawn = plain.resampled(wide[:, 0].tolist(), apart.tolist(), draws=4000, seed=9)
    bounds = rule.mean(wide)
    spread = bounds.high[0] - bounds.low[0]
    assert (bounds.low[0], bounds.high[0]) == pytest.approx(drawn, abs=0.04 * spread)


@pytest.mark.parametrize("family", [7, 300])
def test_families(family):
    p = np.array([0.04, 0.001, 0.03, 0.03, 0.5, 0.0002, 1.0])
    np.testing.assert_allclose(benjamini_hochberg(p, family=family), plain.benjamini_hochberg(p.tolist(), family))
    np.testing.assert_allclose(holm(p), plain.holm(p.tolist()))


@pytest.mark.parametrize("family", [1, 10, 5632])
def test_what_no_effect_could_pass(family):
    for n in range(1, 25):
        assert plain.can_pass(n, family) == (2.0**-n * family <= 0.05)
        assert plain.can_pass(n, family) == math.isfinite(dealing_smallest(n, family))


def dealing_smallest(n, family):
    from av_lens.results.statistics import smallest_effect

    return smallest_effect(n, family=family)
