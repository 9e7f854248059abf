"""Restart a decoder in the middle: layers >= l at positions >= p, for many plans at once.

An edit at (layer l, position p) cannot change what lies before either, so a replay needs the recorded stream entering
layer l from p on, and every later layer's recorded keys and values before p. The layers are computed here directly
from the wrapped model's own weights, without hooks: hooks would cost more than the arithmetic. What an edit does is
the same code in both (`interventions.Step`), and tests hold the two ways together to 1e-5.

Tensors carry a leading plan axis, `[plan, batch, pos, ...]`, whose bookkeeping `taps` keeps: plans join the stack at
their own first layer, and what they share until their first edit is computed once. Attention goes through `cascade`;
where scores or pattern are edited, and in every precision below float32, all scores are written out, as
`[plan, batch, head, query_pos, key_pos]`. There every operation is the hooked run's own, in its order: rounding is the
same, so that an edit which changes nothing changes nothing (to the bit wherever the device's products do not depend on
how many rows are multiplied together, as in bfloat16 on CPUs).

Known layout: pre-norm blocks, rotary grouped-query attention, gated MLP. A trace proves on recording that a restart
reproduces its own run, and falls back to hooked runs where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.families.decoder import Layer, Read, attended
from av_lens.replay.cascade import Window, cascade
from av_lens.replay.taps import Taps

EDGES = ("scores", "pattern")
IN_MLP = ("mlp_in", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post")
AFTER_KEYS = ("q", "rot_q", *EDGES, "z", "result", "attn_out", "resid_mid", *IN_MLP)
RESTARTABLE = frozenset(("embed", "resid_pre", "k", "v", "rot_k", *AFTER_KEYS))
"""The components at which a restart can apply edits."""


@dataclass(frozen=True, eq=False)
class Made:
    """What one layer made.

    Attributes:
        stream: the stream after it, `[plan, batch, row, d_model]`.
        keys: the rotated keys of every new position, `[plan, batch, pos, kv_head, d_head]`.
        values: the values, likewise.
    """

    stream: Tensor
    keys: Tensor
    values: Tensor


def run_layer(
    layer: Layer,
    number: int,
    stream: Float[Tensor, "plan batch pos d_model"],
    past: tuple[Float[Tensor, "batch kv_head past d_head"], Float[Tensor, "batch kv_head past d_head"]],
    window: Window,
    taps: Taps,
    rows: slice | None = None,
    earlier: tuple[Float[Tensor, "plan batch old kv_head d_head"], Float[Tensor, "plan batch old kv_head d_head"]]
    | None = None,
) -> Made:
    """Run one decoder layer on the restarted positions of all plans.

    Keys and values are made of all of them, the stream at `rows` alone; `earlier` are the plans' own keys and values
    between the window's start and these positions, while decoding (the window's mask covers them too).
    """
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
        k, v = torch.cat((earlier[0], k), dim=2), torch.cat((earlier[1], v), dim=2)
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
    if taps.has(number, EDGES) or q.dtype != torch.float32:
        z = _explicit(layer, number, q, (k, v), past, window, taps, part)
    else:
        z = cascade(q, (k, v), past, window, cut, layer.scaling)
    attended = taps("attn_out", number, _written(layer, number, taps("z", number, z, part), taps, part), part)
    stream, attended = taps.matched(stream, attended)
    stream = taps("resid_mid", number, stream + attended, part)
    stream, added = taps.matched(stream, _mlp(layer, number, stream, taps, part))
    stream = taps.spread(taps("resid_post", number, stream + added, part))
    if rows is not None and part is None:
        stream = stream[:, :, rows]
    return Made(stream, k, v)


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


def _mlp(layer: Layer, number: int, stream: Tensor, taps: Taps, rows: slice | None) -> Tensor:
    entering = taps("mlp_in", number, stream.clone(), rows) if taps.has(number, ("mlp_in",)) else stream
    written = layer.mlp(layer.ln2(entering), lambda name, one: taps(name, number, one, rows), taps.matched)
    return taps("mlp_out", number, written, rows)
