"""Does it hold on conflicts that played no part in finding it? Named rows, the set, its controls, its side effects.

Everything is fixed on discovery: the rows, their donors, the set and its order, the means. Here the same effects are
measured on the other half; `found.heads` takes its `effect low high` from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from av_lens.isolation.measuring.bench import Bench, Chunk
from av_lens.isolation.measuring.effects import Progress, requests
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.seam import MEDIA_SITES
from av_lens.isolation.naming.evidence import BySite, Searched, chunks_of, gather
from av_lens.isolation.naming.role_tests import Named, family_size
from av_lens.isolation.naming.roles import confirm
from av_lens.isolation.sets.confirmed import confirmed_sets, ranked_curve
from av_lens.isolation.sets.members import InContext, in_context, member_roles, member_rows
from av_lens.isolation.sets.search import SearchedSets, search_sets
from av_lens.isolation.sets.sets import BuiltSet
from av_lens.isolation.sets.specificity import controls
from av_lens.results.halves import CONFIRMATION, DISCOVERY
from av_lens.results.statistics import holm
from av_lens.results.tables import RELEASING

NAMES = (*RELEASING, "silenced carrier", "sound carrier")


@dataclass(eq=False)
class Held(BySite):
    """What confirmation found; a site is missing where discovery named nothing.

    Attributes:
        searched: the sets, as the search on discovery built them.
        roles: the chosen set's members with the role that each has while the others are edited, on discovery.
        in_context: their effects in that context, by half.
        confirmed: which rows held, single heads' and members'.
        holm_p: their adjusted p on confirmation.
        set_rows: the sets edited on confirmation.
        member_rows: the sets' members.
        ablation_rows: cumulative edits and their controls.
        specificity_rows: what else the chosen set's edit breaks.
    """

    searched: SearchedSets = field(default_factory=SearchedSets)
    roles: list[Named] = field(default_factory=list)
    in_context: dict[str, InContext] = field(default_factory=dict)
    confirmed: dict[Named, bool] = field(default_factory=dict)
    holm_p: dict[Named, float] = field(default_factory=dict)
    set_rows: list[dict[str, Any]] = field(default_factory=list)
    member_rows: list[dict[str, Any]] = field(default_factory=list)
    ablation_rows: list[dict[str, Any]] = field(default_factory=list)
    specificity_rows: list[dict[str, Any]] = field(default_factory=list)
    named: frozenset[tuple[int, int, str]] = frozenset()

    @property
    def sets(self) -> list[BuiltSet]:
        """The sets that were built, one per primary donor at most."""
        return self.searched.sets

    @property
    def named_members(self) -> list[Named]:
        """The members that no single release named: their rows in the table of heads are those in context."""
        return [row for row in self.roles if (row.layer, row.head, row.site) not in self.named]


def confirm_all(
    bench: Bench,
    halves: Sequence[Half],
    searched: Searched,
    *,
    s: float,
    seed: int,
    quick: bool = False,
    progress: Progress | None,
) -> Held:
    """Search the sets on discovery, and measure on confirmation what discovery named.

    Args:
        bench: the conflicts.
        halves: discovery and confirmation.
        searched: what discovery found.
        s: the threshold, a share of G.
        seed: of the flips and the random sets.
        quick: leave pairs of heads out of the search for sets.
        progress: called as `progress(stage, done, total)`.

    Returns:
        What held.
    """
    half = next(one for one in halves if one.name == CONFIRMATION)
    first = next(one for one in halves if one.name == DISCOVERY)
    engine, where = bench.engine, searched.first.site
    family = family_size(engine.n_layers * engine.n_heads, len(searched.sites))
    held = Held(sites={})
    held.searched = search_sets(searched.first, first, s=s, quick=quick, progress=progress)
    held.named = frozenset(
        (row.layer, row.head, row.site) for row in searched.named if row.role in (*RELEASING, "breaks")
    )
    chunks = {site: chunks_of(bench, searched, half, site) for site in searched.sites}
    built = held.searched.chosen
    for site in searched.sites:
        heads = {(row.layer, row.head) for row in searched.named if row.site == site}
        heads |= set(built.members) if built is not None and site == where else set()
        if heads:
            wanted = requests(
                with_means=chunks[site][0].means is not None,
                with_third=any(bench.has_third(int(i)) for i in half.examples),
                with_audio_only=site not in MEDIA_SITES,
            )
            held.sites[site] = gather(
                chunks[site], half, wanted, sorted(heads), site=site, s=s, family=family, seed=seed + 1,
                progress=progress,
            )  # fmt: skip
    if built is not None:
        for one, stacks in ((first, searched.first.chunks), (half, chunks[where])):
            held.in_context[one.name] = in_context(
                stacks, one, built, s=s, family=family, seed=seed + (one is half), progress=progress
            )
        held.roles = member_roles(held.in_context[DISCOVERY], built, site=where)
    _confirm_rows(searched, held, s)
    _confirm_sets(searched, held, chunks[where], (first, half), s=s, seed=seed, progress=progress)
    return held


def _confirm_rows(searched: Searched, held: Held, s: float) -> None:
    """Holm over the rows that got a name, single heads' and members' together, then the same cuts."""
    single = [row for row in searched.named if row.role in NAMES]
    members = [row for row in held.roles if row.role in NAMES]
    p = [held.sites[row.site].tests.of(row) for row in single]
    p += [held.in_context[CONFIRMATION].tests.of(row) for row in members]
    adjusted = holm(np.array(p, dtype=np.float64), family=len(p))
    held.holm_p = {row: float(value) for row, value in zip((*single, *members), adjusted, strict=True)}
    groups = [(site.evidence, [row for row in single if row.site == name]) for name, site in held.sites.items()]
    if members:
        groups.append((held.in_context[CONFIRMATION].evidence, members))
    for evidence, rows in groups:
        outcome = confirm(evidence, rows, [held.holm_p[row] for row in rows], s=s)
        held.confirmed |= dict(zip(rows, outcome, strict=True))


def _confirm_sets(
    searched: Searched,
    held: Held,
    chunks: list[Chunk],
    halves: tuple[Half, Half],
    *,
    s: float,
    seed: int,
    progress: Progress | None,
) -> None:
    """Edit the sets on confirmation with their controls, and look at what else the chosen one breaks."""
    first, half = halves
    held.ablation_rows += ranked_curve(searched, chunks, half, progress=progress)
    held.set_rows, ablation = confirmed_sets(
        held.searched.sets, searched.first, chunks, halves, s=s, seed=seed, progress=progress
    )
    held.ablation_rows += ablation
    context = held.in_context.get(CONFIRMATION)
    held.member_rows = member_rows(
        held.searched, first, site=searched.first.site, roles=held.roles, confirmation=context, confirmed=held.confirmed
    )
    built = held.searched.chosen
    if built is not None:
        held.specificity_rows = controls(chunks, built.members, built.donor, examples=half.examples, boot=half.boot)
