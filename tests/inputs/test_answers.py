"""Which tokens an answer is: a leading space first, then without; rivals that cannot be told apart are refused."""

from __future__ import annotations

from typing import Any

import pytest

from av_lens.errors import InputError
from av_lens.inputs import Answer, Grammar, answer_pair, one_token, resolve
from av_lens.organism import anatomy


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return anatomy.tokenizer()


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_word_takes_its_leading_space(tokenizer: Any):
    dog = resolve(tokenizer, "dog")
    assert dog.options == (ids(tokenizer, " dog"),)
    assert dog.single
    assert dog.n_tokens == 1
    assert resolve(tokenizer, " dog ").options == dog.options
    assert resolve(tokenizer, dog) is dog


def test_without_the_space_where_only_that_is_one_token(tokenizer: Any):
    # "describe" only ever begins a line in this vocabulary, so it is whole only without a space.
    assert len(ids(tokenizer, " describe")) > 1
    assert resolve(tokenizer, "describe").options == (ids(tokenizer, "describe"),)


def test_several_tokens_keep_the_space(tokenizer: Any):
    found = resolve(tokenizer, "zebra")
    assert found.options == (ids(tokenizer, " zebra"),)
    assert not found.single
    assert found.n_tokens == len(" zebra")


def test_ids_and_synonyms(tokenizer: Any):
    dog, cat = ids(tokenizer, " dog")[0], ids(tokenizer, " cat")[0]
    assert resolve(tokenizer, dog).options == ((dog,),)
    assert resolve(tokenizer, ["dog", cat]).options == ((dog,), (cat,))
    assert resolve(tokenizer, ["dog", dog]).options == ((dog,),)
    assert resolve(tokenizer, ["dog", "cat"]).text == "dog / cat"


def test_one_token_gives_the_id(tokenizer: Any):
    assert one_token(tokenizer, "dog") == ids(tokenizer, " dog")[0]


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (
            lambda t: one_token(t, "zebra"),
            r"'zebra' is 6 tokens for this model \(' ' 'z' 'e' 'b' 'r' 'a'\), and one is needed",
        ),
        (lambda t: one_token(t, ["dog", "cat"]), "lists 2 synonyms; choose one"),
        (lambda t: resolve(t, ""), "an answer is empty"),
        (lambda t: resolve(t, []), "has no tokens"),
        (lambda t: resolve(t, 10**6), "token id 1000000 is outside the vocabulary"),
        (lambda t: answer_pair(t, "dog", " dog"), "the two answers are equal: 'dog' and ' dog'"),
        (lambda t: answer_pair(t, ["dog", "cat"], ["cat", "dog"]), "the two answers are equal"),
        (
            lambda t: answer_pair(t, "zebra", "zoo"),
            r"begin with the same token ' ', .*move the shared part into the prefix",
        ),
        (lambda t: answer_pair(t, ["dog", "bell"], "cat"), "'dog / bell' has 2 synonyms and 'cat' has 1"),
        (lambda t: answer_pair(t, ["dog", "cat"], ["cat", "bell"]), "begin with the same token ' cat'"),
        (lambda t: Answer("x", ()), "has no tokens"),
    ],
)
def test_what_is_refused_says_why(tokenizer: Any, ask, text: str):
    with pytest.raises(InputError, match=text):
        ask(tokenizer)


def test_a_pair_of_answers(tokenizer: Any):
    a, v = answer_pair(tokenizer, "siren", "dog")
    assert (a.first_tokens, v.first_tokens) == (ids(tokenizer, " siren"), ids(tokenizer, " dog"))


GRAMMAR = {
    "questions": {"hear": ["what do you hear?", "what sound is it?"], "colour": ["what colour is it?"]},
    "spellings": {"color": "colour"},
}


@pytest.mark.parametrize(
    ("typed", "phrase", "kind"),
    [
        ("What do you hear?", "what do you hear?", "hear"),
        ("  WHAT  do\nyou hear ?", "what do you hear?", "hear"),
        ("what sound is it", "what sound is it?", "hear"),
        ("What color is it?!", "what colour is it?", "colour"),
    ],
)
def test_a_question_is_matched_to_its_phrasing(typed: str, phrase: str, kind: str):
    grammar = Grammar.from_json(GRAMMAR)
    assert grammar.match(typed) == phrase
    assert grammar.kind(typed) == kind


def test_a_grammar_from_a_file(tmp_path):
    import json

    (tmp_path / "grammar.json").write_text(json.dumps(GRAMMAR))
    assert Grammar.from_json(tmp_path / "grammar.json").match("what sound is it?") == "what sound is it?"


def test_what_was_not_taught_is_refused_with_the_nearest():
    with pytest.raises(
        InputError, match=r"not taught that: unknown question 'what do you smell\?'. Did you mean 'what do you hear\?'"
    ):
        Grammar.from_json(GRAMMAR).match("what do you smell?")
    with pytest.raises(InputError, match="a grammar is a mapping with 'questions'"):
        Grammar.from_json({"questions": ["what?"]})
    with pytest.raises(InputError, match="at least one phrasing"):
        Grammar.from_json({"questions": {}})


def test_the_organisms_grammar_is_accepted_as_it_is_saved():
    from av_lens.organism import grammar

    read = Grammar.from_json(grammar.as_dict())
    for kind, phrasings in grammar.QUESTIONS.items():
        for phrase in phrasings:
            assert read.match(phrase.upper()) == phrase
            assert read.kind(phrase) == kind
