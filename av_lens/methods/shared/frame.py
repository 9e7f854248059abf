"""The frame around a method: examples in stacks of one layout, numbers that outlive an interruption, a labelled grid.

A method says what is done with one stack: `work(stack, show)` fills `frame.values[stack.rows]` and `frame.lines`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from av_lens.core import Progress, run, watched
from av_lens.core.budget import input_stacks, listed, pairs_of, part_of, silent, that_fit
from av_lens.errors import InputError
from av_lens.families.decoder import component_named, hook_name
from av_lens.inputs import AVInputs, Conflict, Pair
from av_lens.interventions import Edit, Plan, Site, replace
from av_lens.methods.shared.places import Edited
from av_lens.metrics import Metric, as_metric
from av_lens.replay import measure_plans
from av_lens.replay.sweeps import interrupted
from av_lens.replay.traces import Trace
from av_lens.results import Grid
from av_lens.results.provenance import linked, stamp
from av_lens.spans import SpanMap

SIGNS = {
    "denoise": "values of the clean run into the corrupt run; positive: the place restores what the metric measures",
    "noise": "values of the corrupt run into the clean run; negative: the place is needed for what the metric measures",
}
"""What a patch does in either direction."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Examples of one layout that run together: `rows` are their numbers, `members` those of their inputs."""

    examples: Examples
    members: list[int]
    rows: Int[np.ndarray, " example"]

    @property
    def x(self) -> AVInputs:
        """The inputs; of pairs the clean ones."""
        return AVInputs.stack([self.examples.inputs[n] for n in self.members])

    def ends(self, direction: str) -> tuple[AVInputs, AVInputs]:
        """The inputs of the run that is edited and of its donor: "denoise" edits the corrupt run, "noise" the clean."""
        corrupt = AVInputs.stack([self.examples.pairs[n].corrupt for n in self.members])
        return (corrupt, self.x) if direction == "denoise" else (self.x, corrupt)


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs in the order they were given, each one example or a stack of one layout; and what they came from."""

    inputs: tuple[AVInputs, ...]
    conflicts: tuple[Conflict, ...] = ()
    pairs: tuple[Pair, ...] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, model: Any, given: Any, *, cell: str = "va") -> Examples:
        """Read an `AVInputs`, a `Conflict` (its cell is taken), or several of either."""
        items = listed(given)
        if not items:
            raise InputError("no inputs were given: pass what model.encode returns, or conflicts.")
        if all(isinstance(item, AVInputs) for item in items):
            return cls(tuple(items))
        if all(isinstance(item, Conflict) for item in items):
            return cls(tuple(item.cells(model)[cell] for item in items), tuple(items))
        kinds = sorted({type(item).__name__ for item in items})
        raise InputError(f"pass inputs (model.encode makes them) or conflicts, not {' and '.join(kinds)}.")

    @classmethod
    def paired(cls, verb: str, given: Any) -> Examples:
        """Read a `Pair`, or several, for a method of this name."""
        pairs = pairs_of(verb, given)
        return cls(tuple(pair.clean for pair in pairs), pairs=tuple(pairs))

    def __len__(self) -> int:
        return sum(map(len, self.inputs))

    @property
    def spans(self) -> list[SpanMap]:
        """What each input's positions are."""
        return [x.spans for x in self.inputs]

    @property
    def clusters(self) -> tuple[int, ...]:
        """The cluster of each example: those that share a clip are one."""
        sides = [(pair.clean, pair.corrupt) for pair in self.pairs] or [(x,) for x in self.inputs]
        return linked([[*chain(*each)] for one in sides for each in zip(*(x.media_hashes for x in one), strict=True)])

    @property
    def questions(self) -> list[str]:
        """What is asked in each example."""
        asked = [pair.corrupt for pair in self.pairs] or self.inputs
        return [question for x in asked for question in x.questions]

    def stacks(self, size: int) -> list[Stack]:
        """Group the examples by layout, at most so many together."""
        starts = np.cumsum([0, *map(len, self.inputs)])
        groups = input_stacks(self.inputs, size)
        return [Stack(self, m, np.concatenate([np.arange(starts[n], starts[n + 1]) for n in m])) for m in groups]

    def stack_size(self, model: Any, stack: int, budget_gb: float | int) -> int:
        """Say how many examples may run together, so that one layer's scores and pattern fit a budget."""
        return that_fit(model, max(len(x.spans) for x in self.inputs), stack, budget_gb)


@dataclass(eq=False)
class Frame:
    """The examples of one call, its metric where it has one, and its numbers as they come."""

    model: Any
    examples: Examples
    metric: Metric | None
    values: np.ndarray
    lines: np.ndarray
    shares: bool = False
    partial: str | None = None

    @classmethod
    def of(cls, model: Any, examples: Examples, metric: Any = None, *, measured: bool = True) -> Frame:
        """Bind the metric to what was given; without one nothing is edited, and the baseline is 0."""
        bound = as_metric(metric, model, examples.pairs or examples.inputs) if measured else None
        lines = np.repeat([[np.nan if measured else 0.0], [np.nan]], len(examples), axis=1)
        return cls(model, examples, bound, np.empty(0), lines)

    def shape(self, *sizes: int) -> None:
        """Make room for values `[example, ...]`."""
        self.values = np.full((len(self.examples), *sizes), np.nan)

    def own(self, stack: Stack) -> Metric:
        """The metric of some examples: their own answers, where each has its own."""
        assert self.metric is not None
        reference = self.metric.reference
        each = self.metric.n_answers > 1 or (reference is not None and len(reference) == len(self.examples))
        return self.metric.chosen(stack.rows.tolist()) if each else self.metric

    def run(
        self,
        work: Callable[[Stack, Progress], None],
        stacks: Sequence[Stack],
        progress: Progress | bool | None = None,
        *,
        stage: str = "",
        whole: bool = False,
    ) -> None:
        """Do the work stack by stack; an interruption keeps what is done, but of `whole` work nothing."""
        self.partial = None if whole else ""
        with watched(progress) as show:
            try:
                for number, stack in enumerate(stacks):
                    work(stack, part_of(show, number, len(stacks)))
                    if stage:
                        show(stage, sum(len(one.rows) for one in stacks[: number + 1]), len(self.examples))
            except KeyboardInterrupt:
                if whole:
                    raise
                self.partial = interrupted(torch.from_numpy(self.values))

    def stamp(self, **said: Any) -> dict[str, Any]:
        """Note what was measured of what, with the method's own choices."""
        said |= {"model": self.model.name, "questions": self.examples.questions}
        said |= {} if self.partial is None else {"partial": self.partial}
        return stamp(**said, **({} if self.metric is None else self.metric.provenance()))

    def grid(
        self, axes: Mapping[str, Any], *, direction: str, named: tuple[str, str] | None = None, **said: Any
    ) -> Grid:
        """Label the numbers, of the metric or of a name and unit; what is said of them stands in the provenance."""
        name, unit = named or (("", "") if self.metric is None else (self.metric.name, self.metric.unit))
        return Grid.of(
            self.values.reshape(len(self.values), *map(len, axes.values())),
            axes=axes,
            baseline=self.lines[0],
            donor=self.lines[1],
            clusters=self.examples.clusters,
            metric=name,
            unit=unit,
            direction=direction,
            shares=self.shares,
            provenance=self.stamp(**said),
        )


@dataclass(frozen=True, eq=False)
class Given:
    """What one run holds of a component for another, by layer; `rows`: where the edited run's positions lie."""

    component: str
    values: dict[int, Tensor]
    rows: dict[int, int]
    logits: Tensor

    @classmethod
    def of(
        cls,
        model: Any,
        x: AVInputs,
        component: str,
        layers: Iterable[int],
        positions: Mapping[int, int] | Iterable[int],
        *,
        plan: Plan | None = None,
    ) -> Given:
        """Run once; `positions` may say for those of the edited run which ones they are in this one."""
        there = positions if isinstance(positions, Mapping) else {p: p for p in positions}
        wanted = sorted(there.values())
        sites = {layer: Site(component, layer, positions=wanted) for layer in layers}
        with torch.no_grad():
            found = run(model, x, plan=plan, capture=list(sites.values()))
        turned = component_named(component).head_axis == 1
        kept = {layer: found.cache[hook_name(component, layer)] for layer in sites}
        values = {layer: value.transpose(1, 2) if turned else value for layer, value in kept.items()}
        return cls(component, values, {p: wanted.index(q) for p, q in there.items()}, found.logits)

    def edits(self, target: Iterable[Edited], positions: Sequence[int]) -> list[Edit]:
        """Put these layers' heads in place at some positions."""
        at = [self.rows[p] for p in positions]
        put = [(layer, heads, self.values[layer][:, at]) for layer, heads in target]
        put = [(layer, heads, value if heads is None else value[:, :, list(heads)]) for layer, heads, value in put]
        return [replace(Site(self.component, layer, heads, positions), value) for layer, heads, value in put]


def scored(
    trace: Trace,
    plans: Sequence[Plan],
    metric: Metric,
    write: Callable[[np.ndarray], None],
    *,
    budget_gb: float | int,
    show: Progress = silent,
    stage: str = "",
) -> None:
    """Measure plans, and hand `[plan, example]` on to be written down, also when interrupted."""
    scores = torch.full((len(plans), trace.batch), torch.nan)
    try:
        finished = told(show, stage, len(plans))
        measure_plans(trace, plans, metric, budget_gb=budget_gb, finished=finished, into=scores)
    finally:
        write(scores.double().numpy())


def told(show: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Tell of a stage how many of its parts are done."""
    return lambda done: show(stage, done, total)


def numbers(measured: Tensor) -> np.ndarray:
    """Bring a metric's numbers to the frame's arrays."""
    return measured.double().cpu().numpy()


def held_layers(model: Any, x: AVInputs, positions: Sequence[int]) -> list[Plan]:
    """GradDrop (AtP*, Kramár et al., 2024): a plan for each layer that holds its writes; no gradient passes it."""
    layers, parts = range(model.spec.n_layers), ("attn_out", "mlp_out")
    sites = {(part, layer): Site(part, layer, positions=list(positions)) for layer in layers for part in parts}
    with torch.no_grad():
        cache = run(model, x, capture=list(sites.values())).cache
    return [Plan([replace(sites[part, layer], cache[hook_name(part, layer)]) for part in parts]) for layer in layers]


def starred(guesses: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """AtP* of guesses `[gradient, ..., node]`: the mean size over dropped layers, with the sign of the plain first."""
    others = (np.arange(len(guesses) - 1)[:, None] != np.asarray(layers)[None]).astype(np.float64)
    wide = others.reshape(len(others), *(1,) * (guesses.ndim - 2), -1)
    return np.sign(guesses[0]) * (np.abs(guesses[1:]) * wide).sum(0) / np.maximum(others.sum(0), 1.0)


def for_each(given: Any, n: int, what: str) -> list[tuple[str, ...]]:
    """Read texts for all examples alike, or a list for each; nothing given is nothing for each."""
    if isinstance(given, str) or any(isinstance(item, str) for item in given):
        return [(given,) if isinstance(given, str) else tuple(given)] * n
    if len(given) not in (0, n):
        raise InputError(f"{len(given)} lists of {what} for {n} examples.")
    return [tuple(item) for item in given] or [()] * n


def answer_lengths(model: Any, tokens: Int[Tensor, "batch token"]) -> list[tuple[int, bool]]:
    """Count each answer's tokens up to its end, which counts too, and say whether it ended."""
    named = model.hf_model.generation_config.eos_token_id
    ends = set(np.atleast_1d(model.tokenizer.eos_token_id if named is None else named).tolist())
    first = [next((n for n, token in enumerate(row) if token in ends), None) for row in tokens.tolist()]
    return [(int(tokens.shape[1]), False) if at is None else (at + 1, True) for at in first]
