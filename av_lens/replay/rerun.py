"""Round the layers: the one loop that runs them, and the record of a run that differs from a recorded one.

Whoever computes layers without hooks goes round here: lean recording (from position 0, with nothing recorded yet),
replay (many plans, each from its own first layer), decoding (each plan's own keys and values besides), and `rerun`,
which keeps what every layer made. Its record holds what is new, from a layer and a position on, and reads all else
from the run it was made of; so a run can be edited, and the edited one again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.families.decoder import Layer
from av_lens.interventions import CompiledPlan, Plan
from av_lens.replay.cascade import Window
from av_lens.replay.recording import Own, Record
from av_lens.replay.restart import Made, run_layer
from av_lens.replay.taps import Taps

R = TypeVar("R", bound=Record)
Heads = tuple[Tensor, Tensor]


def layers(model: Any, first: int = 0, *, backwards: bool = False) -> Iterator[tuple[int, Layer]]:
    """Every layer from one on, with its number."""
    blocks = model.bridge.blocks
    numbers = range(first, len(blocks))
    for number in reversed(numbers) if backwards else numbers:
        yield number, Layer.of(blocks[number])


def layer_of(model: Any, number: int) -> Layer:
    """One layer."""
    return Layer.of(model.bridge.blocks[number])


def run_layers(
    model: Any,
    window: Window,
    taps: Taps,
    enter: Callable[[int, Tensor | None], Tensor],
    past: Callable[[int], Heads],
    *,
    rows: slice | None = None,
    earlier: Sequence[Heads] | None = None,
) -> Iterator[tuple[int, Made]]:
    """Run the layers from the plans' first on: each layer's number, and what it made.

    `enter` says what enters a layer, of its number and of what left the one before (None where none was run); `past`
    gives a layer's recorded keys and values before the window; `earlier` each layer's own ones between the window's
    start and these positions, while decoding. Of the last layer the stream is wanted at `rows` alone.
    """
    stream: Tensor | None = None
    last = model.spec.n_layers - 1
    for number, layer in layers(model, taps.first_layer):
        before, wanted = None if earlier is None else earlier[number], rows if number == last else None
        made = run_layer(layer, number, enter(number, stream), past(number), window, taps, wanted, before)
        stream = made.stream
        yield number, made


def restarted_layers(
    record: Record, taps: Taps, *, entering: Tensor | None = None, rows: slice | None = None
) -> Iterator[tuple[int, Made]]:
    """The same from a recorded run; `entering` may take the recorded stream's place in the first layer."""
    start = taps.offset
    enter = partial(_restarted, record, taps, entering)
    return run_layers(record.model, record.window(start), taps, enter, lambda one: record.past(one, start), rows=rows)


def _restarted(record: Record, taps: Taps, entering: Tensor | None, number: int, stream: Tensor | None) -> Tensor:
    recorded = record.stream(number, taps.offset) if entering is None or stream is not None else entering
    return taps.enter(number, stream, recorded)


def no_edits(n_prompt: int, layer: int = 0, start: int = 0) -> Taps:
    """One plan that edits nothing, from a layer and a position on."""
    return Taps([CompiledPlan((), n_prompt=n_prompt, first_layer=layer, first_position=start)], start)


@torch.no_grad()
def rerun(record: R, taps: Taps, *, until: int | None = None, entering: Tensor | None = None) -> R:
    """Record the run under one plan."""
    device = record.resid[0].device
    streams = {} if entering is None else {taps.first_layer: entering.to(device)}
    heads: dict[int, Heads] = {}
    for number, made in restarted_layers(record, taps, entering=entering):
        streams[number + 1] = made.stream[0].to(device)
        keys, values = (part[0].transpose(1, 2).to(device) for part in (made.keys, made.values))
        heads[number] = keys, values
        if number == until:
            break
    return replace(record, own=Own(record, taps.offset, streams, heads))


def rerun_from(record: R, layer: int, stream: Float[Tensor, "batch _ d_model"], *, start: int = 0) -> R:
    """Record the run in which another stream enters a layer, or leaves the last, from `start` on."""
    return rerun(record, no_edits(len(record.spans), layer, start), entering=stream)


def start_of(record: Record, plan: CompiledPlan) -> int:
    """The first position that must be computed anew under a plan."""
    return record.traits.restart(plan.first_position, record.spans.roles)


def rerun_under(record: R, plan: Plan, *, until: int | None = None) -> R:
    """Record the run under a plan, up to a layer."""
    compiled = plan.compile(record.model.spec, record.spans, batch=record.batch)
    return rerun(record, Taps([compiled], start_of(record, compiled)), until=until)
