"""A verdict says no more than was shown: one donor alone, refusals that were gone past, both roles, cut clips."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

import pytest
from fake_kinds import HardOfHearing, Muttering
from fake_model import FakeConflict, FakeModel, PaperEngine, bench_of, fake_conflicts, isolated
from rich.console import Console
from small_av import small_clip, small_model

from av_lens.cli import console
from av_lens.errors import ProtocolError
from av_lens.inputs import Conflict
from av_lens.isolation.measuring.behaviour import survey
from av_lens.isolation.running import preparing
from av_lens.isolation.running.verdicts import cut_sentence
from av_lens.isolation.sets.confirmation import by_the_question_alone, one_donor_alone
from av_lens.reports import write_report

SUPPRESSORS = {(2, 0): "picture writer", (2, 1): "sound opponent", (0, 1): "gate"}


def run(model=None, conflicts=None, **options):
    conflicts = fake_conflicts(44) if conflicts is None else conflicts
    return isolated(model or FakeModel(), conflicts, s=0.1, **{"quick": True, "named_only": True} | options)


def heads(found):
    rows = found.heads[found.heads["role"].isin(SUPPRESSORS.values())]
    return {(row.layer, row.head): row for row in rows.itertuples()}


class AlwaysOn(FakeModel):
    """The gate's signal is 1 whatever is shown and asked: G = 4, and only switching it off releases (3 logits)."""

    def _heads(self, one):
        if one not in self.known:
            super()._heads(one)[0, 1, -1] = 1.0
        return self.known[one]


@pytest.fixture(scope="module")
def always_on():
    return run(AlwaysOn())


@pytest.mark.parametrize(
    ("releases", "alone"),
    [
        ((3.0, 1.4, 0.0), True),  # below half of 3
        ((3.0, 1.6, 0.0), False),
        ((3.0, math.nan, 0.9), True),
        ((3.0, math.nan, math.nan), True),
    ],
)
def test_one_donor_alone_is_the_second_release(releases, alone):
    assert one_donor_alone(releases) is alone
    assert one_donor_alone(releases[::-1]) is alone


@pytest.mark.parametrize(
    ("releases", "alone"),
    [
        ({"mean_other": 3.0, "zero": 2.0, "blank_muted": 0.7, "audio_only": 0.0, "mean_task": 0.1}, True),
        ({"mean_other": 3.0, "zero": 2.0, "blank_muted": 0.8, "audio_only": 0.0, "mean_task": 0.1}, False),
        ({"mean_other": 3.0, "zero": 2.0, "blank_muted": 0.0, "audio_only": 0.8, "mean_task": math.nan}, False),
        ({"mean_other": 3.0, "zero": 2.0, "blank_muted": 0.0, "mean_task": 0.8}, False),
        ({"zero": 2.0}, False),  # no donor was asked the same: nothing is said
    ],
)
def test_the_question_alone_is_no_release_by_donors_that_were_asked_the_same(releases, alone):
    assert by_the_question_alone(releases) is alone


def test_a_role_by_one_donor_alone_is_replicated_and_not_confirmed(always_on):
    gate = heads(always_on)[0, 1]
    assert [gate.release_zero, gate.release_half_dose] == pytest.approx([3, 1.5], abs=0.02)
    assert max(abs(gate.release_blank_muted), abs(gate.release_mean_other)) < 0.02
    assert (gate.status, gate.confirmed, gate.would_confirm) == ("replicated, one donor alone", False, False)
    assert {"replicated, one donor alone", "always on"} < set(gate.flags.split("; "))
    said = "Replicated on held-out clips, by one donor alone: gate L0H1 (always on: half a dose releases 1.50 of 3.0"
    assert said in always_on.verdict
    confirmed = {at: row.role for at, row in heads(always_on).items() if row.confirmed}
    assert confirmed == {at: role for at, role in SUPPRESSORS.items() if at != (0, 1)}
    assert "did not hold" not in always_on.verdict
    member = always_on.members.query("chosen and layer == 0 and head == 1").iloc[0]
    assert [member.context_zero, member.context_blank_muted] == pytest.approx([3, 0], abs=0.02)
    assert not member.confirmed


@pytest.mark.slow
def test_the_first_edition_confirms_by_one_donor():
    gate = heads(run(AlwaysOn(), protocol="1"))[0, 1]
    assert (gate.status, gate.confirmed) == ("confirmed", True)


def test_both_roles_are_told(always_on):
    rows = heads(always_on)
    assert {at: (row.role_alone, row.role_in_set) for at, row in rows.items()} == {
        at: (role, role) for at, role in SUPPRESSORS.items()
    }
    assert "A member's role is the same alone and in the set where not said otherwise." in always_on.verdict


def test_the_test_over_words_is_told_beside_one_donor_alone(always_on):
    assert "untested over words" in heads(always_on)[0, 1].flags


@pytest.fixture(scope="module")
def refused():
    return run(Muttering(), gate="report")


def test_past_a_refusal_the_verdict_begins_with_it_and_says_what_would_have_been_named(refused):
    begin = "Refused: the model would say neither word here: the median of P(sound's answer) + P(picture's) in the conf"
    assert refused.verdict.startswith(begin)
    listed = "What the search would have named at suffix: holding on held-out clips, untested over words (fewer than 8)"
    assert f"{listed}: picture writer L2H0; sound opponent L2H1; gate L0H1 (p after" in refused.verdict
    assert "The set would hold" in refused.verdict
    assert refused.verdict_kind == "says neither"
    rows = heads(refused)
    assert {at: row.role for at, row in rows.items()} == SUPPRESSORS
    assert all((row.status, row.confirmed, row.would_confirm) == ("would hold", False, True) for row in rows.values())
    for name in ("sets", "members"):
        chosen = getattr(refused, name).query("chosen")
        assert not chosen["confirmed"].any()
        assert chosen["would_confirm"].all()
    assert refused.suppressors.empty
    assert refused.summary["confirmed suppressors"] == 0


def test_past_a_refusal_the_word_stands_nowhere(refused, tmp_path):
    page = write_report(refused, tmp_path / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    shown = Console(width=200, record=True)
    shown.print(console.head_table(refused))
    words = [*refused.heads[["status", "flags"]].to_numpy().ravel(), *refused.sets["flags"], *refused.reasons]
    for said in (refused.verdict, text, shown.export_text(), *map(str, words)):
        assert "confirmed" not in said.lower(), re.findall(r".{60}confirmed.{20}", said, flags=re.I | re.S)
    assert "would hold" in text


def test_how_many_are_competent_is_counted_cell_by_cell():
    model, conflicts = HardOfHearing(), fake_conflicts(44)
    with pytest.raises(ProtocolError) as refusal:
        run(model, conflicts)
    said = re.search(
        r"Competent are (\d+) of 44 conflicts \(right between the two: blank_a (\d+), blank_v (\d+), v_muted \(see\) "
        r"(\d+), a_muted \(see\) (\d+)\)",
        str(refusal.value),
    )
    found = survey(bench_of(model, conflicts).chunks(range(44)), 44)
    heard = [found.margin("blank_a") > 0, found.margin("blank_v") < 0]
    counts = [int((heard[0] & heard[1]).sum()), *(int(one.sum()) for one in heard), 44, 44]  # all pictures are seen
    assert list(map(int, said.groups())) == counts
    assert 0 < counts[0] < 44


def test_a_refusal_before_the_run_is_remembered(monkeypatch):
    monkeypatch.setattr(preparing, "family_size", lambda *_, **__: 10**6)
    model, options = FakeModel(), preparing.Options(("suffix",), 0.1, "report", 0, "in_video", True)
    made = preparing.prepared(model, fake_conflicts(44), options, engine=PaperEngine(model), progress=None)
    ((kind, sentence),) = made.refused
    assert kind == "too few sources"
    assert sentence.startswith("22 components on discovery are too few for 1000000 tests: no effect, however large")
    assert "not interpretable" in made.stamps
    made.survey = survey(made.bench.chunks(range(44)), 44)
    competence = made.read.competence()
    for sentence in ("One thing.", "Another."):
        made.go_past("refused", f"{sentence} {competence}")
    assert [said for _, said in made.refused[1:]] == [f"One thing. {competence}", "Another."]


@dataclass(frozen=True)
class Cut(FakeConflict):
    """A conflict that says to what its cells were cut."""

    cut_to_s: float | None = None

    def cells(self, model, **options):
        said = {"cut_to_s": self.cut_to_s, "whole_s": 2.0}
        found = super().cells(model, **options)
        return {name: dataclasses.replace(x, provenance=said) for name, x in found.items()}


@pytest.fixture(scope="module")
def asked():
    """What nothing refuses; three conflicts are cut."""
    cut = {3: 0.3, 4: 1.85, 5: 1.7}
    return run(conflicts=[Cut(**vars(one), cut_to_s=cut.get(i)) for i, one in enumerate(fake_conflicts(44))])


def test_the_same_heads_are_confirmed_where_nothing_is_refused(asked, tmp_path):
    assert all(row.confirmed and row.would_confirm for row in heads(asked).values())
    assert set(asked.sets.query("chosen")["would_confirm"]) == {True}
    assert "Confirmed" in asked.verdict
    assert "✓ confirmed" in write_report(asked, tmp_path / "asked.html").read_text(encoding="utf-8")


def test_what_was_cut_stands_in_the_rows_and_much_of_it_in_the_verdict(asked):
    rows = asked.conflicts.set_index("id")
    assert rows["cut_to_s"].dropna().to_dict() == {"c003": 0.3, "c004": 1.85, "c005": 1.7}
    assert (rows["whole_s"] == 2.0).all()
    said = "2 conflicts lose over a tenth of their length, cut to the shortest of their clips: "
    assert f"{said}c003 (0.30 of 2.00 s), c005 (1.70 of 2.00 s)." in asked.verdict
    assert cut_sentence([{"id": "c004", "cut_to_s": 1.85, "whole_s": 2.0}]) == ""


def test_a_third_clip_cuts_its_conflict_and_says_so():
    clips = {name: small_clip(seed) for seed, name in enumerate(("sound", "picture"))}
    one = Conflict(question="What?", answers=("a", "b"), third=small_clip(2, seconds=1.0), **clips)
    assert {name: one.cells(small_model())["va"].provenance[name] for name in ("cut_to_s", "whole_s")} == {
        "cut_to_s": pytest.approx(1.0), "whole_s": pytest.approx(2.0)
    }  # fmt: skip
    longer = dataclasses.replace(one, third=small_clip(2, seconds=3.0)).cells(small_model())["va"].provenance
    assert longer["whole_s"] == pytest.approx(2.0)  # nothing of the conflict itself is lost
    assert longer["cut_to_s"] == pytest.approx(2.0)


def test_reversals_are_counted_and_told(asked):
    assert (asked.behaviour.query("quantity == 'reversal rate'")["value"] == 1.0).all()
    said = "In 100% of these 22 conflicts the sound's answer with nothing to see turns into the picture's under"
    assert said in asked.verdict
    conflicts = fake_conflicts(8)
    never = survey(bench_of(FakeModel(writer=2.0, opponent=0.5), conflicts).chunks(range(8)), 8)  # C = 1.5
    assert (never.turned == 0).all()
