"""Attention anew in one layer of a recorded run: what does a head make of another query, key or value?

A query head's keys and values can be replaced for that head alone (ungrouped) or for all that share them. All else that
the heads read is the recorded run's. `HeadRead` is one head's reading by itself, to be mixed with another run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.execution import run
from av_lens.interventions import Plan, Site
from av_lens.interventions.nodes import Node
from av_lens.replay.recording import Record
from av_lens.replay.restart import Layer


@dataclass(frozen=True, eq=False)
class HeadRead:
    """What one query head reads at some rows of a recorded run.

    Attributes:
        q: its queries, rotated.
        k: its keys, rotated, at all positions.
        v: its values at all positions.
        mask: what is added to the scores.
        scaling: factor of the scores.
    """

    q: Float[Tensor, "batch row d_head"]
    k: Float[Tensor, "batch pos d_head"]
    v: Float[Tensor, "batch pos d_head"]
    mask: Float[Tensor, "_ row pos"]
    scaling: float

    @classmethod
    def of(cls, record: Record, layer: int, head: int, rows: Sequence[int]) -> HeadRead:
        """Read a head of a recorded run.

        Args:
            record: the recorded run.
            layer: the head's layer.
            head: the query head.
            rows: the positions that read, ascending.

        Returns:
            Its queries there, and all keys and values.
        """
        parts, device = Layer.of(record.model.bridge.blocks[layer]), record.model.device
        inside = torch.tensor([row - rows[0] for row in rows], device=device)
        cos, sin = (table.to(device)[:, rows[0] :][:, inside] for table in record.tables)
        own = slice(head * parts.d_head, (head + 1) * parts.d_head)
        normed = parts.ln1(record.stream(layer, rows[0])[:, inside])
        bias: Any = parts.q.bias  # a projection may have none
        q = torch.nn.functional.linear(normed, parts.q.weight[own], None if bias is None else bias[own])
        keys, values = record.past(layer, len(record.spans))
        group = (parts.q.out_features // parts.d_head) // keys.shape[1]
        mask = _mask(record, rows[0])[:, inside]
        return cls(turned(q, cos, sin), keys[:, head // group], values[:, head // group], mask, parts.scaling)

    @property
    def pattern(self) -> Float[Tensor, "batch row pos"]:
        """Its attention pattern."""
        scores = self.q @ self.k.transpose(-1, -2) * self.scaling + self.mask
        return scores.softmax(-1, dtype=torch.float32).to(self.v.dtype)

    @property
    def z(self) -> Float[Tensor, "batch row d_head"]:
        """What it makes of that."""
        return self.pattern @ self.v

    def taking(self, other: HeadRead, *, q: bool = False, k: Sequence[int] = (), v: Sequence[int] = ()) -> HeadRead:
        """Take some of another run's reading; both runs have one layout, so that rotary positions agree.

        Args:
            other: the same head and rows in the other run.
            q: whether to take its queries.
            k: the positions whose keys are taken.
            v: the positions whose values are taken.

        Returns:
            The mixture.
        """
        keys, values = self.k.clone(), self.v.clone()
        keys[:, list(k)], values[:, list(v)] = other.k[:, list(k)], other.v[:, list(v)]
        return replace(self, q=other.q if q else self.q, k=keys, v=values)


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
