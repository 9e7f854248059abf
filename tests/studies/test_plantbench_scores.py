"""A ranking, a naming and a kind, judged as worked out by hand; free riders count neither way, decoys are innocent."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from planted_record import DONORS, G, N, planted_isolation

from av_lens.lab.calibration import PlantTruth, mask_of
from av_lens.lab.plantbench.pages import agreement, seen_by
from av_lens.lab.plantbench.scores import (
    average_precision,
    damage_last,
    exchanged,
    isolate_score,
    kinds_right,
    named_heads,
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
    assert isolate_score(dataclasses.replace(found, evidence=both)).max() == isolate_score(found).max()


def test_a_member_is_named_unless_it_breaks():
    found = planted_isolation()
    assert [(row["layer"], row["head"]) for row in named_heads(found)] == [(3, 4), (5, 2), (5, 3)]
    member = next(row for row in named_heads(with_a_member(found)) if row["layer"] == 2)
    assert (member["role"], member["single"], member["member"]) == ("gate", False, True)
    assert len(named_heads(with_a_member(found, role="breaks"))) == 3
    both = next(row for row in named_heads(with_a_member(found, layer=5, head=2)) if row["head"] == 2)
    assert (both["role"], both["single"], both["member"]) == ("picture writer", True, True)
    unclear = dataclasses.replace(found, heads=found.heads.assign(role="undetermined"))
    both = next(row for row in named_heads(with_a_member(unclear, layer=5, head=2)) if row["head"] == 2)
    assert (both["role"], both["single"], both["member"]) == ("gate", True, True)


def test_exchanged_labels_name_nobody_where_the_right_labels_name_three():
    found = planted_isolation()
    summary = {**found.summary, "s": 0.1, "family": 64 * 11.0}
    rows = [{"id": f"{i}", "half": "discovery", "component": i, "analysed": True} for i in range(N)]
    found = dataclasses.replace(found, summary=summary, conflicts=table("conflicts", rows))
    assert exchanged(found, draws=8, seed=1) == [0] * 8
    right = np.stack([found.arrays[f"discovery/suffix/release/{donor}"].mean(0) for donor in DONORS]).max(0)
    assert (right > 0.1 * G).sum() == 3


def test_agreement_of_donors_by_hand():
    one, other = np.array([[3.0, 1.0], [0.0, -1.0]]), np.array([[2.0, 1.5], [0.001, 1.0]])
    found = agreement({"zero": one, "blank_muted": other}, g=10.0, delta=1.2)["zero, blank_muted"]
    assert found["rank correlation"] == pytest.approx(0.8)  # one pair of neighbours of four changes places
    assert found["equal signs"] == pytest.approx(2 / 3)  # the third head is below 1% of G by both
    assert found["overlap"] == 0.5
    assert seen_by({"zero": one, "blank_muted": other}, (0, 1), delta=1.2) == ["blank_muted"]
    still = agreement({"zero": one, "constant": np.zeros((2, 2))}, g=10.0, delta=9.0)["zero, constant"]
    assert math.isnan(still["rank correlation"])
    assert math.isnan(still["overlap"])


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
