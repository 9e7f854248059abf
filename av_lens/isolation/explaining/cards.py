"""What does a head read, what does it write, and is its pattern driven by its queries or its keys?

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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.attention_mass import attention_mass, sinks_of
from av_lens.interventions import Plan
from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.donors import MIRROR, W_CELLS
from av_lens.isolation.measuring.plan_effects import effects_of_plans, trace_of
from av_lens.isolation.measuring.recordings import Head
from av_lens.isolation.measuring.store import Arrays
from av_lens.replay.rereading import HeadRead
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
