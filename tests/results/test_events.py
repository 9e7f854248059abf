"""Event matching: whole words of a stated lexicon, and the shares worked out by hand."""

from __future__ import annotations

import math

import pytest

from av_lens.errors import InputError
from av_lens.results.events import Lexicon

LEXICON = Lexicon.of({
    "dog": ["puppy", "barking"], "bell": ["church bell"], "guitar": [], "bass": ["bass guitar"], "bus": [], "car": [],
})  # fmt: skip


def named(text: str) -> list[str]:
    return [match.event for match in LEXICON.found(text)]


def test_whole_words_plurals_and_case():
    assert named("Two Dogs and a church\n bell; BUSES.") == ["dog", "bell", "bus"]
    assert named("dogma, cares, scar, busy, dogged") == []
    assert named("barking, car-horn") == ["dog", "car"]


def test_the_longest_match_counts_once():
    assert named("a bass guitar") == ["bass"]
    assert named("a guitar and a bass") == ["guitar", "bass"]
    found = LEXICON.found("hear a church bell")
    assert [(match.start, match.stop) for match in found] == [(7, 18)]


def test_shares_by_hand():
    scored = LEXICON.score("a dog, a puppy, a car and a bell", heard=["dog", "guitar"], seen=["church bell"])
    assert scored == {"heard": 0.5, "seen": 1.0, "hallucinated": 1 / 3}
    both = LEXICON.score("a dog", heard=["dog"], seen=["dog"])
    assert both == {"heard": 1.0, "seen": 1.0, "hallucinated": 0.0}


def test_a_share_of_nothing_is_not_measured():
    scored = LEXICON.score("silence", heard=[], seen=["dog"])
    assert math.isnan(scored["heard"])
    assert scored["seen"] == 0.0
    assert math.isnan(scored["hallucinated"])


def test_refusals():
    with pytest.raises(InputError, match="the word 'puppy' belongs to both 'dog' and 'cat'"):
        Lexicon.of({"dog": ["puppy"], "cat": ["Puppy"]})
    with pytest.raises(InputError, match="has an empty word"):
        Lexicon.of({"dog": [" "]})
    with pytest.raises(InputError, match="at least one event"):
        Lexicon.of([])
    with pytest.raises(InputError, match=r"unknown event 'guitr'\. Did you mean 'guitar'"):
        LEXICON.score("x", heard=["guitr"], seen=[])
