"""Activation patching: what does the answer become, if one place is as it was in the other run?

`effects = metric(edited) - metric(the run being edited)`; `normalized()` is 0 at the run that was edited and 1 at the
donor. Positive by "denoise": the place restores; negative by "noise": it is needed. `over` says what is iterated:

    over="head" or "layer head"   every head's z                              [example, layer, head]
    over="group"                  the query heads of every key-value head     [example, layer, group]
    over="layer"                  the stream entering every layer             [example, layer]
    over="layers:3"               every window of 3 layers                    [example, layers]
    over="layer span"             at every role's positions in turn           [example, layer, span]
    over="layer pos"              at every position in turn                   [example, layer, pos]
    over="layer window:0.5s"      at the media of every half second in turn   [example, layer, window]
    over="layer box:4x4"          at every box of 4 x 4 picture tokens        [example, layer, box]
    over="pair"                   every two heads together                    [example, pair]
    over="coalition:32"           every head's Shapley value, 32 orders       [example, layer, head, figure]

Heads and groups can be iterated with span, pos, window and box as well; k and v have key-value heads. Shapley values
are estimated over orders and their reverses; "error" is their standard error over them.

Source: Vig et al. (2020), Meng et al. (2022); Zhang and Nanda (2024) on the two directions; Castro et al. (2009) for
sampled Shapley values. Not done: paths (an edit flows on through everything after it).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from av_lens.checks import require_choice
from av_lens.core import Progress
from av_lens.errors import InputError, unknown
from av_lens.inputs import AVInputs, Pair
from av_lens.interventions import Plan
from av_lens.methods.shared.frame import SIGNS, Examples, Frame, Given, Stack, numbers, scored
from av_lens.methods.shared.places import Axes, Head, Visits, positions_of, shapley
from av_lens.metrics import Metric, measure, require_numbers
from av_lens.model import HookedAVLLM
from av_lens.replay.traces import record, require_routing
from av_lens.results import Grid
from av_lens.spans import Span


def patch(
    model: HookedAVLLM,
    pair: Pair | Sequence[Pair],
    *,
    over: str = "head",
    at: str | Span | None = None,
    metric: Metric | Callable[..., Any] | None = None,
    direction: str = "denoise",
    component: str | None = None,
    donor: str | AVInputs = "run",
    heads: Sequence[Head] | None = None,
    seed: int = 0,
    routing: str = "free",
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Grid:
    """Patch every place of one run with the other run's values, one place at a time.

    Args:
        model: a `HookedAVLLM`.
        pair: aligned clean and corrupt inputs, or several pairs of one layout or of different ones.
        over: the axes that are iterated, as the module lists them.
        at: the positions that are edited together: roles joined by `|`, or a `Span`. None means the generation
            position, or all positions where `over` iterates them.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        direction: "denoise" edits the corrupt run, "noise" the clean run.
        component: what is patched; None means z for heads and resid_pre for layers.
        donor: "run" (the pair's other run), "zero", or inputs of the same layout whose mean is put in place.
        heads: (layer, head) pairs of which pairs and coalitions are made; None for all.
        seed: of a coalition's random orders.
        routing: "free", or "frozen" to keep every position's experts as they were in the run that is edited (see
            `Trace.routed`).
        stack: pairs that run together.
        budget_gb: memory for the activations of edits that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid with `values`, `effects`, `baseline` (the edited run) and `donor`, pairs in the order given. Interrupted
        (Ctrl-C), it holds what is done; the rest is NaN, and `grid.partial` says so.

    Raises:
        InputError: an unknown axis, direction or routing, or pairs whose positions cannot share an axis.
        InterventionError: an unknown component, one without heads where heads are iterated, or positions outside.
    """
    axes, examples = Axes.parsed(over), Examples.paired("patch", pair)
    name = component or ("z" if axes.heads else "resid_pre")
    axes.check(name, model.spec)
    if axes.unit == "coalition" and axes.places is not None:
        raise InputError(f"a coalition is patched at one set of positions: name them by at=, not by {axes.places}.")
    _check(model, direction, routing, donor, examples)
    visits = Visits.of(axes, name, model.spec, heads=heads, seed=seed).at(examples.spans, at)
    frame = Frame.of(model, examples, metric)
    frame.shape(*visits.shape)

    def work(stack: Stack, show: Progress) -> None:
        (edited, other), asked, places = stack.ends(direction), frame.own(stack), visits.places[stack.members[0]]
        given = Given.of(model, other if isinstance(donor, str) else donor, name, visits.layers, positions_of(places))
        if donor != "run":  # nothing is put in place, or a mean over examples
            put = (torch.zeros_like(v) if donor == "zero" else v.mean(0, keepdim=True) for v in given.values.values())
            given = replace(given, values=dict(zip(given.values, put, strict=True)))
        frame.lines[1, stack.rows] = numbers(measure(model, other, asked))
        plans = [Plan(), *(Plan(given.edits(target, at)) for target in visits.targets for _, at in places)]
        trace = record(model, edited).routed(routing)
        if not asked.teacher_forced:
            require_numbers(asked(trace.logits()), asked.name, run="the recorded run")

        def write(scores: np.ndarray) -> None:
            frame.lines[0, stack.rows] = scores[0]
            frame.values[stack.rows] = np.moveaxis(scores[1:].reshape(*visits.shape, -1), -1, 0)

        schedule = str(trace.schedule(plans, budget_gb=budget_gb))
        scored(trace, plans, asked, write, budget_gb=budget_gb, show=show, stage=schedule)

    frame.run(work, examples.stacks(stack), progress)
    if axes.unit == "coalition":  # growing sets become Shapley values on the grid's scale
        base, orders = frame.lines[0][:, None, None], visits.orders
        sets = frame.values.reshape(len(base), len(orders), -1)
        gains = np.diff(sets, axis=2, prepend=np.broadcast_to(base, (*sets.shape[:2], 1)))
        frame.values = shapley(gains, orders, (model.spec.n_layers, model.spec.n_heads)) + base[..., None]
    return frame.grid(
        visits.labelled,
        direction=f"{direction}: {SIGNS[direction]}",
        method="activation patching",
        component=name,
        donor=donor if isinstance(donor, str) else f"mean over {len(donor)} examples",
        over=over,
        seed=seed,
        routing=routing,
        at=visits.said(at),
        positions=dict(visits.places[0]),
    )


def _check(model: Any, direction: str, routing: str, donor: str | AVInputs, examples: Examples) -> None:
    require_choice("direction", direction, SIGNS)
    require_routing(model, routing)
    if isinstance(donor, str):
        if donor not in ("run", "zero"):
            raise InputError(unknown("donor", donor, ("run", "zero")) + " Or pass inputs, whose mean is taken.")
        return
    for spans in examples.spans:
        difference = donor.spans.layout_difference(spans)
        if difference is not None:
            raise InputError(f"the donor's layout is not the pair's: {difference}. Encode it with the same options.")
