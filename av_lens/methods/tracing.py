"""Causal tracing: spoil what the model sees or hears, then give single states back. Which of them carry the answer?

    effects     IE = metric(restored) - metric(corrupted)       positive: the state brings the metric back
    normalized  IE / (metric(clean) - metric(corrupted))        0 as corrupted, 1 as clean

    corruption="noise"  Gaussian noise of `scale` standard deviations of each spoiled role's own embeddings, a fresh
                        draw for each seed; figures are means over seeds, the provenance has their standard error
    corruption="mean"   every embedding of a role becomes the role's mean; "zero": zero
    a Pair              its corrupt input is the corrupted run (a picture really blanked, a sound really muted)

Without a metric the probability of the top token of the clean or of the corrupted run is traced (`answer=`).

Source: Meng et al. (2022, ROME); for audio-visual models "Probing Cross-modal Information Hubs" (2605.10815). Not done:
severed restorations (holding MLPs or attention corrupted; `path_patch` tells direct from mediated).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core import Progress
from av_lens.core.budget import listed, part_of
from av_lens.errors import InputError, InterventionError
from av_lens.families.decoder import component_named
from av_lens.inputs import AVInputs, Conflict, Pair
from av_lens.interventions import Plan, Site, add
from av_lens.interventions.edits import resolve_positions
from av_lens.methods.shared.frame import Examples, Frame, Given, Stack, numbers, told
from av_lens.methods.shared.places import Axes, Place
from av_lens.metrics import Metric, as_metric, each, prob, require_numbers
from av_lens.model import HookedAVLLM
from av_lens.replay import measure_plans
from av_lens.replay.rerun import rerun_from
from av_lens.replay.traces import Trace, record
from av_lens.results import Grid
from av_lens.spans import SpanMap

SIGN = "states of the clean run into the corrupted run; positive: the state brings the metric back"


def causal_trace(
    model: HookedAVLLM,
    x: AVInputs | Pair | Conflict | Sequence[AVInputs] | Sequence[Pair] | Sequence[Conflict],
    *,
    metric: Metric | Callable[..., Any] | None = None,
    answer: str = "clean",
    noised: str = "media",
    corruption: str = "noise",
    scale: float | int = 3.0,
    seeds: int = 10,
    seed: int = 0,
    over: str = "layer span",
    component: str = "resid_post",
    window: int = 1,
    placebo: bool = False,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Grid:
    """Spoil media, restore states one place at a time, and measure what comes back.

    Args:
        model: a `HookedAVLLM`.
        x: inputs, conflicts (their cell `va`) or aligned pairs, one or several.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        answer: "clean" or "corrupt": whose top token's probability is traced where there is no metric.
        noised: the roles that are spoiled, joined by `|`; not used for pairs, as corruption and scale.
        corruption: "noise", "mean" or "zero".
        scale: standard deviations of the noise, in those of each role's embeddings.
        seeds: draws of the noise (and of a placebo's positions).
        seed: of all draws.
        over: "layer span", "layer pos", "layer window:0.5s" or "layer box:4x4".
        component: what is restored: resid_post, resid_pre, resid_mid, attn_out, mlp_out, z, ...
        window: layers that are restored together, around each layer.
        placebo: restore as many other positions, drawn at random, instead; NaN where too few are left.
        stack: examples that run together.
        budget_gb: memory for the activations of restorations that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid `[example, layer, place]`; `baseline` is the corrupted run, `donor` the clean one. Interrupted, it holds
        the examples that are done; the others are NaN.

    Raises:
        InputError: an unknown word, a metric that is NaN, or places that differ.
        InterventionError: what cannot be restored or spoiled.
    """
    axes = Axes.parsed(over)
    how = _How(component, window, placebo, corruption, float(scale), seeds, seed, answer, budget_gb)
    how.check(axes, model.spec.n_layers)
    paired = len(items := listed(x)) > 0 and all(isinstance(item, Pair) for item in items)
    examples = Examples.paired("causal_trace", items) if paired else Examples.of(model, items)
    places, labels = axes.cut_alike(examples.spans, None if axes.places else "generation")
    spoiled = [{} if paired else _spoiled(spans, noised) for spans in examples.spans]
    frame = Frame.of(model, examples, metric, measured=metric is not None)
    frame.shape(model.spec.n_layers, len(labels))
    frame.lines[:], spread = np.nan, np.full_like(frame.values, np.nan)

    def work(stack: Stack, show: Progress) -> None:
        first, asked = stack.members[0], None if frame.metric is None else frame.own(stack)
        runs = [record(model, one) for one in (stack.ends("noise") if paired else (stack.x,))]
        job = _Job(runs[0], runs[1] if paired else None, spoiled[first], places[first], stack.rows.tolist(), how)
        for found in job.traced(asked, show):
            frame.values[stack.rows], spread[stack.rows], frame.lines[:, stack.rows] = found

    frame.run(work, examples.stacks(stack), progress)
    if frame.partial:
        frame.partial += ", the last ones perhaps over fewer seeds"
    chosen = {"component": component, "window": window, "placebo": placebo, "seed": seed, "seeds": how.draws(paired)}
    chosen |= {} if paired else {"corruption": corruption, "scale": how.scale}
    return frame.grid(
        {"layer": np.arange(model.spec.n_layers)} | ({axes.places: labels} if axes.places else {}),
        named=None if frame.metric else (f"P(top token of the {answer} run)", "probability"),
        direction=SIGN + (" (placebo positions)" if placebo else ""),
        method="causal tracing",
        noised="the pair's corrupt input" if paired else noised,
        over=over,
        positions=dict(places[0]),
        standard_error_of_seeds=_largest_error(spread, how.draws(paired)),
        **chosen,
    )


def _spoiled(spans: SpanMap, noised: str) -> dict[str, tuple[int, ...]]:
    """The positions of each role that is spoiled."""
    chosen = resolve_positions(noised, spans, what="noise").index
    roles = dict.fromkeys(spans.roles[position] for position in chosen)
    return {role: tuple(position for position in chosen if spans.roles[position] == role) for role in roles}


def _largest_error(deviations: np.ndarray, draws: int) -> float:
    """The largest standard error over places of a mean over examples and seeds."""
    known = deviations[~np.isnan(deviations).any((1, 2))]
    if draws < 2 or not len(known):
        return float("nan")
    return float((np.sqrt((known**2).sum(0)) / len(known)).max() / np.sqrt(draws))


@dataclass(frozen=True)
class _How:
    """What is restored, and how the run is corrupted."""

    component: str
    window: int
    placebo: bool
    corruption: str
    scale: float
    seeds: int
    seed: int
    answer: str
    budget_gb: float | int

    def check(self, axes: Axes, n_layers: int) -> None:
        """Refuse what cannot be traced."""
        if axes.unit != "layer":
            raise InputError(f"causal_trace restores layers, not {axes.unit}: write over='layer span' or 'layer pos'.")
        require_choice("corruption", self.corruption, ("noise", "mean", "zero"))
        require_choice("answer", self.answer, ("clean", "corrupt"))
        found = component_named(self.component)
        if not found.layered or found.axes[-1] == "key_pos":
            raise InterventionError(
                f"{self.component} cannot be restored by layer and position: name resid_post, attn_out, mlp_out, z, ..."
            )
        if not 1 <= self.window <= n_layers:
            raise InputError(f"window={self.window}: restore 1 to {n_layers} layers together.")
        if self.seeds < 1 or self.scale <= 0:
            raise InputError(f"seeds={self.seeds}, scale={self.scale:g}: both must be positive; 10 and 3 are usual.")

    def draws(self, paired: bool) -> int:
        """How often the corrupted run (or the placebo) is drawn."""
        return self.seeds if self.placebo or (self.corruption == "noise" and not paired) else 1


@dataclass(frozen=True, eq=False)
class _Job:
    """One stack of examples of one layout."""

    clean: Trace
    corrupt: Trace | None
    spoiled: dict[str, tuple[int, ...]]
    places: list[Place]
    rows: list[int]
    how: _How

    def traced(self, bound: Metric | None, show: Progress) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """After each draw: means and deviations over draws `[batch, layer, place]`, both metrics `[2, batch]`."""
        draws = self.how.draws(self.corrupt is not None)
        layers = range(self.clean.n_layers)
        given = Given.of(self.clean.model, self.clean.x, self.how.component, layers, range(len(self.clean.spans)))
        columns, found = [], []
        too_few = torch.tensor([self._others(positions) is None for _, positions in self.places])
        for number in range(draws):
            base, spoiling = self._corrupted(number, whole=bound is not None and bound.teacher_forced)
            metric = bound
            if metric is None:  # the probability of the top token of the clean or the corrupted run
                logits = self.clean.logits() if self.how.answer == "clean" else base.replay([spoiling])[0]
                metric = as_metric(prob(each(logits[:, -1].argmax(-1).tolist())))
            plans = [spoiling, *(spoiling + plan for plan in self._restorations(given, number))]
            finished = told(part_of(show, number, draws), "causal tracing", len(plans))
            scores = measure_plans(base, plans, metric, budget_gb=self.how.budget_gb, finished=finished).double()
            clean = measure_plans(self.clean, [Plan()], metric)[0].double()
            for one, run_name in ((clean, "the clean run"), (scores[0], "the corrupted run")):
                require_numbers(one, metric.name, run=run_name)
            columns.append(torch.stack([scores[0], clean]))
            one = scores[1:].T.reshape(len(self.rows), len(layers), len(self.places))
            found.append(one.masked_fill(too_few & self.how.placebo, torch.nan))
            measured = torch.stack(found)
            spread = measured.std(0) if number else torch.full_like(measured[0], torch.nan)
            yield numbers(measured.mean(0)), numbers(spread), numbers(torch.stack(columns).mean(0))

    def _corrupted(self, number: int, *, whole: bool) -> tuple[Trace, Plan]:
        """The corrupted run, or the clean one and the plan that corrupts it, where it must be run as a whole."""
        if self.corrupt is not None:
            return self.corrupt, Plan()
        positions, order = torch.tensor([p for some in self.spoiled.values() for p in some]).sort()
        change = torch.cat([self._change(some, number) for some in self.spoiled.values()], dim=1)[:, order]
        positions = positions.tolist()
        if whole or self.clean.hooked_because:
            return self.clean, Plan(add(Site("embed", positions=positions), change))
        first = self.clean.traits.restart(positions[0], self.clean.spans.roles)
        stream = self.clean.stream(0, first).clone()
        stream[:, [position - first for position in positions]] += change
        return rerun_from(self.clean, 0, stream, start=first), Plan()

    def _change(self, positions: Sequence[int], number: int) -> Float[Tensor, "batch _ d_model"]:
        """What corrupting adds to the embeddings of one role."""
        held = self.clean.stream(0, 0)[:, list(positions)]
        if self.how.corruption == "zero":
            return -held
        if self.how.corruption == "mean":
            return held.mean(1, keepdim=True) - held
        # By example, so that a draw does not depend on which examples run together.
        seeds = (np.random.SeedSequence([self.how.seed, number, row, positions[0]]) for row in self.rows)
        generators = (torch.Generator().manual_seed(int(seed.generate_state(1)[0])) for seed in seeds)
        draws = torch.stack([torch.randn(held.shape[1:], generator=generator) for generator in generators])
        return (draws.to(held.device) * self.how.scale * held.float().std(dim=(1, 2), keepdim=True)).to(held)

    def _restorations(self, given: Given, number: int) -> Iterator[Plan]:
        draw = np.random.default_rng(np.random.SeedSequence([self.how.seed, number, len(self.clean.spans)])).choice
        places = [positions for _, positions in self.places]
        if self.how.placebo:
            others = [(some, self._others(some)) for some in places]
            drawn = (some if free is None else draw(free, len(some), replace=False) for some, free in others)
            places = [tuple(sorted(map(int, some))) for some in drawn]
        for layer in given.values:
            for positions in places:
                first = layer - (self.how.window - 1) // 2
                window = range(max(first, 0), min(first + self.how.window, len(given.values)))
                yield Plan(given.edits([(one, None) for one in window], positions))

    def _others(self, positions: Sequence[int]) -> list[int] | None:
        """The positions outside a place; None where they are fewer than the place has."""
        found = sorted(set(range(len(self.clean.spans))) - set(positions))
        return found if len(found) >= len(positions) else None
