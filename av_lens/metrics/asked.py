"""What is asked of a metric: answers as strings, token ids, synonyms, one for all examples or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from av_lens.errors import InputError
from av_lens.inputs.answers import Answer, AnswerLike, answer_pair, resolve, spelled, synonyms_of, words_of

SHOWN = 8


@dataclass(frozen=True)
class Each:
    """One answer for each example, in order. Build it with `each`."""

    answers: tuple[AnswerLike | Answer, ...]


def each(answers: Sequence[AnswerLike | Answer]) -> Each:
    """Give every example of a stack its own answer.

    Args:
        answers: the answers in the order of the examples.

    Returns:
        What `logit_diff`, `log_prob`, `prob` and `rank` take in an answer's place.
    """
    return Each(tuple(answers))


Asked = str | int | Answer | Sequence[str | int] | Each


def shown(asked: Asked) -> str:
    """Write what was asked in a few words."""
    if isinstance(asked, Each):
        return f"{len(asked.answers)} answers"
    return asked.text if isinstance(asked, Answer) else str(asked)


def spread(side: tuple[AnswerLike | Answer, ...], n: int) -> tuple[AnswerLike | Answer, ...]:
    """Repeat a shared answer for every example."""
    return side * n if len(side) == 1 else side


def resolved(tokenizer: Any, answer: AnswerLike | Answer, form: str | None = None) -> Answer:
    """Find an answer's tokens."""
    if isinstance(answer, Answer) or tokenizer is not None:
        return resolve(tokenizer, answer, form)
    named, words = synonyms_of(answer), words_of(answer)
    if words:
        raise InputError(f"the answer {words[0]!r} is text: bind the metric first, metric.bind(model, x).")
    return Answer(" / ".join(map(str, named)), tuple((int(part),) for part in named))


def paired(
    tokenizer: Any, a: AnswerLike | Answer, b: AnswerLike | Answer, form: str | None = None
) -> tuple[Answer, Answer]:
    """Find the tokens of two answers that are to be told apart."""
    if tokenizer is None:
        return answer_pair(_NoWords(), resolved(None, a), resolved(None, b))
    return answer_pair(tokenizer, a, b, form)


class _NoWords:
    """Stands for a tokenizer where all answers are token ids; it only words a refusal."""

    def decode(self, ids: Sequence[int]) -> str:
        return f"token {ids[0]}"


def asked_words(sides: Sequence[Sequence[AnswerLike | Answer]], n: int) -> list[list[str]]:
    """List the words that are asked of each example."""
    spread_out = [spread(tuple(side), n) for side in sides]
    return [[word for side in spread_out for word in words_of(side[i])] for i in range(n)]


def notes_on(answers: list[list[Answer]], tokenizer: Any = None) -> tuple[str, ...]:
    """Say what a reader of the numbers must know about the answers."""
    flat = [answer for side in answers for answer in side]
    if all(answer.single for answer in flat):
        return ()
    notes = ["an answer has several tokens: scores are teacher-forced log-probabilities"]
    for row in zip(*answers, strict=True) if len(answers) == 2 else ():
        lengths = {len(option) for answer in row for option in answer.options}
        if len(lengths) > 1:
            texts = " and ".join(repr(answer.text) for answer in row)
            notes.append(f"{texts} have unequal numbers of tokens: scored by the mean log-probability per token")
            break
    if tokenizer is None:
        return tuple(notes)
    broken = {option: answer.text for answer in flat for option in answer.options if len(option) > 1}
    notes += [f"{text!r} is {len(ids)} tokens: {spelled(tokenizer, ids)}" for ids, text in list(broken.items())[:SHOWN]]
    notes += [f"... and {len(broken) - SHOWN} more such answers"] if len(broken) > SHOWN else []
    return tuple(notes)
