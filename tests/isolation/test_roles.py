"""Roles from numbers written by hand: each criterion decides once, and the order of the table holds."""

from __future__ import annotations

import numpy as np
import pytest

from av_lens.isolation.measuring.effects import donor_of, mirrored
from av_lens.isolation.measuring.engine import MLP
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming import roles
from av_lens.isolation.naming.roles import (
    CUT_ROLES,
    HELD,
    Cuts,
    Evidence,
    adjust,
    classify,
    confirm,
    family_size,
    run_tests,
    suppressor_role,
    with_feeders,
)
from av_lens.results.statistics import Bootstrap, Interval

N, G = 30, 10.0
DONORS = ("blank_muted", "mean_other", "zero")
ALL = dict.fromkeys(CUT_ROLES, True)


def cuts(**figures):
    """Intervals of one head: `share=(low, high)`, ..."""
    base = dict(
        release=(3, 4),
        damage=(-2, -1),
        rise=(0, 1),
        share=(0.9, 1),
        write=(0.1, 0.2),
        lost=(np.nan, np.nan),
        reads=(1, 2),
        reads_picture=(1, 2),
        reads_sound=(0, 1),
    )
    found = {}
    for name, (low, high) in (base | figures).items():
        found[name] = Interval(*(np.array([[v]], dtype=float) for v in ((low + high) / 2, low, high)))
    return Cuts(**found, delta=1.0)


@pytest.mark.parametrize(
    ("figures", "role"),
    [
        ({}, "picture writer"),
        ({"reads": (-2, -1), "reads_sound": (1, 2), "reads_picture": (-1, 1)}, "sound opponent"),
        ({"share": (0.1, 0.4)}, "gate"),
        ({"share": (-0.5, 0.4), "reads": (-1, 1)}, "gate"),  # a gate needs no read
        ({"share": (0.4, 0.6)}, "undetermined"),  # the cut is inside the interval
        ({"reads": (-0.1, 2)}, "undetermined"),
        ({"reads_picture": (-0.1, 2)}, "undetermined"),  # the winning read must itself be above 0
        ({"damage": (-2, 0.0)}, "breaks"),
        ({"rise": (-1.0, 1)}, "breaks"),
        ({"rise": (-0.9, 1)}, "picture writer"),
        ({"damage": (-2, 0.5), "share": (0.1, 0.2)}, "breaks"),  # breaks stands first
        ({"share": (0.5, 1)}, "picture writer"),  # at the cut: direct
        ({"share": (0.2, 0.5)}, "undetermined"),
        ({"rise": (np.nan, np.nan)}, "picture writer"),  # no third candidate: that criterion is silent
        ({"share": (np.nan, np.nan)}, "undetermined"),
        ({"lost": (0.5, 1)}, "feeder"),  # before the writer, whatever its direct share
        ({"lost": (0.5, 1), "share": (0.1, 0.4)}, "feeder"),
        ({"lost": (0.5, 1), "damage": (-2, 0.5)}, "breaks"),
        ({"lost": (0.4, 1)}, "picture writer"),
        ({"lost": (0.5, 1), "write": (0.2, 0.25)}, "picture writer"),  # much of it by its very own write
    ],
)
def test_the_table_of_roles(figures, role):
    assert suppressor_role(cuts(**figures), (0, 0), ALL) == role


def test_a_role_needs_its_own_q():
    assert suppressor_role(cuts(), (0, 0), ALL | {"picture writer": False}) == "undetermined"
    assert suppressor_role(cuts(share=(0, 0.1)), (0, 0), ALL | {"gate": False}) == "undetermined"


def evidence(heads, seed=0):
    """One layer of heads, each given as mean effects; noise of .2 between conflicts."""
    rng = np.random.default_rng(seed)

    def values(name):
        mean = np.array([head.get(name, 0.0) for head in heads])
        return (mean + rng.normal(0, 0.2, size=(N, len(heads))))[:, None, :]

    names = {"release": "{}", "direct": "direct {}", "fall of G": "fall {}", "rise over others": "rise {}"}
    figures = {(name, d): values(of.format(d)) for name, of in names.items() for d in DONORS}
    ones = {"reads picture": "picture", "reads sound": "sound", "silenced": "silenced", "carries": "carries"}
    figures |= {(name, donor_of(name)): values(of) for name, of in ones.items()}
    boot = Bootstrap.draw(range(N), [f"s{i}" for i in range(N)], [f"p{i}" for i in range(N)], seed=0)
    half = Half("discovery", np.arange(N), list(range(N)), boot, np.full(N, G), np.full(N, -2.0))
    return Evidence(figures, half)


HEADS = [
    {"blank_muted": 4, "direct blank_muted": 4, "picture": 3, "sound": 0.5},  # writer
    {"zero": 3, "direct zero": 0.3, "blank_muted": 0.1},  # gate, always on
    {"mean_other": 3, "direct mean_other": 2.8, "sound": 3, "picture": 0.2},  # opponent
    {"silenced": 2, "carries": 2},  # a victim that also carries
    {"blank_muted": 4, "direct blank_muted": 4, "silenced": 3, "fall blank_muted": 3},  # breaks
    {"blank_muted": 0.5, "direct blank_muted": 0.5, "picture": 0.5},  # below delta = 1
    {"carries": 1.5},
    {},
]


def named(found, s=0.1):
    tests = run_tests(found, s=s, family=family_size(len(HEADS), 1), seed=0)
    q, release_q = adjust([tests], family=family_size(len(HEADS), 1))
    return classify(found, tests, q[0], release_q[0], s=s, site="suffix"), tests


def test_classify_names_each_head_once_and_for_what_it_is():
    rows, _ = named(evidence(HEADS))
    named_so = [(row.head, row.role, row.donor) for row in rows]
    assert named_so == [
        (0, "picture writer", "blank_muted"),
        (1, "gate", "zero"),
        (2, "sound opponent", "mean_other"),
        (3, "silenced carrier", ""),
        (3, "sound carrier", ""),
        (4, "breaks", "blank_muted"),
        (6, "sound carrier", ""),
    ]
    assert all(row.q < 0.05 and row.p <= row.q for row in rows)


def test_the_donor_is_the_largest_release():
    assert evidence(HEADS).donors[0, :3].tolist() == ["blank_muted", "zero", "mean_other"]


def test_significance_alone_names_nothing():
    # Every head releases .5 of G = 10 significantly, and none above delta = 1.
    rows, _ = named(evidence([{d: 0.5 for d in DONORS} | {f"direct {d}": 0.5 for d in DONORS}] * 8))
    assert rows == []


def test_nothing_is_named_under_the_null():
    for seed in range(5):
        rows, _ = named(evidence([{}] * 8, seed=seed))
        assert rows == []


def test_confirmation_needs_size_p_and_the_same_cuts():
    rows, _ = named(evidence(HEADS))
    assert [row.role for row in rows].count("breaks") == 1
    rows = [row for row in rows if row.role != "breaks"]
    same = evidence(HEADS, seed=9)
    assert confirm(same, rows, [0.01] * len(rows), s=0.1) == [True] * len(rows)
    assert confirm(same, rows, [0.06] * len(rows), s=0.1) == [False] * len(rows)
    turned = [dict(HEADS[0], picture=0.5, sound=3), *HEADS[1:]]  # the writer now reads the sound
    small = [turned[0], dict(HEADS[1], zero=0.5), *HEADS[2:]]  # and the gate is below delta
    assert confirm(evidence(small, seed=9), rows, [0.01] * len(rows), s=0.1)[:3] == [False, False, True]


def test_the_family_counts_heads_sites_roles_and_donors():
    assert family_size(64, 1) == 64 * 11
    assert family_size(64, 2) == 64 * 22
    assert family_size(64, 2, 8) == 2 * (64 * 14 + 8 * 9)  # MLPs; with them heads may be feeders


FED = [
    {"blank_muted": 4, "direct blank_muted": 4, "picture": 3, "write blank_muted": 0.4, "held blank_muted": 0.5},
    {"blank_muted": 4, "direct blank_muted": 4, "picture": 3, "write blank_muted": 3.5, "held blank_muted": 1},
    {"blank_muted": 4, "direct blank_muted": 4, "picture": 3, "write blank_muted": 0.4, "held blank_muted": 3.5},
    {"carries": 3, "silenced": 3},
    {"zero": 5, "direct zero": 5, "picture": 4, "write zero": 5, "carries": 3, "silenced": 3},  # the layer's MLP
]


def fed(held=True, seed=0):
    """Four heads and an MLP; `held` says whether it was held."""
    found = evidence(FED, seed)
    rng, figures = np.random.default_rng(seed + 100), dict(found.figures)
    for name, key in (("write", "write"), (HELD, "held")):
        for donor in DONORS if held or name != HELD else ():
            mean = np.array([head.get(f"{key} {donor}", 0.0) for head in FED])
            figures[name, donor] = (mean + rng.normal(0, 0.2, size=(N, len(FED))))[:, None, :]
            if name == HELD:
                figures[name, donor][..., MLP] = np.nan
    return Evidence(figures, found.half, mlps=True)


def test_a_feeder_acts_through_a_named_mlp_and_writes_little_itself():
    family = family_size(4, 1, 1)
    tests = run_tests(fed(held=False), s=0.1, family=family, seed=0)
    (q,), (release_q,) = adjust([tests], family=family)
    first = classify(fed(held=False), tests, q, release_q, s=0.1, site="suffix")
    writers = [(0, head) for head in (0, 1, 2)]
    assert [(row.at, row.role) for row in first] == [
        *((at, "picture writer") for at in writers),
        ((0, 3), "silenced carrier"),
        ((0, 3), "sound carrier"),
        ((0, MLP), "picture writer"),  # and no carrier, which MLPs are not
    ]
    both = with_feeders(tests, run_tests(fed(), s=0.1, family=family, seed=0))
    (q,), (release_q,) = adjust([both], family=family)
    rows = classify(fed(), both, q, release_q, s=0.1, site="suffix", mlps=(0,))
    assert [(row.at, row.role, row.through) for row in rows if row.role != "sound carrier"] == [
        ((0, 0), "feeder", 0),
        ((0, 1), "picture writer", 0),  # its write is its own, though much passes through the MLP too
        ((0, 2), "picture writer", -1),  # holding the MLP costs it little
        ((0, 3), "silenced carrier", -1),
        ((0, MLP), "picture writer", -1),
    ]
    assert first[-1] == rows[-1]  # no MLP's row changes by feeders
    assert both.p["feeder", "blank_muted"][0, 0] < 0.01 < both.p["feeder", "blank_muted"][0, 1]
    assert np.isnan(both.p["feeder", "blank_muted"][0, MLP])
    assert confirm(fed(seed=7), rows, [0.01] * len(rows), s=0.1) == [True] * len(rows)
    turned = Evidence({**fed(seed=7).figures, (HELD, "blank_muted"): fed().figures["release", "blank_muted"]},
                      fed().half, mlps=True)  # fmt: skip
    assert confirm(turned, rows[:1], [0.01], s=0.1) == [False]


def test_feeders_p_lower_no_mlps_q():
    p = np.full((1, 2, 1, 3), 0.2)
    p[0, 0] = [[0.001, 0.001, 0.03]]  # gate: two heads and an MLP
    p[0, 1] = [[0.001, 0.001, np.nan]]  # feeder
    table = {("gate", d): p[0, 0] for d in DONORS} | {("feeder", d): p[0, 1] for d in DONORS}
    alone = {key: one for key, one in table.items() if key[0] == "gate"}
    release = dict.fromkeys(DONORS, p[0, 0])
    (one,), _ = adjust([roles.Tests(alone, alone, release, release)], family=20)
    (two,), _ = adjust([roles.Tests(table, table, release, release)], family=20)
    assert two["gate", "zero"][0, 0] < one["gate", "zero"][0, 0]
    assert two["gate", "zero"][0, MLP] == one["gate", "zero"][0, MLP]


def test_unmeasured_donors_are_left_out_of_the_family():
    found = evidence(HEADS)
    none = np.full((N, 1, len(HEADS)), np.nan)
    without = Evidence(found.figures | {("release", "mean_other"): none}, found.half)
    rows, tests = named(without)
    assert np.isnan(tests.p["gate", "mean_other"]).all()
    assert (2, "sound opponent", "mean_other") not in [(r.head, r.role, r.donor) for r in rows]
    assert (0, "picture writer") in [(r.head, r.role) for r in rows]


def test_mirroring_cancels_what_both_cells_share():
    # A word's own prior moves M alike in va and av; hearing moves them apart.
    assert mirrored("va", lambda cell: np.array([2.0])) == 0
    assert mirrored("va", lambda cell: np.array([{"va": 3.0, "av": -3.0}[cell]])) == 3


def test_an_undetermined_head_is_named_by_its_release_and_confirmed_by_it():
    torn = {"blank_muted": 4, "direct blank_muted": 2, "picture": 3, "sound": 0.5}  # half direct
    rows, tests = named(evidence([torn, *HEADS[1:]]))
    first = rows[0]
    assert (first.head, first.role, first.donor) == (0, "undetermined", "blank_muted")
    assert tests.of(first) == tests.release_p["blank_muted"][0, 0] == first.p
    assert confirm(evidence([HEADS[0], *HEADS[1:]], seed=4), [first], [0.01], s=0.1) == [True]
    assert confirm(evidence([dict(torn, **{"fall blank_muted": 4}), *HEADS[1:]], seed=4), [first], [0.01], s=0.1) == [
        False
    ]
