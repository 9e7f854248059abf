"""The frame around a method: examples in stacks of one layout, numbers that outlive an interruption, a labelled grid.

A method's own file says what is done with one stack of examples. What stands around that is always the same:

    frame = Frame.of(model, Examples.of(model, x), metric)      # the metric is bound to the unedited inputs
    frame.shape(n_arms, n_strengths)                            # values [example, arm, strength], NaN so far

    def work(stack, show):                                      # fills frame.values[stack.rows] and frame.lines
        ...

    frame.run(work, frame.examples.stacks(16), progress)        # Ctrl-C keeps what is done
    return frame.grid({"arm": arms, "strength": strengths}, direction=SIGN, method="steering", seed=seed)

`Given` holds what edits put in place (another run's activations), `scored` the metric under many plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_lens.core import Progress, run, watched
from av_lens.core.progress import part_of
from av_lens.families.hook_names import component_named, hook_name
from av_lens.inputs import AVInputs
from av_lens.interventions import Edit, Plan, Site, replace
from av_lens.methods.shared.examples import Examples, Stack
from av_lens.methods.shared.places import Edited
from av_lens.metrics import Metric, as_metric
from av_lens.replay import measure_plans
from av_lens.replay.sweeps import interrupted
from av_lens.replay.traces import Trace
from av_lens.results import Grid
from av_lens.results.provenance import stamp

Work = Callable[[Stack, Progress], None]


@dataclass(eq=False)
class Frame:
    """The examples of one call, its metric where it has one, and its numbers as they come.

    `lines` holds the baseline and the donor of each example; `partial` how far an interrupted call came.
    """

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
        given, lines = examples.pairs or examples.inputs, np.full((2, len(examples)), np.nan)
        bound = as_metric(metric, model, given) if measured else None
        lines[0] = np.nan if measured else 0.0
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
        work: Work,
        stacks: Sequence[Stack],
        progress: Progress | bool | None = None,
        *,
        stage: str = "",
        whole: bool = False,
    ) -> None:
        """Do the work stack by stack; with a stage, say how many examples are done.

        Interrupted, the numbers that are done are kept, but for `whole` work, of which half is nothing.
        """
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
    """What one run holds of a component, to be put in place in another run: `[batch or 1, pos, (head,) d]` by layer.

    `rows` says where each position of the *edited* run lies, `logits` are those of the run itself.
    """

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
        at, edits = [self.rows[p] for p in positions], list[Edit]()
        for layer, heads in target:
            value = self.values[layer][:, at]
            value = value if heads is None else value[:, :, list(heads)]
            edits.append(replace(Site(self.component, layer, heads, positions), value))
        return edits


def scored(
    trace: Trace,
    plans: Sequence[Plan],
    metric: Metric,
    write: Callable[[np.ndarray], None],
    *,
    budget_gb: float | int,
    show: Progress | None = None,
    stage: str = "",
) -> None:
    """Measure plans, and hand `[plan, example]` on to be written down, also when interrupted."""
    scores = torch.full((len(plans), trace.batch), torch.nan)
    finished = None if show is None else partial(_finished, show, stage, len(plans))
    try:
        measure_plans(trace, plans, metric, budget_gb=budget_gb, finished=finished, into=scores)
    finally:
        write(scores.double().numpy())


def _finished(show: Progress, stage: str, total: int, done: int) -> None:
    show(stage, done, total)


def numbers(measured: Tensor) -> np.ndarray:
    """Bring a metric's numbers to the frame's arrays."""
    return measured.double().cpu().numpy()
