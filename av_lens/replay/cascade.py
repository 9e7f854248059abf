"""Attention of many plans over one recorded prefix and each plan's own keys, merged exactly.

    out = (e^{l_1} out_1 + e^{l_2} out_2) / (e^{l_1} + e^{l_2}),   l = log sum exp of a part's scores

The prefix's keys and values belong to the recorded run and are the same for all plans: all their queries attend to them
in one product, and nothing is copied for a plan. The recorded and the own part are softmaxed apart and merged by their
log-sum-exp, which is exact. Scores are never stored on a CPU: torch's flash kernel for CPUs hands back the log-sum-exp.
On other devices, where gradients are wanted (the kernel gives none for the log-sum-exp) and under a mask on the prefix,
scores are computed plainly.

Source: cascade attention (Ye et al., FlashInfer, 2024); the log-sum-exp merge is that of flash attention (Dao, 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.families.decoder import causal_mask, flash


@dataclass(frozen=True, eq=False)
class Window:
    """What every layer of one restart shares.

    Attributes:
        start: first position that is computed anew.
        cos: rotary table, `[batch, pos, 1, d_head]`, from `start` on.
        sin: rotary table.
        prefix_mask: additive, `[batch, 1, pos, key]` on recorded keys, or None where all may be read.
        own_mask: additive, `[batch, 1, pos, pos]` on the new keys.
        causal: whether `own_mask` is plainly causal.
    """

    start: int
    cos: Tensor
    sin: Tensor
    prefix_mask: Tensor | None
    own_mask: Tensor
    causal: bool

    @classmethod
    def at(cls, start: int, tables: tuple[Tensor, Tensor], mask: Tensor | None) -> Window:
        """Cut tables and mask for a restart."""
        cos, sin = (table[:, start:, None] for table in tables)
        if mask is None:
            return cls(start, cos, sin, None, causal_mask(cos.shape[1], cos), causal=True)
        rows = mask[:, :, start:]
        prefix = rows[..., :start]
        return cls(start, cos, sin, prefix if bool((prefix != 0).any()) else None, rows[..., start:], causal=False)


def cascade(
    q: Float[Tensor, "plan batch row head d_head"],
    own: tuple[Float[Tensor, "plan batch pos kv_head d_head"], Float[Tensor, "plan batch pos kv_head d_head"]],
    past: tuple[Float[Tensor, "batch kv_head past d_head"], Float[Tensor, "batch kv_head past d_head"]],
    window: Window,
    rows: slice,
    scaling: float,
) -> Float[Tensor, "plan batch row head d_head"]:
    """Attend to the recorded prefix and to each plan's own keys."""
    plans, batch, n_rows, n_heads, d_head = q.shape
    n_kv = own[0].shape[3]
    group = n_heads // n_kv
    out, weight = _own_part(q, own, window, rows, scaling)
    if window.start:
        grouped = q.view(plans, batch, n_rows, n_kv, group, d_head).permute(1, 3, 0, 4, 2, 5)
        mask = window.prefix_mask
        if mask is not None:
            mask = mask[:, :, rows].repeat(1, 1, plans * group, 1)
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
    group = n_heads // k.shape[3]
    if k.shape[2] == 1:
        k, v = (part.repeat_interleave(group, dim=3) if group > 1 else part for part in own)
        return v.clone(), (q * k).sum(-1).float() * scaling
    if n_rows == 1:
        return _own_part_of_one_row(q, own, window, rows, scaling)
    square = n_rows == k.shape[2]
    keys, values = (
        part.repeat_interleave(group, dim=3).transpose(2, 3).flatten(0, 1)
        if group > 1
        else part.transpose(2, 3).flatten(0, 1)
        for part in own
    )
    queries = q.transpose(2, 3).flatten(0, 1)
    mask = None
    if not (square and window.causal):
        mask = window.own_mask[:, :, rows]
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
    mask = window.own_mask[:, :, rows].expand(-1, -1, group, -1)
    mask = mask if mask.shape[0] == 1 else mask.repeat(plans, 1, 1, 1)
    out, weight = flash(queries, keys, values, scaling, mask=mask)
    out, weight = (part.flatten(1, 2).unflatten(0, (plans, batch))[:, :, None] for part in (out, weight))
    return out, weight
