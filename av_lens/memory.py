"""A memory of what was computed last: the least recently used goes first when a budget is reached."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Memory(Generic[Value]):
    """Values by key, up to a budget; at least one is always kept. A value costs 1 unless `cost` says otherwise."""

    def __init__(self, budget: int, cost: Callable[[Any], int] = lambda value: 1) -> None:
        self.budget = budget
        self.hits = 0
        self._cost = cost
        self._kept: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._total = 0

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Recall a value, or make and remember it; the key is all that it depends on."""
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key][0]
        value = make()
        self._kept[key] = value, self._cost(value)
        self._total += self._kept[key][1]
        while len(self._kept) > 1 and self._total > self.budget:
            self._total -= self._kept.popitem(last=False)[1][1]
        return value

    def __len__(self) -> int:
        return len(self._kept)
