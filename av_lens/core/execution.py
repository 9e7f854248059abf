"""Run a model once: with a plan, gated hooks open for that run alone, keeping what was asked; and which hooks stand.

`standing_hooks` looks at all roads by which a function of the caller's can enter a run (`docs/replay.md` lists them).
Two states are equal where the same functions stand in the same places in the same order, whatever they do. Not seen: a
function that keeps its identity and changes its mind, and modules whose class was changed.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as torch_modules
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import component_setup
from transformers.utils import output_capturing

from av_lens.brief import Brief
from av_lens.core.budget import GIGABYTE, ModelSpec, require_budget, selected
from av_lens.core.calls import Kept, asked_positions, require_inputs, rows_of, watching
from av_lens.errors import BudgetError, InterventionError, unknown
from av_lens.families.adapter import TowerBridge
from av_lens.families.blocks import BUDGET_GB
from av_lens.families.decoder import COMPONENTS, GATES, gates_named, hook_name, layer_names
from av_lens.interventions import Plan, Site
from av_lens.interventions.edits import Positions, resolve_positions, width_of
from av_lens.spans import Span, SpanMap

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
    """The switches a filter asks for: of a function the gated hooks that it accepts, unless it accepts every hook."""
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


KINDS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
_WIRING = (component_setup.__name__, output_capturing.__name__)  # TransformerLens's, and HuggingFace's recorders
_OF_A_MODULE = tuple(f"_{kind}" for kind in KINDS)


@dataclass(frozen=True, eq=False)
class StandingHook:
    """One function in one place."""

    module: Module | None  # where it stands; None for torch's global hooks, which stand everywhere
    kind: str  # one of `KINDS`, or "forward" for a `forward` that was written over
    function: Any  # the caller's function
    in_tower: bool = False  # whether the module belongs to an encoder, which is run as always before a restart begins

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others; valid while this object lives, which holds the module and the function."""
        fn = self.function
        own = (id(fn.__self__), id(fn.__func__)) if isinstance(fn, MethodType) else (id(fn),)
        return (id(self.module), self.kind, *own)


Standing = tuple[StandingHook, ...]


def standing_hooks(model: Any) -> Standing:
    """Find every function that stands on a model, TransformerLens's and HuggingFace's own wiring apart."""
    found = [
        StandingHook(None, kind, function)
        for kind in KINDS
        for function in getattr(torch_modules, f"_global_{kind}", {}).values()
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
    for kind in KINDS:
        for number, function in getattr(module, f"_{kind}").items():
            function = callers.get(number, function)  # TransformerLens wraps what it is given
            if getattr(function, "__module__", "") not in _WIRING:
                yield StandingHook(module, kind, function, in_tower)
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:  # accelerate's, which only moves tensors
        yield StandingHook(module, "forward", module.__dict__["forward"], in_tower)


def hook_numbers(root: Module) -> tuple[int, ...]:
    """Torch's own numbers of all hooks on a module and below it; no number is ever given again."""
    return tuple(number for part in root.modules() for table in _OF_A_MODULE for number in part.__dict__[table])


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


Capture = str | Site | Sequence[str | Site] | Callable[[str], bool] | None


@dataclass(frozen=True, eq=False, repr=False)
class Run(Brief):
    """What one run gave."""

    logits: Float[Tensor, "batch asked_pos d_vocab"]  # at the asked positions
    # what was kept, by hook name or `cache["z", 5]`, after the plan's edits; a site keeps its own slice
    cache: ActivationCache
    fired: Mapping[tuple[int, str], int]  # how often each edit fired: `(number of the edit, hook name) -> count`
    asked: tuple[int, ...]  # the positions of `logits`


def run(
    model: Any,
    x: Any,
    *,
    plan: Plan | None = None,
    capture: Capture = None,
    logits_at: str | Span = "generation",
    budget_gb: float | int = BUDGET_GB,
) -> Run:
    """Run the model once.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, one example or a stack.
        plan: edits and cuts to be made.
        capture: what to keep: components, sites, hook names, several of them, or a function of a hook's name.
        logits_at: "generation", "all", another role, or a `Span`.
        budget_gb: memory for what is kept, and for a layer's attention scores (GB, 1e9 bytes).

    Returns:
        The run. Gradients flow as the caller's grad mode says.

    Raises:
        InterventionError: the plan or a site does not fit, an unknown hook, or an edit that did not fire.
        BudgetError: what is to be kept, or whole scores that it needs, take more memory than the budget; the message
            says how much.
    """
    require_inputs("run", x)
    spec: ModelSpec = model.spec
    compiled = (plan or Plan()).compile(spec, x.spans, batch=len(x))
    rows = asked_positions(x.spans, logits_at)
    wanted = capture_slices(model, x.spans, capture)
    _require_memory(wanted, model, x, budget_gb)
    kept: dict[str, Tensor] = {}
    looks = ((name, watching(partial(_keep, kept, name, part))) for name, part in wanted.items())
    hooks = [*compiled.fwd_hooks, *looks]
    logits = logits_of(model, x, hooks, rows, budget_gb=budget_gb)
    compiled.verify()
    missing = [name for name in wanted if name not in kept]
    if missing:
        raise InterventionError(f"the run never passed through {missing[0]}: this model does not use that hook.")
    return Run(logits, Kept(kept, model.bridge), compiled.fired, tuple(rows.tolist()))


def _keep(kept: dict[str, Tensor], name: str, part: Any, activation: Tensor) -> None:
    kept[name] = activation if part is None else part.cut(activation)


def logits_of(
    model: Any,
    x: Any,
    hooks: Sequence[tuple[str, Callable[..., Any]]],
    rows: Tensor,
    *,
    budget_gb: float | int = BUDGET_GB,
) -> Tensor:
    """Run the model under hooks and unembed the asked positions only, unless a hook looks at the unembedding."""
    rows = rows.to(model.device)
    shown = {id(module) for module in (None, model.hf_model, model.bridge, *model.bridge.unembed.modules())}
    looks = any(name.startswith("unembed") for name, _ in hooks)
    if len(rows) == len(x.spans) or looks or any(id(hook.module) in shown for hook in standing_hooks(model)):
        return model.run_with_hooks(x, fwd_hooks=list(hooks), budget_gb=budget_gb)[:, rows]

    # Never one row alone, which lower precisions multiply by another kernel and round otherwise.
    kept = rows if len(rows) > 1 or len(x) > 1 else torch.cat((rows, rows))
    kept_hooks = [*hooks, ("unembed.hook_in", rows_of(kept))]
    return model.run_with_hooks(x, fwd_hooks=kept_hooks, budget_gb=budget_gb)[:, : len(rows)]


@dataclass(frozen=True)
class Slice:
    """Which part of a hook's activation is kept."""

    site: Site  # the site
    positions: Positions  # the site's positions, resolved

    def cut(self, activation: Tensor) -> Tensor:
        """Cut the part out."""
        component = COMPONENTS[self.site.component]
        if not self.positions.everything:
            index = torch.tensor(self.positions.index, device=activation.device)
            activation = activation.index_select(component.pos_axis, index)
        if self.site.heads is not None and component.head_axis is not None:
            index = torch.tensor(self.site.heads, device=activation.device)
            activation = activation.index_select(component.head_axis, index)
        return activation


def capture_slices(model: Any, spans: SpanMap, capture: Capture) -> dict[str, Slice | None]:
    """Resolve what is to be kept to hooks and slices; None for a whole activation."""
    if capture is None:
        return {}
    known: tuple[str, ...] = tuple(model.hook_dict)
    if callable(capture):
        names = selected(capture, known)
        require_some(names, known)
        every = len(names) == len(known)  # a sweep, not a wish for gated hooks
        return dict.fromkeys(selected(only_open(model.bridge, capture), known) if every else names)
    listed = [capture] if isinstance(capture, str | Site) else list(capture)
    require_some(listed, known)
    found: dict[str, Slice | None] = {}
    for item in listed:
        if isinstance(item, Site):
            item.check(model.spec)
            name = hook_name(item.component, item.layer)
            if name in found:
                raise InterventionError(f"capture names {name} twice; keep the whole hook and slice it afterwards.")
            found[name] = Slice(item, resolve_positions(item.positions, spans, what=f"capture of {item.component}"))
        elif item in COMPONENTS:
            layered = COMPONENTS[item].layered
            found |= dict.fromkeys(layer_names(item, model.spec.n_layers) if layered else (hook_name(item),))
        elif item in known:
            found[item] = None
        else:
            raise InterventionError(unknown("component or hook", item, (*COMPONENTS, *known)))
    return found


def _require_memory(wanted: Mapping[str, Slice | None], model: Any, x: Any, budget_gb: float | int) -> None:
    """Estimate what is kept, whole hooks and slices, and refuse beyond the budget."""
    batch, n = len(x), len(x.spans)
    itemsize = model.dtype.itemsize
    whole = [name for name, part in wanted.items() if part is None]
    require_budget(whole, model.spec, batch=batch, n_pos=n, itemsize=itemsize, budget_gb=budget_gb)
    slices = [part for part in wanted.values() if part is not None]
    sliced = sum(slice_bytes(part, model.spec, batch=batch, n_pos=n, itemsize=itemsize) for part in slices)
    if sliced > budget_gb * GIGABYTE:
        raise BudgetError(
            f"the captured sites need about {sliced / GIGABYTE:.3g} GB, beyond budget_gb={budget_gb:g}. Name fewer "
            "layers, heads or positions, or stack fewer examples."
        )


def slice_bytes(part: Slice, spec: ModelSpec, *, batch: int, n_pos: int, itemsize: int) -> int:
    """Estimate what keeping one site takes."""
    heads = len(part.site.heads) if part.site.heads is not None else part.site.n_heads(spec)
    return batch * len(part.positions) * max(heads, 1) * width_of(part.site, spec, n_pos) * itemsize
