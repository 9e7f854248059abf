"""Two people agree on sections 5 and 7: who is named, by which p and q, and who holds, on effects that are drawn.

The effects are those of a made-up model, three layers of four heads and an MLP, on conflicts that share sources;
`plain_naming` was written from the protocol's text.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
from plain_forward import MLP
from plain_naming import FEEDER, PlainHalf, confirmed, family, holm_over, named_with_feeders, over_words
from plain_protocol import RELEASES

from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.effects import ESTIMANDS
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming import evidence as searching
from av_lens.isolation.naming.evidence import SiteEvidence, search
from av_lens.isolation.naming.roles import HELD, Cuts, Evidence, confirm, family_size, run_tests
from av_lens.isolation.sets.confirmation import _over_words, one_donor_alone
from av_lens.results.dyadic import WORD, Dyadic
from av_lens.results.statistics import holm

N, LAYERS, HEADS, S = 48, 3, 4, 0.1
WORDS = [f"word{i}" for i in range(10)]
NODES = [(layer, head) for layer in range(LAYERS) for head in (*range(HEADS), MLP)]
# Kind -> release, direct, write, held, reads picture, reads sound, fall of G, rise, silenced, carries; all over G.
KINDS = {
    "nothing": (0.02, 0.01, 0.01, 0.02, 0.0, 0.0, -0.1, 0.1, 0.0, 0.0),
    "writer": (0.5, 0.45, 0.4, 0.45, 0.4, 0.05, -0.1, 0.2, 0.0, 0.0),
    "opponent": (0.4, 0.35, 0.3, 0.4, 0.02, 0.5, -0.1, 0.2, 0.3, 0.0),
    "gate": (0.5, 0.05, 0.05, 0.45, 0.3, 0.1, -0.1, 0.2, 0.0, 0.3),
    "through": (0.5, 0.45, 0.3, 0.05, 0.4, 0.05, -0.1, 0.2, 0.0, 0.0),
    "feeder": (0.6, 0.55, 0.02, 0.05, 0.4, 0.05, -0.1, 0.2, 0.0, 0.0),
    "breaks": (0.5, 0.45, 0.4, 0.45, 0.4, 0.05, 0.4, 0.2, 0.0, 0.3),
    "falls": (0.5, 0.45, 0.4, 0.45, 0.4, 0.05, -0.1, -0.4, 0.0, 0.0),
    "torn": (0.5, 0.25, 0.2, 0.45, 0.2, 0.2, -0.1, 0.2, 0.0, 0.0),
    "slight": (0.13, 0.11, 0.1, 0.12, 0.1, 0.02, -0.1, 0.2, 0.12, 0.12),
    "silenced": (0.02, 0.01, 0.01, 0.02, 0.0, 0.0, -0.1, 0.1, 0.4, 0.3),
}
NAMES = ("release", "direct", "write", HELD, "reads picture", "reads sound", "fall of G", "rise over others",
         "silenced", "carries")  # fmt: skip
KEYS = {(one.name, one.donor) for one in ESTIMANDS if one.name in NAMES} | {(HELD, donor) for donor in RELEASES}


def drawn_half(seed, kinds, *, name="discovery", noise=0.12, n_words=10):
    """A half of conflicts from one permutation of clips, drawn effects of each node by its kind."""
    rng = np.random.default_rng(seed)
    order = [f"{name}{i}" for i in rng.permutation(N)]
    sources = list(zip(order, [*order[1:], order[0]], strict=True))
    thirds = [(*pair, order[(i + 5) % N]) for i, pair in enumerate(sources)]
    words = [tuple(rng.choice(WORDS[:n_words], size=2, replace=False)) for _ in range(N)]
    by_word = dict(zip(WORDS, rng.normal(0, 1, len(WORDS)), strict=True))
    shift = {clip: rng.exponential() - 1 for clip in order}
    g = 8 + np.array([shift[a] + shift[v] for a, v in sources])
    figures = {}
    for key in sorted(KEYS):
        values = np.empty((N, LAYERS, HEADS + 1))
        for place, (layer, which) in enumerate(NODES):
            strength = dict(zip(NAMES, KINDS[kinds[place]], strict=True))[key[0]]
            dose = {"blank_muted": 0.9, "zero": 1.0, "mean_other": 0.1 if place % 3 == 0 else 0.8}.get(key[1], 1.0)
            own = rng.standard_normal(N) + np.array([shift[a] for a, _ in sources])
            told = strength * (1 + 0.3 * np.array([by_word[a] for a, _ in words]))
            values[:, layer, -1 if which == MLP else which] = g * (dose * told + noise * strength * own + 0.02 * own)
        figures[key] = values
    half = Half(name, np.arange(N), list(range(N)), Dyadic.of(sources), g, g - 6, Dyadic.of(thirds),
                Dyadic.of(words, unit=WORD))  # fmt: skip
    plain = PlainHalf(
        {"/".join(key): by_node(values) for key, values in figures.items()},
        g.tolist(),
        *([frozenset(one) for one in units] for units in (sources, thirds, words)),
        S,
    )
    return figures, half, plain


def by_node(values):
    return {(layer, which): values[:, layer, -1 if which == MLP else which].tolist() for layer, which in NODES}


def ours_of(row):
    """A row of the package as a test of the second implementation."""
    return (row.layer, MLP if row.head == -1 else row.head), row.role, row.donor


class Nowhere(Bench):
    """A bench without a model."""

    nodes = [(layer, -1 if which == MLP else which) for layer, which in NODES]  # noqa: RUF012

    def __init__(self):
        pass

    def chunks(self, *_):
        return []


def searched(figures, half, monkeypatch):
    """The package's own search, with effects that were drawn in place of those that it would measure."""
    without = {key: values for key, values in figures.items() if key[0] != HELD}

    def gathered(chunks, half, heads, *, site, s, family, seed):
        found = Evidence(without, half, mlps=True)
        return SiteEvidence(site, chunks, found, run_tests(found, s=s, family=family, seed=seed))

    def held(chunks, found, layers, heads):
        added = {(HELD, donor): held_by(figures, donor, layers) for donor in RELEASES}
        return Evidence({**without, **added}, half, mlps=True)

    monkeypatch.setattr(searching, "gather", gathered)
    monkeypatch.setattr(searching, "hold", held)
    monkeypatch.setattr(searching, "_through", lambda found, mlps, row: row)
    monkeypatch.setattr(searching, "with_means", lambda chunks: None)
    size = family_size(LAYERS * HEADS, 1, LAYERS)
    return search(Nowhere(), half, s=S, floor=None, sites=("suffix",), seed=0, family=size)


def held_by(figures, donor, layers):
    """Releases with MLPs held: of heads before a named MLP."""
    values = figures[HELD, donor].copy()
    values[..., -1] = np.nan
    values[:, [layer for layer in range(LAYERS) if layer > max(layers, default=-1)]] = np.nan
    return values


def plain_held(figures, layers):
    """The same, of the second implementation."""
    return {
        donor: {node: values for node, values in by_node(figures[HELD, donor]).items()
                if node[1] != MLP and node[0] <= max(layers, default=-1)}
        for donor in RELEASES
    }  # fmt: skip


# By layer: four heads and the MLP.
KINDS_DRAWN = [
    "writer gate nothing feeder nothing  opponent through breaks nothing writer  torn silenced slight nothing gate",
    "nothing nothing nothing nothing nothing  feeder feeder writer gate nothing  slight opponent falls nothing nothing",
    "feeder feeder through nothing nothing  feeder nothing silenced torn nothing  gate nothing opponent slight writer",
]


@functools.cache
def both_search(number):
    """A drawn half, searched by the package and by the second implementation."""
    kinds = KINDS_DRAWN[number].split()
    figures, half, plain = drawn_half(number, kinds)
    with pytest.MonkeyPatch.context() as patched:
        theirs = searched(figures, half, patched)
    layers = [row.layer for row in theirs.named if row.head == -1 and row.role in ("picture writer", "gate")]
    ours = named_with_feeders(plain, plain_held(figures, layers))
    return SimpleNamespace(theirs=theirs, ours=ours, plain=plain, kinds=kinds, layers=layers)


@pytest.fixture(params=range(len(KINDS_DRAWN)))
def drawn(request):
    return both_search(request.param)


def test_who_is_named_with_which_p_and_q(drawn):
    rows = {ours_of(row): (row.p, row.q) for row in drawn.theirs.named}
    assert set(rows) == set(drawn.ours.rows)
    for test, (p, q) in drawn.ours.rows.items():
        assert rows[test] == pytest.approx((p, q), rel=1e-6), test
    assert len({role for _, role, _ in rows}) > 3


def test_one_donor_alone(drawn):
    """By the means on discovery; some nodes are released by two donors alone, of which one may be small."""
    told = {node: drawn.plain.alone(node) for node in NODES}
    for node, ours in told.items():
        means = [float(np.mean(drawn.plain.of(f"release/{donor}", node))) for donor in RELEASES]
        assert one_donor_alone(means) == ours
    assert not any(told[node] for node, _, _ in drawn.ours.rows)


def test_the_family(drawn):
    tests = family(NODES)
    assert len(tests) == family_size(LAYERS * HEADS, 1, LAYERS) == drawn.theirs.family
    assert len(set(tests)) == len(tests)


def test_all_roles_are_drawn():
    """What the agreement is about: every role stands in some draw."""
    seen = {role for number in range(len(KINDS_DRAWN)) for _, role, _ in both_search(number).ours.rows}
    assert seen == {"picture writer", "sound opponent", "gate", FEEDER, "breaks", "undetermined", "silenced carrier",
                    "sound carrier"}  # fmt: skip


@pytest.mark.parametrize("n_words", [10, 6])
def test_who_holds(drawn, n_words):
    """Other conflicts, of which one writer has lost half of its release and one gate is a gate no more."""
    kinds = ["slight" if kind == "opponent" else kind for kind in drawn.kinds]
    figures, half, plain = drawn_half(99, kinds, name="confirmation", noise=0.5, n_words=n_words)
    figures |= {(HELD, donor): held_by(figures, donor, drawn.layers) for donor in RELEASES}
    plain.held = plain_held(figures, drawn.layers)
    found = Evidence(figures, half, mlps=True)
    rows = [row for row in drawn.theirs.named if row.role != "breaks"]
    tests = run_tests(found, s=S, family=1, seed=0)
    p = [tests.of(row) for row in rows]
    adjusted = holm(np.array(p), family=len(rows))
    theirs = dict(zip(map(ours_of, rows), confirm(found, rows, adjusted.tolist(), s=S), strict=True))
    ours_holm = holm_over(plain, list(theirs))
    np.testing.assert_allclose(adjusted, list(ours_holm.values()), rtol=1e-6)
    assert confirmed(plain, list(theirs), ours_holm) == theirs
    assert 0 < sum(theirs.values()) < len(theirs)
    said = {"": "", "on these words": "on these words", "untested over words": "untested over words"}
    at = SiteEvidence("suffix", [], found, tests)
    for row in rows:
        assert said[_over_words(at, row, S)] == over_words(plain, ours_of(row))


def test_reads_are_bounded_by_the_rule_that_knows_the_third_clip():
    figures, half, _ = drawn_half(0, KINDS_DRAWN[0].split())
    found = Evidence(figures, half, mlps=True)
    cuts = Cuts.of(found, found.donors, s=S)
    both = {"reads_picture": found["reads picture"], "reads_sound": found["reads sound"]}
    both["reads"] = both["reads_picture"] - both["reads_sound"]
    for name, values in both.items():
        np.testing.assert_array_equal(getattr(cuts, name).low, half.third.mean(values).low)
        assert not np.allclose(half.third.mean(values).low, half.boot.mean(values).low, atol=1e-3)
