"""What does each member of a set do? Measured in context: with the other members edited.

The release of a member of a redundant set is next to nothing while the others stand in for it. So a member h of a set S
is measured in the run in which S without h is edited (by the set's donor): its release there is
release(S) - release(S without h); its direct share is that with all later heads' z frozen to that edited run's own; it
reads picture or sound by the donors `wa` and `vw` for h alone; mere damage is judged by the fall of G and the rise of
the heard answer, in the same context. The cuts are those of single heads (95% intervals), and so are the roles.

Discovery gives the roles; confirmation confirms them: the same role by the same cuts, mean above delta, Holm's p below
.05 over all rows named on discovery, single heads and members together.

Choice where the protocol is silent: a member has no q and no max-T p (it was found by a search, not by a test), so its
role on discovery is that of the cuts alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.isolation.measuring.bench import MIRROR, Chunk
from av_lens.isolation.measuring.edited_runs import further
from av_lens.isolation.measuring.effects import FIGURES, Effect, Progress, Request, mirrored
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.seam import Head, Swap
from av_lens.isolation.naming.role_tests import Evidence, Named, Tests, run_tests
from av_lens.isolation.naming.roles import Cuts, suppressor_role
from av_lens.isolation.sets.releases import SetReleases
from av_lens.isolation.sets.search import SearchedSets
from av_lens.isolation.sets.sets import BuiltSet, cumulative
from av_lens.results.tables import SUPPRESSORS


@dataclass(frozen=True, eq=False)
class InContext:
    """The members of the chosen set on one half, each with the others edited; NaN at all other heads."""

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
    progress: Progress | None = None,
) -> InContext:
    """Measure the members of a set on a half, each with the others edited.

    Args:
        chunks: the half's conflicts, stacked.
        half: the half.
        built: the set.
        s: the threshold, a share of G.
        family: the size of the whole family of tests, which sets how many flips are sampled.
        seed: of the flips.
        progress: called as `progress(stage, done, total)`.

    Returns:
        The members' effects, their tests and their cuts.
    """
    bench = chunks[0].bench
    wanted = [Request("va", built.donor), Request("va", built.donor, freeze=True), Request("blank_a", built.donor)]
    if any(bench.has_third(int(i)) for i in half.examples):
        wanted += [Request("va", "wa"), Request("va", "vw")]
    shape = (len(half.examples), bench.engine.n_layers, bench.engine.n_heads)
    effects = {request: Effect(*(np.full(shape, np.nan) for _ in FIGURES)) for request in wanted}
    layers, columns = (np.array([head[axis] for head in built.members]) for axis in (0, 1))
    depends = {"members": built.members, "donor": built.donor, "requests": [vars(one) for one in wanted]}
    for number, chunk in enumerate(chunks):
        rows = np.array([int(np.flatnonzero(half.examples == i)[0]) for i in chunk.examples])
        found = chunk.remember("members in context", depends, partial(_chunk_effects, chunk, built, wanted))
        for r, request in enumerate(wanted):
            for figure in ("margin", "rise"):
                getattr(effects[request], figure)[rows[:, None], layers, columns] = found[figure][r].T
        if progress is not None:
            progress(f"members with the others edited, {half.name}", number + 1, len(chunks))
    evidence = Evidence.of(effects, G=half.G, C=half.C, components=half.components, boot=half.boot)
    tests = run_tests(evidence, s=s, family=family, seed=seed)
    return InContext(evidence, tests, Cuts.of(evidence, donors_of(evidence, built), s=s))


def donors_of(evidence: Evidence, built: BuiltSet) -> np.ndarray:
    """Give every head the set's donor.

    Args:
        evidence: for its shape.
        built: the set.

    Returns:
        `[layer, head]` of donor names.
    """
    return np.full(evidence.silenced.shape[1:], built.donor, dtype=object)


def _swap(chunk: Chunk, cell: str, heads: Sequence[Head], donor: str, *, freeze: bool = False) -> Swap:
    z = chunk.donor(cell, donor)
    return Swap(tuple(heads), tuple(z[layer, :, :, head] for layer, head in heads), freeze=freeze)


def _cell_scores(
    chunk: Chunk, cell: str, built: BuiltSet, wanted: Sequence[Request]
) -> tuple[Float[np.ndarray, "1 member batch candidate"], Float[np.ndarray, "request member batch candidate"]]:
    """The candidates' scores with all members but one edited, and with each request's edit of that one on top."""
    engine, candidates = chunk.bench.engine, chunk.bench.candidates
    shape = (len(built.members), len(chunk.examples), len(candidates.names))
    before, after = np.full((1, *shape), np.nan), np.full((len(wanted), *shape), np.nan)
    run = chunk.run(cell)
    for j, head in enumerate(built.members):
        others = sorted(other for other in built.members if other != head)
        edited = engine.record_edited(run, _swap(chunk, cell, others, built.donor)) if others else run
        before[0, j] = candidates.scores(edited.logits)
        swaps = [_swap(chunk, cell, [head], request.donor, freeze=request.freeze) for request in wanted]
        for r, logits in enumerate(further(engine, edited, swaps)):
            after[r, j] = candidates.scores(logits)
    run.kept.clear()
    return before, after


def _chunk_effects(chunk: Chunk, built: BuiltSet, wanted: Sequence[Request]) -> dict[str, np.ndarray]:
    """All requests on one stack, mirrored: `[request, member, batch]` of margin and rise."""
    candidates, examples = chunk.bench.candidates, chunk.examples
    out = {name: np.full((len(wanted), len(built.members), len(examples)), np.nan) for name in ("margin", "rise")}
    for base in dict.fromkeys(request.base for request in wanted):
        which = [r for r, request in enumerate(wanted) if request.base == base]
        margins: list[np.ndarray] = []
        rises: list[np.ndarray] = []
        for cell, heard in ((base, "sound"), (MIRROR[base], "picture")):
            before, after = _cell_scores(chunk, cell, built, [wanted[r] for r in which])
            margins.append(candidates.margin(after, examples) - candidates.margin(before, examples))
            above = [candidates.above_others(scores, examples, of=heard) for scores in (before, after)]
            rises.append(above[1] - above[0])
        out["margin"][which] = mirrored(margins[0], margins[1])
        out["rise"][which] = 0.5 * (rises[0] + rises[1])
    return out


def member_roles(found: InContext, built: BuiltSet, *, site: str) -> list[Named]:
    """Give every member the role that it has with the others edited.

    Args:
        found: discovery's effects in context.
        built: the set.
        site: the site set.

    Returns:
        One row per member, in the set's order; q and the max-T p are NaN.
    """
    rows: list[Named] = []
    for layer, head in built.members:
        role = suppressor_role(found.cuts, layer, head, dict.fromkeys(SUPPRESSORS, True))
        table = found.tests.p.get((role, built.donor), found.tests.release_p[built.donor])
        # Only the members were measured in this context, so that no p here is one of the family of all heads.
        rows.append(Named(layer, head, site, role, built.donor, float(table[layer, head]), math.nan, math.nan))
    return rows


def member_rows(
    searched: SearchedSets,
    half: Half,
    *,
    site: str,
    roles: Sequence[Named] = (),
    confirmation: InContext | None = None,
    confirmed: Mapping[Named, bool] | None = None,
) -> list[dict[str, Any]]:
    """Write the rows of `members`: the sets of all donors, in the order of the search.

    Args:
        searched: the sets.
        half: discovery.
        site: the site set.
        roles: the chosen set's members in context, on discovery.
        confirmation: the same members on confirmation.
        confirmed: which of `roles` held there.

    Returns:
        The rows; roles and confirmation's figures for the chosen set alone.
    """
    known = {(row.layer, row.head): row for row in roles}
    out: list[dict[str, Any]] = []
    for built in searched.sets:
        rows = _discovery_rows(searched.releases[built.donor], built, half)
        for head, row in zip(built.members, rows, strict=True):
            row |= {"site": site, "screen": searched.screens[head]}
            if built.chosen and head in known and confirmation is not None:
                row |= _context_columns(confirmation, built.donor, head)
                row |= {"role": known[head].role, "confirmed": (confirmed or {}).get(known[head], False)}
            out.append(row)
    return out


def _discovery_rows(releases: SetReleases, built: BuiltSet, half: Half) -> list[dict[str, Any]]:
    """Each member alone, what it added to those before it, and what the set loses without it."""
    whole, before = releases.each(built.members), 0.0
    releases.measure([*cumulative(built.members), *(_others(built, head) for head in built.members)])
    out: list[dict[str, Any]] = []
    for order, head in enumerate(built.members):
        so_far = releases.mean(built.members[: order + 1])
        single, without = (
            half.boot.mean(values) for values in (releases.each((head,)), whole - releases.each(_others(built, head)))
        )
        out.append(
            {
                "name": built.name,
                "donor": built.donor,
                "chosen": built.chosen,
                "order": order,
                "layer": head[0],
                "head": head[1],
                "single": float(single.value),
                "single_low": float(single.low),
                "gain": so_far - before,
                "without": float(without.value),
                "without_low": float(without.low),
                "without_high": float(without.high),
            }
        )
        before = so_far
    return out


def _others(built: BuiltSet, head: Head) -> tuple[Head, ...]:
    return tuple(other for other in built.members if other != head)


def _context_columns(found: InContext, donor: str, head: Head) -> dict[str, Any]:
    at = (slice(None), *head)
    release, boot = found.evidence.release[donor][at], found.evidence.boot
    mean, share = boot.mean(release), boot.ratio(found.evidence.direct[donor][at], release)
    return {
        "effect": float(mean.value),
        "low": float(mean.low),
        "high": float(mean.high),
        "direct_share": float(share.value),
        "direct_share_low": float(share.low),
        "direct_share_high": float(share.high),
        "reads_picture": float(found.cuts.reads_picture.value[head]),
        "reads_sound": float(found.cuts.reads_sound.value[head]),
    }
