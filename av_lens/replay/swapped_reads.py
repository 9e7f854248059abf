"""What would a layer's heads read, had their queries or keys been others? One layer's attention, recomputed.

    z' = softmax(q' k'^T scaling + mask) v

from a recorded run's keys and values, at chosen rows, with other rotated queries or keys in place. Everything before
the layer and everything after it stays as recorded: to first order a metric then moves by `(dm/dz) . (z' - z)`, in
which the softmax itself is exact.

Source: the QK fix of AtP* (Kramár et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.replay.recording import Record
from av_lens.replay.restart import Layer


@torch.no_grad()
def read_with(
    record: Record,
    layer: int,
    rows: Sequence[int],
    queries: Float[Tensor, "batch row head d_head"],
    *,
    keys: Float[Tensor, "batch _ kv_head d_head"] | None = None,
    at: Sequence[int] = (),
) -> Float[Tensor, "batch row head d_head"]:
    """Recompute what every head of a layer reads.

    Args:
        record: the recorded run.
        layer: the layer.
        rows: the positions that read, ascending.
        queries: their rotated queries.
        keys: rotated keys to be put in place; None leaves the recorded ones.
        at: the positions of `keys`.

    Returns:
        `z` of these rows.
    """
    end = rows[-1] + 1
    k, v = (part.clone() for part in record.past(layer, end))
    if keys is not None:
        inside = [number for number, position in enumerate(at) if position < end]
        k[:, :, [at[number] for number in inside]] = keys[:, inside].transpose(1, 2).to(k)
    group = queries.shape[2] // k.shape[1]
    k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
    modules = Layer.of(record.model.bridge.blocks[layer])
    scores = queries.transpose(1, 2) @ k.transpose(-1, -2) * modules.scaling + _mask(record, rows, end)
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


def _mask(record: Record, rows: Sequence[int], end: int) -> Tensor:
    """The additive mask of some rows, `[batch or 1, 1, row, key]`."""
    like = record.resid[0]
    device = record.model.device
    chosen = torch.tensor(list(rows), device=device)
    if record.mask is not None:
        return record.mask.to(device)[:, :, chosen, :end]
    future = torch.arange(end, device=device)[None] > chosen[:, None]
    zeros = torch.zeros(1, 1, len(chosen), end, dtype=like.dtype, device=device)
    return zeros.masked_fill(future, torch.finfo(like.dtype).min)
