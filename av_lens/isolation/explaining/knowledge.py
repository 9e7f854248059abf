"""What a run knows once its search is confirmed: is the sound in there, and where does a head's release go?

Lens and probes are those of protocol section 8, read on confirmation; `layer` counts the layers that the stream has
passed, -1 is the best of all. Where the sound is known and not said, it is lost after that layer. `paths` (section 3)
goes from a sender at the site to what an MLP, or a head's query ("L5H1.q"), would read if nothing but the sender had
changed; *queries* and *joint* patch all receivers in one run 4. Positive: that road lets the model hear more. Donors
need not be a run of their own (`zero`, means), so the runs of `methods.path_patching` are made here from `replay.held`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from av_lens.core.execution import run
from av_lens.core.readings import pooled_streams
from av_lens.errors import InputError, InterventionError
from av_lens.inputs.conflict import clip_key
from av_lens.interventions import Plan, Site, replace
from av_lens.interventions.edges import INPUTS
from av_lens.interventions.edges import Node as End
from av_lens.isolation.measuring.bench import Bench, Chunk, gathered
from av_lens.isolation.measuring.effects import effects_of_plans, trace_of
from av_lens.isolation.measuring.engine import LATER, MLP, Node, part_of
from av_lens.isolation.measuring.halves import Half, columns
from av_lens.isolation.measuring.store import Arrays
from av_lens.isolation.naming.evidence import Searched, chunks_of
from av_lens.isolation.sets.confirmation import NAMES, Held
from av_lens.methods.lens import logit_lens
from av_lens.methods.probes import Streams, probe
from av_lens.methods.shared.places import named_span
from av_lens.metrics.forms import each
from av_lens.replay.held import HeldRun, replaced
from av_lens.replay.rerun import layer_of
from av_lens.results.dealing import Halves, Member
from av_lens.results.dyadic import SOURCE, Dyadic
from av_lens.results.record import FEEDER, RELEASING
from av_lens.spans import Span, SpanMap

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A node that gets a card at a site: whether it releases (else it carries), and its donor."""

    layer: int
    head: int
    releases: bool
    donor: str

    @property
    def at(self) -> Node:
        """The node."""
        return self.layer, self.head


@dataclass(frozen=True, eq=False)
class Known:
    """The conflicts, both halves, what discovery named and what of it held."""

    bench: Bench
    discovery: Half
    confirmation: Half
    searched: Searched
    held: Held
    seed: int = 0

    def chunks(self, site: str) -> list[Chunk]:
        """Stack confirmation's conflicts, with discovery's means."""
        again = self.held.sites.get(site)
        return again.chunks if again is not None else chunks_of(self.bench, self.searched, self.confirmation, site)

    def sinks(self) -> list[list[int]]:
        """Find the sinks from discovery's conflicts, where that has not been done: positions by layout."""
        if not self.bench.sinks:
            self.bench.find_sinks(self.discovery.examples.tolist())
        return [positions for _, positions in self.bench.sinks]

    def subjects(self, site: str) -> list[Subject]:
        """List the nodes that get a card: named at the site, or in the chosen set; those that release first."""
        found: dict[Node, Subject] = {}
        here = [row for row in self.searched.named if row.site == site]
        found |= {row.at: Subject(*row.at, True, row.donor) for row in here if row.role in (*RELEASING, FEEDER)}
        chosen = self.held.chosen
        if chosen is not None and site == self.searched.first.site:
            found = {head: Subject(*head, True, chosen.donor) for head in chosen.members} | found
        carrying = {row.at: Subject(*row.at, False, "blank_muted") for row in here if row.role in NAMES}
        return sorted((carrying | found).values(), key=lambda one: (not one.releases, one.at))


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
    made = gathered(chunks, half.examples, "logit lens", depends, compute)
    rows: list[Row] = []
    for cell, span in product(LENS_CELLS, SPANS):
        found, null = made[f"{cell} {span}"], made[f"{cell} {span} null"]
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


def _groups(half: Half) -> Sequence[int]:
    """What cross-validation keeps whole: components; where sources are shared by most, one source of each conflict."""
    rule = half.boot
    return rule.members[:, 0].tolist() if isinstance(rule, Dyadic) and rule.unit == SOURCE else half.components


def _probed(bench: Bench, halves: Sequence[Half], seed: int) -> Arrays:
    """Both probes, `[confirmation's example, span, layer]`."""
    streams = pooled(bench, halves)
    dealt = tuple(one.name for one in halves for _ in one.examples)
    # Components are numbered by half alike, so that a component's number means the same in both.
    given = Halves(dealt, tuple(int(c) for one in halves for c in _groups(one)), seed)
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
    chunks = bench.chunks(examples, "suffix")
    streams = [[pooled_streams(model, chunk.inputs(cell), SPANS).numpy() for cell in PROBE_CELLS] for chunk in chunks]
    order = np.concatenate([chunk.examples for chunk in chunks]).tolist()
    vectors = np.concatenate([np.stack(cells, axis=1) for cells in streams])[[order.index(i) for i in examples]]
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


TOTAL, DIRECT, WRITE = "total", "direct", "write"
QUERIES, JOINT, REMAINDER = "queries", "joint", "remainder"
Sender = tuple[Node, str]


def receiver_nodes(heads: Sequence[Node]) -> list[End]:
    """List the inputs of heads that may receive."""
    return [End("head", layer, head, name) for layer, head in heads for name in INPUTS]


def path_columns(heads: Sequence[Node], mlps: Sequence[int] = ()) -> list[str]:
    """Name the columns of `paths`."""
    named = [*(node.label for node in receiver_nodes(heads)), *([QUERIES, JOINT] if heads else [])]
    return [TOTAL, DIRECT, *([WRITE] if mlps else []), *named, *(f"MLP {layer}" for layer in mlps)]


@torch.no_grad()
def paths(
    chunk: Chunk, base: str, senders: Sequence[Sender], heads: Sequence[Node], mlps: Sequence[int] = ()
) -> Arrays:
    """Measure where the senders' effects go: to heads' inputs, and to the MLPs of some layers."""

    def plans(cell: str) -> list[Plan | None]:
        run, ways = chunk.run(cell), ((False, ""), (True, ""), *([(True, LATER)] if mlps else []))
        by_sender: list[list[Plan | None]] = [
            [run.plan(chunk.z(cell, [node], donor), freeze=freeze, mlps=held) for freeze, held in ways]
            for node, donor in senders
        ]
        held = _held(chunk, cell) if heads or mlps else None
        made = [_receiver_plans(chunk, cell, senders, heads, held)] if held and heads else []
        made += [_mlp_plans(chunk, cell, senders, mlps, held)] if held and mlps else []
        for received in made:
            for sender, plans_of_it in zip(by_sender, received, strict=True):
                sender += plans_of_it
        return [plan for listed in by_sender for plan in listed]

    columns = path_columns(heads, mlps)
    first = [n for n in range(len(senders) * len(columns)) if columns[n % len(columns)] in (DIRECT, WRITE)]
    effect = effects_of_plans(chunk, base, plans, first=first)
    return {"effect": effect.reshape(len(effect), len(senders), len(columns))}


def _receiver_plans(
    chunk: Chunk, cell: str, senders: Sequence[Sender], heads: Sequence[Node], held: HeldRun
) -> list[list[Plan | None]]:
    """Each receiver's input as in run 3, and all of them together, for every sender."""
    nodes = receiver_nodes(heads)
    read = held.inputs([_change(chunk, cell, sender) for sender in senders], nodes)
    ends = [_writes_at(node) for node, _ in senders]
    found = _one_by_one(held, read, nodes, ends)
    queries = _together(held, {node: given for node, given in read.items() if node.input == "q"}, ends)
    joint = _joint(chunk, cell, held, read, ends)
    return [[*listed, *both] for listed, *both in zip(found, queries, joint, strict=True)]


def _mlp_plans(
    chunk: Chunk, cell: str, senders: Sequence[Sender], mlps: Sequence[int], held: HeldRun
) -> list[list[Plan | None]]:
    """Each MLP's input as in run 3 with all other MLPs held too, for every sender."""
    held, nodes = dataclasses.replace(held, mlps="frozen"), [End("mlp", layer) for layer in mlps]
    read = held.inputs([_change(chunk, cell, sender) for sender in senders], nodes)
    return _one_by_one(held, read, nodes, [_writes_at(node) for node, _ in senders])


def _writes_at(node: Node) -> int:
    layer, head = node
    return (End("mlp", layer) if head == MLP else End("head", layer, head)).writes_at


def _one_by_one(
    held: HeldRun, read: dict[End, torch.Tensor], nodes: Sequence[End], ends: Sequence[int]
) -> list[list[Plan | None]]:
    found: list[list[Plan | None]] = [[None] * len(nodes) for _ in ends]
    for number, node in enumerate(nodes):
        rows = [row for row, end in enumerate(ends) if node.reads_at > end]
        if rows:
            for row, plan in zip(rows, replaced(held, {node: read[node][rows]}), strict=True):
                found[row][number] = plan
    return found


def _held(chunk: Chunk, cell: str) -> HeldRun:
    """The base run with its heads held, at the site; MLPs and norms are recomputed."""
    trace, recording = trace_of(chunk, cell), chunk.run(cell)
    site = tuple(recording.site.tolist())
    sites = [Site("resid_mid", layer, positions=site) for layer in range(trace.n_layers)]
    with torch.no_grad():
        cache = run(chunk.bench.engine.model, recording.inputs, capture=sites).cache
    middle = tuple(cache["resid_mid", layer] for layer in range(trace.n_layers))
    return HeldRun(trace, site, middle, "free", "recomputed")


def _change(chunk: Chunk, cell: str, sender: Sender) -> dict[tuple[str, int], torch.Tensor]:
    """What the stream gains where the sender writes as in its donor."""
    node, donor = sender
    layer, head = node
    own = chunk.output(cell, part=part_of(node))[layer]
    new = chunk.z(cell, [node], donor)[node]
    if head == MLP:
        return {("mlp", layer): new - own}
    output = layer_of(chunk.bench.engine.model, layer).outputs()[head]
    return {("heads", layer): (new - own[:, :, head]) @ output}


def _together(held: HeldRun, read: dict[End, torch.Tensor], ends: Sequence[int]) -> list[Plan | None]:
    """All receivers after each sender together, everything else free."""
    later = [
        {node: given[[row]] for node, given in read.items() if node.reads_at > end} for row, end in enumerate(ends)
    ]
    return [replaced(held, inputs)[0] if inputs else None for inputs in later]


def _joint(
    chunk: Chunk, cell: str, held: HeldRun, read: dict[End, torch.Tensor], ends: Sequence[int]
) -> list[Plan | None]:
    """All receivers after each sender together; where the site ends the prompt their z is known beforehand."""
    site, window = chunk.run(cell).site.tolist(), chunk.run(cell).window.tolist()
    if site != window:
        return _together(held, read, ends)
    made = held.outputs(read)
    later = [sorted({(node.layer or 0, node.index or 0) for node in read if node.reads_at > end}) for end in ends]
    return [
        Plan([replace(Site("z", *head, window), made[("z", *head)][0][row]) for head in heads]) if heads else None
        for row, heads in enumerate(later)
    ]
