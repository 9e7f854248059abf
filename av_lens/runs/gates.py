"""Switching gated hooks on for exactly the run that names them.

TransformerLens fires `hook_result`, `hook_mlp_in`, `hook_attn_in` and `hook_q/k/v_input` only after a switch is set on
the model, and refuses or skips them otherwise; a switch left on makes every later run dearer. Here the run opens the
switches that its hooks need, and puts them back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from av_lens.bridge.hook_names import GATES, gates_named
from av_lens.errors import InterventionError

_FORKS = ("use_attn_in", "use_split_qkv_input")
HookPair = tuple[str | Callable[[str], bool], Callable[..., Any]]


@contextmanager
def open_gates(bridge: Any, gates: Iterable[str]) -> Generator[None, None, None]:
    """Hold switches open, and restore every one of them afterwards.

    Args:
        bridge: a TransformerBridge.
        gates: names out of `GATES`.

    Yields:
        Nothing.

    Raises:
        InterventionError: two switches that TransformerLens cannot open together.
    """
    wanted = set(gates)
    if set(_FORKS) <= wanted:
        raise InterventionError(
            "hook_attn_in and hook_q_input/k_input/v_input are two ways to fork the same stream and cannot fire in one "
            "run; name the one kind or the other."
        )
    before = {gate: bool(getattr(bridge.cfg, gate)) for gate in GATES}
    during = {gate: value or gate in wanted for gate, value in before.items()}
    if wanted & set(_FORKS):
        during |= {gate: gate in wanted for gate in _FORKS}
    try:
        _set(bridge, during)
        yield
    finally:
        _set(bridge, before)


def _set(bridge: Any, gates: dict[str, bool]) -> None:
    for gate, value in sorted(gates.items(), key=lambda item: item[1]):  # closing first: the forks exclude each other
        getattr(bridge, f"set_{gate}")(value)


def gates_of_filter(
    names_filter: str | Sequence[str] | Callable[[str], bool] | None, known: Iterable[str]
) -> frozenset[str]:
    """The switches a filter asks for.

    A function opens the switches of the gated hooks it accepts, unless it accepts every hook: that is a sweep, not a
    wish for tensors of the size `[batch, pos, head, d_model]`.

    Args:
        names_filter: a name, several, a function of a name, or None.
        known: every hook name of the model.

    Returns:
        A subset of `GATES`.

    Raises:
        InterventionError: a name is no hook of the model.
    """
    known = tuple(known)
    if names_filter is None:
        return frozenset()
    if callable(names_filter):
        accepted = [name for name in known if names_filter(name)]
        return frozenset() if len(accepted) == len(known) else gates_named(accepted, known)
    return gates_named([names_filter] if isinstance(names_filter, str) else names_filter, known)


def gates_of_hooks(hooks: Iterable[HookPair], known: Iterable[str]) -> frozenset[str]:
    """The switches that a list of hooks asks for.

    Args:
        hooks: `(name or function of a name, hook function)` pairs.
        known: every hook name of the model.

    Returns:
        A subset of `GATES`.

    Raises:
        InterventionError: a name is no hook of the model.
    """
    known = tuple(known)
    return frozenset[str]().union(*(gates_of_filter(name, known) for name, _ in hooks))


def only_open(bridge: Any, accept: Callable[[str], bool]) -> Callable[[str], bool]:
    """A filter that passes over hooks whose switch is off, in place of TransformerLens's warning.

    Args:
        bridge: a TransformerBridge.
        accept: a function of a hook name.

    Returns:
        The narrower function.
    """
    points = bridge.hook_dict
    closed = {name for name, point in points.items() if bridge._gated_hook_reason(point.name or name) is not None}
    return lambda name: name not in closed and accept(name)
