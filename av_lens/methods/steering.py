"""Steering and repair: how far does the answer move, as a push on some sites grows, and how far does a random push go?

    add     activation + s x value                       (0: nothing; 1: the plan as written)
    scale   activation x [1 + s x (amount - 1)]          (0: nothing; 1: the plan as written; zero is a scale to 0)

    effects[example, arm, strength] = metric(pushed run) - metric(run)

The arms "random 1", ... are controls: the same edits on other heads, as many, each from a layer at most one away; or
the same added vectors with their direction drawn anew at equal norm. What has neither heads nor a vector, or a factor
of its own for each head, has no control: NaN.

Source: Turner et al. (2023) and Rimsky et al. (2024) for added differences of means; Li et al. (2023) on heads. Not
done: searching for the heads (`isolate` does), optimised vectors, steering that turns off after some tokens.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace as changed
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_lens.core import Progress, run
from av_lens.errors import InputError, InterventionError
from av_lens.families.decoder import hook_name
from av_lens.inputs import Pair
from av_lens.interventions import Edit, Plan, Site, add, scale
from av_lens.methods.shared.frame import Examples, Frame, Stack, scored
from av_lens.metrics import Metric, require_numbers
from av_lens.model import HookedAVLLM
from av_lens.replay import measure_plans
from av_lens.replay.traces import record
from av_lens.results import Grid


def steer(
    model: HookedAVLLM,
    x: Any,
    *,
    plan: Plan | str | Path,
    metric: Metric | Callable[..., Any],
    strengths: Sequence[float | int] = (0.0, 0.5, 1.0, 2.0),
    n_random: int = 3,
    seed: int = 0,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Grid:
    """Measure a metric as a push grows, beside random pushes of equal size.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs` (one example or a stack), a `Conflict` (its cell va), or several of either.
        plan: the push, or the file of a saved one: edits that add, scale or zero.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        strengths: multiples of the push; 0 leaves the run as it is, 1 is the plan as written.
        n_random: how many random pushes.
        seed: draws them.
        stack: examples that run together.
        budget_gb: memory for the activations of plans that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid over `[example, arm, strength]`, its baseline the run without a push. Interrupted, it holds what is done.

    Raises:
        InputError: nothing given, strengths that are not finite numbers, or a metric that is NaN without a push.
        InterventionError: the plan is empty, holds an edit without a strength, or does not fit.
    """
    examples = Examples.of(model, x)
    if not len(strengths) or not np.isfinite(list(strengths)).all():
        raise InputError(f"steer needs strengths, finite numbers such as (0, 0.5, 1, 2); got {strengths!r}.")
    push = plan if isinstance(plan, Plan) else Plan.load(plan, model=model)
    arms = {"plan": push} | {f"random {i + 1}": random_push(model, push, seed=seed, draw=i) for i in range(n_random)}
    plans = [Plan()] + [Plan() if arm is None else strengthened(arm, s) for arm in arms.values() for s in strengths]
    for one in examples.inputs:
        for each in plans:
            each.compile(model.spec, one.spans, batch=len(one))
    frame = Frame.of(model, examples, metric)
    frame.shape(len(arms), len(strengths))

    def work(stack: Stack, _: Progress) -> None:
        asked, trace = frame.own(stack), record(model, stack.x)
        require_numbers(measure_plans(trace, plans[:1], asked)[0], asked.name, run="the run without a push")

        def write(scores: np.ndarray) -> None:
            frame.lines[0, stack.rows] = scores[0]
            frame.values[stack.rows] = scores[1:].T.reshape(-1, len(arms), len(strengths))

        scored(trace, plans, asked, write, budget_gb=budget_gb)

    frame.run(work, examples.stacks(stack), progress, stage="steering")
    frame.values[:, [arm is None for arm in arms.values()]] = np.nan
    return frame.grid(
        {"arm": list(arms), "strength": [float(s) for s in strengths]},
        direction="metric under the push minus metric without; positive: the push raises the metric",
        method="steering",
        plan=[_said(edit) for edit in push],
        controls={name: None if arm is None else [_said(edit) for edit in arm] for name, arm in arms.items()},
        seed=seed,
    )


def reweighed(heads: Mapping[str | tuple[int, int], float | int], *, at: Any = "suffix", component: str = "z") -> Plan:
    """Make a plan that scales heads.

    Args:
        heads: factor of each head, named "L4H2" or (4, 2); 0 silences it, 1 leaves it as it is.
        at: positions: role names joined by `|`, a `Span`, or None for all, decoding included.
        component: what is scaled, such as "z"; one with a head axis.

    Returns:
        The plan, heads of one layer and factor in one edit.

    Raises:
        InputError: no head, or a name that is none.
    """
    grouped: dict[tuple[int, float], list[int]] = {}
    for name, factor in heads.items():
        layer, head = head_named(name) if isinstance(name, str) else name
        grouped.setdefault((int(layer), float(factor)), []).append(int(head))
    if not grouped:
        raise InputError("reweighed needs at least one head, such as {'L4H2': 0.0}.")
    return Plan([scale(Site(component, layer, tuple(sorted(found)), at), f) for (layer, f), found in grouped.items()])


def head_named(name: str) -> tuple[int, int]:
    """Read a head's name."""
    found = re.fullmatch(r"L(\d+)H(\d+)", name.strip().replace(" ", ""))
    if found is None:
        raise InputError(f"{name!r} names no head; write layer and head, such as 'L4H2'.")
    return int(found[1]), int(found[2])


def mean_difference(
    model: HookedAVLLM,
    pair: Pair | Sequence[Pair],
    *,
    layer: int,
    component: str = "resid_pre",
    at: Any = "generation",
    head: int | None = None,
) -> Plan:
    """Make a plan that adds the mean difference of two runs, clean minus corrupt.

    Args:
        model: a `HookedAVLLM`.
        pair: aligned inputs, or several pairs; the difference is averaged over pairs and positions.
        layer: where it is read and added.
        component: what is read and written, such as "resid_pre", or "z" with a head.
        at: positions: role names joined by `|`, or None for all.
        head: one head of a component that has heads.

    Returns:
        The plan: one vector, added alike at each of the positions.

    Raises:
        InputError: no pair.
        InterventionError: a layer, head or component that the model does not have.
    """
    pairs = Examples.paired("mean_difference", pair).pairs
    site = Site(component, layer, head, at)
    site.check(model.spec)
    if site.is_edges or (site.has_heads and head is None):
        raise InterventionError(f"mean_difference adds one vector; {component} needs a head, or is not one.")
    name = hook_name(component, layer)
    with torch.no_grad():
        kept = [[run(model, x, capture=site).cache[name] for x in (one.clean, one.corrupt)] for one in pairs]
    found = [(clean - corrupt).double().flatten(1, -2).mean(1) for clean, corrupt in kept]
    return Plan(add(site, torch.cat(found).mean(0).float()[None, None]))


def strengthened(plan: Plan, strength: float | int) -> Plan:
    """Make a push weaker or stronger."""
    s = float(strength)
    return Plan(
        [
            changed(edit, value=s * edit.value)
            if edit.kind == "add" and edit.value is not None
            else scale(edit.site, 1.0 + s * (edit.amount - 1.0))
            for edit in _pushes(plan)
        ]
    )


def random_push(model: Any, plan: Plan, *, seed: int, draw: int = 0) -> Plan | None:
    """Draw a push of equal size: other heads of the same or the next layers, or other directions of the same norm."""
    rng = np.random.default_rng([seed, draw])
    pushes = list(_pushes(plan))
    taken = {(e.site.component, e.site.layer, h) for e in pushes for h in e.site.heads or ()}
    found: list[Edit] = []
    for edit in pushes:
        alike = not isinstance(edit.amount, Tensor) or edit.amount.numel() == 1
        if edit.site.heads is not None and edit.kind != "add" and alike:
            others = _elsewhere(edit, model.spec, taken, rng)
            if not others:
                return None
            found += others
        elif edit.kind == "add" and edit.value is not None:
            drawn = torch.from_numpy(rng.standard_normal(tuple(edit.value.shape))).to(edit.value)
            norm = edit.value.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
            found.append(changed(edit, value=drawn * norm))
        else:
            return None
    return Plan(found)


def _pushes(plan: Plan) -> Iterator[Edit]:
    if not len(plan):
        raise InterventionError("the plan is empty: it has nothing to make stronger. Name heads to reweigh.")
    for number, edit in enumerate(plan):
        kind = edit.kind if isinstance(edit, Edit) else "cut"
        if not isinstance(edit, Edit) or kind not in ("add", "scale", "zero"):
            raise InterventionError(
                f"edit {number} of the plan is a {kind}, which has no strength: a push adds, scales or zeroes. Measure "
                "this plan as it is with sweep."
            )
        yield edit


def _elsewhere(edit: Edit, spec: Any, taken: set[Any], rng: np.random.Generator) -> list[Edit]:
    """The same edit on other heads, one for each of its own, drawn from layers at most one away while these last."""
    site = edit.site
    assert site.heads is not None
    assert site.layer is not None
    drawn: dict[int, list[int]] = {}
    for _ in site.heads:
        everything = product(range(spec.n_layers), range(site.n_heads(spec)))
        free = [head for head in everything if (site.component, *head) not in taken]
        if not free:
            return []
        reach = max(1, min(abs(at - site.layer) for at, _ in free))
        near = [(at, h) for at, h in free if abs(at - site.layer) <= reach]
        layer, head = near[int(rng.integers(len(near)))]
        taken.add((site.component, layer, head))
        drawn.setdefault(layer, []).append(head)
    return [changed(edit, site=changed(site, layer=at, head=tuple(sorted(h)))) for at, h in sorted(drawn.items())]


def _said(edit: Any) -> str:
    where = f"{edit.site.component} layer {edit.site.layer} head {edit.site.head} at {edit.site.positions}"
    if edit.kind == "add":
        return f"add a vector of norm {float(edit.value.norm(dim=-1).mean()):.4g} to {where}"
    return f"scale {where} by {edit.amount if isinstance(edit.amount, float) else 'a tensor'}"
