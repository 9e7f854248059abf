"""Probes: from which layer on can the sound be read in the stream, and is it still there when it is not said?

A linear probe (`results.linear_probes`) reads the class of the sound (or of the picture) from the residual stream,
averaged over a span's positions, before the first layer (layer 0) and after each (layer l). It learns on *conflict*
cells only (`va` and its mirror `av`), where the other medium shows another class: to read the picture is not to read
the sound.

    accuracy      share of held-out cells that the probe reads right
    control       the same with control labels: each clip gets a random class (Hewitt and Liang, 2019)
    selectivity   accuracy - control
    other alone   accuracy of the best guess from the other medium's class, learnt on the same cells: what reading that
                  medium alone would give

Conflicts are dealt to two halves that share no clip (`results.halves`); probes learn on discovery and are tested on
confirmation, whose conflicts are the grid's examples (a conflict is the mean over its cells; intervals resample
components of conflicts that share clips). The layer is *chosen* on discovery, by cross-validation that keeps
components whole, and tested on confirmation: `at_chosen_layer(grid)`. A class that discovery does not have cannot be
read and counts as not measured. Because no clip is on both sides, control labels can be read there by chance only: a
control above chance shows a leak. How well probes memorize control labels where they learn is
`provenance["control_fit"]`.

Sign: shares, baseline 0, so effects are values. Source: Alain and Bengio (2016); protocol section 8. Not done: what the
model makes of it (that a probe reads it does not mean that the model does), non-linear probes.

    >>> grid = probe(model, conflicts)                                                        # doctest: +SKIP
    >>> at_chosen_layer(grid).interval().sel(figure="selectivity", span="generation")         # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
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
from av_lens.results.provenance import stamp
from av_lens.results.readouts import LinearProbe, control_labels, folds, held_out, looked_up
from av_lens.results.statistics import CONFIRMATION, DISCOVERY, Halves, Member, deal, standing

TARGETS = {"sound": 1, "picture": 0}
CONFLICT_CELLS = ("va", "av")
FIGURES = ("accuracy", "control", "selectivity", "other alone")
SIGN = "share of held-out conflict cells that a probe reads right; baseline 0, so effects are values"
FOLDS = 5
FEWEST = 8  # conflicts of a half


@dataclass(frozen=True, eq=False, repr=False)
class Streams(Brief):
    """What probes read: pooled streams of conflict cells, kept so that statistics can be made again without the model.

    Attributes:
        vectors: the pooled streams.
        at: the spans.
        cells: the cells.
        members: what dealing needs of each conflict.
        labels: the class of sound a and of picture v of each conflict.
        model: the model's name.
    """

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
        if isinstance(conflicts, Streams):
            streams = conflicts
        else:
            streams = read_streams(model, conflicts, at=at, cells=cells, layout=layout, stack=stack, progress=show)
        halves = deal(streams.members, seed=seed) if halves is None else halves
        sides = _Sides.of(streams, halves, target)
        values, crossed, fit = sides.figures(float(c), draws, seed, show)
    best = {span: int(np.nanargmax(row)) for span, row in zip(streams.at, crossed, strict=True)}
    return Grid.of(
        values,
        axes={"span": list(streams.at), "layer": np.arange(values.shape[2]), "figure": list(FIGURES)},
        baseline=np.zeros(len(sides.tested)),
        clusters=[halves.component[i] for i in sides.tested],
        metric=f"probe of the {target}",
        unit="share",
        direction=SIGN,
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
        require_choice("conflict cell", name, CONFLICT_CELLS)
    if len(listed) < 2 * FEWEST or not spans or not names:
        raise InputError(
            f"{len(listed)} conflicts, {len(spans)} spans and {len(names)} cells: probes need {2 * FEWEST} conflicts "
            "at least (100 are usual), a span and a cell."
        )
    named = [c if c.id is not None else dataclasses.replace(c, id=f"c{i}") for i, c in enumerate(listed)]
    found: list[Any] = []
    with watched(progress) as show:
        for start in range(0, len(named), stack):
            part = [conflict.cells(model, layout=layout) for conflict in named[start : start + stack]]
            examples = Examples.of(model, [cells_of[name] for cells_of in part for name in names])
            pooled: list[Any] = [None] * len(examples)
            for one in examples.stacks(stack):
                for row, vector in zip(one.rows.tolist(), pooled_streams(model, one.x, spans).numpy(), strict=True):
                    pooled[row] = vector
            found += pooled
            show("running conflict cells", min(start + stack, len(named)), len(named))
    vectors = np.stack(found).reshape(len(named), len(names), *found[0].shape)
    labels = tuple((_class(c.answers[0]), _class(c.answers[1])) for c in named)
    members = tuple(
        Member(str(c.id), clip_key(c.sound), clip_key(c.picture), label[0])
        for c, label in zip(named, labels, strict=True)
    )
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
    """The two halves: rows are (conflict, number of the cell)."""

    streams: Streams
    target: str
    learnt: list[tuple[int, int]]
    asked: list[tuple[int, int]]
    tested: list[int]
    groups: list[int]

    @classmethod
    def of(cls, streams: Streams, halves: Halves, target: str) -> _Sides:
        sizes = {half: halves.members(half) for half in (DISCOVERY, CONFIRMATION)}
        if min(map(len, sizes.values())) < FEWEST:
            counts = " and ".join(str(len(listed)) for listed in sizes.values())
            raise InputError(
                f"halves that share no clip hold {counts} conflicts ({halves.n_lost} given up); probes need {FEWEST} "
                "in each. Add conflicts, or let them share fewer clips."
            )
        learnt, asked = ([(i, n) for i in listed for n in range(len(streams.cells))] for listed in sizes.values())
        found = cls(streams, target, learnt, asked, sizes[CONFIRMATION], [halves.component[i] for i, _ in learnt])
        for side, rows in (("discovery", learnt), ("confirmation", asked)):
            if len(set(found.labels_of(rows))) < 2:
                raise InputError(f"the {side} half has one class of {target} only; a probe tells classes apart.")
        if not set(found.labels_of(asked)) & set(found.labels):
            raise InputError(
                f"no class of {target} is in both halves, so nothing can be tested: probes need conflicts whose "
                "answers recur (every class in several clips)."
            )
        return found

    def labels_of(self, rows: list[tuple[int, int]], target: str | None = None) -> list[str]:
        """What is heard or seen in some rows."""
        cells = self.streams.cells
        return [self.streams.label(i, cells[n], target or self.target) for i, n in rows]

    @property
    def labels(self) -> list[str]:
        """The classes that probes learn."""
        return self.labels_of(self.learnt)

    def sources_of(self, rows: list[tuple[int, int]]) -> list[str]:
        """The clips that the target comes from."""
        return [self.streams.source(i, self.streams.cells[n], self.target) for i, n in rows]

    def vectors(self, span: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of both halves."""
        whole = self.streams.vectors[:, :, layer, span]
        learnt, asked = (np.stack([whole[i, n] for i, n in rows]) for rows in (self.learnt, self.asked))
        return learnt, asked

    def marked(self, guesses: Sequence[Any], truth: Sequence[str], known: Sequence[str]) -> np.ndarray:
        """1 where a guess is right, NaN where the class was never learnt."""
        learnt = set(known)
        return np.array(
            [float(g == t) if t in learnt else np.nan for g, t in zip(guesses, truth, strict=True)], dtype=np.float64
        )

    def from_the_other(self) -> np.ndarray:
        """What the other medium's class alone lets one guess."""
        other = next(name for name in TARGETS if name != self.target)
        known, asked = self.labels_of(self.learnt, other), self.labels_of(self.asked, other)
        guesses = list(looked_up(known, self.labels, asked))
        return self.marked(guesses, self.labels_of(self.asked), self.labels)

    def per_conflict(self, right: np.ndarray) -> np.ndarray:
        """Average a conflict's cells; NaN where none was measured."""
        table = right.reshape(len(self.tested), len(self.streams.cells))
        known = ~np.isnan(table)
        return np.where(known.any(1), np.where(known, table, 0.0).sum(1) / np.maximum(known.sum(1), 1), np.nan)

    def figures(self, c: float, draws: int, seed: int, show: Progress) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`FIGURES` of each conflict, span and layer; each probe's cross-validated accuracy, and its control's fit."""
        n_layers, n_spans = self.streams.vectors.shape[2:4]
        values = np.full((len(self.tested), n_spans, n_layers, len(FIGURES)), np.nan)
        crossed, fit = np.full((2, n_spans, n_layers), np.nan)
        values[..., 3] = self.per_conflict(self.from_the_other())[:, None, None]
        for number, (span, layer) in enumerate(np.ndindex(n_spans, n_layers), 1):
            read = _Reading(self, *self.vectors(span, layer), c)
            crossed[span, layer] = read.crossed()
            values[:, span, layer, 0] = self.per_conflict(read.read(self.labels, self.labels_of(self.asked))[0])
            controls = [read.control(seed, draw) for draw in range(draws)]
            values[:, span, layer, 1] = np.mean([self.per_conflict(right) for right, _ in controls], axis=0)
            fit[span, layer] = np.mean([memorized for _, memorized in controls])
            show("probes", number, n_spans * n_layers)
        values[..., 2] = values[..., 0] - values[..., 1]
        return values, crossed, fit

    def said(self, halves: Halves) -> dict[str, Any]:
        """What a reader of the numbers must know of the halves."""
        truth = self.labels_of(self.asked)
        most = max(set(self.labels), key=self.labels.count)
        components = [len({halves.component[i] for i in halves.members(half)}) for half in (DISCOVERY, CONFIRMATION)]
        return {
            "conflicts": [self.streams.members[i].id for i in self.tested],
            "discovery": [self.streams.members[i].id for i in halves.members(DISCOVERY)],
            "lost": halves.n_lost,
            "standing": standing([len(halves.members(h)) for h in (DISCOVERY, CONFIRMATION)], components),
            "classes": sorted(set(self.labels)),
            "not_learnt": sum(label not in set(self.labels) for label in truth),
            "chance": truth.count(most) / len(truth),
        }


@dataclass(frozen=True, eq=False)
class _Reading:
    """One layer and span."""

    sides: _Sides
    learnt: np.ndarray
    asked: np.ndarray
    c: float

    def crossed(self) -> float:
        """Cross-validated accuracy on discovery."""
        right = held_out(self.learnt, self.sides.labels, folds(self.sides.groups, FOLDS), c=self.c)
        return float(np.nanmean(right))

    def read(self, learnt: list[str], asked: list[str]) -> tuple[np.ndarray, float]:
        """Which cells of the confirmation half are read right, and what share of those that labels were learnt of."""
        fitted = LinearProbe.fitted(self.learnt, learnt, c=self.c)
        right = self.sides.marked(fitted.predicted(self.asked).tolist(), asked, learnt)
        return right, float(np.mean(fitted.predicted(self.learnt) == np.array(learnt)))

    def control(self, seed: int, draw: int) -> tuple[np.ndarray, float]:
        """The same with control labels, drawn by the clip that the target comes from."""
        sides, drawn = self.sides, int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
        sources = sides.sources_of(sides.learnt + sides.asked)
        given = control_labels(sides.labels + sides.labels_of(sides.asked), sources, seed=drawn)
        return self.read(given[: len(sides.learnt)], given[len(sides.learnt) :])


def _class(answer: Any) -> str:
    """The class that an answer names: its first synonym."""
    first = answer.text if isinstance(answer, Answer) else synonyms_of(answer)[0]
    return str(first).strip().casefold()
