"""Attention anew in one layer of a recorded run: what does a head make of another query, key or value?

A query head's keys and values can be replaced for that head alone (ungrouped) or for all that share them. All else that
the heads read is the recorded run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.interventions import Plan, Site
from av_lens.interventions.nodes import Node
from av_lens.runs.execution import run
from av_lens.runs.recording import Record
from av_lens.runs.restart import Layer


@torch.no_grad()
def reread(
    record: Record, number: int, read: Mapping[Node, Float[Tensor, "row batch pos d_head"]], positions: Sequence[int]
) -> dict[int, tuple[Float[Tensor, "row batch later d_head"], Float[Tensor, "batch later d_head"]]]:
    """Attend anew in one layer of a recorded run, with some queries, keys or values replaced.

    Args:
        record: the recorded run.
        number: the layer.
        read: what is replaced: new queries, keys or values before rotary position, one row for each change.
        positions: where they are replaced, ascending.

    Returns:
        For every query head that sees any of it, its z from the first position on, and the run's own.
    """
    device, start = record.model.device, positions[0]
    layer = Layer.of(record.model.bridge.blocks[number])
    cos, sin = (table.to(device) for table in record.tables)
    at = torch.tensor(list(positions), device=device)
    keys, values = record.past(number, len(record.spans))
    group = (layer.q.out_features // layer.d_head) // keys.shape[1]
    queries = layer.q(layer.ln1(record.stream(number, start))).unflatten(-1, (-1, layer.d_head))
    mask = _mask(record, start)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for head in sorted({head for node in read for head in _seen_by(node, group)}):
        q = turned(queries[:, :, head], cos[:, start:], sin[:, start:])
        k, v = keys[:, head // group], values[:, head // group]
        base = _attended(q, k, v, mask, layer.scaling)
        for node, given in read.items():
            if head not in _seen_by(node, group):
                continue
            if node.input == "v":
                v = _with(v, at, given)
            elif node.input == "k":
                k = _with(k, at, turned(given, cos[:, at], sin[:, at]))
            else:
                q = _with(q, at - start, turned(given, cos[:, at], sin[:, at]))
        found[head] = (_attended(q, k, v, mask, layer.scaling), base)
    return found


def _seen_by(node: Node, group: int) -> range:
    index = node.index or 0
    return range(index * group, (index + 1) * group) if node.kind == "kv" else range(index, index + 1)


def _with(base: Tensor, at: Tensor, given: Tensor) -> Tensor:
    """`[batch, pos, d]` with other values at some positions, one row for each change."""
    new = base.expand(given.shape[0], *base.shape).clone()
    new[:, :, at] = given.to(new)
    return new


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scaling + mask
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _mask(record: Record, start: int) -> Tensor:
    """The additive mask of the rows from a position on, `[batch or 1, row, key]`."""
    if record.mask is not None:
        return record.mask[:, 0, start:].to(record.model.device)
    n, like = len(record.spans), record.resid[0]
    lowest = torch.full((n - start, n), torch.finfo(like.dtype).min, dtype=like.dtype, device=record.model.device)
    return lowest.triu(1 + start)[None]


def turned(heads: Float[Tensor, "*rows batch pos d_head"], cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position.

    Args:
        heads: queries or keys of one head.
        cos: the table, `[batch, pos, d_head]`.
        sin: the table.

    Returns:
        The rotated heads.
    """
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


@torch.no_grad()
def record_under(record: Record, plan: Plan, number: int) -> Record:
    """Record the run under a plan, as far as one layer's attention needs it.

    Args:
        record: the recorded run.
        plan: edits before that layer.
        number: the layer.

    Returns:
        The record, with this layer's stream, keys and values those of the run under the plan.
    """
    stream = run(record.model, record.x, plan=plan, capture=[Site("resid_pre", number)]).cache["resid_pre", number]
    layer = Layer.of(record.model.bridge.blocks[number])
    normed = layer.ln1(stream)
    keys, values = (part(normed).unflatten(-1, (-1, layer.d_head)).transpose(1, 2) for part in (layer.k, layer.v))
    cos, sin = (table[:, None].to(stream.device) for table in record.tables)
    new = {"resid": stream, "keys": turned(keys, cos, sin), "values": values}
    fields = {
        name: tuple(value if i == number else one for i, one in enumerate(getattr(record, name)))
        for name, value in new.items()
    }
    return replace(record, **fields)
