"""A run in which every head's output is held at the base run's, but for what is changed on purpose.

With every head held, positions do not read one another: a change of what one head wrote at a position stays at that
position, is added to the stream, and is seen by the MLPs (where they are not held too) and the norms alone. So

    stream entering layer l = base + change + what the MLPs before l made of it

is computed for many changes at once, without attention and without a run of the model, and is exact. `HeldRun.inputs`
gives what chosen receivers then read; `outputs` what they make of that input, all else in them as in the base run.

A query head's keys and values can be replaced for that head alone (ungrouped) or for all that share them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.interventions.nodes import Node
from av_lens.runs.recording import Record
from av_lens.runs.restart import Layer
from av_lens.runs.stacks import unembedded

Change = Mapping[tuple[str, int], Float[Tensor, "batch pos d_model"]]
"""What is added to the stream: by ("embed", 0), ("heads", layer) or ("mlp", layer)."""


@dataclass(frozen=True, eq=False)
class HeldRun:
    """The base run at some positions, all heads held.

    Attributes:
        record: the recorded base run.
        positions: the positions at which the stream may change, ascending.
        middle: each layer's stream between attention and MLP there, `[batch, pos, d_model]`.
        mlps: "frozen" (held too) or "free" (recomputed).
        norms: "recomputed" or "frozen" (scales of the base run).
    """

    record: Record
    positions: tuple[int, ...]
    middle: tuple[Float[Tensor, "batch pos d_model"], ...]
    mlps: str
    norms: str

    def at(self, positions: Sequence[int]) -> HeldRun:
        """Narrow the run to some of its positions.

        Args:
            positions: the positions, ascending.

        Returns:
            The run there.
        """
        if tuple(positions) == self.positions:
            return self
        where = {position: row for row, position in enumerate(self.positions)}
        rows = torch.tensor([where[p] for p in positions])
        return replace(self, positions=tuple(positions), middle=tuple(one[:, rows] for one in self.middle))

    def layer(self, number: int) -> Layer:
        """The modules of a layer.

        Args:
            number: the layer.

        Returns:
            Its modules.
        """
        return Layer.of(self.record.model.bridge.blocks[number])

    def entering(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The base run's stream before a layer, at the positions.

        Args:
            layer: the layer; the number of layers for the stream that leaves the last.

        Returns:
            The stream.
        """
        start = self.positions[0]
        rows = torch.tensor([p - start for p in self.positions], device=self.record.model.device)
        return self.record.stream(layer, start).index_select(1, rows)

    @torch.no_grad()
    def inputs(
        self, changes: Sequence[Change], wanted: Collection[Node]
    ) -> dict[Node, Float[Tensor, "row batch pos _"]]:
        """Say what receivers read under each of several changes.

        Args:
            changes: one for each row: what is added to the stream, and where.
            wanted: the receivers.

        Returns:
            For each receiver its input, one row for each change: a head's query, key or value before rotary position;
            the stream before its norm for an MLP and for the logits.
        """
        n_layers = self.record.n_layers
        first = min((layer for change in changes for _, layer in change), default=0)
        first = min([first, *(n_layers if node.layer is None else node.layer for node in wanted)])
        moved = self.entering(first).new_zeros((len(changes), *self.entering(first).shape))
        found: dict[Node, Tensor] = {}
        for number in range(first, n_layers):
            self._add(moved, changes, ("embed", number))
            layer, here = self.layer(number), [node for node in wanted if node.layer == number]
            if any(node.kind != "mlp" for node in here):
                base = self.entering(number)
                normed = self._normed(layer.ln1, base + moved, base)
                found |= {node: _projected(layer, normed, node) for node in here if node.kind != "mlp"}
            self._add(moved, changes, ("heads", number))
            found |= {node: self.middle[number] + moved for node in here if node.kind == "mlp"}
            own = [row for row, change in enumerate(changes) if ("mlp", number) in change]
            if self.mlps == "free":
                begun = [row for row, one in enumerate(changes) if any(place[1] <= number for place in one)]
                self._through_mlp(moved, layer, number, [row for row in begun if row not in own])
            self._add(moved, changes, ("mlp", number))
        for node in wanted:
            if node.kind == "logits":
                found[node] = self.entering(n_layers) + moved
        return found

    @torch.no_grad()
    def outputs(
        self, read: Mapping[Node, Float[Tensor, "row batch pos _"]]
    ) -> dict[tuple[str, int, int], tuple[Float[Tensor, "row batch _ _"], Float[Tensor, "batch _ _"]]]:
        """Say what receivers make of an input, all their other inputs as in the base run.

        Args:
            read: the receivers' inputs at the positions, as `inputs` gives them; the logits are passed over.

        Returns:
            By ("z", layer, head) each query head's z at every position from the first on, and by ("mlp", layer, 0) what
            the MLP writes at the positions; each with the base run's own.
        """
        found: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        for node, given in read.items():
            if node.kind == "mlp" and node.layer is not None:
                base = self.middle[node.layer]
                layer = self.layer(node.layer)
                written = [self._mlp(layer, part, base) for part in (given, base)]
                found["mlp", node.layer, 0] = (written[0], written[1])
        for number in sorted({node.layer for node in read if node.kind in ("head", "kv") and node.layer is not None}):
            here = {node: given for node, given in read.items() if node.layer == number and node.kind != "mlp"}
            for head, pair in reread(self.record, number, here, self.positions).items():
                found["z", number, head] = pair
        return found

    def _add(self, moved: Tensor, changes: Sequence[Change], place: tuple[str, int]) -> None:
        for row, change in enumerate(changes):
            if place in change:
                moved[row] += change[place].to(moved)

    def _normed(self, norm: Any, stream: Tensor, base: Tensor) -> Tensor:
        if self.norms == "recomputed":
            return norm(stream)
        variance = base.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon
        return norm.weight * (stream.float() * torch.rsqrt(variance)).to(stream.dtype)

    def _mlp(self, layer: Layer, stream: Tensor, base: Tensor) -> Tensor:
        normed = self._normed(layer.ln2, stream, base)
        return layer.down(layer.act(layer.gate(normed)) * layer.up(normed))

    def _through_mlp(self, moved: Tensor, layer: Layer, number: int, rows: list[int]) -> None:
        """Let the MLP see the change: what it writes moves too."""
        if rows:
            base = self.middle[number]
            moved[rows] += self._mlp(layer, base + moved[rows], base) - self._mlp(layer, base, base)

    def logits(
        self, stream: Float[Tensor, "row batch pos d_model"], tokens: Tensor | None = None
    ) -> Float[Tensor, "row batch pos _"]:
        """Unembed a stream that left the last layer.

        Args:
            stream: at the run's positions.
            tokens: the tokens whose logits are wanted, or None for all.

        Returns:
            Their logits, the final norm recomputed or at the base run's scale.
        """
        model = self.record.model
        if self.norms == "recomputed":
            return unembedded(model, stream, tokens)
        head: Any = model.bridge.unembed.original_component
        normed = self._normed(model.bridge.ln_final.original_component, stream, self.entering(self.record.n_layers))
        logits = head(normed)
        return logits if tokens is None else logits[..., tokens]


def _projected(layer: Layer, normed: Tensor, node: Node) -> Tensor:
    """A head's query, key or value from the normed stream, `[row, batch, pos, d_head]`."""
    linear = {"q": layer.q, "k": layer.k, "v": layer.v}[node.input or "q"]
    index = node.index or 0
    if node.kind == "head" and node.input != "q":
        index //= layer.q.out_features // layer.k.out_features
    part = slice(index * layer.d_head, (index + 1) * layer.d_head)
    bias: Any = linear.bias  # a projection may have none
    return torch.nn.functional.linear(normed, linear.weight[part], None if bias is None else bias[part])


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
