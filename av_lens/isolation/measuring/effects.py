"""What does each head do to hearing? The exact effects of protocol section 4, per conflict.

Every effect is mirrored: on hearing under conflict, C = (M(va) - M(av)) / 2, an edit's effect is
(change of M in va - change of M in av) / 2; on hearing with nothing to see, G = (M(blank_a) - M(blank_v)) / 2,
likewise.
Positive: the edit lets the model hear more.

A `Request` names a base cell, a donor and whether later heads are frozen; `measure_requests` runs all of a list for all
heads and returns, per request and conflict, an `Effect`: the change of M, its parts on the two answers, the same with
the final norm frozen, and the rise of the heard sound's answer over the candidates that are neither answer (damage
shows there). `estimands` names them all.

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
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int

from av_lens.isolation.measuring.bench import MIRROR, PRIMARY_DONORS, Chunk
from av_lens.isolation.measuring.engine import Head, Swap
from av_lens.isolation.measuring.scoring import UNREAD, Candidates

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

    Attributes:
        margin: the mirrored change of M, (change in the cell - change in its mirror) / 2.
        rise: the mirrored change of the heard sound's answer against the candidates that are neither answer.
        on_sound: the part of `margin` that is on the heard sound's answer (in the mirror the other one), its score
            centred over all distinct answers of the set.
        on_picture: the change of the seen picture's answer, likewise; margin = on_sound - on_picture.
        margin_frozen: `margin`, the final norm dividing by what it divided by in the cell's unedited run.
        on_sound_frozen: `on_sound`, likewise.
        on_picture_frozen: `on_picture`, likewise.
    """

    margin: PerHead
    rise: PerHead
    on_sound: PerHead
    on_picture: PerHead
    margin_frozen: PerHead
    on_sound_frozen: PerHead
    on_picture_frozen: PerHead


TOGETHER = 64  # edited runs whose scores are read at once
FIGURES = tuple(field.name for field in fields(Effect))


def requests(*, with_means: bool = True, with_third: bool = True, with_audio_only: bool = True) -> list[Request]:
    """List what the roles need.

    Args:
        with_means: whether the mean donors are defined at the site.
        with_third: whether any conflict has a third clip.
        with_audio_only: whether audio alone can be a donor at the site.

    Returns:
        The requests, without repetition.
    """
    donors = [donor for donor in PRIMARY_DONORS if with_means or donor != "mean_other"]
    found = [Request("va", donor) for donor in donors]
    found += [Request("va", donor, freeze=True) for donor in donors]
    found += [Request("va", "mean_task")] if with_means else []
    found += [Request("va", "audio_only")] if with_audio_only else []
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


def unedited_scores(chunk: Chunk, base: str, question: str) -> Float[np.ndarray, "scale batch candidate"]:
    """Score the candidates in an unedited cell.

    Args:
        chunk: the conflicts.
        base: the cell.
        question: what it is asked.

    Returns:
        The scores as the model gives them, and as `Engine.linear_logits` reads them out.
    """
    candidates, recording = chunk.bench.candidates, chunk.run(base, question)
    linear = chunk.bench.engine.linear_logits(recording, recording.final, candidates.tokens)
    return np.stack([chunk.reading(base, question).scores, candidates.pooled(linear)])


def edited_scores(
    chunk: Chunk, base: str, wanted: Sequence[Request], heads: Sequence[Head], tick: Callable[[int], None]
) -> Float[np.ndarray, "scale request head batch candidate"]:
    """Run all requests on one base cell.

    Args:
        chunk: the conflicts.
        base: the cell that is edited.
        wanted: the requests, all of one question.
        heads: the heads, each edited alone.
        tick: called with the number of runs just made.

    Returns:
        The candidates' scores under every edit, as the model gives them and with the final norm frozen.
    """
    candidates, engine = chunk.bench.candidates, chunk.bench.engine
    recording, tokens = chunk.run(base, wanted[0].question), candidates.tokens
    swaps, owners = single_head_swaps(chunk, base, wanted, heads)
    out = np.full((2, len(wanted), len(heads), len(chunk.examples), len(candidates.names)), np.nan)
    runs = engine.changed(recording, swaps)
    for start in range(0, len(swaps), TOGETHER):
        some = [(one.logits[:, tokens], one.final) for one in islice(runs, TOGETHER)]
        logits, finals = (torch.stack(column) for column in zip(*some, strict=True))
        where = tuple(np.array(owners[start : start + TOGETHER]).T)
        out[0][where] = candidates.pooled(logits)
        out[1][where] = candidates.pooled(engine.linear_logits(recording, finals, tokens))
        tick(len(some))
    return out


def effect_figures(
    candidates: Candidates,
    examples: Int[np.ndarray, " batch"],
    base: tuple[Float[np.ndarray, "scale batch candidate"], Float[np.ndarray, "scale *more batch candidate"]],
    mirror: tuple[Float[np.ndarray, "scale batch candidate"], Float[np.ndarray, "scale *more batch candidate"]],
) -> dict[str, Float[np.ndarray, "*more batch"]]:
    """Compute every figure of an `Effect` from scores before and after an edit.

    Args:
        candidates: the answers.
        examples: which conflicts these are.
        base: scores in `va` or `blank_a`, unedited and edited; the first axis is the final norm free, then frozen.
        mirror: the same in `av` or `blank_v`.

    Returns:
        The figures by name.
    """
    out: dict[str, np.ndarray] = {}
    for scale, ending in enumerate(("", "_frozen")):
        here, there = ((before[scale], after[scale]) for before, after in (base, mirror))
        margins = [candidates.margin(after, examples) - candidates.margin(before, examples)
                   for before, after in (here, there)]  # fmt: skip
        out[f"margin{ending}"] = mirrored(margins[0], margins[1])
        for name, of, exchanged in (("on_sound", "sound", "picture"), ("on_picture", "picture", "sound")):
            parts = [candidates.centred(after, examples, of=whose) - candidates.centred(before, examples, of=whose)
                     for (before, after), whose in ((here, of), (there, exchanged))]  # fmt: skip
            out[f"{name}{ending}"] = 0.5 * (parts[0] + parts[1])
    rises = [candidates.above_others(after[0], examples, of=of) - candidates.above_others(before[0], examples, of=of)
             for (before, after), of in ((base, "sound"), (mirror, "picture"))]  # fmt: skip
    return out | {"rise": 0.5 * (rises[0] + rises[1])}


def _chunk_effects(
    chunk: Chunk, wanted: Sequence[Request], heads: Sequence[Head], tick: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Run all requests on one base cell and its mirror: `[request, head, batch]` of each figure."""
    base, question = wanted[0].base, wanted[0].question
    both: list[tuple[np.ndarray, np.ndarray]] = []
    for cell in (base, MIRROR[base]):
        after = edited_scores(chunk, cell, wanted, heads, tick)
        both.append((unedited_scores(chunk, cell, question), after))
        chunk.run(cell, question).kept.clear()  # traces are large
    return effect_figures(chunk.bench.candidates, chunk.examples, both[0], both[1])


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
    out = {request: Effect(*(np.full(shape, np.nan) for _ in FIGURES)) for request in wanted}
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
            where = (rows[:, None], np.array(layers), np.array(columns))
            for r, request in enumerate(these):
                for figure in FIGURES:
                    getattr(out[request], figure)[where] = found[figure][r].T
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
    top = np.full((len(sets), len(chunk.examples)), UNREAD, dtype=np.int64)
    for k, logits in enumerate(chunk.bench.engine.edited(chunk.run(base, question), swaps)):
        found = candidates.read(logits, chunk.examples)
        scores[k], top[k] = found.scores, found.top
    return scores, top
