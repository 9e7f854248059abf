"""Every named head's mechanism card: what it reads, writes, what drives its pattern, where its release goes.

Protocol section 5. z W_O is a sum over keys of pattern x value W_O, so that a write is parted exactly by the role of
the key; "read evenly" is what one unit of attention spread evenly over the role would write. All cells of a conflict
have one layout, so rotary positions agree and keys can be exchanged.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.readings import attention_mass, sinks_of
from av_lens.interventions import Plan
from av_lens.isolation.explaining import knowledge
from av_lens.isolation.explaining.knowledge import Known, Row, Subject
from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.effects import effects_of_plans, trace_of
from av_lens.isolation.measuring.engine import MIRROR, MLP, MLP_OUT, W_CELLS, Node
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.store import Arrays
from av_lens.isolation.naming.roles import Evidence, head_means
from av_lens.replay.rerun import layer_of
from av_lens.replay.stacks import HeadRead
from av_lens.results.statistics import Interval
from av_lens.spans import SpanMap

KEYS = ("audio", "video", "image", "question", "header", "generation", "boundary", "system", "sinks")
CELLS = (("va", "ask"), ("aa", "ask"), ("blank_a", "ask"), ("va", "see"))
WRITES = ("from the picture", "from the sound", "from text", "picture read evenly", "sound read evenly")
ANSWERS = ("sound's answer", "picture's answer", "sound's - picture's")
DRIVES = ("Q", "K", "Q and K", "V")
ALL = "z"
LOOKS = ("video|image", "audio")


def by_role(spans: SpanMap, sinks: Sequence[int]) -> dict[str, list[int]]:
    """Part a prompt's positions by what they hold."""
    roles = ["sinks" if position in set(sinks) else role for position, role in enumerate(spans.roles)]
    return {name: [position for position, role in enumerate(roles) if role == name] for name in KEYS}


def attention(chunk: Chunk) -> Arrays:
    """Measure every head's attention by role."""
    out: Arrays = {}
    for cell, question in CELLS:
        recording = chunk.run(cell, question)
        spans, site = recording.inputs.spans, recording.site.tolist()
        queries = {"generation": [int(spans.generation_position)], "site": site}
        keys = by_role(spans, sinks_of(spans, chunk.bench.sinks))
        mass = attention_mass(chunk.bench.engine.model, recording.inputs, queries, keys=keys).double().numpy()
        out[f"{cell} {question}"] = mass / np.array([[1.0], [len(site)]])
    return out


@torch.no_grad()
def writes(chunk: Chunk, heads: Sequence[Node]) -> Arrays:
    """Attribute the nodes' writes at the asked position to what they read, answer by answer; whole ones last."""
    engine, candidates = chunk.bench.engine, chunk.bench.candidates
    out = np.zeros((len(chunk.examples), len(heads), len(WRITES) + 1, len(ANSWERS)))
    for cell in ("va", "av"):
        sides = ("sound", "picture") if cell == "va" else ("picture", "sound")
        run, tokens = chunk.run(cell), candidates.tokens
        for number, head in enumerate(heads):
            for place, written in enumerate(_written(chunk, cell, head), -1 if head[1] == MLP else 0):
                added = engine.linear_logits(run, written, tokens)
                added = added - engine.linear_logits(run, torch.zeros_like(written), tokens)  # less a bias
                scores = candidates.weighed(added, run.logits)
                two = [candidates.centred(scores, chunk.examples, of=side) for side in sides]
                out[:, number, place] += 0.5 * np.stack([*two, two[0] - two[1]], axis=1)
    parted = np.array([head != MLP for _, head in heads])
    out[:, parted, -1], out[:, ~parted, :-1] = out[:, parted, :3].sum(2), np.nan
    return {"writes": out}


def _written(chunk: Chunk, cell: str, head: Node) -> list[Float[Tensor, "batch d_model"]]:
    """What a node writes at the asked position, in the order of `WRITES`; an MLP's is not parted."""
    if head[1] == MLP:
        return [chunk.run(cell).parts[MLP_OUT][head[0], :, -1]]
    trace, spans = trace_of(chunk, cell), chunk.run(cell).inputs.spans
    read = HeadRead.of(trace, *head, [int(spans.generation_position)])
    seen, heard = (torch.from_numpy(spans[role].positions.copy()) for role in LOOKS)
    text = torch.tensor([p for p, role in enumerate(spans.roles) if role not in ("audio", "video", "image")])
    pattern = read.pattern[:, 0]
    weights = [torch.zeros_like(pattern) for _ in WRITES]
    for weight, places in zip(weights[:3], (seen, heard, text), strict=True):
        weight[:, places] = pattern[:, places]
    for weight, places in zip(weights[3:], (seen, heard), strict=True):
        weight[:, places] = 1.0 / max(1, len(places))
    output = layer_of(chunk.bench.engine.model, head[0]).outputs()[head[1]]
    return [torch.einsum("bp,bpd,dm->bm", weight, read.v, output) for weight in weights]


@torch.no_grad()
def drives(chunk: Chunk, heads: Sequence[Node], donor: str) -> Arrays:
    """Exchange a head's queries, keys or values with those of another cell, one or several at a time."""
    looks = np.zeros((len(chunk.examples), len(heads), 1 + len(DRIVES), len(LOOKS)))

    def plans(cell: str) -> list[Plan | None]:
        found: list[Plan | None] = []
        for number, head in enumerate(heads):
            own, mixtures = _mixtures(chunk, cell, head, donor)
            looks[:, number] += 0.5 * np.stack([_look(chunk, cell, one) for one in (own, *mixtures.values())], axis=1)
            made = [*(one.z for one in mixtures.values()), chunk.z(cell, [head], donor)[head]]
            found += [chunk.run(cell).plan({head: z}) for z in made]
        return found

    effect = effects_of_plans(chunk, "va", plans)
    return {"effect": effect.reshape(len(effect), len(heads), 1 + len(DRIVES)), "looks": looks}


def _mixtures(chunk: Chunk, cell: str, head: Node, donor: str) -> tuple[HeadRead, Mapping[str, HeadRead]]:
    """The head's own reading over the site, and the reading under each drive."""
    other, site = chunk.donor_cell(cell, donor), chunk.run(cell).site.tolist()
    own, theirs = (HeadRead.of(trace_of(chunk, one), *head, site) for one in (cell, other))
    if other in W_CELLS:
        spread = {name: chunk.spread(getattr(theirs, name)[None], other)[0] for name in ("q", "k", "v")}
        theirs = HeadRead(**spread, mask=theirs.mask, scaling=theirs.scaling)
    media = chunk.run(cell).inputs.spans.media.positions.tolist()
    made = {
        name: own.taking(theirs, q="Q" in name, k=media if "K" in name else (), v=media if "V" in name else ())
        for name in DRIVES
    }
    return own, made


def _look(chunk: Chunk, cell: str, read: HeadRead) -> Float[np.ndarray, "batch look"]:
    spans, pattern = chunk.run(cell).inputs.spans, read.pattern[:, -1].double()
    sums = [pattern[:, torch.from_numpy(spans[role].positions.copy())].sum(-1) for role in LOOKS]
    return torch.stack(sums, dim=1).cpu().numpy()


MOST_RECEIVERS = 24


def receivers(evidence: Evidence, found: Sequence[Subject]) -> list[Node]:
    """Choose whose inputs may receive what a sender releases: later heads, the named ones, then the largest."""
    named = {one.at for one in found}
    jobs = [evidence["carries"], evidence["silenced"], *evidence.by_donor("release").values()]
    size = np.max([np.nan_to_num(head_means(values)) for values in jobs], axis=0)
    first = min((one.layer for one in found if one.releases), default=len(size))
    later = [(layer, head) for layer, head in evidence.nodes if layer > first and head != MLP]
    chosen = sorted(later, key=lambda head: (head not in named, -size[head], head))[:MOST_RECEIVERS]
    return sorted(chosen)


def cards(known: Known) -> list[Row]:
    """Make the cards of every named head and every member of the chosen set: rows of `cards`."""
    sinks, subjects = known.sinks(), {site: known.subjects(site) for site in known.searched.sites}
    return [
        row | {"site": site}
        for site, found in subjects.items()
        if found
        for row in _site_rows(known, site, sinks, found)
    ]


def _site_rows(known: Known, site: str, sinks: list[list[int]], found: Sequence[Subject]) -> Iterator[Row]:
    half, chunks = known.confirmation, known.chunks(site)
    received = receivers(known.searched.sites[site].evidence, found)
    measure = partial(gathered, chunks, half.examples)
    everyone, found = found, [one for one in found if one.head != MLP]
    yield from _attention_rows(half, measure("attention by role", {"sinks": sinks}, attention), found)
    because = obstacle(chunks[0])
    if because:
        for one, part in product(everyone, ("ov", "pattern", "path")):
            yield _row(one, part, "", "not measured", np.full(3, np.nan), "", because)
        return
    heads = [one.at for one in everyone]
    written = measure("what heads write", {"heads": heads}, partial(writes, heads=heads))
    yield from _write_rows(half, written["writes"], everyone)
    kinds = [[one for one in found if one.releases is releases] for releases in (True, False)]
    for mine, donors in zip(kinds, (("blank_muted", "wa"), ("blank_a",)), strict=True):
        for donor in donors if mine else ():
            heads = [one.at for one in mine]
            compute = partial(_driven, heads=heads, donor=donor)
            made = measure(f"queries and keys from {donor}", {"heads": heads, "donor": donor}, compute)
            yield from _pattern_rows(half, made, mine, donor)
    kinds[0] = [one for one in everyone if one.releases]
    mlps = list(range(known.bench.engine.n_layers)) if known.bench.mlps else []
    for mine, base, ends in zip(kinds, ("va", "blank_a"), ((received, mlps), ([], [])), strict=True):
        if mine:
            senders = [(one.at, one.donor) for one in mine]
            compute = partial(knowledge.paths, base=base, senders=senders, heads=ends[0], mlps=ends[1])
            depends = {"base": base, "senders": senders, "heads": ends[0], "mlps": ends[1]}
            made = measure("paths" if base == "va" else "paths of carriers", depends, compute)
            yield from _path_rows(half, made["effect"], mine, base, *ends)


def obstacle(chunk: Chunk) -> str:
    """Say why this model's layers cannot be computed by themselves."""
    trace = trace_of(chunk, "va")
    if trace.hooked_because:
        return f"not measured: {trace.hooked_because}"
    roles = ", ".join(trace.traits.bidirectional)
    return f"not measured: {roles} read both ways" if roles else ""


def _driven(chunk: Chunk, heads: Sequence[Node], donor: str) -> Arrays:
    if not chunk.has(donor):
        shape, n = (len(chunk.examples), len(heads), 1 + len(DRIVES)), len(LOOKS)
        return {"effect": np.full(shape, np.nan), "looks": np.full((*shape, n), np.nan)}
    found = drives(chunk, heads, donor)
    chunk.drop_traces(donor, MIRROR[donor])
    return found


def _row(one: Subject, part: str, cell: str, what: str, bounds: np.ndarray, unit: str, note: str = "") -> Row:
    of = {"layer": one.layer, "head": one.head, "part": part, "cell": cell, "what": what, "unit": unit, "note": note}
    return of | dict(zip(("value", "low", "high"), map(float, bounds), strict=True))


def _three(found: Interval) -> Float[np.ndarray, "3 ..."]:
    return np.stack([found.value, found.low, found.high])


def _attention_rows(half: Half, made: Arrays, found: Sequence[Subject]) -> Iterator[Row]:
    for cell, question in CELLS:
        values = made[f"{cell} {question}"]
        bounds, words = _three(half.boot.mean(values)), cell if question == "ask" else f"{cell} ({question})"
        present = np.flatnonzero(np.nansum(values, axis=(0, 1, 2, 3)) > 0)
        for one, (query, asking), key in product(found, enumerate(("generation", "site")), present):
            at = bounds[:, one.layer, one.head, query, key]
            yield _row(one, "attention", words, f"{asking} -> {KEYS[key]}", at, "share of attention")


def _write_rows(half: Half, values: np.ndarray, found: Sequence[Subject]) -> Iterator[Row]:
    bounds = _three(half.boot.mean(np.roll(values, 1, axis=2)))
    places = enumerate(found), enumerate(("its write", *WRITES)), enumerate(ANSWERS)
    for (number, one), (place, write), (side, answer) in product(*places):
        if place and one.head == MLP:
            continue
        unit = "logit" if "evenly" not in write else "logit per unit of attention"
        yield _row(one, "ov", "va", f"{write}, on the {answer}", bounds[:, number, place, side], unit)


def _pattern_rows(half: Half, made: Arrays, found: Sequence[Subject], donor: str) -> Iterator[Row]:
    effect, seen = made["effect"], made["looks"][..., 0]
    effects, looks = _three(half.by(donor).mean(effect)), _three(half.by(donor).mean(made["looks"]))
    shares = _three(half.shares(effect, np.broadcast_to(effect[:, :, [-1]], effect.shape), donor))
    queries, both = seen[:, :, 0] - seen[:, :, 1], seen[:, :, 0] - seen[:, :, 3]
    driven, size = _three(half.shares(queries, both, donor)), _three(half.by(donor).mean(both))
    for number, one in enumerate(found):
        for place, drive in enumerate((*DRIVES, ALL)):
            what = f"{drive} from {donor}: effect on C"
            yield _row(one, "pattern", "va", what, effects[:, number, place], "logit")
            if drive != ALL:
                moves = effects[1, number, -1] > 0 or effects[2, number, -1] < 0
                share = shares[:, number, place] if moves else np.full(3, np.nan)
                note = "" if moves else "z from there does nothing, so there is no share"
                yield _row(one, "pattern", "va", what, share, f"share of z from {donor}", note)
        for place, drive in enumerate(("as it is", *DRIVES[:3])):
            what = drive if not place else f"{drive} from {donor}"
            for look, role in enumerate(("picture", "sound")):
                at = looks[:, number, place, look]
                yield _row(one, "pattern", "va", f"{what}: attention to the {role}", at, "share of attention")
        said = drive_in_words(driven[:, number], size[:, number])
        what = f"driven by the queries ({donor})"
        yield _row(one, "pattern", "va", what, driven[:, number], "share of the moved attention to the picture", said)


def drive_in_words(share: np.ndarray, moved: np.ndarray) -> str:
    """Say what drives a pattern."""
    if not (moved[1] > 0 or moved[2] < 0):
        return "its attention to the picture does not move"
    if share[1] > 0.5:
        return "queries"
    return "keys" if share[2] < 0.5 else "undetermined"


def _path_rows(
    half: Half, values: np.ndarray, found: Sequence[Subject], base: str, heads: Sequence[Node], mlps: Sequence[int]
) -> Iterator[Row]:
    names = knowledge.path_columns(heads, mlps)
    joint = np.nan_to_num(values[:, :, names.index(knowledge.JOINT)]) if heads else 0.0
    rest = values[:, :, 0] - values[:, :, 1] - joint
    effect = np.concatenate([values, rest[:, :, None]], axis=2)
    bounds = _three(half.boot.mean(effect))
    shares = _three(half.shares(effect, np.broadcast_to(values[:, :, [0]], effect.shape)))
    for number, one in enumerate(found):
        note = f"donor {one.donor}; effect on {'C' if base == 'va' else 'G'}"
        for place, what in enumerate((*names, knowledge.REMAINDER)):
            yield _row(one, "path", base, what, bounds[:, number, place], "logit", note)
            if what != knowledge.TOTAL:
                yield _row(one, "path", base, what, shares[:, number, place], "share of total", note)
