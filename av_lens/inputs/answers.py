"""Question: which tokens are an answer? One policy for every metric and every conflict.

An answer is a string, a token id, or a list of either (synonyms, pooled by logsumexp). A string is tried with a leading
space, then without: the first form that is a single token counts; where neither is, the answer is the several tokens of
the form with the space. The ids that were chosen stand in the result.

Not done: answers that differ only in case are not pooled by themselves; give them as synonyms.

Example:
    >>> answer = Answer(text="dog", options=((7,),))
    >>> answer.single, answer.n_tokens
    (True, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from av_lens.errors import InputError

AnswerLike = str | int | Sequence[str | int]


@dataclass(frozen=True)
class Answer:
    """The token ids of an answer.

    Attributes:
        text: the answer as it was asked for.
        options: the token ids of each synonym.
    """

    text: str
    options: tuple[tuple[int, ...], ...]

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


def resolve(tokenizer: Any, answer: AnswerLike | Answer) -> Answer:
    """Find the tokens of an answer.

    Args:
        tokenizer: the checkpoint's tokenizer.
        answer: a string, a token id, or a list of either.

    Returns:
        The answer with its ids; one that is resolved already is returned as it is.

    Raises:
        InputError: for an empty answer or an id outside the vocabulary.
    """
    if isinstance(answer, Answer):
        return answer
    synonyms = [answer] if isinstance(answer, str | int) else list(answer)
    options = tuple(dict.fromkeys(_ids(tokenizer, synonym) for synonym in synonyms))
    return Answer(" / ".join(str(synonym) for synonym in synonyms), options)


def _ids(tokenizer: Any, synonym: str | int) -> tuple[int, ...]:
    if isinstance(synonym, int):
        if not 0 <= synonym < len(tokenizer):
            raise InputError(f"token id {synonym} is outside the vocabulary of {len(tokenizer)} tokens")
        return (synonym,)
    bare = synonym.strip()
    if not bare:
        raise InputError("an answer is empty: give a word such as 'dog'")
    spaced, plain = (tuple(tokenizer(form, add_special_tokens=False)["input_ids"]) for form in (f" {bare}", bare))
    return plain if len(plain) == 1 and len(spaced) > 1 else spaced


def one_token(tokenizer: Any, answer: AnswerLike | Answer) -> int:
    """Find the token of an answer where exactly one is needed.

    Args:
        tokenizer: the checkpoint's tokenizer.
        answer: the answer.

    Returns:
        Its token id.

    Raises:
        InputError: if it has synonyms or several tokens; the message shows the pieces.
    """
    found = resolve(tokenizer, answer)
    option = found.options[0]
    if len(found.options) > 1:
        raise InputError(
            f"one token is needed here, and {found.text!r} lists {len(found.options)} synonyms; choose one"
        )
    if not found.single:
        pieces = [tokenizer.decode([token]) for token in option]
        raise InputError(
            f"the answer {found.text!r} is {len(pieces)} tokens for this model ({' '.join(map(repr, pieces))}), and "
            "one is needed here: choose a shorter word, give a prefix and its last word, or a metric that sums tokens"
        )
    return option[0]


def answer_pair(tokenizer: Any, a: AnswerLike | Answer, v: AnswerLike | Answer) -> tuple[Answer, Answer]:
    """Find the tokens of two rival answers and refuse rivals that cannot be told apart.

    Args:
        tokenizer: the checkpoint's tokenizer.
        a: the sound's answer.
        v: the picture's answer.

    Returns:
        Both answers.

    Raises:
        InputError: for equal answers, a shared first token, or unequal numbers of synonyms.
    """
    first, second = resolve(tokenizer, a), resolve(tokenizer, v)
    if set(first.options) == set(second.options):
        raise InputError(f"the two answers are equal: {first.text!r} and {second.text!r} are the same tokens")
    shared = set(first.first_tokens) & set(second.first_tokens)
    if shared:
        token = tokenizer.decode([min(shared)])
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
