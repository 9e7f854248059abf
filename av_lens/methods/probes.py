"""Probes: from which layer on can the sound be read in the stream, and is it still there when it is not said?

A linear probe (`results.linear_probes`) reads the class of the sound (or of the picture) from the residual stream,
averaged over a span's positions, before the first layer (layer 0) and after each (layer l). It learns on *conflict*
cells only, where the other medium shows another class: to read the picture is not to read the sound.

    accuracy      share of held-out cells that the probe reads right
    control       the same with control labels: each clip gets a random class (Hewitt and Liang, 2019)
    selectivity   accuracy - control
    other alone   accuracy of the best guess from the other medium's class, learnt on the same cells

Halves, training, testing and the choice of layer (cross-validation that keeps components whole): protocol section 8. A
class that discovery does not have counts as not measured. No clip is on both sides, so a control above chance shows a
leak; how well control labels are memorized is `provenance["control_fit"]`.

Source: Alain and Bengio (2016). Not done: what the model makes of it, non-linear probes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.brief import Brief
from av_lens.checks import require_at_least, require_choice
from av_lens.core import Progress, watched
from av_lens.core.readings import pooled_streams
from av_lens.errors import InputError
from av_lens.inputs import Answer, Conflict
from av_lens.inputs.answers import synonyms_of
from av_lens.inputs.conflict import CELLS, clip_key
from av_lens.methods.shared.frame import Examples
from av_lens.model import HookedAVLLM
from av_lens.results import Grid
from av_lens.results.dealing import CONFIRMATION, DISCOVERY, Halves, Member, deal, standing
from av_lens.results.provenance import stamp
from av_lens.results.readouts import LinearProbe, control_labels, folds, held_out, looked_up

TARGETS = {"sound": 1, "picture": 0}
FIGURES = ("accuracy", "control", "selectivity", "other alone")
FEWEST = 8  # conflicts of a half


@dataclass(frozen=True, eq=False, repr=False)
class Streams(Brief):
    """What probes read: pooled streams of conflict cells, for statistics that are made again without the model."""

    vectors: Float[np.ndarray, "conflict cell layer span d_model"]
    at: tuple[str, ...]
    cells: tuple[str, ...]
    members: tuple[Member, ...]
    labels: tuple[tuple[str, str], ...]
    model: str

    def label(self, conflict: int, cell: str, target: str) -> str:
        """Say what is heard or seen in a cell."""
        return self.labels[conflict]["av".index(CELLS[cell][TARGETS[target]] or "")]

    def source(self, conflict: int, cell: str, target: str) -> str:
        """Say which clip the target comes from."""
        member = self.members[conflict]
        return member.sound_clip if CELLS[cell][TARGETS[target]] == "a" else member.picture_clip


def probe(
    model: Any,
    conflicts: Conflict | Sequence[Conflict] | Streams,
    *,
    target: str = "sound",
    at: str | Sequence[str] = ("audio", "video", "question", "generation"),
    cells: str | Sequence[str] = ("va", "av"),
    layout: str = "in_video",
    c: float | int = 0.1,
    draws: int = 2,
    seed: int = 0,
    halves: Halves | None = None,
    stack: int = 16,
    progress: Progress | bool | None = None,
) -> Grid:
    """Train linear probes on the conflicts of one half and test them on those of the other.

    Args:
        model: a `HookedAVLLM`; not used where streams are given.
        conflicts: the conflicts, or the `Streams` that `read_streams` made of them.
        target: "sound" or "picture".
        at: the spans that are read, each averaged over its positions: role names joined by `|`.
        cells: the conflict cells that probes learn and are tested on: "va", "av", or both.
        layout: "in_video" or "separate".
        c: the inverse of the probes' L2 penalty.
        draws: how many times control labels are drawn.
        seed: deals the halves and draws control labels.
        halves: halves that have been dealt already, in the conflicts' order.
        stack: examples that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid over `[example, span, layer, figure]`, whose examples are the conflicts of the confirmation half;
        `provenance["chosen"]` names the layer of each span that discovery chose.

    Raises:
        InputError: an unknown target or cell, too few conflicts in a half, or a half with one class only.
        InterventionError: a span that the inputs do not have.
    """
    require_choice("target", target, TARGETS)
    require_at_least("draws", draws, 1)
    if not c > 0:
        raise InputError(f"c is the inverse of a penalty and above 0, not {c}.")
    with watched(progress) as show:
        streams = conflicts
        if not isinstance(streams, Streams):
            streams = read_streams(model, streams, at=at, cells=cells, layout=layout, stack=stack, progress=show)
        halves = deal(streams.members, seed=seed) if halves is None else halves
        sides = _Sides.of(streams, halves, target)
        values, crossed, fit = sides.figures(float(c), draws, seed, show)
    best = {span: int(np.nanargmax(row)) for span, row in zip(streams.at, crossed, strict=True)}
    return Grid.of(
        values,
        axes={"span": list(streams.at), "layer": np.arange(values.shape[2]), "figure": list(FIGURES)},
        baseline=np.zeros(len(values)),
        clusters=[halves.component[i] for i in halves.members(CONFIRMATION)],
        metric=f"probe of the {target}",
        unit="share",
        direction="share of held-out conflict cells that a probe reads right; baseline 0, so effects are values",
        provenance=stamp(
            method="linear probes",
            model=streams.model,
            target=target,
            cells=streams.cells,
            layout=layout,
            c=c,
            seed=seed,
            draws=draws,
            chosen=best,
            cross_validated=crossed,
            control_fit=fit,
            **sides.said(halves),
        ),
    )


def read_streams(
    model: HookedAVLLM,
    conflicts: Conflict | Sequence[Conflict],
    *,
    at: str | Sequence[str] = ("audio", "video", "question", "generation"),
    cells: str | Sequence[str] = ("va", "av"),
    layout: str = "in_video",
    stack: int = 16,
    progress: Progress | bool | None = None,
) -> Streams:
    """Run the conflict cells and keep their pooled streams.

    Args:
        model: a `HookedAVLLM`.
        conflicts: the conflicts.
        at: as in `probe`.
        cells: as in `probe`.
        layout: as in `probe`.
        stack: as in `probe`.
        progress: as in `probe`.

    Returns:
        The streams, for `probe` under any target, penalty and seed.

    Raises:
        InputError: no conflict, an unknown cell, or conflicts without a shared layout's spans.
        InterventionError: a span that the inputs do not have.
    """
    listed = [conflicts] if isinstance(conflicts, Conflict) else list(conflicts)
    spans, names = (((given,) if isinstance(given, str) else tuple(given)) for given in (at, cells))
    for name in names:
        require_choice("conflict cell", name, ("va", "av"))
    if len(listed) < 2 * FEWEST or not spans or not names:
        raise InputError(
            f"{len(listed)} conflicts, {len(spans)} spans and {len(names)} cells: probes need {2 * FEWEST} conflicts "
            "at least (100 are usual), a span and a cell."
        )
    named = [c if c.id is not None else dataclasses.replace(c, id=f"c{i}") for i, c in enumerate(listed)]
    found: list[Any] = [None] * (len(named) * len(names))
    with watched(progress) as show:
        for start in range(0, len(named), stack):
            part = [conflict.cells(model, layout=layout) for conflict in named[start : start + stack]]
            examples = Examples.of(model, [cells_of[name] for cells_of in part for name in names])
            for one in examples.stacks(stack):
                for row, vector in zip(one.rows.tolist(), pooled_streams(model, one.x, spans).numpy(), strict=True):
                    found[start * len(names) + row] = vector
            show("running conflict cells", min(start + stack, len(named)), len(named))
    vectors = np.stack(found).reshape(len(named), len(names), *found[0].shape)
    labels = tuple((_class(c.answers[0]), _class(c.answers[1])) for c in named)
    members = tuple(Member(str(c.id), clip_key(c.sound), clip_key(c.picture), _class(c.answers[0])) for c in named)
    return Streams(vectors, spans, names, members, labels, str(model.name))


def at_chosen_layer(grid: Grid) -> Grid:
    """Keep, of each span, the layer that discovery chose.

    Args:
        grid: what `probe` returned.

    Returns:
        A grid over `[example, span, figure]`.

    Raises:
        InputError: another kind of grid.
    """
    chosen = grid.provenance.get("chosen")
    if not isinstance(chosen, dict) or not {"span", "layer"} <= set(grid.values.dims):
        raise InputError("at_chosen_layer takes the grid that probe returned, which names the chosen layers.")
    layers: list[int] = [int(chosen[str(span)]) for span in grid.values.coords["span"].values.tolist()]
    kept = np.stack([grid.values.values[:, n, layer] for n, layer in enumerate(layers)], axis=1)
    axes = {name: grid.values.coords[name].values for name in ("span", "figure")}
    words = {name: getattr(grid, name) for name in ("metric", "unit", "direction", "provenance", "clusters")}
    return Grid.of(kept, axes=axes, baseline=grid.baseline.values, **words)


@dataclass(frozen=True, eq=False)
class _Sides:
    """The two halves: the cells (conflict, number of the cell) of each, and the classes that their labels name."""

    streams: Streams
    target: str
    cells: dict[str, list[tuple[int, int]]]
    groups: list[int]
    labels: list[str]
    truth: list[str]

    @classmethod
    def of(cls, streams: Streams, halves: Halves, target: str) -> _Sides:
        sizes = {half: halves.members(half) for half in (DISCOVERY, CONFIRMATION)}
        if min(map(len, sizes.values())) < FEWEST:
            counts = " and ".join(str(len(listed)) for listed in sizes.values())
            raise InputError(
                f"halves that share no clip hold {counts} conflicts ({halves.n_lost} given up); probes need {FEWEST} "
                "in each. Add conflicts, or let them share fewer clips."
            )
        cells = {half: list(product(listed, range(len(streams.cells)))) for half, listed in sizes.items()}
        labels = {half: _each(streams.label, streams, rows, target) for half, rows in cells.items()}
        for side, named in labels.items():
            if len(set(named)) < 2:
                raise InputError(f"the {side} half has one class of {target} only; a probe tells classes apart.")
        if set(labels[DISCOVERY]).isdisjoint(labels[CONFIRMATION]):
            raise InputError(
                f"no class of {target} is in both halves, so nothing can be tested: probes need conflicts whose "
                "answers recur (every class in several clips)."
            )
        groups = [halves.component[i] for i, _ in cells[DISCOVERY]]
        return cls(streams, target, cells, groups, labels[DISCOVERY], labels[CONFIRMATION])

    def per_conflict(self, guesses: Sequence[Any], truth: Sequence[str], known: Sequence[str]) -> np.ndarray:
        """The share of a conflict's cells that are guessed right; NaN where no cell's class was learnt."""
        learnt = set(known)
        right = [float(g == t) if t in learnt else np.nan for g, t in zip(guesses, truth, strict=True)]
        table = np.reshape(right, (-1, len(self.streams.cells)))
        measured = ~np.isnan(table)
        return np.where(measured.any(1), np.nansum(table, 1) / np.maximum(measured.sum(1), 1), np.nan)

    def figures(self, c: float, draws: int, seed: int, show: Progress) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`FIGURES` of each conflict, span and layer; each probe's cross-validated accuracy, and its control's fit."""
        rows, n = list(self.cells.values()), len(self.labels)
        other = next(name for name in TARGETS if name != self.target)
        seen, asked = (_each(self.streams.label, self.streams, some, other) for some in rows)
        alone = self.per_conflict(list(looked_up(seen, self.labels, asked)), self.truth, self.labels)
        sources = _each(self.streams.source, self.streams, [*rows[0], *rows[1]], self.target)
        seeds = [int(np.random.SeedSequence([seed, draw]).generate_state(1)[0]) for draw in range(draws)]
        drawn = [control_labels(self.labels + self.truth, sources, seed=one) for one in seeds]  # by the target's clip
        n_layers, n_spans = self.streams.vectors.shape[2:4]
        values = np.full((len(alone), n_spans, n_layers, len(FIGURES)), np.nan)
        crossed, fit = np.full((2, n_spans, n_layers), np.nan)
        values[..., 3] = alone[:, None, None]
        for number, (span, layer) in enumerate(np.ndindex(n_spans, n_layers), 1):
            whole = self.streams.vectors[:, :, layer, span]
            learnt, tested = (np.stack([whole[at] for at in some]) for some in rows)

            def read(labels: list[str], truth: list[str], x: np.ndarray = learnt, y: np.ndarray = tested) -> Any:
                fitted = LinearProbe.fitted(x, labels, c=c)
                memorized = float(np.mean(fitted.predicted(x) == np.array(labels)))
                return self.per_conflict(fitted.predicted(y).tolist(), truth, labels), memorized

            crossed[span, layer] = np.nanmean(held_out(learnt, self.labels, folds(self.groups, 5), c=c))
            values[:, span, layer, 0] = read(self.labels, self.truth)[0]
            controls, fits = zip(*(read(one[:n], one[n:]) for one in drawn), strict=True)
            values[:, span, layer, 1], fit[span, layer] = np.mean(controls, axis=0), np.mean(fits)
            show("probes", number, n_spans * n_layers)
        values[..., 2] = values[..., 0] - values[..., 1]
        return values, crossed, fit

    def said(self, halves: Halves) -> dict[str, Any]:
        """What a reader of the numbers must know of the halves."""
        sides = [halves.members(half) for half in (DISCOVERY, CONFIRMATION)]
        discovery, conflicts = ([self.streams.members[i].id for i in side] for side in sides)
        components = [len({halves.component[i] for i in side}) for side in sides]
        return {
            "conflicts": conflicts,
            "discovery": discovery,
            "lost": halves.n_lost,
            "standing": standing(list(map(len, sides)), components),
            "classes": sorted(set(self.labels)),
            "not_learnt": sum(label not in self.labels for label in self.truth),
            "chance": self.truth.count(max(set(self.labels), key=self.labels.count)) / len(self.truth),
        }


def _each(read: Callable[..., str], streams: Streams, rows: Sequence[tuple[int, int]], target: str) -> list[str]:
    return [read(conflict, streams.cells[n], target) for conflict, n in rows]


def _class(answer: Any) -> str:
    """The class that an answer names: its first synonym."""
    first = answer.text if isinstance(answer, Answer) else synonyms_of(answer)[0]
    return str(first).strip().casefold()
