"""What belongs together in one run: inputs and pairs by their layout, and how many fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from av_lens.errors import InputError
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair


def listed(given: Any) -> list[Any]:
    """Take one thing, or several; a stack of inputs and a text are one."""
    one = isinstance(given, str | AVInputs) or not isinstance(given, Iterable)
    return [given] if one else list(given)


def pairs_of(verb: str, given: Any) -> list[Pair]:
    """Read one pair, or several."""
    pairs = listed(given)
    others = [type(one).__name__ for one in pairs if not isinstance(one, Pair)]
    if others or not pairs:
        raise InputError(
            f"{verb} compares two aligned inputs, and got {others[0] if others else 'nothing'}: pass "
            "avl.Pair(clean=x, corrupt=y), such as the same sound with and without its picture "
            "(model.encode(clip.blank(), question) and model.encode(clip, question)), or a list of them."
        )
    return pairs


def that_fit(model: Any, longest: int, stack: int, budget_gb: float | int) -> int:
    """Say how many examples may run together, so that one layer's scores and pattern fit a budget."""
    each = 4.0 * model.spec.n_heads * longest * longest * max(4, model.dtype.itemsize)  # mask, scores, softmax, sum
    return max(1, min(stack, int(budget_gb * 1e9 / each)))


def input_stacks(inputs: Sequence[AVInputs], size: int) -> Iterator[list[int]]:
    """Group inputs of one layout."""
    layouts: list[list[int]] = []
    for number, x in enumerate(inputs):
        for group in layouts:
            first = inputs[group[0]]
            if first.layout == x.layout and first.spans.layout_difference(x.spans) is None:
                group.append(number)
                break
        else:
            layouts.append([number])
    for group in layouts:
        current: list[int] = []
        for number in group:
            if current and sum(len(inputs[n]) for n in current) + len(inputs[number]) > size:
                yield current
                current = []
            current.append(number)
        yield current
