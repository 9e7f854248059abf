"""Does a restart reproduce the model's own run, and does each layer read what the hooked run read?

A model's first trace is made with hooks, and is restarted at the first layer, at every position. Besides, every head's
query, key and value are computed by themselves, as re-readings compute them, and its attention is read again: a layer
that is known wrongly in one place alone is refused too. What fails is run hooked, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from av_lens.core.activations import heads_first, watching
from av_lens.core.unembedding import unembedded
from av_lens.families.hook_names import hook_name
from av_lens.interventions import CompiledPlan
from av_lens.replay.recording import Record
from av_lens.replay.rereading import HeadRead
from av_lens.replay.rerun import layers
from av_lens.replay.stacks import restarted

R = TypeVar("R", bound=Record)
PROOF_ROWS = 512  # positions that a model's first trace restarts together, to see that it can
READ_ROWS = 4  # the last positions, at which every head is read again
PROOF_HOOKS = ("rot_q", "z")


class HookedReads:
    """What each layer's heads read in the hooked run at the last positions: rotated queries, and z."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], Tensor] = {}

    def hooks(self, n_layers: int) -> list[tuple[str, Callable[..., None]]]:
        """The hooks that keep it, `[batch, head, row, d_head]`."""
        places = [(component, layer) for layer in range(n_layers) for component in PROOF_HOOKS]
        return [(hook_name(*place), watching(partial(self._keep, *place))) for place in places]

    def _keep(self, component: str, layer: int, activation: Tensor) -> None:
        self.kept[component, layer] = heads_first(activation.detach(), component)[:, :, -READ_ROWS:]


@torch.no_grad()
def fault(record: Record, logits: Tensor, reads: HookedReads | None, *, everywhere: bool) -> str:
    """Restart at the first layer and compare with the run itself; say what is wrong, or nothing.

    Compared are the stream that leaves the last layer, at the last position or at every one (block by block, so that
    no more scores are held than a block's), the last position's logits, and what heads read.
    """
    n = len(record.spans)
    size = n if record.mask is not None else PROOF_ROWS
    blocks = [(start, min(start + size, n)) for start in range(0, n, size)] if everywhere else [(n - 1, n)]
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    stream = logits
    gaps: list[float] = []
    try:
        for start, end in blocks:
            empty = CompiledPlan((), n_prompt=end, first_layer=0, first_position=start)
            stream = restarted(_before(record, end), [empty], start, torch.arange(end - start))[0][0]
            gaps.append(_gap(stream, record.stream(record.n_layers, start)[:, : end - start]))
        gaps.append(_gap(unembedded(record.model, stream[:, -1]), logits))
        if not all(gap <= tolerance for gap in gaps):
            return f"a restart does not reproduce the recorded run (relative gap {max(gaps):.1e}): a layout unknown"
        for what, gap in () if reads is None else _reread(record, reads):
            if not gap <= tolerance:
                return f"{what}, computed anew, are not those of the recorded run (relative gap {gap:.1e})"
    except (AttributeError, TypeError, RuntimeError) as error:
        return f"this model's layers are not of the layout that a restart knows ({type(error).__name__}: {error})"
    return ""


def _reread(record: Record, reads: HookedReads) -> Iterator[tuple[str, float]]:
    """How far each layer's queries, keys, values and z are from the hooked run's, whole and head by head."""
    n, window = len(record.spans), record.window(0)
    rows = range(max(0, n - READ_ROWS), n)
    for number, layer in layers(record.model):
        normed, (keys, values) = layer.ln1(record.stream(number, 0)), record.past(number, n)
        turned = layer.turned("k", layer.heads("k", normed), window.cos, window.sin)
        made = {"keys": (turned, keys), "values": (layer.heads("v", normed), values)}
        yield from ((f"layer {number}'s {what}", _gap_of_heads(a.transpose(1, 2), b)) for what, (a, b) in made.items())
        last, cos, sin = (part[:, rows.start :] for part in (normed, window.cos[:, :, 0], window.sin[:, :, 0]))
        alone = {kind: [layer.head(kind, one, last) for one in range(layer.n_kv_heads)] for kind in "kv"}
        alone["k"] = [layer.turned("k", one, cos, sin) for one in alone["k"]]
        for what, kind, own in (("keys", "k", keys), ("values", "v", values)):
            gap = _gap_of_heads(torch.stack(alone[kind], dim=1), own[:, :, rows.start :])
            yield f"layer {number}'s {what}, head by head", gap
        heads = [HeadRead.of(record, number, head, rows) for head in range(layer.n_heads)]
        queries = torch.stack([head.q for head in heads], dim=1)
        yield f"layer {number}'s queries", _gap_of_heads(queries, reads.kept["rot_q", number])
        if queries.dtype == torch.float32:  # below it, scores of one head alone are rounded otherwise
            z = torch.stack([head.z for head in heads], dim=1)
            yield f"what layer {number}'s heads read (z)", _gap_of_heads(z, reads.kept["z", number])


def _gap_of_heads(again: Tensor, once: Tensor) -> float:
    """The same for `[batch, head, pos, d_head]`, all heads of a position together."""
    return _gap(again.transpose(1, 2).flatten(2), once.transpose(1, 2).flatten(2))


def _gap(again: Tensor, once: Tensor) -> float:
    """The largest difference at any position, as a share of the largest number there."""
    again, once = again.float(), once.float()
    return float(((again - once).abs().amax(-1) / once.abs().amax(-1).clamp(min=1e-6)).max())


def _before(record: R, end: int) -> R:
    """The recorded run up to a position; under a causal mask nothing there depends on what follows."""
    if end == len(record.spans):
        return record
    keys, values = (tuple(part[:, :, :end] for part in parts) for parts in (record.keys, record.values))
    cos, sin = (table[:, :end] for table in record.tables)
    resid = tuple(one[:, :end] for one in record.resid)
    return replace(record, resid=resid, keys=keys, values=values, tables=(cos, sin))
