"""Activation patching: what does the answer become, if one place is as it was in the other run?

    denoise  the corrupt run is edited; values come from the clean run. Positive effects: the place restores.
    noise    the clean run is edited; values come from the corrupt run. Negative effects: the place is needed.

`effects = metric(edited) - metric(the run being edited)`, so patching a run into itself gives 0; `normalized()` is 0 at
the run that was edited and 1 at the donor. The edited run is recorded once and restarted for every place (exact, no
approximation). `over` says which axes are iterated, `at` which positions are edited *together*:

    over="head" or "layer head"   every head's z                              [example, layer, head]
    over="layer"                  the stream entering every layer             [example, layer]
    over="layer span"             at every role's positions in turn           [example, layer, span]
    over="layer pos"              at every position in turn                   [example, layer, pos]
    over="layer window:0.5s"      at the media of every half second in turn   [example, layer, window]
    over="layer box:4x4"          at every box of 4 x 4 picture tokens in turn   [example, layer, box]

`component=` names another activation (`"attn_out"`, `"mlp_out"`, `"v"`, ...). `"head span"`, `"head pos"`,
`"head window:0.5s"` and `"head box:4x4"` iterate heads as well.

Source: Vig et al. (2020), Meng et al. (2022); Zhang and Nanda (2024) on the two directions. Not done: paths (an edit
flows on through everything after it), edits of several places at once.

    >>> grid = patch(model, pair, over="head", at="generation", metric=logit_diff("siren", "dog"))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_lens.bridge.hook_names import component_named, hook_name
from av_lens.errors import InputError, InterventionError, unknown
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair
from av_lens.interventions import Plan, Site, replace
from av_lens.results.grid import Grid
from av_lens.results.provenance import linked, stamp
from av_lens.runs.execution import run
from av_lens.runs.measurement import measure, measure_plans
from av_lens.runs.metrics import Metric, as_metric
from av_lens.runs.places import Axes, layout_stacks
from av_lens.runs.progress import Progress, watched
from av_lens.runs.sweeps import interrupted, sources
from av_lens.runs.traces import record
from av_lens.spans import Span

SIGNS = {
    "denoise": "values of the clean run into the corrupt run; positive: the place restores what the metric measures",
    "noise": "values of the corrupt run into the clean run; negative: the place is needed for what the metric measures",
}


def patch(
    model: Any,
    pair: Pair | Sequence[Pair],
    *,
    over: str = "head",
    at: str | Span | None = None,
    metric: Metric | Callable[..., Any],
    direction: str = "denoise",
    component: str | None = None,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Grid:
    """Patch every place of one run with the other run's values, one place at a time.

    Args:
        model: a `HookedAVLLM`.
        pair: aligned clean and corrupt inputs, or several pairs of one layout or of different ones.
        over: the axes that are iterated, such as "head", "layer", "layer span", "layer pos", "layer window:0.5s",
            "layer box:4x4".
        at: the positions that are edited together: roles joined by `|`, or a `Span`. None means the generation
            position, or all positions where `over` iterates them.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        direction: "denoise" edits the corrupt run, "noise" the clean run.
        component: what is patched; None means z for heads and resid_pre for layers.
        stack: pairs that run together.
        budget_gb: memory for the activations of edits that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid with `values`, `effects`, `baseline` (the edited run) and `donor`, pairs in the order given. Interrupted
        (Ctrl-C), it holds what is done; the rest is NaN, and `grid.partial` says so.

    Raises:
        InputError: an unknown axis or direction, or pairs whose positions cannot share an axis.
        InterventionError: an unknown component, one without heads where heads are iterated, or positions outside.
    """
    axes = Axes.parsed(over)
    if direction not in SIGNS:
        raise InputError(unknown("direction", direction, SIGNS))
    name = component or ("z" if axes.heads else "resid_pre")
    _check_component(name, axes, model.spec)
    pairs, bound = _checked(pair, as_metric(metric, model.tokenizer))
    places, labels = axes.cut_alike([one.clean.spans for one in pairs], at)
    starts = np.cumsum([0, *(len(one) for one in pairs)])
    columns = np.full((2, starts[-1]), np.nan)
    n_heads = Site(name, 0).n_heads(model.spec) if axes.heads else 1
    values = np.full((starts[-1], model.spec.n_layers, n_heads, len(labels)), np.nan)
    stacks = list(layout_stacks(pairs, stack))
    partial = ""
    with watched(progress) as show:
        try:
            for number, members in enumerate(stacks):
                rows = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in members])
                job = _Job.of(model, [pairs[n] for n in members], direction, name, axes, places[members[0]], budget_gb)
                job.measure(bound.chosen(rows.tolist()), rows, columns, values, _part(show, number, len(stacks)))
        except KeyboardInterrupt:
            partial = interrupted(torch.from_numpy(values))
    shape, labelled = axes.labelled(n_heads, labels, model.spec.n_layers)
    return Grid.of(
        values.reshape(len(values), *shape),
        axes=labelled,
        baseline=columns[0],
        donor=columns[1],
        clusters=linked([_sources(one, i) for one in pairs for i in range(len(one))]),
        metric=bound.name,
        unit=bound.unit,
        direction=f"{direction}: {SIGNS[direction]}",
        provenance=stamp(
            method="activation patching",
            model=model.name,
            component=name,
            over=over,
            at=str(at) if at is not None else ("generation" if axes.places is None else "all"),
            positions={str(label): list(positions) for label, positions in places[0]},
            partial=partial,
            questions=[question for one in pairs for question in one.corrupt.questions],
            **bound.provenance(),
        ),
    )


def _checked(pair: Pair | Sequence[Pair], metric: Metric) -> tuple[list[Pair], Metric]:
    pairs = [pair] if isinstance(pair, Pair) else list(pair)
    if not pairs:
        raise InputError("patch needs at least one pair.")
    if metric.n_answers > 1 and metric.n_answers != sum(len(one) for one in pairs):
        raise InputError(f"{metric.name} names {metric.n_answers} answers for {sum(map(len, pairs))} examples.")
    return pairs, metric


def _check_component(name: str, axes: Axes, spec: Any) -> None:
    found = component_named(name)
    if axes.heads and found.head_axis is None:
        raise InterventionError(f"{name} has no heads to iterate; write over='layer', or name z, result, q, k or v.")
    if not found.layered:
        raise InterventionError(f"{name} belongs to no layer, so layers of it cannot be iterated.")
    if found.axes[-1] == "key_pos":
        raise InterventionError(f"{name} is a matrix of queries and keys; patch z, or cut edges with a Plan.")
    hook_name(name, spec.n_layers - 1)


def _part(show: Progress, number: int, parts: int) -> Progress:
    """Progress of one stack as progress of all."""
    return lambda stage, done, total: show(stage, number * total + done, parts * total)


@dataclass(frozen=True, eq=False)
class _Job:
    """One stack of pairs of one layout."""

    model: Any
    edited: AVInputs
    donor: AVInputs
    component: str
    axes: Axes
    places: list[tuple[Any, tuple[int, ...]]]
    budget_gb: float | int

    @classmethod
    def of(cls, model: Any, pairs: Sequence[Pair], direction: str, *rest: Any) -> _Job:
        clean, corrupt = (AVInputs.stack([getattr(pair, side) for pair in pairs]) for side in ("clean", "corrupt"))
        return cls(model, *((corrupt, clean) if direction == "denoise" else (clean, corrupt)), *rest)

    def measure(
        self, metric: Metric, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, show: Progress
    ) -> None:
        """Write these examples' baseline, donor, and edited runs `[example, layer, head, place]` as they are done."""
        layers = range(self.model.spec.n_layers)
        union = sorted({p for _, positions in self.places for p in positions})
        sites = [Site(self.component, layer, positions=union) for layer in layers]
        with torch.no_grad():
            taken = run(self.model, self.donor, capture=sites)
        given = [taken.cache[hook_name(self.component, layer)] for layer in layers]
        other = measure(self.model, self.donor, metric) if metric.teacher_forced else metric(taken.logits)
        columns[1, rows] = other.double().cpu().numpy()
        plans = [Plan(), *self._plans(given, union)]
        trace = record(self.model, self.edited)
        stage = str(trace.schedule(plans, budget_gb=self.budget_gb))
        scores = torch.full((len(plans), len(self.edited)), torch.nan)

        def finished(done: int) -> None:
            show(stage, done, len(plans))

        try:
            measure_plans(trace, plans, metric, budget_gb=self.budget_gb, finished=finished, into=scores)
        finally:
            found = scores.double().numpy()
            columns[0, rows] = found[0]
            n_heads = given[0].shape[2] if self.axes.heads else 1
            edited = found[1:].reshape(len(given), n_heads, len(self.places), -1)
            values[rows] = np.moveaxis(edited, -1, 0)

    def _plans(self, given: list[Tensor], union: list[int]) -> Iterator[Plan]:
        where = {position: row for row, position in enumerate(union)}
        for layer, values in enumerate(given):
            for head in range(values.shape[2]) if self.axes.heads else (None,):
                for _, positions in self.places:
                    chosen = values[:, [where[p] for p in positions]]
                    chosen = chosen if head is None else chosen[:, :, head]
                    yield Plan(replace(Site(self.component, layer, head, positions), chosen))


def _sources(pair: Pair, i: int) -> list[str]:
    return [*sources(pair.clean, i), *sources(pair.corrupt, i)]
