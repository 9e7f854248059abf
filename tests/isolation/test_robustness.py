"""Robustness: who is named again under other choices, counted on models whose heads are known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_model import FakeModel, bench_of, fake_conflicts
from small_av import small_clip, small_model

import av_lens as avl
from av_lens.errors import InputError
from av_lens.isolation.explaining import robustness
from av_lens.isolation.explaining.knowledge import Known
from av_lens.isolation.explaining.robustness import Variant, compared, jaccard, other_words
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming import evidence
from av_lens.isolation.sets.confirmation import Held
from av_lens.results.statistics import Bootstrap

GATE, WRITER, OPPONENT = (0, 1), (2, 0), (2, 1)


@pytest.fixture(scope="module")
def searched():
    bare = fake_conflicts(24)
    thirds = [next(other.sound for other in bare if other.answers[0] not in one.answers) for one in bare]
    conflicts = [replace(one, third=third) for one, third in zip(bare, thirds, strict=True)]
    bench = bench_of(FakeModel(), conflicts)
    clips = [one.id for one in conflicts]
    boot = Bootstrap.draw(range(24), clips, clips, seed=0)
    G, C = np.full(24, 7.0), np.full(24, -4.0)
    half = Half("discovery", np.arange(24), list(range(24)), boot, G, C)
    found = evidence.search(bench, half, s=0.1, floor=None, sites=("suffix",), seed=0, family=12 * 14 + 3 * 9)
    return Known(bench, half, half, found, Held({}))


def test_jaccard_and_who_turned():
    main = {WRITER: "picture writer", GATE: "gate", OPPONENT: "sound opponent"}
    again = {WRITER: "picture writer", GATE: "undetermined", (1, 3): "gate"}
    row = compared("x", main, again)
    assert row["jaccard"] == pytest.approx(2 / 4)
    assert (row["kept"], row["lost"], row["gained"]) == ("L0H1 L2H0", "L2H1", "L1H3")
    assert row["turned"] == "L0H1: gate -> undetermined"
    assert np.isnan(jaccard({}, {}))
    assert jaccard(main, {}) == 0


def test_bootstraps_name_the_same_heads_where_effects_are_clear(searched, monkeypatch):
    monkeypatch.setattr(robustness, "variants", lambda *_, **__: [])
    rows = robustness.robustness_rows(searched, draws=4)
    assert [row["variant"] for row in rows] == ["bootstraps of clips (4)"]
    assert rows[0]["jaccard"] == 1.0
    assert rows[0]["kept"] == "L0H1 1.00, L2H0 1.00, L2H1 1.00"


def test_a_variant_that_takes_a_job_away_loses_that_head(searched, monkeypatch):
    without = bench_of(FakeModel(writer=0.0), searched.bench.conflicts)
    monkeypatch.setattr(robustness, "variants", lambda *_, **__: [Variant("no writer", question="hear")])
    monkeypatch.setattr(robustness, "_varied", lambda *_: without)
    row = robustness.robustness_rows(searched, draws=1)[0]
    assert (row["kept"], row["lost"], row["gained"]) == ("L0H1 L2H1", "L2H0", "")
    assert row["jaccard"] == pytest.approx(2 / 3)
    assert row["rank_correlation"] < 1


def test_the_other_wording_is_one_that_the_model_was_taught():
    taught = {"questions": {"hear": ["what do you hear?", "what can you hear?", "what sound is it?"]}}
    organism = SimpleNamespace(grammar=taught)
    assert other_words(organism, ["What do you hear?"]) == "what can you hear?"
    assert other_words(organism, ["What do you hear?", "what can you hear?"]) == "what sound is it?"
    assert other_words(object(), ["What do you hear?"]) == "What can you hear?"
    assert other_words(object(), ["What can you hear?"]) == "Which sound is there?"


def test_equal_loudness_scales_every_source_and_nothing_else():
    quiet, loud = small_clip(0), small_clip(1)
    conflict = avl.Conflict(sound=quiet, picture=loud, question="What?", answers=(1, 2))
    cells = conflict.cells(small_model(), loudness=0.02)
    for name in ("va", "av"):
        clip = cells.clip(name)
        assert np.sqrt(np.mean(np.square(clip.waveform))) == pytest.approx(0.02, rel=1e-3)
    assert np.array_equal(cells.clip("va").frames, conflict.cells(small_model()).clip("va").frames)
    assert cells["va"].provenance["loudness"] == 0.02
    with pytest.raises(InputError, match="loudness=2 is no root mean square between 0 and 1"):
        conflict.cells(small_model(), loudness=2)
