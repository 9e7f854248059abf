"""Run a model once: with a plan, keeping chosen activations, giving the logits that were asked for.

`run` is the plain verb under everything else: one forward, checked before it is paid for, with a record that every edit
fired. What it keeps is named by component (`"z"`), by site (`Site("z", 5, head=3, positions="generation")`, only that
slice is kept) or by a hook's name; the memory is estimated first and refused beyond `budget_gb`.

    >>> out = run(model, x, plan=Plan(zero(Site("z", 5, head=3))), capture=["z", "pattern"])  # doctest: +SKIP
    >>> out.logits[:, -1], out.cache["z", 5], out.fired                                     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from av_lens.brief import Brief
from av_lens.core.activations import asked_positions, rows_of, watching
from av_lens.core.budget import GIGABYTE, ModelSpec, require_budget, selected
from av_lens.core.gates import only_open, require_some
from av_lens.core.kept import Kept
from av_lens.core.standing_hooks import standing_hooks
from av_lens.core.tokens import require_inputs
from av_lens.errors import BudgetError, InterventionError, unknown
from av_lens.families.attention import BUDGET_GB
from av_lens.families.hook_names import COMPONENTS, hook_name, layer_names
from av_lens.interventions import Plan, Site
from av_lens.interventions.sites import Positions, resolve_positions
from av_lens.spans import Span, SpanMap

Capture = str | Site | Sequence[str | Site] | Callable[[str], bool] | None


@dataclass(frozen=True, eq=False, repr=False)
class Run(Brief):
    """What one run gave.

    Attributes:
        logits: at the asked positions.
        cache: what was kept, by hook name or `cache["z", 5]`, after the plan's edits; a site keeps its own slice.
        fired: how often each edit fired: `(number of the edit, hook name) -> count`.
        asked: the positions of `logits`.
    """

    logits: Float[Tensor, "batch asked_pos d_vocab"]
    cache: ActivationCache
    fired: Mapping[tuple[int, str], int]
    asked: tuple[int, ...]


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


def logits_of(
    model: Any,
    x: Any,
    hooks: Sequence[tuple[str, Callable[..., Any]]],
    rows: Tensor,
    *,
    budget_gb: float | int = BUDGET_GB,
) -> Tensor:
    """Run the model under hooks and unembed the asked positions only.

    The logits of every position of a real prompt are larger than all its layers' activations together, so the other
    positions are dropped before the unembedding, unless a hook looks there: one of these, or one that stands on the
    model.
    """
    rows = rows.to(model.device)
    if len(rows) == len(x.spans) or any(name.startswith("unembed") for name, _ in hooks) or _shown_logits(model):
        return model.run_with_hooks(x, fwd_hooks=list(hooks), budget_gb=budget_gb)[:, rows]

    # Never one row alone, which lower precisions multiply by another kernel and round otherwise.
    kept = rows if len(rows) > 1 or len(x) > 1 else torch.cat((rows, rows))
    kept_hooks = [*hooks, ("unembed.hook_in", rows_of(kept))]
    return model.run_with_hooks(x, fwd_hooks=kept_hooks, budget_gb=budget_gb)[:, : len(rows)]


def _keep(kept: dict[str, Tensor], name: str, part: Any, activation: Tensor) -> None:
    kept[name] = part.cut(activation)


def _shown_logits(model: Any) -> bool:
    """Whether a function of the caller's stands where it is shown logits, so that it must see all positions."""
    shown = {id(module) for module in (model.hf_model, model.bridge, *model.bridge.unembed.modules())}
    return any(hook.module is None or id(hook.module) in shown for hook in standing_hooks(model))


@dataclass(frozen=True)
class Slice:
    """Which part of a hook's activation is kept.

    Attributes:
        site: the site, or None for the whole activation.
        positions: the site's positions, resolved.
    """

    site: Site | None = None
    positions: Positions | None = None

    def cut(self, activation: Tensor) -> Tensor:
        """Cut the part out."""
        if self.site is None or self.positions is None:
            return activation
        component = COMPONENTS[self.site.component]
        if not self.positions.everything:
            index = torch.tensor(self.positions.index, device=activation.device)
            activation = activation.index_select(component.pos_axis, index)
        if self.site.heads is not None and component.head_axis is not None:
            index = torch.tensor(self.site.heads, device=activation.device)
            activation = activation.index_select(component.head_axis, index)
        return activation


def capture_slices(model: Any, spans: SpanMap, capture: Capture) -> dict[str, Slice]:
    """Resolve what is to be kept to hooks and slices."""
    if capture is None:
        return {}
    known: tuple[str, ...] = tuple(model.hook_dict)
    if callable(capture):
        names = selected(capture, known)
        require_some(names, known)
        every = len(names) == len(known)  # a sweep, not a wish for gated hooks
        return {name: Slice() for name in (selected(only_open(model.bridge, capture), known) if every else names)}
    listed = [capture] if isinstance(capture, str | Site) else list(capture)
    require_some(listed, known)
    found: dict[str, Slice] = {}
    for item in listed:
        if isinstance(item, Site):
            item.check(model.spec)
            name = hook_name(item.component, item.layer)
            if name in found:
                raise InterventionError(f"capture names {name} twice; keep the whole hook and slice it afterwards.")
            found[name] = Slice(item, resolve_positions(item.positions, spans, what=f"capture of {item.component}"))
        elif item in COMPONENTS:
            layered = COMPONENTS[item].layered
            found |= {n: Slice() for n in (layer_names(item, model.spec.n_layers) if layered else (hook_name(item),))}
        elif item in known:
            found[item] = Slice()
        else:
            raise InterventionError(unknown("component or hook", item, (*COMPONENTS, *known)))
    return found


def _require_memory(wanted: Mapping[str, Slice], model: Any, x: Any, budget_gb: float | int) -> None:
    """Estimate what is kept, whole hooks and slices, and refuse beyond the budget."""
    batch, n = len(x), len(x.spans)
    itemsize = next(iter(model.parameters())).element_size()
    whole = [name for name, part in wanted.items() if part.site is None]
    require_budget(whole, model.spec, batch=batch, n_pos=n, itemsize=itemsize, budget_gb=budget_gb)
    sliced = sum(slice_bytes(part, model.spec, batch=batch, n_pos=n, itemsize=itemsize) for part in wanted.values())
    if sliced > budget_gb * GIGABYTE:
        raise BudgetError(
            f"the captured sites need about {sliced / GIGABYTE:.3g} GB, beyond budget_gb={budget_gb:g}. Name fewer "
            "layers, heads or positions, or stack fewer examples."
        )


def slice_bytes(part: Slice, spec: ModelSpec, *, batch: int, n_pos: int, itemsize: int) -> int:
    """Estimate what keeping one site takes."""
    if part.site is None or part.positions is None:
        return 0
    heads = len(part.site.heads) if part.site.heads is not None else part.site.n_heads(spec)
    last = part.site.axes[-1]
    width = n_pos if last == "key_pos" else 1 if last == "one" else int(getattr(spec, last))
    return batch * len(part.positions) * max(heads, 1) * width * itemsize
