"""Does the model hear, and does seeing keep it from saying so? Protocol section 2, before any search.

Per conflict, with M = score(sound's answer) - score(picture's answer) in every cell:

* C = (M(va) - M(av)) / 2, hearing under conflict; G = (M(blank_a) - M(blank_v)) / 2, hearing with nothing to see;
  gap = G - C. Both are free of the words' own priors, because a and v change places.
* E_A = (M(va) + M(aa) - M(vv) - M(av)) / 2, E_V = (M(aa) + M(av) - M(va) - M(vv)) / 2,
  I = M(aa) - M(va) - M(av) + M(vv); Shortcut Index = |E_V| / (|E_A| + |E_V|), of the means. C = (E_A - E_V) / 2.

Refused: a model that would say neither word (median of P(a) + P(v) in `va` below .1), and one that does not hear (G's
lower bound at or below 0). Stopped: no gap to explain.

Choices where the protocol is silent: "right" for competence is M's sign (best of the two answers); the two refusals are
judged on all of discovery, before the choice by competence (which would make anyone hear); the gap on the competent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from av_lens.isolation.measuring.bench import Chunk, Progress
from av_lens.isolation.measuring.scoring import UNREAD, Candidates, Reading
from av_lens.results.statistics import Bootstrap, interval

LEAST_MASS = 0.1
LEAST_GAP = 0.25
# (cell, question) -> whose answer is right; muted cells have none, and both rates are shown.
RIGHT: dict[tuple[str, str], str | None] = {
    ("va", "ask"): "sound",
    ("aa", "ask"): "sound",
    ("vv", "ask"): "picture",
    ("av", "ask"): "picture",
    ("blank_a", "ask"): "sound",
    ("blank_v", "ask"): "picture",
    ("audio_only", "ask"): "sound",
    ("v_muted", "ask"): None,
    ("a_muted", "ask"): None,
    ("blank_muted", "ask"): None,
    ("va", "see"): "picture",
    ("v_muted", "see"): "picture",
    ("a_muted", "see"): "sound",
}


@dataclass(frozen=True, eq=False)
class Survey:
    """What the unedited model says in every cell: readings per (cell, question), rows in the order of the conflicts."""

    readings: Mapping[tuple[str, str], Reading]
    candidates: Candidates

    def margin(self, cell: str, question: str = "ask") -> Float[np.ndarray, " example"]:
        """Give M of every conflict in a cell.

        Args:
            cell: the cell.
            question: "ask" or "see".

        Returns:
            M, NaN where the cell was not run.
        """
        scores = self.readings[(cell, question)].scores
        return self.candidates.margin(scores, np.arange(len(scores)))

    @property
    def C(self) -> Float[np.ndarray, " example"]:
        """Hearing under conflict."""
        return 0.5 * (self.margin("va") - self.margin("av"))

    @property
    def G(self) -> Float[np.ndarray, " example"]:
        """Hearing with nothing to see."""
        return 0.5 * (self.margin("blank_a") - self.margin("blank_v"))

    @property
    def competent(self) -> Bool[np.ndarray, " example"]:
        """Hears both sounds on a blank picture and sees both pictures in silence."""
        hears = (self.margin("blank_a") > 0) & (self.margin("blank_v") < 0)
        sees = (self.margin("v_muted", "see") < 0) & (self.margin("a_muted", "see") > 0)
        return hears & sees


def survey(chunks: Sequence[Chunk], n: int, *, progress: Progress | None = None) -> Survey:
    """Read every cell of every conflict.

    Args:
        chunks: all conflicts.
        n: how many conflicts there are.
        progress: called as `progress(stage, done, total)`.

    Returns:
        The survey.
    """
    candidates = chunks[0].bench.candidates
    shape = (n, len(candidates.names))
    readings = {
        key: Reading(np.full(shape, np.nan), np.full(n, UNREAD, dtype=np.int64), np.full(n, np.nan)) for key in RIGHT
    }
    total, done = len(RIGHT) * n, 0
    for chunk in chunks:
        for cell, question in RIGHT:
            found, out = chunk.reading(cell, question), readings[(cell, question)]
            out.scores[chunk.examples], out.top[chunk.examples] = found.scores, found.top
            out.mass[chunk.examples] = found.mass
            done += len(chunk.examples)
            if progress is not None:
                progress("reading every cell", done, total)
        chunk.forget()
    return Survey(readings, candidates)


def shortcut_index(e_a: np.ndarray, e_v: np.ndarray) -> np.ndarray:
    """Compute |E_V| / (|E_A| + |E_V|).

    Args:
        e_a: effect of the sound.
        e_v: effect of the picture.

    Returns:
        0 where only the sound counts, 1 where only the picture does.
    """
    return np.abs(e_v) / (np.abs(e_a) + np.abs(e_v))


def quantities(found: Survey, rows: Int[np.ndarray, " row"], boot: Bootstrap) -> dict[str, tuple[float, float, float]]:
    """Compute the figures of section 2 over some conflicts.

    Args:
        found: the survey.
        rows: which conflicts.
        boot: their weights.

    Returns:
        Name -> (value, low, high).
    """
    m = {cell: found.margin(cell)[rows] for cell in ("va", "aa", "vv", "av")}
    e_a = 0.5 * (m["va"] + m["aa"] - m["vv"] - m["av"])
    e_v = 0.5 * (m["aa"] + m["av"] - m["va"] - m["vv"])
    c, g = found.C[rows], found.G[rows]
    return {
        "E_A": interval(boot, e_a),
        "E_V": interval(boot, e_v),
        "I": interval(boot, m["aa"] - m["va"] - m["av"] + m["vv"]),
        "shortcut index": boot.derived(shortcut_index, e_a, e_v),
        "C": interval(boot, c),
        "G": interval(boot, g),
        "gap": interval(boot, g - c),
        "gap - G/4": interval(boot, g - c - LEAST_GAP * g),
    }


def rows_of(
    found: Survey, rows: Int[np.ndarray, " row"], boot: Bootstrap, half: str, chosen: str
) -> list[dict[str, Any]]:
    """Write one half's rows of the behaviour table.

    Args:
        found: the survey.
        rows: which conflicts.
        boot: their weights.
        half: "discovery" or "confirmation".
        chosen: "all" or "competent".

    Returns:
        Rows for `table("behaviour", ...)`.
    """
    base: dict[str, Any] = {"half": half, "chosen": chosen, "n": len(rows)}
    names = ("value", "low", "high")
    out = [
        {**base, "quantity": name, **dict(zip(names, values, strict=True))}
        for name, values in quantities(found, rows, boot).items()
    ]
    for (cell, question), right in RIGHT.items():
        reading, margin = found.readings[(cell, question)], found.margin(cell, question)[rows]
        cell_name = cell if question == "ask" else f"{cell} ({question})"
        known = ~np.isnan(margin)
        owners = {"sound": found.candidates.sound[rows], "picture": found.candidates.picture[rows]}
        signs = {"sound": margin > 0, "picture": margin < 0}
        for whose in ("sound", "picture") if right is None else (right,):
            quantity = f"says {whose}" if right is None else "accuracy"
            for rule, hit in (("two", signs[whose]), ("vocabulary", reading.top[rows] == owners[whose])):
                values = np.where(known, hit.astype(np.float64), np.nan)
                figures = dict(zip(names, interval(boot, values), strict=True))
                out.append({**base, "quantity": quantity, "cell": cell_name, "rule": rule, **figures})
    for cell in ("va", "av", "blank_a", "blank_v", "blank_muted"):
        figures = dict(zip(names, interval(boot, found.margin(cell)[rows]), strict=True))
        out.append({**base, "quantity": "M", "cell": cell, **figures})
    mass = float(np.median(found.readings[("va", "ask")].mass[rows])) if len(rows) else float("nan")
    out.append({**base, "quantity": "median P(a) + P(v)", "cell": "va", "value": mass})
    return out


def refusals(found: Survey, rows: Int[np.ndarray, " row"], boot: Bootstrap) -> list[tuple[str, str]]:
    """Say whether the model can be asked this question at all.

    Args:
        found: the survey.
        rows: all of discovery.
        boot: their weights.

    Returns:
        (kind, sentence with the figure) of every refusal; empty where there is none.
    """
    out: list[tuple[str, str]] = []
    mass = float(np.median(found.readings[("va", "ask")].mass[rows]))
    if mass < LEAST_MASS:
        out.append(
            (
                "says neither",
                "the model would say neither word here: the median of P(sound's answer) + P(picture's) in the conflict "
                f'is {mass:.3f}, below {LEAST_MASS}. Give a prefix (such as "I hear a") or answers that it would say.',
            )
        )
    value, low, high = interval(boot, found.G[rows])
    if not low > 0:
        out.append(
            (
                "does not hear",
                f"the model does not hear: with nothing to see its hearing G is {value:.2f} logits (95% interval "
                f"{low:.2f} to {high:.2f}), which is not above 0. There is no hearing to suppress; "
                "try sounds that it can name.",
            )
        )
    return out


def gap_verdict(found: Survey, rows: Int[np.ndarray, " row"], boot: Bootstrap) -> tuple[str, str]:
    """Say whether there is a gap to explain, and of what kind.

    Args:
        found: the survey.
        rows: the competent conflicts of a half.
        boot: their weights.

    Returns:
        (kind, sentence): "no suppression", "not established" (both stop the search), "dominance", "interference" or
        "suppression, kind open".
    """
    q = quantities(found, rows, boot)
    figures = (
        f"hearing falls from G = {_figure(q['G'])} with nothing to see to C = {_figure(q['C'])} under conflict, "
        f"a gap of {_figure(q['gap'])} logits"
    )
    _, low, high = q["gap - G/4"]
    if high < 0:
        return "no suppression", f"No suppression: {figures}, which is below a quarter of G."
    if not low > 0:
        return "not established", f"Suppression is not established: {figures}; gap - G/4 is {_figure(q['gap - G/4'])}."
    _, c_low, c_high = q["C"]
    if c_high <= 0:
        return "dominance", f"The picture dominates: {figures}."
    if c_low > 0:
        return "interference", f"Interference, not dominance: {figures}; the sound still wins under conflict."
    return "suppression, kind open", f"Suppression, its kind open (C's interval holds 0): {figures}."


def _figure(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"
