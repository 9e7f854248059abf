"""Edge attribution patching: which readings of which writes does the answer hang on?

For a sender u (embedding, head, MLP) and a receiver v that comes after it (a head's queries, keys or values, an MLP,
the unembedding)

    EAP(u to v) = (z_u(donor) - z_u(base)) . dm / d(input of v)       summed over positions

z_u is what u writes to the stream; the gradient is taken at v's own branch, before its norm, and holds all that v
causes. Keys and values are ungrouped: "L4H2.k" is the key that query head 2 alone would see.

    variant="eap"             the gradient of the base run
    variant="ig_inputs"       its mean over runs whose embedding (media and text) lies between base and donor
    variant="ig_activations"  for each sender group (embedding, a layer's heads, an MLP) its mean over runs in which
                              what this group writes lies between base and donor
    variant="gim"             the gradient of the base run by the backward rules of GIM (`replay.held`): no derivative

A positive score raises the metric when the donor's value comes in. The means are midpoint sums over `steps`. Closure:
the embedding's edges sum to m(donor) - m(base) along the integrated path; with "ig_activations" every group's to the
exact effect of patching it.

Source: Syed et al. (2023); EAP-IG: Hanna et al. (2024); the activations variant: Mueller et al. (MIB, 2025); GIM: Edin
et al. (2025, 2505.17630). Not done: answers of several tokens (at their own positions edges leave that no donor gives).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core import Progress, run
from av_lens.core.budget import GIGABYTE
from av_lens.errors import InputError
from av_lens.families.decoder import Layer, hook_name
from av_lens.inputs import AVInputs, Pair
from av_lens.interventions import Site
from av_lens.methods.shared.frame import Examples, Frame, Stack, numbers
from av_lens.methods.shared.places import Axes, Place
from av_lens.metrics import Metric, require_numbers
from av_lens.model import HookedAVLLM
from av_lens.replay.held import Reading, reader_names, readings, require_restart
from av_lens.replay.rerun import layer_of, rerun_from, with_added
from av_lens.replay.traces import Trace, record
from av_lens.results import EdgeScores
from av_lens.spans import Span

INTEGRATED = ("ig_inputs", "ig_activations")
SIGNS = {
    "noise": "values of the corrupt run into the clean run; positive: the edge raises the metric when corrupted",
    "denoise": "values of the clean run into the corrupt run; positive: the edge raises the metric when restored",
}


def edge_attribution(
    model: HookedAVLLM,
    pair: Pair | Sequence[Pair],
    *,
    metric: Metric | Callable[..., Any] | None = None,
    variant: str = "eap",
    steps: int = 5,
    over: str = "edge",
    at: str | Span | None = None,
    direction: str = "noise",
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> EdgeScores:
    """Score every edge between two components to first order.

    Args:
        model: a `HookedAVLLM`.
        pair: aligned clean and corrupt inputs, or several pairs of one layout or of different ones.
        metric: `logit_diff(...)` and its like of one-token answers, or any callable of logits
            `[batch, asked_pos, d_vocab]` to `[batch]` that has a gradient.
        variant: "eap", "ig_inputs", "ig_activations" or "gim".
        steps: runs along the path of the integrated variants.
        over: "edge", or "edge span" to tell edges apart by the role of the positions at which they act.
        at: the positions at which edges act: roles joined by `|`, or a `Span`; None for all.
        direction: "noise" imagines values of the corrupt run in the clean run, "denoise" the reverse.
        stack: pairs that run together.
        budget_gb: memory for what senders write, kept between layers.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        Scores of every example, pairs in the order given.

    Raises:
        InputError: an unknown variant, axis or direction, a metric that has no gradient or is NaN, or unlike pairs.
        InterventionError: positions outside the input.
        ModelError: a model whose layers cannot be computed by themselves.
    """
    require_choice("variant", variant, ("eap", *INTEGRATED, "gim"))
    require_choice("axis", over, ("edge", "edge span"))
    require_choice("direction", direction, SIGNS)
    if steps < 1:
        raise InputError(f"steps={steps}: integrated gradients need at least one run; 5 is usual.")
    examples = Examples.paired("edge_attribution", pair)
    axes = Axes.parsed("layer span" if over == "edge span" else "layer")
    places, labels = [[("all", tuple(range(len(spans))))] for spans in examples.spans], ["all"]
    if axes.places is not None or at is not None:
        places, labels = axes.cut_alike(examples.spans, at)
    senders, receivers = _senders(model.spec), _receivers(model.spec)
    frame = Frame.of(model, examples, metric)
    frame.shape(len(labels), len(senders), len(receivers))

    def work(stack: Stack, show: Progress) -> None:
        job = _Job.of(model, *stack.ends(direction), frame.own(stack), places[stack.members[0]], budget_gb)
        for done, total in job.run(variant, steps):
            show(f"edges, {variant}", done, total)
        frame.values[stack.rows], frame.lines[:, stack.rows] = job.scores.numpy(), job.columns

    frame.run(work, examples.stacks(stack), progress, whole=True)
    assert frame.metric is not None
    return EdgeScores.of(
        frame.values if axes.places else frame.values[:, 0],
        senders=senders,
        receivers=receivers,
        spans=labels if axes.places else None,
        baseline=frame.lines[0],
        donor=frame.lines[1],
        clusters=examples.clusters,
        metric=frame.metric.name,
        unit=frame.metric.unit,
        direction=f"{direction}: {SIGNS[direction]}",
        provenance=frame.stamp(
            method="edge attribution",
            variant=variant,
            steps=steps if variant in INTEGRATED else 1,
            over=over,
            at="all" if at is None else str(at),
            positions=dict(places[0]),
        ),
    )


def _senders(spec: Any) -> list[str]:
    inside = [*(f"H{head}" for head in range(spec.n_heads)), " mlp"]
    return ["embed", *(f"L{layer}{name}" for layer in range(spec.n_layers) for name in inside)]


def _receivers(spec: Any) -> list[str]:
    inside = [(kind, layer) for layer in range(spec.n_layers) for kind in ("q", "k", "v", "mlp")]
    ends = [reader_names(kind, layer, 1 if kind == "mlp" else spec.n_heads) for kind, layer in inside]
    return [name for names in (*ends, reader_names("logits", spec.n_layers, 1)) for name in names]


@dataclass(frozen=True, eq=False)
class _Group:
    """Senders that write at one point: the embedding (layer -1), a layer's heads, or its MLP."""

    part: str  # the component: "embed", "z" or "mlp_out"
    layer: int  # the layer
    # donor - base at every position: `[batch, pos, head, d_head]` for heads, else `[batch, pos, d_model]`
    change: Tensor
    heads: Layer | None  # the layer whose heads these are, else None
    first: int  # the place of the first of them among all senders

    def precedes(self, reading: Reading) -> bool:
        """Whether the readers come after these senders."""
        later = reading.kind == "mlp" and self.part == "z"
        return reading.layer > self.layer or (later and reading.layer == self.layer)

    def written(self, positions: Sequence[int]) -> Float[Tensor, "batch _ sender d_model"]:
        """What each sender's write changes by, at some positions."""
        change = self.change[:, list(positions)]
        return change[:, :, None] if self.heads is None else self.heads.results(change)

    def together(self) -> Float[Tensor, "batch pos d_model"]:
        """What all of them together change in the stream."""
        return self.change if self.heads is None else self.change.flatten(-2) @ self.heads.outputs().flatten(0, 1)


@dataclass(frozen=True, eq=False)
class _Job:
    """One stack of pairs of one layout."""

    trace: Trace
    groups: list[_Group]
    middles: tuple[Tensor, ...]
    places: list[Place]
    metric: Metric
    columns: np.ndarray
    receivers: list[str]
    scores: Tensor
    budget_gb: float | int

    @classmethod
    def of(
        cls, model: Any, base: AVInputs, donor: AVInputs, metric: Metric, places: list[Place], budget_gb: float | int
    ) -> _Job:
        trace, layers = record(model, base), range(model.spec.n_layers)
        require_restart(trace, "edge attribution")
        if metric.teacher_forced:
            raise InputError(
                f"{metric.name}: an answer has several tokens, and what is written at the answer's own positions would "
                "be edges too, which no donor run of the prompt gives. Use answers of one token, such as the first "
                "token of each (their ids)."
            )
        asked = Site("resid_post", layers[-1], positions="generation")
        measured = [trace.gradients(asked, metric).metric]  # refuses a metric that has no gradient
        require_numbers(measured[0], metric.name)
        sites = [Site("embed"), *(Site(part, layer) for part in ("z", "mlp_out") for layer in layers)]
        with torch.no_grad():
            runs = [
                run(model, base, capture=[*sites, *(Site("resid_mid", layer) for layer in layers)]),
                run(model, donor, capture=sites),
            ]
        measured.append(metric(runs[1].logits))
        require_numbers(measured[1], metric.name, run="the donor run")
        columns = numbers(torch.stack(measured))
        groups, senders = list[_Group](), _senders(model.spec)
        for layer, part in [(-1, "embed"), *((layer, part) for layer in layers for part in ("z", "mlp_out"))]:
            name = hook_name(part, None if layer < 0 else layer)
            change = runs[1].cache[name] - runs[0].cache[name]
            heads = layer_of(model, layer) if part == "z" else None
            first = {"embed": "embed", "z": f"L{layer}H0", "mlp_out": f"L{layer} mlp"}[part]
            groups.append(_Group(part, layer, change, heads, senders.index(first)))
        middles = tuple(runs[0].cache["resid_mid", layer] for layer in layers)
        receivers = _receivers(model.spec)
        scores = torch.full((len(base), len(places), len(senders), len(receivers)), torch.nan, dtype=torch.float64)
        return cls(trace, groups, middles, places, metric, columns, receivers, scores, budget_gb)

    def run(self, variant: str, steps: int) -> Iterator[tuple[int, int]]:
        """Fill the scores, saying after each pass how many of how many are done."""
        passes, written = [(None, 0.0)], _Kept(self.budget_gb)
        if variant in INTEGRATED:
            groups = self.groups[:1] if variant == "ig_inputs" else self.groups
            passes = [(group, (step + 0.5) / steps) for group in groups for step in range(steps)]
        share = 1.0 / (steps if variant in INTEGRATED else 1)
        for number, (group, way) in enumerate(passes, 1):
            scored = [group] if variant == "ig_activations" and group is not None else self.groups
            for reading in self._readings(group, way, gim=variant == "gim"):
                self._add([sender for sender in scored if sender.precedes(reading)], reading, share, written)
            yield number, len(passes)

    @cached_property
    def _start(self) -> int:
        return self._whole_block(min(positions[0] for _, positions in self.places))

    def _whole_block(self, position: int) -> int:
        return self.trace.traits.restart(position, self.trace.spans.roles)

    def _readings(self, group: _Group | None, way: float, *, gim: bool) -> Iterator[Reading]:
        """Gradients in the base run, or in the run in which a group's writes lie some way between base and donor."""
        if group is None:
            return readings(self.trace, self.metric, start=self._start, gim=gim)
        change, layer, middle = way * group.together(), group.layer, None
        moved = torch.nonzero(change.abs().amax((0, 2)))
        first = self._whole_block(int(moved[0])) if len(moved) else len(self.trace.spans) - 1
        if group.part == "z":
            middle, modules = self.middles[layer] + change, layer_of(self.trace.model, layer)
            with torch.no_grad():
                stream = middle + modules.mlp(modules.ln2(middle))
                if (added := self.trace.added.get(layer)) is not None:
                    stream = with_added(stream, added.to(stream.device))
            middle = middle[:, self._start :]
        else:
            stream = self.trace.stream(layer + 1, 0) + change
        edited = rerun_from(self.trace, layer + 1, stream[:, first:], start=first)
        return readings(edited, self.metric, start=self._start, above=layer, middle=middle)

    def _add(self, senders: Sequence[_Group], reading: Reading, share: float, written: _Kept) -> None:
        first = self.receivers.index(reading.names[0])
        for number, (_, positions) in enumerate(self.places):
            gradient = reading.gradient[:, [one - self._start for one in positions]].float()
            for sender in senders:
                found = torch.einsum("bpsm,bprm->bsr", written.of(sender, number, positions), gradient)
                block = self.scores[:, number].narrow(1, sender.first, found.shape[1]).narrow(2, first, found.shape[2])
                block.nan_to_num_(0.0).add_(found.double().cpu(), alpha=share)


class _Kept:
    """What senders write at places, kept up to a budget and made anew beyond it."""

    def __init__(self, budget_gb: float | int) -> None:
        self._left = budget_gb * GIGABYTE
        self._found: dict[tuple[int, int], Tensor] = {}

    def of(self, sender: _Group, number: int, positions: Sequence[int]) -> Float[Tensor, "batch _ sender d_model"]:
        if (key := (sender.first, number)) in self._found:
            return self._found[key]
        made = sender.written(positions).float()
        if made.nbytes <= self._left:
            self._left -= made.nbytes
            self._found[key] = made
        return made
