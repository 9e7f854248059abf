"""Which tokens an answer is: one form of four for its words; rivals that cannot be told apart are refused."""

from __future__ import annotations

from typing import Any

import pytest

from av_lens.errors import InputError
from av_lens.inputs import Answer, Grammar, answer_pair, resolve
from av_lens.inputs.answers import FORMS, forms_of, in_form, spelled, words_of
from av_lens.organism import anatomy

SPACED = FORMS[0]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return anatomy.tokenizer()


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("word", "forms"),
    [
        ("dog", [" dog", "dog", " Dog", "Dog"]),
        (" Dog ", [" dog", "dog", " Dog", "Dog"]),
        ("a dog", [" a dog", "a dog", " A dog", "A dog"]),
        ("TV", [" TV", "TV", " TV", "TV"]),  # no word is said "tV"
        ("7", [" 7", "7", " 7", "7"]),
    ],
)
def test_a_word_has_four_forms(word: str, forms: list[str]):
    assert [in_form(word, form) for form in FORMS] == forms


def test_a_word_takes_the_form_it_is_read_in(tokenizer: Any):
    for form, text in zip(FORMS, [" dog", "dog", " Dog", "Dog"], strict=True):
        assert resolve(tokenizer, "dog", form).options == (ids(tokenizer, text),)
    dog = resolve(tokenizer, "dog", SPACED)
    assert (dog.single, dog.n_tokens) == (True, 1)
    assert resolve(tokenizer, " dog ", SPACED).options == dog.options
    assert resolve(tokenizer, dog) is dog
    zebra = resolve(tokenizer, "zebra", SPACED)
    assert (zebra.single, zebra.n_tokens) == (False, len(" zebra"))


def test_ids_and_synonyms(tokenizer: Any):
    dog, cat = ids(tokenizer, " dog")[0], ids(tokenizer, " cat")[0]
    assert resolve(tokenizer, dog).options == ((dog,),)
    assert resolve(tokenizer, ["dog", cat], SPACED).options == ((dog,), (cat,))
    assert resolve(tokenizer, ["dog", dog], SPACED).options == ((dog,),)
    assert resolve(tokenizer, ["dog", "cat"], SPACED).text == "dog / cat"
    assert [words_of(answer) for answer in ("dog", dog, ["dog", cat], resolve(tokenizer, dog))] == [
        ["dog"],
        [],
        ["dog"],
        [],
    ]


def test_a_broken_word_is_spelled(tokenizer: Any):
    siren = ids(tokenizer, " siren")[0]
    assert spelled(tokenizer, ids(tokenizer, " sirenx")) == f"' siren' ({siren}), 'x' ({ord('x')})"


class Few:
    """A tokenizer of four tokens; what it does not know is token 0."""

    unk_token_id = 0
    vocabulary = ("<unk>", " dog", "cat", " cat")

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return {"input_ids": [self.vocabulary.index(text) if text in self.vocabulary else 0]}

    def decode(self, tokens: Any) -> str:
        return self.vocabulary[int(tokens[0])]


def test_what_becomes_the_unknown_token_is_no_form():
    assert forms_of(Few(), "cat") == {" word": (3,), "word": (2,)}
    with pytest.raises(InputError, match=r"no tokens for 'dot': it becomes '<unk>', .*Did you mean 'dog'\?"):
        forms_of(Few(), "dot")
    with pytest.raises(InputError, match=r"cannot write 'dog', the form .* said; it has ' dog'\. Give token ids"):
        resolve(Few(), "dog", "word")


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda t: resolve(t, "dog"), r"the answer 'dog' is text, .* only a model knows: use metric.bind\(model, x\)"),
        (lambda t: resolve(t, "", SPACED), "an answer is empty"),
        (lambda t: resolve(t, []), "has no tokens"),
        (lambda t: resolve(t, 10**6), "token id 1000000 is outside the vocabulary"),
        (lambda t: answer_pair(t, "dog", " dog", SPACED), "the two answers are equal: 'dog' and ' dog'"),
        (lambda t: answer_pair(t, ["dog", "cat"], ["cat", "dog"], SPACED), "the two answers are equal"),
        (
            lambda t: answer_pair(t, "zebra", "zoo", SPACED),
            r"begin with the same token ' ', .*move the shared part into the prefix",
        ),
        (lambda t: answer_pair(t, ["dog", "bell"], "cat", SPACED), "'dog / bell' has 2 synonyms and 'cat' has 1"),
        (lambda t: answer_pair(t, ["dog", "cat"], ["cat", "bell"], SPACED), "begin with the same token ' cat'"),
        (lambda t: Answer("x", ()), "has no tokens"),
    ],
)
def test_what_is_refused_says_why(tokenizer: Any, ask, text: str):
    with pytest.raises(InputError, match=text):
        ask(tokenizer)


def test_a_pair_of_answers(tokenizer: Any):
    a, v = answer_pair(tokenizer, "siren", "dog", SPACED)
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
    from av_lens.organism import anatomy

    read = Grammar.from_json(anatomy.as_dict())
    for kind, phrasings in anatomy.QUESTIONS.items():
        for phrase in phrasings:
            assert read.match(phrase.upper()) == phrase
            assert read.kind(phrase) == kind
