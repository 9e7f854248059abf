"""What does each head do to hearing? The exact effects of protocol section 4, per conflict.

Every effect is mirrored: on hearing under conflict, C = (M(va) - M(av)) / 2, an edit's effect is
(change of M in va - change of M in av) / 2; on hearing with nothing to see, G = (M(blank_a) - M(blank_v)) / 2,
likewise.
Positive: the edit lets the model hear more.

A `Request` names a base cell, a donor and whether later heads are frozen; `measure_requests` runs all of a list for all
heads and returns, per request and conflict, the effect, and the rise of the heard sound's answer over the candidates
that are neither answer (damage shows there).

| estimand | request |
|---|---|
| release (donor) | on C, donor blank_muted, mean_other, zero (and mean_task beside) |
| direct (donor) | the same, later heads frozen |
| reads picture, reads sound | on C, donor wa, donor vw |
| silenced | on C, donor blank_a minus donor blank_muted |
| fall of G (donor) | minus the effect on G of the same donor; with blank_muted it is `carries` |
| sufficiency | minus the effect on G of donor va |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from av_lens.isolation.bench import MIRROR, PRIMARY_DONORS, Chunk
from av_lens.isolation.engine import Head, Swap
from av_lens.isolation.scoring import Candidates

Progress = Callable[[str, int, int], None]
PerHead = Float[np.ndarray, "example layer head"]


@dataclass(frozen=True)
class Request:
    """An edit of every head in turn: in `base` ("va" or "blank_a") and its mirror, z from `donor`."""

    base: str
    donor: str
    freeze: bool = False
    question: str = "ask"


@dataclass(frozen=True, eq=False)
class Effect:
    """A request's outcome per example, layer and head; NaN where not measured.

    `margin`: the mirrored change of M. `rise`: the mirrored change of the heard sound's answer against the candidates
    that are neither answer.
    """

    margin: PerHead
    rise: PerHead


def requests(*, with_means: bool = True, with_third: bool = True) -> list[Request]:
    """List what the roles need.

    Args:
        with_means: whether the mean donors are defined at the site.
        with_third: whether any conflict has a third clip.

    Returns:
        The requests, without repetition.
    """
    donors = [donor for donor in PRIMARY_DONORS if with_means or donor != "mean_other"]
    found = [Request("va", donor) for donor in donors]
    found += [Request("va", donor, freeze=True) for donor in donors]
    found += [Request("va", "mean_task")] if with_means else []
    found += [Request("va", "wa"), Request("va", "vw")] if with_third else []
    found += [Request("va", "blank_a"), Request("blank_a", "va")]
    found += [Request("blank_a", donor) for donor in donors]
    return found


def mirrored(base: Float[np.ndarray, "..."], mirror: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Average a change over a cell and its mirror: (change in the cell - change in the mirror) / 2.

    Args:
        base: change of M in `va` or `blank_a`.
        mirror: change of M in `av` or `blank_v`.

    Returns:
        The effect on C or on G.
    """
    return 0.5 * (base - mirror)


def single_head_swaps(
    chunk: Chunk, base: str, wanted: Sequence[Request], heads: Sequence[Head]
) -> tuple[list[Swap], list[tuple[int, int]]]:
    """Write the swaps of all requests on one base cell, layer by layer.

    Args:
        chunk: the conflicts.
        base: the cell that is edited.
        wanted: the requests (all of one question).
        heads: the heads, each edited alone.

    Returns:
        The swaps, and for each its `(request, head)` indices.
    """
    swaps: list[Swap] = []
    owners: list[tuple[int, int]] = []
    order = sorted(range(len(heads)), key=lambda j: heads[j])
    for layer in dict.fromkeys(heads[j][0] for j in order):
        for r, request in enumerate(wanted):
            donor = chunk.donor(base, request.donor, request.question)
            for j in order:
                if heads[j][0] == layer:
                    swaps.append(Swap((heads[j],), (donor[layer, :, :, heads[j][1]],), freeze=request.freeze))
                    owners.append((r, j))
    return swaps, owners


def edited_scores(
    chunk: Chunk, base: str, wanted: Sequence[Request], heads: Sequence[Head], tick: Callable[[int], None]
) -> Float[np.ndarray, "request head batch candidate"]:
    """Run all requests on one base cell.

    Args:
        chunk: the conflicts.
        base: the cell that is edited.
        wanted: the requests, all of one question.
        heads: the heads, each edited alone.
        tick: called with the number of runs just made.

    Returns:
        The candidates' scores under every edit.
    """
    candidates = chunk.bench.candidates
    recording = chunk.run(base, wanted[0].question)
    swaps, owners = single_head_swaps(chunk, base, wanted, heads)
    out = np.full((len(wanted), len(heads), len(chunk.examples), len(candidates.names)), np.nan)
    for (r, j), logits in zip(owners, chunk.bench.engine.edited(recording, swaps), strict=True):
        out[r, j] = candidates.scores(logits)
        tick(1)
    return out


def _changes(
    chunk: Chunk, base: str, scores: Float[np.ndarray, "request head batch candidate"], question: str, heard: str
) -> tuple[Float[np.ndarray, "request head batch"], Float[np.ndarray, "request head batch"]]:
    candidates: Candidates = chunk.bench.candidates
    before = chunk.reading(base, question).scores
    margin = candidates.margin(scores, chunk.examples) - candidates.margin(before, chunk.examples)
    above = candidates.above_others(scores, chunk.examples, of=heard)
    return margin, above - candidates.above_others(before, chunk.examples, of=heard)


def _chunk_effects(
    chunk: Chunk, wanted: Sequence[Request], heads: Sequence[Head], tick: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Run all requests on one base cell and its mirror: `[request, head, batch]` of each figure."""
    base, question = wanted[0].base, wanted[0].question
    mirror = MIRROR[base]
    one = _changes(chunk, base, edited_scores(chunk, base, wanted, heads, tick), question, "sound")
    two = _changes(chunk, mirror, edited_scores(chunk, mirror, wanted, heads, tick), question, "picture")
    for cell in (base, mirror):  # traces are large
        chunk.run(cell, question).kept.clear()
    return {"margin": mirrored(one[0], two[0]), "rise": 0.5 * (one[1] + two[1])}


def measure_requests(
    chunks: Sequence[Chunk],
    wanted: Sequence[Request],
    *,
    heads: Sequence[Head],
    examples: Int[np.ndarray, " example"],
    progress: Progress | None = None,
    stage: str = "exact effects",
) -> dict[Request, Effect]:
    """Run all requests for all heads on all conflicts, mirrored.

    Args:
        chunks: the conflicts, stacked.
        wanted: the requests.
        heads: the heads.
        examples: the conflicts' order in the result.
        progress: called as `progress(stage, done, total)`.
        stage: the stage's name.

    Returns:
        The effects, `[example, layer, head]`, NaN at other heads.
    """
    engine = chunks[0].bench.engine
    shape = (len(examples), engine.n_layers, engine.n_heads)
    out = {request: Effect(np.full(shape, np.nan), np.full(shape, np.nan)) for request in wanted}
    layers, columns = [h[0] for h in heads], [h[1] for h in heads]
    total, done = 2 * len(wanted) * len(heads) * len(chunks), 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None and (n > 1 or done % 64 == 0 or done == total):
            progress(stage, done, total)

    for chunk in chunks:
        rows = np.array([int(np.flatnonzero(examples == i)[0]) for i in chunk.examples])
        for base, question in dict.fromkeys((request.base, request.question) for request in wanted):
            these = [request for request in wanted if (request.base, request.question) == (base, question)]
            depends = {"base": base, "question": question, "heads": heads, "requests": [vars(one) for one in these]}
            before = done
            found = chunk.remember("head effects", depends, partial(_chunk_effects, chunk, these, heads, tick))
            if done == before:
                tick(2 * len(these) * len(heads))
            for r, request in enumerate(these):
                where = np.ix_(rows, np.arange(len(heads)))
                for target, values in (
                    (out[request].margin, found["margin"][r]),
                    (out[request].rise, found["rise"][r]),
                ):
                    flat = target[:, layers, columns]
                    flat[where] = values.T
                    target[:, layers, columns] = flat
    return out


def set_scores(
    chunk: Chunk, base: str, sets: Sequence[Sequence[Head]], donors: Sequence[str], question: str = "ask"
) -> tuple[Float[np.ndarray, "set batch candidate"], Int[np.ndarray, "set batch"]]:
    """Edit sets of heads together.

    Args:
        chunk: the conflicts.
        base: the cell that is edited.
        sets: the sets of heads.
        donors: one donor per set.
        question: what the base is asked.

    Returns:
        The candidates' scores, and the candidate that holds the most likely token (-1 where none does).
    """
    candidates = chunk.bench.candidates
    swaps: list[Swap] = []
    for heads, name in zip(sets, donors, strict=True):
        donor = chunk.donor(base, name, question)
        swaps.append(Swap(tuple(heads), tuple(donor[layer, :, :, head] for layer, head in heads)))
    scores = np.full((len(sets), len(chunk.examples), len(candidates.names)), np.nan)
    top = np.full((len(sets), len(chunk.examples)), -2, dtype=np.int64)
    for k, logits in enumerate(chunk.bench.engine.edited(chunk.run(base, question), swaps)):
        found = candidates.read(logits, chunk.examples)
        scores[k], top[k] = found.scores, found.top
    return scores, top
