"""Question: which tokens are an answer, and was the model taught to understand this?

A question is compared after lower-casing, squeezing spaces and unifying spellings, without its final mark. An answer is
a word, a token id, or a list of either (synonyms); `resolve` is told in which of four forms words are read, since only
the model knows (`metrics.forms`). Not done: answers that differ only in case are not pooled by themselves.

    >>> [in_form("dog", form) for form in FORMS]
    [' dog', 'dog', ' Dog', 'Dog']
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from av_lens.checks import foreign_file, parse_json
from av_lens.errors import InputError, unknown


@dataclass(frozen=True)
class Grammar:
    """The accepted phrasings of each kind of question."""

    questions: Mapping[str, tuple[str, ...]]  # kind -> its phrasings, exactly as the model was trained on them
    spellings: Mapping[str, str] = field(default_factory=dict[str, str])  # word -> the spelling it is read as

    def __post_init__(self) -> None:
        if not any(self.questions.values()):
            raise InputError("a grammar needs at least one phrasing: {'questions': {'hear': ['what do you hear?']}}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str | Path) -> Grammar:
        """Read a grammar, given as a mapping or as the path of a json file (`grammar.json` beside a checkpoint)."""
        read: Any = data
        if isinstance(data, str | Path):
            with foreign_file(data, "a grammar"):
                read = parse_json(Path(data).read_bytes())
        questions = read.get("questions") if isinstance(read, Mapping) else None
        if not isinstance(questions, Mapping) or not all(isinstance(one, list | tuple) for one in questions.values()):
            raise InputError("a grammar is a mapping with 'questions': {kind: [phrasing, ...]}")
        phrasings = {str(kind): tuple(str(text) for text in texts) for kind, texts in questions.items()}
        spellings = read.get("spellings", {})
        if not isinstance(spellings, Mapping):
            raise InputError(f"a grammar's 'spellings' are a mapping of words, found {type(spellings).__name__}")
        return cls(phrasings, {str(a): str(b) for a, b in spellings.items()})

    def normalize(self, question: str) -> str:
        """Bring a question to the form in which phrasings are compared."""
        text = re.sub(r"\s+", " ", question.strip().lower())
        text = re.sub(r"\s+([?.!,])", r"\1", text).rstrip("?.! ")
        return re.sub(r"[a-z]+", lambda word: self.spellings.get(word.group(), word.group()), text)

    @cached_property
    def _phrasings(self) -> dict[str, str]:
        return {self.normalize(text): text for texts in self.questions.values() for text in texts}

    def match(self, question: str) -> str:
        """Find the phrasing, as the model was trained on it, that a question is; refuse others with the nearest."""
        found = self._phrasings.get(self.normalize(question))
        if found is None:
            known = self._phrasings.values()
            raise InputError(f"this model was not taught that: {unknown('question', question, known)}")
        return found

    def kind(self, question: str) -> str:
        """Say which kind of question it is, such as "hear"."""
        phrase = self.match(question)
        return next(kind for kind, texts in self.questions.items() if phrase in texts)


AnswerLike = str | int | Sequence[str | int]
FORMS = (" word", "word", " Word", "Word")
"""The forms of a word, each written as it would write "word"; where the model likes two alike, the first counts."""


@dataclass(frozen=True)
class Answer:
    """The token ids of an answer."""

    text: str  # the answer as it was asked for
    options: tuple[tuple[int, ...], ...]  # the token ids of each synonym

    def __post_init__(self) -> None:
        if not self.options or not all(self.options):
            raise InputError(f"the answer {self.text!r} has no tokens: give a word, a token id, or a list of them")

    @property
    def single(self) -> bool:
        """Whether every synonym is one token."""
        return all(len(option) == 1 for option in self.options)

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest synonym."""
        return max(len(option) for option in self.options)

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """The first token of each synonym, which decides the answer at the asked position."""
        return tuple(option[0] for option in self.options)


def synonyms_of(answer: AnswerLike | Answer) -> list[Any]:
    """List what an answer pools: words and token ids; the tokens of each option of an `Answer`."""
    if isinstance(answer, Answer):
        return list(answer.options)
    return [answer] if isinstance(answer, str | int) else list(answer)


def words_of(answer: AnswerLike | Answer) -> list[str]:
    """List the words of an answer, which have to be read in some form; ids have not."""
    return [synonym for synonym in synonyms_of(answer) if isinstance(synonym, str)]


def in_form(word: str, form: str) -> str:
    """Write a word in one of `FORMS`; one with a capital after its first letter ("TV") has no small form."""
    bare = word.strip()
    if not bare:
        raise InputError("an answer is empty: give a word such as 'dog'")
    small = bare if bare[1:] != bare[1:].lower() else bare[0].lower() + bare[1:]
    written = bare[0].upper() + bare[1:] if "W" in form else small
    return f" {written}" if form.startswith(" ") else written


def forms_of(tokenizer: Any, word: str) -> dict[str, tuple[int, ...]]:
    """Find the tokens of each form of a word, without the forms that this tokenizer cannot write; refuse if none."""
    missing = getattr(tokenizer, "unk_token_id", None)
    written = {form: tuple(tokenizer(in_form(word, form), add_special_tokens=False)["input_ids"]) for form in FORMS}
    found = {form: ids for form, ids in written.items() if ids and missing not in ids}
    if not found:
        bare = word.strip()
        words = sorted({text for i in range(len(tokenizer)) if (text := tokenizer.decode([i]).strip()).isalpha()})
        raise InputError(
            f"this model's tokenizer has no tokens for {bare!r}: it becomes {tokenizer.decode([missing])!r}, whatever "
            f"the word. {unknown('word', bare, words)}"
        )
    return found


def resolve(tokenizer: Any, answer: AnswerLike | Answer, form: str | None = None) -> Answer:
    """Find an answer's tokens, its words read in a form; without a tokenizer (None) it is token ids already."""
    if isinstance(answer, Answer):
        return answer
    synonyms = synonyms_of(answer)
    options = [_ids(tokenizer, synonym, form) for synonym in synonyms]
    return Answer(" / ".join(map(str, synonyms)), tuple(options if tokenizer is None else dict.fromkeys(options)))


def appended(tokenizer: Any, answer: AnswerLike | Answer | None) -> tuple[tuple[int, ...], ...]:
    """The answer that an input goes on with: its tokens, the one option that it may have, or none."""
    options = () if answer is None else resolve(tokenizer, answer).options
    if len(options) > 1:
        raise InputError(f"answer= appends one answer, and {answer!r} lists {len(options)} synonyms; choose one")
    return options


def _ids(tokenizer: Any, synonym: str | int, form: str | None) -> tuple[int, ...]:
    if tokenizer is None:
        if isinstance(synonym, str):
            raise InputError(f"the answer {synonym!r} is text: bind the metric first, metric.bind(model, x).")
        return (int(synonym),)
    if isinstance(synonym, int):
        if not 0 <= synonym < len(tokenizer):
            raise InputError(f"token id {synonym} is outside the vocabulary of {len(tokenizer)} tokens")
        return (synonym,)
    known = forms_of(tokenizer, synonym)
    if form is None:
        raise InputError(
            f"the answer {synonym!r} is text, and in which form it is said (leading space, capital) only a model "
            "knows: use metric.bind(model, x) or model.encode(..., answer=), or give token ids."
        )
    if form not in known:
        raise InputError(
            f"this model's tokenizer cannot write {in_form(synonym, form)!r}, the form in which the other words of "
            f"this call are said; it has {', '.join(repr(in_form(synonym, one)) for one in known)}. Give token ids."
        )
    return known[form]


def spelled(tokenizer: Any, option: Sequence[int]) -> str:
    """Write the tokens of an option piece by piece, such as "' siren' (282), 'x' (120)"."""
    return ", ".join(f"{tokenizer.decode([token])!r} ({token})" for token in option)


def answer_pair(
    tokenizer: Any, a: AnswerLike | Answer, v: AnswerLike | Answer, form: str | None = None
) -> tuple[Answer, Answer]:
    """Find the tokens of the sound's answer and the picture's, and refuse rivals that cannot be told apart."""
    first, second = resolve(tokenizer, a, form), resolve(tokenizer, v, form)
    if set(first.options) == set(second.options):
        raise InputError(f"the two answers are equal: {first.text!r} and {second.text!r} are the same tokens")
    shared = set(first.first_tokens) & set(second.first_tokens)
    if shared:
        token = f"token {min(shared)}" if tokenizer is None else tokenizer.decode([min(shared)])
        raise InputError(
            f"the answers {first.text!r} and {second.text!r} begin with the same token {token!r}, so the asked "
            "position cannot tell them apart: choose other words, or move the shared part into the prefix"
        )
    if len(first.options) != len(second.options):
        raise InputError(
            f"{first.text!r} has {len(first.options)} synonyms and {second.text!r} has {len(second.options)}: more "
            "synonyms win by number alone, so give both the same number"
        )
    return first, second
