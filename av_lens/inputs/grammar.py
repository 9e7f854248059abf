"""Question: is this something the model was taught to understand?

The embedded models know a few kinds of questions in a few phrasings each. A question is compared after lower-casing,
squeezing spaces and unifying spellings, without its final mark; what is no phrasing is refused with the nearest one,
for an answer to it would mean nothing. Models without a grammar take any question.

Example:
    >>> grammar = Grammar.from_json({"questions": {"hear": ["what do you hear?"]}})
    >>> grammar.match("What do you  HEAR ?")
    'what do you hear?'
    >>> grammar.kind("what do you hear")
    'hear'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from av_lens.checks import foreign_file, parse_json
from av_lens.errors import InputError, unknown


@dataclass(frozen=True)
class Grammar:
    """The accepted phrasings of each kind of question.

    Attributes:
        questions: kind -> its phrasings, exactly as the model was trained on them.
        spellings: word -> the spelling it is read as.
    """

    questions: Mapping[str, tuple[str, ...]]
    spellings: Mapping[str, str] = field(default_factory=dict[str, str])

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
        if not isinstance(questions, Mapping) or not all(
            isinstance(value, list | tuple) for value in questions.values()
        ):
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
