"""Attribution patching: a first guess at every patch from two runs and a gradient, and the best guesses checked.

    atp        (value(donor) - value(base)) . dm/d(value)                                       at the base run
    atp_fixed  queries and keys: z recomputed with the donor's queries or keys, the softmax exact (the QK fix),
               and (z' - z) . dm/dz; other components: as atp
    atp_star   mean over layers d of |atp_fixed with layer d's writes held at the base run's| (GradDrop): a size, never
               negative. A node's own layer is left out where it leaves the node no way to the answer.
    exact      the patch itself, for the `top` nodes by atp_star (by |atp_fixed| without `drop`); the others are NaN
    error      atp_fixed - exact

A guess costs one backward pass through the suffix (and one for each layer with `drop`); the fix covers the layer's own
softmax only. Signs are those of `patch`.

Source: Nanda (2023); AtP*: Kramár et al. (2024, 2403.00745). Not done: edits of several layers at once, the paper's
bound on what was missed (raise `top` instead), and, for answers of several tokens, `drop` and the fix of keys: the
answer's own positions read the prompt too, and neither reaches them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core import Progress, watched
from av_lens.core.calls import require_known_layers
from av_lens.errors import InputError, InterventionError
from av_lens.families.decoder import component_named
from av_lens.inputs import AVInputs, Pair
from av_lens.interventions import Plan, Site
from av_lens.methods.shared.frame import SIGNS, Examples, Frame, Given, Stack, held_layers, numbers, scored
from av_lens.methods.shared.places import Axes, Place, Visits, positions_of
from av_lens.metrics import Metric, measure, require_numbers
from av_lens.model import HookedAVLLM
from av_lens.replay.held import require_restart
from av_lens.replay.rerun import layer_of
from av_lens.replay.stacks import read_with
from av_lens.replay.suffix_gradients import SuffixGradients
from av_lens.replay.traces import Trace, record
from av_lens.results import Grid
from av_lens.spans import Span

FIGURES = ("atp", "atp_fixed", "atp_star", "exact", "error")
QUERIES, KEYS = ("q", "rot_q"), ("k", "rot_k")
GRADIENT_GB = 8.0


def attribution_patch(
    model: HookedAVLLM,
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
        metric: `logit_diff(...)` and its like, or any callable of logits that has a gradient.
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
        ModelError: a fix of queries or keys in layers whose layout is not known: give fix=False.
    """
    axes, examples = Axes.parsed(over), Examples.paired("attribution_patch", pair)
    name = component or ("z" if axes.heads else "resid_pre")
    require_choice("direction", direction, SIGNS)
    if top < 0:
        raise InputError(f"top={top}: name how many places are patched exactly, 0 for none.")
    _check(axes, name, model.spec)
    if fix and name in (*QUERIES, *KEYS):
        require_known_layers(model, "fix=True")
    visits = Visits.of(axes, name, model.spec).at(examples.spans, at)
    frame = Frame.of(model, examples, metric)
    frame.shape(*visits.shape, len(FIGURES))
    stacks = examples.stacks(stack)
    guesses = [_Guesses(model, visits, visits.places[one.members[0]], frame.own(one)) for one in stacks]

    def guess(stack: Stack, show: Progress) -> None:
        made = guesses[stacks.index(stack)].made(*stack.ends(direction), fix, drop, budget_gb, show)
        frame.values[stack.rows, :, :, :3], frame.lines[:, stack.rows] = made

    def exactly(stack: Stack, show: Progress) -> None:
        one, (edited, donor) = guesses[stacks.index(stack)], stack.ends(direction)
        given = Given.of(model, donor, name, visits.layers, one.union)
        plans = [Plan(), *(Plan(given.edits(visits.targets[t], one.places[p][1])) for t, p in chosen)]
        trace = record(model, edited)

        def write(scores: np.ndarray) -> None:
            single = scores.astype(np.float32)
            frame.values[stack.rows] = (single[1:] - single[0]).T

        stage = f"the largest {len(chosen)} exactly: {trace.schedule(plans, budget_gb=budget_gb)}"
        scored(trace, plans, one.metric, write, budget_gb=budget_gb, show=show, stage=stage)

    with watched(progress) as show:
        frame.run(guess, stacks, show, whole=True)
        guessed = frame.values
        chosen = _largest(guessed[..., 2 if drop else 1], drop, top)
        frame.shape(len(chosen))
        frame.run(exactly, stacks if chosen else (), show)
    guessed[..., 3][:, *np.array(chosen, dtype=int).reshape(-1, 2).T] = frame.values
    guessed[..., 4] = guessed[..., 1] - guessed[..., 3]
    frame.values = guessed + frame.lines[0][:, None, None, None]
    return frame.grid(
        visits.labelled | {"figure": list(FIGURES)},
        direction=f"{direction}: {SIGNS[direction]}; atp_star is a size, never negative",
        method="attribution patching",
        choices={"component": name, "over": over, "fix": fix, "drop": drop, "top": top},
        at=visits.said(at),
        positions=dict(visits.places[0]),
    )


def _check(axes: Axes, name: str, spec: Any) -> None:
    if axes.unit not in ("layer", "head", "group"):
        raise InputError(
            f"a first guess has no use for {axes.unit}: it adds up. Write over='layer', 'head' or 'group'."
        )
    found = component_named(name)
    if not found.layered or found.axes[-1] == "key_pos":
        raise InterventionError(
            f"{name} cannot be guessed here: name a component of a layer with one vector for each position, such as z, "
            "q, k, v, resid_pre, attn_out or mlp_out."
        )
    axes.check(name, spec)


def _largest(guesses: np.ndarray, sizes: bool, top: int) -> list[tuple[int, int]]:
    """The (target, place) whose mean guess is largest in size."""
    mean = guesses.mean(0) if sizes else np.abs(guesses.mean(0))
    order = np.argsort(-mean, axis=None, kind="stable")[:top]
    return [divmod(int(i), mean.shape[1]) for i in order]


@dataclass(frozen=True, eq=False)
class _Guesses:
    """The guesses for pairs of one layout that run together."""

    model: Any
    visits: Visits
    places: list[Place]
    metric: Metric

    @property
    def union(self) -> list[int]:
        """Every position that is patched."""
        return positions_of(self.places)

    def made(
        self, base: AVInputs, donor: AVInputs, fix: bool, drop: bool, budget_gb: float | int, show: Progress
    ) -> tuple[np.ndarray, np.ndarray]:
        """The three guesses `[batch, target, place, 3]`, and both runs' metrics `[2, batch]`."""
        given = Given.of(self.model, donor, self.visits.component, self.visits.layers, self.union)
        fixed = fix and self.visits.component in (*QUERIES, *KEYS)
        if self.metric.teacher_forced:
            self._require_plain(drop, fixed)
            other = measure(self.model, donor, self.metric)
        else:
            other = self.metric(given.logits)
        trace = record(self.model, base)
        first = trace.traits.restart(self.union[0], trace.spans.roles)
        later = list(range(first, len(trace.spans)))
        sites = [Site(self.visits.component, layer, positions=self.union) for layer in self.visits.layers]
        if fixed:
            require_restart(trace, "recomputing the softmax")
            sites += [Site(part, layer, positions=later) for part in ("z", "rot_q") for layer in self.visits.layers]
        found, plans = list[SuffixGradients](), [None, *(held_layers(self.model, base, later) if drop else ())]
        for plan in plans:
            found.append(trace.gradients(sites, self.metric, plan=plan, budget_gb=max(GRADIENT_GB, budget_gb)))
            require_numbers(found[0].metric, self.metric.name)
            require_numbers(other, self.metric.name, run="the donor run")
            show("gradients", len(found), len(plans))
        plain = self._by_target(self._first_order(given, found))
        best = self._by_target(self._reread(trace, given, found, later)) if fixed else plain
        stars = self._without_own(best[1:].abs()) if drop else torch.full_like(plain[0], torch.nan)
        return numbers(torch.stack([plain[0], best[0], stars], dim=-1)), numbers(torch.stack([found[0].metric, other]))

    def _require_plain(self, drop: bool, fixed: bool) -> None:
        """Refuse what does not reach the positions of an answer of several tokens."""
        if drop or (fixed and self.visits.component in KEYS):
            what = "drop=True holds layers" if drop else "fix=True reads keys anew"
            raise InputError(
                f"{self.metric.name}: an answer has several tokens, and {what} at the prompt's positions alone, while "
                f"the answer's own read the prompt too. Write {'drop' if drop else 'fix'}=False, or use answers of one "
                "token."
            )

    def _first_order(self, given: Given, found: Sequence[SuffixGradients]) -> Tensor:
        """Change times gradient, `[gradient, batch, layer, head, place]`; one head where there are none."""
        changes = [given.values[layer] - found[0].value[layer] for layer in self.visits.layers]
        by_layer = (torch.stack([(c * one.gradient[n]).sum(-1) for one in found]) for n, c in enumerate(changes))
        return torch.stack([self._by_place(one if one.ndim == 4 else one[..., None]) for one in by_layer], dim=2)

    def _reread(self, trace: Trace, given: Given, found: Sequence[SuffixGradients], later: list[int]) -> Tensor:
        """What heads read with the donor's queries or keys, times the gradient there; as `_first_order`."""
        by_layer: list[Tensor] = []
        n, row = len(self.visits.layers), {position: number for number, position in enumerate(later)}
        for layer in self.visits.layers:
            new = given.values[layer]
            if self.visits.component in ("q", "k"):
                cos, sin = (table.to(new.device)[:, self.union, None] for table in trace.tables)
                new = layer_of(self.model, layer).turned(self.visits.component, new, cos, sin)
            z, queries = found[0].value[n + layer], found[0].value[2 * n + layer]
            gradients = torch.stack([one.gradient[n + layer] for one in found])
            if self.visits.component in QUERIES:
                here = [row[position] for position in self.union]
                change = read_with(trace, layer, self.union, new) - z[:, here]
                by_layer.append(self._by_place((change * gradients[:, :, here]).sum(-1)))
                continue
            places: list[Tensor] = []
            for _, positions in self.places:
                keys = new[:, [given.rows[position] for position in positions]]
                change = read_with(trace, layer, later, queries, keys=keys, at=positions) - z
                read = (change * gradients).sum((2, -1))  # [gradient, batch, head]
                places.append(read.unflatten(-1, (keys.shape[2], -1)).sum(-1))
            by_layer.append(torch.stack(places, dim=-1))
        return torch.stack(by_layer, dim=2)

    def _by_place(self, products: Tensor) -> Tensor:
        """Sum over each place's positions: `[gradient, batch, pos, head]` to `[gradient, batch, head, place]`."""
        member = np.stack([np.isin(self.union, positions) for _, positions in self.places], axis=-1)
        return torch.einsum("gbph,pk->gbhk", products.double(), torch.from_numpy(member).to(products.device).double())

    def _by_target(self, guesses: Tensor) -> Tensor:
        """Sum over the heads that are edited together, `[gradient, batch, target, place]`."""
        heads = [(layer, slice(None) if some is None else list(some)) for ((layer, some),) in self.visits.targets]
        return torch.stack([guesses[:, :, layer, chosen].sum(2) for layer, chosen in heads], dim=2)

    def _without_own(self, sizes: Tensor) -> Tensor:
        """Average over the dropped layers `[dropped, batch, target, place]`, leaving a node's own out."""
        if self.visits.component in ("resid_pre", "resid_mid", "resid_post"):
            return sizes.mean(0)
        own = np.array([target[0][0] for target in self.visits.targets])
        others = torch.from_numpy(own != np.arange(len(sizes))[:, None]).to(sizes)[:, None, :, None]
        return (sizes * others).sum(0) / max(len(sizes) - 1, 1)
