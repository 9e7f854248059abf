"""One thread at a time: a model's hooks and switches are shared by all threads, so that runs take turns.

Whoever attaches hooks or runs the model holds its turn meanwhile; other threads wait. The same thread may enter again
(a hook that runs the model, a verb that calls another). A bridge and what is `bound` to it share one turn.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from av_lens.errors import ModelError

WAIT_S = 600.0
P = ParamSpec("P")
Given = TypeVar("Given")


class Turn:
    """A model's turn, held by one thread; a copied model has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        """Wait for the turn."""
        if not self._lock.acquire(timeout=WAIT_S):
            raise ModelError(
                f"another thread has been running this model, or holding hooks on it, for {WAIT_S:g} s. Runs of one "
                "model take turns: leave `with model.hooks(...)` before you wait for threads that use the model, or "
                "load a model for each thread."
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give the turn back."""
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        """A copy is a turn of its own."""
        return Turn, ()


def turn_of(bridge: Any) -> Turn:
    """The turn of a bridge and of all that is bound to it."""
    return bridge.__dict__.setdefault("av_lens_turn", Turn())


def waiting(turn: Turn, function: Callable[P, Given]) -> Callable[P, Given]:
    """Let a function hold a turn while it runs."""

    @functools.wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> Given:
        with turn:
            return function(*args, **kwargs)

    return held


def in_turn(method: Callable[Concatenate[Any, P], Given]) -> Callable[Concatenate[Any, P], Given]:
    """Let a model's method hold its turn while it runs."""

    @functools.wraps(method)
    def waiting(self: Any, *args: P.args, **kwargs: P.kwargs) -> Given:
        with turn_of(self.bridge):
            return method(self, *args, **kwargs)

    return waiting
