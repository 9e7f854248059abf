"""Many plans on recorded runs: `values` are the metric under each, `effects` these less the recorded run's metric."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from av_lens.core.budget import Progress, watched
from av_lens.errors import InputError
from av_lens.interventions import Plan
from av_lens.metrics.metric import Metric, as_metric, require_numbers
from av_lens.replay.traces import Trace, measure_plans
from av_lens.results.grid import Grid
from av_lens.results.provenance import linked, stamp

Plans = Sequence[Plan] | Mapping[str, Plan] | Callable[[Trace], Sequence[Plan] | Mapping[str, Plan]]


def sweep(
    trace: Trace | Sequence[Trace],
    plans: Plans,
    metric: Metric | Callable[..., Any],
    *,
    progress: Progress | bool | None = None,
    budget_gb: float | int = 1.0,
) -> Grid:
    """Measure a metric under each of many plans.

    Args:
        trace: a recorded run, or several, of one layout or of different ones; each may hold a stack of examples.
        plans: the plans in order, or by name; or a function of a trace that returns them, where positions differ from
            layout to layout.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.
        budget_gb: memory for the activations of plans that run together.

    Returns:
        A grid over `[example, plan]`, examples in the order of the traces. Interrupted, it holds what is done.

    Raises:
        InputError: a metric that is NaN on a recorded run, no plans, or traces whose plans have
            other names than the first one's.
        InterventionError: a plan does not fit, or an edit did not fire as often as it should have.
    """
    traces = [trace] if isinstance(trace, Trace) else list(trace)
    if not traces:
        raise InputError("sweep needs at least one trace: model.trace(x) records one.")
    model = traces[0].model
    bound = as_metric(metric, model, traces)
    examples = sum(one.batch for one in traces)
    labels, listed = _agreeing([_named(plans(one) if callable(plans) else plans) for one in traces])
    # Every plan is checked before any runs.
    stages = [str(one.schedule(chosen, budget_gb=budget_gb)) for one, chosen in zip(traces, listed, strict=True)]
    scores = torch.full((len(labels) + 1, examples), torch.nan)
    total = (len(labels) + 1) * len(traces)
    stopped = ""
    with watched(progress) as show:
        try:
            ends = np.cumsum([one.batch for one in traces]).tolist()
            for number, (one, chosen, stage) in enumerate(zip(traces, listed, stages, strict=True)):
                rows, before = slice(ends[number] - one.batch, ends[number]), number * (len(labels) + 1)
                asked = bound.chosen(range(rows.start, rows.stop)) if bound.n_answers > 1 else bound
                if not asked.teacher_forced:
                    require_numbers(asked(one.logits()), asked.name, run="the recorded run")
                measure_plans(
                    one,
                    [Plan(), *chosen],
                    asked,
                    budget_gb=budget_gb,
                    finished=lambda done, before=before, stage=stage: show(stage, before + done, total),
                    into=scores[:, rows],
                )
        except KeyboardInterrupt:
            stopped = interrupted(scores)
    found = scores.double().numpy()
    return Grid.of(
        found[1:].T,
        axes={"plan": labels},
        baseline=found[0],
        clusters=linked([media for one in traces for media in one.x.media_hashes]),
        metric=bound.name,
        unit=bound.unit,
        direction="each plan on the recorded run; positive: the plan raises the metric",
        provenance=stamp(method="sweep", model=model.name, partial=stopped, **bound.provenance()),
    )


def interrupted(scores: torch.Tensor) -> str:
    """Say how much of an interrupted sweep is done; where nothing is, let the interruption go on."""
    done = int((~scores.isnan()).sum())
    if not done:
        raise KeyboardInterrupt
    return f"interrupted: {done} of {scores.numel()} numbers measured, the others are NaN"


def _named(plans: Sequence[Plan] | Mapping[str, Plan]) -> tuple[list[Any], list[Plan]]:
    if isinstance(plans, Mapping):
        return list(plans), list(plans.values())
    return list(range(len(plans))), list(plans)


def _agreeing(named: list[tuple[list[Any], list[Plan]]]) -> tuple[list[Any], list[list[Plan]]]:
    labels = named[0][0]
    if not labels:
        raise InputError("sweep needs at least one plan.")
    for number, (others, _) in enumerate(named):
        if others != labels:
            raise InputError(
                f"trace {number} was given the plans {others[:6]}, the first one {labels[:6]}: a grid needs the same "
                "plans for all. Name them alike, in the same order."
            )
    return labels, [chosen for _, chosen in named]
