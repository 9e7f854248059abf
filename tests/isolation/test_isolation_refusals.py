"""Each refusal of the protocol's sections 1, 2 and 7: the sentence, with its figure and what to do."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from fake_kinds import Deaf, HardOfHearing, Muttering
from fake_model import FakeConflict, FakeModel, PaperEngine, bench_of, fake_clip, fake_conflicts, isolated
from small_av import small_model

from av_lens.errors import ProtocolError
from av_lens.inputs import Answer
from av_lens.isolation import isolate
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.running import preparing
from av_lens.results.record import Isolation

COUNTED = (
    r"Competent are \d+ of 44 conflicts \(right between the two: blank_a \d+, blank_v \d+, v_muted \(see\) \d+, "
    r"a_muted \(see\) \d+\)\."
)


def run(model=None, conflicts=None, **options):
    options = {"s": 0.1, "quick": True} | options
    conflicts = fake_conflicts(44) if conflicts is None else conflicts
    return isolated(model or FakeModel(), conflicts, **options)


def interrupting(line):
    """Stop a run at its first line: what would be refused before it has not been."""
    raise InterruptedError(line)


def worded(*answers):
    """Enough conflicts, all with these answers."""
    given = tuple(list(one) if isinstance(one, tuple) else one for one in answers)
    return [dataclasses.replace(one, answers=given) for one in fake_conflicts(44)]


class TestSection1:
    @pytest.mark.parametrize(
        ("answers", "text"),
        [
            (((0, 1), (2,)), "has 2 synonyms and .* has 1: more synonyms win by number alone, so give"),
            (((0, 1), (1, 2)), "begin with the same token '<1>', .* or move the shared part into the prefix"),
            (((1,), (1,)), "the two answers are equal"),
            ((Answer("dog", ((1, 2, 3),)), 1), "begin with the same token '<1>'"),
        ],
    )
    def test_answers_that_cannot_be_used(self, answers, text):
        with pytest.raises(ProtocolError, match=rf"^0 conflicts can be used. 44 of 44 .* answers: c000 \(.*{text}"):
            run(conflicts=worded(*answers))

    def test_one_conflict_that_cannot_be_used_is_left_out_by_name(self, found_and_told):
        conflicts = fake_conflicts(44)
        found = run(conflicts=[*conflicts[:5], dataclasses.replace(worded(1, 1)[0], id="twin"), *conflicts[5:]])
        assert found.reasons[0].startswith("1 of 45 conflicts are left out for their answers: twin (the two answers")
        assert list(found.provenance["answers"]["left_out"]) == ["twin"]
        assert "twin" not in set(found.conflicts["id"])
        plain, _ = found_and_told
        np.testing.assert_array_equal(found.heads["effect"], plain.heads["effect"])
        assert found.verdict == plain.verdict

    def test_w_cells_without_a_third_clip(self):
        conflicts = fake_conflicts(4)
        chunk = bench_of(FakeModel(), conflicts).chunks(range(4))[0]
        text = "the cell 'wa' needs a third clip and none of these conflicts has one: give `third=`, or more conflicts"
        with pytest.raises(ProtocolError, match=text):
            chunk.run("wa")
        assert bool(chunk.donor("va", "wa").isnan().all())  # what needs it is NaN

    def test_without_third_clips_what_reads_them_is_nan(self):
        two_classes = [FakeConflict.of(f"c{i:03d}", i % 2, 1 - i % 2) for i in range(44)]
        found = run(conflicts=two_classes)
        writer = found.heads.query("layer == 2 and head == 0 and role != 'sound carrier'").iloc[0]
        assert writer.effect == pytest.approx(6, abs=0.05)
        assert np.isnan(writer.reads_picture)
        assert writer.role == "undetermined"  # its kind cannot be told without a third clip


class TestSection2:
    def test_a_model_that_would_say_neither_word(self, tmp_path):
        text = (
            r"^refused: the model would say neither word here: the median of P\(sound's answer\) \+ P\(picture's\) in "
            r"the conflict is 0\.000, below 0\.1\. Give a prefix \(such as \"I hear a\"\) or answers that it would "
            rf"say\. {COUNTED} Its behaviour is saved in {tmp_path}\.$"
        )
        with pytest.raises(ProtocolError, match=text):
            run(Muttering(), out=tmp_path)
        assert Isolation.load(tmp_path).verdict_kind == "says neither"

    def test_a_model_that_does_not_hear(self, tmp_path):
        engine = Deaf(gate=0.0, opponent=0.0, noise=1e-3)
        text = (
            r"^refused: the model does not hear: with nothing to see its hearing G is -?0\.0\d logits \(95% interval "
            r"-?0\.0\d to -?0\.0\d\), which is not above 0\. There is no hearing to suppress; try sounds that it"
        )
        with pytest.raises(ProtocolError, match=text):
            run(engine, out=tmp_path)
        assert Isolation.load(tmp_path).verdict_kind == "does not hear"

    def test_a_set_on_which_it_fails_with_the_sound_alone(self):
        text = (
            r"^refused: \d+ of 22 conflicts in discovery and \d+ of 22 in confirmation are competent \(the sound is "
            r"heard with nothing to see, the picture is seen with nothing to hear\); isolation needs at least 20 in "
            rf"each half\. {COUNTED} Add conflicts, or clips that the model knows\.$"
        )
        with pytest.raises(ProtocolError, match=text):
            run(HardOfHearing(noise=1.0))

    def test_no_gap_to_explain(self):
        found = run(FakeModel(writer=0.0, gate=0.0, opponent=0.0))
        assert found.verdict_kind == "no suppression"
        assert "No suppression: hearing falls from G = 7.00" in found.verdict
        assert "which is below a quarter of G" in found.verdict
        assert re.search(COUNTED, found.verdict)
        assert not len(found.heads)

    def test_a_gap_that_may_be_too_small(self):
        # M(va) = 4 + 3 - w: the gap is w, a quarter of G is 1.75.
        found = run(FakeModel(writer=1.75, gate=0.0, opponent=0.0, noise=0.5))
        assert found.verdict_kind == "not established"
        assert "Suppression is not established: hearing falls from G = " in found.verdict
        assert "gap - G/4 is " in found.verdict
        assert not len(found.heads)

    def test_past_the_gate_every_page_is_stamped(self):
        found = run(Muttering(), gate="report", named_only=True)
        assert "not interpretable" in found.stamps
        assert any("would say neither word here" in reason for reason in found.reasons)
        found = run(FakeModel(writer=0.0, gate=0.0, opponent=0.0), gate="report", named_only=True)
        assert any("the search went on past the gate: No suppression" in reason for reason in found.reasons)


class TestSection3:
    @pytest.mark.parametrize(
        ("donor", "why"), [("audio_only", "it has another layout"), ("mean_other", "the question comes after them")]
    )
    def test_donors_that_media_positions_cannot_have(self, donor, why):
        conflicts = fake_conflicts(4)
        bench = bench_of(FakeModel(), conflicts)
        chunk = bench.chunks(range(4))[0]
        chunk.run("va")  # the fake model has no site in its media: its run is taken for one
        chunk.site, chunk.means = "audio", Means.over([chunk])
        with pytest.raises(ProtocolError, match=rf"the donor '{donor}' is undefined at media positions: {why}\."):
            chunk.donor("va", donor)


@pytest.fixture(scope="module")
def found_and_told():
    lines = []
    return run(told=lines.append), lines


class TestSection7:
    def test_fewer_than_40_conflicts(self):
        text = (
            r"30 conflicts were given; isolation needs at least 20 competent ones in each half \(40 in all, 120 for a "
            r"verdict\)\. Add conflicts\."
        )
        with pytest.raises(ProtocolError, match=text):
            run(conflicts=fake_conflicts(30))

    def test_fewer_than_60_a_half_are_exploratory(self, found_and_told):
        found, _ = found_and_told
        assert "exploratory" in found.stamps
        assert found.verdict.startswith("Exploratory, no verdict. ")
        sentence = (
            "exploratory: 22 and 22 competent conflicts in the halves; a verdict needs 60 conflicts and 20 components "
            "in each."
        )
        assert sentence in found.reasons

    def test_what_quick_leaves_out_is_said(self, found_and_told):
        found, _ = found_and_told
        assert any(reason.startswith("Left out, as asked (quick): robustness") for reason in found.reasons)
        assert found.protocol["left_out"] == ["robustness", preparing.LEFT_OUT_PAIRS]

    def test_the_power_is_said_before_and_written_down(self, found_and_told):
        found, lines = found_and_told
        power = found.protocol["power"]
        assert power["discovery_components"] == 22
        # (z(1 - .05 / 195) + z(.8)) / sqrt(22) = (3.47 + 0.84) / 4.69
        assert power["smallest_effect_in_sd"] == pytest.approx(0.92, abs=0.005)
        assert lines[0].startswith("Power: 22 components on discovery and 195 tests find, four times in five, a rel")

    def test_no_power_is_said_too(self):
        few = [
            dataclasses.replace(one, sound=fake_clip(f"s{i % 4}", one.sound.answer))
            for i, one in enumerate(fake_conflicts(44))
        ]
        lines = []
        run(conflicts=few, told=lines.append, protocol="1")
        assert lines[0].startswith("Power: 2 components on discovery are too few for 132 tests: no effect, however")
        text = (
            r"^refused: \d+ and \d+ conflicts could be dealt to halves that share no source \(\d+ conflicts lie across "
            r"the halves\); isolation needs at least 20 in each\. Use more sources, or let `av-lens pairs` make "
            r"disjoint conflicts of them \(one a pair of clips\)\.$"
        )
        with pytest.raises(ProtocolError, match=text):
            run(conflicts=[dataclasses.replace(one, sound=fake_clip("s", one.sound.answer)) for one in few])

    def test_no_effect_that_could_pass_is_refused_before_the_run(self, monkeypatch):
        monkeypatch.setattr(preparing, "family_size", lambda *_, **__: 10**6)
        text = (
            r"^refused: 22 components on discovery are too few for 1000000 tests: no effect, however large, could pass "
            r"them\. Use more sources, or let `av-lens pairs` make disjoint conflicts"
        )
        with pytest.raises(ProtocolError, match=text):
            run()

        with pytest.raises(InterruptedError, match=r"^Power: 22 components on discovery are too few for 1000000 tests"):
            run(protocol="1", told=interrupting)  # the first edition says so, and would go on

    def test_an_edition_that_there_is_not(self):
        with pytest.raises(ProtocolError, match=r"unknown edition of the protocol '3'"):
            run(protocol="3")

    def test_a_small_run_is_a_pilot(self, found_and_told):
        found, _ = found_and_told
        text = r"The largest single release is L2H0's \(\w+\)\. With these 22 pilot conflicts \(.*: 120 disjoint"
        assert any(re.match(text, reason) for reason in found.reasons), found.reasons


def test_answers_whose_synonyms_overlap_are_refused():
    answers = [([0, 1], [2, 3]), ([0, 4], [2, 3])]
    conflicts = [dataclasses.replace(one, answers=answers[i % 2]) for i, one in enumerate(fake_conflicts(44))]
    text = r"22 conflicts can be used.*c001 \(.*share a word \(their synonyms overlap\): give one list of synonyms"
    with pytest.raises(ProtocolError, match=text):
        run(conflicts=conflicts)
    few = [dataclasses.replace(one, answers=answers[i in (3, 7)]) for i, one in enumerate(fake_conflicts(44))]
    found = run(conflicts=few, gate="report", named_only=True)
    assert list(found.provenance["answers"]["left_out"]) == ["c003", "c007"]


def test_a_third_clip_from_the_other_half_is_refused():
    conflicts = fake_conflicts(44)
    options = preparing.Options(("suffix",), 0.1, "stop", 0, "in_video", True)
    made = preparing.prepared(FakeModel(), conflicts, options, engine=PaperEngine(FakeModel()), progress=None)
    half = made.halves.half
    other = next(i for i in range(44) if half[i] != half[0])
    conflicts[0] = dataclasses.replace(conflicts[0], third=conflicts[other].sound)
    with pytest.raises(ProtocolError, match=rf"conflict 'c000' was dealt to {half[0]}.*source clip of {half[other]}"):
        run(conflicts=conflicts)
    conflicts[0] = dataclasses.replace(conflicts[0], third=fake_clip("apart", 5))
    with pytest.raises(InterruptedError, match=r"^Power: "):
        run(conflicts=conflicts, told=interrupting)  # a clip of no conflict's is nobody's


def test_past_the_gate_competence_and_what_is_analysed_are_told_apart():
    found = run(HardOfHearing(), gate="report", named_only=True)
    assert {"not interpretable", "exploratory"} <= set(found.stamps)
    frame = found.conflicts
    assert frame["analysed"].all()
    assert 0 < frame["competent"].sum() < len(frame)
    chosen = found.behaviour[found.behaviour["chosen"] == "competent"]
    assert chosen["n"].max() < found.behaviour[found.behaviour["chosen"] == "all"]["n"].max()


def test_what_is_measured_under_hooks_is_not_kept(tmp_path):
    model = small_model()
    look = ("blocks.1.attn.hook_z", lambda z, hook: None)
    with (
        model.hooks(fwd_hooks=[look]),
        pytest.raises(ProtocolError, match=r"`out` keeps .* at blocks.1.attn.o.hook_in:"),
    ):
        isolate(model, fake_conflicts(44), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
