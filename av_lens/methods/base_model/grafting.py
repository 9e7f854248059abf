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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core.execution import run
from av_lens.core.progress import Progress, watched
from av_lens.errors import InputError, InterventionError, ModelError
from av_lens.families.hook_names import component_named, hook_name
from av_lens.inputs.model_inputs import AVInputs
from av_lens.interventions import Plan, Site, replace
from av_lens.methods.base_model.related import deaf_plan, matched, opened, prompt_for
from av_lens.methods.shared.examples import Examples
from av_lens.methods.shared.places import Axes, Edited
from av_lens.metrics.finite import require_numbers
from av_lens.metrics.metric import Metric, as_metric
from av_lens.replay.measurement import measure, measure_plans
from av_lens.replay.sweeps import interrupted
from av_lens.replay.traces import record
from av_lens.results.grid import Grid
from av_lens.results.provenance import stamp
from av_lens.spans import Span

SIGNS = {
    "into model": "the base's values into the model's run; positive: the place as the base has it raises the metric",
    "into base": "the model's values into the base's run; positive: the place as the model has it raises the metric",
}
SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head")


def graft(
    model: Any,
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
    _check(axes, name, model, related)
    bound = as_metric(metric, model, examples.inputs)
    dims, targets = axes.targets(model.spec, Site(name, 0).n_heads(model.spec))
    jobs = [
        (rows, _Job.of(model, related, one, direction, audio, name, targets)) for rows, one in examples.stacks(stack)
    ]
    places, labels = axes.cut_alike([job.edited.spans for _, job in jobs], at)
    columns = np.full((2, len(examples)), np.nan)
    values = np.full((len(examples), len(targets), len(labels)), np.nan)
    partial = ""
    with watched(progress) as show:
        try:
            for number, (rows, job) in enumerate(jobs):
                own = bound.chosen(rows.tolist()) if bound.n_answers > 1 else bound
                job.measure(own, rows, places[number], columns, values, budget_gb)
                show("grafting", number + 1, len(jobs))
        except KeyboardInterrupt:
            partial = interrupted(torch.from_numpy(values))
    dims = dims | ({axes.places: labels} if axes.places is not None else {})
    return Grid.of(
        values.reshape(len(values), *map(len, dims.values())),
        axes=dims,
        baseline=columns[0],
        donor=columns[1],
        clusters=examples.clusters,
        metric=bound.name,
        unit=bound.unit,
        direction=f"{direction}: {SIGNS[direction]}",
        provenance=stamp(
            method="grafting", model=model.name, base=related.name, audio=audio, component=name, over=over,
            at=str(at) if at is not None else ("generation" if axes.places is None else "all"),
            grafted=jobs[0][1].grafted(places[0]), partial=partial, questions=examples.questions, **bound.provenance(),
        ),
    )  # fmt: skip


def _check(axes: Axes, name: str, model: Any, base: Any) -> None:
    found = component_named(name)
    if axes.unit in ("pair", "coalition"):
        raise InputError(f"graft takes one place at a time; over={axes.unit!r} is patch's. Name layer, head or group.")
    if axes.heads and found.head_axis is None:
        raise InterventionError(f"{name} has no heads to iterate; write over='layer', or name z, result, q, k or v.")
    if not found.layered:
        raise InterventionError(f"{name} belongs to no layer, so layers of it cannot be iterated.")
    if found.axes[-1] == "key_pos" or name in ("rot_q", "rot_k"):
        raise InterventionError(
            f"{name} means something else in the other model's prompt, whose positions count otherwise: graft q, k, v, "
            "z or the stream."
        )
    for size in SIZES:
        sizes = int(getattr(model.spec, size)), int(getattr(base.spec, size))
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"{model.name} has {size} = {sizes[0]} and {base.name} {sizes[1]}: activations can be grafted between "
                "models of equal sizes only."
            )


@dataclass(frozen=True, eq=False)
class _Job:
    """One stack of prompts, and the other model's prompts beside them."""

    receiver: Any
    giver: Any
    edited: AVInputs
    other: AVInputs
    receiver_plan: Plan
    giver_plan: Plan
    shared: dict[int, int]
    component: str
    targets: list[tuple[Edited, ...]]

    @classmethod
    def of(cls, model: Any, base: Any, x: AVInputs, direction: str, audio: str, name: str, targets: list[Any]) -> _Job:
        prompt = prompt_for(base, x, audio)
        here, there = (where.tolist() for where in matched(x, prompt, model.config))
        sides = [(model, x, Plan(), here), (base, prompt, deaf_plan(prompt, audio), there)]
        (receiver, edited, own, mine), (giver, other, its, theirs) = sides if direction == "into model" else sides[::-1]
        return cls(receiver, giver, edited, other, own, its, dict(zip(mine, theirs, strict=True)), name, targets)

    def grafted(self, places: list[tuple[Any, tuple[int, ...]]]) -> dict[str, list[int]]:
        """The shared positions of every place, as they count in the run that is grafted into."""
        return {str(label): [p for p in positions if p in self.shared] for label, positions in places}

    def measure(
        self,
        metric: Metric,
        rows: np.ndarray,
        places: list[tuple[Any, tuple[int, ...]]],
        columns: np.ndarray,
        values: np.ndarray,
        budget_gb: float | int,
    ) -> None:
        """Write these examples' baseline, donor and grafted runs."""
        trace = record(self.receiver, self.edited)
        before = measure_plans(trace, [self.receiver_plan], metric)[0]
        require_numbers(before, metric.name, run="the run that is grafted into")
        columns[0, rows] = before.double().numpy()
        found = measure(self.giver, self.other, metric, plan=self.giver_plan)
        columns[1, rows] = found.double().cpu().numpy()
        kept = [positions for positions in self.grafted(places).values()]
        there = [number for number, positions in enumerate(kept) if positions]
        plans = list(self._plans([kept[number] for number in there]))
        scores = torch.full((len(plans), len(self.edited)), torch.nan)
        try:
            measure_plans(trace, plans, metric, budget_gb=budget_gb, into=scores)
        finally:
            numbers = scores.double().numpy().reshape(len(self.targets), len(there), -1)
            for place, number in enumerate(there):
                values[rows, :, number] = numbers[:, place].T

    def _given(self, union: list[int]) -> dict[int, Float[Tensor, "..."]]:
        """The other model's values by layer, in the order of the run that is grafted into."""
        layers = sorted({layer for target in self.targets for layer, _ in target})
        wanted = [self.shared[p] for p in union]
        order = np.argsort(np.argsort(wanted)).tolist()
        sites = [Site(self.component, layer, positions=wanted) for layer in layers]
        with torch.no_grad():
            cache = run(self.giver, self.other, plan=self.giver_plan, capture=sites).cache
        return {layer: cache[hook_name(self.component, layer)][:, order] for layer in layers}

    def _plans(self, places: list[list[int]]) -> Iterator[Plan]:
        union = sorted({p for positions in places for p in positions})
        given = self._given(union) if union else {}
        where = {position: row for row, position in enumerate(union)}
        for target in self.targets:
            for positions in places:
                rows = [where[p] for p in positions]
                edits = list(self.receiver_plan)
                for layer, heads in target:
                    value = given[layer][:, rows]
                    value = value if heads is None else value[:, :, list(heads)]
                    edits.append(replace(Site(self.component, layer, heads, positions), value))
                yield Plan(edits)
