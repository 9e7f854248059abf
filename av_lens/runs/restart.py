"""Restart a decoder in the middle: layers >= l at positions >= p, for many plans at once.

An edit at (layer l, position p) cannot change what lies before either, so a replay needs the recorded stream entering
layer l from p on, and every later layer's recorded keys and values before p. The layers are computed here directly
from the wrapped model's own weights, without hooks: hooks would cost more than the arithmetic. What an edit does is
the same code in both (`interventions.Step`), and tests hold the two ways together to 1e-5.

Tensors carry a leading plan axis, `[plan, batch, pos, ...]`, of size 1 until the first edit is made: what all plans
share is computed once. Queries of all plans attend to the recorded prefix in one product; nothing of it is copied.

Known layout: pre-norm blocks, rotary grouped-query attention, gated MLP. A trace proves on recording that a restart
reproduces its own run, and falls back to hooked runs where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from av_lens.interventions import CompiledPlan, Step

IN_MLP = ("mlp_in", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post")
AFTER_KEYS = ("q", "rot_q", "scores", "pattern", "z", "result", "attn_out", "resid_mid", *IN_MLP)
RESTARTABLE = frozenset(("embed", "resid_pre", "k", "v", "rot_k", *AFTER_KEYS))
"""The components at which a restart can apply edits."""


class Taps:
    """The edits of several plans by place, applied to stacked activations.

    Args:
        plans: the compiled plans, in the order of the plan axis.
        offset: absolute position of the first row of every activation.
    """

    def __init__(self, plans: Sequence[CompiledPlan], offset: int) -> None:
        self.n_plans = len(plans)
        self.offset = offset
        self.places: dict[tuple[str, int | None], list[tuple[int, Step]]] = {}
        for number, plan in enumerate(plans):
            for step in plan.steps:
                self.places.setdefault((step.component, step.layer), []).append((number, step))

    def has(self, layer: int, components: Sequence[str]) -> bool:
        """Say whether any plan edits one of these components.

        Args:
            layer: the layer.
            components: the components.

        Returns:
            True if one does.
        """
        return any((component, layer) in self.places for component in components)

    def __call__(self, component: str, layer: int | None, activation: Tensor) -> Tensor:
        """Apply the edits at one place.

        Args:
            component: the component.
            layer: its layer.
            activation: `[plan or 1, batch, ...]`, owned by the caller: it may be written to.

        Returns:
            The edited activation, with the whole plan axis, or the same tensor where nothing is edited.
        """
        steps = self.places.get((component, layer))
        if not steps:
            return activation
        if activation.shape[0] != self.n_plans:
            activation = activation.expand(self.n_plans, *activation.shape[1:]).clone()
        for number, step in steps:
            step(activation[number], self.offset)
        return activation


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer's own modules, found through the bridge.

    Attributes:
        ln1: norm before attention.
        ln2: norm before the MLP.
        q: query projection.
        k: key projection.
        v: value projection.
        o: output projection.
        gate: the MLP's gate.
        up: the MLP's other input projection.
        down: the MLP's output projection.
        act: the MLP's non-linearity.
        d_head: width of one head.
        scaling: factor of the scores.
    """

    ln1: Callable[[Tensor], Tensor]
    ln2: Callable[[Tensor], Tensor]
    q: torch.nn.Linear
    k: torch.nn.Linear
    v: torch.nn.Linear
    o: torch.nn.Linear
    gate: torch.nn.Linear
    up: torch.nn.Linear
    down: torch.nn.Linear
    act: Callable[[Tensor], Tensor]
    d_head: int
    scaling: float

    @classmethod
    def of(cls, block: Any) -> Layer:
        """Find a block's modules.

        Args:
            block: a block of the bridge.

        Returns:
            The layer.
        """
        attention, mlp = block.attn, block.mlp
        inner = attention.original_component
        return cls(
            ln1=block.ln1.original_component,
            ln2=block.ln2.original_component,
            q=attention.q.original_component,
            k=attention.k.original_component,
            v=attention.v.original_component,
            o=attention.o.original_component,
            gate=mlp.gate.original_component,
            up=getattr(mlp, "in").original_component,
            down=mlp.out.original_component,
            act=mlp.original_component.act_fn,
            d_head=inner.head_dim,
            scaling=inner.scaling,
        )


@dataclass(frozen=True, eq=False)
class Window:
    """What every layer of one restart shares.

    Attributes:
        start: first position that is computed anew.
        cos: rotary table, `[batch, pos, 1, d_head]`, from `start` on.
        sin: rotary table.
        prefix_mask: additive, `[batch, 1, 1, pos, key]` on recorded keys, or None where it is all zero.
        own_mask: additive, `[batch, 1, 1, pos, pos]` on the new keys.
    """

    start: int
    cos: Tensor
    sin: Tensor
    prefix_mask: Tensor | None
    own_mask: Tensor

    @classmethod
    def at(cls, start: int, tables: tuple[Tensor, Tensor], mask: Tensor) -> Window:
        """Cut tables and mask for a restart.

        Args:
            start: first position that is computed anew.
            tables: cosine and sine, `[batch, pos, d_head]`.
            mask: additive attention mask, `[batch, 1, pos, pos]`.

        Returns:
            The window.
        """
        cos, sin = (table[:, start:, None] for table in tables)
        rows = mask[:, None, :, start:]
        prefix = rows[..., :start]
        return cls(start, cos, sin, prefix if bool((prefix != 0).any()) else None, rows[..., start:])


def run_layer(
    layer: Layer,
    number: int,
    stream: Float[Tensor, "plan batch pos d_model"],
    past: tuple[Float[Tensor, "batch kv_head past d_head"], Float[Tensor, "batch kv_head past d_head"]],
    window: Window,
    taps: Taps,
    rows: Tensor | None = None,
) -> Float[Tensor, "all_plans batch asked d_model"]:
    """Run one decoder layer on the restarted positions of all plans.

    Args:
        layer: its modules.
        number: its place, counted from 0.
        stream: the residual stream that enters it, owned by the caller.
        past: recorded rotated keys and values of the positions before.
        window: tables and masks of the restart.
        taps: the plans' edits.
        rows: in the last layer, the rows whose output is wanted; None for all.

    Returns:
        The stream after the layer, at all rows or the wanted ones.
    """
    if number == 0:
        stream = taps("embed", None, stream)
    stream = taps("resid_pre", number, stream)
    normed = layer.ln1(stream)
    k = taps("rot_k", number, _rotated(taps("k", number, _heads(layer.k, normed, layer)), window.cos, window.sin))
    v = taps("v", number, _heads(layer.v, normed, layer))
    early = None if taps.has(number, AFTER_KEYS) else rows
    cos, sin = window.cos, window.sin
    if early is not None:
        normed, stream, cos, sin = normed[:, :, early], stream[:, :, early], cos[:, early], sin[:, early]
    q = taps("rot_q", number, _rotated(taps("q", number, _heads(layer.q, normed, layer)), cos, sin))
    pattern = _pattern(q * layer.scaling, k, past[0], window, taps, number, early)
    z = taps("z", number, _mixed(pattern, v, past[1], q.shape[3]))
    attended = taps("attn_out", number, _written(layer, number, z, taps))
    stream = taps("resid_mid", number, stream + attended)
    if rows is not None and early is None and not taps.has(number, IN_MLP):
        stream = stream[:, :, rows]
    stream = taps("resid_post", number, stream + _mlp(layer, number, stream, taps))
    if rows is not None and stream.shape[2] != len(rows):
        stream = stream[:, :, rows]
    return stream


def _heads(projection: torch.nn.Linear, normed: Tensor, layer: Layer) -> Tensor:
    return projection(normed).view(*normed.shape[:3], projection.out_features // layer.d_head, layer.d_head)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position on `[plan, batch, pos, head, d_head]`."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _pattern(
    q: Tensor, k: Tensor, past: Tensor, window: Window, taps: Taps, number: int, rows: Tensor | None
) -> Tensor:
    """Attention weights `[batch, kv_head, plan, group * pos, key]` over the recorded and the new keys."""
    plans, batch, n_pos, n_heads, d_head = q.shape
    n_kv, start = past.shape[1], window.start
    group = n_heads // n_kv
    split = q.view(plans, batch, n_pos, n_kv, group, d_head)
    # New keys: every plan its own.
    own = split.permute(0, 1, 3, 4, 2, 5).reshape(plans, batch, n_kv, group * n_pos, d_head)
    own = own @ k.permute(0, 1, 3, 4, 2)
    plans = own.shape[0]
    own_mask = window.own_mask if rows is None else window.own_mask[..., rows, :]
    own = own.view(plans, batch, n_kv, group, n_pos, k.shape[2]) + own_mask
    scores = own.permute(1, 2, 0, 3, 4, 5)
    if start:  # Recorded keys: one product for all plans.
        queries = split.permute(1, 3, 0, 4, 2, 5).flatten(2, 4)
        prefix = (queries @ past.transpose(-1, -2)).view(batch, n_kv, q.shape[0], group, n_pos, start)
        if window.prefix_mask is not None:
            mask = window.prefix_mask if rows is None else window.prefix_mask[..., rows, :]
            prefix = prefix + mask[:, :, None]
        if q.shape[0] != plans:
            prefix = prefix.expand(-1, -1, plans, -1, -1, -1)
        scores = torch.cat((prefix, scores), dim=-1)
    scores = _tapped_edges("scores", number, scores, taps)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = _tapped_edges("pattern", number, weights, taps)
    return weights.flatten(3, 4)


def _tapped_edges(component: str, number: int, edges: Tensor, taps: Taps) -> Tensor:
    """Show `[batch, kv_head, plan, group, pos, key]` to the plans as `[plan, batch, head, query_pos, key_pos]`."""
    if not taps.has(number, (component,)):
        return edges
    plain = edges.permute(2, 0, 1, 3, 4, 5).flatten(2, 3).contiguous()
    plain = taps(component, number, plain)
    return plain.unflatten(2, (edges.shape[1], edges.shape[3])).permute(1, 2, 0, 3, 4, 5).contiguous()


def _mixed(weights: Tensor, v: Tensor, past: Tensor, n_heads: int) -> Tensor:
    """Mix values by weights: `z`, `[plan, batch, pos, head, d_head]`."""
    _, n_kv, plans, rows, n_keys = weights.shape
    start = n_keys - v.shape[2]
    own = weights[..., start:].permute(2, 0, 1, 3, 4) @ v.permute(0, 1, 3, 2, 4)
    if start:
        prefix = weights[..., :start].flatten(2, 3) @ past
        own = own + prefix.unflatten(2, (plans, rows)).permute(2, 0, 1, 3, 4)
    group = n_heads // n_kv
    split = own.unflatten(3, (group, rows // group))
    return split.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)


def _written(layer: Layer, number: int, z: Tensor, taps: Taps) -> Tensor:
    """Project heads back to the stream; `result` is edited as a difference, as the hooked attention does."""
    written = layer.o(z.flatten(-2))
    if taps.has(number, ("result",)):
        weight = layer.o.weight.view(layer.o.weight.shape[0], z.shape[3], z.shape[4])
        before = torch.einsum("nbphd,mhd->nbphm", z, weight)
        after = taps("result", number, before.clone())
        written = written + (after - before).sum(3)
    return written


def _mlp(layer: Layer, number: int, stream: Tensor, taps: Taps) -> Tensor:
    entering = taps("mlp_in", number, stream.clone()) if taps.has(number, ("mlp_in",)) else stream
    normed = layer.ln2(entering)
    gate = taps("mlp_pre", number, layer.gate(normed))
    up = taps("mlp_pre_linear", number, layer.up(normed))
    return taps("mlp_out", number, layer.down(taps("mlp_post", number, layer.act(gate) * up)))
