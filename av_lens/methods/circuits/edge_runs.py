"""What does the model still do when only some readings of some writes are its own? Circuits of edges.

For a receiver v (a head's queries, keys or values, an MLP, the logits), at the site's positions,

    v reads the stream as it is now - the sum of (z_u as it is now - z_u of the empty donor) over senders u

(embedding, heads, MLPs) whose edge to v is outside the circuit. All that follows is recomputed; elsewhere positions are
the run's own. With all edges this is the model, with none the answer is read from the empty donor's writes. Keys and
values are ungrouped, as in `edge_attribution`, whose names these are.

Source: Mueller et al. (MIB, 2025); Conmy et al. (ACDC, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from av_lens.core.budget import GIGABYTE
from av_lens.core.calls import unembedded
from av_lens.families.decoder import Layer, Read, attended
from av_lens.interventions import Site
from av_lens.methods.circuits.runs import CircuitRuns, Nodes, TermRun, Values
from av_lens.metrics import require_numbers
from av_lens.replay.held import reader_names, require_restart
from av_lens.replay.rerun import layers, with_added
from av_lens.replay.traces import Trace

ARROW = " -> "


@dataclass(frozen=True)
class Edges(Nodes):
    """The edges of a model: those of one group of senders to one of receivers stand together."""

    senders: tuple[str, ...] = ()
    receivers: tuple[str, ...] = ()
    ends: tuple[tuple[int, int], ...] = ()  # the sender and the receiver of each, by number
    groups: tuple[int, ...] = ()  # how many edges stand together

    @classmethod
    def of(cls, spec: Any, over: str = "edge") -> Edges:
        """List a model's edges; `layers` and `heads` are the senders'."""
        writers: list[list[tuple[str, int, int | None]]] = [[("embed", -1, None)]]
        readers: list[tuple[list[str], int]] = []  # with how many groups of senders come before
        for layer in range(spec.n_layers):
            readers += [(reader_names(kind, layer, spec.n_heads), len(writers)) for kind in "qkv"]
            writers.append([(f"L{layer}H{head}", layer, head) for head in range(spec.n_heads)])
            readers.append((reader_names("mlp", layer, 1), len(writers)))
            writers.append([(f"L{layer} mlp", layer, None)])
        readers.append((["logits"], len(writers)))
        senders = [one for group in writers for one in group]
        receivers = [name for names, _ in readers for name in names]
        known, ends, groups = {name: i for i, name in enumerate(receivers)}, list[tuple[int, int]](), list[int]()
        first = 0
        for number, group in enumerate(writers):
            for names in (names for names, before in readers if number < before):
                ends += [(first + i, known[name]) for i in range(len(group)) for name in names]
                groups.append(len(group) * len(names))
            first += len(group)
        names = tuple(f"{senders[s][0]}{ARROW}{receivers[r]}" for s, r in ends)
        layers, heads = tuple(senders[s][1] for s, _ in ends), tuple(senders[s][2] for s, _ in ends)
        return cls(names, layers, heads, tuple(s[0] for s in senders), tuple(receivers), tuple(ends), tuple(groups))

    def within_layers(self) -> list[list[int]]:
        """Group the edges that may stand for one another in a matched control."""
        return [part.tolist() for part in np.split(np.arange(len(self)), np.cumsum(self.groups)[:-1])]

    def sites(self, positions: tuple[int, ...]) -> list[Site]:
        """List where senders write."""
        layers_ = range(max(self.layers) + 1)
        inside = [Site(part, layer, positions=positions) for part in ("z", "mlp_out") for layer in layers_]
        return [Site("embed", positions=positions), *inside]

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor]:
        first, second = torch.tensor(self.ends).T
        return first, second

    def cut(self, kept: frozenset[int]) -> Bool[Tensor, "sender receiver"]:
        """Which readings a circuit replaces."""
        gone = torch.ones(len(self), dtype=torch.bool)
        gone[list(kept)] = False
        out = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        out[self._index] = gone
        return out


class EdgeRuns(CircuitRuns):
    """m of any circuit of edges, each measured once."""

    def _scores(self, number: int, one: TermRun, empty: str, circuits: Sequence[frozenset[int]]) -> np.ndarray:
        trace, edges = self.trace(number), self.nodes
        assert isinstance(edges, Edges)
        require_restart(trace, "a circuit of edges")
        rows = len(trace.spans) - one.positions[0]
        each = trace.resid[0][:, :1].nbytes * rows * (len(edges.senders) + 4 * self.model.spec.n_heads)
        size = int(max(1, self.budget_gb * GIGABYTE // each))
        found: list[Tensor] = []
        for start in range(0, len(circuits), size):
            cut = torch.stack([edges.cut(kept) for kept in circuits[start : start + size]])
            run = _EdgeRun(trace, cut, edges, one.positions, one.given[empty])
            found += [one.metric(logits) for logits in run.logits()]
        scores = torch.stack(found).double().cpu().numpy()
        if edges.all in circuits:
            require_numbers(torch.from_numpy(scores[list(circuits).index(edges.all)]), one.metric.name)
        return scores


@dataclass(eq=False)
class _EdgeRun:
    """Several circuits of edges, run together from the site's first position on."""

    trace: Trace
    cut: Bool[Tensor, "circuit sender receiver"]
    edges: Edges
    positions: tuple[int, ...]
    given: Values

    @torch.no_grad()
    def logits(self) -> Float[Tensor, "circuit batch 1 d_vocab"]:
        """Read the answers."""
        start, model = self.positions[0], self.trace.model
        window, stream = self.trace.window(start), self.trace.stream(0, start).expand(len(self.cut), -1, -1, -1)
        self.rows = [position - start for position in self.positions]
        self.changes = self._change(stream[..., None, :], self.given["embed", 0][:, :, None])
        for number, layer in layers(model):
            q, k, v = (self._heads(layer, kind, number, stream) for kind in "qkv")
            q, k = (layer.turned(kind, one, window.cos, window.sin) for kind, one in (("q", q), ("k", k)))
            queries, keys, values = (part.transpose(2, 3) for part in (q, k, v))
            before = [part.repeat_interleave(layer.group, dim=1) for part in self.trace.past(number, start)]
            read = [Read(before[0], before[1], window.prefix_mask), Read(keys, values, window.own_mask)]
            z = attended(queries, read[0 if start else 1 :], layer.scaling)[0].transpose(2, 3)
            stream = stream + layer.write(z)
            change = self._change(layer.results(z), layer.results(self.given["z", number]))
            self.changes = torch.cat((self.changes, change), dim=-2)
            written = layer.mlp(layer.ln2(self._read(reader_names("mlp", number, 1), stream)[..., 0, :]))
            stream = stream + written
            change = self._change(written[..., None, :], self.given["mlp_out", number][:, :, None])
            self.changes = torch.cat((self.changes, change), dim=-2)
            if number in self.trace.added:
                stream = with_added(stream, self.trace.added[number][:, start:])
        asked = self.trace.spans.generation_position - start
        return unembedded(model, self._read(["logits"], stream)[:, :, [asked], 0])

    def _change(self, now: Tensor, donor: Tensor) -> Float[Tensor, "circuit batch row sender d_model"]:
        """What senders write beyond the donor's, at the site."""
        change = torch.zeros_like(now)
        change[:, :, self.rows] = now[:, :, self.rows] - donor
        return change

    def _read(self, names: list[str], stream: Tensor) -> Float[Tensor, "circuit batch row reader d_model"]:
        """What each reader reads of the stream."""
        first = self.edges.receivers.index(names[0])
        gone = self.cut[:, : self.changes.shape[-2], first : first + len(names)].to(stream)
        return stream[..., None, :] - torch.einsum("csr,cbpsm->cbprm", gone, self.changes)

    def _heads(self, layer: Layer, kind: str, number: int, stream: Tensor) -> Tensor:
        normed = layer.ln1(self._read(reader_names(kind, number, layer.n_heads), stream))
        share = 1 if kind == "q" else layer.group
        return torch.stack([layer.head(kind, h // share, normed[..., h, :]) for h in range(layer.n_heads)], dim=-2)
