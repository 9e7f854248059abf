"""A ranking, a naming and a kind, judged as worked out by hand; free riders count neither way, decoys are innocent."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from planted_record import G, planted_isolation

from av_lens.isolation.sets.confirmation import ONE_DONOR
from av_lens.lab.calibration import PlantTruth, mask_of, truth_of
from av_lens.lab.plantbench.scores import (
    average_precision,
    damage_last,
    isolate_score,
    kinds_right,
    named_nodes,
    naming,
    precision_at,
    ranking,
)
from av_lens.results.record import Isolation, table

TRUTH = PlantTruth("writers", {(0, 0): "picture writer", (1, 1): "gate"}, free_riders=((0, 1),), decoys=((1, 0),))


def test_average_precision_by_hand():
    positive = np.array([True, False, True, False])
    assert average_precision(np.array([4.0, 3.0, 2.0, 1.0]), positive) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([1.0, 1.0, 1.0, 1.0]), positive) == pytest.approx(0.5)  # nothing is told apart
    assert math.isnan(average_precision(np.ones(2), np.zeros(2, dtype=bool)))


def test_precision_at_k_shares_what_is_tied_at_the_cut():
    values, positive = np.array([3.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False])
    assert precision_at(values, positive, 1) == 1.0
    assert precision_at(values, positive, 2) == pytest.approx((1 + 0.5) / 2)


def test_a_free_rider_counts_neither_way_and_a_decoy_is_innocent():
    scores = np.array([[3.0, 9.0], [5.0, 4.0]])  # the free rider first, then the decoy
    assert mask_of(TRUTH.kinds, (2, 2)).tolist() == [[True, False], [False, True]]
    assert ranking(scores, TRUTH) == {"auroc": 0.0, "average precision": pytest.approx((1 / 2 + 2 / 3) / 2),
                                      "precision at k": 0.5}  # fmt: skip
    found = naming(mask_of([(0, 1), (1, 0), (1, 1)], (2, 2)), TRUTH)
    assert found == {"named": 3.0, "false": 1.0, "false decoys": 1.0, "precision": 0.5, "recall": 0.5}


def test_heads_without_a_score_come_last_and_a_null_has_no_ranking():
    scores = np.array([[math.nan, 0.0], [-5.0, 2.0]])
    assert ranking(scores, TRUTH)["auroc"] == 0.5  # the gate before the decoy, the writer after it
    assert math.isnan(ranking(scores, PlantTruth("balanced", {}))["auroc"])
    assert naming(np.zeros((2, 2), dtype=bool), PlantTruth("balanced", {}))["false"] == 0.0


def test_undetermined_and_unnamed_kinds_are_wrong():
    rows = [{"layer": 0, "head": 0, "role": "picture writer"}, {"layer": 1, "head": 1, "role": "undetermined"}]
    assert kinds_right(rows, TRUTH) == {"kind right": 0.5, "kind right of named": 0.5}
    assert kinds_right(rows[:1], TRUTH) == {"kind right": 0.5, "kind right of named": 1.0}
    assert math.isnan(kinds_right([], TRUTH)["kind right of named"])


def with_a_member(found: Isolation, **changes: object) -> Isolation:
    row = {"site": "suffix", "chosen": True, "layer": 2, "head": 6, "without_low": 3.0, "role": "gate", "donor": "zero"}
    return dataclasses.replace(found, members=table("members", [{**row, **changes}]))


def test_the_score_of_isolate_is_a_lower_bound_over_delta_or_the_members_own():
    found = planted_isolation()
    rows = found.evidence.query("half == 'discovery' and estimand == 'release' and layer == 5 and head == 2")
    best = rows.loc[rows["mean"].idxmax()]
    assert isolate_score(found)[5, 2] == pytest.approx(best["low"] / (0.1 * G))
    assert isolate_score(with_a_member(found))[2, 6] == pytest.approx(3.0 / (0.1 * G))
    assert isolate_score(with_a_member(found, chosen=False))[2, 6] < 1  # a set that was not chosen says nothing
    assert isolate_score(with_a_member(found, layer=5, head=2, without_low=0.1))[5, 2] > 1  # the larger counts


def test_secondary_donors_score_nobody():
    found = planted_isolation()
    more = found.evidence.copy()
    strong = more["donor"].eq("zero") & more["estimand"].eq("release")
    extra = more[strong].assign(donor="mean_task", mean=99.0, low=98.0, high=100.0)
    both = table("evidence", [*more.to_dict("records"), *extra.to_dict("records")])
    assert np.nanmax(isolate_score(dataclasses.replace(found, evidence=both))) == np.nanmax(isolate_score(found))


def test_a_member_is_named_unless_it_breaks():
    found = planted_isolation()
    assert [(row["layer"], row["head"]) for row in named_nodes(found)] == [(3, 4), (5, 2), (5, 3)]
    member = next(row for row in named_nodes(with_a_member(found)) if row["layer"] == 2)
    assert (member["role"], member["single"], member["member"]) == ("gate", False, True)
    assert len(named_nodes(with_a_member(found, role="breaks"))) == 3
    both = next(row for row in named_nodes(with_a_member(found, layer=5, head=2)) if row["head"] == 2)
    assert (both["role"], both["single"], both["member"]) == ("picture writer", True, True)
    unclear = dataclasses.replace(found, heads=found.heads.assign(role="undetermined"))
    both = next(row for row in named_nodes(with_a_member(unclear, layer=5, head=2)) if row["head"] == 2)
    assert (both["role"], both["single"], both["member"]) == ("gate", True, True)


def test_nodes_are_heads_and_mlps_and_what_one_donor_alone_shows_is_struck():
    found = planted_isolation()
    assert isolate_score(found).shape == (found.n_layers, found.n_heads + 1)
    assert np.isnan(isolate_score(found)[:, -1]).all()  # this record has no MLP
    mlp = found.heads.head(1).assign(role="gate", layer=6, status=ONE_DONOR, confirmed=False, would_confirm=False)
    more = dataclasses.replace(found, mlps=mlp.drop(columns="head"))
    named = {(row["layer"], row["head"]): row for row in named_nodes(more)}
    assert named[6, -1] | {"flags": "", "donor": ""} == {
        "layer": 6, "head": -1, "role": "gate", "confirmed": False, "struck": True, "single": True, "member": False,
        "flags": "", "donor": "",
    }  # fmt: skip
    assert not named[5, 2]["struck"]
    truth = PlantTruth("mlp", {(6, -1): "gate"})
    assert mask_of(truth.kinds, (8, 9)).nonzero() == (np.array([6]), np.array([8]))
    evidence = found.evidence[found.evidence["estimand"] == "release"].head(1)
    both = pd.concat([found.evidence, evidence.assign(half="discovery", layer=6, head=-1, low=2.5)], ignore_index=True)
    scored = isolate_score(dataclasses.replace(found, evidence=both))
    assert scored[6, -1] == pytest.approx(2.5 / (0.1 * G))
    other_site = both.assign(site=np.where(both["head"] < 0, "sinks", both["site"]))
    assert isolate_score(dataclasses.replace(found, evidence=other_site))[6, -1] == scored[6, -1]


def test_what_adds_less_than_s_is_minor_and_counts_neither_way():
    content = {"G": 10.0, "C": -5.0, "heads": [
        {"layer": 0, "head": 0, "adds": 0.5, "kind": "gate"},
        {"layer": 1, "head": 1, "adds": 0.06, "kind": "writer"},
        {"layer": 1, "head": -1, "adds": 0.3, "kind": "opponent", "true_up_to_s": 0.05, "site": "sinks"},
    ]}  # fmt: skip
    truth = truth_of(content)
    assert truth.limits == {(0, 0): pytest.approx(0.75), (1, 1): pytest.approx(0.09), (1, -1): 0.05}
    assert set(truth.at(0.03).kinds) == {(0, 0), (1, 1), (1, -1)}
    assert (set(truth.at(0.1).kinds), truth.at(0.1).free_riders) == ({(0, 0)}, ((1, -1), (1, 1)))
    assert truth.sites == ("suffix", "sinks")
    short = truth_of(content | {"success": False, "missing": ["a planted head rides for free"]})
    assert short.missing == ("it does not answer as was asked for", "a planted head rides for free")
    assert PlantTruth.of_dict(json.loads(json.dumps(short.as_dict()))) == short


def test_heads_that_break_come_last_unless_they_are_members():
    found = planted_isolation()
    broken = found.heads.assign(role="breaks")
    one = (int(broken["layer"].iloc[0]), int(broken["head"].iloc[0]))
    damaged = dataclasses.replace(found, heads=broken.head(1))
    assert math.isnan(damage_last(damaged)[one])
    assert not math.isnan(isolate_score(damaged)[one])
    others = ~np.isnan(damage_last(damaged))
    np.testing.assert_array_equal(damage_last(damaged)[others], isolate_score(damaged)[others])
    saved = with_a_member(damaged, layer=one[0], head=one[1], without_low=3.0)
    assert damage_last(saved)[one] == isolate_score(saved)[one]
