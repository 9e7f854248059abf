"""Is the audio in there? The sound's and the picture's word by layer and span: logit lens and probes, with nulls.

* **lens** (`methods.lens`): the share of conflicts in which the word is among the `TOP` likeliest tokens at some
  position of the span, layer by layer, and at some position and layer (layer -1). Null: the same maximum for other
  conflicts' sounds' words on the same clip, their mean; `excess` is what the word has over it. In `va` and `blank_a`.
* **probe** (`methods.probes`): a linear probe of the sound's (the picture's) class, from the stream averaged over the
  span, learnt on discovery's conflict cells `va` and `av` and tested on confirmation's, in isolate's own halves. Null:
  shuffled labels; `excess` is the selectivity. The layer is chosen on discovery (`chosen`); its row says how well it
  did there and what the other medium's class alone would let one guess.

`layer` counts the layers that the stream has passed: 0 is before the first. Confirmation's conflicts, with isolate's
intervals. That a word can be read does not mean that the model reads it: where the sound is known and not said, it is
lost after that layer.

Choices where the protocol is silent: `TOP` is 5; of a span with more than `MOST_POSITIONS` positions the lens reads so
many, evenly spaced (the null the same ones); an answer of several tokens is read by its first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from av_lens.core.pooled import pooled_streams
from av_lens.errors import InputError, InterventionError
from av_lens.inputs.sources import clip_key
from av_lens.isolation.explaining.known import Known, Row
from av_lens.isolation.measuring.bench import Bench, Chunk
from av_lens.isolation.measuring.halves import Half, columns
from av_lens.isolation.measuring.plan_effects import measured
from av_lens.isolation.measuring.store import Arrays
from av_lens.methods.lens import logit_lens
from av_lens.methods.probes import Streams, probe
from av_lens.methods.shared.role_words import named_span
from av_lens.metrics.asked import each
from av_lens.results.halves import Halves, Member
from av_lens.spans import Span, SpanMap

SPANS = ("audio", "video|image", "question", "generation")
WORDS = ("sound", "picture")
LENS_CELLS, PROBE_CELLS = ("va", "blank_a"), ("va", "av")
TOP, MOST_POSITIONS, CONTROL_DRAWS = 5, 64, 1


def knowledge_rows(known: Known) -> list[Row]:
    """Read the sound's and the picture's word by layer: rows of `knowledge`."""
    of = (known.bench, (known.discovery, known.confirmation), known.seed)
    return [*_lens_rows(*of), *_probe_rows(*of)]


def _lens_rows(bench: Bench, halves: Sequence[Half], seed: int) -> list[Row]:
    half = halves[1]
    chunks = bench.chunks(half.examples.tolist(), "suffix")
    everyone = [int(i) for one in halves for i in one.examples]
    others = list(dict.fromkeys(bench.conflicts[i].answers[0] for i in everyone))
    depends = {"seed": seed, "others": others, "cells": LENS_CELLS, "spans": SPANS, "top": TOP, "most": MOST_POSITIONS}
    compute = partial(lens_readings, others=others, seed=seed)
    made = measured(chunks, half, "logit lens", depends, compute)
    rows: list[Row] = []
    for cell, span in product(LENS_CELLS, SPANS):
        found, null = made.arrays[f"{cell} {span}"], made.arrays[f"{cell} {span} null"]
        for (word, layer), row in _bounded(half, found, np.broadcast_to(null[:, None], found.shape)):
            note = f"top {TOP} at some position" + (" and layer" if not layer else "")
            of = {"method": "lens", "word": WORDS[word], "cell": cell, "span": _said(span), "layer": layer or -1}
            rows.append(of | row | {"note": note})
    return rows


def lens_readings(chunk: Chunk, others: Sequence[Any], seed: int) -> Arrays:
    """Read both words through the logit lens."""
    model, out = chunk.bench.engine.model, Arrays()
    answers = [chunk.bench.conflicts[int(i)].answers for i in chunk.examples]
    words = [each([pair[side] for pair in answers]) for side in (0, 1)]
    for cell in LENS_CELLS:
        stack = chunk.inputs(cell)
        for span in SPANS:
            at = spaced(stack.spans, span)
            shape = (len(answers), len(WORDS), 1 + chunk.bench.engine.n_layers)
            found, null = np.full(shape, np.nan), np.full((shape[0], shape[2]), np.nan)
            if len(at):
                read = logit_lens(model, stack, at=at, words=words, others=others, top=1, seed=seed, stack=len(answers))
                for place, by in ((slice(0, 1), "all"), (slice(1, None), "layer")):
                    figures = read.understanding(TOP, by=by).values.values.reshape(shape[0], 5, -1)
                    found[:, :, place], null[:, place] = figures[:, :2], figures[:, 2]
            out[f"{cell} {span}"], out[f"{cell} {span} null"] = found, null
    return out


def spaced(spans: SpanMap, words: str) -> Span:
    """Choose the positions of a span that the lens reads."""
    found = named_span(words, spans)
    if len(found) <= MOST_POSITIONS:
        return found
    chosen = np.unique(np.linspace(0, len(found) - 1, MOST_POSITIONS).round().astype(int))
    return spans.span(found.positions[chosen].tolist())


def _probe_rows(bench: Bench, halves: Sequence[Half], seed: int) -> list[Row]:
    half = halves[1]
    ids = [[str(bench.conflicts[int(i)].id) for i in one.examples] for one in halves]
    depends = {"seed": seed, "ids": ids, "spans": SPANS, "cells": PROBE_CELLS, "draws": CONTROL_DRAWS}
    try:
        found = bench.store.recall("probes", depends, partial(_probed, bench, halves, seed))
    except (InputError, InterventionError) as error:  # too few conflicts or classes: said, not measured
        return [{"method": "probe", "word": word, "note": f"not measured: {error}"} for word in WORDS]
    rows: list[Row] = []
    for word in WORDS:
        crossed, alone = found[f"{word} crossed"], float(np.nanmean(found[f"{word} other alone"]))
        for (span, layer), row in _bounded(half, found[f"{word} accuracy"], found[f"{word} control"]):
            chosen = int(found[f"{word} chosen"][span]) == layer
            note = f"{crossed[span, layer]:.2f} where it was chosen; the other medium alone: {alone:.2f}"
            of = {"method": "probe", "word": word, "cell": ", ".join(PROBE_CELLS), "span": _said(SPANS[span])}
            rows.append(of | row | {"layer": layer, "chosen": chosen, "note": note if chosen else ""})
    return rows


def _probed(bench: Bench, halves: Sequence[Half], seed: int) -> Arrays:
    """Both probes, `[confirmation's example, span, layer]`."""
    streams = pooled(bench, halves)
    dealt = tuple(one.name for one in halves for _ in one.examples)
    # Components are numbered by half alike, so that a component's number means the same in both.
    given = Halves(dealt, tuple(int(c) for one in halves for c in one.components), seed)
    out: Arrays = {}
    for word in WORDS:
        grid = probe(None, streams, target=word, draws=CONTROL_DRAWS, seed=seed, halves=given, progress=bench.progress)
        for figure in ("accuracy", "control"):
            out[f"{word} {figure}"] = grid.values.sel(figure=figure).values
        out[f"{word} other alone"] = grid.values.sel(figure="other alone").values[:, 0, 0]
        out[f"{word} crossed"] = np.asarray(grid.provenance["cross_validated"], dtype=np.float64)
        chosen = grid.provenance["chosen"]
        out[f"{word} chosen"] = np.array([chosen[span] for span in SPANS], dtype=np.int64)
    return out


def pooled(bench: Bench, halves: Sequence[Half]) -> Streams:
    """Run the conflict cells of both halves and keep their streams, averaged over the spans."""
    model, candidates = bench.engine.model, bench.candidates
    examples = [int(i) for one in halves for i in one.examples]
    vectors: np.ndarray = np.zeros(0)
    for chunk in bench.chunks(examples, "suffix"):
        rows = [examples.index(int(i)) for i in chunk.examples]
        for number, cell in enumerate(PROBE_CELLS):
            found = pooled_streams(model, chunk.inputs(cell), SPANS).numpy()
            if not vectors.size:
                vectors = np.zeros((len(examples), len(PROBE_CELLS), *found.shape[1:]), dtype=found.dtype)
            vectors[rows, number] = found
    names = [(candidates.names[candidates.sound[i]], candidates.names[candidates.picture[i]]) for i in examples]
    members = tuple(
        Member(str(c.id), clip_key(c.sound), clip_key(c.picture), name[0])
        for c, name in zip((bench.conflicts[i] for i in examples), names, strict=True)
    )
    return Streams(vectors, SPANS, PROBE_CELLS, members, tuple(names), str(model.name))


def _said(span: str) -> str:
    return span.replace("|image", "")


def _bounded(half: Half, found: np.ndarray, null: np.ndarray) -> Iterator[tuple[tuple[int, ...], Row]]:
    """Every place's columns: what was found, its null, and what is above it."""
    value, excess, mean = half.boot.mean(found), half.boot.mean(found - null), half.boot.mean(null).value
    for at in np.ndindex(*found.shape[1:]):
        row: Row = {"null": float(mean[at]), "n": int((~np.isnan(found[:, *at])).sum())}
        row |= columns(value, "value", "low", "high", at=at)
        yield at, row | columns(excess, "excess", "excess_low", "excess_high", at=at)
