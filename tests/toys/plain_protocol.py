"""The figures of the protocol's sections 2 and 4, written a second time from its text: plain, slow, means only.

One conflict is a `PlainCase`: the tensors of its cells, and of its cells under the question about the picture. All of
it is loops over conflicts and forwards. M = score(a) - score(v), the answers held fixed in every cell; an effect on C
is half of [change of M in va - change of M in av], the donor of `av` being the mirror; an effect on G the same in
`blank_a` and `blank_v`. A conflict without a third clip has NaN where one is needed.

Read out of the protocol's text where it leaves a choice: competence is judged between the two answers; a mean's donor
is aligned from the end, and where it is shorter than the site the overhang keeps the base's own z; the means of "all
distinct answers" are over the answers of every conflict given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from plain_forward import PlainEdit, PlainModel, PlainRun

MIRROR = {
    "va": "av",
    "vv": "aa",
    "aa": "vv",
    "vw": "aw",
    "wa": "wv",
    "v_muted": "a_muted",
    "blank_a": "blank_v",
    "blank_muted": "blank_muted",
    "audio_only": "audio_only_v",
}
MIRROR |= {after: before for before, after in MIRROR.items()}
FROZEN = " (norm frozen)"
RELEASES = ("blank_muted", "mean_other", "zero")
Head = tuple[int, int]


@dataclass
class PlainCase:
    """One conflict as tensors.

    Attributes:
        id: its name.
        words: the sound's answer, the picture's answer.
        cells: cell -> keyword arguments of HuggingFace's forward.
        see: the same under the question about the picture.
        site: site set -> positions, in `cells`.
        see_site: site set -> positions, in `see`.
        runs: unedited runs, filled as they are asked for.
    """

    id: str
    words: tuple[str, str]
    cells: dict[str, dict[str, Any]]
    see: dict[str, dict[str, Any]]
    site: dict[str, list[int]]
    see_site: dict[str, list[int]]
    runs: dict[tuple[str, str], PlainRun] = field(default_factory=dict)


class Plain:
    """The protocol's figures of some conflicts.

    Args:
        model: the plain model.
        cases: every conflict, of both halves.
        tokens: answer -> its one token.
    """

    def __init__(self, model: PlainModel, cases: Sequence[PlainCase], tokens: dict[str, int]) -> None:
        self.model, self.cases, self.tokens = model, list(cases), tokens
        self.answers = sorted({word for case in cases for word in case.words})

    def run(self, case: PlainCase, cell: str, question: str = "asked") -> PlainRun:
        """The unedited run of a cell."""
        key = (question, cell)
        if key not in case.runs:
            tensors = case.cells[cell] if question == "asked" else case.see[cell]
            case.runs[key] = self.model.run(tensors)
        return case.runs[key]

    # Section 1: scores.

    def margin(self, case: PlainCase, logits: torch.Tensor) -> float:
        """M = score(a) - score(v)."""
        a, v = (float(logits[self.tokens[word]].double()) for word in case.words)
        return a - v

    def centred(self, logits: torch.Tensor, word: str) -> float:
        """An answer's score over the mean of all distinct answers'."""
        scores = {other: float(logits[self.tokens[other]].double()) for other in self.answers}
        return scores[word] - sum(scores.values()) / len(scores)

    def over_others(self, case: PlainCase, logits: torch.Tensor, word: str) -> float:
        """An answer's score over the mean of the answers that are neither a nor v (section 5, "breaks")."""
        others = [float(logits[self.tokens[one]].double()) for one in self.answers if one not in case.words]
        return float(logits[self.tokens[word]].double()) - sum(others) / len(others)

    # Section 2: behaviour.

    def m(self, case: PlainCase, cell: str) -> float:
        """M in an unedited cell."""
        return self.margin(case, self.run(case, cell).logits)

    def best_of_two(self, case: PlainCase, cell: str, question: str = "asked") -> str:
        """Which of the two answers scores higher."""
        return case.words[0 if self.margin(case, self.run(case, cell, question).logits) > 0 else 1]

    def best_of_all(self, case: PlainCase, cell: str, question: str = "asked") -> int:
        """Which token of the whole vocabulary scores highest."""
        return int(self.run(case, cell, question).logits.argmax())

    def competent(self, case: PlainCase) -> bool:
        """Hears a in `blank_a` and v in `blank_v`; sees v in `v_muted` and a in `a_muted`."""
        a, v = case.words
        heard = self.best_of_two(case, "blank_a") == a and self.best_of_two(case, "blank_v") == v
        return heard and self.best_of_two(case, "v_muted", "see") == v and self.best_of_two(case, "a_muted", "see") == a

    def behaviour(self, cases: Sequence[PlainCase]) -> dict[str, float]:
        """The means of section 2 over some conflicts; the rates are `says`."""
        m = {cell: mean(self.m(case, cell) for case in cases) for cell in ("va", "aa", "vv", "av")}
        c, g = mean(self.c(case) for case in cases), mean(self.g(case) for case in cases)
        e_a = 0.5 * (m["va"] + m["aa"] - m["vv"] - m["av"])
        e_v = 0.5 * (m["aa"] + m["av"] - m["va"] - m["vv"])
        alone = mean(0.5 * (self.m(case, "audio_only") - self.m(case, "audio_only_v")) for case in cases)
        return {
            "dilution": alone - g,
            "reversal rate": mean(self.m(case, "blank_a") > 0 > self.m(case, "va") for case in cases),
            "E_A": e_a,
            "E_V": e_v,
            "I": m["aa"] - m["va"] - m["av"] + m["vv"],
            "shortcut index": abs(e_v) / (abs(e_a) + abs(e_v)),
            "C": c,
            "G": g,
            "gap": g - c,
            "median P(a) + P(v)": float(np.median([self.mass(case) for case in cases])),
        }

    def says(
        self, cases: Sequence[PlainCase], cell: str, whose: int, *, question: str = "asked"
    ) -> tuple[float, float]:
        """How often a cell says the sound's answer (`whose` 0) or the picture's (1): best of the two, best of all."""
        two = mean(self.best_of_two(case, cell, question) == case.words[whose] for case in cases)
        vocabulary = mean(self.best_of_all(case, cell, question) == self.tokens[case.words[whose]] for case in cases)
        return two, vocabulary

    def c(self, case: PlainCase) -> float:
        """Hearing under conflict."""
        return 0.5 * (self.m(case, "va") - self.m(case, "av"))

    def g(self, case: PlainCase) -> float:
        """Hearing with nothing to see."""
        return 0.5 * (self.m(case, "blank_a") - self.m(case, "blank_v"))

    def mass(self, case: PlainCase) -> float:
        """P(a) + P(v) in `va`."""
        p = self.run(case, "va").logits.double().softmax(0)
        return float(sum(p[self.tokens[word]] for word in case.words))

    # Section 3: edits.

    def donor_z(
        self, case: PlainCase, cell: str, donor: str, head: Head, site: str, pool: Sequence[PlainCase]
    ) -> tuple[list[int], torch.Tensor]:
        """The z [pos, d_head] that a donor gives, and where it goes.

        Args:
            case: the conflict.
            cell: the cell that is edited.
            donor: "zero", "half_dose", "mean_task", "mean_other" or a cell, already mirrored where `cell` is.
            head: which.
            site: the site set.
            pool: discovery's conflicts, for the means.
        """
        layer, number = head
        positions = case.site[site]
        if donor == "zero":
            return positions, torch.zeros_like(self.run(case, cell).z[layer, positions, number])
        if donor == "half_dose":
            return positions, self.run(case, cell).z[layer, positions, number] / 2
        if donor.startswith("audio_only"):
            # Another layout: aligned from the end, as far as the tokens are equal.
            mine, theirs = (self.run(case, name).tensors["input_ids"][0].tolist() for name in (cell, donor))
            n = 0
            while n < min(len(mine), len(theirs)) and mine[-1 - n] == theirs[-1 - n]:
                n += 1
            reached = [position for position in positions if position >= len(mine) - n]
            there = [position - len(mine) + len(theirs) for position in reached]
            return reached, self.run(case, donor).z[layer, there, number]
        if not donor.startswith("mean"):
            return positions, self.run(case, donor).z[layer, positions, number]
        question, mean_cell = ("see", "va") if donor == "mean_other" else ("asked", "va" if cell == "va" else "av")
        others = [other for other in pool if not set(other.words) & set(case.words)]
        sites = [other.see_site[site] if question == "see" else other.site[site] for other in others]
        n = min([len(positions), *(len(where) for where in sites)])
        given = [
            self.run(other, mean_cell, question).z[layer, where[len(where) - n :], number].double()
            for other, where in zip(others, sites, strict=True)
        ]
        return positions[len(positions) - n :], torch.stack(given).mean(0).float()

    def changes(
        self,
        case: PlainCase,
        cell: str,
        donor: str,
        heads: Sequence[Head],
        site: str,
        pool: Sequence[PlainCase],
        direct: bool,
    ) -> list[dict[str, float]]:
        """What an edit changes in a cell, the final norm free, then frozen: M, both centred scores, and the rise."""
        base = self.run(case, cell)
        edit = PlainEdit(
            {head: self.donor_z(case, cell, donor, head, site, pool) for head in heads},
            hold_after=max(layer for layer, _ in heads) if direct else None,
        )
        heard = case.words[0 if cell in ("va", "blank_a") else 1]
        found: list[dict[str, float]] = []
        for logits in self.model.edited(base, edit):
            change = {"M": self.margin(case, logits) - self.margin(case, base.logits)}
            change["rise"] = self.over_others(case, logits, heard) - self.over_others(case, base.logits, heard)
            for name, word in zip("av", case.words, strict=True):
                change[name] = self.centred(logits, word) - self.centred(base.logits, word)
            found.append(change)
        return found

    def effect(
        self,
        case: PlainCase,
        donor: str,
        heads: Sequence[Head],
        site: str,
        pool: Sequence[PlainCase],
        *,
        cells: tuple[str, str] = ("va", "av"),
        direct: bool = False,
    ) -> dict[str, float]:
        """The mirrored effect on C (in the blank cells: on G), and its parts; "... (norm frozen)" beside each."""
        names = ("M", "sound", "picture", "rise")
        if "w" in donor and donor not in case.cells:
            return {f"{name}{ending}": math.nan for name in names for ending in ("", FROZEN)}
        one = self.changes(case, cells[0], donor, heads, site, pool, direct)
        two = self.changes(case, cells[1], MIRROR.get(donor, donor), heads, site, pool, direct)
        found: dict[str, float] = {}
        for ending, here, there in zip(("", FROZEN), one, two, strict=True):
            found[f"M{ending}"] = 0.5 * (here["M"] - there["M"])
            found[f"sound{ending}"] = 0.5 * (here["a"] + there["v"])
            found[f"picture{ending}"] = 0.5 * (here["v"] + there["a"])
            found[f"rise{ending}"] = 0.5 * (here["rise"] + there["rise"])
        return found

    # Section 4: the effects of a head, in one conflict.

    def head_effects(self, case: PlainCase, head: Head, site: str, pool: Sequence[PlainCase]) -> dict[str, float]:
        """Every row of section 4 for a head in a conflict, "estimand/donor" -> value, the norm free and frozen.

        Args:
            case: the conflict.
            head: which.
            site: the site set.
            pool: discovery's conflicts, for the means.
        """
        releases = (*RELEASES, "mean_task", "audio_only", "half_dose")
        on_c = {donor: self.effect(case, donor, [head], site, pool) for donor in (*releases, "wa", "vw", "blank_a")}
        direct = {donor: self.effect(case, donor, [head], site, pool, direct=True) for donor in RELEASES}
        blank = ("blank_a", "blank_v")
        on_g = {donor: self.effect(case, donor, [head], site, pool, cells=blank) for donor in (*RELEASES, "va")}
        found = {f"rise over others/{donor}": on_c[donor]["rise"] for donor in RELEASES}
        for end in ("", FROZEN):
            m = f"M{end}"
            found |= {f"release{end}/{donor}": on_c[donor][m] for donor in releases}
            for donor in RELEASES:
                found |= {
                    f"direct{end}/{donor}": direct[donor][m],
                    f"repair{end}/{donor}": direct[donor][m] - on_c[donor][m],
                    f"fall of G{end}/{donor}": -on_g[donor][m],
                }
                for part in ("sound", "picture"):
                    found[f"release on {part}{end}/{donor}"] = on_c[donor][f"{part}{end}"]
                    found[f"direct on {part}{end}/{donor}"] = direct[donor][f"{part}{end}"]
            found |= {
                f"question's own{end}/mean_other - mean_task": on_c["mean_other"][m] - on_c["mean_task"][m],
                f"reads picture{end}/wa": on_c["wa"][m],
                f"reads sound{end}/vw": on_c["vw"][m],
                f"silenced{end}/blank_a - blank_muted": on_c["blank_a"][m] - on_c["blank_muted"][m],
                f"sufficiency{end}/va": -on_g["va"][m],
                f"carries{end}/blank_muted": -on_g["blank_muted"][m],
            }
        return found


def mean(values: Iterable[float]) -> float:
    """The plain mean."""
    listed = list(values)
    return sum(listed) / len(listed)
