"""Activation patching: what does the answer become, if one place is as it was in the other run?

    denoise  the corrupt run is edited; values come from the clean run. Positive effects: the place restores.
    noise    the clean run is edited; values come from the corrupt run. Negative effects: the place is needed.

`effects = metric(edited) - metric(the run being edited)`, so patching a run into itself gives 0; `normalized()` is 0 at
the run that was edited and 1 at the donor. The edited run is recorded once and restarted for every place (exact, no
approximation). `over` says which axes are iterated, `at` which positions are edited *together*:

    over="head" or "layer head"   every head's z                              [example, layer, head]
    over="layer"                  the stream entering every layer             [example, layer]
    over="layer span"             at every role's positions in turn           [example, layer, span]
    over="layer pos"              at every position in turn                   [example, layer, pos]
    over="layer window:0.5s"      at the media of every half second in turn   [example, layer, window]

`component=` names another activation (`"attn_out"`, `"mlp_out"`, `"v"`, ...). `"head span"`, `"head pos"` and
`"head window:0.5s"` iterate heads as well.

Source: Vig et al. (2020), Meng et al. (2022); Zhang and Nanda (2024) on the two directions. Not done: paths (an edit
flows on through everything after it), edits of several places at once.

    >>> grid = patch(model, pair, over="head", at="generation", metric=logit_diff("siren", "dog"))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_lens.bridge.hook_names import component_named, hook_name
from av_lens.errors import InputError, InterventionError, unknown
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair
from av_lens.interventions import Plan, Site, replace
from av_lens.interventions.sites import resolve_positions
from av_lens.results.grid import Grid
from av_lens.results.provenance import linked, stamp
from av_lens.runs.execution import run
from av_lens.runs.measurement import measure, measure_plans
from av_lens.runs.metrics import Metric, as_metric
from av_lens.runs.traces import record
from av_lens.spans import ROLES, Span, SpanMap

AXES = ("layer", "head", "span", "pos", "window:SECONDSs")
SIGNS = {
    "denoise": "values of the clean run into the corrupt run; positive: the place restores what the metric measures",
    "noise": "values of the corrupt run into the clean run; negative: the place is needed for what the metric measures",
}


@dataclass(frozen=True)
class Axes:
    """What is iterated: heads or not, and how positions are cut.

    Attributes:
        heads: whether every head is patched by itself.
        places: the name of the axis of positions, or None where all are edited together.
        seconds: the length of a window, for windows.
    """

    heads: bool
    places: str | None = None
    seconds: float = 0.0

    @classmethod
    def parsed(cls, over: str) -> Axes:
        """Read what a caller wrote.

        Args:
            over: names of axes, separated by spaces.

        Returns:
            The axes.

        Raises:
            InputError: an unknown axis, or two axes of positions.
        """
        words = over.split()
        places: list[tuple[str, float]] = []
        for word in words:
            if word.startswith("window:"):
                places.append(("window", _seconds(word)))
            elif word in ("span", "pos"):
                places.append((word, 0.0))
            elif word not in ("layer", "head"):
                raise InputError(unknown("axis", word, AXES))
        if not words or len(places) > 1 or not {"layer", "head"} & set(words):
            raise InputError(
                f"over={over!r}: name layer or head, and at most one of span, pos, window:0.5s; such as 'layer head' "
                "or 'layer span'."
            )
        return cls("head" in words, *(places[0] if places else (None, 0.0)))

    def cut(self, spans: SpanMap, at: str | Span | None) -> list[tuple[Any, tuple[int, ...]]]:
        """Cut the positions into the places that are patched in turn.

        Args:
            spans: the input's spans.
            at: the positions to be cut, or edited together.

        Returns:
            A label and positions for each place; one place where no axis of positions is iterated.
        """
        if at is None:
            at = "generation" if self.places is None else None
        allowed = resolve_positions(at, spans, what="patch at").index
        if self.places is None:
            return [("all", allowed)]
        if self.places == "pos":
            return [(position, (position,)) for position in allowed]
        inside = set(allowed)
        if self.places == "span":
            named = [(role, tuple(p for p in spans[role].positions.tolist() if p in inside)) for role in ROLES]
        else:
            ends = spans.end_s[~np.isnan(spans.end_s)]
            starts = np.arange(0.0, float(ends.max()) if len(ends) else 0.0, self.seconds)
            cuts = ((round(float(s), 6), spans["media"].between(float(s), float(s) + self.seconds)) for s in starts)
            named = [(start, tuple(p for p in span.positions.tolist() if p in inside)) for start, span in cuts]
        named = [(label, positions) for label, positions in named if positions]
        if not named:
            raise InputError(f"over={self.places!r} finds no position in this input: it has {spans!r}.")
        return named


def _seconds(word: str) -> float:
    text = word.removeprefix("window:").removesuffix("s")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"over={word!r}: write a window's length in seconds, such as window:0.5s.")
    return seconds


def patch(
    model: Any,
    pair: Pair | Sequence[Pair],
    *,
    over: str = "head",
    at: str | Span | None = None,
    metric: Metric | Callable[..., Any],
    direction: str = "denoise",
    component: str | None = None,
    stack: int = 16,
    budget_gb: float | int = 1.0,
) -> Grid:
    """Patch every place of one run with the other run's values, one place at a time.

    Args:
        model: a `HookedAVLLM`.
        pair: aligned clean and corrupt inputs, or several pairs of one layout or of different ones.
        over: the axes that are iterated, such as "head", "layer", "layer span", "layer pos", "layer window:0.5s".
        at: the positions that are edited together: roles joined by `|`, or a `Span`. None means the generation
            position, or all positions where `over` iterates them.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        direction: "denoise" edits the corrupt run, "noise" the clean run.
        component: what is patched; None means z for heads and resid_pre for layers.
        stack: pairs that run together.
        budget_gb: memory for the activations of edits that run together.

    Returns:
        A grid with `values`, `effects`, `baseline` (the edited run) and `donor`, pairs in the order given.

    Raises:
        InputError: an unknown axis or direction, or pairs whose positions cannot share an axis.
        InterventionError: an unknown component, one without heads where heads are iterated, or positions outside.
    """
    axes = Axes.parsed(over)
    if direction not in SIGNS:
        raise InputError(unknown("direction", direction, SIGNS))
    name = component or ("z" if axes.heads else "resid_pre")
    _check_component(name, axes, model.spec)
    pairs = [pair] if isinstance(pair, Pair) else list(pair)
    if not pairs:
        raise InputError("patch needs at least one pair.")
    bound = as_metric(metric, model.tokenizer)
    if bound.n_answers > 1 and bound.n_answers != sum(len(one) for one in pairs):
        raise InputError(f"{bound.name} names {bound.n_answers} answers for {sum(map(len, pairs))} examples.")
    places = [axes.cut(one.clean.spans, at) for one in pairs]
    labels = [label for label, _ in places[0]]
    if any([label for label, _ in cut] != labels for cut in places):
        raise InputError(f"over={over!r}: these pairs have different {axes.places}s; patch one layout at a time.")
    starts = np.cumsum([0, *(len(one) for one in pairs)])
    columns = np.full((3, starts[-1]), np.nan)
    n_heads = Site(name, 0).n_heads(model.spec) if axes.heads else 1
    values = np.full((starts[-1], model.spec.n_layers, n_heads, len(labels)), np.nan)
    for numbers in _stacks(pairs, stack):
        rows = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in numbers])
        clean, corrupt = (AVInputs.stack([getattr(pairs[n], side) for n in numbers]) for side in ("clean", "corrupt"))
        edited, donor = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        job = _Job(model, edited, donor, name, axes, places[numbers[0]], bound.chosen(rows.tolist()), budget_gb)
        columns[0, rows], columns[1, rows], values[rows] = job.measured()
    shape, labelled = _labelled(axes, n_heads, labels, model.spec.n_layers)
    return Grid.of(
        values.reshape(len(values), *shape),
        axes=labelled,
        baseline=columns[0],
        donor=columns[1],
        clusters=linked([_sources(one, i) for one in pairs for i in range(len(one))]),
        metric=bound.name,
        unit=bound.unit,
        direction=f"{direction}: {SIGNS[direction]}",
        provenance=stamp(
            method="activation patching",
            model=model.name,
            component=name,
            over=over,
            at=str(at) if at is not None else ("generation" if axes.places is None else "all"),
            positions={str(label): list(positions) for label, positions in places[0]},
            questions=[question for one in pairs for question in one.corrupt.questions],
            **bound.provenance(),
        ),
    )


def _check_component(name: str, axes: Axes, spec: Any) -> None:
    found = component_named(name)
    if axes.heads and found.head_axis is None:
        raise InterventionError(f"{name} has no heads to iterate; write over='layer', or name z, result, q, k or v.")
    if not found.layered:
        raise InterventionError(f"{name} belongs to no layer, so layers of it cannot be iterated.")
    if found.axes[-1] == "key_pos":
        raise InterventionError(f"{name} is a matrix of queries and keys; patch z, or cut edges with a Plan.")
    hook_name(name, spec.n_layers - 1)


@dataclass(frozen=True, eq=False)
class _Job:
    """One stack of pairs of one layout."""

    model: Any
    edited: AVInputs
    donor: AVInputs
    component: str
    axes: Axes
    places: list[tuple[Any, tuple[int, ...]]]
    metric: Metric
    budget_gb: float | int

    def measured(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Measure the baseline, the donor and every edited run: `[batch]` twice, and `[batch, layer, head, place]`."""
        layers = range(self.model.spec.n_layers)
        union = sorted({p for _, positions in self.places for p in positions})
        sites = [Site(self.component, layer, positions=union) for layer in layers]
        with torch.no_grad():
            taken = run(self.model, self.donor, capture=sites)
        given = [taken.cache[hook_name(self.component, layer)] for layer in layers]
        forced = self.metric.teacher_forced
        other = measure(self.model, self.donor, self.metric) if forced else self.metric(taken.logits)
        plans = [Plan(), *self._plans(given, union)]
        trace = record(self.model, self.edited)
        scores = measure_plans(trace, plans, self.metric, budget_gb=self.budget_gb).double().cpu().numpy()
        n_heads = given[0].shape[2] if self.axes.heads else 1
        edited = scores[1:].reshape(len(given), n_heads, len(self.places), -1)
        return scores[0], other.double().cpu().numpy(), np.moveaxis(edited, -1, 0)

    def _plans(self, given: list[Tensor], union: list[int]) -> Iterator[Plan]:
        where = {position: row for row, position in enumerate(union)}
        for layer, values in enumerate(given):
            for head in range(values.shape[2]) if self.axes.heads else (None,):
                for _, positions in self.places:
                    chosen = values[:, [where[p] for p in positions]]
                    chosen = chosen if head is None else chosen[:, :, head]
                    yield Plan(replace(Site(self.component, layer, head, positions), chosen))


def _stacks(pairs: Sequence[Pair], size: int) -> Iterator[list[int]]:
    """Group pairs of one layout, at most `size` examples together."""
    layouts: list[list[int]] = []
    for number, pair in enumerate(pairs):
        for group in layouts:
            first = pairs[group[0]].clean
            same = first.layout == pair.clean.layout and first.spans.layout_difference(pair.clean.spans) is None
            if same:
                group.append(number)
                break
        else:
            layouts.append([number])
    for group in layouts:
        current: list[int] = []
        for number in group:
            if current and sum(len(pairs[n]) for n in current) + len(pairs[number]) > size:
                yield current
                current = []
            current.append(number)
        yield current


def _labelled(axes: Axes, n_heads: int, labels: list[Any], n_layers: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape and labels of the axes after example."""
    found: dict[str, Any] = {"layer": np.arange(n_layers)}
    if axes.heads:
        found["head"] = np.arange(n_heads)
    if axes.places is not None:
        found[axes.places] = labels
    return tuple(len(labels) for labels in found.values()), found


def _sources(pair: Pair, i: int) -> list[str]:
    """The media an example of a pair was made of: examples that share any are one cluster."""
    clips = [clip for clip in (pair.clean.clips[i], pair.corrupt.clips[i]) if clip is not None]
    hashes = [found for clip in clips for found in (clip.picture_hash, clip.sound_hash)]
    return [found for found in hashes if found is not None]
