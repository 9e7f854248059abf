"""What does the model do when some heads are edited already? Runs that start from an edited run.

The search for sets asks the same question about many sets that share members. An edited run is therefore made once and
kept like a recorded one (`Engine.record_edited`), and every further edit restarts there, at the further head's own
layer, instead of at the first layer of the whole set. Members of a set are measured in the same way, on the run in
which the other members are edited.

`further` makes edits on top of an edited run: `Recording.kept["under"]` names the edits that it was made with, and
those at the further edit's layer or after it are made once more, since a restart computes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.execution import logits_of
from av_lens.core.unembedding import unembedded
from av_lens.families.hook_names import hook_name
from av_lens.interventions import CompiledPlan, Plan
from av_lens.isolation.measuring.seam import Engine, Recording, Swap
from av_lens.replay.rerun import rerun, start_of
from av_lens.replay.taps import Taps
from av_lens.replay.traces import Trace

UNDER = "under"


class _Keeping(Taps):
    """Taps that keep every layer's z, after its edits."""

    def __init__(self, plan: CompiledPlan, offset: int) -> None:
        super().__init__([plan], offset)
        self.z: dict[int, Tensor] = {}

    def __call__(self, component: str, layer: int | None, activation: Tensor, rows: slice | None = None) -> Tensor:
        """Apply the edits at one place, and keep z.

        Args:
            component: the component.
            layer: its layer.
            activation: `[plan, batch, ...]`.
            rows: which of the restart's rows these are; None for all.

        Returns:
            The edited activation.
        """
        found = super().__call__(component, layer, activation, rows)
        if component == "z" and layer is not None:
            self.z[layer] = found[0]
        return found


def _rerun(trace: Trace, plan: Plan) -> tuple[Trace, dict[int, Float[Tensor, "batch pos head d_head"]], int]:
    """Run a plan on a recorded input: the edited run's trace, every recomputed layer's z, and from where it is new."""
    trace.require_standing()
    compiled = plan.compile(trace.model.spec, trace.spans, batch=trace.batch)
    start = start_of(trace, compiled)
    taps = _Keeping(compiled, start)
    edited = rerun(trace, taps)
    compiled.verify()
    return edited, taps.z, start


def record_edited(engine: Any, recording: Recording, swap: Swap) -> Recording:
    """Run a recording's inputs under a swap, so that further edits can be made on top (`further`).

    Args:
        engine: a `ModelEngine`.
        recording: the run that is edited; it may be an edited run itself.
        swap: the heads and their new z; not frozen.

    Returns:
        The edited run: every head's z from the site on, and what further restarts need.
    """
    trace = None
    if engine.how == "trace":
        trace = recording.kept.get("trace")
        if trace is None:
            trace = recording.kept["trace"] = engine.model.trace(recording.inputs)
    whole = joined(recording, swap)
    if trace is None or trace.hooked_because:
        return _hooked(engine, recording, whole)
    restart = min(layer for layer, _ in swap.heads) if trace.own is not None else 0
    edited, z, start = _rerun(trace, engine.plan(recording, joined(recording, swap, from_layer=restart)))
    final = edited.stream(edited.n_layers, int(recording.window[-1]))[:, 0]
    with torch.no_grad():
        logits = unembedded(engine.model, final).float()
    inside = torch.from_numpy(recording.window - start).to(final.device)
    below = [recording.z[layer] for layer in range(edited.n_layers - len(z))]
    stacked = torch.stack([*below, *(z[layer][:, inside] for layer in sorted(z))])
    kept = {"trace": edited, UNDER: whole}
    return Recording(recording.inputs, recording.site, recording.window, logits, stacked, final, kept)


def _hooked(engine: Any, recording: Recording, whole: Swap) -> Recording:
    """Run the whole model under edits: the slow way, and the only one where nothing restarts."""
    model = engine.model
    asked, first = int(recording.window[-1]), int(recording.window[0])
    z: dict[int, Tensor] = {}
    final: list[Tensor] = []

    def keep(layer: int) -> Any:
        def fn(activation: Tensor, hook: Any = None) -> None:
            del hook
            z[layer] = activation[:, first : asked + 1].detach().clone()

        return fn

    def keep_final(activation: Tensor, hook: Any = None) -> None:
        del hook
        final.append(activation[:, asked].detach().clone())

    layers = range(model.spec.n_layers)
    compiled = engine.plan(recording, whole).compile(model.spec, recording.inputs.spans)
    hooks = [*compiled.fwd_hooks, *((hook_name("z", layer), keep(layer)) for layer in layers)]
    hooks.append((hook_name("resid_post", model.spec.n_layers - 1), keep_final))
    with torch.no_grad():
        logits = logits_of(model, recording.inputs, hooks, torch.tensor([asked]))[:, 0].float().clone()
    compiled.verify()
    stacked = torch.stack([z[layer] for layer in layers])
    kept = {name: value for name, value in recording.kept.items() if name == "trace"} | {UNDER: whole}
    return Recording(recording.inputs, recording.site, recording.window, logits, stacked, final[0], kept)


def joined(recording: Recording, swap: Swap, *, from_layer: int = 0) -> Swap:
    """Join further edits to those that a run was made with.

    Args:
        recording: a run, edited or not.
        swap: the further edits; a head that is edited in both takes the new z.
        from_layer: leave the run's own edits below this layer out.

    Returns:
        The heads with their z, and frozen if `swap` is.
    """
    under: Swap | None = recording.kept.get(UNDER)
    values = {} if under is None else dict(zip(under.heads, under.values, strict=True))
    values = {head: value for head, value in values.items() if head[0] >= from_layer}
    values |= dict(zip(swap.heads, swap.values, strict=True))
    batch = recording.z.shape[1]  # a value that all conflicts share (zero) stands beside one for each
    return Swap(tuple(values), tuple(z.expand(batch, -1, -1) for z in values.values()), freeze=swap.freeze)


def _thawed(recording: Recording, swap: Swap) -> Swap:
    """Write a frozen swap out: all later heads get the recording's own z, head by head."""
    first = min(layer for layer, _ in swap.heads)
    own, (n_layers, n_heads) = recording.site_z, (recording.z.shape[0], recording.z.shape[3])
    values = {(layer, head): own[layer, :, :, head] for layer in range(first + 1, n_layers) for head in range(n_heads)}
    shared = tuple(z.expand(recording.z.shape[1], -1, -1) for z in swap.values)
    return Swap((*swap.heads, *values), (*shared, *values.values()))


def further(engine: Engine, recording: Recording, swaps: Sequence[Swap]) -> Iterator[Float[Tensor, "batch d_vocab"]]:
    """Edit a run that may have been edited already.

    Args:
        engine: what runs the model.
        recording: from `Engine.record` or `Engine.record_edited`.
        swaps: the further edits, each its own run.

    Yields:
        The logits at the asked position, in the order of the swaps.
    """
    if UNDER not in recording.kept:
        yield from engine.edited(recording, swaps)
    elif getattr(recording.kept.get("trace"), "own", None) is not None:
        first = [min(layer for layer, _ in swap.heads) for swap in swaps]
        whole = [joined(recording, swap, from_layer=layer) for swap, layer in zip(swaps, first, strict=True)]
        yield from engine.edited(recording, whole)
    elif recording.site[-1] != recording.window[-1] and any(swap.freeze for swap in swaps):
        for swap in swaps:  # frozen, no head's write at the site reaches the asked position
            whole = joined(recording, swap)
            yield from [recording.logits] if swap.freeze else engine.edited(recording, [whole])
    else:
        thawed = [_thawed(recording, swap) if swap.freeze else swap for swap in swaps]
        yield from engine.edited(recording, [joined(recording, swap) for swap in thawed])
