"""Which functions stand on a model's modules, by identity: what a restart, which calls no hook, would pass by.

Looked at are all roads by which a function of the caller's can enter a run: hook points (`model.hooks`, `add_hook`,
permanent ones), torch's own forward and backward hooks on any module of the bridge or of the HuggingFace model, torch's
global hooks, and a module's `forward` that was written over. Two states are equal where the same functions stand in the
same places in the same order; what a function does, how often it was put there and taken away, and how large its effect
is do not matter.

Not seen: a function that keeps its identity and changes its mind (a counter, a factor read from outside), and modules
whose class was changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch.nn import Module
from torch.nn.modules import module as torch_modules
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import component_setup

from av_lens.families.blocks import TowerBridge

KINDS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
_OF_A_MODULE = tuple(f"_{kind}" for kind in KINDS)
_OF_ALL = tuple(f"_global_{kind}" for kind in KINDS)


@dataclass(frozen=True, eq=False)
class StandingHook:
    """One function in one place.

    Attributes:
        module: where it stands; None for torch's global hooks, which stand everywhere.
        kind: one of `KINDS`, or "forward" for a `forward` that was written over.
        function: the caller's function.
        in_tower: whether the module belongs to an encoder, which is run as always before a restart begins.
    """

    module: Module | None
    kind: str
    function: Any
    in_tower: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others; valid while this object lives, which holds the module and the function."""
        fn = self.function
        own = (id(fn.__self__), id(fn.__func__)) if isinstance(fn, MethodType) else (id(fn),)
        return (id(self.module), self.kind, *own)


Standing = tuple[StandingHook, ...]


def standing_hooks(model: Any) -> Standing:
    """Find every function that stands on a model, TransformerLens's own wiring apart."""
    found = [
        StandingHook(None, kind, function)
        for kind, table in zip(KINDS, _OF_ALL, strict=True)
        for function in getattr(torch_modules, table, {}).values()
    ]
    seen, waiting = set[int](), [(model.hf_model, False), (model.bridge, False)]
    while waiting:
        module, in_tower = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        if any(map(own.__getitem__, _OF_A_MODULE)) or "forward" in own:
            found.extend(_standing_on(module, in_tower))
        children = own["_modules"]
        if children:
            in_tower = in_tower or isinstance(module, TowerBridge)
            waiting += [(child, in_tower) for child in children.values() if child is not None]
    return tuple(found)


def _standing_on(module: Module, in_tower: bool) -> Iterator[StandingHook]:
    handles = [*module.fwd_hooks, *module.bwd_hooks] if isinstance(module, HookPoint) else []
    callers = {handle.hook.id: handle.user_hook for handle in handles if handle.user_hook is not None}
    for kind, table in zip(KINDS, _OF_A_MODULE, strict=True):
        for number, function in getattr(module, table).items():
            function = callers.get(number, function)  # TransformerLens wraps what it is given
            if getattr(function, "__module__", "") != component_setup.__name__:
                yield StandingHook(module, kind, function, in_tower)
    if "forward" in module.__dict__:
        yield StandingHook(module, "forward", module.__dict__["forward"], in_tower)


def hook_numbers(root: Module) -> tuple[int, ...]:
    """Torch's own numbers of all hooks on a module and below it; no number is ever given again."""
    return tuple(number for part in root.modules() for table in _OF_A_MODULE for number in part.__dict__[table])


def same_hooks(first: Standing, second: Standing) -> bool:
    """Say whether the same functions stand in the same places."""
    return len(first) == len(second) and all(a.key == b.key for a, b in zip(first, second, strict=True))


def places(model: Any, standing: Standing, *, most: int = 3) -> str:
    """Name where functions stand."""
    if not standing:
        return "nothing"
    names = {id(module): name for name, module in [*model.hf_model.named_modules(), *model.bridge.named_modules()]}

    def name_of(hook: StandingHook) -> str:
        if hook.module is None:
            return "all modules (torch's global hooks)"
        point = hook.module.name if isinstance(hook.module, HookPoint) else None
        return point or names.get(id(hook.module), "") or type(hook.module).__name__

    named = list(dict.fromkeys(name_of(hook).replace("._original_component", "") for hook in standing))
    more = len(named) - most
    return ", ".join(named[:most]) + (f" and {more} more place{'s' if more > 1 else ''}" if more > 0 else "")
