"""A run in which every head's output is held at the base run's, but for what is changed on purpose.

With every head held, positions do not read one another: a change of what one head wrote at a position stays at that
position, is added to the stream, and is seen by the MLPs (where they are not held too) and the norms alone. So

    stream entering layer l = base + change + what the MLPs before l made of it

is computed for many changes at once, without attention and without a run of the model, and is exact. `HeldRun.inputs`
gives what chosen receivers then read; `outputs` what they make of that input, all else in them as in the base run.
`replaced` writes the base run in which receivers read it, and everything after them is free, as plans to be replayed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.unembedding import unembedded
from av_lens.families.decoder import Layer, at_scale
from av_lens.interventions import Plan, Site
from av_lens.interventions import replace as write
from av_lens.interventions.nodes import Node
from av_lens.replay.recording import Record
from av_lens.replay.rereading import reread
from av_lens.replay.rerun import layer_of, layers, rerun_under

Change = Mapping[tuple[str, int], Float[Tensor, "batch _ d_model"]]
"""What is added to the stream at some positions: by ("embed", 0), ("heads", layer) or ("mlp", layer)."""


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
        """Narrow the run to some of its positions."""
        if tuple(positions) == self.positions:
            return self
        where = {position: row for row, position in enumerate(self.positions)}
        rows = torch.tensor([where[p] for p in positions])
        return replace(self, positions=tuple(positions), middle=tuple(one[:, rows] for one in self.middle))

    def entering(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The base run's stream before a layer, at the positions."""
        start = self.positions[0]
        rows = torch.tensor([p - start for p in self.positions], device=self.record.model.device)
        return self.record.stream(layer, start).index_select(1, rows)

    @torch.no_grad()
    def inputs(
        self, changes: Sequence[Change], wanted: Collection[Node]
    ) -> dict[Node, Float[Tensor, "row batch pos _"]]:
        """What receivers read under each change: q, k or v at their hooks; for others the stream before its norm."""
        n_layers = self.record.n_layers
        first = min((layer for change in changes for _, layer in change), default=0)
        first = min([first, *(n_layers if node.layer is None else node.layer for node in wanted)])
        moved = self.entering(first).new_zeros((len(changes), *self.entering(first).shape))
        found: dict[Node, Tensor] = {}
        for number, layer in layers(self.record.model, first):
            self._add(moved, changes, ("embed", number))
            here = [node for node in wanted if node.layer == number]
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
        """What receivers make of an input, all their other inputs as in the base run; each with the base run's own.

        By ("z", layer, head) a query head's z at every position from the first on, by ("mlp", layer, 0) an MLP's write.
        """
        found: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        for node, given in read.items():
            if node.kind == "mlp" and node.layer is not None:
                base = self.middle[node.layer]
                layer = layer_of(self.record.model, node.layer)
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
        return norm(stream) if self.norms == "recomputed" else at_scale(norm, stream, base)

    def _mlp(self, layer: Layer, stream: Tensor, base: Tensor) -> Tensor:
        return layer.mlp(self._normed(layer.ln2, stream, base))

    def _through_mlp(self, moved: Tensor, layer: Layer, number: int, rows: list[int]) -> None:
        """Let the MLP see the change: what it writes moves too."""
        if rows:
            base = self.middle[number]
            moved[rows] += self._mlp(layer, base + moved[rows], base) - self._mlp(layer, base, base)

    def logits(
        self, stream: Float[Tensor, "row batch pos d_model"], tokens: Tensor | None = None
    ) -> Float[Tensor, "row batch pos _"]:
        """Unembed a stream that left the last layer."""
        model = self.record.model
        if self.norms == "recomputed":
            return unembedded(model, stream, tokens)
        head: Any = model.bridge.unembed.original_component
        normed = self._normed(model.bridge.ln_final.original_component, stream, self.entering(self.record.n_layers))
        logits = head(normed)
        return logits if tokens is None else logits[..., tokens]


def _projected(layer: Layer, normed: Tensor, node: Node) -> Tensor:
    """A head's query, key or value from the normed stream, `[row, batch, pos, d_head]`."""
    kind, index = node.input or "q", node.index or 0
    return layer.head(kind, index // layer.group if node.kind == "head" and kind != "q" else index, normed)


def replaced(held: HeldRun, read: Mapping[Node, Float[Tensor, "row batch pos _"]]) -> list[Plan]:
    """Write the base run with receivers' inputs replaced, all after them free, as plans."""
    first = min(node.reads_at for node in read)
    known = {node: given for node, given in read.items() if node.kind == "mlp" or node.reads_at == first}
    made = held.outputs(known)
    n_rows = len(next(iter(read.values())))
    later = list(range(held.positions[0], len(held.record.spans)))
    plans: list[Plan] = []
    for row in range(n_rows):
        edits = [
            write(Site("z", layer, head, later), new[row])
            if kind == "z"
            else write(Site("mlp_out", layer, positions=held.positions), new[row])
            for (kind, layer, head), (new, _) in made.items()
        ]
        rest = {node: given[row] for node, given in read.items() if node not in known}
        plans.append(_with_later(held, Plan(edits), rest))
    return plans


def _with_later(held: HeldRun, plan: Plan, rest: Mapping[Node, Tensor]) -> Plan:
    """Add receivers in layers that other receivers have changed already, the earliest first."""
    record, positions, spec = held.record, held.positions, held.record.model.spec
    group = spec.n_heads // spec.n_kv_heads
    for number in sorted({node.layer or 0 for node in rest}):
        here = {node: given for node, given in rest.items() if node.layer == number}
        if any(node.kind == "head" and node.input != "q" and group > 1 for node in here):
            now = rerun_under(record, plan, until=number)
            z = reread(now, number, {node: given[None] for node, given in here.items()}, positions)
            span = list(range(positions[0], len(record.spans)))
            plan = plan + Plan(write(Site("z", number, head, span), new[0]) for head, (new, _) in z.items())
        else:
            plan = plan + Plan(
                write(Site(node.input or "q", number, node.index, positions), given) for node, given in here.items()
            )
    return plan
