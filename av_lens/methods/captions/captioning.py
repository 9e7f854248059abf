"""Captions under a plan: what does the model write, and which heard and seen events are in it, with edits and without?

    heard          share of the heard events that it names          (events and words from a stated lexicon)
    seen           share of the seen events that it names
    hallucinated   share of the events that it names which are neither heard nor seen
    judged audio   an LLM's score of it against all references of what is heard, 0 to 1   (only with a judge)
    judged video   likewise of what is seen
    words          how many words it has

`grid` is over `[example, plan, figure]`, means over samples; the rows "P - none" are the differences. Not measured is
NaN: a share of nothing, or a verdict that could not be read. "none" is always there, sampled with the same draws.

Lexicon, plans and server are checked first, then captions are written, then judged: a judge that goes away later costs
its own verdicts only. Source: the study's protocol (AudioCaps clips, a Qwen3-32B judge); CHAIR (Rohrbach et al., 2018)
for events that are not there. Not done: which clause of a caption claims to hear what.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from av_lens.checks import require_at_least
from av_lens.core import Progress, watched
from av_lens.errors import InputError
from av_lens.inputs.answers import words_of
from av_lens.interventions import Plan
from av_lens.methods.captions.judging import Judge, Judged
from av_lens.methods.shared.frame import Examples, Frame, for_each, told
from av_lens.model import HookedAVLLM
from av_lens.replay.traces import record
from av_lens.results import Tabled
from av_lens.results.events import FIGURES as MATCHED
from av_lens.results.events import Lexicon

UNEDITED = "none"
JUDGED = {"audio": "judged audio", "video": "judged video"}
SIGN = "captions as they are and under plans; baseline 0, so effects are values; 'P - none' is what the plan changed"
Events = Sequence[str] | Sequence[Sequence[str]]


def caption(
    model: HookedAVLLM,
    x: Any,
    *,
    plans: Plan | str | Path | Mapping[str, Plan | str | Path] | None = None,
    lexicon: Lexicon | Mapping[str, Iterable[str]] | Sequence[str] = (),
    heard: Events = (),
    seen: Events = (),
    judge: Judge | None = None,
    references: Mapping[str, Sequence[str] | Sequence[Sequence[str]]] | None = None,
    max_new_tokens: int = 64,
    samples: int = 1,
    do_sample: bool = False,
    seed: int = 0,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Tabled:
    """Let the model write captions with edits and without, and score what they name.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs` (one example or a stack), a `Conflict` (its cell va), or several of either.
        plans: a plan, a saved plan's file, or several by name; None writes captions as they are.
        lexicon: every event's synonyms; left out, the heard and seen events alone.
        heard: the events that are heard, for all examples alike or a list for each; a conflict's is its sound's answer.
        seen: the events that are seen, likewise; a conflict's is its picture's answer.
        judge: an LLM on a server that the caller names; None sends nothing.
        references: for the judge, by aspect ("audio", "video"): texts for all examples alike, or a list for each.
        max_new_tokens: a caption has at most so many tokens.
        samples: captions of each example and plan; more than one needs `do_sample`.
        do_sample: draw tokens instead of taking the likeliest.
        seed: what is drawn from.
        stack: examples that run together.
        budget_gb: memory for plans that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        Figures and captions. Interrupted, they hold what is done, the rest is NaN.

    Raises:
        InputError: no events and no judge, events that the lexicon lacks, references for another number of examples.
        InterventionError: a plan does not fit.
        ModelError: the judge cannot be reached, refuses the key or lacks the model.
    """
    examples, named = Examples.of(model, x), _named(model, plans)
    truth = [_truth(examples, given, side) for side, given in enumerate((heard, seen))]
    matcher = _lexicon(lexicon, truth, examples)
    texts = _references(references, len(examples), judge)
    if matcher is None and judge is None:
        raise InputError("nothing to score captions by: name heard= and seen= events, or a judge= with references=.")
    require_at_least("samples", samples, 1)
    if samples > 1 and not do_sample:
        raise InputError(f"{samples} samples of the likeliest caption would all be alike: pass do_sample=True.")
    for one in examples.inputs:
        for plan in named.values():
            plan.compile(model.spec, one.spans, batch=len(one))
    if judge is not None:
        judge.check()
    how = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "budget_gb": budget_gb}
    work, partial = _Work(model, examples, named, samples, seed), ""
    with watched(progress) as show:
        try:
            work.write(how, stack, show)
            work.match(matcher, truth)
            if judge is not None:
                work.judge(judge, texts, show)
        except KeyboardInterrupt:
            if not work.rows:
                raise
            work.match(matcher, truth)
            partial = f"interrupted: {len(work.rows)} of {work.total} captions written; what is not done is NaN"
    return work.tabled(
        partial=partial,
        lexicon=None if matcher is None else dict(matcher.words),
        judge=None if judge is None else judge.model,
        options=how | {"samples": samples, "seed": seed},
    )


class _Work:
    """Captions as they come, and their scores."""

    def __init__(self, model: Any, examples: Examples, plans: dict[str, Plan], samples: int, seed: int) -> None:
        self.model, self.examples, self.plans, self.samples, self.seed = model, examples, plans, samples, seed
        self.rows: list[dict[str, Any]] = []
        self.total = len(examples) * len(plans) * samples
        self.failures: Counter[str] = Counter()
        self.judged: tuple[str, ...] = ()

    def write(self, how: Mapping[str, Any], stack: int, show: Progress) -> None:
        """Write all captions, from one trace for each stack; plans draw alike, samples do not."""
        for one in self.examples.stacks(stack):
            numbers, trace = one.rows, record(self.model, one.x)
            for sample in range(self.samples):
                plans, drawn = list(self.plans.values()), np.random.SeedSequence([self.seed, sample, int(numbers[0])])
                if how["do_sample"]:  # one by one, so that all draw alike
                    seed = int(drawn.generate_state(1)[0])
                    said = [trace.generate(plan, seed=seed, **how)[0] for plan in plans]
                else:
                    said = trace.generate(plans, **how)
                for name, written in zip(self.plans, said, strict=True):
                    for example, text in zip(numbers.tolist(), written.text, strict=True):
                        self.rows.append({"example": example, "plan": name, "sample": sample, "text": text.strip()})
                show("captions", len(self.rows), self.total)

    def match(self, matcher: Lexicon | None, truth: list[list[tuple[str, ...]]]) -> None:
        """Look the events up in every caption."""
        for row in self.rows:
            heard, seen = (side[row["example"]] for side in truth)
            row |= {"words": len(row["text"].split()), "events": ""} | dict.fromkeys(MATCHED, np.nan)
            if matcher is not None:
                row["events"] = ", ".join(dict.fromkeys(match.event for match in matcher.found(row["text"])))
                row |= matcher.score(row["text"], heard=heard, seen=seen)

    def judge(self, judge: Judge, texts: Mapping[str, list[list[str]]], show: Progress) -> None:
        """Have every caption judged in every aspect that has references."""
        items = [(row, aspect, listed[row["example"]]) for aspect, listed in texts.items() for row in self.rows]
        asked, self.judged = [(row["text"], listed, aspect) for row, aspect, listed in items], tuple(texts)
        for row in self.rows:
            row |= {JUDGED[aspect]: np.nan for aspect in texts}
        verdicts = list[Judged]()
        try:
            judge.score_all(asked, finished=told(show, "judge", len(items)), into=verdicts)
        finally:
            for (row, aspect, _), verdict in zip(items, verdicts, strict=False):
                row[JUDGED[aspect]] = verdict.score
                row[f"{JUDGED[aspect]} reply"] = verdict.reply
                self.failures[verdict.failed or "judged"] += 1
            self.failures["not asked"] += len(items) - len(verdicts)

    def tabled(self, *, partial: str, **choices: Any) -> Tabled:
        """Average over samples, add the differences, and keep the captions."""
        rows = pd.DataFrame(self.rows).sort_values(["example", "plan", "sample"], kind="stable", ignore_index=True)
        figures = [*MATCHED, *(JUDGED[aspect] for aspect in self.judged), "words"]
        names, means = list(self.plans), cast(Any, rows.groupby(["example", "plan"])[figures].mean())
        found = means.to_xarray().to_dataarray().reindex(example=range(len(self.examples)), plan=names)
        values = found.transpose("example", "plan", ...).values
        labels = names + [f"{name} - {UNEDITED}" for name in names[1:]]
        frame = Frame.of(self.model, self.examples, measured=False)
        frame.values, frame.partial = np.hstack([values, values[:, 1:] - values[:, :1]]), partial
        grid = frame.grid(
            {"plan": labels, "figure": figures},
            named=("captions", "share; score from 0 to 1; words"),
            direction=SIGN,
            method="captions",
            verdicts=dict(sorted(self.failures.items())),
            **choices,
        )
        return Tabled(grid, rows)


def _named(model: Any, plans: Any) -> dict[str, Plan]:
    """The plans by name, "none" first."""
    given = {} if plans is None else plans if isinstance(plans, Mapping) else {"plan": plans}
    if UNEDITED in given:
        raise InputError(f"the name {UNEDITED!r} is that of captions as they are; name the plan otherwise.")
    opened = {str(k): p if isinstance(p, Plan) else Plan.load(p, model=model) for k, p in given.items()}
    return {UNEDITED: Plan()} | opened


def _truth(examples: Examples, given: Any, side: int) -> list[tuple[str, ...]]:
    if not len(given) and examples.conflicts:
        return [tuple(words_of(conflict.answers[side])[:1]) for conflict in examples.conflicts]
    return for_each(given, len(examples), f"{('heard', 'seen')[side]} events")


def _lexicon(given: Any, truth: list[list[tuple[str, ...]]], examples: Examples) -> Lexicon | None:
    """The lexicon that was given, or one of the events that are there; every event must be in it."""
    events = {event: [] for side in truth for listed in side for event in listed}
    if not isinstance(given, Lexicon) and not len(given):
        for conflict in examples.conflicts:
            for first, *others in filter(None, map(words_of, conflict.answers)):
                events.setdefault(first, []).extend(others)
        return Lexicon.of(events) if events else None
    found = given if isinstance(given, Lexicon) else Lexicon.of(given)
    for event in events:
        found.event(event)
    return found


def _references(given: Any, n: int, judge: Judge | None) -> dict[str, list[list[str]]]:
    if judge is None:
        if given:
            raise InputError("references are what a judge compares with; name a judge= as well.")
        return {}
    if not given:
        raise InputError('a judge needs references={"audio": [...], "video": [...]}, one of them at least.')
    for aspect in given:
        if aspect not in JUDGED:
            raise InputError(f"references are of {' or '.join(JUDGED)}, not of {aspect!r}.")
    found = {a: [list(item) for item in for_each(texts, n, f"{a} references")] for a, texts in given.items()}
    for aspect, listed in found.items():
        for number, item in enumerate(listed):
            if not item or not all(text.strip() for text in item):
                raise InputError(f"example {number} has no {aspect} reference, or an empty one.")
    return found
