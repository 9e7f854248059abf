"""What is read while a model runs and let go of: the stream by layer, pooled over spans, and where attention goes.

    attention   mass(Q, K) = sum over q in Q, k in K of p[q, k]
    value       mass(Q, K) = sum over q in Q, k in K of p[q, k] |v_k W_O|     (the norm of what is moved)

A hook reduces each layer's pattern to sums as it passes. |v W_O| = |v R^T| with the triangular factor R of W_O's QR
decomposition: exact, and as cheap as the head is narrow.

Source: Kobayashi et al. (2020) for the norm; streaming is ours.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core.calls import heads_first, require_known_layers, watching
from av_lens.core.execution import logits_of
from av_lens.families.decoder import Layer, hook_name
from av_lens.interventions.edits import resolve_positions
from av_lens.spans import SpanMap

Reader = Callable[[int, Tensor], None]  # called with a layer and its activation


def read_layers(model: Any, x: Any, readers: Mapping[str, Reader], asked: Sequence[int] = (0,)) -> Tensor:
    """Run once, handing these components of every layer to their readers; gives the logits at the asked positions."""
    layers = range(model.spec.n_layers)
    hooks = [(hook_name(name, i), watching(partial(reader, i))) for name, reader in readers.items() for i in layers]
    return logits_of(model, x, hooks, torch.tensor(list(asked)))


@torch.no_grad()
def pooled_streams(model: Any, x: Any, at: Sequence[Any]) -> Float[Tensor, "batch layer span d_model"]:
    """Average the residual stream over the positions of each span, before the first layer and after every one."""
    places = [resolve_positions(span, x.spans, what="probe") for span in at]
    n_layers = model.spec.n_layers
    found = torch.zeros(len(x), n_layers + 1, len(places), model.spec.d_model)

    def pool(level: int, stream: Tensor) -> None:
        for number, place in enumerate(places):
            index = torch.tensor(place.index, device=stream.device)
            found[:, level, number] = stream.index_select(1, index).float().mean(1).cpu()

    def last(layer: int, stream: Tensor) -> None:
        if layer == n_layers - 1:
            pool(n_layers, stream)

    read_layers(model, x, {"resid_pre": pool, "resid_post": last}, [len(x.spans) - 1])
    return found


WEIGHTS = ("attention", "value")
SINK_TIMES = 10.0
Groups = Mapping[str, Sequence[int]]


@torch.no_grad()
def attention_mass(
    model: Any, x: Any, queries: Groups, *, keys: Groups | None = None, weight: str = "attention"
) -> Float[Tensor, "batch layer head query key"]:
    """Sum attention over groups of queries and of keys, in one run."""
    require_choice("weight", weight, WEIGHTS)
    if weight == "value":
        require_known_layers(model, 'weight="value"')
    n, spec = len(x.spans), model.spec
    rows = _indicator(queries, n).to(model.device)
    columns = None if keys is None else _indicator(keys, n).to(model.device)
    found = torch.zeros(len(x), spec.n_layers, spec.n_heads, len(queries), n if keys is None else len(keys))
    norms: dict[int, Tensor] = {}

    def keep(layer: int, values: Tensor) -> None:
        norms[layer] = moved_norms(model, layer, heads_first(values, "v"))

    def sum_up(layer: int, pattern: Tensor) -> None:
        mass = _summed(pattern, rows)
        if weight == "value":
            mass = mass * norms.pop(layer)[:, :, None]
        found[:, layer] = (mass if columns is None else mass @ columns.T).cpu()

    readers: dict[str, Reader] = {"pattern": sum_up} | ({"v": keep} if weight == "value" else {})
    read_layers(model, x, readers, [n - 1])
    return found


def moved_norms(
    model: Any, layer: int, values: Float[Tensor, "batch kv_head pos d_head"]
) -> Float[Tensor, "batch head pos"]:
    """Measure what one unit of attention to each position would move: |v W_O|, head by head."""
    weight = Layer.of(model.bridge.blocks[layer]).outputs().float()
    triangle = torch.linalg.qr(weight.transpose(-1, -2), mode="r").R
    spread = values.detach().float().repeat_interleave(len(weight) // values.shape[1], dim=1)
    return torch.einsum("bhkd,hed->bhke", spread, triangle).norm(dim=-1)


def incoming_mass(model: Any, x: Any, *, weight: str = "value") -> Float[Tensor, "batch pos"]:
    """Sum what the suffix reads from each position, over its positions, all layers and all heads."""
    suffix = {"suffix": x.spans.suffix.positions.tolist()}
    return attention_mass(model, x, suffix, weight=weight)[:, :, :, 0].sum((1, 2))


def sink_positions(
    incoming: Float[np.ndarray, "example pos"], spans: SpanMap, *, times: float | int = SINK_TIMES
) -> Int[np.ndarray, " position"]:
    """Apply the protocol's rule to incoming attention."""
    media = spans.media.positions
    mean = np.asarray(incoming, dtype=np.float64).mean(0)[media]
    return media[mean > times * mean.mean()] if len(media) else media


def sinks_by_layout(
    model: Any, stacks: Iterable[Any], *, times: float | int = SINK_TIMES
) -> list[tuple[SpanMap, list[int]]]:
    """Find one set of sinks for each layout, from all of its examples together."""
    found: list[tuple[SpanMap, list[np.ndarray]]] = []
    for x in stacks:
        parts = next((parts for spans, parts in found if spans.layout_difference(x.spans) is None), None)
        if parts is None:
            found.append((x.spans, parts := []))
        parts.append(incoming_mass(model, x).double().numpy())
    return [(spans, sink_positions(np.concatenate(parts), spans, times=times).tolist()) for spans, parts in found]


def sinks_of(spans: SpanMap, known: Iterable[tuple[SpanMap, list[int]]]) -> list[int]:
    """Look the sinks of a layout up."""
    return next((sinks for of, sinks in known if of.layout_difference(spans) is None), [])


def _indicator(groups: Groups, n: int) -> Tensor:
    """One row for each group, 1 where a position belongs to it."""
    rows = torch.zeros(len(groups), n)
    for number, positions in enumerate(groups.values()):
        rows[number, list(positions)] = 1.0
    return rows


def _summed(pattern: Tensor, rows: Tensor) -> Tensor:
    """Sum queries in float32, head by head where the pattern is kept in less: `[batch, head, group, key_pos]`."""
    if pattern.dtype == torch.float32:
        return rows @ pattern.detach()
    heads = [rows @ pattern[:, head].detach().float() for head in range(pattern.shape[1])]
    return torch.stack(heads, dim=1)


@runtime_checkable
class Recorded(Protocol):
    """A run that was recorded (`replay.recording.Record`)."""

    @property
    def x(self) -> Any:
        """Its input."""
        ...

    def logits_at(self, rows: Int64[Tensor, " row"]) -> Float[Tensor, "batch row d_vocab"]:
        """Its logits at some positions."""
        ...
