"""Round the layers: the one loop that runs them, from (layer, position) on, many plans at once, each with its edits.

Plans join the stack at their own first layer. What the joining plans share is computed once: their row is *folded*
until the first edit among them is met, and then *spread*, one row for each (`Taps`). The layers are computed from the
model's own weights, without hooks, which would cost more than the arithmetic; the edits are the same code in both.

Below float32 there are two ways (`record.flash`). *Eager*: all scores are written out, and every operation is the
hooked run's own, in its order, so that an edit which changes nothing changes nothing (to the bit wherever the device's
products do not depend on how many rows are multiplied together). *Flash*: `cascade` as in float32, whose rounding is
finer but not the same: an edit which changes nothing moves logits by their last places.

A restart must first reproduce a hooked run, and then makes the records too (`traces.record`, `docs/replay.md`). Eager
records of lower precision are made with hooks: a restart keeps to their order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.calls import unembedded
from av_lens.families.decoder import Layer, Read, attended
from av_lens.interventions import CompiledPlan, Plan, Step
from av_lens.replay.recording import Own, Record, Window, additive, cascade, entering, fields_of, place_of


class Taps:
    """The edits of several plans by place, and a stack's plan axis; `offset` is the first row's absolute position."""

    def __init__(self, plans: Sequence[CompiledPlan], offset: int, *, decoding: bool = False) -> None:
        self.offset = offset
        self.active = len(plans) if decoding else 0
        self.joining = 0
        self._firsts = [0 if decoding else max(plan.first_layer, 0) for plan in plans]
        self._places: dict[tuple[str, int | None], list[tuple[int, Step]]] = {}
        for number, plan in enumerate(plans):
            for step in plan.steps:
                if step.in_decode or not decoding:
                    self._places.setdefault((step.component, step.layer), []).append((number, step))

    @property
    def first_layer(self) -> int:
        """Where the first plan joins."""
        return self._firsts[0]

    def enter(self, layer: int, stream: Tensor | None, recorded: Tensor) -> Tensor:
        """Let the plans that start at a layer join."""
        self.active += self.joining
        self.joining = self._firsts.count(layer)
        if not self.joining:
            assert stream is not None
            return stream
        return recorded[None].clone() if stream is None else torch.cat((stream, recorded[None]))

    def has(self, layer: int, components: Sequence[str]) -> bool:
        """Say whether any plan edits one of these components."""
        return any((component, layer) in self._places for component in components)

    def rowwise(self, layer: int, components: Sequence[str]) -> bool:
        """Say whether these components' edits may see some of their rows alone."""
        return all(step.rowwise for name in components for _, step in self._places.get((name, layer), ()))

    def spread(self, activation: Tensor) -> Tensor:
        """Give every joining plan its own row."""
        if self.joining < 2 or activation.shape[0] == self.active + self.joining:
            return activation
        joined = activation[self.active :].expand(self.joining, *activation.shape[1:])
        return torch.cat((activation[: self.active], joined))

    def matched(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Bring two activations to one plan axis."""
        return (first, second) if first.shape[0] == second.shape[0] else (self.spread(first), self.spread(second))

    def complete(self, activation: Tensor, recorded: Tensor) -> Tensor:
        """Give every plan of the stack its own row, also those that join at a later layer."""
        spread = self.spread(activation)
        missing = len(self._firsts) - spread.shape[0]
        return torch.cat((spread, recorded.expand(missing, *recorded.shape))) if missing else spread

    def __call__(self, component: str, layer: int | None, activation: Tensor, rows: slice | None = None) -> Tensor:
        """Apply the edits at one place; `rows` says which of the restart's rows these are; None for all."""
        steps = self._places.get((component, layer))
        if not steps:
            return activation
        if steps[-1][0] >= self.active:
            activation = self.spread(activation)
        start = self.offset if rows is None else self.offset + rows.start
        for number, step in steps:
            fired = step.fired
            step(activation[number], start)
            if rows is not None and step.fired == fired:
                step.fired += step.in_prompt  # its rows change nothing that was asked for, and were not computed
        return activation


EDGES = ("scores", "pattern")
IN_MLP = ("mlp_in", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post")
AFTER_KEYS = ("q", "rot_q", *EDGES, "z", "result", "attn_out", "resid_mid", *IN_MLP)
RESTARTABLE = frozenset(("embed", "resid_pre", "k", "v", "rot_k", *AFTER_KEYS))
"""The components at which a restart can apply edits."""


@dataclass(frozen=True, eq=False)
class Made:
    """What one layer made."""

    stream: Tensor  # the stream after it, `[plan, batch, row, d_model]`
    keys: Tensor  # the rotated keys of every new position, `[plan, batch, pos, kv_head, d_head]`
    values: Tensor  # the values, likewise
    # those that each row went through, `[plan, batch, row, chosen]`; None where the layer has one MLP
    experts: Tensor | None = None


def run_layer(
    layer: Layer,
    number: int,
    stream: Float[Tensor, "plan batch pos d_model"],
    past: tuple[Float[Tensor, "batch kv_head past d_head"], Float[Tensor, "batch kv_head past d_head"]],
    window: Window,
    taps: Taps,
    rows: slice | None = None,
    earlier: tuple[Float[Tensor, "_plan batch old kv_head d_head"], Float[Tensor, "_plan batch old kv_head d_head"]]
    | None = None,
) -> Made:
    """Run a layer on all plans' restarted positions, the stream at `rows` alone; `earlier`: own keys while decoding."""
    if number == 0:
        stream = taps("embed", None, stream)
    stream = taps("resid_pre", number, stream)
    normed = layer.ln1(stream)
    fused = stream.dtype == torch.float32  # below it each product is rounded, as in the hooked run
    k = taps("k", number, layer.heads("k", normed))
    k = taps("rot_k", number, layer.turned("k", k, window.cos, window.sin, fused=fused))
    v = taps("v", number, layer.heads("v", normed))
    k, v = taps.matched(k, v)
    if earlier is not None:
        new = taps.spread(k), taps.spread(v)
        k, v = (torch.cat((old[: len(one)], one), dim=2) for old, one in zip(earlier, new, strict=True))
    part = rows if taps.rowwise(number, AFTER_KEYS) else None
    cut = part or slice(0, stream.shape[2])
    # Contiguous: a projection of strided rows would round its bias apart.
    normed, stream = normed[:, :, cut].contiguous(), stream[:, :, cut]
    cos, sin = window.cos[:, cut], window.sin[:, cut]
    q = taps("q", number, layer.heads("q", normed), part)
    q = taps("rot_q", number, layer.turned("q", q, cos, sin, fused=fused), part)
    if taps.has(number, EDGES):
        q, k, v = (taps.spread(part) for part in (q, k, v))
    q, k = taps.matched(q, k)
    q, v = taps.matched(q, v)
    if taps.has(number, EDGES) or not window.flash:
        z = _explicit(layer, number, q, (k, v), past, window, taps, part)
    else:
        z = cascade(q, (k, v), past, window, cut, layer.scaling)
    attended = taps("attn_out", number, _written(layer, number, taps("z", number, z, part), taps, part), part)
    stream, attended = taps.matched(stream, attended)
    stream = taps("resid_mid", number, stream + attended, part)
    written, experts = _mlp(layer, number, stream, taps, part, window)
    stream, added = taps.matched(stream, written)
    stream = taps.spread(taps("resid_post", number, stream + added, part))
    if rows is not None and part is None:
        stream = stream[:, :, rows]
    return Made(stream, k, v, experts)


def _explicit(
    layer: Layer,
    number: int,
    q: Tensor,
    own: tuple[Tensor, Tensor],
    past: tuple[Tensor, Tensor],
    window: Window,
    taps: Taps,
    rows: slice | None,
) -> Tensor:
    """Attention with scores and pattern written out and shown to the plans; `z` `[plan, batch, row, head, d_head]`."""
    shown = rows or slice(None)
    queries, k, v = (part.transpose(2, 3) for part in (q, *own))
    read = [Read(k, v, window.own_mask[:, :, shown], _on_own)]
    if window.start:
        mask = window.prefix_mask
        read.insert(0, Read(*past, None if mask is None else mask[:, :, shown], _on_past))
    whole = None
    if q.dtype != torch.float32:  # one sum over all keys, rounded once
        whole = Read(k, torch.cat((past[1].expand(len(v), *past[1].shape), v), dim=3), times=_on_own)
    apart = torch.is_grad_enabled()  # softmax keeps its result for the gradient: edits write elsewhere
    z, _ = attended(
        queries,
        read,
        layer.scaling,
        scores=lambda one: taps("scores", number, one, rows),
        pattern=lambda one: taps("pattern", number, one.clone() if apart else one, rows),
        values=whole,
    )
    return z.transpose(2, 3).contiguous()


def _on_own(left: Tensor, own: Tensor) -> Tensor:
    """The product of each head's `[plan, batch, head, row, _]` with its plan's `[plan, batch, kv_head, _, _]`."""
    grouped = left.unflatten(2, (own.shape[2], -1))
    return (grouped.flatten(3, 4) @ own).unflatten(3, grouped.shape[3:5]).flatten(2, 3)


def _on_past(left: Tensor, past: Tensor) -> Tensor:
    """The same with what all plans share, `[batch, kv_head, _, _]`: plans become rows, and nothing is copied."""
    grouped = left.unflatten(2, (past.shape[1], -1)).movedim(0, 2)
    found = grouped.flatten(2, 4) @ past
    return found.unflatten(2, grouped.shape[2:5]).movedim(2, 0).flatten(2, 3)


def _written(layer: Layer, number: int, z: Tensor, taps: Taps, rows: slice | None) -> Tensor:
    """Project heads back to the stream; `result` is edited as a difference, as the hooked attention does."""
    written = layer.write(z)
    if taps.has(number, ("result",)):
        before = layer.results(z)
        after = taps("result", number, before.clone(), rows)
        after, before = taps.matched(after, before)
        change = (after - before).sum(3, dtype=torch.float32).to(written.dtype)
        written, change = taps.matched(written, change)
        written = written + change
    return written


def _mlp(
    layer: Layer, number: int, stream: Tensor, taps: Taps, rows: slice | None, window: Window
) -> tuple[Tensor, Tensor | None]:
    """What the MLP writes, and the experts that it was, where there are some."""
    entering = taps("mlp_in", number, stream.clone(), rows) if taps.has(number, ("mlp_in",)) else stream
    if layer.experts is None:
        written = layer.mlp(layer.ln2(entering), lambda name, one: taps(name, number, one, rows), taps.matched)
        return taps("mlp_out", number, written, rows), None
    chosen: list[Tensor] = []
    written = layer.mlp(layer.ln2(entering), partial(_choose, chosen, window.experts.get(number), rows))
    return taps("mlp_out", number, written, rows), chosen[0]


def _choose(chosen: list[Tensor], frozen: Tensor | None, rows: slice | None, name: str, own: Tensor) -> Tensor:
    """The router's own choice, or the frozen one; it is kept."""
    chosen.append(own if frozen is None else frozen[:, rows or slice(None)].to(own.device).expand_as(own))
    return chosen[0]


R = TypeVar("R", bound=Record)
Heads = tuple[Tensor, Tensor]


def layers(model: Any, first: int = 0, *, backwards: bool = False) -> Iterator[tuple[int, Layer]]:
    """Every layer from one on, with its number."""
    blocks = model.bridge.blocks
    numbers = range(first, len(blocks))
    for number in reversed(numbers) if backwards else numbers:
        yield number, Layer.of(blocks[number])


def layer_of(model: Any, number: int) -> Layer:
    """One layer."""
    return Layer.of(model.bridge.blocks[number])


def run_layers(
    model: Any,
    window: Window,
    taps: Taps,
    enter: Callable[[int, Tensor | None], Tensor],
    past: Callable[[int], Heads],
    *,
    rows: slice | None = None,
    earlier: Sequence[Heads] | None = None,
) -> Iterator[tuple[int, Made]]:
    """Run the layers from the plans' first on: each layer's number, and what it made, the last one's at `rows` alone.

    `enter` says what enters a layer (given what left the one before, or None), `past` its recorded keys and values.
    """
    stream: Tensor | None = None
    last, windows = model.spec.n_layers - 1, {window.cos.device: window}
    for number, layer in layers(model, taps.first_layer):
        place = place_of(model, number)
        here = windows[place] = windows[place] if place in windows else window.on(place)
        before, wanted = None if earlier is None else earlier[number], rows if number == last else None
        entered = enter(number, None if stream is None else stream.to(place)).to(place)
        k, v = past(number)
        made = run_layer(layer, number, entered, (k.to(place), v.to(place)), here, taps, wanted, before)
        if number in window.added:
            made = replace(made, stream=with_added(made.stream, window.added[number].to(place)))
        stream = made.stream
        yield number, made


def with_added(stream: Tensor, added: Float[Tensor, "batch _ d_model"]) -> Tensor:
    """A stream `[..., batch, pos, d_model]` with what is added after a layer to its first positions."""
    n = added.shape[1]
    return torch.cat((stream[..., :n, :] + added, stream[..., n:, :]), dim=-2)


def restarted_layers(
    record: Record, taps: Taps, *, entering: Tensor | None = None, rows: slice | None = None
) -> Iterator[tuple[int, Made]]:
    """The same from a recorded run; `entering` may take the recorded stream's place in the first layer."""
    start = taps.offset
    enter = partial(_entered, record, taps, entering)
    return run_layers(record.model, record.window(start), taps, enter, lambda one: record.past(one, start), rows=rows)


def _entered(record: Record, taps: Taps, entering: Tensor | None, number: int, stream: Tensor | None) -> Tensor:
    recorded = record.stream(number, taps.offset) if entering is None or stream is not None else entering
    return taps.enter(number, stream, recorded)


def no_edits(n_prompt: int, layer: int = 0, start: int = 0) -> Taps:
    """One plan that edits nothing, from a layer and a position on."""
    return Taps([CompiledPlan((), n_prompt=n_prompt, first_layer=layer, first_position=start)], start)


@torch.no_grad()
def rerun(record: R, taps: Taps, *, until: int | None = None, entering: Tensor | None = None) -> R:
    """Record the run under one plan."""
    first, heads, experts = taps.first_layer, dict[int, Heads](), dict(record.experts)
    streams = {} if entering is None else {first: entering.to(record.resid[first].device)}
    for number, made in restarted_layers(record, taps, entering=entering):
        streams[number + 1] = made.stream[0].to(record.resid[number + 1].device)
        device = record.keys[number].device
        keys, values = (part[0].transpose(1, 2).to(device) for part in (made.keys, made.values))
        heads[number] = keys, values
        if made.experts is not None:
            experts[number] = torch.cat((experts[number][:, : taps.offset], made.experts[0].to(device)), dim=1)
        if number == until:
            break
    return replace(record, own=Own(record, taps.offset, streams, heads), experts=experts)


def rerun_from(record: R, layer: int, stream: Float[Tensor, "batch _ d_model"], *, start: int = 0) -> R:
    """Record the run in which another stream enters a layer, or leaves the last, from `start` on."""
    return rerun(record, no_edits(len(record.spans), layer, start), entering=stream)


def start_of(record: Record, plan: CompiledPlan) -> int:
    """The first position that must be computed anew under a plan."""
    return record.traits.restart(plan.first_position, record.spans.roles)


def rerun_under(record: R, plan: Plan, *, until: int | None = None) -> R:
    """Record the run under a plan, up to a layer."""
    compiled = plan.compile(record.model.spec, record.spans, batch=record.batch)
    return rerun(record, Taps([compiled], start_of(record, compiled)), until=until)


PROVED = "_restart_proved"  # in the model's dictionary: by attention, whether a restart reproduced its run everywhere


class _Entered(Exception):
    """The first block was reached: nothing of the model after it need run."""


def by_flash(model: Any, attention: str | None) -> bool:
    """Say whether records of this model go without scores; in half precision on a CPU only where it is asked for."""
    if attention is None:
        wanted = model.dtype == torch.float32 or model.device.type == "cuda"
        return wanted and model.__dict__.get(PROVED, {}).get(True, True)
    return attention == "flash"


def may_be_lean(model: Any, attention: str | None = None) -> bool:
    """Say whether records of this model may be made without hooks, where none stands on its fusion stack."""
    return by_flash(model, attention) and model.__dict__.get(PROVED, {}).get(True, False)


@torch.no_grad()
def recorded_lean(model: Any, x: Any, device: torch.device | str | None) -> tuple[dict[str, Any], Tensor]:
    """Run encoders and embedding as always and the layers by themselves, keeping what restarts need."""
    with entering(model, _Entered) as entered, suppress(_Entered):
        model(x, budget_gb=inf)  # it stops before scores and logits
    stream: Tensor = entered["hidden_states"]
    mask = additive(entered.get("attention_mask"), stream)
    n = stream.shape[1]
    window = replace(Window.at(0, entered["position_embeddings"], mask), added=entered.get("added", {}))
    taps, nothing = no_edits(n), stream.new_empty(stream.shape[0], model.spec.n_kv_heads, 0, model.spec.d_head)
    found: dict[str, list[Tensor]] = {"resid": [stream.to(device)], "keys": [], "values": [], "experts": []}
    last = stream
    for _, made in run_layers(
        model, window, taps, lambda at, left: taps.enter(at, left, stream), lambda _: (nothing, nothing)
    ):
        last = made.stream[0]
        found["resid"].append(last.to(device))
        for part, heads in (("keys", made.keys), ("values", made.values)):
            found[part].append(heads[0].transpose(1, 2).contiguous().to(device))
        found["experts"] += [] if made.experts is None else [made.experts[0].to(device)]
    return fields_of(model, x, found, entered, mask), unembedded(model, last[:, -1])
