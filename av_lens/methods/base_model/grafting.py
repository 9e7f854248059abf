"""Grafting and weight change: what differs inside between a model and the one it was made from, and does it matter?

    relative[matrix, layer, head] = |W - W_base| / |W_base|        absolute: |W - W_base|

with |.| the Frobenius norm of one head's slice of Q, K, V (its rows, each with its bias where the model has one) or O
(its columns). Query heads of a group share one slice of K and V. A slice that is zero in the base alone has an infinite
relative change; one that is zero in both, 0. Norms' weights, MLPs and towers are not compared.

    direction="into model"   the audio-visual model is run on its prompt; one place takes the base's values
    direction="into base"    the base is run on its prompt; one place takes the audio-visual model's values

`effects = metric(grafted run) - metric(the run being grafted into)`. What `audio=` makes of the base's prompt stands in
`docs/toolbox.md`; with "masked" distances stay as they are, and "kept" is for a base that takes sound.

Only *shared* positions are grafted; a place of which nothing is shared is NaN. Where the sound is taken out, the shared
text's position ids differ: `q` and `k` are comparable, rotated ones, scores and patterns are not and are refused.

Source: Prakash et al. (2024), who patch across fine-tuned models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core import Progress
from av_lens.core.calls import require_known_layers
from av_lens.errors import InputError, InterventionError, ModelError
from av_lens.families.decoder import component_named
from av_lens.inputs import AVInputs
from av_lens.inputs.pairs import shared_positions, without_sound
from av_lens.interventions import Plan, cut
from av_lens.methods.shared.frame import Examples, Frame, Given, Stack, numbers, scored
from av_lens.methods.shared.places import Axes, Visits
from av_lens.metrics import Metric, measure, require_numbers
from av_lens.model import HookedAVLLM
from av_lens.model.loading import load
from av_lens.replay import measure_plans
from av_lens.replay.traces import record
from av_lens.results import Grid
from av_lens.results.provenance import stamp
from av_lens.spans import ROLES, Span

MATRICES = ("Q", "K", "V", "O")
FIGURES = ("relative", "absolute")
SIGNS = {
    "into model": "the base's values into the model's run; positive: the place as the base has it raises the metric",
    "into base": "the model's values into the base's run; positive: the place as the model has it raises the metric",
}


def opened(base: Any, model: Any) -> Any:
    """Open the base and refuse one whose answers cannot be compared with the model's."""
    found = load(base, device=model.device, dtype=model.dtype) if isinstance(base, str | Path) else base
    own, other = int(model.spec.d_vocab), int(found.spec.d_vocab)
    if own != other:
        raise ModelError(
            f"{model.name} has {own} tokens and {found.name} {other}, so their distributions cannot be "
            "compared. Give the model that this one was made from."
        )
    return found


def require_equal_sizes(model: Any, base: Any, mend: str) -> None:
    """Refuse models whose heads or streams are no counterparts."""
    for name in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head"):
        sizes = int(getattr(model.spec, name)), int(getattr(base.spec, name))
        if sizes[0] != sizes[1]:
            raise ModelError(f"{model.name} has {name} = {sizes[0]} and {base.name} {sizes[1]}: {mend}")


def prompt_for(base: Any, model: Any, x: AVInputs, audio: str) -> AVInputs:
    """Make the base's prompt."""
    require_choice("way with the sound, audio=", audio, ("out", "masked", "kept"))
    if audio != "out":
        return x
    silent = without_sound(base, x)
    shared_positions(x, silent, model.config)
    return silent


def deaf_plan(x: AVInputs, audio: str) -> Plan:
    """Make the plan under which the base runs."""
    readers = "|".join(role for role in ROLES if role != "audio")
    return Plan(cut(readers, "audio")) if audio == "masked" and len(x.spans.audio) else Plan()


def weight_change(model: HookedAVLLM, *, base: Any) -> Grid:
    """Measure how far every head's weights are from the base's.

    Args:
        model: a `HookedAVLLM`.
        base: the model that it was made from, or its name or folder.

    Returns:
        A grid over `[example, matrix, layer, head, figure]`, with a single example: weights see no input.

    Raises:
        ModelError: models of other sizes or of a layout that is not known, or one with folded weights beside one
            without.
    """
    related = opened(base, model)
    require_known_layers(model, "weight_change")
    mend = "no head of the one is a head of the other. Give the model that this one was made from."
    require_equal_sizes(model, related, mend)
    if bool(model.compatibility_mode) != bool(related.compatibility_mode):
        raise ModelError(
            "one of these models has folded weights and the other has not; compare both as they were loaded."
        )
    found = list[Tensor]()
    with torch.no_grad():
        for matrix in MATRICES:
            now, before = (head_slices(one, matrix) for one in (model, related))
            moved, size = (now - before).norm(dim=-1), before.norm(dim=-1)
            found.append(torch.stack([torch.where(moved == 0, 0.0, moved / size), moved], dim=-1).cpu())
    layers, heads = np.arange(model.spec.n_layers), np.arange(model.spec.n_heads)
    return Grid.of(
        torch.stack(found)[None].numpy(),
        axes={"matrix": list(MATRICES), "layer": layers, "head": heads, "figure": list(FIGURES)},
        baseline=[0.0],
        metric="weight change",
        unit="Frobenius norm, or its share of the base's",
        direction="how far each head's weights moved from the base's; 0 where they did not",
        provenance=stamp(
            method="weight change",
            model=model.name,
            base=related.name,
            grouped=f"{model.spec.n_kv_heads} key-value heads; the query heads of a group show its K and V",
        ),
    )


def head_slices(model: Any, matrix: str) -> Float[Tensor, "layer head size"]:
    """Cut a matrix into heads, each laid out flat with its bias, in float64."""
    weights = getattr(model, f"W_{matrix}").double().flatten(2)
    if matrix != "O":
        bias = getattr(model, f"b_{matrix}")
        weights = torch.cat([weights, bias.double().view(*weights.shape[:2], -1)], dim=-1)
    return weights.repeat_interleave(model.spec.n_heads // weights.shape[1], dim=1)


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
        there = {place: positions for place, positions in enumerate(grafted[number].values()) if positions}
        shared = {p: one.shared[p] for positions in there.values() for p in positions}

        def write(scores: np.ndarray) -> None:
            found = scores.reshape(len(visits.targets), len(there), -1)
            frame.values[np.ix_(stack.rows, np.arange(len(found)), np.array(list(there)))] = np.moveaxis(found, -1, 0)

        if shared:
            given = Given.of(one.giver, one.other, name, visits.layers, shared, plan=one.giver_plan)
            edits = (given.edits(target, positions) for target in visits.targets for positions in there.values())
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
        prompt, here = prompt_for(base, model, x, audio), list(range(len(x.spans)))
        there = here
        if x.layout != prompt.layout or x.spans.layout_difference(prompt.spans) is not None:
            here, there = (where.tolist() for where in shared_positions(x, prompt, model.config))
        own, its = (model, x, Plan()), (base, prompt, deaf_plan(prompt, audio))
        if direction == "into model":
            return cls(*own, *its, dict(zip(here, there, strict=True)))
        return cls(*its, *own, dict(zip(there, here, strict=True)))
