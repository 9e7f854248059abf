"""Activation patching: what does the answer become, if one place is as it was in the other run?

    denoise  the corrupt run is edited; values come from the clean run. Positive effects: the place restores.
    noise    the clean run is edited; values come from the corrupt run. Negative effects: the place is needed.

`effects = metric(edited) - metric(the run being edited)`, so patching a run into itself gives 0; `normalized()` is 0 at
the run that was edited and 1 at the donor. The edited run is recorded once and restarted for every place (exact, no
approximation). `over` says which axes are iterated, `at` which positions are edited *together*:

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

Heads and groups can be iterated with span, pos, window and box as well. `component=` names another activation
(`"attn_out"`, `"mlp_out"`, `"v"`, `"pattern"`, ...); k and v have key-value heads. `donor=` puts something else in
place than the pair's other run: "zero", or the mean over the examples of an input of the same layout. To see the two
answers of a difference apart, patch with each metric of `logit_diff("siren", "dog").by_answer()`.

Heads that stand in for one another hide from single patches: pairs show two of them, and the Shapley value of a head is
what it adds on average to the heads before it in a random order, all heads' values summing to the effect of patching
them all. It is estimated over orders and their reverses; "error" is its standard error over them.

Source: Vig et al. (2020), Meng et al. (2022); Zhang and Nanda (2024) on the two directions; Castro et al. (2009) for
sampled Shapley values. Not done: paths (an edit flows on through everything after it).

    >>> grid = patch(model, pair, over="head", at="generation", metric=logit_diff("siren", "dog"))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_lens.core.execution import run
from av_lens.core.layouts import layout_stacks, pairs_of
from av_lens.core.progress import Progress, part_of, watched
from av_lens.errors import InputError, InterventionError, unknown
from av_lens.families.hook_names import COMPONENTS, component_named, hook_name
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair
from av_lens.interventions import Plan, Site, replace
from av_lens.methods.shared.places import Axes, Edited, Head, shapley
from av_lens.metrics.finite import require_numbers
from av_lens.metrics.metric import Metric, as_metric
from av_lens.replay.measurement import measure, measure_plans
from av_lens.replay.sweeps import interrupted, sources
from av_lens.replay.traces import record
from av_lens.results.grid import Grid
from av_lens.results.provenance import linked, stamp
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
    metric: Metric | Callable[..., Any] | None = None,
    direction: str = "denoise",
    component: str | None = None,
    donor: str | AVInputs = "run",
    heads: Sequence[Head] | None = None,
    seed: int = 0,
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
    pairs, axes = pairs_of("patch", pair), Axes.parsed(over)
    if direction not in SIGNS:
        raise InputError(unknown("direction", direction, SIGNS))
    name = component or ("z" if axes.heads else "resid_pre")
    _check_component(name, axes, model.spec)
    bound = as_metric(metric, model, pairs)
    _check_donor(donor, pairs)
    places, labels = axes.cut_alike([one.clean.spans for one in pairs], at)
    dims, targets = axes.targets(model.spec, Site(name, 0).n_heads(model.spec), heads=heads, seed=seed)
    starts = np.cumsum([0, *(len(one) for one in pairs)])
    columns = np.full((2, starts[-1]), np.nan)
    values = np.full((starts[-1], len(targets), len(labels)), np.nan)
    stacks = list(layout_stacks(pairs, stack))
    partial = ""
    with watched(progress) as show:
        try:
            for number, members in enumerate(stacks):
                rows = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in members])
                job = _Job.of(model, [pairs[n] for n in members], direction, donor, name, targets, places[members[0]])
                part = part_of(show, number, len(stacks))
                job.measure(bound.chosen(rows.tolist()), rows, columns, values, part, budget_gb)
        except KeyboardInterrupt:
            partial = interrupted(torch.from_numpy(values))
    if axes.places is not None:
        dims = dims | {axes.places: labels}
    if axes.unit == "coalition":
        values = _shapley_values(values, columns[0], targets, axes.width, (model.spec.n_layers, model.spec.n_heads))
    said = {
        "model": model.name,
        "component": name,
        "donor": donor if isinstance(donor, str) else f"mean over {len(donor)} examples",
        "over": over,
        "seed": seed,
        "at": str(at) if at is not None else ("generation" if axes.places is None else "all"),
        "positions": {str(label): list(positions) for label, positions in places[0]},
        "partial": partial,
    }
    return _gridded(values, columns, dims, pairs, bound, f"{direction}: {SIGNS[direction]}", said)


def _gridded(
    values: np.ndarray,
    columns: np.ndarray,
    dims: dict[str, Any],
    pairs: list[Pair],
    metric: Metric,
    direction: str,
    said: dict[str, Any],
) -> Grid:
    questions = [question for one in pairs for question in one.corrupt.questions]
    return Grid.of(
        values.reshape(len(values), *map(len, dims.values())),
        axes=dims,
        baseline=columns[0],
        donor=columns[1],
        clusters=linked([_sources(one, i) for one in pairs for i in range(len(one))]),
        metric=metric.name,
        unit=metric.unit,
        direction=direction,
        provenance=stamp(method="activation patching", questions=questions, **said, **metric.provenance()),
    )


def _check_component(name: str, axes: Axes, spec: Any) -> None:
    found = component_named(name)
    if axes.heads and found.head_axis is None:
        raise InterventionError(f"{name} has no heads to iterate; write over='layer', or name z, result, q, k or v.")
    if not found.layered:
        raise InterventionError(f"{name} belongs to no layer, so layers of it cannot be iterated.")
    if axes.unit in ("group", "pair", "coalition") and Site(name, 0).n_heads(spec) != spec.n_heads:
        raise InterventionError(f"{name} has key-value heads: write over='head', each is a group's already.")
    if axes.unit == "coalition" and axes.places is not None:
        raise InputError(f"a coalition is patched at one set of positions: name them by at=, not by {axes.places}.")
    hook_name(name, spec.n_layers - 1)


def _check_donor(donor: str | AVInputs, pairs: Sequence[Pair]) -> None:
    if isinstance(donor, str):
        if donor not in ("run", "zero"):
            raise InputError(unknown("donor", donor, ("run", "zero")) + " Or pass inputs, whose mean is taken.")
        return
    for pair in pairs:
        difference = donor.spans.layout_difference(pair.clean.spans)
        if difference is not None:
            raise InputError(f"the donor's layout is not the pair's: {difference}. Encode it with the same options.")


@dataclass(frozen=True, eq=False)
class _Job:
    """One stack of pairs of one layout."""

    model: Any
    edited: AVInputs
    other: AVInputs
    donor: str | AVInputs
    component: str
    targets: list[tuple[Edited, ...]]
    places: list[tuple[Any, tuple[int, ...]]]

    @classmethod
    def of(cls, model: Any, pairs: Sequence[Pair], direction: str, *rest: Any) -> _Job:
        clean, corrupt = (AVInputs.stack([getattr(pair, side) for pair in pairs]) for side in ("clean", "corrupt"))
        return cls(model, *((corrupt, clean) if direction == "denoise" else (clean, corrupt)), *rest)

    def measure(
        self,
        metric: Metric,
        rows: np.ndarray,
        columns: np.ndarray,
        values: np.ndarray,
        show: Progress,
        budget_gb: float | int,
    ) -> None:
        """Write these examples' baseline, donor, and edited runs `[example, target, place]` as they are done."""
        union = sorted({p for _, positions in self.places for p in positions})
        given = self._given(union)
        columns[1, rows] = measure(self.model, self.other, metric).double().cpu().numpy()
        plans = [Plan(), *self._plans(given, union)]
        trace = record(self.model, self.edited)
        if not metric.teacher_forced:
            require_numbers(metric(trace.logits()), metric.name, run="the recorded run")
        stage = str(trace.schedule(plans, budget_gb=budget_gb))
        scores = torch.full((len(plans), len(self.edited)), torch.nan)

        def finished(done: int) -> None:
            show(stage, done, len(plans))

        try:
            measure_plans(trace, plans, metric, budget_gb=budget_gb, finished=finished, into=scores)
        finally:
            found = scores.double().numpy()
            columns[0, rows] = found[0]
            values[rows] = np.moveaxis(found[1:].reshape(len(self.targets), len(self.places), -1), -1, 0)

    def _given(self, union: list[int]) -> dict[int, Tensor]:
        """What is put in place, by layer: `[batch or 1, pos, (head,) d]`."""
        layers = sorted({layer for target in self.targets for layer, _ in target})
        source = self.other if isinstance(self.donor, str) else self.donor
        sites = [Site(self.component, layer, positions=union) for layer in layers]
        with torch.no_grad():
            cache = run(self.model, source, capture=sites).cache
        found: dict[int, Tensor] = {}
        for layer in layers:
            value = cache[hook_name(self.component, layer)]
            value = value.transpose(1, 2) if COMPONENTS[self.component].head_axis == 1 else value
            if self.donor == "zero":
                value = torch.zeros_like(value)
            found[layer] = value if isinstance(self.donor, str) else value.mean(0, keepdim=True)
        return found

    def _plans(self, given: dict[int, Tensor], union: list[int]) -> Iterator[Plan]:
        where = {position: row for row, position in enumerate(union)}
        for target in self.targets:
            for _, positions in self.places:
                edits: list[Any] = []
                for layer, heads in target:
                    chosen = given[layer][:, [where[p] for p in positions]]
                    chosen = chosen if heads is None else chosen[:, :, list(heads)]
                    edits.append(replace(Site(self.component, layer, heads, positions), chosen))
                yield Plan(edits)


def _shapley_values(
    values: np.ndarray, baseline: np.ndarray, targets: Sequence[tuple[Edited, ...]], n: int, shape: tuple[int, int]
) -> np.ndarray:
    """Turn growing sets into Shapley values on the grid's scale, `[example, layer, head, figure]`."""
    size = len(targets) // n
    orders = [_order(targets[i * size : (i + 1) * size]) for i in range(n)]
    sets = values[:, :, 0].reshape(len(values), n, size)
    before = np.concatenate([np.broadcast_to(baseline[:, None, None], (len(values), n, 1)), sets[:, :, :-1]], axis=2)
    found = np.stack([shapley(gains, orders, shape) for gains in sets - before])
    return found + baseline[:, None, None, None]


def _order(sets: Sequence[tuple[Edited, ...]]) -> list[Head]:
    """The order in which growing sets of heads grew."""
    seen: set[Head] = set()
    order: list[Head] = []
    for one in sets:
        (new,) = {(layer, head) for layer, heads in one for head in heads or ()} - seen
        seen.add(new)
        order.append(new)
    return order


def _sources(pair: Pair, i: int) -> list[str]:
    return [*sources(pair.clean, i), *sources(pair.corrupt, i)]
