"""The edits of many plans, applied to one stack of activations that plans join at their own first layer.

    row 0 .. n-1   plans whose first layer is past, each its own run
    row n          the recorded run, once, for all plans that join at this layer

What the joining plans share is computed once: their row is *folded* until the first edit among them is met, and then
*spread*, one row for each. A stack therefore reads every layer's weights once, however many layers its plans start at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from av_lens.interventions import CompiledPlan, Step


class Taps:
    """The edits of several plans by place, and the bookkeeping of a stack's plan axis.

    Args:
        plans: the compiled plans, first layers ascending, in the order of the plan axis.
        offset: absolute position of the first row of every activation.
        decoding: whether the rows are decoded after the prompt: every plan then has its own from the first layer on,
            in any order, and only edits that act while decoding are met.
    """

    def __init__(self, plans: Sequence[CompiledPlan], offset: int, *, decoding: bool = False) -> None:
        self.offset = offset
        self.active = len(plans) if decoding else 0
        self.joining = 0
        self._firsts = [0 if decoding else max(plan.first_layer, 0) for plan in plans]
        self._places: dict[tuple[str, int | None], list[tuple[int, Step]]] = {}
        for number, plan in enumerate(plans):
            for step in plan.steps:
                if step.in_decode or not decoding:
                    self._places.setdefault((step.component, step.layer), []).append((number, step))

    @property
    def first_layer(self) -> int:
        """Where the first plan joins."""
        return self._firsts[0]

    def enter(self, layer: int, stream: Tensor | None, recorded: Tensor) -> Tensor:
        """Let the plans that start at a layer join."""
        self.active += self.joining
        self.joining = self._firsts.count(layer)
        if not self.joining:
            assert stream is not None
            return stream
        return recorded[None].clone() if stream is None else torch.cat((stream, recorded[None]))

    def has(self, layer: int, components: Sequence[str]) -> bool:
        """Say whether any plan edits one of these components."""
        return any((component, layer) in self._places for component in components)

    def rowwise(self, layer: int, components: Sequence[str]) -> bool:
        """Say whether these components' edits may see some of their rows alone."""
        return all(step.rowwise for name in components for _, step in self._places.get((name, layer), ()))

    def spread(self, activation: Tensor) -> Tensor:
        """Give every joining plan its own row."""
        if self.joining < 2 or activation.shape[0] == self.active + self.joining:
            return activation
        joined = activation[self.active :].expand(self.joining, *activation.shape[1:])
        return torch.cat((activation[: self.active], joined))

    def matched(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Bring two activations to one plan axis."""
        return (first, second) if first.shape[0] == second.shape[0] else (self.spread(first), self.spread(second))

    def complete(self, activation: Tensor, recorded: Tensor) -> Tensor:
        """Give every plan of the stack its own row, also those that join at a later layer."""
        spread = self.spread(activation)
        missing = len(self._firsts) - spread.shape[0]
        return torch.cat((spread, recorded.expand(missing, *recorded.shape))) if missing else spread

    def __call__(self, component: str, layer: int | None, activation: Tensor, rows: slice | None = None) -> Tensor:
        """Apply the edits at one place; `rows` says which of the restart's rows these are; None for all."""
        steps = self._places.get((component, layer))
        if not steps:
            return activation
        if steps[-1][0] >= self.active:
            activation = self.spread(activation)
        start = self.offset if rows is None else self.offset + rows.start
        for number, step in steps:
            fired = step.fired
            step(activation[number], start)
            if rows is not None and step.fired == fired:
                step.fired += step.in_prompt  # its rows change nothing that was asked for, and were not computed
        return activation
