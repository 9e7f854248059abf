"""What one recorded run holds and how it is recorded, and attention over it: its prefix and each plan's own keys.

A record keeps, for every layer, the residual stream that entered it and its rotated keys and values; no plainly causal
mask, which at 3,000 positions is larger than a layer's record. It may lie on another device, or beside the layers of a
split model. The recorded and the own part of attention are softmaxed apart and merged by their log-sum-exp:

    out = (e^{l_1} out_1 + e^{l_2} out_2) / (e^{l_1} + e^{l_2}),   l = log sum exp of a part's scores

Where gradients are wanted scores are computed plainly: kernels give none for the log-sum-exp.

Source: cascade attention (Ye et al., FlashInfer, 2024); the log-sum-exp merge is that of flash attention (Dao, 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from av_lens.brief import Brief
from av_lens.core.budget import GIGABYTE
from av_lens.core.calls import heads_first, rows_of, turn_of, unembedded, watching
from av_lens.core.execution import Standing, places, standing_hooks
from av_lens.errors import BudgetError, InputError, InterventionError
from av_lens.families.adapter import ReplayTraits, added_layers
from av_lens.families.blocks import device_of
from av_lens.families.decoder import causal_mask, flash, hook_name, layer_names, router_hook
from av_lens.spans import SpanMap


@dataclass(frozen=True, eq=False)
class Window:
    """What every layer of one restart shares."""

    start: int  # first position that is computed anew
    cos: Tensor  # rotary table, `[batch, pos, 1, d_head]`, from `start` on
    sin: Tensor  # rotary table
    prefix_mask: Tensor | None  # additive, `[batch, 1, pos, key]` on recorded keys, or None where all may be read
    own_mask: Tensor  # additive, `[batch, 1, pos, pos]` on the new keys
    causal: bool  # whether `own_mask` is plainly causal
    # by layer, what is added to the stream after it, `[batch, pos, d_model]`, from `start` on
    added: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    # by layer, the experts that every position goes through, `[batch, pos, chosen]`, from `start` on; where none are
    # named the router chooses
    experts: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    flash: bool = True  # whether attention goes without scores that are written out, where no edit looks at them

    @classmethod
    def at(cls, start: int, tables: tuple[Tensor, Tensor], mask: Tensor | None, *, flash: bool = True) -> Window:
        """Cut tables and mask for a restart."""
        cos, sin = (table[:, start:, None] for table in tables)
        if mask is None:
            return cls(start, cos, sin, None, causal_mask(cos.shape[1], cos), causal=True, flash=flash)
        rows = mask[:, :, start:]
        prefix = rows[..., :start] if bool((rows[..., :start] != 0).any()) else None
        return cls(start, cos, sin, prefix, rows[..., start:], causal=False, flash=flash)

    def on(self, device: torch.device) -> Window:
        """The same on a device; what is added, and experts, stay where they are."""
        if self.cos.device == device:
            return self
        prefix = None if self.prefix_mask is None else self.prefix_mask.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("cos", "sin", "own_mask")}
        return replace(self, prefix_mask=prefix, **moved)


def cascade(
    q: Float[Tensor, "plan batch row head d_head"],
    own: tuple[Float[Tensor, "plan batch pos kv_head d_head"], Float[Tensor, "plan batch pos kv_head d_head"]],
    past: tuple[Float[Tensor, "batch kv_head past d_head"], Float[Tensor, "batch kv_head past d_head"]],
    window: Window,
    rows: slice,
    scaling: float,
) -> Float[Tensor, "plan batch row head d_head"]:
    """Attend to the recorded prefix and each plan's own keys; on a CPU in float32: half precision is no faster."""
    if q.device.type == "cpu" and q.dtype != torch.float32:
        wide_own, wide_past = (own[0].float(), own[1].float()), (past[0].float(), past[1].float())
        return cascade(q.float(), wide_own, wide_past, window, rows, scaling).to(q.dtype)
    plans, batch, n_rows, n_heads, d_head = q.shape
    n_kv = own[0].shape[3]
    group = n_heads // n_kv
    out, weight = _own_part(q, own, window, rows, scaling)
    if window.start:
        grouped = q.view(plans, batch, n_rows, n_kv, group, d_head).permute(1, 3, 0, 4, 2, 5)
        mask = window.prefix_mask
        if mask is not None:
            mask = mask[:, :, rows].repeat(1, 1, plans * group, 1).to(q.dtype)
        far, far_weight = flash(grouped.reshape(batch, n_kv, -1, d_head), *past, scaling, mask=mask)
        far = far.reshape(batch, n_kv, plans, group, n_rows, d_head).permute(2, 0, 4, 1, 3, 5).flatten(3, 4)
        far_weight = far_weight.view(batch, n_kv, plans, group, n_rows).permute(2, 0, 4, 1, 3).flatten(3, 4)
        share = torch.sigmoid(weight - far_weight)[..., None]
        out = far + (out - far) * share.to(out.dtype)
    return out


def _own_part(
    q: Tensor, own: tuple[Tensor, Tensor], window: Window, rows: slice, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attend to the new keys: what is read `[plan, batch, row, head, d_head]`, and the log-sum-exp without `d_head`."""
    plans, batch, n_rows, n_heads, _ = q.shape
    k, v = own
    group, square = n_heads // k.shape[3], n_rows == k.shape[2]
    if n_rows == 1 and not square:
        return _own_part_of_one_row(q, own, window, rows, scaling)
    if group > 1:
        k, v = (part.repeat_interleave(group, dim=3) for part in own)
    if k.shape[2] == 1:
        return v.clone(), (q * k).sum(-1).float() * scaling
    queries, keys, values = (part.transpose(2, 3).flatten(0, 1) for part in (q, k, v))
    mask = None
    if not (square and window.causal):
        mask = window.own_mask[:, :, rows].to(queries.dtype)
        mask = mask if mask.shape[0] == 1 else mask.repeat(plans, 1, 1, 1)
    out, weight = flash(queries, keys, values, scaling, mask=mask, causal=square and window.causal)
    out = out.unflatten(0, (plans, batch)).transpose(2, 3)
    return out, weight.unflatten(0, (plans, batch)).transpose(2, 3)


def _own_part_of_one_row(
    q: Tensor, own: tuple[Tensor, Tensor], window: Window, rows: slice, scaling: float
) -> tuple[Tensor, Tensor]:
    """The same for a single query: heads that share keys become rows, and no key is repeated."""
    plans, batch, _, n_heads, _ = q.shape
    group = n_heads // own[0].shape[3]
    queries = q[:, :, 0].unflatten(2, (-1, group)).flatten(0, 1)
    keys, values = (part.transpose(2, 3).flatten(0, 1) for part in own)
    mask = window.own_mask[:, :, rows].expand(-1, -1, group, -1).to(queries.dtype)
    mask = mask if mask.shape[0] == 1 else mask.repeat(plans, 1, 1, 1)
    out, weight = flash(queries, keys, values, scaling, mask=mask)
    out, weight = (part.flatten(1, 2).unflatten(0, (plans, batch))[:, :, None] for part in (out, weight))
    return out, weight


@dataclass(frozen=True, eq=False)
class Own:
    """What a run made that differs from a recorded one, from a position on; all else is the recorded run's."""

    base: Record  # the run it was made of
    start: int  # the first position that is new
    # by layer, the stream that entered it (by the number of layers, that left the last), `[batch, pos, d]`
    streams: Mapping[int, Tensor]
    # by layer, its rotated keys and its values, `[batch, kv_head, new_pos, d_head]`
    heads: Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False, repr=False)
class Record(Brief):
    """One recorded run."""

    model: Any  # the model that ran
    x: Any  # its input
    # the stream that entered each layer, and the one that left the last, each `[batch, pos, d_model]`
    resid: tuple[Float[Tensor, "batch pos d_model"], ...]
    # each layer's rotated keys, `[batch, kv_head, pos, d_head]`
    keys: tuple[Float[Tensor, "batch kv_head pos d_head"], ...]
    values: tuple[Float[Tensor, "batch kv_head pos d_head"], ...]  # each layer's values, likewise
    tables: tuple[Tensor, Tensor]  # cosine and sine of the rotary positions, `[batch, pos, d_head]`
    # additive attention mask, `[batch or 1, 1, pos, pos]`; None where it is plainly causal
    mask: Float[Tensor, "..."] | None
    hooked_because: str = ""  # why replays run as full hooked forwards; empty where they restart
    # the caller's functions that stood on the model when it ran (`core.execution`)
    standing: Standing = field(default=(), repr=False)
    # the run's logits at all positions, kept where such functions stood on the fusion stack; else None, and they are
    # read from the last stream
    own_logits: Float[Tensor, "batch pos d_vocab"] | None = None
    # by layer, what is added to the stream after it, whatever the stream is, up to the last position at which anything
    # is, `[batch, pos, d_model]`
    added: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor], repr=False)
    # by layer that has some, those that each position went through, `[batch, pos, chosen]`
    experts: Mapping[int, Int64[Tensor, "batch pos chosen"]] = field(default_factory=dict[int, Tensor], repr=False)
    routing: str = "free"  # "free": in runs restarted from this one routers choose; "frozen": experts are this run's
    # what differs from `resid`, `keys` and `values`, where the run was made of another one (`rerun`)
    own: Own | None = field(default=None, repr=False)
    flash: bool = True  # whether it was made, and is restarted, without scores that are written out

    @property
    def spans(self) -> SpanMap:
        """What each position of the input is."""
        return self.x.spans

    @property
    def batch(self) -> int:
        """Examples in the recorded run."""
        return int(self.resid[0].shape[0])

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self.keys)

    @property
    def traits(self) -> ReplayTraits:
        """What the model's adapter declares about restarts."""
        return self.model.family.replay_traits(self.model.config)

    def require_standing(self) -> None:
        """Refuse to go on where other functions stand on the model than when it was recorded."""
        with turn_of(self.model.bridge):
            now = standing_hooks(self.model)
            if [hook.key for hook in now] != [hook.key for hook in self.standing]:
                raise InterventionError(
                    f"this trace was recorded with hooks at {places(self.model, self.standing)}, and the model now has "
                    f"hooks at {places(self.model, now)}: a number would be true of neither. Record again with "
                    "model.trace(x), or put the hooks back as they were (the same functions in the same places)."
                )

    def obstacle(self) -> str:
        """Say what the adapter declares, or leaves undeclared, that a restart would get wrong; empty if nothing."""
        traits, roles = self.traits, self.spans.roles
        declared = traits.obstacle(len(roles))
        if declared or self.mask is None:
            return declared
        read = (self.mask > torch.finfo(self.mask.dtype).min / 2).amax(dim=(0, 1))
        lasts = torch.arange(read.shape[1], device=read.device).where(read, 0).amax(-1)
        for query, last in enumerate(lasts.tolist()):
            if last > query and traits.restart(last, roles) > query:
                return (
                    f"position {query} ({roles[query]}) reads position {last} ({roles[last]}) after it, which this "
                    "model's adapter does not declare"
                )
        return ""

    def logits_at(self, rows: Int64[Tensor, " row"]) -> Float[Tensor, "batch row d_vocab"]:
        """The recorded run's own logits, under the hooks that stood then."""
        if self.own_logits is not None:
            return self.own_logits[:, rows].to(self.model.device)
        return unembedded(self.model, self.stream(self.n_layers, 0)[:, rows])

    def stream(self, layer: int, start: int) -> Float[Tensor, "batch pos d_model"]:
        """The stream that entered a layer (by the number of layers, that left the last), where it is; read only."""
        own, device = self.own, place_of(self.model, layer)
        if own is None:
            return self.resid[layer][:, start:].to(device)
        if layer not in own.streams:
            return own.base.stream(layer, start)
        new = own.streams[layer].to(device)
        if start >= own.start:
            return new[:, start - own.start :]
        return torch.cat((own.base.stream(layer, start)[:, : own.start - start], new), dim=1)

    def past(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values before a position, where that layer is; not to be written to."""
        own, device = self.own, place_of(self.model, layer)
        if own is None:
            return self.keys[layer][:, :, :end].to(device), self.values[layer][:, :, :end].to(device)
        if end <= own.start or layer not in own.heads:
            return own.base.past(layer, end)
        new = (part[:, :, : end - own.start].to(device) for part in own.heads[layer])
        keys, values = (torch.cat(pair, dim=2) for pair in zip(own.base.past(layer, own.start), new, strict=True))
        return keys, values

    def window(self, start: int) -> Window:
        """Rotary tables and masks of a restart, where the model's inputs go."""
        if not 0 <= start < len(self.spans):
            raise InputError(f"a run of {len(self.spans)} positions has no position {start} to restart at")
        device = self.model.device
        cos, sin = (table.to(device) for table in self.tables)
        mask = None if self.mask is None else self.mask.to(device)
        window = Window.at(start, (cos, sin), mask, flash=self.flash)
        frozen = self.experts if self.routing == "frozen" else {}
        experts = {layer: chosen[:, start:].to(device) for layer, chosen in frozen.items()}
        later = {layer: part[:, start:].to(device) for layer, part in self.added.items() if part.shape[1] > start}
        return replace(window, added=later, experts=experts)


def place_of(model: Any, layer: int) -> torch.device:
    """Where a layer computes, or (by the number of layers) what reads the stream that leaves the last."""
    blocks = model.bridge.blocks
    return device_of(blocks[layer].ln1 if layer < len(blocks) else model.bridge.ln_final)


@torch.no_grad()
def recorded(
    model: Any,
    x: Any,
    device: torch.device | str | None,
    *,
    keep_logits: bool = False,
    beside: Sequence[tuple[str, Callable[..., Any]]] = (),
) -> tuple[dict[str, Any], Tensor]:
    """Run the model once and keep what is needed to restart it."""
    n_layers, kept = model.spec.n_layers, dict[str, Tensor]()
    names = {"resid": (*layer_names("resid_pre", n_layers), hook_name("resid_post", n_layers - 1))}
    names |= {"keys": layer_names("rot_k", n_layers), "values": layer_names("v", n_layers)}
    names |= {"experts": tuple(router_hook("indices", layer) for layer in sorted(model.spec.experts))}

    def keep(name: str, component: str | None, activation: Tensor) -> None:
        found = activation.detach()
        if component == "experts":
            found = found.unflatten(0, (len(x), -1))
        elif component is not None:
            found = heads_first(found, component)
        kept[name] = found.to(device)

    components = {"resid": None, "keys": "rot_k", "values": "v", "experts": "experts"}
    wanted = ("resid",) if model.family.replay_traits(model.config).layers else tuple(names)
    looks = [(name, watching(partial(keep, name, components[part]))) for part in wanted for name in names[part]]
    hooks: list[tuple[str, Callable[..., Any]]] = [*beside, *looks]
    if not keep_logits:  # the logits of all positions would be larger than the record
        hooks.append(("unembed.hook_in", rows_of(slice(-1, None))))
    with entering(model) as entered:
        logits: Tensor = model.run_with_hooks(x, fwd_hooks=hooks)
    nothing = kept[names["resid"][0]][:, None, :, :0]  # keys and values of layers that no restart computes
    made = {part: [kept.get(name, nothing) for name in of_part] for part, of_part in names.items()}
    own = logits.to(device) if keep_logits else None
    mask = additive(entered.get("attention_mask"), made["resid"][0])
    return fields_of(model, x, made, entered, mask) | {"own_logits": own}, logits[:, -1]


def fields_of(
    model: Any, x: Any, made: Mapping[str, list[Tensor]], entered: Mapping[str, Any], mask: Tensor | None
) -> dict[str, Any]:
    """The fields of a `Record`, of what each layer made and of what entered the first."""
    place = made["resid"][0].device
    cos, sin = (table.to(place) for table in entered["position_embeddings"])
    whole: dict[str, Any] = {part: tuple(tensors) for part, tensors in made.items()}
    whole["experts"] = dict(zip(sorted(model.spec.experts), whole["experts"], strict=True))
    added = {layer: trimmed(part).to(place) for layer, part in entered.get("added", {}).items()}
    return whole | {"model": model, "x": x, "tables": (cos, sin), "mask": mask, "added": added}


def record_bytes(model: Any, x: Any, *, logits: bool = False) -> int:
    """What a record keeps: a stream more than layers, keys and values, what is added, tables, and all logits if so."""
    spec, n = model.spec, len(x.spans)
    seen = [place for place, role in enumerate(x.spans.roles) if role in ("video", "image")]
    added = added_layers(model.config) * (seen[-1] + 1) if seen and model.family.added is not None else 0
    kept = (spec.n_layers + 1) * spec.d_model + 2 * spec.n_layers * spec.n_kv_heads * spec.d_head + 2 * spec.d_head
    width = n * (kept + (spec.d_vocab if logits else 0)) + added * spec.d_model
    return len(x) * width * model.dtype.itemsize


def require_record_memory(model: Any, x: Any, budget_gb: float | int, *, logits: bool = False) -> None:
    """Refuse a record that would not fit."""
    needed = record_bytes(model, x, logits=logits) / GIGABYTE
    if needed > budget_gb:
        beside = " and all logits, which standing hooks may change," if logits else ""
        raise BudgetError(
            f"a trace of {len(x)} examples x {len(x.spans)} positions x {model.spec.n_layers} layers{beside} needs "
            f"{needed:.1f} GB, more than budget_gb={budget_gb:g}. Trace fewer examples at a time, or raise budget_gb."
        )


def _enter(
    entered: dict[str, Any], stop: type[Exception] | None, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    entered.update({name: kwargs.get(name) for name in ("position_embeddings", "attention_mask")})
    entered["hidden_states"] = args[0] if args else kwargs.get("hidden_states")
    if stop is not None:
        raise stop


def _told(
    entered: dict[str, Any], added: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    entered["added"] = added(kwargs)


def trimmed(added: Tensor) -> Tensor:
    """What is added after a layer, up to the last position at which anything is."""
    where = added.abs().amax((0, 2)).nonzero()
    return added[:, : int(where[-1]) + 1] if len(where) else added[:, :0]


@contextmanager
def entering(model: Any, stop: type[Exception] | None = None) -> Generator[dict[str, Any]]:
    """Collect what the decoder hands its first block (stream, rotary tables, mask), and what it adds between blocks."""
    entered: dict[str, Any] = {}
    handles = [model.bridge.blocks[0].register_forward_pre_hook(partial(_enter, entered, stop), with_kwargs=True)]
    if model.family.added is not None:
        told = partial(_told, entered, model.family.added)
        handles.append(model.hf_model.get_decoder().register_forward_pre_hook(told, with_kwargs=True))
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def additive(mask: Tensor | None, stream: Tensor) -> Tensor | None:
    """Bring an attention mask to numbers to add."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        lowest = torch.finfo(stream.dtype).min
        mask = torch.zeros_like(mask, dtype=stream.dtype).masked_fill(~mask, lowest)
    forbidden = mask < torch.finfo(mask.dtype).min / 2
    future = causal_mask(mask.shape[-1], mask[:1, :1, :1]) < 0
    if bool(((forbidden == future) & (future | (mask == 0.0))).all()):
        return None
    return mask.to(stream.device)
