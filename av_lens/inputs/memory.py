"""A memory of what was computed last: the least recently used goes first when a budget is reached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Memory(Generic[Value]):
    """Remembers values by key, up to a budget.

    Args:
        budget: how much is kept; at least one value always is.
        cost: what a value takes of it; 1 when left out, so that the budget is a count.
    """

    def __init__(self, budget: int, cost: Callable[[Any], int] | None = None) -> None:
        self.budget = budget
        self.hits = 0
        self._cost = cost or (lambda value: 1)
        self._kept: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._total = 0

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Recall a value, or make and remember it.

        Args:
            key: what it depends on, all of it.
            make: computes it.

        Returns:
            The value.
        """
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key][0]
        value = make()
        cost = self._cost(value)
        self._kept[key] = (value, cost)
        self._total += cost
        while len(self._kept) > 1 and self._total > self.budget:
            _, (_, freed) = self._kept.popitem(last=False)
            self._total -= freed
        return value

    def __len__(self) -> int:
        return len(self._kept)
