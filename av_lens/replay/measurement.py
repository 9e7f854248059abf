"""Measure a metric on an input, with a plan or without: however many forwards the answer needs.

An answer of one token is read from the prompt's own logits. An answer of several tokens is run after the prompt
(teacher forcing), once for each option; edits of the plan act on the prompt's positions as always, and on the answer's
where they name the role `generated`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.execution import logits_of
from av_lens.interventions import Plan
from av_lens.metrics.forms import followed
from av_lens.metrics.metric import Metric, as_metric
from av_lens.replay.traces import Trace, record

BLOCK = 256  # plans that are measured together where an answer has several tokens


def measure(
    model: Any, x: Any, metric: Metric | Callable[..., Any], *, plan: Plan | None = None
) -> Float[Tensor, " batch"]:
    """Measure a metric on every example of an input.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, one example or a stack.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        plan: edits to be made.

    Returns:
        One number for each example.

    Raises:
        InputError: answers that cannot be told apart, or a metric that returns one number for the batch.
        InterventionError: the plan does not fit, or an edit did not fire.
    """
    bound = as_metric(metric, model, x)

    def logits(inputs: Any, rows: list[int]) -> Tensor:
        compiled = (plan or Plan()).compile(model.spec, inputs.spans, batch=len(inputs))
        with torch.no_grad():
            found = logits_of(model, inputs, compiled.fwd_hooks, torch.tensor(rows))
        compiled.verify()
        return found

    asked = x.spans.generation_position
    reduced = [
        bound.reduce(i, logits(followed(x, tokens), list(range(asked, asked + tokens.shape[1]))))
        for i, tokens in enumerate(bound.continuations(len(x)))
    ]
    return bound.combine(reduced) if reduced else bound(logits(x, [asked]))


def measure_plans(
    trace: Trace,
    plans: Sequence[Plan],
    metric: Metric | Callable[..., Any],
    *,
    budget_gb: float | int = 1.0,
    finished: Callable[[int], None] | None = None,
    into: Float[Tensor, "plan batch"] | None = None,
) -> Float[Tensor, "plan batch"]:
    """Measure a metric under each of many plans, by replay."""
    model, x = trace.model, trace.x
    bound = as_metric(metric, model, trace)
    continuations = bound.continuations(len(x))
    if not continuations:
        return trace.score(plans, bound, budget_gb=budget_gb, finished=finished, into=into)
    found = torch.full((len(plans), len(x)), torch.nan) if into is None else into
    asked = x.spans.generation_position
    longer = [trace if t.shape[1] == 1 else record(model, followed(x, t)) for t in continuations]
    ends = [asked + tokens.shape[1] for tokens in continuations]
    for start in range(0, len(plans), BLOCK):  # all options of a block's plans, so that it is wholly done or not at all
        block = plans[start : start + BLOCK]
        reduced = [
            one.score(block, _reducing(bound, i), logits_at=one.spans.span(range(asked, end)), budget_gb=budget_gb)
            for i, (one, end) in enumerate(zip(longer, ends, strict=True))
        ]
        for number, row in enumerate(zip(*reduced, strict=True), start):
            found[number] = bound.combine(list(row)).to(found)
        if finished is not None:
            finished(start + len(block))
    return found


def _reducing(metric: Metric, number: int) -> Callable[[Tensor], Tensor]:
    return lambda logits: metric.reduce(number, logits)
