"""Conflicts that share clips, from the deal to the verdict, on the model on paper."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from fake_model import FakeModel, fake_conflicts, isolated, ring

import av_lens as avl
from av_lens.inputs.designs import design_conflicts
from av_lens.isolation.running import dealt
from av_lens.lab.calibration import pairs
from av_lens.organism import footage
from av_lens.results.record import RELEASING
from av_lens.results.statistics import Bootstrap


def run(conflicts, **options):
    return isolated(FakeModel(n_classes=10), conflicts, s=0.1, **{"quick": True, "named_only": True} | options)


def named(found):
    return {(row.layer, row.head, row.role, bool(row.confirmed)) for row in found.heads.itertuples()}


@pytest.fixture(scope="module")
def shared():
    conflicts = ring()
    again = dataclasses.replace(conflicts[3], id="again", sound=conflicts[3].picture, picture=conflicts[3].sound,
                                answers=conflicts[3].answers[::-1])  # fmt: skip
    return run([*conflicts, again])


def test_a_permutation_names_what_disjoint_conflicts_name(shared):
    apart = run(fake_conflicts(44, n_classes=10))
    assert named(shared) == named(apart)
    assert shared.verdict_kind == apart.verdict_kind == "named"
    assert any(role in RELEASING for _, _, role, confirmed in named(shared) if confirmed)
    assert shared.provenance["inference"]["discovery"]["effects"].startswith("dyadic by source")
    assert apart.provenance["inference"]["discovery"]["effects"].startswith("bootstrap and sign flips by component")
    for found in (shared, apart):  # w is a third source, which others share, whatever the design
        assert found.provenance["inference"]["discovery"]["effects with the third clip"].startswith("dyadic by source")
        assert found.provenance["inference"]["confirmation"]["over words"].startswith("dyadic by word")


def test_what_is_left_out_is_counted(shared):
    assert shared.reasons[0].startswith("1 conflicts are left out because an earlier one has the same two sources")
    assert "again" not in set(shared.conflicts["id"])
    assert shared.reasons[1].startswith("Conflicts share sources: sources were dealt to the halves, 2 conflicts across")
    assert (shared.conflicts["half"] == "lost").sum() == 2
    assert shared.protocol["halves"]["rule"] == "dyadic"
    assert shared.protocol["halves"]["doubled"] == ["again"]
    clips = {half: set() for half in ("discovery", "confirmation")}
    for row, conflict in zip(shared.conflicts.itertuples(), ring(), strict=True):
        if row.half in clips:
            clips[row.half] |= {conflict.sound.sha256, conflict.picture.sha256}
    assert not clips["discovery"] & clips["confirmation"]


def test_what_holds_on_clips_and_not_over_words_is_told(monkeypatch):
    kept = dealt.Dealt.rules

    def with_words(self, examples, *, seed):
        boot, third, words = kept(self, examples, seed=seed)
        # All conflicts of one word: its effect is the mean, and nothing holds over words.
        return boot, third, dataclasses.replace(words, members=np.zeros_like(words.members[:, :1]), n_sources=9)

    monkeypatch.setattr(dealt.Dealt, "rules", with_words)
    found = run(fake_conflicts(44, n_classes=10))
    releasing = found.heads[found.heads["role"].isin(RELEASING)]
    assert len(releasing)
    assert not releasing["confirmed"].any()
    assert releasing["flags"].str.contains("on these words").all()
    assert (releasing["status"] == "on these words").all()
    assert "On these words: " in found.verdict
    assert "did not hold" not in found.verdict


@pytest.mark.slow
def test_few_words_are_said_to_be_untested():
    found = run(fake_conflicts(44, n_classes=6))
    assert "Confirmed, untested over words (fewer than 8) at suffix: " in found.verdict
    confirmed = found.heads[found.heads["confirmed"] & found.heads["role"].isin(RELEASING)]
    assert confirmed["flags"].str.contains("untested over words").all()


def test_the_first_edition_is_bootstrap_and_flips_of_all():
    found = run(fake_conflicts(44, n_classes=6), protocol="1")
    assert found.provenance["bootstrap_units"] == ["component", "component"]
    assert "inference" not in found.provenance
    assert not found.heads["flags"].str.contains("words").any()
    row = found.heads.iloc[0]
    at = (slice(None), int(row["layer"]), int(row["head"]))
    effect = found.arrays[f"confirmation/suffix/{row.estimand}/{row.donor}"][at]
    n = len(effect)
    frame = found.conflicts[found.conflicts["half"] == "confirmation"]
    boot = Bootstrap.draw(frame["component"].tolist(), [f"a{i}" for i in range(n)], [f"b{i}" for i in range(n)], seed=1)
    bounds = boot.mean(effect)
    assert (row.low, row.high) == (float(bounds.low), float(bounds.high))
    assert math.isclose(row.effect, float(bounds.value))


@pytest.mark.slow
def test_one_permutation_of_280_clips_names_what_140_disjoint_conflicts_name(tmp_path):
    """Minutes: av-tiny on the same clips, joined by `av-lens pairs` in two ways."""
    for i, (kind, _) in enumerate(pairs(280, seed=0)):
        (tmp_path / "clips" / kind).mkdir(parents=True, exist_ok=True)
        footage.example("discovery", kind, 900_000 + i).save(tmp_path / "clips" / kind / f"{i}.mp4")
    found = {}
    for design, n, rule in (("disjoint", 140, "components"), ("permutation", 280, "dyadic")):
        made = design_conflicts(tmp_path / "clips", design=design, prefix="")
        print(made)
        assert len(made) == n
        assert "enough for a verdict" in made.shows
        listed = avl.conflicts(made.save(tmp_path / f"{design}.jsonl"))
        found[design] = avl.isolate(avl.load("av-tiny"), listed, quick=True, named_only=True)
        print(found[design].verdict, found[design].heads.iloc[:, :12].to_string(), sep="\n")
        assert found[design].protocol["halves"]["rule"] == rule
        assert not found[design].stamps
        assert found[design].verdict_kind == "named"
    held = [one.heads[one.heads["role"].isin(RELEASING) & (one.heads["status"] != "not replicated")]
            for one in found.values()]  # fmt: skip
    names = [set(zip(rows["layer"], rows["head"], strict=True)) for rows in held]
    assert names[0] == names[1]  # by the permutation L4H2 holds on new clips and not over words, and is told so
    assert len(names[0]) >= 4
