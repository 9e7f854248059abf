"""Redundant heads through the whole of `isolate`: found as a set, named as members, their kinds measured in context."""

from __future__ import annotations

import numpy as np
import pytest
from fake_kinds import Redundant
from fake_model import FakeModel, fake_conflicts, isolated

N = 44


@pytest.fixture(scope="module")
def finished():
    return isolated(Redundant(), fake_conflicts(N), s=0.1)


def test_no_single_release_shows_anything(finished):
    for donor in ("blank_muted", "mean_other", "zero"):
        assert finished.grid("release", donor).max() < 0.05
    assert finished.summary["largest release share"] < 0.01


def test_the_pairs_have_the_whole_synergy(finished):
    top = finished.synergies.query("donor == 'blank_muted'").iloc[:3]
    assert [(r.layer, r.head, r.layer2, r.head2) for r in top.itertuples()][:2] == [(2, 0, 2, 2), (0, 1, 0, 2)]
    assert top["synergy"].to_numpy() == pytest.approx([6, 3, 0], abs=0.05)
    assert top["share"].iloc[0] == pytest.approx(6 / 7, abs=0.01)


def test_the_set_is_both_pairs_and_restores_the_gap(finished):
    (chosen,) = finished.sets.query("chosen").itertuples()
    assert set(chosen.members.split()) == {"L2H0", "L2H2", "L0H1", "L0H2"}
    assert chosen.screen in ("synergy L2H0 L2H2", "synergy L0H1 L0H2")
    assert chosen.release == pytest.approx(9, abs=0.05)
    assert chosen.confirmed
    assert finished.verdict_kind == "named"


def test_members_have_their_kinds_with_the_others_edited(finished):
    rows = finished.members.query("chosen").set_index(["layer", "head"])
    assert rows.loc[[(2, 0), (2, 2)], "role"].tolist() == ["picture writer"] * 2
    assert rows.loc[[(0, 1), (0, 2)], "role"].tolist() == ["gate"] * 2
    assert rows["confirmed"].all()
    assert rows.loc[[(2, 0), (2, 2)], "effect"].to_numpy() == pytest.approx([6, 6], abs=0.05)
    assert rows.loc[[(0, 1), (0, 2)], "effect"].to_numpy() == pytest.approx([3, 3], abs=0.05)
    assert rows["single"].abs().max() < 0.05
    assert rows.loc[[(2, 0), (0, 1)], "direct_share"].to_numpy() == pytest.approx([1, 0], abs=0.02)
    assert rows.loc[(2, 0), "reads_picture"] == pytest.approx(6, abs=0.05)
    assert rows.loc[(2, 0), "reads_sound"] == pytest.approx(0, abs=0.05)
    assert rows["gain"].sum() == pytest.approx(9, abs=0.05)
    assert rows["without"].to_numpy() == pytest.approx(rows["effect"].to_numpy(), abs=0.05)
    assert set(rows["screen"]) == {"all heads and MLPs"}


def test_members_stand_among_the_named_heads_with_their_single_figures_beside(finished):
    rows = finished.heads.query("estimand == 'release in the set'")
    assert {(r.layer, r.head, r.role) for r in rows.itertuples()} == {
        (2, 0, "picture writer"), (2, 2, "picture writer"), (0, 1, "gate"), (0, 2, "gate")
    }  # fmt: skip
    (name,) = set(rows["member_of"])
    assert name in set(finished.sets["name"])
    assert rows["release_blank_muted"].abs().max() < 0.05
    assert rows["confirmed"].all()
    assert len(finished.suppressors) == 4
    assert finished.summary["confirmed suppressors"] == 4


def test_a_member_is_judged_by_what_the_set_loses_without_it_by_each_donor(finished):
    rows = finished.heads.query("estimand == 'release in the set'").set_index(["layer", "head"])
    single = rows[["release_blank_muted", "release_mean_other", "release_zero"]]
    assert single.abs().to_numpy().max() < 0.05  # alone: by no donor
    assert rows["status"].eq("confirmed").all()
    assert rows["role_alone"].eq("none").all()
    assert rows["role_in_set"].eq(rows["role"]).all()
    members = finished.members.query("chosen").set_index(["layer", "head"])
    assert members["role_alone"].eq("none").all()
    contexts = members.loc[[(2, 0), (0, 1)], ["context_blank_muted", "context_mean_other", "context_zero"]]
    np.testing.assert_allclose(contexts, [[6, 6, 6], [3, 3, 3]], atol=0.05)


def test_redundancy_is_said_in_words(finished):
    writers = "picture writers L2H0 L2H2 (alone none, in the set picture writer)"
    gates = "gates L0H1 L0H2 (alone none, in the set gate)"
    assert f"at suffix: {writers}; {gates} (p after Holm at most " in finished.verdict
    assert "Redundant: " in finished.verdict
    assert "release next to nothing alone" in finished.verdict
    assert "because the members stand in for each other" in finished.verdict


def test_quick_searches_pairs_where_the_gap_stays_unexplained():
    found = isolated(Redundant(writer=0.0), fake_conflicts(N), s=0.1, quick=True, named_only=True)  # gap 3: the gates
    assert set(found.sets.query("chosen")["members"].iloc[0].split()) == {"L0H1", "L0H2"}
    assert any(reason.startswith("Left out, as asked (quick): robustness. Pairs") for reason in found.reasons)
    assert "left out" not in found.verdict


def test_quick_leaves_pairs_out_where_the_gap_is_explained_and_its_power_is_of_single_heads():
    lines = []
    found = isolated(FakeModel(), fake_conflicts(N), s=0.1, quick=True, named_only=True, told=lines.append)
    assert found.synergies.empty
    assert set(found.steps["start"].str.split().str[0]) == {"best"}
    assert "Pairs of heads were left out of the search for sets." in found.verdict
    single = "That is of single heads: of heads that stand in for each other a quick search says nothing, unless"
    assert single in lines[0]


def test_where_nothing_is_found_the_verdict_says_above_what_and_with_what_power():
    engine = FakeModel(writer=0.0, gate=0.0, opponent=0.0)
    found = isolated(engine, fake_conflicts(N), s=0.1, quick=True, named_only=True, gate="report")
    assert found.sets.empty
    assert found.members.empty
    assert not len(found.suppressors)
    none = "What the search would have named at suffix: no head or MLP as a suppressor above 0.10 of G."
    assert none in found.verdict
    assert "find with 80% power" in found.verdict
    assert "of heads that stand in for each other this says nothing." in found.verdict  # no gap, so no pairs
    assert "No set of heads was found either" in found.verdict


class Spread(FakeModel):
    """Nine heads of layers 0 to 2 write a little of the picture's answer each: 1.0, below delta = 2.1."""

    WRITERS = ((0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3))

    def __init__(self):
        super().__init__(gate=0.0, writer=0.0, opponent=0.0, noise=1e-4)

    def _heads(self, one):
        if one not in self.known:
            z = super()._heads(one)
            if one.question == "hear" and one.sound is not None and one.picture is not None:
                for layer, head in self.WRITERS:
                    z[layer, head, one.picture] += 1.0
        return self.known[one]


@pytest.mark.slow
def test_suppression_spread_over_many_heads_is_told_with_their_number():
    found = isolated(Spread(), fake_conflicts(44), s=0.3, quick=True)  # stacks of 18 and 4
    assert found.verdict_kind == "spread"
    assert found.summary["heads for half of the gap"] == 5  # 5 of 9 x 1.0 is the first above half of 9
    assert "the 5 heads of largest single release together restore half of the gap (" in found.verdict
    assert "; one fewer restores less)" in found.verdict
    ranked = found.ablation.query("arm == 'ranked heads'")
    assert {4, 5} <= set(ranked["k"])
    assert ranked["k"].is_monotonic_increasing
