"""Switching gated hooks on for exactly the run that names them.

TransformerLens fires `hook_result`, `hook_mlp_in`, `hook_attn_in` and `hook_q/k/v_input` only after a switch is set on
the model, and refuses or skips them otherwise; a switch left on makes every later run dearer. Here the run opens the
switches that its hooks need, and puts them back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from av_lens.errors import InterventionError
from av_lens.families.hook_names import GATES, gates_named

_FORKS = ("use_attn_in", "use_split_qkv_input")
HookPair = tuple[str | Callable[[str], bool], Callable[..., Any]]


@contextmanager
def open_gates(bridge: Any, gates: Iterable[str]) -> Generator[None, None, None]:
    """Hold switches open, and restore every one of them afterwards."""
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
    """
    known = tuple(known)
    if names_filter is None:
        return frozenset()
    if isinstance(names_filter, str):
        return gates_named([names_filter], known)
    accepted = [name for name in known if names_filter(name)] if callable(names_filter) else list(names_filter)
    require_some(accepted, known)
    return frozenset() if callable(names_filter) and len(accepted) == len(known) else gates_named(accepted, known)


def require_some(accepted: Sequence[object], known: Sequence[str]) -> None:
    """Refuse a filter that selects nothing: what was asked for would not be done, in silence."""
    if not accepted:
        shown = ", ".join([*known[:2], *known[len(known) // 2 :][:3]])
        raise InterventionError(
            f"this filter selects none of the model's {len(known)} hooks. They have names such as {shown}; "
            "list(model.hook_dict) shows all, and docs/hooks.md what they hold."
        )


def gates_of_hooks(hooks: Iterable[Any], known: Iterable[str]) -> frozenset[str]:
    """The switches that a list of hooks asks for."""
    known, hooks = tuple(known), list(hooks)
    pair: Any
    for pair in hooks:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and callable(pair[1])) or pair[0] is None:
            raise InterventionError(
                f"hooks are a list of (name or function of a name, function(activation, hook)) pairs, not {pair!r}."
            )
    return frozenset[str]().union(*(gates_of_filter(name, known) for name, _ in hooks))


def counted(hooks: Iterable[HookPair], *, batch_dim: bool = True) -> tuple[list[HookPair], Callable[[], None]]:
    """Count how often hooks fire, so that one which never does is told."""
    hooks = list(hooks)
    fired = [0] * len(hooks)

    def counting(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def hook_function(value: Any, hook: Any) -> Any:
            fired[number] += 1
            if batch_dim or value.shape[0] != 1:
                return function(value, hook=hook)
            made = function(value.squeeze(0), hook=hook)
            return made.unsqueeze(0) if made is not None and made.ndim == value.ndim - 1 else made

        return hook_function

    def check() -> None:
        for (name, _), times in zip(hooks, fired, strict=True):
            if not times:
                shown = repr(name) if isinstance(name, str) else "those that a function selects"
                raise InterventionError(
                    f"the hook at {shown} never fired: this run did not pass there (a layer behind stop_at_layer=, or "
                    "an encoder of media that the input does not have)."
                )

    return [(name, counting(number, function)) for number, (name, function) in enumerate(hooks)], check


def only_open(bridge: Any, accept: Callable[[str], bool]) -> Callable[[str], bool]:
    """A filter that passes over hooks whose switch is off, in place of TransformerLens's warning."""
    points = bridge.hook_dict
    closed = {name for name, point in points.items() if bridge._gated_hook_reason(point.name or name) is not None}
    return lambda name: name not in closed and accept(name)
