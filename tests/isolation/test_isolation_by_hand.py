"""The whole isolation on a model that is worked out on paper: G = 7, C = -4, releases 6, 3 and 2."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_model import FakeModel, fake_conflicts, isolated

from av_lens.errors import ProtocolError
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.results.record import Isolation

SHORT = {"quick": True, "named_only": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    ticks = []
    found = isolated(
        FakeModel(),
        fake_conflicts(48),
        s=0.1,
        out=out,
        progress=lambda stage, done, total: ticks.append((stage, done, total)),
    )
    return found, out, ticks


def row(found, layer, head, role):
    rows = found.heads.query("layer == @layer and head == @head and role == @role")
    assert len(rows) == 1, found.heads[["layer", "head", "role"]]
    return rows.iloc[0]


def test_behaviour_is_the_sum_on_paper(finished):
    b = finished[0].behaviour.query("half == 'discovery' and chosen == 'competent'").set_index("quantity")
    value = b["value"]
    # M(va) = 4 + 0 - 6 - 2, M(aa) = M(vv) mirrored = 4 + 0 + 6 - 2: E_A = 4 - 2 gated = 2 x 2, E_V = 12.
    assert value["G"] == pytest.approx(7, abs=0.02)
    assert value["C"] == pytest.approx(-4, abs=0.02)
    assert value["gap"] == pytest.approx(11, abs=0.02)
    assert value["E_A"] == pytest.approx(4, abs=0.02)
    assert value["E_V"] == pytest.approx(12, abs=0.02)
    assert value["C"] == pytest.approx(0.5 * (value["E_A"] - value["E_V"]), abs=1e-5)
    assert value["shortcut index"] == pytest.approx(0.75, abs=0.002)
    assert value["I"] == pytest.approx(0, abs=1e-5)


def test_every_job_gets_its_role(finished):
    found = finished[0]
    named = {(r.layer, r.head): r.role for r in found.heads.itertuples() if "carrier" not in r.role}
    assert named == {(2, 0): "picture writer", (0, 1): "gate", (2, 1): "sound opponent"}
    carriers = {(r.layer, r.head) for r in found.heads.itertuples() if r.role == "sound carrier"}
    assert carriers == {(0, 0), (1, 0)}
    assert set(found.heads.query("role == 'silenced carrier'")["layer"]) == {0, 1}
    assert found.heads["confirmed"].all()


def test_effects_are_the_numbers_on_paper(finished):
    found = finished[0]
    writer, gate, opponent = (
        row(found, 2, 0, "picture writer"),
        row(found, 0, 1, "gate"),
        row(found, 2, 1, "sound opponent"),
    )
    assert [writer.effect, gate.effect, opponent.effect] == pytest.approx([6, 3, 2], abs=0.02)
    assert [writer.direct_share, gate.direct_share, opponent.direct_share] == pytest.approx([1, 0, 1], abs=0.01)
    assert [writer.reads_picture, writer.reads_sound] == pytest.approx([6, 0], abs=0.02)
    assert [opponent.reads_picture, opponent.reads_sound] == pytest.approx([0, 2], abs=0.02)
    assert [writer.sufficiency, gate.sufficiency] == pytest.approx([6, 3], abs=0.02)
    assert writer.dla == pytest.approx(-6, abs=0.02)
    assert row(found, 0, 0, "sound carrier").effect == pytest.approx(4, abs=0.02)
    assert row(found, 1, 0, "silenced carrier").effect == pytest.approx(3, abs=0.02)
    assert found.heads["effect"].abs().is_monotonic_decreasing
    assert found.grid("release", "zero")[2, 0] == pytest.approx(6, abs=0.02)
    assert abs(found.grid("release", "blank_muted")[1, 3]) < 0.05


def test_effect_and_interval_come_from_confirmation(finished):
    found = finished[0]
    writer = row(found, 2, 0, "picture writer")
    held = found.arrays[f"confirmation/suffix/release/{writer.donor}"][:, 2, 0]
    first = found.arrays[f"discovery/suffix/release/{writer.donor}"][:, 2, 0]
    assert writer.effect == pytest.approx(held.mean())
    assert writer.discovery_effect == pytest.approx(first.mean())
    assert writer.low <= writer.effect <= writer.high
    assert np.isnan(
        found.arrays[f"confirmation/suffix/release/{writer.donor}"][:, 2, 3]
    ).all()  # not named, not measured


def test_the_set_restores_the_whole_gap_and_random_sets_do_not(finished):
    found = finished[0]
    chosen = found.sets.query("chosen").iloc[0]
    assert chosen.members == "L2H0 L0H1 L2H1"
    assert chosen.release == pytest.approx(11, abs=0.03)
    assert (chosen.says_sound_before, chosen.says_sound) == (0, 1)
    assert chosen.random_max < 0.1  # some hold a carrier of the sound, and lower hearing
    assert chosen.confirmed
    assert chosen.see_release == found.ablation.query("arm == 'see heads'")["release"].iloc[0]
    assert f"as many heads that `see` needs most restore {chosen.see_release:.2f}" in found.verdict
    assert chosen.random_n == len(found.ablation.query("arm == 'random'"))
    assert chosen.p_random == pytest.approx(1 / (1 + chosen.random_n))
    curve = found.ablation.query("arm == 'set'")["release"].to_numpy()
    np.testing.assert_allclose(curve, [6, 9, 11], atol=0.03)
    assert found.ablation.query("arm == 'see heads'")["members"].iloc[0].startswith("L1H1")


def test_controls_are_untested_below_59_items(finished):
    spec = finished[0].specificity.set_index("control")
    assert (spec.loc[["see", "audio-only", "factual heard", "factual seen", "control"], "after"] == 1).all()
    assert (spec.loc[["see", "audio-only"], "verdict"] == "untested").all()
    assert spec.loc["text-only", "verdict"].startswith("reported")


def test_the_protocol_is_written_first_and_the_record_opens_equal(finished):
    found, out, ticks = finished
    written = json.loads((out / "protocol.json").read_text())
    assert written["hash"] == found.provenance["protocol_hash"]
    assert written["s"] == 0.1
    assert set(written["halves"]["dealt"].values()) == {"discovery", "confirmation"}
    again = Isolation.load(out)
    assert again.heads.equals(found.heads)
    assert again.verdict == found.verdict
    stages = [stage for stage, done, total in ticks if done == total]
    assert stages[0] == "reading every cell"
    assert any("exact effects of 15 nodes" in stage for stage in stages)
    assert "exploratory" in found.stamps
    holm = found.heads.query("role in ('picture writer', 'sound opponent', 'gate')")["p_holm"].max()
    listed = "picture writer L2H0; sound opponent L2H1; gate L0H1"
    assert f"Confirmed, untested over words (fewer than 8) at suffix: {listed} (p after Holm at most {holm:.2g})." in (
        found.verdict
    )
    assert f"(p = {found.sets.query('chosen')['p_random'].iloc[0]:.3f}, floor " in found.verdict
    assert "A member's role is the same alone and in the set where not said otherwise." in found.verdict


def test_protocol_stands_before_the_first_effect(tmp_path):
    class Stops(ModelEngine):
        def changed(self, recording, plans):
            assert (tmp_path / "protocol.json").exists()
            raise RuntimeError("first effect")

    with pytest.raises(RuntimeError, match="first effect"):
        isolated(FakeModel(), fake_conflicts(48), engine=Stops(FakeModel()), s=0.1, out=tmp_path)


def test_nothing_to_explain_stops_the_search():
    engine = FakeModel(writer=0.0, gate=0.0, opponent=0.0)
    found = isolated(engine, fake_conflicts(48), s=0.1)
    assert found.verdict_kind == "no suppression"
    assert found.verdict.startswith("Exploratory, no verdict. No suppression: hearing falls from G = 7.00")
    assert found.heads.empty
    assert not any("discovery/suffix" in key for key in found.arrays)
    on = isolated(engine, fake_conflicts(48), s=0.1, gate="report", **SHORT)
    assert on.verdict_kind == "no suppression"
    assert "not interpretable" in on.stamps
    assert not len(on.suppressors)
    assert on.verdict.startswith("No suppression: hearing falls from G = 7.00")
    none = "What the search would have named at suffix: no head or MLP as a suppressor above 0.10 of G."
    assert none in on.verdict
    assert "The smallest release of a single head that 24 components" in on.verdict
    assert "confirmed" not in on.verdict


@pytest.mark.slow
def test_interference_is_told_from_dominance():
    found = isolated(FakeModel(writer=2.0, opponent=0.5), fake_conflicts(48), s=0.1, **SHORT)
    assert "Interference, not dominance" in found.verdict  # C = 4 - 2 - .5 = 1.5


def test_what_cannot_hear_is_refused(tmp_path):
    class Deaf(FakeModel):
        def _heads(self, one):
            z = super()._heads(one).clone()
            z[0, 0], z[1, 0] = 0, 0
            return z

    engine = Deaf(gate=0.0, opponent=0.0, noise=1e-3)
    with pytest.raises(ProtocolError, match=r"refused: the model does not hear: with nothing to see its hearing G is"):
        isolated(engine, fake_conflicts(48), s=0.1, out=tmp_path)
    assert Isolation.load(tmp_path).verdict_kind == "does not hear"


def test_what_would_say_neither_word_is_refused():
    class Mumbling(FakeModel):
        def _stream(self, z):
            stream = super()._stream(z)
            stream[..., -1] = 30.0
            return stream

    with pytest.raises(
        ProtocolError, match=r"the model would say neither word here: the median of P\(sound's answer\)"
    ):
        isolated(Mumbling(), fake_conflicts(48), s=0.1)


def test_too_few_conflicts_are_refused():
    with pytest.raises(ProtocolError, match=r"30 conflicts were given; isolation needs at least 20 competent ones"):
        isolated(FakeModel(), fake_conflicts(30), s=0.1)


@pytest.mark.slow
def test_incompetent_conflicts_are_left_out_and_too_many_are_refused():
    class Blind(FakeModel):
        def _heads(self, one):
            z = super()._heads(one)
            if one.question == "see" and one.noise % 2:  # half of the conflicts are not seen
                z = z.clone()
                z[1, 1] = 0
            return z

    with pytest.raises(ProtocolError, match=r"are competent .* at least 20 in each half"):
        isolated(Blind(), fake_conflicts(48), s=0.1)
    found = isolated(Blind(), fake_conflicts(48), s=0.1, gate="report", **SHORT)
    assert "not interpretable" in found.stamps


def test_wrong_names_are_refused_with_the_nearest():
    with pytest.raises(ProtocolError, match=r"unknown gate 'stopp'. Did you mean 'stop'"):
        isolated(FakeModel(), fake_conflicts(48), gate="stopp")
    with pytest.raises(ProtocolError, match=r"unknown site 'sufix'. Did you mean 'suffix'"):
        isolated(FakeModel(), fake_conflicts(48), sites=("sufix",))


@pytest.mark.slow
def test_two_sites_share_one_family():
    found = isolated(FakeModel(), fake_conflicts(44), s=0.1, sites=("suffix", "generation"), **SHORT)
    assert found.protocol["family"] == 2 * (12 * 14 + 3 * 9)
    assert set(found.heads["site"]) == {"suffix", "generation"}
    assert "Confirmed, untested over words (fewer than 8) at suffix, generation:" in found.verdict
