"""Gradients at every reader's own input, and runs in which every head is held at the base run's output.

Each reading of the stream (a head's queries, keys, values, an MLP, the unembedding) is a branch of its own, the layer's
norm included, and

    G[v] = d metric / d (the stream that v reads)                                             total: all that v causes
    d metric / d stream before a layer = d metric / d stream after it + sum of G over the layer's readers

Keys and values are *ungrouped*: the sum over the heads that share them is the gradient of the shared copy. Gradients
are made from the last layer down, one layer at a time; no graph of the whole run is kept.

With every head held, positions do not read one another: a change stays at its position and is seen by MLPs (unless held
too) and norms alone. So `stream entering layer l = base + change + what the MLPs before l made of it` is exact for many
changes at once, without attention and without a run of the model.

`gim=True` goes back by the rules of Gradient Interaction Modifications, which let redundant keys and saturated norms
hide less; the run itself is unchanged:

    softmax         as if its scores were divided by 2: with p' = softmax(scores / 2), p' (g - sum p' g)
    norms           the scale that they divide by is a constant (queries' and keys' own, and the final one, too)
    products        factors share the gradient evenly: queries and keys get a quarter (scores, then pattern and values),
                    values a half, an MLP's input a half (gate times up; the router of one that has experts, too)

Source: the forks are those of edge attribution (Syed et al., 2023); ungrouped keys and values as in "Same Task,
Different Circuits" (2025); GIM: Edin et al. (2025, 2505.17630).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.calls import unembedded
from av_lens.errors import InputError, ModelError
from av_lens.families.blocks import device_of
from av_lens.families.decoder import Layer, Read, at_scale, attended
from av_lens.interventions import Plan, Site
from av_lens.interventions import replace as write
from av_lens.interventions.edges import Node
from av_lens.interventions.edits import places
from av_lens.metrics.metric import Metric
from av_lens.replay.recording import Record, Window, place_of
from av_lens.replay.rerun import layer_of, layers, rerun_under
from av_lens.replay.stacks import reread


@dataclass(frozen=True, eq=False)
class Reading:
    """The readers of one kind in one layer, and the metric's gradient at their inputs."""

    kind: str  # "q", "k" or "v" (one reader for each query head), "mlp" or "logits"
    layer: int  # the layer; the number of layers for the logits
    # `[batch, pos, reader, d_model]`, at the positions from the asked start on
    gradient: Float[Tensor, "batch _ reader d_model"]

    @property
    def names(self) -> list[str]:
        """The readers' names: "L3H5.q", "L3 mlp", "logits"."""
        return reader_names(self.kind, self.layer, self.gradient.shape[2])


def reader_names(kind: str, layer: int, n_readers: int) -> list[str]:
    """Name readers."""
    if kind in ("logits", "mlp"):
        return [kind if kind == "logits" else f"L{layer} mlp"]
    return [f"L{layer}H{head}.{kind}" for head in range(n_readers)]


def require_restart(record: Record, what: str) -> None:
    """Refuse a run whose layers are not of the layout that is known here."""
    record.require_standing()
    if record.hooked_because:
        raise ModelError(f"{what} computes layers by themselves, and cannot here: {record.hooked_because}.")
    if record.traits.bidirectional:
        roles = ", ".join(record.traits.bidirectional)
        raise ModelError(f"{what} needs positions that read only earlier ones; here {roles} read both ways.")


TEMPERATURE = 2.0  # of GIM's softmax
SHARES = {"q": 0.25, "k": 0.25, "v": 0.5, "mlp": 0.5}
"""Of the gradient, by GIM: one over the factors that are multiplied on the way."""


def _scaled(norm: Any) -> Any:
    """A norm whose scale has no gradient."""
    return lambda stream: at_scale(norm, stream, stream.detach())


def _cooled(scores: Tensor) -> Tensor:
    """A softmax whose gradient is that of cooler scores."""
    scores = scores.float()
    sloped = TEMPERATURE * (scores / TEMPERATURE).softmax(-1)
    return scores.detach().softmax(-1) + (sloped - sloped.detach())


def readings(
    record: Record,
    metric: Metric,
    *,
    start: int = 0,
    above: int = -1,
    middle: Float[Tensor, "batch _ d_model"] | None = None,
    gim: bool = False,
) -> Iterator[Reading]:
    """Give the metric's gradient at every reader's input, from the logits down."""
    require_restart(record, "a gradient at each reader's input")
    gradient = _at_logits(record, metric, start, **({"under": _scaled} if gim else {}))
    shares, softmax = (SHARES, {"softmax": _cooled}) if gim else (dict.fromkeys(SHARES, 1.0), {})
    yield Reading("logits", record.n_layers, gradient[:, :, None])
    window = record.window(start)
    for number, layer in layers(record.model, above + 1, backwards=True):
        stream = record.stream(number, start)
        gradient, window = gradient.to(stream.device), window.on(stream.device)
        if gim:
            norms = {kind: _scaled(norm) for kind, norm in layer.norms.items()}
            layer = replace(layer, ln1=_scaled(layer.ln1), ln2=_scaled(layer.ln2), norms=norms)
        with torch.enable_grad():
            leaves, z = _attention(layer, stream, record.past(number, start), window, **softmax)
        reached = stream + layer.write(z.detach()).detach()
        entering = shares["mlp"] * _through_mlp(layer, reached, gradient)
        yield Reading("mlp", number, entering[:, :, None])
        gradient = gradient + entering
        read = layer.along(gradient.detach())
        for kind, reader in zip("qkv", torch.autograd.grad(z, leaves, read), strict=True):
            branches = _before_norm(layer, kind, stream, shares[kind] * reader)
            yield Reading(kind, number, branches)
            gradient = gradient + branches.sum(2)
    if middle is not None:
        entering = _through_mlp(layer_of(record.model, above), middle, gradient.to(middle.device))
        yield Reading("mlp", above, entering[:, :, None])


def _at_logits(record: Record, metric: Metric, start: int, **options: Any) -> Tensor:
    """The gradient at the stream that leaves the last layer, zero but at the generation position."""
    asked = record.spans.generation_position
    left = record.stream(record.n_layers, start)
    bound, tokens = metric.few_tokens()
    with torch.enable_grad():
        leaf = left[:, [asked - start]].detach().requires_grad_()
        measured = bound(unembedded(record.model, leaf, None if tokens is None else tokens.to(leaf.device), **options))
        if not measured.requires_grad:
            raise InputError(f"the metric {metric.name} has no gradient: it counts, compares or reads detached logits.")
        found = torch.autograd.grad(measured.sum(), leaf)[0]
    gradient = torch.zeros_like(left)
    gradient[:, [asked - start]] = found
    return gradient


def _through_mlp(layer: Layer, middle: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at the MLP's own input."""
    with torch.enable_grad():
        leaf = middle.detach().requires_grad_()
        return torch.autograd.grad(layer.mlp(layer.ln2(leaf)), leaf, gradient)[0]


def _attention(
    layer: Layer, stream: Tensor, past: tuple[Tensor, Tensor], window: Window, **options: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Leaves q, k, v `[batch, pos, head, d_head]` at their hooks, one copy for each query head, and `z`."""
    normed = layer.ln1(stream)
    copies = {"q": 1, "k": layer.group, "v": layer.group}
    ungrouped = [layer.heads(kind, normed).repeat_interleave(n, dim=2) for kind, n in copies.items()]
    q, k, v = (part.detach().requires_grad_() for part in ungrouped)
    queries, keys = (layer.turned(*one, window.cos, window.sin).transpose(1, 2) for one in (("q", q), ("k", k)))
    read = [Read(keys, v.transpose(1, 2), window.own_mask)]
    if window.start:
        earlier_k, earlier_v = (part.repeat_interleave(layer.group, dim=1) for part in past)
        read.insert(0, Read(earlier_k, earlier_v, window.prefix_mask))
    return (q, k, v), attended(queries, read, layer.scaling, **options)[0].transpose(1, 2)


def _before_norm(layer: Layer, kind: str, stream: Tensor, gradient: Tensor) -> Tensor:
    """Bring gradients at heads `[batch, pos, head, d_head]` to each head's own copy of the stream, before the norm."""
    normed = torch.einsum("bphd,hdm->bphm", gradient, layer.rows(kind))
    with torch.enable_grad():
        forks = stream[:, :, None].expand_as(normed).detach().requires_grad_()
        return torch.autograd.grad(layer.ln1(forks), forks, normed)[0]


Change = Mapping[tuple[str, int], Float[Tensor, "batch _ d_model"]]
"""What is added to the stream at some positions: by ("embed", 0), ("heads", layer) or ("mlp", layer)."""


@dataclass(frozen=True, eq=False)
class HeldRun:
    """The base run at some positions, all heads held."""

    record: Record  # the recorded base run
    positions: tuple[int, ...]  # the positions at which the stream may change, ascending
    # each layer's stream between attention and MLP there, `[batch, pos, d_model]`
    middle: tuple[Float[Tensor, "batch pos d_model"], ...]
    mlps: str  # "frozen" (held too) or "free" (recomputed)
    norms: str  # "recomputed" or "frozen" (scales of the base run)

    def at(self, positions: Sequence[int]) -> HeldRun:
        """Narrow the run to some of its positions."""
        if tuple(positions) == self.positions:
            return self
        where = {position: row for row, position in enumerate(self.positions)}
        rows = [where[p] for p in positions]
        middle = tuple(one.index_select(1, places(rows, one.device)) for one in self.middle)
        return replace(self, positions=tuple(positions), middle=middle)

    def entering(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The base run's stream before a layer, at the positions."""
        start, stream = self.positions[0], self.record.stream(layer, self.positions[0])
        return stream.index_select(1, places([p - start for p in self.positions], stream.device))

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
            moved = moved.to(place_of(self.record.model, number))
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
        left = self.entering(n_layers)
        return found | {node: left + moved.to(left.device) for node in wanted if node.kind == "logits"}

    @torch.no_grad()
    def outputs(
        self, read: Mapping[Node, Float[Tensor, "row batch pos _"]]
    ) -> dict[tuple[str, int, int], tuple[Float[Tensor, "row batch _ _"], Float[Tensor, "batch _ _"]]]:
        """What receivers make of an input, beside the base run's own: by ("z", layer, head) or ("mlp", layer, 0)."""
        found: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        for node, given in read.items():
            if node.kind == "mlp" and node.layer is not None:
                base, layer = self.middle[node.layer], layer_of(self.record.model, node.layer)
                found["mlp", node.layer, 0] = (self._mlp(layer, given, base), self._mlp(layer, base, base))
        for number in sorted({node.layer for node in read if node.kind in ("head", "kv") and node.layer is not None}):
            here = {node: given for node, given in read.items() if node.layer == number and node.kind != "mlp"}
            read_anew = reread(self.record, number, here, self.positions)
            found |= {("z", number, head): pair for head, pair in read_anew.items()}
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
        normed = self._normed(model.bridge.ln_final.original_component, stream, self.entering(self.record.n_layers))
        head = model.bridge.unembed.original_component
        logits = head(normed.to(device_of(head))).to(model.device)
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
    later = list(range(held.positions[0], len(held.record.spans)))
    plans: list[Plan] = []
    for row in range(len(next(iter(read.values())))):
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
            plan += Plan(write(Site("z", number, head, span), new[0]) for head, (new, _) in z.items())
        else:
            plan += Plan(
                write(Site(node.input or "q", number, node.index, positions), given) for node, given in here.items()
            )
    return plan
