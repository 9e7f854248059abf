"""While sound and picture are encoded: who encodes the picture, and who suppresses, on a model on paper."""

from __future__ import annotations

import numpy as np
import pytest
from fake_model import EncodingModel, FakeModel, bench_of, fake_conflicts, isolated

import av_lens as avl
from av_lens.isolation.measuring.effects import requests
from av_lens.isolation.naming.roles import family_size
from av_lens.results.record import Isolation

N = 44
ENCODER, SUPPRESSOR = (0, 2), (0, 3)


@pytest.fixture(scope="module")
def found():
    return isolated(EncodingModel(), fake_conflicts(N), s=0.1, sites=("video",), quick=True, named_only=True)


def row(found, at):
    (one,) = found.heads[(found.heads["layer"] == at[0]) & (found.heads["head"] == at[1])].to_dict("records")
    return one


def test_what_costs_seeing_as_much_encodes_and_what_does_not_suppresses(found):
    encoder, suppressor = row(found, ENCODER), row(found, SUPPRESSOR)
    assert (encoder["role"], suppressor["role"]) == ("picture encoder", "suppresses while encoding")
    assert (encoder["effect"], suppressor["effect"]) == pytest.approx((6, 3), abs=0.05)
    assert encoder["confirmed"]
    assert suppressor["confirmed"]
    assert found.suppressors[["layer", "head"]].to_numpy().tolist() == [list(SUPPRESSOR)]
    assert "at video: suppresses while encoding L0H3 (p after Holm" in found.verdict
    see = found.evidence[(found.evidence["estimand"] == "encodes") & (found.evidence["half"] == "discovery")]
    by_head = see[see["donor"] == "zero"].set_index(["layer", "head"])["mean"]
    assert (by_head[ENCODER], by_head[SUPPRESSOR]) == pytest.approx((8, 0), abs=0.05)


def test_there_are_two_donors_and_no_shares(found):
    released = found.evidence[found.evidence["estimand"] == "release"]
    assert set(released["donor"]) - {"half_dose"} == {"blank_muted", "zero"}
    assert not {"direct", "write", "repair"} & set(found.evidence["estimand"])
    assert np.isnan(row(found, ENCODER)["direct_share"])
    (chunk,) = bench_of(EncodingModel(), fake_conflicts(4)).chunks(range(4), "suffix")
    assert all(one.question == "ask" for one in requests([chunk]))
    assert any(one.freeze for one in requests([chunk]))


def test_the_family_counts_one_test_a_donor():
    # 12 heads x (2 donors + silenced + carries) + 3 MLPs x 2 donors
    assert family_size(12, 1, 3, n_encoding=1) == 12 * 4 + 3 * 2
    assert family_size(12, 2, 3, n_encoding=1) == 12 * 4 + 3 * 2 + 12 * 14 + 3 * 9
    assert family_size(12, 2, n_encoding=1) == 2 * 12 * 11  # the first edition knows no such sites


def test_p_and_q_are_those_of_the_release_alone(found):
    family = found.protocol["family"]
    assert family == 54
    released = found.arrays["discovery/video/release/zero"]
    assert np.isfinite(released).all()
    for at in (ENCODER, SUPPRESSOR):
        one = row(found, at)
        assert one["discovery_p"] <= one["q"] <= min(1, one["discovery_p"] * family)


def test_members_of_the_set_have_these_roles_too(found):
    members = found.members[found.members["chosen"]].set_index(["layer", "head"])["role"].to_dict()
    assert members == {ENCODER: "picture encoder", SUPPRESSOR: "suppresses while encoding"}


@pytest.mark.slow
def test_beside_the_suffix_each_site_has_its_own_roles():
    both = isolated(EncodingModel(), fake_conflicts(N), s=0.1, sites=("suffix", "video"), quick=True, named_only=True)
    assert both.protocol["family"] == family_size(12, 2, 3, n_encoding=1)
    roles = {(one.site, one.layer, one.head): one.role for one in both.heads.itertuples() if "carrier" not in one.role}
    assert roles == {
        ("suffix", 2, 0): "picture writer",
        ("video", *ENCODER): "picture encoder",
        ("video", *SUPPRESSOR): "suppresses while encoding",
    }
    alone = isolated(FakeModel(), fake_conflicts(N), s=0.1, sites=("suffix",), quick=True, named_only=True)
    assert "encodes" not in set(alone.evidence["estimand"])


def test_the_record_is_saved_opened_and_told(found, tmp_path):
    again = Isolation.load(found.save(tmp_path))
    assert again.heads.equals(found.heads)
    page = found.report(tmp_path / "page.html").read_text("utf-8")
    assert "suppresses while encoding" in page
    assert "it encodes the picture" in page
    assert avl.plots.release(again, site="video").data
