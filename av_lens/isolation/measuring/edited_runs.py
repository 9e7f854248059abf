"""What does the model do when some heads are edited already? The trace of an edited run.

The search for sets asks the same question about many sets that share members. An edited run is therefore made once and
kept like a recorded one (`ModelEngine.record_edited`), and every further edit restarts there, at the further head's own
layer, instead of at the first layer of the whole set. Members of a set are measured in the same way, on the run in
which the other members are edited.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.interventions import CompiledPlan, Plan
from av_lens.replay.restart import Layer, run_layer
from av_lens.replay.taps import Taps
from av_lens.replay.traces import Trace


@dataclass(frozen=True, eq=False)
class EditedTrace(Trace):
    """A trace of an edited run: its own activations from a position and a layer on, the unedited run's before.

    Attributes:
        base: the trace that was edited.
        start: the first position that was computed anew.
        first: the layer of the first edit; the stream that enters it is the base's.
        streams: the stream that entered each layer after `first`, and the one that left the last, from `start` on.
        new_keys: the rotated keys of the layers from `first` on, `[batch, kv_head, new_pos, d_head]`.
        new_values: the values, likewise.
    """

    base: Trace | None = None
    start: int = 0
    first: int = 0
    streams: tuple[Float[Tensor, "batch new_pos d_model"], ...] = field(default=())
    new_keys: tuple[Float[Tensor, "batch kv_head new_pos d_head"], ...] = field(default=())
    new_values: tuple[Float[Tensor, "batch kv_head new_pos d_head"], ...] = field(default=())

    def stream(self, layer: int, start: int) -> Float[Tensor, "batch pos d_model"]:
        """The edited run's stream that entered a layer, from a position on.

        Args:
            layer: the layer; the number of layers for the stream that left the last.
            start: the first position.

        Returns:
            The stream; not to be written to.
        """
        assert self.base is not None
        if layer <= self.first:
            return self.base.stream(layer, start)
        own = self.streams[layer - self.first - 1]
        if start >= self.start:
            return own[:, start - self.start :]
        return torch.cat((self.base.stream(layer, start)[:, : self.start - start], own), dim=1)

    def past(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values before a position.

        Args:
            layer: the layer.
            end: the first position that is left out.

        Returns:
            Keys and values `[batch, kv_head, past, d_head]`; not to be written to.
        """
        assert self.base is not None
        if end <= self.start or layer < self.first:
            return self.base.past(layer, end)
        before = self.base.past(layer, self.start)
        own = (self.new_keys[layer - self.first], self.new_values[layer - self.first])
        keys, values = (
            torch.cat((old, new[:, :, : end - self.start]), dim=2) for old, new in zip(before, own, strict=True)
        )
        return keys, values


class _Keeping(Taps):
    """Taps that keep every layer's z, after its edits."""

    def __init__(self, plan: CompiledPlan, offset: int) -> None:
        super().__init__([plan], offset)
        self.z: dict[int, Tensor] = {}

    def __call__(self, component: str, layer: int | None, activation: Tensor, rows: slice | None = None) -> Tensor:
        """Apply the edits at one place, and keep z.

        Args:
            component: the component.
            layer: its layer.
            activation: `[plan, batch, ...]`.
            rows: which of the restart's rows these are; None for all.

        Returns:
            The edited activation.
        """
        found = super().__call__(component, layer, activation, rows)
        if component == "z" and layer is not None:
            self.z[layer] = found[0]
        return found


@torch.no_grad()
def rerun(trace: Trace, plan: Plan) -> tuple[EditedTrace, dict[int, Float[Tensor, "batch pos head d_head"]]]:
    """Run a plan on a recorded input: the trace of the edited run, and every recomputed layer's z."""
    trace.require_standing()
    compiled = plan.compile(trace.model.spec, trace.spans, batch=trace.batch)
    start = trace.traits.restart(compiled.first_position, trace.spans.roles)
    taps, window = _Keeping(compiled, start), trace.window(start)
    stream: Tensor | None = None
    streams, keys, values = list[Tensor](), list[Tensor](), list[Tensor]()
    for number in range(taps.first_layer, trace.n_layers):
        entering = taps.enter(number, stream, trace.stream(number, start))
        layer = Layer.of(trace.model.bridge.blocks[number])
        made = run_layer(layer, number, entering, trace.past(number, start), window, taps)
        stream = made.stream
        streams.append(stream[0])
        for kept, part in ((keys, made.keys), (values, made.values)):
            kept.append(part[0].transpose(1, 2))
    compiled.verify()
    edited = EditedTrace(
        model=trace.model, x=trace.x, resid=trace.resid, keys=trace.keys, values=trace.values, tables=trace.tables,
        mask=trace.mask, base=trace, start=start, first=taps.first_layer, streams=tuple(streams),
        new_keys=tuple(keys), new_values=tuple(values), standing=trace.standing,
    )  # fmt: skip
    return edited, taps.z
