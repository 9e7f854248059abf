"""What does an edit of a head, an MLP, or any other, do to hearing? Protocol section 4, measured conflict by conflict.

`ESTIMANDS` is the one list of figures: what runs, figures, rows of the table of evidence, keys of the record's arrays,
and columns of the table of heads (`column`) follow from it, and roles name estimands by `(name, donor)`. Of answers of
several tokens direct, write, repair and rise are read at the first: with later heads held at the answer's own positions
too, nothing changes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice, product

import numpy as np
import torch
from jaxtyping import Float, Int

from av_lens.interventions import Plan
from av_lens.isolation.measuring.bench import Chunk, gathered, shared_out
from av_lens.isolation.measuring.engine import LATER, MIRROR, PRIMARY_DONORS, SECONDARY_DONORS, W_CELLS, Node
from av_lens.isolation.measuring.scoring import Candidates, CellReading, Edited
from av_lens.metrics.forms import each
from av_lens.metrics.metric import Metric, as_metric, logit_diff
from av_lens.replay.traces import Trace, measure_plans
from av_lens.results.record import TABLES

PerNode = Float[np.ndarray, "example layer node"]
Figures = Mapping[tuple[str, str], PerNode]


@dataclass(frozen=True)
class Request:
    """Every node in turn gets its output from `donor`; `freeze` holds later heads, `mlps` these layers' MLPs."""

    base: str
    donor: str
    freeze: bool = False
    question: str = "ask"
    mlps: str | tuple[int, ...] = ""


@dataclass(frozen=True)
class Estimand:
    """A figure of a node: `plus`'s effect less `minus`'s, read from one figure of an `effects.Effect`."""

    name: str
    donor: str
    plus: Request | None = None
    minus: Request | None = None
    figure: str = "margin"
    shown: str = ""

    @property
    def column(self) -> str:
        """Its column in the table of heads, if that has one: by its donor, else (there the row's donor) by its name."""
        names = (self.shown, f"{self.name}_{self.donor}", self.name)
        plain = (name.replace(" ", "_").replace("(", "").replace(")", "") for name in names)
        return next((name for name in plain if name in TABLES["heads"]), "")

    def of(self, effects: Mapping[Request, Effect]) -> PerNode:
        """Compute it; NaN where a request was not measured."""
        asked = [one for one in (self.plus, self.minus) if one is not None]
        if not all(one in effects for one in asked):
            return np.full_like(next(iter(effects.values())).margin, np.nan)
        parts: list[PerNode] = [getattr(effects[one], self.figure) for one in asked]
        return -parts[0] if self.plus is None else parts[0] if self.minus is None else parts[0] - parts[1]


def _c(donor: str, *, freeze: bool = False, mlps: str = "") -> Request:
    return Request("va", donor, freeze, mlps=mlps)


def _g(donor: str) -> Request:
    return Request("blank_a", donor)


ENCODES = "encodes"
FIRST_RELEASE = "release at the first token"
"""What direct shares are of: the release itself, unless answers have several tokens."""
_MARGINS = (
    *(Estimand("release", donor, _c(donor)) for donor in (*PRIMARY_DONORS, *SECONDARY_DONORS)),
    *(
        one
        for donor in PRIMARY_DONORS
        for one in (
            Estimand("direct", donor, _c(donor, freeze=True), figure="first"),
            Estimand("write", donor, _c(donor, freeze=True, mlps=LATER), figure="first"),
            Estimand("repair", donor, _c(donor, freeze=True), _c(donor), figure="first"),
            Estimand("fall of G", donor, minus=_g(donor)),
        )
    ),
    Estimand("reads picture", "wa", _c("wa")),
    Estimand("reads sound", "vw", _c("vw")),
    Estimand("sufficiency", "va", minus=_g("va")),
    Estimand("silenced", "blank_a - blank_muted", _c("blank_a"), _c("blank_muted")),
    Estimand("carries", "blank_muted", minus=_g("blank_muted")),
    Estimand("question's own", "mean_other - mean_task", _c("mean_other"), _c("mean_task"), shown="question_share"),
)
_PARTS = tuple(
    Estimand(f"{name} on {answer}", donor, _c(donor, freeze=freeze), figure=f"on_{answer}")
    for donor in PRIMARY_DONORS
    for name, freeze in (("release", False), ("direct", True))
    for answer in ("sound", "picture")
)
ESTIMANDS: tuple[Estimand, ...] = (
    *_MARGINS,
    *_PARTS,
    *(replace(e, name=f"{e.name} (norm frozen)", figure=f"{e.figure}_frozen", shown="") for e in (*_MARGINS, *_PARTS)),
    *(Estimand("rise over others", donor, _c(donor), figure="rise") for donor in PRIMARY_DONORS),
    *(Estimand(FIRST_RELEASE, donor, _c(donor), figure="first") for donor in PRIMARY_DONORS),
    *(Estimand(ENCODES, donor, Request("va", donor, question="see")) for donor in PRIMARY_DONORS),
)
READS = ("reads picture", "reads sound")
ROLE_ESTIMANDS = ("release", "direct", "write", "fall of G", *READS, "rise over others", FIRST_RELEASE, ENCODES)
"""What suppressors' roles are told by."""
OF_ALL = frozenset((*map(_c, (*PRIMARY_DONORS, "wa", "vw", "blank_a")), *map(_g, ("va", "blank_muted"))))
"""What is run for every node; the rest tells what a release is made of, and is run where one may be large."""


def figures(effects: Mapping[Request, Effect]) -> dict[tuple[str, str], PerNode]:
    """Compute every estimand, by name and donor; what is another's where answers have one token is left out there."""
    alike = all(one.first is one.margin for one in effects.values())
    listed = [one for one in ESTIMANDS if not (alike and one.name == FIRST_RELEASE)]
    return {(one.name, one.donor): one.of(effects) for one in listed}


def donor_of(name: str) -> str:
    """Name the donor of an estimand that has only one."""
    (donor,) = (one.donor for one in ESTIMANDS if one.name == name)
    return donor


def requests(
    chunks: Sequence[Chunk] | None = None, *, names: Sequence[str] = (), donors: Sequence[str] = PRIMARY_DONORS
) -> list[Request]:
    """List what estimands need (all of them where none is named), less the donors that some conflicts cannot have."""
    wanted = [one for one in ESTIMANDS if not names or (one.name in names and {one.donor} & {*donors, *W_CELLS})]
    found = dict.fromkeys(r for one in wanted for r in (one.plus, one.minus) if r is not None)
    there = [one for one in found if chunks is None or any(chunk.has(one.donor) for chunk in chunks)]
    there = [one for one in there if chunks is None or chunks[0].bench.mlps or not one.mlps]
    encoding = chunks is not None and chunks[0].encoding  # no shares there, and what `see` loses beside
    there = [one for one in there if not one.freeze] if encoding else [one for one in there if one.question == "ask"]
    place = {donor: number for number, donor in enumerate((*PRIMARY_DONORS, *SECONDARY_DONORS, *W_CELLS))}
    after = len(place)
    # Primary donors come first; on G the conflict's own z does.
    second = {one: (one.donor in PRIMARY_DONORS) == (one.base == "blank_a") for one in there}
    cell = {one: (one.base != "va", one.question, second[one]) for one in there}
    return sorted(there, key=lambda r: (*cell[r], r.freeze, r.mlps, place.get(r.donor, after)))


@dataclass(frozen=True, eq=False)
class Effect:
    """A request's mirrored outcome per example and node; NaN where not measured. `on_...`: centred over candidates."""

    margin: PerNode
    rise: PerNode
    on_sound: PerNode
    on_picture: PerNode
    first: PerNode
    margin_frozen: PerNode
    on_sound_frozen: PerNode
    on_picture_frozen: PerNode
    first_frozen: PerNode

    @classmethod
    def unmeasured(cls, n: int, chunk: Chunk) -> Effect:
        """Make room for the effects on n conflicts."""
        shape = (n, *chunk.bench.shape)
        made = {name: np.full(shape, np.nan) for name in FIGURES}
        if not chunk.bench.candidates.several:
            made |= {"first": made["margin"], "first_frozen": made["margin_frozen"]}
        return cls(**made)


TOGETHER = 64  # edited runs whose scores are read at once
FIGURES = tuple(field.name for field in fields(Effect))


def mirrored(base: str, change: Callable[[str], np.ndarray]) -> np.ndarray:
    """Average a change over a cell and its mirror: (change in the cell - change in the mirror) / 2."""
    return 0.5 * (change(base) - change(MIRROR[base]))


def edited_scores(
    chunk: Chunk, base: str, wanted: Sequence[Request], heads: Sequence[Node], tick: Callable[[int], None]
) -> Float[np.ndarray, "scale request head batch candidate"]:
    """Run all requests, which ask one question, on one base cell: scores as given, and read out by `linear_logits`."""
    candidates, engine, examples = chunk.bench.candidates, chunk.bench.engine, chunk.examples
    recording, tokens = chunk.run(base, wanted[0].question), candidates.tokens
    own = chunk.own(recording)
    numbers = product(range(len(wanted)), range(len(heads)))
    owners = sorted(numbers, key=lambda one: (heads[one[1]][0], one[0], heads[one[1]]))  # layer by layer
    asked = [(wanted[r], heads[j]) for r, j in owners]
    given = [chunk.z(base, [head], one.donor, one.question) for one, head in asked]
    plans = [
        recording.plan(values, freeze=one.freeze, mlps=one.mlps) for values, (one, _) in zip(given, asked, strict=True)
    ]
    out = np.full((2, len(wanted), len(heads), len(examples), candidates.width), np.nan)
    runs = chunk.changed(recording, plans)
    for start in range(0, len(plans), TOGETHER):
        some = [(one.logits[:, tokens], one.final, *_whole(chunk, one, own)) for one in islice(runs, TOGETHER)]
        logits, finals, *whole = (torch.stack(column) for column in zip(*some, strict=True))
        where = tuple(np.array(owners[start : start + TOGETHER]).T)
        linear = engine.linear_logits(recording, finals, tokens)
        for scale, (read, said) in enumerate(zip((logits, linear), whole or (None, None), strict=True)):
            out[scale][where] = candidates.completed(candidates.pooled(read), examples, said)
        tick(len(some))
    return out


def _whole(chunk: Chunk, one: Edited, own: Edited) -> tuple[torch.Tensor, ...]:
    """What a run says of answers of several tokens, with its own final norm and with the unedited run's."""
    return tuple(said for said in (chunk.said(one), chunk.said(one, own)) if said is not None)


def effect_figures(
    candidates: Candidates,
    examples: Int[np.ndarray, " batch"],
    base: tuple[Float[np.ndarray, "scale *some batch candidate"], Float[np.ndarray, "scale *more batch candidate"]],
    mirror: tuple[Float[np.ndarray, "scale *some batch candidate"], Float[np.ndarray, "scale *more batch candidate"]],
) -> dict[str, Float[np.ndarray, "*more batch"]]:
    """Compute an `Effect`'s figures from scores before and after an edit, in a cell and its mirror."""
    centred, above = candidates.centred, candidates.above_others
    heard, seen, rise = partial(centred, of="sound"), partial(centred, of="picture"), partial(above, of="sound")
    # In the mirror the answers change places; M is their difference, and so changes its sign.
    parts: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray], int]] = {
        "margin": (candidates.margin, candidates.margin, -1),
        "on_sound": (heard, seen, 1),
        "on_picture": (seen, heard, 1),
        "rise": (rise, partial(above, of="picture"), 1),
    }
    if candidates.several:
        parts["first"] = (partial(candidates.margin, first=True), partial(candidates.margin, first=True), -1)

    def change(figure: Callable[..., np.ndarray], scores: tuple[np.ndarray, np.ndarray], scale: int) -> np.ndarray:
        before, after = scores
        return figure(after[scale], examples) - figure(before[scale], examples)

    return {
        f"{name}{ending}": 0.5 * (change(here, base, scale) + sign * change(there, mirror, scale))
        for scale, ending in enumerate(("", "_frozen")[: len(base[0])])
        for name, (here, there, sign) in parts.items()
        if f"{name}{ending}" in FIGURES
    }


def _chunk_effects(
    chunk: Chunk, wanted: Sequence[Request], heads: Sequence[Node], tick: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Run all requests on one base cell and its mirror: `[batch, request, head]` of each figure."""
    base, question, candidates = wanted[0].base, wanted[0].question, chunk.bench.candidates

    def scores(cell: str) -> tuple[np.ndarray, np.ndarray]:
        after, run = edited_scores(chunk, cell, wanted, heads, tick), chunk.run(cell, question)
        own = candidates.pooled(chunk.bench.engine.linear_logits(run, run.final, candidates.tokens))
        linear = candidates.completed(own, chunk.examples, chunk.said(chunk.own(run)))
        chunk.drop_traces(cell, question=question)
        before = np.stack([chunk.reading(cell, question).scores, linear])
        held = [number for number, one in enumerate(wanted) if one.freeze]
        after[:, held] = candidates.moved_at_first(before[:, None, None], after[:, held], chunk.examples)
        return before, after

    found = effect_figures(candidates, chunk.examples, scores(base), scores(MIRROR[base]))
    return {figure: np.moveaxis(values, -1, 0) for figure, values in found.items()}


def measure_requests(
    chunks: Sequence[Chunk],
    wanted: Sequence[Request],
    *,
    heads: Sequence[Node],
    examples: Int[np.ndarray, " example"],
    stage: str = "",
    into: dict[Request, Effect] | None = None,
) -> dict[Request, Effect]:
    """Run all requests for all heads on all conflicts, mirrored, beside what is known; rows in the examples' order."""
    out = {} if into is None else into
    for request in wanted:
        out.setdefault(request, Effect.unmeasured(len(examples), chunks[0]))
    layers, columns = (np.array([head[axis] for head in heads]) for axis in (0, 1))
    total, done = 2 * len(wanted) * len(heads) * len(chunks), 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if stage and (n > 1 or done % 64 == 0 or done == total):
            chunks[0].bench.progress(stage, done, total)

    def measure(chunk: Chunk) -> None:
        rows = chunk.rows(examples)
        for base, question in dict.fromkeys((request.base, request.question) for request in wanted):
            these = [request for request in wanted if (request.base, request.question) == (base, question)]
            depends = {"base": base, "question": question, "heads": heads, "requests": [vars(one) for one in these]}
            before = done
            found = chunk.remember("head effects", depends, partial(_chunk_effects, chunk, these, heads, tick))
            if done == before:
                tick(2 * len(these) * len(heads))
            for r, request in enumerate(these):
                for figure, values in found.items():
                    getattr(out[request], figure)[rows[:, None], layers, columns] = values[:, r]

    shared_out(chunks, measure)
    return out


def edited_readings(
    chunk: Chunk, base: str, sets: Sequence[Sequence[Node]], donors: Sequence[str], question: str = "ask"
) -> list[CellReading]:
    """Edit sets of heads together and read what each edited run says."""
    run = chunk.run(base, question)
    plans = [run.plan(chunk.z(base, heads, name, question)) for heads, name in zip(sets, donors, strict=True)]
    return [chunk.read(one) for one in chunk.changed(run, plans)]


DLA = ("dla", "")
"""What nodes write, beside the estimands of their edits."""


def direct_writes(chunks: Sequence[Chunk], examples: Int[np.ndarray, " example"]) -> PerNode:
    """Attribute M to the nodes' writes at the asked position, mirrored; a synonym counts by its share of the answer."""
    return gathered(chunks, examples, "direct writes", {}, _chunk_writes, "")["margin"]


def _chunk_writes(chunk: Chunk) -> dict[str, np.ndarray]:
    """Every node's direct share of M in one stack, mirrored: `[batch, layer, node]`."""
    bench, candidates = chunk.bench, chunk.bench.candidates

    def written(cell: str) -> np.ndarray:
        recording = chunk.run(cell)
        parts = bench.engine.writes(recording, candidates.tokens, mlps=bench.mlps)
        scores = candidates.weighed(parts, recording.logits)
        return candidates.margin(scores, chunk.examples)

    return {"margin": mirrored("va", written).transpose(2, 0, 1)}


def trace_of(chunk: Chunk, cell: str, question: str = "ask") -> Trace:
    """Give a cell's recorded run, kept with its recording."""
    return chunk.bench.engine.trace(chunk.run(cell, question))


def margin_metric(chunk: Chunk) -> Metric:
    """Write M as a metric of a stack: score(sound's answer) - score(picture's), each conflict's own."""
    answers = [chunk.bench.conflicts[int(i)].answers for i in chunk.examples]
    sides = (each([pair[side] for pair in answers]) for side in (0, 1))
    return replace(as_metric(logit_diff(*sides), chunk.bench.engine.model), summed=True)


def first_metric(chunk: Chunk) -> Metric:
    """Write M at the first token as a metric, each first token once."""
    metric, ids = margin_metric(chunk), list[torch.Tensor]()
    for tokens in (found[..., :1].clone() for found in metric.ids or ()):
        for option in range(1, tokens.shape[1]):
            tokens[:, option].masked_fill_((tokens[:, :option] == tokens[:, [option]]).any(1), -1)
        ids.append(tokens)
    return replace(metric, ids=tuple(ids))


def effects_of_plans(
    chunk: Chunk, base: str, plans: Callable[[str], Sequence[Plan | None]], *, first: Sequence[int] = ()
) -> Float[np.ndarray, "batch plan"]:
    """Measure a cell's plans in it and its mirror; NaN where there is none. `first` are read at the first token."""

    def changes(cell: str) -> np.ndarray:
        given = plans(cell)
        out = _changes(chunk, cell, given, margin_metric(chunk))
        if first and chunk.spoken is not None:
            out[list(first)] = _changes(chunk, cell, [given[number] for number in first], first_metric(chunk))
        return out

    return mirrored(base, changes).T


def _changes(chunk: Chunk, cell: str, plans: Sequence[Plan | None], metric: Metric) -> Float[np.ndarray, "plan batch"]:
    made = [Plan(), *(plan for plan in plans if plan is not None)]
    scores = measure_plans(trace_of(chunk, cell), made, metric).double().numpy()
    return _placed(plans, scores[1:] - scores[0])


def _placed(plans: Sequence[Plan | None], found: Float[np.ndarray, "made batch"]) -> Float[np.ndarray, "plan batch"]:
    """Lay what the plans that there are gave out over all; NaN where there is none."""
    out = np.full((len(plans), found.shape[1]), np.nan)
    out[[number for number, plan in enumerate(plans) if plan is not None]] = found
    return out


def says_sound(chunk: Chunk, plans: Sequence[Plan | None]) -> Float[np.ndarray, "batch plan"]:
    """Say under which plans the likeliest token of the whole vocabulary begins the sound's answer, in `va`."""
    made, (ids, _) = [plan for plan in plans if plan is not None], margin_metric(chunk).ids or ((), ())
    owner = [{int(token) for token in row[:, 0] if token >= 0} for row in ids]

    def right(logits: torch.Tensor) -> torch.Tensor:
        top = logits[:, -1].argmax(-1).tolist()
        said = [float(token in mine) for token, mine in zip(top, owner, strict=True)]
        return torch.tensor(said, device=logits.device)

    none = np.zeros((0, len(owner)))
    return _placed(plans, trace_of(chunk, "va").score(made, right).double().numpy() if made else none).T
