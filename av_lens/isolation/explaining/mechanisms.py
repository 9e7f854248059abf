"""Every named head's mechanism card: what it reads, writes, what drives its pattern, where its release goes.

* **attention** by role, from the generation position and over the site, in `va`, `aa`, `blank_a` and `va` asked `see`:
  the mean over positions of the sum over the role's keys. Sinks, where there are some, are a role of their own.
* **ov**: what its write at the asked position gives to the answers' logits, at the run's own norm scale, mirrored
  ((va + av) / 2 for one answer, where the sound's and the picture's change places). z W_O is a sum over keys of
  pattern x value W_O, so the write is parted exactly by the role of the key. "Read evenly" leaves the pattern out: what
  one unit of attention spread evenly over the role would write, the OV circuit by itself. A score is centred over all
  answers of the set.
* **pattern**: its queries at the site, its keys at the media positions or its values there are taken from another
  cell, all else left as it is, and z at the site is what it then makes: the effect on C, and its attention to the
  picture and to the sound. What moves with the queries alone is driven by the questioner, with the keys alone by the
  media. Suppressors take from `blank_muted` (as if nothing were seen or heard) and `wa` (another picture), carriers
  from `blank_a` (the conflict without its picture). Beside these the whole z is taken, as everywhere else.

All cells of a conflict have one layout, so rotary positions agree and keys can be exchanged. Choices: K and V are
exchanged for this query head alone, whatever heads share them; text keys (boundaries, the question itself) always stay.

One row of `cards` per figure, on confirmation, with its interval. `part` is "attention", "ov", "pattern" (`cards`) or
"path" (`knowledge`). Cards are made of every head that was given a role and of every member of the chosen set; a
member without a role of its own has the set's donor.

Choices where the protocol is silent: receivers are the heads after the first that releases, named or not, since what
a gate turns away may be carried by many heads of which none is large: the named ones, then those of the largest effect
on discovery (carries, silenced, any release), `MOST_RECEIVERS` in all. A head that both releases and carries is treated
as one that releases. Where the model's layers cannot be computed by themselves (`runs.restart`), only attention
is measured, and the other parts are one NaN row that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.readings import attention_mass, sinks_of
from av_lens.interventions import Plan
from av_lens.isolation.explaining import knowledge
from av_lens.isolation.explaining.knowledge import Known, Row, Subject
from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.engine import MIRROR, W_CELLS, Head
from av_lens.isolation.measuring.plan_effects import Measured, effects_of_plans, measured, trace_of
from av_lens.isolation.measuring.store import Arrays
from av_lens.isolation.naming.roles import Evidence, head_means
from av_lens.replay.stacks import HeadRead
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
    found: dict[str, list[int]] = {name: [] for name in KEYS}
    for position, role in enumerate(spans.roles):
        found["sinks" if position in set(sinks) else role].append(position)
    return found


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
def writes(chunk: Chunk, heads: Sequence[Head]) -> Arrays:
    """Attribute the heads' writes at the asked position to what they read, answer by answer."""
    candidates = chunk.bench.candidates
    rows, out = np.arange(len(chunk.examples)), np.zeros((len(chunk.examples), len(heads), len(WRITES), len(ANSWERS)))
    for cell in ("va", "av"):
        heard, seen = (getattr(candidates, side)[chunk.examples] for side in ("sound", "picture"))
        if cell == "av":
            heard, seen = seen, heard
        for number, head in enumerate(heads):
            for place, written in enumerate(_written(chunk, cell, head)):
                scores = _scores(chunk, cell, written)
                scores = scores - scores.mean(1, keepdims=True)
                two = scores[rows, heard], scores[rows, seen]
                out[:, number, place] += 0.5 * np.stack([*two, two[0] - two[1]], axis=1)
    return {"writes": out}


def _written(chunk: Chunk, cell: str, head: Head) -> list[Float[Tensor, "batch d_model"]]:
    """What a head writes at the asked position, in the order of `WRITES`."""
    trace, spans = trace_of(chunk, cell), chunk.run(cell).inputs.spans
    read = HeadRead.of(trace, *head, [int(spans.generation_position)])
    seen, heard = (torch.from_numpy(spans[role].positions.copy()) for role in LOOKS)
    text = torch.tensor([p for p, role in enumerate(spans.roles) if role not in ("audio", "video", "image")])
    pattern, weights = read.pattern[:, 0], list[Tensor]()
    for places in (seen, heard, text):
        kept = torch.zeros_like(pattern)
        kept[:, places] = pattern[:, places]
        weights.append(kept)
    for places in (seen, heard):
        even = torch.zeros_like(pattern)
        even[:, places] = 1.0 / max(1, len(places))
        weights.append(even)
    output = chunk.bench.engine.model.bridge.blocks[head[0]].attn.W_O.detach()[head[1]]
    return [torch.einsum("bp,bpd,dm->bm", weight, read.v, output) for weight in weights]


def _scores(chunk: Chunk, cell: str, written: Float[Tensor, "batch d_model"]) -> Float[np.ndarray, "batch candidate"]:
    """What a write adds to every candidate's score."""
    engine, candidates, recording = chunk.bench.engine, chunk.bench.candidates, chunk.run(cell)
    added = engine.linear_logits(recording, written, candidates.tokens)
    added = added - engine.linear_logits(recording, torch.zeros_like(written), candidates.tokens)  # less a bias
    return candidates.weighed(added, recording.logits)


@torch.no_grad()
def drives(chunk: Chunk, heads: Sequence[Head], donor: str) -> Arrays:
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


def _mixtures(chunk: Chunk, cell: str, head: Head, donor: str) -> tuple[HeadRead, Mapping[str, HeadRead]]:
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


def donor_cells(donor: str) -> tuple[str, ...]:
    """List the cells whose recorded runs a donor needs."""
    return tuple(dict.fromkeys((donor, MIRROR.get(donor, donor))))


MOST_RECEIVERS = 24


def receivers(evidence: Evidence, found: Sequence[Subject]) -> list[Head]:
    """Choose whose inputs may receive what a sender releases: later heads, the named ones, then the largest."""
    named = {one.at for one in found}
    jobs = [evidence["carries"], evidence["silenced"], *evidence.by_donor("release").values()]
    size = np.max([np.nan_to_num(head_means(values)) for values in jobs], axis=0)
    first = min((one.layer for one in found if one.releases), default=len(size))
    later = [(layer, head) for layer, head in np.ndindex(*size.shape) if layer > first]
    chosen = sorted(later, key=lambda head: (head not in named, -size[head], head))[:MOST_RECEIVERS]
    return sorted(chosen)


def cards(known: Known) -> list[Row]:
    """Make the cards of every named head and every member of the chosen set: rows of `cards`."""
    rows: list[Row] = []
    sinks = known.sinks()
    for site, searched in known.searched.sites.items():
        found = known.subjects(site)
        if found:
            chunks, received = known.chunks(site), receivers(searched.evidence, found)
            measure = partial(measured, chunks, known.confirmation)
            rows += [row | {"site": site} for row in _site_rows(chunks[0], sinks, found, received, measure)]
    return rows


def _site_rows(
    chunk: Chunk,
    sinks: list[list[int]],
    found: Sequence[Subject],
    received: list[Head],
    measure: Callable[..., Measured],
) -> Iterator[Row]:
    yield from _attention_rows(measure("attention by role", {"sinks": sinks}, attention), found)
    because = obstacle(chunk)
    if because:
        for one in found:
            for part in ("ov", "pattern", "path"):
                yield _row(one, part, "", "not measured", np.full(3, np.nan), "", because)
        return
    heads = [one.at for one in found]
    depends = {"heads": heads}
    yield from _write_rows(measure("what heads write", depends, lambda chunk: writes(chunk, heads)), found)
    for releases, donors in ((True, ("blank_muted", "wa")), (False, ("blank_a",))):
        mine = [one for one in found if one.releases is releases]
        for donor in donors if mine else ():
            heads = [one.at for one in mine]
            compute = partial(_driven, heads=heads, donor=donor)
            made = measure(f"queries and keys from {donor}", {"heads": heads, "donor": donor}, compute)
            yield from _pattern_rows(made, mine, donor)
    for releases, base in ((True, "va"), (False, "blank_a")):
        mine = [one for one in found if one.releases is releases]
        if mine:
            senders, ends = [(one.at, one.donor) for one in mine], received if releases else []
            compute = partial(knowledge.paths, base=base, senders=senders, heads=ends)
            depends = {"base": base, "senders": senders, "heads": ends}
            made = measure("paths" if releases else "paths of carriers", depends, compute)
            yield from _path_rows(made, mine, base, ends)


def obstacle(chunk: Chunk) -> str:
    """Say why this model's layers cannot be computed by themselves."""
    trace = trace_of(chunk, "va")
    if trace.hooked_because:
        return f"not measured: {trace.hooked_because}"
    roles = ", ".join(trace.traits.bidirectional)
    return f"not measured: {roles} read both ways" if roles else ""


def _driven(chunk: Chunk, heads: Sequence[Head], donor: str) -> Arrays:
    if donor in W_CELLS and not chunk.has_third:
        shape, n = (len(chunk.examples), len(heads), 1 + len(DRIVES)), len(LOOKS)
        return {"effect": np.full(shape, np.nan), "looks": np.full((*shape, n), np.nan)}
    found = drives(chunk, heads, donor)
    chunk.drop_traces(*donor_cells(donor))
    return found


def _row(one: Subject, part: str, cell: str, what: str, bounds: np.ndarray, unit: str, note: str = "") -> Row:
    value, low, high = (float(bound) for bound in bounds)
    return {
        "layer": one.layer, "head": one.head, "part": part, "cell": cell, "what": what,
        "value": value, "low": low, "high": high, "unit": unit, "note": note,
    }  # fmt: skip


def _attention_rows(made: Measured, found: Sequence[Subject]) -> Iterator[Row]:
    for cell, question in CELLS:
        name = f"{cell} {question}"
        bounds = made.bounds(name)
        present = np.nansum(made.arrays[name], axis=(0, 1, 2, 3)) > 0
        for one in found:
            for query, asking in enumerate(("generation", "site")):
                for key in np.flatnonzero(present):
                    what = f"{asking} -> {KEYS[key]}"
                    at = bounds[:, one.layer, one.head, query, key]
                    words = cell if question == "ask" else f"{cell} ({question})"
                    yield _row(one, "attention", words, what, at, "share of attention")


def _write_rows(made: Measured, found: Sequence[Subject]) -> Iterator[Row]:
    values = made.arrays["writes"]
    whole = values[:, :, :3].sum(2, keepdims=True)
    made = Measured(made.half, {"writes": np.concatenate([whole, values], axis=2)})
    bounds = made.bounds("writes")
    for number, one in enumerate(found):
        for place, write in enumerate(("its write", *WRITES)):
            unit = "logit" if "evenly" not in write else "logit per unit of attention"
            for side, answer in enumerate(ANSWERS):
                yield _row(one, "ov", "va", f"{write}, on the {answer}", bounds[:, number, place, side], unit)


def _pattern_rows(made: Measured, found: Sequence[Subject], donor: str) -> Iterator[Row]:
    effects, looks = made.bounds("effect"), made.bounds("looks")
    whole = made.arrays["effect"][:, :, [-1]]
    shares = made.shares("effect", np.broadcast_to(whole, made.arrays["effect"].shape))
    seen = made.arrays["looks"][..., 0]
    moved = Measured(made.half, {"queries": seen[:, :, 0] - seen[:, :, 1], "both": seen[:, :, 0] - seen[:, :, 3]})
    driven, size = moved.shares("queries", moved.arrays["both"]), moved.bounds("both")
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


def _path_rows(made: Measured, found: Sequence[Subject], base: str, heads: Sequence[Head]) -> Iterator[Row]:
    names = knowledge.path_columns(heads)
    values = made.arrays["effect"]
    joint = np.nan_to_num(values[:, :, names.index(knowledge.JOINT)]) if heads else 0.0
    rest = values[:, :, 0] - values[:, :, 1] - joint
    made = Measured(made.half, {"effect": np.concatenate([values, rest[:, :, None]], axis=2)})
    total = np.broadcast_to(values[:, :, [0]], made.arrays["effect"].shape)
    bounds, shares = made.bounds("effect"), made.shares("effect", total)
    for number, one in enumerate(found):
        note = f"donor {one.donor}; effect on {'C' if base == 'va' else 'G'}"
        for place, what in enumerate((*names, knowledge.REMAINDER)):
            yield _row(one, "path", base, what, bounds[:, number, place], "logit", note)
            if what != knowledge.TOTAL:
                yield _row(one, "path", base, what, shares[:, number, place], "share of total", note)
