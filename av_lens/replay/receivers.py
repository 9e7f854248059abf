"""What would the metric do if only one reader of the stream read something else? Gradients at every reader's own input.

The residual stream is read by the queries, keys and values of every head, by every MLP and by the unembedding. Each
reading is a branch of its own (the layer's norm included), and

    G[v] = d metric / d (the stream that v reads)                                             total: all that v causes
    d metric / d stream before a layer = d metric / d stream after it + sum of G over the layer's readers

Keys and values are *ungrouped*: a head's branch is the copy of the key that this query head alone reads; the sum over
the heads that share a key-value head is the gradient of the shared copy.

The gradients are made from the last layer down, one layer at a time, from the streams of a recorded run; no graph of
the whole run is kept, so that prompts of thousands of positions fit.

Source: the forks are those of edge attribution (Syed et al., 2023); ungrouped keys and values as in "Same Task,
Different Circuits" (2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.unembedding import unembedded
from av_lens.errors import InputError, ModelError
from av_lens.families.decoder import Layer, Read, attended
from av_lens.metrics.metric import Metric
from av_lens.replay.cascade import Window
from av_lens.replay.recording import Record
from av_lens.replay.rerun import layer_of, layers

KINDS = ("logits", "mlp", "q", "k", "v")


@dataclass(frozen=True, eq=False)
class Reading:
    """The readers of one kind in one layer, and the metric's gradient at their inputs.

    Attributes:
        kind: "q", "k" or "v" (one reader for each query head), "mlp" or "logits".
        layer: the layer; the number of layers for the logits.
        gradient: `[batch, pos, reader, d_model]`, at the positions from the asked start on.
    """

    kind: str
    layer: int
    gradient: Float[Tensor, "batch _ reader d_model"]

    @property
    def names(self) -> list[str]:
        """The readers' names: "L3H5.q", "L3 mlp", "logits"."""
        return reader_names(self.kind, self.layer, self.gradient.shape[2])


def reader_names(kind: str, layer: int, n_readers: int) -> list[str]:
    """Name readers."""
    if kind in ("logits", "mlp"):
        return ["logits" if kind == "logits" else f"L{layer} mlp"]
    return [f"L{layer}H{head}.{kind}" for head in range(n_readers)]


def require_restart(record: Record, what: str) -> None:
    """Refuse a run whose layers are not of the layout that is known here."""
    record.require_standing()
    if record.hooked_because:
        raise ModelError(f"{what} computes layers by themselves, and cannot here: {record.hooked_because}.")
    if record.traits.bidirectional:
        roles = ", ".join(record.traits.bidirectional)
        raise ModelError(f"{what} needs positions that read only earlier ones; here {roles} read both ways.")


def readings(
    record: Record,
    metric: Metric,
    *,
    start: int = 0,
    above: int = -1,
    middle: Float[Tensor, "batch _ d_model"] | None = None,
) -> Iterator[Reading]:
    """Give the metric's gradient at every reader's input, from the logits down."""
    require_restart(record, "a gradient at each reader's input")
    gradient = _at_logits(record, metric, start)
    yield Reading("logits", record.n_layers, gradient[:, :, None])
    window = record.window(start)
    for number, layer in layers(record.model, above + 1, backwards=True):
        stream = record.stream(number, start)
        with torch.enable_grad():
            leaves, z = _attention(layer, stream, record.past(number, start), window)
        reached = stream + layer.write(z.detach()).detach()
        entering = _through_mlp(layer, reached, gradient)
        yield Reading("mlp", number, entering[:, :, None])
        gradient = gradient + entering
        read = layer.along(gradient.detach())
        for kind, reader in zip("qkv", torch.autograd.grad(z, leaves, read), strict=True):
            branches = _before_norm(layer, kind, stream, reader)
            yield Reading(kind, number, branches)
            gradient = gradient + branches.sum(2)
    if middle is not None:
        entering = _through_mlp(layer_of(record.model, above), middle, gradient)
        yield Reading("mlp", above, entering[:, :, None])


def _at_logits(record: Record, metric: Metric, start: int) -> Tensor:
    """The gradient at the stream that leaves the last layer, zero but at the generation position."""
    asked = record.spans.generation_position
    left = record.stream(record.n_layers, start)
    bound, tokens = metric.few_tokens()
    with torch.enable_grad():
        leaf = left[:, [asked - start]].detach().requires_grad_()
        measured = bound(unembedded(record.model, leaf, None if tokens is None else tokens.to(leaf.device)))
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
    layer: Layer, stream: Tensor, past: tuple[Tensor, Tensor], window: Window
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Leaves q, k, v `[batch, pos, head, d_head]` at their hooks, one copy for each query head, and `z`."""
    normed = layer.ln1(stream)
    copies = {"q": 1, "k": layer.group, "v": layer.group}
    ungrouped = [layer.heads(kind, normed).repeat_interleave(n, dim=2) for kind, n in copies.items()]
    q, k, v = (part.detach().requires_grad_() for part in ungrouped)
    queries, keys = (
        layer.turned(kind, part, window.cos, window.sin).transpose(1, 2) for kind, part in (("q", q), ("k", k))
    )
    read = [Read(keys, v.transpose(1, 2), window.own_mask)]
    if window.start:
        earlier_k, earlier_v = (part.repeat_interleave(layer.group, dim=1) for part in past)
        read.insert(0, Read(earlier_k, earlier_v, window.prefix_mask))
    return (q, k, v), attended(queries, read, layer.scaling)[0].transpose(1, 2)


def _before_norm(layer: Layer, kind: str, stream: Tensor, gradient: Tensor) -> Tensor:
    """Bring gradients at heads `[batch, pos, head, d_head]` to each head's own copy of the stream, before the norm."""
    normed = torch.einsum("bphd,hdm->bphm", gradient, layer.rows(kind))
    with torch.enable_grad():
        forks = stream[:, :, None].expand_as(normed).detach().requires_grad_()
        return torch.autograd.grad(layer.ln1(forks), forks, normed)[0]
