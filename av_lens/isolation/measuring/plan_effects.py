"""What does an edit of a recorded run do to hearing? Any plan, measured by replay, mirrored, conflict by conflict.

    effect on C  = (change of M in va - change of M in av) / 2           base "va"
    effect on G  = (change of M in blank_a - change of M in blank_v) / 2  base "blank_a"

Positive: the model hears more. Plans are of any kind (heads' outputs, attention edges).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float

from av_lens.interventions import Plan
from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.effects import mirrored
from av_lens.metrics.forms import each
from av_lens.metrics.metric import Metric, as_metric, logit_diff
from av_lens.replay.traces import Trace, measure_plans


def trace_of(chunk: Chunk, cell: str, question: str = "ask") -> Trace:
    """Give a cell's recorded run, kept with its recording."""
    return chunk.bench.engine.trace(chunk.run(cell, question))


def margin_metric(chunk: Chunk) -> Metric:
    """Write M as a metric of a stack: score(sound's answer) - score(picture's), each conflict's own."""
    answers = [chunk.bench.conflicts[int(i)].answers for i in chunk.examples]
    sides = (each([pair[side] for pair in answers]) for side in (0, 1))
    return as_metric(logit_diff(*sides), chunk.bench.engine.model)


def effects_of_plans(
    chunk: Chunk, base: str, plans: Callable[[str], Sequence[Plan | None]]
) -> Float[np.ndarray, "batch plan"]:
    """Measure plans, made for a cell, in the cell and in its mirror: effects on C or G; NaN where there is no plan."""
    metric = margin_metric(chunk)

    def changes(cell: str) -> np.ndarray:
        given = plans(cell)
        made = [Plan(), *(plan for plan in given if plan is not None)]
        scores = measure_plans(trace_of(chunk, cell), made, metric).double().numpy()
        return _placed(given, scores[1:] - scores[0])

    return mirrored(base, changes).T


def _placed(plans: Sequence[Plan | None], found: Float[np.ndarray, "made batch"]) -> Float[np.ndarray, "plan batch"]:
    """Lay what the plans that there are gave out over all; NaN where there is none."""
    out = np.full((len(plans), found.shape[1]), np.nan)
    out[[number for number, plan in enumerate(plans) if plan is not None]] = found
    return out


def says_sound(chunk: Chunk, plans: Sequence[Plan | None]) -> Float[np.ndarray, "batch plan"]:
    """Say under which plans the likeliest token of the whole vocabulary begins the sound's answer, in `va`."""
    made, (ids, _) = [plan for plan in plans if plan is not None], margin_metric(chunk).ids or ((), ())
    owner = [{int(token) for token in row[:, 0] if token >= 0} for row in ids]

    def right(logits: torch.Tensor) -> torch.Tensor:
        top = logits[:, -1].argmax(-1).tolist()
        said = [float(token in mine) for token, mine in zip(top, owner, strict=True)]
        return torch.tensor(said, device=logits.device)

    none = np.zeros((0, len(owner)))
    return _placed(plans, trace_of(chunk, "va").score(made, right).double().numpy() if made else none).T
