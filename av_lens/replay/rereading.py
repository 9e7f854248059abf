"""Attention anew in one layer of a recorded run: what does a head make of another query, key or value?

    z' = softmax(q' k'^T scaling + mask) v'

A query head's keys and values can be replaced for that head alone (ungrouped) or for all that share them. All else that
the heads read is the recorded run's. `HeadRead` is one head's reading by itself, to be mixed with another run's;
`read_with` reads with all of a layer's heads at once, to first order in what follows: a metric then moves by
`(dm/dz) . (z' - z)`, in which the softmax itself is exact (the QK fix of AtP*, Kramár et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.families.decoder import Read, attended
from av_lens.interventions.nodes import Node
from av_lens.replay.recording import Record
from av_lens.replay.rerun import layer_of


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

    q: Float[Tensor, "*_ batch row d_head"]
    k: Float[Tensor, "*_ batch pos d_head"]
    v: Float[Tensor, "*_ batch pos d_head"]
    mask: Float[Tensor, "_ row pos"]
    scaling: float

    @classmethod
    def of(cls, record: Record, layer: int, head: int, rows: Sequence[int]) -> HeadRead:
        """Read a head of a recorded run at some positions, ascending."""
        parts, device = layer_of(record.model, layer), record.model.device
        inside = torch.tensor([row - rows[0] for row in rows], device=device)
        cos, sin = (table.to(device)[:, rows[0] :][:, inside] for table in record.tables)
        q = parts.head("q", head, parts.ln1(record.stream(layer, rows[0])[:, inside]))
        keys, values = record.past(layer, len(record.spans))
        mask, shared = _mask(record, rows)[:, 0], head // parts.group
        return cls(parts.turned("q", q, cos, sin), keys[:, shared], values[:, shared], mask, parts.scaling)

    @property
    def pattern(self) -> Float[Tensor, "*_ batch row pos"]:
        """Its attention pattern."""
        return self._attended[1]

    @property
    def z(self) -> Float[Tensor, "*_ batch row d_head"]:
        """What it makes of that."""
        return self._attended[0]

    @property
    def _attended(self) -> tuple[Tensor, Tensor]:
        return attended(self.q, [Read(self.k, self.v, self.mask)], self.scaling)

    def taking(self, other: HeadRead, *, q: bool = False, k: Sequence[int] = (), v: Sequence[int] = ()) -> HeadRead:
        """Take another run's queries, and its keys and values at some positions; both runs have one layout."""
        keys, values = self.k.clone(), self.v.clone()
        keys[:, list(k)], values[:, list(v)] = other.k[:, list(k)], other.v[:, list(v)]
        return replace(self, q=other.q if q else self.q, k=keys, v=values)


@torch.no_grad()
def reread(
    record: Record, number: int, read: Mapping[Node, Float[Tensor, "row batch pos d_head"]], positions: Sequence[int]
) -> dict[int, tuple[Float[Tensor, "row batch later d_head"], Float[Tensor, "batch later d_head"]]]:
    """Attend anew in one layer of a recorded run, with some queries, keys or values replaced."""
    device, start, n = record.model.device, positions[0], len(record.spans)
    layer = layer_of(record.model, number)
    cos, sin = (table.to(device) for table in record.tables)
    at = torch.tensor(list(positions), device=device)
    keys, values = record.past(number, n)
    queries = layer.heads("q", layer.ln1(record.stream(number, start)))
    mask = _mask(record, range(start, n))[:, 0]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for head in sorted({head for node in read for head in _seen_by(node, layer.group)}):
        q, shared = layer.turned("q", queries[:, :, head], cos[:, start:], sin[:, start:]), head // layer.group
        base = HeadRead(q, keys[:, shared], values[:, shared], mask, layer.scaling)
        new = base
        for node, given in read.items():
            if head not in _seen_by(node, layer.group):
                continue
            kind = "q" if node.input not in ("k", "v") else node.input
            if kind != "v":
                given = layer.turned(kind, given, cos[:, at], sin[:, at])
            there = _with(getattr(base, kind), at - start if kind == "q" else at, given)
            new = replace(new, **{kind: there})
        found[head] = (new.z, base.z)
    return found


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
    """Recompute what every head of a layer reads."""
    end, modules = rows[-1] + 1, layer_of(record.model, layer)
    k, v = record.past(layer, end)
    if keys is not None:
        inside = [number for number, position in enumerate(at) if position < end]
        k = k.clone()
        k[:, :, [at[number] for number in inside]] = keys[:, inside].transpose(1, 2).to(k)
    k, v = (part.repeat_interleave(modules.group, dim=1) for part in (k, v))
    read = Read(k, v, _mask(record, rows, end))
    return attended(queries.transpose(1, 2), [read], modules.scaling)[0].transpose(1, 2)


def _seen_by(node: Node, group: int) -> range:
    index = node.index or 0
    return range(index * group, (index + 1) * group) if node.kind == "kv" else range(index, index + 1)


def _with(base: Tensor, at: Tensor, given: Tensor) -> Tensor:
    """`[batch, pos, d]` with other values at some positions, one row for each change."""
    new = base.expand(given.shape[0], *base.shape).clone()
    new[:, :, at] = given.to(new)
    return new


def _mask(record: Record, rows: Sequence[int], end: int | None = None) -> Tensor:
    """The additive mask of some rows, `[batch or 1, 1, row, key]`."""
    like, device = record.resid[0], record.model.device
    end = len(record.spans) if end is None else end
    chosen = torch.tensor(list(rows), device=device)
    if record.mask is not None:
        return record.mask.to(device)[:, :, chosen, :end]
    future = torch.arange(end, device=device)[None] > chosen[:, None]
    zeros = torch.zeros(1, 1, len(chosen), end, dtype=like.dtype, device=device)
    return zeros.masked_fill(future, torch.finfo(like.dtype).min)
