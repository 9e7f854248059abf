"""A memory of what was computed last: the least recently used goes first when a budget is reached."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

Value = TypeVar("Value")
Sized = TypeVar("Sized", bound="HasBytes")


@runtime_checkable
class HasBytes(Protocol):
    """What says how many bytes it takes."""

    @property
    def nbytes(self) -> int:
        """How many bytes it takes now."""
        ...


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


class Bounded(Generic[Sized]):
    """Sizeds by key, as many of those used last as take at most so many bytes by their `nbytes`; at least one.

    What a value takes may change while it is kept: it is asked anew whenever one is added.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, Sized] = OrderedDict()

    def once(self, key: Hashable, make: Callable[[], Sized]) -> Sized:
        """Recall a value, or make and keep it; the key is all that it depends on."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = self._kept[key] = make()
        total = sum(one.nbytes for one in self._kept.values())
        while len(self._kept) > 1 and total > self.most:
            total -= self._kept.popitem(last=False)[1].nbytes
        return value

    def forget(self, gone: Callable[[Any], bool]) -> None:
        """Let go of the values whose key says so."""
        for key in [key for key in self._kept if gone(key)]:
            del self._kept[key]
