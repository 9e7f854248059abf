"""What does each member of a chosen set do in the set's context? Protocol section 6.

The release of a member of a redundant set is next to nothing while the others stand in for it. So a member h of a set S
is measured in the run in which S without h is edited: its release there is release(S) - release(S without h). It has no
q and no max-T p, as it was found by a search and not by a test.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.effects import (
    FIRST_RELEASE,
    ROLE_ESTIMANDS,
    Effect,
    Request,
    effect_figures,
    figures,
    requests,
)
from av_lens.isolation.measuring.engine import MIRROR, Node
from av_lens.isolation.measuring.halves import Half, columns
from av_lens.isolation.naming.roles import CUT_ROLES, HELD, Cuts, Evidence, Named, Tests, run_tests, suppressor_role
from av_lens.isolation.sets.search import SearchedSets
from av_lens.isolation.sets.sets import BuiltSet, SetReleases, cumulative

ASKED_ALIKE = ("blank_muted", "audio_only", "mean_task")
"""The donors that were asked the same question."""


@dataclass(frozen=True, eq=False)
class InContext:
    """The members of the chosen set on one half, each with the others edited; NaN at all other nodes."""

    evidence: Evidence
    tests: Tests
    cuts: Cuts


def in_context(
    chunks: Sequence[Chunk],
    half: Half,
    built: BuiltSet,
    *,
    s: float,
    family: int,
    seed: int,
    mlps: tuple[int, ...] = (),
) -> InContext:
    """Measure the members of a set on a half, each with the others edited; `mlps` are the layers of named MLPs."""
    wanted = requests(chunks, names=ROLE_ESTIMANDS, donors=(built.donor,))
    held = Request("va", built.donor, mlps=mlps)
    wanted = [held, *wanted] if mlps else wanted
    if chunks[0].bench.mlps and not chunks[0].encoding:
        alike = [Request("va", donor) for donor in ASKED_ALIKE if chunks[0].has(donor)]
        wanted = list(dict.fromkeys([*wanted, *alike]))
    effects = {request: Effect.unmeasured(len(half.examples), chunks[0]) for request in wanted}
    layers, heads = (np.array([head[axis] for head in built.members]) for axis in (0, 1))
    depends = {"members": built.members, "donor": built.donor, "requests": [vars(one) for one in wanted]}
    compute = partial(_chunk_effects, built=built, wanted=wanted)
    stage = f"members with the others edited, {half.name}"
    found = gathered(chunks, half.examples, "members in context", depends, compute, stage)
    for r, request in enumerate(wanted):
        for figure, values in found.items():
            getattr(effects[request], figure)[:, layers, heads] = values[:, r]
    values = figures(effects) | ({(HELD, built.donor): effects[held].first} if mlps else {})
    evidence = Evidence(values, half, chunks[0].bench.mlps, chunks[0].encoding)
    tests = run_tests(evidence, s=s, family=family, seed=seed)
    donors = np.full(evidence["silenced"].shape[1:], built.donor, dtype=object)
    return InContext(evidence, tests, Cuts.of(evidence, donors, s=s))


def _cell_scores(
    chunk: Chunk, cell: str, built: BuiltSet, wanted: Sequence[Request]
) -> tuple[Float[np.ndarray, "1 member batch candidate"], Float[np.ndarray, "1 request member batch candidate"]]:
    """Scores with all members but one edited, and with each request's edit (all of one question) of that one on top."""
    engine, candidates = chunk.bench.engine, chunk.bench.candidates
    shape = (len(built.members), len(chunk.examples), candidates.width)
    before, after = np.full((1, *shape), np.nan), np.full((1, len(wanted), *shape), np.nan)
    question = wanted[0].question
    run = chunk.run(cell, question)
    for j, head in enumerate(built.members):
        others = sorted(_others(built, head))
        edited = engine.record_edited(run, chunk.z(cell, others, built.donor, question)) if others else run
        before[0, j] = chunk.scores(chunk.own(edited))
        given = [chunk.z(cell, [head], one.donor, question) for one in wanted]
        plans = [edited.plan(z, freeze=one.freeze, mlps=one.mlps) for z, one in zip(given, wanted, strict=True)]
        for r, again in enumerate(chunk.changed(edited, plans)):
            after[0, r, j] = chunk.scores(again)
    chunk.drop_traces(cell, question=question)
    return before, after


def _chunk_effects(chunk: Chunk, built: BuiltSet, wanted: Sequence[Request]) -> dict[str, np.ndarray]:
    """All requests on one stack, mirrored: `[batch, request, member]` of each figure at the runs' own norm scale."""
    parts: list[dict[str, np.ndarray]] = []
    for base, question in dict.fromkeys((one.base, one.question) for one in wanted):
        these = [request for request in wanted if (request.base, request.question) == (base, question)]
        cells = (_cell_scores(chunk, cell, built, these) for cell in (base, MIRROR[base]))
        parts.append(effect_figures(chunk.bench.candidates, chunk.examples, *cells))
    return {name: np.moveaxis(np.concatenate([part[name] for part in parts]), -1, 0) for name in parts[0]}


def member_roles(found: InContext, built: BuiltSet, *, site: str) -> list[Named]:
    """Give every member the role that it has with the others edited."""
    rows: list[Named] = []
    for at in built.members:
        role = suppressor_role(found.cuts, at, dict.fromkeys(CUT_ROLES, True))
        table = found.tests.p.get((role, built.donor), found.tests.release_p[built.donor])
        # Only the members were measured in this context, so that no p here is one of the family of all nodes.
        rows.append(Named(*at, site, role, built.donor, float(table[at]), math.nan, math.nan))
    return rows


def member_rows(
    searched: SearchedSets,
    half: Half,
    site: str,
    roles: Sequence[Named],
    confirmation: InContext | None,
    confirmed: Mapping[Named, bool],
) -> list[dict[str, Any]]:
    """Write the rows of `members`: the sets of all donors, in the order of the search."""
    known = {row.at: row for row in roles}
    out: list[dict[str, Any]] = []
    for built in searched.sets:
        rows = _discovery_rows(searched.releases[built.donor], built, half)
        for head, row in zip(built.members, rows, strict=True):
            row |= {"site": site, "screen": searched.screens[head]}
            if built.chosen and head in known and confirmation is not None:
                row |= _context_columns(confirmation, built.donor, head)
                row |= {"role": known[head].role, "confirmed": confirmed.get(known[head], False)}
                row |= {f"context_{donor}": value for donor, value in searched.in_turn.get(head, {}).items()}
            out.append(row)
    return out


def _discovery_rows(releases: SetReleases, built: BuiltSet, half: Half) -> list[dict[str, Any]]:
    """Each member alone, what it added to those before it, and what the set loses without it."""
    whole, before = releases.each(built.members), 0.0
    releases.measure([*cumulative(built.members), *(_others(built, head) for head in built.members)])
    out: list[dict[str, Any]] = []
    for order, head in enumerate(built.members):
        so_far = releases.mean(built.members[: order + 1])
        of = {"name": built.name, "donor": built.donor, "chosen": built.chosen, "order": order}
        of |= {"layer": head[0], "head": head[1], "gain": so_far - before}
        of |= columns(half.boot.mean(releases.each((head,))), "single", "single_low")
        lost = whole - releases.each(_others(built, head))
        out.append(of | columns(half.boot.mean(lost), "without", "without_low", "without_high"))
        before = so_far
    return out


def _others(built: BuiltSet, head: Node) -> tuple[Node, ...]:
    return tuple(other for other in built.members if other != head)


def _context_columns(found: InContext, donor: str, head: Node) -> dict[str, Any]:
    at, half = (slice(None), *head), found.evidence.half
    release = found.evidence["release", donor][at]
    share = half.boot.ratio(found.evidence["direct", donor][at], found.evidence[FIRST_RELEASE, donor][at])
    direct = ("direct_share", "direct_share_low", "direct_share_high")
    reads = {name: float(getattr(found.cuts, name).value[head]) for name in ("reads_picture", "reads_sound")}
    return {**half.bounded(release, "effect"), **columns(share, *direct), **reads}
