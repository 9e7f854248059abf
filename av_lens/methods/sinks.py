"""Attention sinks: which media positions does the questioner read far more than the others, and who else reads them?

    incoming(k)  = sum over layers, heads and queries q of the suffix of p[q, k] |v_k W_O|
    k is a sink    where incoming(k), averaged over examples, is over 10 times its mean over media positions
    score(k)     = (V - A) / (V + A)      1: read by the picture alone, -1: read by the sound alone

with V and A the mean plain attention that later picture and later sound positions pay to k. A score of at least 0.5
towards its own modality is unimodal, another cross-modal; NaN where no later position of one modality exists (the
released code has 0 there). The cut at 0.5 is a convention of ours: the paper's was not found.

Layer by layer, dimension d is a sink dimension where the mean over sinks of |x_d| / rms(x) is over 10 times its mean
over dimensions. Positions mean the same only within one layout.

Source: "Probing Cross-modal Information Hubs" (arXiv 2605.10815) for the score, from its released code; Sun et al.
(2024) for the dimensions. Not done: that paper's causal tracing (patch the sinks instead).
"""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core import Progress, read_layers, watched
from av_lens.core.readings import SINK_TIMES, WEIGHTS, attention_mass, incoming_mass, sink_positions
from av_lens.errors import InputError
from av_lens.inputs import AVInputs
from av_lens.methods.shared.frame import Examples, Frame
from av_lens.model import HookedAVLLM
from av_lens.results import Grid
from av_lens.spans import Span, SpanMap

KINDS = ("unimodal", "cross-modal", "undetermined")
READ_BY = ("read_by_picture", "read_by_sound", "score")
READERS = {"picture": "video|image", "sound": "audio"}


@dataclass(frozen=True, eq=False)
class Sinks:
    """The sinks of one layout.

    Attributes:
        span: their positions; fit for cuts and sites. `x.spans.media - span` is the rest.
        table: one row for each: `position token role start_s incoming times examples read_by_picture read_by_sound
            score kind`; `times` is incoming over its mean, `examples` the share of examples in which it passes alone.
        dimensions: one row for each layer and sink dimension: `layer dimension at_sinks elsewhere` (other media).
        incoming: incoming attention, `[example, pos]`.
        elsewhere: one row for each position that passes the same bar and is no media position, nor in the suffix:
            `position token role start_s incoming times examples`.
        provenance: how they were found.
    """

    span: Span
    table: pd.DataFrame
    dimensions: pd.DataFrame
    incoming: Grid
    elsewhere: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.span)

    def of(self, kind: str) -> Span:
        """Choose the sinks of one kind.

        Args:
            kind: "unimodal", "cross-modal" or "undetermined".

        Returns:
            Their span, possibly empty.

        Raises:
            InputError: an unknown kind.
        """
        require_choice("kind of sink", kind, KINDS)
        chosen = self.table.loc[self.table["kind"] == kind, "position"]
        return Span(np.asarray(chosen, dtype=np.int64), self.span.source)

    def to_frame(self) -> pd.DataFrame:
        """Lay the sinks out as a tidy frame: `table`, one row for each sink."""
        return self.table

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind} {(self.table['kind'] == kind).sum()}" for kind in KINDS) if len(self) else "none"
        outside = ", ".join(
            f"{row['position']} {row['token']!r} ({row['times']:.3g} times the mean)"
            for row in self.elsewhere.nlargest(3, "times").to_dict("records")
        )
        return (
            f"Sinks({len(self)} media positions: {counts}; {len(self.dimensions)} sink dimensions; "
            f"{len(self.elsewhere)} in the text before the suffix{': ' * bool(outside)}{outside})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.table.to_html(index=False)}"


def find_sinks(
    model: HookedAVLLM,
    x: Any,
    *,
    times: float | int = SINK_TIMES,
    weight: str = "value",
    unimodal_from: float | int = 0.5,
    dimension_times: float | int = 10.0,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Sinks:
    """Find the sink positions and sink dimensions of these inputs.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, conflicts (their cell `va` is taken), or several of either, all of one layout.
        times: how many times the mean over media positions a sink must receive.
        weight: "value" (the protocol's: the norm of what is moved) or "attention".
        unimodal_from: from this score towards its own modality on, a sink is unimodal.
        dimension_times: how many times the mean over dimensions a sink dimension must carry at the sinks.
        stack: examples that run together, at most.
        budget_gb: memory for the attention of one layer.
        progress: called as `progress(stage, done, total)`; True shows a bar.

    Returns:
        The sinks; none may be found, and then `span` is empty. What passes among the text stands in `elsewhere`.

    Raises:
        InputError: inputs without media or of several layouts, or an unknown weight.
    """
    require_choice("weight", weight, WEIGHTS)
    examples = Examples.of(model, x)
    spans = _one_layout(examples)
    stacks = [(one.rows, one.x) for one in examples.stacks(examples.stack_size(model, stack, budget_gb))]
    total, incoming = 3 * len(stacks), np.zeros((len(examples), len(spans)))
    with watched(progress) as show:
        for done, (rows, inputs) in enumerate(stacks, 1):
            incoming[rows] = incoming_mass(model, inputs, weight=weight).numpy()
            show("sinks", done, total)
        found = spans.span(sink_positions(incoming, spans, times=times).tolist())
        table, read = _table(spans, found, incoming, times), dict.fromkeys(READ_BY, np.nan)
        if len(found):
            show("sinks", 2 * len(stacks), total)
            summed = np.sum([_later_reading(model, inputs, found) for _, inputs in stacks], axis=0)
            picture, sound = summed / len(examples)
            with np.errstate(invalid="ignore"):
                read = dict(zip(READ_BY, (picture, sound, (picture - sound) / (picture + sound)), strict=True))
        read_again = [inputs for _, inputs in stacks if len(found)]
        dimensions = _dimensions(model, read_again, spans, found, dimension_times)
        show("sinks", total, total)
    table = table.assign(**read)
    own = np.where(table["role"] == "audio", -table["score"], table["score"])  # read by its own modality
    kinds = np.where(own >= unimodal_from, "unimodal", "cross-modal").astype(object)
    table["kind"] = np.where(np.isnan(own), "undetermined", kinds)
    text, mean = (spans.system | spans.boundary).positions, incoming.mean(0)
    passing = text[mean[text] > times * mean[spans.media.positions].mean()]
    elsewhere = _table(spans, spans.span(passing.tolist()), incoming, times)
    frame = Frame.of(model, examples, measured=False)
    frame.values = incoming
    grid = frame.grid(
        {"pos": np.arange(len(spans))},
        named=(
            f"attention of the suffix ({weight}), all layers and heads",
            "norm of what is moved" if weight == "value" else "attention",
        ),
        direction="what the suffix reads from each position; no edit, so the effects are the values",
        method="sinks",
        times=times,
        weight=weight,
        unimodal_from=unimodal_from,
        dimension_times=dimension_times,
        sinks=found.positions.tolist(),
        judged="media positions are sinks; text before the suffix is held to the same bar; the suffix is not judged",
        elsewhere=elsewhere["position"].tolist(),
    )
    return Sinks(found, table, dimensions, grid, elsewhere, grid.provenance)


def _one_layout(examples: Examples) -> SpanMap:
    first = examples.inputs[0].spans
    for number, x in enumerate(examples.inputs):
        at = first.layout_difference(x.spans)
        if at is not None:
            raise InputError(
                f"input {number} has another layout than the first (they differ from position {at} on), and a sink is "
                "a position: find the sinks of one layout at a time."
            )
    for words in ("media", "suffix"):
        if not len(first[words]):
            reads = "sinks are media positions that the suffix reads"
            raise InputError(f"these inputs have no {words}; {reads}: {first!r}.")
    return first


def _table(spans: SpanMap, found: Span, incoming: Float[np.ndarray, "example pos"], times: float | int) -> pd.DataFrame:
    media, sinks, mean = spans.media.positions, found.positions, incoming.mean(0)
    columns = {
        "position": sinks,
        "token": [spans.tokens[p] for p in sinks],
        "role": [spans.roles[p] for p in sinks],
        "start_s": spans.start_s[sinks],
        "incoming": mean[sinks],
        "times": mean[sinks] / mean[media].mean(),
        "examples": (incoming[:, sinks] > times * incoming[:, media].mean(1, keepdims=True)).mean(0),
    }
    return pd.DataFrame(columns)


def _later_reading(model: Any, x: AVInputs, found: Span) -> Float[np.ndarray, "reader sink"]:
    """What later media positions pay to each sink: the mean over readers, heads and layers, summed over examples."""
    roles = {words: x.spans[words].positions for words in READERS.values()}
    later = {(words, sink): [p for p in every.tolist() if p > sink] for words, every in roles.items() for sink in found}
    groups = {f"{words} {sink}": readers for (words, sink), readers in later.items()}
    mass = attention_mass(model, x, groups, keys={str(sink): [sink] for sink in found})
    summed = mass.mean((1, 2)).sum(0).double().numpy().reshape(len(READERS), len(found), len(found))
    counts = np.array([len(readers) or np.nan for readers in later.values()]).reshape(len(READERS), len(found))
    return np.diagonal(summed, axis1=1, axis2=2) / counts


@torch.no_grad()
def _dimensions(model: Any, stacks: list[AVInputs], spans: SpanMap, found: Span, times: float | int) -> pd.DataFrame:
    """Compare, layer by layer and dimension by dimension, the stream at the sinks with that at other media."""
    groups = (found.positions, (spans.media - found).positions)
    sums = torch.zeros(model.spec.n_layers, 2, model.spec.d_model, dtype=torch.float64)

    def add(layer: int, stream: Tensor) -> None:
        for number, positions in enumerate(groups):
            if len(positions):
                sums[layer, number] += carried(stream[:, positions.copy()]).mean(1).sum(0).double().cpu()

    for x in stacks:
        read_layers(model, x, {"resid_pre": add})
    here, elsewhere = (sums / sum(len(x) for x in stacks)).unbind(1)
    passes = here > times * here.mean(-1, keepdim=True)
    rows = [
        (layer, d, float(here[layer, d]), float(elsewhere[layer, d]) if len(groups[1]) else np.nan)
        for layer, d in passes.nonzero().tolist()
    ]
    frame = pd.DataFrame(rows, columns=["layer", "dimension", "at_sinks", "elsewhere"])
    return frame.astype({"layer": int, "dimension": int, "at_sinks": float, "elsewhere": float})


def carried(stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """Say how much of the stream each dimension carries: |x_d| / rms(x)."""
    wide = stream.detach().float()
    return wide.abs() / wide.pow(2).mean(-1, keepdim=True).sqrt()
