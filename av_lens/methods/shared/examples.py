"""What a method was handed, as one list of examples: inputs of one layout or several, conflicts, or aligned pairs.

Every method sees the same thing here: inputs in the order given (of pairs the clean ones), grouped by layout into
stacks that run together, each example's sources (examples that share a clip are one cluster), and for conflicts the two
answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from av_lens.core.layouts import input_stacks, listed, pairs_of, that_fit
from av_lens.errors import InputError
from av_lens.inputs import AVInputs, Conflict, Pair
from av_lens.replay.sweeps import sources
from av_lens.results.provenance import linked
from av_lens.spans import SpanMap


@dataclass(frozen=True, eq=False)
class Stack:
    """Examples of one layout that run together; their inputs are put together each time they are asked for.

    `rows` are the numbers of the examples, `members` those of the inputs that they came in.
    """

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
        return linked([[s for x in one for s in sources(x, i)] for one in sides for i in range(len(one[0]))])

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


def for_each(given: Any, n: int, what: str) -> list[tuple[str, ...]]:
    """Read texts for all examples alike, or a list for each; nothing given is nothing for each."""
    if isinstance(given, str) or any(isinstance(item, str) for item in given):
        return [(given,) if isinstance(given, str) else tuple(given)] * n
    if len(given) not in (0, n):
        raise InputError(f"{len(given)} lists of {what} for {n} examples.")
    return [tuple(item) for item in given] or [()] * n


def answer_lengths(model: Any, tokens: Int[torch.Tensor, "batch token"]) -> list[tuple[int, bool]]:
    """Count each answer's tokens up to its end, which counts too, and say whether it ended."""
    named = model.hf_model.generation_config.eos_token_id
    ends = set(np.atleast_1d(model.tokenizer.eos_token_id if named is None else named).tolist())
    first = [next((n for n, token in enumerate(row) if token in ends), None) for row in tokens.tolist()]
    return [(int(tokens.shape[1]), False) if at is None else (at + 1, True) for at in first]
