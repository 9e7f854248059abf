"""Does the model hear, and does seeing keep it from saying so? Which answers are scored; protocol sections 1 and 2."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from av_lens.errors import InputError
from av_lens.inputs.answers import Answer, answer_pair, words_of
from av_lens.isolation.measuring.bench import Chunk, shared_out
from av_lens.isolation.measuring.effects import mirrored
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates, CellReading, overlapping
from av_lens.metrics.forms import Forms, Reading, known_forms
from av_lens.results.statistics import interval

CELLS = ("aa", "vv")


@dataclass(frozen=True)
class Answered:
    """Conflicts that can be scored, why each other one cannot, and the forms (None where all answers are token ids)."""

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
    read: list[tuple[Any, tuple[Answer, Answer]]] = []
    for one in kept:
        heard, seen = one.answers
        try:
            pair = answer_pair(engine.model.tokenizer, heard, seen, None if forms is None else forms.chosen)
        except InputError as error:
            left_out.setdefault(one.id, str(error))
            continue
        if one.id not in left_out:
            read.append((dataclasses.replace(one, answers=pair) if any(map(words_of, one.answers)) else one, pair))
    left_out |= {read[number][0].id: why for number, why in overlapping([pair for _, pair in read]).items()}
    usable = [one for one, _ in read if one.id not in left_out]
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


LEAST_MASS = 0.1
LEAST_GAP = 0.25
FIGURES = ("G", "C", "gap", "gap - G/4")
# (cell, question) -> whose answer is right; muted cells have none, and both rates are shown.
RIGHT: dict[tuple[str, str], str | None] = {
    ("va", "ask"): "sound",
    ("aa", "ask"): "sound",
    ("vv", "ask"): "picture",
    ("av", "ask"): "picture",
    ("blank_a", "ask"): "sound",
    ("blank_v", "ask"): "picture",
    ("audio_only", "ask"): "sound",
    ("audio_only_v", "ask"): "picture",
    ("v_muted", "ask"): None,
    ("a_muted", "ask"): None,
    ("blank_muted", "ask"): None,
    ("va", "see"): "picture",
    ("v_muted", "see"): "picture",
    ("a_muted", "see"): "sound",
}


COMPETENCE = {("blank_a", "ask"): 1, ("blank_v", "ask"): -1, ("v_muted", "see"): -1, ("a_muted", "see"): 1}
"""Where a conflict must be answered right to be used, and the sign of M that is right."""


def _said(cell: str, question: str) -> str:
    return cell if question == "ask" else f"{cell} ({question})"


@dataclass(frozen=True, eq=False)
class Survey:
    """What the unedited model says in every cell: readings per (cell, question), rows in the order of the conflicts."""

    readings: Mapping[tuple[str, str], CellReading]
    candidates: Candidates

    def margin(self, cell: str, question: str = "ask") -> Float[np.ndarray, " example"]:
        """Give M of every conflict in a cell."""
        scores = self.readings[(cell, question)].scores
        return self.candidates.margin(scores, np.arange(len(scores)))

    @property
    def C(self) -> Float[np.ndarray, " example"]:
        """Hearing under conflict."""
        return mirrored("va", self.margin)

    @property
    def G(self) -> Float[np.ndarray, " example"]:
        """Hearing with nothing to see."""
        return mirrored("blank_a", self.margin)

    @property
    def right(self) -> Bool[np.ndarray, "condition example"]:
        """Where each condition of `COMPETENCE` holds, judged between the two answers."""
        return np.stack([sign * self.margin(*where) > 0 for where, sign in COMPETENCE.items()])

    @property
    def competent(self) -> Bool[np.ndarray, " example"]:
        """Hears both sounds on a blank picture and sees both pictures in silence."""
        return np.logical_and.reduce(self.right)

    @property
    def turned(self) -> Float[np.ndarray, " example"]:
        """1 where the sound's answer with nothing to see turns into the picture's under conflict, else 0."""
        return ((self.margin("blank_a") > 0) & (self.margin("va") < 0)).astype(np.float64)

    def competence(self) -> str:
        """Count the competent conflicts, and cell by cell those that are answered right."""
        held = zip(COMPETENCE, self.right.sum(1).tolist(), strict=True)
        cells = ", ".join(f"{_said(*where)} {count}" for where, count in held)
        return f"Competent are {self.competent.sum()} of {len(self.G)} conflicts (right between the two: {cells})."


def survey(chunks: Sequence[Chunk], n: int) -> Survey:
    """Read every cell of every conflict."""
    done = 0

    def read(chunk: Chunk) -> dict[tuple[str, str], CellReading]:
        nonlocal done
        found = {key: chunk.reading(*key) for key in RIGHT}
        done += len(RIGHT) * len(chunk.examples)
        chunk.bench.progress("reading every cell", done, len(RIGHT) * n)
        chunk.forget()
        return found

    parts = shared_out(chunks, read)
    order = np.argsort(np.concatenate([chunk.examples for chunk in chunks]))
    joined = {key: CellReading.joined([part[key] for part in parts], order) for key in RIGHT}
    return Survey(joined, chunks[0].bench.candidates)


def shortcut_index(e_a: np.ndarray, e_v: np.ndarray) -> np.ndarray:
    """Compute |E_V| / (|E_A| + |E_V|): 0 where only the sound counts, 1 where only the picture does."""
    return np.abs(e_v) / (np.abs(e_a) + np.abs(e_v))


def quantities(found: Survey, half: Half) -> dict[str, tuple[float, float, float]]:
    """Compute the figures of section 2 over some conflicts: name -> (value, low, high)."""
    va, aa, vv, av = (found.margin(cell)[half.examples] for cell in ("va", "aa", "vv", "av"))
    e_a, e_v, c, g = 0.5 * (va + aa - vv - av), 0.5 * (aa + av - va - vv), half.C, half.G
    means = {"C": c, "G": g, "gap": g - c, "gap - G/4": g - c - LEAST_GAP * g}
    return {
        "dilution": interval(half.boot, mirrored("audio_only", found.margin)[half.examples] - g),
        "reversal rate": interval(half.boot, found.turned[half.examples]),
        "E_A": interval(half.boot, e_a),
        "E_V": interval(half.boot, e_v),
        "I": interval(half.boot, aa - va - av + vv),
        "shortcut index": half.boot.derived(shortcut_index, e_a, e_v),
        **{name: interval(half.boot, values) for name, values in means.items()},
    }


def rows_of(found: Survey, half: Half, chosen: str) -> list[dict[str, Any]]:
    """Write one half's rows of the behaviour table; `chosen` is "all" or "competent"."""
    rows, columns = half.examples, ("value", "low", "high")
    out: list[dict[str, Any]] = [
        {"quantity": name} | dict(zip(columns, values, strict=True)) for name, values in quantities(found, half).items()
    ]
    for (cell, question), right in RIGHT.items():
        margin = found.margin(cell, question)[rows]
        top, said = found.readings[cell, question].top[rows], _said(cell, question)
        for whose in ("sound", "picture") if right is None else (right,):
            of = {"quantity": f"says {whose}" if right is None else "accuracy", "cell": said}
            wins = margin > 0 if whose == "sound" else margin < 0
            for rule, hit in (("two", wins), ("vocabulary", top == getattr(found.candidates, whose)[rows])):
                values = np.where(np.isnan(margin), np.nan, hit.astype(np.float64))
                out.append(of | {"rule": rule} | half.bounded(values))
    cells = ("va", "av", "blank_a", "blank_v", "blank_muted")
    out += [{"quantity": "M", "cell": cell} | half.bounded(found.margin(cell)[rows]) for cell in cells]
    out.append({"quantity": "median P(a) + P(v)", "cell": "va", "value": _mass(found, half)})
    return [{"half": half.name, "chosen": chosen, "n": len(rows)} | row for row in out]


def _mass(found: Survey, half: Half) -> float:
    """The median of P(sound's answer) + P(picture's) in the conflict."""
    return float(np.median(found.readings["va", "ask"].mass[half.examples])) if len(half.examples) else float("nan")


def refusals(found: Survey, half: Half) -> list[tuple[str, str]]:
    """Say whether the model can be asked this question at all: (kind, sentence with the figure) of every refusal."""
    mass, (value, low, high) = _mass(found, half), interval(half.boot, half.G)
    neither = (
        "the model would say neither word here: the median of P(sound's answer) + P(picture's) in the conflict "
        f'is {mass:.3f}, below {LEAST_MASS}. Give a prefix (such as "I hear a") or answers that it would say.'
    )
    deaf = (
        f"the model does not hear: with nothing to see its hearing G is {value:.2f} logits (95% interval "
        f"{low:.2f} to {high:.2f}), which is not above 0. There is no hearing to suppress; "
        "try sounds that it can name."
    )
    told = (("says neither", neither, mass < LEAST_MASS), ("does not hear", deaf, not low > 0))
    return [(kind, sentence) for kind, sentence, refused in told if refused]


def gap_verdict(found: Survey, half: Half) -> tuple[str, str]:
    """Say whether there is a gap to explain, and of what kind; the first two kinds stop the search."""
    q = quantities(found, half)
    g, c, gap, least = (f"{v:.2f} [{low:.2f}, {high:.2f}]" for v, low, high in (q[n] for n in FIGURES))
    figures = f"hearing falls from G = {g} with nothing to see to C = {c} under conflict, a gap of {gap} logits"
    (_, low, high), (_, c_low, c_high), (turned, *_) = q["gap - G/4"], q["C"], q["reversal rate"]
    kinds = (
        (high < 0, "no suppression", f"No suppression: {figures}, which is below a quarter of G."),
        (not low > 0, "not established", f"Suppression is not established: {figures}; gap - G/4 is {least}."),
        (c_high <= 0, "dominance", f"The picture dominates: {figures}."),
        (c_low > 0, "interference", f"Interference, not dominance: {figures}; the sound still wins under conflict."),
        (True, "suppression, kind open", f"Suppression, its kind open (C's interval holds 0): {figures}."),
    )
    kind, sentence = next((kind, sentence) for holds, kind, sentence in kinds if holds)
    reversal = "the sound's answer with nothing to see turns into the picture's under conflict"
    return kind, f"{sentence} In {turned:.0%} of these {len(half.examples)} conflicts {reversal}."
