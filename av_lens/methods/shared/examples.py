"""What a method was handed, as one list of examples: inputs of one layout or several, or conflicts.

A method that takes "an input, several, or conflicts" sees the same thing here: inputs in the order given, grouped by
layout into stacks that run together, each example's sources (examples that share a clip are one cluster), and for
conflicts the two answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from av_lens.core.layouts import input_stacks, listed, that_fit
from av_lens.errors import InputError
from av_lens.inputs.conflict import Conflict
from av_lens.inputs.model_inputs import AVInputs
from av_lens.replay.sweeps import sources
from av_lens.results.provenance import linked


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs in the order they were given.

    Attributes:
        inputs: each one example or a stack of one layout.
        conflicts: the conflict of each input, where conflicts were given; else empty.
    """

    inputs: tuple[AVInputs, ...]
    conflicts: tuple[Conflict, ...] = ()

    @classmethod
    def of(cls, model: Any, given: Any, *, cell: str = "va") -> Examples:
        """Read what a caller handed in.

        Args:
            model: a `HookedAVLLM`.
            given: an `AVInputs`, a `Conflict`, or several of either.
            cell: which cell of a conflict is taken.

        Returns:
            The examples.

        Raises:
            InputError: nothing was given, or something else.
        """
        items = listed(given)
        if not items:
            raise InputError("no inputs were given: pass what model.encode returns, or conflicts.")
        if all(isinstance(item, AVInputs) for item in items):
            return cls(tuple(items))
        if all(isinstance(item, Conflict) for item in items):
            return cls(tuple(item.cells(model)[cell] for item in items), tuple(items))
        kinds = sorted({type(item).__name__ for item in items})
        raise InputError(f"pass inputs (model.encode makes them) or conflicts, not {' and '.join(kinds)}.")

    def __len__(self) -> int:
        return sum(len(x) for x in self.inputs)

    @property
    def clusters(self) -> tuple[int, ...]:
        """The cluster of each example: those that share a clip are one."""
        return linked([sources(x, i) for x in self.inputs for i in range(len(x))])

    @property
    def questions(self) -> list[str]:
        """What is asked in each example."""
        return [question for x in self.inputs for question in x.questions]

    def stacks(self, size: int) -> Iterator[tuple[Int[np.ndarray, " example"], AVInputs]]:
        """Group the examples by layout.

        Args:
            size: examples that run together, at most.

        Yields:
            The numbers of some examples, and their stack.
        """
        starts = np.cumsum([0, *(len(x) for x in self.inputs)])
        for members in input_stacks(self.inputs, size):
            rows = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in members])
            yield rows, AVInputs.stack([self.inputs[n] for n in members])

    def stack_size(self, model: Any, stack: int, budget_gb: float | int) -> int:
        """Say how many examples may run together, so that one layer's scores and pattern fit a budget.

        Args:
            model: a `HookedAVLLM`.
            stack: at most so many.
            budget_gb: memory for the attention of one layer.

        Returns:
            At least 1.
        """
        return that_fit(model, max(len(x.spans) for x in self.inputs), stack, budget_gb)
