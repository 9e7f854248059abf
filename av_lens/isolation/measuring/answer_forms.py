"""Which tokens are the answers of a manifest, and which conflicts can be scored by them?

A word is read in the form (leading space or not, capital or not; `runs.forms`) that the model says most: that of the
largest median probability over the sounds' words in `aa` and the pictures' words in `vv` of all conflicts, before they
are dealt. It is one form for all words.

A conflict is left out, by name, where its answers cannot be used: a word that is not known, answers that cannot be told
apart or take several tokens, or a word whose chosen form has, in the conflict's own cell, under a hundredth of the
probability of another form. It never refuses the manifest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from av_lens.errors import InputError
from av_lens.inputs.answers import Answer, answer_pair, words_of
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.metrics.forms import Forms, Reading, known_forms

CELLS = ("aa", "vv")


@dataclass(frozen=True)
class Answered:
    """Conflicts whose answers are tokens.

    Attributes:
        conflicts: those that can be scored, their answers resolved.
        left_out: why each other one cannot, by id.
        forms: how words are read; None where all answers are token ids.
    """

    conflicts: Sequence[Any]
    left_out: Mapping[str, str]
    forms: Forms | None

    def provenance(self) -> dict[str, Any]:
        """Say how words are read, and what is left out."""
        read = {} if self.forms is None else self.forms.provenance()
        return read | {"left_out": dict(self.left_out)}

    def sentence(self) -> str:
        """Count and name what is left out."""
        if not self.left_out:
            return ""
        listed = [f"{name} ({why})" for name, why in self.left_out.items()]
        more = f"; and {len(listed) - 5} more, in the provenance" if len(listed) > 5 else ""
        total = len(listed) + len(self.conflicts)
        return f"{len(listed)} of {total} conflicts are left out for their answers: {'; '.join(listed[:5])}{more}."


def answered(engine: ModelEngine, conflicts: Sequence[Any]) -> Answered:
    """Read the answers of all conflicts."""
    model, left_out = engine.model, dict[str, str]()
    kept: list[Any] = []
    for one in conflicts:
        try:
            for word in (word for answer in one.answers for word in words_of(answer)):
                known_forms(model, word)
            kept.append(one)
        except InputError as error:
            left_out[one.id] = str(error)
    forms = _forms(engine, kept, left_out)
    usable: list[Any] = []
    for one in kept:
        heard, seen = one.answers
        try:
            pair = answer_pair(engine.model.tokenizer, heard, seen, None if forms is None else forms.chosen)
            for answer in pair:
                _require_one_token(answer, engine.model.tokenizer)
        except InputError as error:
            left_out.setdefault(one.id, str(error))
            continue
        if one.id not in left_out:
            usable.append(dataclasses.replace(one, answers=pair) if any(map(words_of, one.answers)) else one)
    return Answered(usable, {one.id: left_out[one.id] for one in conflicts if one.id in left_out}, forms)


def _forms(engine: ModelEngine, conflicts: Sequence[Any], left_out: dict[str, str]) -> Forms | None:
    """Choose the form, and leave out the conflicts whose words are said in another one."""
    asked = [words_of(one.answers[side]) for side in (0, 1) for one in conflicts]
    if not any(asked):
        return None
    given = [lambda one=one, cell=cell: engine.cells(one, None)[cell] for cell in CELLS for one in conflicts]
    reading = Reading.of(engine.model, given, asked)
    forms = reading.forms()
    for number, (example, _) in enumerate(reading.rows):
        doubt = reading.doubt([number], forms)
        if doubt is not None:
            one, cell = conflicts[example % len(conflicts)], CELLS[example // len(conflicts)]
            left_out.setdefault(one.id, f"in {cell}, {doubt.sentence(engine.model.tokenizer)}")
    return forms


def _require_one_token(answer: Answer, tokenizer: Any) -> None:
    if not answer.single:
        pieces = [tokenizer.decode([token]) for token in next(ids for ids in answer.options if len(ids) > 1)]
        raise InputError(
            f"the answer {answer.text!r} is {len(pieces)} tokens for this model ({' '.join(map(repr, pieces))}); "
            "isolation scores answers of one token: choose a shorter word, or put what comes before its last token "
            "into the prefix."
        )
