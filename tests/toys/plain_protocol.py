"""The protocol's sections 1 to 5, written a second time from its text: plain, slow, one forward at a time.

One conflict is a `PlainCase`: the tensors of its cells under every question. All of it is loops over conflicts and
forwards. M = score(a) - score(v), the answers held fixed in every cell; an effect on C is half of [change of M in va -
change of M in av], the donor of `av` being the mirror; an effect on G the same in `blank_a` and `blank_v`. Where the
picture is what is suppressed, `see` is asked, M' = -M, and `v_muted`, `a_muted` change places with `blank_a`,
`blank_v`. A conflict without a third clip has NaN where one is needed.

Read out of the protocol's text where it leaves a choice: competence is judged between the two answers; a mean's donor
is aligned from the end, and where it is shorter than the site the overhang keeps the base's own output; the means of
"all distinct answers" are over the answers of every conflict given; half a dose is half of the run's own output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from plain_forward import MLP, Node, PlainEdit, PlainModel, PlainRun

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
    "video_only": "video_only_a",
}
MIRROR |= {after: before for before, after in MIRROR.items()}
FROZEN = " (norm frozen)"
RELEASES = ("blank_muted", "mean_other", "zero")
ALL_LATER = "all later"


@dataclass(frozen=True)
class Held:
    """What is held at the edited cell's own: all later heads; later MLPs, all of them or those of some layers."""

    heads: bool = False
    mlps: str | frozenset[int] = frozenset()


FREE, DIRECT, WRITE = Held(), Held(heads=True), Held(heads=True, mlps=ALL_LATER)


@dataclass
class PlainCase:
    """One conflict as tensors.

    Attributes:
        id: its name.
        words: the sound's answer, the picture's answer.
        cells: question ("hear", "see", "control") -> cell -> keyword arguments of HuggingFace's forward.
        site: question -> site set -> positions.
        runs: unedited runs, filled as they are asked for.
    """

    id: str
    words: tuple[str, str]
    cells: Mapping[str, Mapping[str, dict[str, Any]]]
    site: Mapping[str, Mapping[str, list[int]]]
    runs: dict[tuple[str, str, tuple[int, ...]], PlainRun] = field(default_factory=dict)


class Plain:
    """The protocol's figures of some conflicts.

    Args:
        model: the plain model.
        cases: every conflict, of both halves.
        tokens: answer -> its synonyms, each the tokens of one.
        suppressed: "sound" or "picture".
    """

    def __init__(
        self,
        model: PlainModel,
        cases: Sequence[PlainCase],
        tokens: Mapping[str, Sequence[Sequence[int]]],
        suppressed: str = "sound",
    ) -> None:
        self.model, self.cases = model, list(cases)
        self.tokens = {word: [tuple(one) for one in options] for word, options in tokens.items()}
        self.answers = sorted({word for case in cases for word in case.words})
        sound = suppressed == "sound"
        self.asked, self.other = ("hear", "see") if sound else ("see", "hear")
        self.alone = ("blank_a", "blank_v") if sound else ("v_muted", "a_muted")
        self.sign, self.wanted = (1, 0) if sound else (-1, 1)
        self.one_sense = "audio_only" if sound else "video_only"

    def run(self, case: PlainCase, cell: str, question: str | None = None, after: tuple[int, ...] = ()) -> PlainRun:
        """The unedited run of a cell, tokens of an answer after it or none."""
        key = (question or self.asked, cell, after)
        if key not in case.runs:
            case.runs[key] = self.model.run(case.cells[key[0]][cell], after)
        return case.runs[key]

    # Section 1: scores.

    def long(self, case: PlainCase) -> bool:
        """Whether an answer of the two has several tokens: then both are scored by summed log-probabilities."""
        return any(len(one) > 1 for word in case.words for one in self.tokens[word])

    def read(self, case: PlainCase, runs: Mapping[tuple[int, ...], PlainRun], frozen: bool = False) -> dict[str, Any]:
        """The scores of some runs of one cell, by the tokens after it: by the whole answers, by first tokens.

        "first" and "whole" are answer -> score.
        """
        rows = {after: (run.frozen if frozen else run.rows).double() for after, run in runs.items()}
        if self.long(case):
            rows = {after: logits.log_softmax(-1) for after, logits in rows.items()}

        def pooled(scores: Iterable[torch.Tensor]) -> float:
            return float(torch.stack(list(scores)).logsumexp(0))

        first = {
            word: pooled(rows[()][0, token] for token in sorted({one[0] for one in self.tokens[word]}))
            for word in self.answers
        }
        whole = dict(first)
        for word in case.words:
            sums = (sum(rows[one[:-1]][i, token] for i, token in enumerate(one)) for one in self.tokens[word])
            whole[word] = pooled(sums)
        return {"first": first, "whole": whole}

    def afters(self, case: PlainCase) -> list[tuple[int, ...]]:
        """The tokens that are to follow the prompt."""
        return sorted({(), *(one[:-1] for word in case.words for one in self.tokens[word])})

    def scores(self, case: PlainCase, cell: str, question: str | None = None) -> dict[str, Any]:
        """The scores in an unedited cell."""
        return self.read(case, {after: self.run(case, cell, question, after) for after in self.afters(case)})

    def m(self, case: PlainCase, cell: str, question: str | None = None) -> float:
        """M in an unedited cell (M' where the picture is suppressed)."""
        return self.sign * self.margin(case, self.scores(case, cell, question)["whole"])

    def form(self, cases: Sequence[PlainCase], forms: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, float]:
        """Each form's median probability, over `aa` (the sound's word) and `vv` (the picture's) of all conflicts.

        Args:
            cases: the manifest's.
            forms: form -> word -> its tokens; a word without that form has probability 0.
        """
        found: dict[str, float] = {}
        for form, words in forms.items():
            p: list[float] = []
            for case, cell, word in ((one, cell, one.words[i]) for one in cases for i, cell in enumerate(("aa", "vv"))):
                tokens = tuple(words.get(word, ()))
                rows = self.run(case, cell, after=tokens[:-1]).rows.double().softmax(-1)
                p.append(math.prod(float(rows[i, token]) for i, token in enumerate(tokens)) if tokens else 0.0)
            found[form] = float(np.median(p))
        return found

    def margin(self, case: PlainCase, scores: Mapping[str, float]) -> float:
        """score(a) - score(v)."""
        a, v = case.words
        return scores[a] - scores[v]

    def over_others(self, case: PlainCase, scores: Mapping[str, float], word: str) -> float:
        """An answer's score over the mean of the answers that are neither a nor v (section 5, "breaks")."""
        return scores[word] - mean(scores[one] for one in self.answers if one not in case.words)

    # Section 2: behaviour.

    def best_of_two(self, case: PlainCase, cell: str, question: str | None = None) -> str:
        """Which of the two answers has the larger score."""
        return case.words[0 if self.margin(case, self.scores(case, cell, question)["whole"]) > 0 else 1]

    def best_of_all(self, case: PlainCase, cell: str, question: str | None = None) -> int:
        """Which token of the whole vocabulary scores highest."""
        return int(self.run(case, cell, question).logits.argmax())

    def competence(self, case: PlainCase) -> list[bool]:
        """Hears a in `blank_a`, v in `blank_v`; sees v in `v_muted`, a in `a_muted`."""
        a, v = case.words
        wanted = [("blank_a", "hear", a), ("blank_v", "hear", v), ("v_muted", "see", v), ("a_muted", "see", a)]
        return [self.best_of_two(case, cell, question) == word for cell, question, word in wanted]

    def competent(self, case: PlainCase) -> bool:
        """Whether all four hold."""
        return all(self.competence(case))

    def behaviour(self, cases: Sequence[PlainCase]) -> dict[str, float]:
        """The means of section 2 over some conflicts; the rates are `says`."""
        m = {cell: mean(self.m(case, cell) for case in cases) for cell in ("va", "aa", "vv", "av")}
        c, g = mean(self.c(case) for case in cases), mean(self.g(case) for case in cases)
        e_a = 0.5 * (m["va"] + m["aa"] - m["vv"] - m["av"])
        e_v = 0.5 * (m["aa"] + m["av"] - m["va"] - m["vv"])
        return {
            "E_A": e_a,
            "E_V": e_v,
            "I": m["aa"] - m["va"] - m["av"] + m["vv"],
            "shortcut index": abs(e_v) / (abs(e_a) + abs(e_v)),
            "C": c,
            "G": g,
            "gap": g - c,
            "median P(a) + P(v)": float(np.median([self.mass(case) for case in cases])),
            "reversal rate": mean(self.m(case, self.alone[0]) > 0 > self.m(case, "va") for case in cases),
        }

    def dilution(self, cases: Sequence[PlainCase]) -> float:
        """What the mere presence of a picture's tokens costs: hearing without them, less G."""
        sounds = (0.5 * (self.m(case, self.one_sense) - self.m(case, MIRROR[self.one_sense])) for case in cases)
        return mean(sounds) - mean(self.g(case) for case in cases)

    def says(
        self, cases: Sequence[PlainCase], cell: str, whose: int, *, question: str | None = None
    ) -> tuple[float, float]:
        """How often a cell says the sound's answer (`whose` 0) or the picture's (1): best of the two, best of all."""
        two = mean(self.best_of_two(case, cell, question) == case.words[whose] for case in cases)
        firsts = {case.id: {one[0] for one in self.tokens[case.words[whose]]} for case in cases}
        vocabulary = mean(self.best_of_all(case, cell, question) in firsts[case.id] for case in cases)
        return two, vocabulary

    def c(self, case: PlainCase) -> float:
        """Hearing under conflict."""
        return 0.5 * (self.m(case, "va") - self.m(case, "av"))

    def g(self, case: PlainCase) -> float:
        """Hearing with nothing to see."""
        return 0.5 * (self.m(case, self.alone[0]) - self.m(case, self.alone[1]))

    def mass(self, case: PlainCase, cell: str = "va", question: str | None = None) -> float:
        """P(a) + P(v)."""
        total = 0.0
        for one in (one for word in case.words for one in self.tokens[word]):
            p = self.run(case, cell, question, one[:-1]).rows.double().softmax(-1)
            total += math.prod(float(p[i, token]) for i, token in enumerate(one))
        return total

    # Section 3: edits.

    def donor_output(
        self, case: PlainCase, cell: str, donor: str, node: Node, site: str, pool: Sequence[PlainCase], question: str
    ) -> tuple[list[int], torch.Tensor]:
        """The output [pos, d] that a donor gives, and where it goes.

        Args:
            case: the conflict.
            cell: the cell that is edited.
            donor: "zero", "half_dose", "mean_task", "mean_other" or a cell, already mirrored where `cell` is.
            node: which.
            site: the site set.
            pool: discovery's conflicts, for the means.
            question: what is asked in the edited cell, and in a donor that is a cell.
        """
        positions = case.site[question][site]
        if donor in ("zero", "half_dose"):
            own = self.run(case, cell, question).output(node)[positions]
            return positions, own * (0.0 if donor == "zero" else 0.5)
        if "_only" in donor:
            # Another layout: aligned from the end, as far as the tokens are equal.
            mine, theirs = (self.run(case, name, question).tensors["input_ids"][0].tolist() for name in (cell, donor))
            n = 0
            while n < min(len(mine), len(theirs)) and mine[-1 - n] == theirs[-1 - n]:
                n += 1
            reached = [position for position in positions if position >= len(mine) - n]
            there = [position - len(mine) + len(theirs) for position in reached]
            return reached, self.run(case, donor, question).output(node)[there]
        if not donor.startswith("mean"):
            return positions, self.run(case, donor, question).output(node)[positions]
        asked, mean_cell = (self.other, "va") if donor == "mean_other" else (self.asked, "va" if cell == "va" else "av")
        others = [other for other in pool if not set(other.words) & set(case.words)]
        sites = [other.site[asked][site] for other in others]
        n = min([len(positions), *(len(where) for where in sites)])
        given = [
            self.run(other, mean_cell, asked).output(node)[where[len(where) - n :]].double()
            for other, where in zip(others, sites, strict=True)
        ]
        return positions[len(positions) - n :], torch.stack(given).mean(0).float()

    def changes(
        self,
        case: PlainCase,
        cell: str,
        donor: str,
        nodes: Sequence[Node],
        site: str,
        pool: Sequence[PlainCase],
        held: Held = FREE,
        question: str | None = None,
        context: Mapping[Node, str] | None = None,
    ) -> list[dict[str, float]]:
        """What an edit changes in a cell, the final norm free, then frozen: M, both centred scores, and the rise.

        `context` are other nodes that are edited before and after, node -> donor.
        """
        asked = question or self.asked

        def given(node: Node, by: str) -> tuple[list[int], torch.Tensor]:
            return self.donor_output(case, cell, by, node, site, pool, asked)

        around = PlainEdit({node: given(node, by) for node, by in (context or {}).items()})
        edit = PlainEdit(
            {**around.nodes, **{node: given(node, donor) for node in nodes}},
            hold_after=max(layer for layer, _ in nodes) if held.heads else None,
            hold_mlps=self.held_mlps(nodes, held),
        )
        before, after = {}, {}
        for tokens in self.afters(case):
            base = self.run(case, cell, asked, tokens)
            before[tokens] = self.model.edited(base, around) if around.nodes else base
            after[tokens] = self.model.edited(before[tokens], edit)
        found: list[dict[str, float]] = []
        for frozen in (False, True):
            was, now = self.read(case, before, frozen), self.read(case, after, frozen)
            heard = case.words[self.wanted if cell in ("va", self.alone[0]) else 1 - self.wanted]
            change = {
                "M": self.margin(case, now["whole"]) - self.margin(case, was["whole"]),
                "first": self.margin(case, now["first"]) - self.margin(case, was["first"]),
                "rise": self.over_others(case, now["first"], heard) - self.over_others(case, was["first"], heard),
            }
            read = "first" if held.heads else "whole"  # shares are read at the first token
            for name, word in zip("av", case.words, strict=True):
                change[name] = self.centred(now[read], word) - self.centred(was[read], word)
            found.append(change)
        return found

    def centred(self, scores: Mapping[str, float], word: str) -> float:
        """An answer's score over the mean of all distinct answers'."""
        return scores[word] - mean(scores.values())

    def held_mlps(self, nodes: Sequence[Node], held: Held) -> frozenset[int]:
        """The layers whose MLPs are held: later ones; a head's later MLPs include its own layer's."""
        last = max(layer + (which == MLP) for layer, which in nodes)
        later = range(last, self.model.n_layers)
        return frozenset(later if held.mlps == ALL_LATER else [layer for layer in later if layer in held.mlps])

    def effect(
        self,
        case: PlainCase,
        donor: str,
        nodes: Sequence[Node],
        site: str,
        pool: Sequence[PlainCase],
        *,
        cells: tuple[str, str] = ("va", "av"),
        **how: Any,
    ) -> dict[str, float]:
        """The mirrored effect on C (in the cells of G: on G), and its parts; "... (norm frozen)" beside each."""
        names = ("M", "first", "sound", "picture", "rise")
        if "w" in donor and donor not in case.cells[self.asked]:
            return {f"{name}{ending}": math.nan for name in names for ending in ("", FROZEN)}
        one = self.changes(case, cells[0], donor, nodes, site, pool, **how)
        two = self.changes(case, cells[1], MIRROR.get(donor, donor), nodes, site, pool, **how)
        found: dict[str, float] = {}
        for ending, here, there in zip(("", FROZEN), one, two, strict=True):
            for name in ("M", "first"):
                found[f"{name}{ending}"] = self.sign * 0.5 * (here[name] - there[name])
            found[f"sound{ending}"] = 0.5 * (here["a"] + there["v"])
            found[f"picture{ending}"] = 0.5 * (here["v"] + there["a"])
            found[f"rise{ending}"] = 0.5 * (here["rise"] + there["rise"])
        return found

    # Section 4: the effects of a node, in one conflict.

    def node_effects(
        self,
        case: PlainCase,
        node: Node,
        site: str,
        pool: Sequence[PlainCase],
        *,
        named: Sequence[int] = (),
    ) -> dict[str, float]:
        """Every row of section 4 for a node in a conflict, "estimand/donor" -> value, the norm free and frozen.

        Args:
            case: the conflict.
            node: which.
            site: the site set.
            pool: discovery's conflicts, for the means.
            named: the layers whose MLPs are named.
        """

        def effect(donor: str, **how: Any) -> dict[str, float]:
            return self.effect(case, donor, [node], site, pool, **how)

        primary, donors = RELEASES, (*RELEASES, "mean_task", self.one_sense, "half_dose")
        on_c = {donor: effect(donor) for donor in (*donors, "wa", "vw", self.alone[0])}
        on_g = {donor: effect(donor, cells=self.alone) for donor in (*primary, "va")}
        direct, write = ({donor: effect(donor, held=held) for donor in primary} for held in (DIRECT, WRITE))
        through = Held(mlps=frozenset(named))
        found = {f"rise over others/{donor}": on_c[donor]["rise"] for donor in primary}
        if self.held_mlps([node], through):
            held = {donor: effect(donor, held=through)["first"] for donor in primary}
            found |= {f"named MLPs held/{donor}": one for donor, one in held.items()}
        found |= {f"release at the first token/{donor}": on_c[donor]["first"] for donor in primary}
        for end in ("", FROZEN):
            m, first = f"M{end}", f"first{end}"
            found |= {f"release{end}/{donor}": on_c[donor][m] for donor in donors}
            for donor in primary:
                found |= {
                    f"direct{end}/{donor}": direct[donor][first],
                    f"write{end}/{donor}": write[donor][first],
                    f"repair{end}/{donor}": direct[donor][first] - on_c[donor][first],
                    f"fall of G{end}/{donor}": -on_g[donor][m],
                }
                for part in ("sound", "picture"):
                    found[f"release on {part}{end}/{donor}"] = on_c[donor][f"{part}{end}"]
                    found[f"direct on {part}{end}/{donor}"] = direct[donor][f"{part}{end}"]
            share = on_c["mean_other"][m] - on_c["mean_task"][m]
            found[f"question's own{end}/mean_other - mean_task"] = share
            lost = on_c[self.alone[0]][m] - on_c["blank_muted"][m]
            found |= {
                f"reads picture{end}/wa": on_c["wa"][m],
                f"reads sound{end}/vw": on_c["vw"][m],
                f"silenced{end}/{self.alone[0]} - blank_muted": lost,
                f"sufficiency{end}/va": -on_g["va"][m],
                f"carries{end}/blank_muted": -on_g["blank_muted"][m],
            }
        return found

    def null_share(
        self, cases: Sequence[PlainCase], nodes: Sequence[Node], site: str, pool: Sequence[PlainCase]
    ) -> float:
        """Section 5's delta of other models: the 99th percentile of the largest release under `control`, over G."""
        largest = [
            max(
                mean(self.effect(case, donor, [node], site, pool, question="control")["M"] for case in cases)
                for donor in RELEASES
            )
            for node in nodes
        ]
        return float(np.percentile(largest, 99)) / mean(self.g(case) for case in cases)


def mean(values: Iterable[float]) -> float:
    """The plain mean."""
    listed = list(values)
    return sum(listed) / len(listed)
