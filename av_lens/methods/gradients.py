"""Attribution patching: a first guess at every patch from two runs and a gradient, and the best guesses checked.

    atp        (value(donor) - value(base)) . dm/d(value)                                       at the base run
    atp_fixed  queries and keys: z recomputed with the donor's queries or keys, the softmax exact (the QK fix),
               and (z' - z) . dm/dz; other components: as atp
    atp_star   mean over layers d of |atp_fixed with layer d's writes held at the base run's| (GradDrop): a size, never
               negative. Effects of opposite sign through different layers cancel in atp, not in the mean of the drops.
               A node's own layer is left out where it leaves the node no way to the answer.
    exact      the patch itself, for the `top` nodes by atp_star (by |atp_fixed| without `drop`); the others are NaN
    error      atp_fixed - exact

all in the unit of the metric, on the axis `figure` of the grid's *effects*:

    denoise  the corrupt run is the base, the clean run the donor. Positive: the place restores what the metric measures
    noise    the clean run is the base, the corrupt run the donor. Negative: the place is needed for it

The places are those of `patch`, and `exact` equals it. A guess costs one backward pass through the suffix (and one
for each layer with `drop`); it is good where the model is nearly linear between the two runs, bad behind saturated
softmaxes and norms, which `error` shows where it was measured. The query and key fix covers the layer's own softmax
only.

Source: Nanda (2023); AtP*: Kramár et al. (2024, 2403.00745). Not done: answers of several tokens, edits of several
layers at once, and the paper's bound on what was missed (raise `top` instead).

    >>> grid = attribution_patch(model, pair, metric=logit_diff("siren", "dog"))              # doctest: +SKIP
    >>> grid.mean().sel(figure="atp_star"), grid.mean().sel(figure="error")                   # doctest: +SKIP
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
from av_lens.families.hook_names import component_named, hook_name
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair
from av_lens.interventions import Plan, Site, replace
from av_lens.methods.shared.gradient_drops import held_layers
from av_lens.methods.shared.places import Axes, Edited
from av_lens.metrics.finite import require_numbers
from av_lens.metrics.metric import Metric, as_metric
from av_lens.replay.measurement import measure_plans
from av_lens.replay.receivers import require_restart
from av_lens.replay.rereading import read_with
from av_lens.replay.rerun import layer_of
from av_lens.replay.suffix_gradients import SuffixGradients
from av_lens.replay.sweeps import interrupted, sources
from av_lens.replay.traces import Trace, record
from av_lens.results.grid import Grid
from av_lens.results.provenance import linked, stamp
from av_lens.spans import Span

FIGURES = ("atp", "atp_fixed", "atp_star", "exact", "error")
SIGNS = {
    "denoise": "values of the clean run into the corrupt run; positive: the place restores what the metric measures",
    "noise": "values of the corrupt run into the clean run; negative: the place is needed for what the metric measures",
}
SIZES = "atp_star is a size, never negative"
QUERIES, KEYS = ("q", "rot_q"), ("k", "rot_k")
STREAM = ("resid_pre", "resid_mid", "resid_post")
GRADIENT_GB = 8.0


def attribution_patch(
    model: Any,
    pair: Pair | Sequence[Pair],
    *,
    metric: Metric | Callable[..., Any] | None = None,
    over: str = "head",
    at: str | Span | None = None,
    component: str | None = None,
    direction: str = "denoise",
    fix: bool = True,
    drop: bool = True,
    top: int = 16,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Grid:
    """Estimate what patching every place would do, and patch the places with the largest estimates.

    Args:
        model: a `HookedAVLLM`.
        pair: aligned clean and corrupt inputs, or several pairs of one layout or of different ones.
        metric: `logit_diff(...)` and its like of one-token answers, or any callable of logits that has a gradient.
        over: the axes, as in `patch`: "head", "group", "layer", alone or with span, pos, window:0.5s, box:4x4.
        at: the positions that are edited together, as in `patch`.
        component: what is patched; None means z for heads and resid_pre for layers.
        direction: "denoise" edits the corrupt run, "noise" the clean run.
        fix: recompute the softmax for queries and keys.
        drop: drop each layer's gradient in turn; without it atp_star is NaN.
        top: how many places are patched exactly.
        stack: pairs that run together.
        budget_gb: memory for exact edits that run together; the backward pass may take this, or 8 GB.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid `[example, layer, (head, place,) figure]`; interrupted while patching exactly, it keeps what is done.

    Raises:
        InputError: unknown axes or direction, a metric that has no gradient or is NaN, or unlike pairs.
        InterventionError: an unknown component, or positions outside.
    """
    axes = Axes.parsed(over)
    name = component or ("z" if axes.heads else "resid_pre")
    _check(axes, name, direction, top, model.spec)
    pairs = pairs_of("attribution_patch", pair)
    n, bound = sum(map(len, pairs)), as_metric(metric, model, pairs)
    places, labels = axes.cut_alike([one.clean.spans for one in pairs], at)
    dims, targets = axes.targets(model.spec, Site(name, 0).n_heads(model.spec))
    values, columns = np.full((n, len(targets), len(labels), 5), np.nan), np.full((2, n), np.nan)
    stacks = [
        _Stack(*_ends([pairs[i] for i in members], direction), name, targets, places[members[0]], rows, model, bound)
        for members, rows in _numbered(pairs, stack)
    ]
    with watched(progress) as show:
        for number, one in enumerate(stacks):
            found = one.estimated(fix, drop, budget_gb, part_of(show, number, len(stacks)))
            values[one.rows, :, :, :3], columns[:, one.rows] = found
        chosen = _largest(values[..., 2 if drop else 1], drop, top)
        partial = _exactly(stacks, chosen, values, budget_gb, show)
    values[..., 4] = values[..., 1] - values[..., 3]
    dims = dims | ({} if axes.places is None else {axes.places: labels}) | {"figure": list(FIGURES)}
    return Grid.of(
        (values + columns[0][:, None, None, None]).reshape(n, *map(len, dims.values())),
        axes=dims,
        baseline=columns[0],
        donor=columns[1],
        clusters=linked([[*sources(one.clean, i), *sources(one.corrupt, i)] for one in pairs for i in range(len(one))]),
        metric=bound.name,
        unit=bound.unit,
        direction=f"{direction}: {SIGNS[direction]}; {SIZES}",
        provenance=stamp(
            method="attribution patching",
            model=model.name,
            choices={"component": name, "over": over, "fix": fix, "drop": drop, "top": top},
            at=str(at) if at is not None else ("generation" if axes.places is None else "all"),
            positions=dict(places[0]),
            partial=partial,
            questions=[question for one in pairs for question in one.corrupt.questions],
            **bound.provenance(),
        ),
    )


def _check(axes: Axes, name: str, direction: str, top: int, spec: Any) -> None:
    if direction not in SIGNS:
        raise InputError(unknown("direction", direction, SIGNS))
    if top < 0:
        raise InputError(f"top={top}: name how many places are patched exactly, 0 for none.")
    found = component_named(name)
    if axes.unit not in ("layer", "head", "group"):
        raise InputError(
            f"a first guess has no use for {axes.unit}: it adds up. Write over='layer', 'head' or 'group'."
        )
    if axes.heads and found.head_axis is None:
        raise InterventionError(f"{name} has no heads to iterate; write over='layer', or name z, result, q, k or v.")
    if not found.layered or found.axes[-1] == "key_pos":
        raise InterventionError(
            f"{name} cannot be guessed here: name a component of a layer with one vector for each position, such as z, "
            "q, k, v, resid_pre, attn_out or mlp_out."
        )
    if axes.unit == "group" and Site(name, 0).n_heads(spec) != spec.n_heads:
        raise InterventionError(f"{name} has key-value heads: write over='head', each is a group's already.")


def _ends(pairs: Sequence[Pair], direction: str) -> tuple[AVInputs, AVInputs]:
    """The stacked base and donor inputs."""
    clean, corrupt = (AVInputs.stack([getattr(one, side) for one in pairs]) for side in ("clean", "corrupt"))
    return (corrupt, clean) if direction == "denoise" else (clean, corrupt)


def _numbered(pairs: Sequence[Pair], size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Numbers of pairs that run together, and of their examples."""
    starts = np.cumsum([0, *map(len, pairs)])
    for members in layout_stacks(pairs, size):
        yield members, [row for i in members for row in range(int(starts[i]), int(starts[i + 1]))]


def _largest(guesses: np.ndarray, sizes: bool, top: int) -> list[tuple[int, int]]:
    """The (target, place) whose mean guess is largest in size."""
    mean = guesses.mean(0) if sizes else np.abs(guesses.mean(0))
    order = np.argsort(-mean, axis=None, kind="stable")[:top]
    return [(int(i) // mean.shape[1], int(i) % mean.shape[1]) for i in order]


def _exactly(
    stacks: Sequence[_Stack], chosen: list[tuple[int, int]], values: np.ndarray, budget_gb: float | int, show: Progress
) -> str:
    """Fill in the exact effects; say how far it came where it was interrupted."""
    found = torch.full((len(chosen), len(values)), torch.nan)
    said = ""
    try:
        for number, one in enumerate(stacks if chosen else ()):
            one.measured(chosen, found, budget_gb, part_of(show, number, len(stacks)))
    except KeyboardInterrupt:
        said = interrupted(found)
    for number, (target, place) in enumerate(chosen):
        values[:, target, place, 3] = found[number].double().numpy()
    return said


@dataclass(frozen=True, eq=False)
class _Stack:
    """Pairs of one layout that run together."""

    base: AVInputs
    donor: AVInputs
    component: str
    targets: list[tuple[Edited, ...]]
    places: list[tuple[Any, tuple[int, ...]]]
    rows: list[int]
    model: Any
    asked: Metric

    @property
    def metric(self) -> Metric:
        """The metric of these examples."""
        return self.asked.chosen(self.rows)

    @property
    def _union(self) -> list[int]:
        return sorted({position for _, positions in self.places for position in positions})

    @property
    def _layers(self) -> range:
        return range(self.model.spec.n_layers)

    def _given(self) -> tuple[list[Tensor], Tensor]:
        """The donor's activations in every layer `[batch, pos, (head,) d]`, and its metric."""
        sites = [Site(self.component, layer, positions=self._union) for layer in self._layers]
        with torch.no_grad():
            taken = run(self.model, self.donor, capture=sites)
        given = [taken.cache[hook_name(self.component, layer)] for layer in self._layers]
        turned = component_named(self.component).head_axis == 1
        return [value.transpose(1, 2) if turned else value for value in given], self.metric(taken.logits)

    def estimated(self, fix: bool, drop: bool, budget_gb: float | int, show: Progress) -> tuple[np.ndarray, np.ndarray]:
        """The three guesses `[batch, target, place, 3]`, and both runs' metrics `[2, batch]`."""
        given, other = self._given()
        trace = record(self.model, self.base)
        layers, first = self._layers, trace.traits.restart(self._union[0], trace.spans.roles)
        later = list(range(first, len(trace.spans)))
        sites = [Site(self.component, layer, positions=self._union) for layer in layers]
        fixed = fix and self.component in (*QUERIES, *KEYS)
        if fixed:
            require_restart(trace, "recomputing the softmax")
            sites += [Site(part, layer, positions=later) for part in ("z", "rot_q") for layer in layers]
        found: list[SuffixGradients] = []
        plans: list[Plan | None] = [None, *(held_layers(self.model, self.base, later) if drop else ())]
        for plan in plans:
            found.append(trace.gradients(sites, self.metric, plan=plan, budget_gb=max(GRADIENT_GB, budget_gb)))
            require_numbers(found[0].metric, self.metric.name)
            require_numbers(other, self.metric.name, run="the donor run")
            show("gradients", len(found), len(plans))
        plain = self._by_target(self._first_order(given, found))
        best = self._by_target(self._reread(trace, given, found, later)) if fixed else plain
        stars = self._without_own(best[1:].abs()) if drop else torch.full_like(plain[0], torch.nan)
        guesses = torch.stack([plain[0], best[0], stars], dim=-1)
        return guesses.cpu().numpy(), torch.stack([found[0].metric, other]).double().cpu().numpy()

    def _first_order(self, given: list[Tensor], found: Sequence[SuffixGradients]) -> Tensor:
        """Change times gradient, `[gradient, batch, layer, head, place]`; one head where there are none."""
        by_layer: list[Tensor] = []
        for layer in self._layers:
            change = given[layer] - found[0].value[layer]
            products = torch.stack([(change * one.gradient[layer]).sum(-1) for one in found])
            by_layer.append(self._by_place(products if products.ndim == 4 else products[..., None]))
        return torch.stack(by_layer, dim=2)

    def _reread(self, trace: Trace, given: list[Tensor], found: Sequence[SuffixGradients], later: list[int]) -> Tensor:
        """What heads read with the donor's queries or keys, times the gradient there; as `_first_order`."""
        by_layer: list[Tensor] = []
        n, row = len(self._layers), {position: number for number, position in enumerate(later)}
        for layer in self._layers:
            new = given[layer]
            if self.component in ("q", "k"):
                cos, sin = (table.to(new.device)[:, self._union, None] for table in trace.tables)
                new = layer_of(self.model, layer).turned(self.component, new, cos, sin)
            z, queries = found[0].value[n + layer], found[0].value[2 * n + layer]
            gradients = torch.stack([one.gradient[n + layer] for one in found])
            if self.component in QUERIES:
                here = [row[position] for position in self._union]
                change = read_with(trace, layer, self._union, new) - z[:, here]
                by_layer.append(self._by_place((change * gradients[:, :, here]).sum(-1)))
                continue
            where = {position: number for number, position in enumerate(self._union)}
            places: list[Tensor] = []
            for _, positions in self.places:
                keys = new[:, [where[position] for position in positions]]
                change = read_with(trace, layer, later, queries, keys=keys, at=positions) - z
                read = (change * gradients).sum((2, -1))  # [gradient, batch, head]
                places.append(read.unflatten(-1, (keys.shape[2], -1)).sum(-1))
            by_layer.append(torch.stack(places, dim=-1))
        return torch.stack(by_layer, dim=2)

    def _by_place(self, products: Tensor) -> Tensor:
        """Sum over each place's positions: `[gradient, batch, pos, head]` to `[gradient, batch, head, place]`."""
        member = [[float(position in inside) for inside in map(set, self._positions)] for position in self._union]
        return torch.einsum("gbph,pk->gbhk", products.double(), torch.tensor(member).to(products.device).double())

    @property
    def _positions(self) -> list[tuple[int, ...]]:
        return [positions for _, positions in self.places]

    def _by_target(self, guesses: Tensor) -> Tensor:
        """Sum over the heads that are edited together, `[gradient, batch, target, place]`."""
        found = [
            sum((guesses[:, :, layer, slice(None) if heads is None else list(heads)].sum(2) for layer, heads in target))
            for target in self.targets
        ]
        return torch.stack([torch.as_tensor(one) for one in found], dim=2)

    def _without_own(self, sizes: Tensor) -> Tensor:
        """Average over the dropped layers `[dropped, batch, target, place]`, leaving a node's own out."""
        if self.component in STREAM:
            return sizes.mean(0)
        n = len(sizes)
        own = torch.tensor([[float(target[0][0] == layer) for target in self.targets] for layer in range(n)])
        others = (1.0 - own).to(sizes)[:, None, :, None]
        return (sizes * others).sum(0) / max(n - 1, 1)

    def measured(
        self, chosen: Sequence[tuple[int, int]], found: Tensor, budget_gb: float | int, show: Progress
    ) -> None:
        """Patch the chosen (target, place) exactly, writing effects `[chosen, example]` as they are done."""
        given, _ = self._given()
        where = {position: number for number, position in enumerate(self._union)}
        plans = [Plan()]
        for target, place in chosen:
            positions, edits = self._positions[place], []
            for layer, heads in self.targets[target]:
                value = given[layer][:, [where[position] for position in positions]]
                value = value if heads is None else value[:, :, list(heads)]
                edits.append(replace(Site(self.component, layer, heads, positions), value))
            plans.append(Plan(edits))
        trace = record(self.model, self.base)
        stage = f"the largest {len(chosen)} exactly: {trace.schedule(plans, budget_gb=budget_gb)}"
        scores = torch.full((len(plans), len(self.base)), torch.nan)
        try:
            measure_plans(
                trace,
                plans,
                self.metric,
                budget_gb=budget_gb,
                finished=lambda done: show(stage, done, len(plans)),
                into=scores,
            )
        finally:
            found[:, self.rows] = scores[1:] - scores[0]
