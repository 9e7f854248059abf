"""Calibration compares what was found with what was planted; figures recomputed by hand."""

from __future__ import annotations

import math

import pytest
from planted_record import planted_isolation, stopped_isolation

from av_lens.errors import InputError
from av_lens.lab.calibration import auroc, calibrate, planted_truth, read_truth


def test_auroc_by_hand():
    assert auroc([3.0, 2.0, 1.0, 0.0], [True, False, True, False]) == 0.75  # 3 of 4 pairs in order
    assert auroc([1.0, 1.0], [True, False]) == 0.5
    assert math.isnan(auroc([1.0], [True]))


def test_planted_heads_on_top_pass():
    found = planted_isolation()
    truth = {(5, 2): "picture writer", (5, 3): "sound opponent", (3, 4): "gate"}
    shown = calibrate(found, truth)
    assert shown.passed
    assert shown.heads["rank"].tolist() == list(range(1, 65))
    assert [tuple(pair) for pair in shown.heads[["layer", "head"]].head(3).to_numpy().tolist()] == [
        (5, 2),
        (5, 3),
        (3, 4),
    ]
    assert shown.figures["auroc"] == 1.0
    assert shown.figures["precision_at_k"] == 1.0
    assert shown.figures["named_but_not_planted"] == 0
    assert shown.heads["kind"].tolist()[:4] == ["picture writer", "sound opponent", "gate", ""]
    assert shown.figures["named_with_the_right_kind"] == 2
    assert shown.sentence.startswith("The 3 heads planted in av-tiny-planted (L3 H4, L5 H2, L5 H3) came out on top")
    assert "named all of them and no other" in shown.sentence
    release = found.evidence.query("half == 'discovery' and estimand == 'release' and layer == 5 and head == 2")["mean"]
    assert shown.heads["release"].iloc[0] == release.max()


def test_a_planted_head_that_ranks_low_fails_and_is_said_so():
    shown = calibrate(planted_isolation(), {(5, 2): "writer", (0, 0): "writer"})
    assert not shown.passed
    assert shown.figures["precision_at_k"] == 0.5
    assert shown.figures["named_but_not_planted"] == 2
    assert shown.figures["planted_but_not_named"] == 1
    assert "did not all come out on top: they rank 1, " in shown.sentence
    assert "left 1 of them unnamed and named 2 others" in shown.sentence


def test_a_stopped_search_cannot_be_compared():
    with pytest.raises(InputError, match="no release was measured"):
        calibrate(stopped_isolation(), {(0, 0): "writer"})


def test_truth_files():
    content = {"kind": "gate", "heads": [{"layer": 1, "head": 2}, {"layer": 1, "head": 3, "kind": "writer"},
                                         {"layer": 4, "head": 0, "free_rider": True}, [2, 5]]}  # fmt: skip
    assert read_truth(content) == {(1, 2): "gate", (1, 3): "picture writer", (2, 5): "gate"}
    with pytest.raises(InputError, match="no planted head"):
        read_truth({"heads": []})
    with pytest.raises(InputError, match=r"ships no planted\.json"):
        planted_truth("av-nothing")
