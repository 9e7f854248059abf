"""Captions with heads edited: what is written is what generate writes, and it is read as the table says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from small_av import small_clip, small_model
from tiny import letter

import av_lens as avl
from av_lens.interventions import Plan, Site, cut, zero
from av_lens.isolation.explaining import captions
from av_lens.isolation.explaining.captions import Arm, _named, _row, _written, answers_lexicon, arms_of
from av_lens.isolation.explaining.knowledge import Known
from av_lens.isolation.measuring.bench import DESCRIBE, Bench
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.sets.confirmation import Held
from av_lens.results.record import table
from av_lens.results.statistics import Bootstrap

SET = ((1, 0), (2, 3))


def made(kind, **parts):
    """An instance that holds what is asked of it, and no more."""
    one = object.__new__(kind)
    one.__dict__.update(parts)
    return one


@pytest.fixture(scope="module")
def bench():
    asked = {"question": "What?", "prefix": "x", "describe": "Say."}
    conflicts = [
        avl.Conflict(sound=small_clip(i), picture=small_clip(i + 1), answers=tuple(map(letter, said)), id=name, **asked)
        for i, said, name in ((0, "ab", "one"), (2, "ca", "two"))
    ]
    return Bench(ModelEngine(small_model()), conflicts, Candidates.of(conflicts, small_model().tokenizer))


def test_captions_are_those_of_generate_without_the_prefix(bench, monkeypatch):
    monkeypatch.setattr(captions, "NEW_TOKENS", 6)
    (chunk,) = bench.chunks([0, 1], "suffix")
    arms = [
        Arm("none"),
        Arm("set", SET, "zero"),
        Arm("set by its donor", SET, "blank_muted"),
        Arm("cut"),
    ]
    made = _written(chunk, arms)["text"]
    edited = "suffix|generated"
    plans = [
        Plan(),
        Plan([zero(Site("z", layer, head, edited)) for layer, head in SET]),
        None,
        Plan(cut("generated", "video")),
    ]
    for column, cell in enumerate(("va", "av")):
        x = chunk.inputs(cell, DESCRIBE)
        assert "Say." in str(x.provenance)
        assert not len(x.spans["header"]) or "x" not in [x.spans.tokens[p] for p in x.spans["header"].positions]
        for row, plan in enumerate(plans):
            if plan is not None:
                wanted = small_model().generate(x, plan=plan, max_new_tokens=6, return_type="text")
                assert made[row, :, column].tolist() == [text.strip() for text in wanted]
    assert len(set(made[:, 0, 0])) > 1


def test_what_is_heard_and_seen_changes_places_in_the_mirrored_cell(bench):
    known = made(Known, bench=bench, confirmation=made(Half, examples=np.array([0, 1])))
    said = np.array([[["a b", "a"], ["c", "nothing"]]], dtype=object)  # one arm; conflicts a|b and c|a
    heard, seen, hallucinated = _named(said, known, answers_lexicon(bench))[:, 0]
    np.testing.assert_array_equal(heard, [0.5, 0.5])  # va: a; av: b is heard and not said. c; nothing
    np.testing.assert_array_equal(seen, [1.0, 0.0])
    np.testing.assert_array_equal(hallucinated, [0.0, 0.0])
    said[0, 0, 1] = "c"
    assert _named(said, known, answers_lexicon(bench))[2, 0, 0] == 0.5


def test_words_of_the_lexicon_stand_for_the_one_answer_that_has_them():
    conflicts = [SimpleNamespace(answers=("dog", "siren")), SimpleNamespace(answers=("siren", "police"))]
    names = ("dog", "siren", "police")
    candidates = made(Candidates, names=names, sound=np.array([0, 1]), picture=np.array([1, 2]))
    engine = made(ModelEngine, model=SimpleNamespace(tokenizer=None))
    bench = made(Bench, conflicts=conflicts, candidates=candidates, engine=engine)
    lexicon = answers_lexicon(bench)
    assert lexicon.event("puppy") == "dog"
    assert dict(lexicon.words)["siren"] == ("siren",)  # the lexicon's siren is police too: neither gets the others
    assert [match.event for match in lexicon.found("Hounds bark at the police")] == ["dog", "dog", "police"]


def test_an_arms_row_is_the_change_of_what_is_heard():
    boot = Bootstrap.draw(range(30), *[[str(i) for i in range(30)]] * 2, seed=0)
    half = Half("confirmation", np.arange(30), list(range(30)), boot, np.ones(30), np.zeros(30))
    unedited, edited = np.zeros(30), np.repeat([1.0, 0.0], 15)
    found = np.stack([edited, unedited, edited])
    row = _row(Arm("set", SET, "zero"), found, unedited, made(Known, confirmation=half))
    assert (row["heard"], row["seen"], row["hallucinated"], row["release"]) == (0.5, 0.0, 0.5, 0.5)
    assert row["heard_low"] < 0.5 < row["heard_high"]
    assert row["n"] == 30
    assert list(table("captions", [row])["members"]) == ["L1H0 L2H3"]


def test_without_a_set_the_cut_alone_is_tried():
    assert [arm.name for arm in arms_of(made(Known, held=Held(sites={})))] == ["none", "cut"]
