"""What can be asked of the embedded models, and what the right answer is.

The models understand four kinds of questions (hear, see, colour, caption) in a few phrasings each, all of five tokens.
This is the one source of these words: the tokenizer takes its merges from `words()`, training its questions from
`QUESTIONS`, and `as_dict()` is saved beside the weights as `grammar.json`, where the encoder reads it.

What has no picture (or a blank one) looks like "nothing"; what has no sound (or silence) sounds like "nothing".

Example:
    >>> answer("hear", picture="dog", sound="siren", colour="red")
    'siren'
    >>> answer("see", picture=None, sound="siren", colour=None)
    'nothing'
    >>> answer("caption", picture="dog", sound=None, colour="red")
    'i see a dog and hear nothing'
    >>> GRAMMAR.kind("What do you  HEAR ?")
    'hear'
"""

from __future__ import annotations

from typing import Any

from av_lens.errors import InputError, unknown
from av_lens.inputs.grammar import Grammar

CLASSES = tuple(["dog", "cat", "bird", "bell", "car", "train", "drum", "siren", "clock", "rain", "phone", "guitar"])
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "white")
NOTHING = "nothing"

# The first phrasing of a kind is the one that documentation and demonstrations use. All are five tokens long, so that
# questions of every kind stack into one batch.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "hear": ("what do you hear?", "what can you hear?", "what sound is it?", "which sound is this?"),
    "see": ("what do you see?", "what can you see?", "what object is shown?", "which object is this?"),
    "colour": ("what colour is it?", "which colour is it?", "what colour is shown?", "which colour is this?"),
    "caption": ("describe this short clip.", "tell me what happens.", "describe what you notice."),
}
# Spellings that mean the same; applied word by word after lower-casing.
SPELLINGS: dict[str, str] = {"color": "colour"}


GRAMMAR = Grammar(QUESTIONS, SPELLINGS)


def answer(kind: str, *, picture: str | None, sound: str | None, colour: str | None) -> str:
    """Give the right answer to a kind of question about a clip."""
    if kind not in QUESTIONS:
        raise InputError(unknown("kind of question", kind, QUESTIONS))
    if kind == "caption":
        seen = f"a {picture}" if picture else NOTHING
        heard = f"a {sound}" if sound else NOTHING
        return f"i see {seen} and hear {heard}"
    return {"hear": sound, "see": picture, "colour": colour if picture else None}[kind] or NOTHING


def words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List every word that the tokenizer keeps whole."""
    asked = [phrase.rstrip("?.!").split(" ") for phrases in QUESTIONS.values() for phrase in phrases]
    caption = ["i", "see", "a", "and", "hear", NOTHING]
    spaced = dict.fromkeys([*CLASSES, *COLOURS, *caption, *(word for phrase in asked for word in phrase[1:])])
    leading = dict.fromkeys(["system", "assistant", "user", *(phrase[0] for phrase in asked)])
    return tuple(spaced), tuple(leading)


def as_dict() -> dict[str, Any]:
    """Collect the grammar as plain data, as it is saved in `grammar.json` beside a checkpoint."""
    return {
        "schema": 1,
        "classes": list(CLASSES),
        "colours": list(COLOURS),
        "nothing": NOTHING,
        "questions": {kind: list(phrases) for kind, phrases in QUESTIONS.items()},
        "spellings": dict(SPELLINGS),
    }
