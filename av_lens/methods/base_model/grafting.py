"""Grafting: what does a model say with one place's activations from the model that it was made from, or the reverse?

Activation patching across two models of equal sizes, on the same picture and question:

    direction="into model"   the audio-visual model is run on its prompt; one place takes the base's values
    direction="into base"    the base is run on its prompt; one place takes the audio-visual model's values

`effects = metric(grafted run) - metric(the run being grafted into)`; `donor` is the metric of the other model's own
run, so `normalized()` is 0 at the run that was grafted into and 1 at the other model. Into the model, a place with an
effect near 0 does there what the base already did.

The base's prompt has the sound taken out, masked or kept (`audio=`, as in `base_shift`). Where it is taken out, only
*shared* positions are grafted: tokens that both prompts have. A place of which nothing is shared (the sound itself) is
NaN. The shared text's position ids differ between the prompts, so queries and keys before rotation are comparable
(`q`, `k`), rotated ones are not; scores and patterns are refused.

Exact, by replay. Control: `audio="kept"` with the model as its own base gives 0 everywhere (tested); read an effect
beside those of the other heads of its layer. Source: Prakash et al. (2024), who patch across fine-tuned models.

    >>> grid = graft(model, x, base="av-tiny-base", metric=logit_diff("siren", "dog"))         # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from av_lens.checks import require_choice
from av_lens.core import Progress
from av_lens.errors import InputError, InterventionError
from av_lens.families.hook_names import component_named
from av_lens.inputs import AVInputs
from av_lens.interventions import Plan
from av_lens.methods.base_model.related import deaf_plan, matched, opened, prompt_for, require_equal_sizes
from av_lens.methods.shared.frame import Examples, Frame, Given, Stack, numbers, scored
from av_lens.methods.shared.places import Axes, Visits
from av_lens.metrics import Metric, require_numbers
from av_lens.model import HookedAVLLM
from av_lens.replay import measure, measure_plans
from av_lens.replay.traces import record
from av_lens.results import Grid
from av_lens.spans import Span

SIGNS = {
    "into model": "the base's values into the model's run; positive: the place as the base has it raises the metric",
    "into base": "the model's values into the base's run; positive: the place as the model has it raises the metric",
}


def graft(
    model: HookedAVLLM,
    x: Any,
    *,
    base: Any,
    metric: Metric | Callable[..., Any],
    over: str = "head",
    at: str | Span | None = None,
    direction: str = "into model",
    audio: str = "out",
    component: str | None = None,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Grid:
    """Patch every place of one model's run with the other model's values, one place at a time.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs` (one example or a stack), a `Conflict` (its cell va), or several of either.
        base: the model that it was made from, or its name or folder.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        over: the axes that are iterated, as in `patch`: "head", "layer", "layer span", "layers:3", ...
        at: positions of the run that is grafted into, edited together; None means the generation position, or all
            positions where `over` iterates them.
        direction: "into model" or "into base".
        audio: what becomes of the sound in the base's prompt: "out", "masked" or "kept".
        component: what is grafted; None means z for heads and resid_pre for layers.
        stack: examples that run together.
        budget_gb: memory for the activations of edits that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid with `values`, `effects`, `baseline` (the run that is grafted into) and `donor` (the other model's own).

    Raises:
        InputError: nothing given, an unknown axis, direction or way with the sound, or a metric that is NaN.
        InterventionError: a component that is none, or means something else in the other model.
        ModelError: models of other sizes or vocabularies.
        AlignmentError: the base's prompt differs in more than the sound.
    """
    require_choice("direction", direction, SIGNS)
    axes, examples, related = Axes.parsed(over), Examples.of(model, x), opened(base, model)
    name = component or ("z" if axes.heads else "resid_pre")
    _check(axes, name, model)
    require_equal_sizes(model, related, "activations can be grafted between models of equal sizes only.")
    stacks, visits = examples.stacks(stack), Visits.of(axes, name, model.spec)
    prompts = [_Prompts.of(model, related, one.x, direction, audio) for one in stacks]
    visits = visits.at([one.edited.spans for one in prompts], at)
    frame = Frame.of(model, examples, metric)
    frame.shape(*visits.shape)
    grafted = [
        {label: [p for p in positions if p in one.shared] for label, positions in places}
        for one, places in zip(prompts, visits.places, strict=True)
    ]

    def work(stack: Stack, show: Progress) -> None:
        number, asked = stacks.index(stack), frame.own(stack)
        one, trace = prompts[number], record(prompts[number].receiver, prompts[number].edited)
        before = measure_plans(trace, [one.receiver_plan], asked)[0]
        donor = measure(one.giver, one.other, asked, plan=one.giver_plan)
        require_numbers(before, asked.name, run="the run that is grafted into")
        frame.lines[:, stack.rows] = numbers(before), numbers(donor)
        there = [(place, positions) for place, positions in enumerate(grafted[number].values()) if positions]
        shared = {p: one.shared[p] for _, positions in there for p in positions}

        def write(scores: np.ndarray) -> None:
            found = scores.reshape(len(visits.targets), len(there), -1)
            for i, (place, _) in enumerate(there):
                frame.values[stack.rows, :, place] = found[:, i].T

        if shared:
            given = Given.of(one.giver, one.other, name, visits.layers, shared, plan=one.giver_plan)
            edits = (given.edits(target, positions) for target in visits.targets for _, positions in there)
            plans = [one.receiver_plan + Plan(some) for some in edits]
            scored(trace, plans, asked, write, budget_gb=budget_gb)
        show("grafting", 1, 1)

    frame.run(work, stacks, progress)
    return frame.grid(
        visits.labelled,
        direction=f"{direction}: {SIGNS[direction]}",
        method="grafting",
        base=related.name,
        audio=audio,
        component=name,
        over=over,
        at=visits.said(at),
        grafted=grafted[0],
    )


def _check(axes: Axes, name: str, model: Any) -> None:
    if axes.unit in ("pair", "coalition"):
        raise InputError(f"graft takes one place at a time; over={axes.unit!r} is patch's. Name layer, head or group.")
    axes.check(name, model.spec, grouped=())
    if component_named(name).axes[-1] == "key_pos" or name in ("rot_q", "rot_k"):
        raise InterventionError(
            f"{name} means something else in the other model's prompt, whose positions count otherwise: graft q, k, v, "
            "z or the stream."
        )


@dataclass(frozen=True, eq=False)
class _Prompts:
    """One stack of prompts, and the other model's prompts beside them; `shared` are the positions of both."""

    receiver: Any
    edited: AVInputs
    receiver_plan: Plan
    giver: Any
    other: AVInputs
    giver_plan: Plan
    shared: dict[int, int]

    @classmethod
    def of(cls, model: Any, base: Any, x: AVInputs, direction: str, audio: str) -> _Prompts:
        prompt = prompt_for(base, x, audio)
        here, there = (where.tolist() for where in matched(x, prompt, model.config))
        own, its = (model, x, Plan()), (base, prompt, deaf_plan(prompt, audio))
        if direction == "into model":
            return cls(*own, *its, dict(zip(here, there, strict=True)))
        return cls(*its, *own, dict(zip(there, here, strict=True)))
