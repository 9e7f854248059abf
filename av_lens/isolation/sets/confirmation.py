"""Does it hold on conflicts that played no part in finding it? Named rows, the set, its controls, its side effects.

Everything is fixed on discovery: the rows, their donors, the set and its order, the means. Here the same effects are
measured on the other half; `found.heads` takes its `effect low high` from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from av_lens.isolation.measuring.bench import Bench, Chunk
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming.evidence import BySite, Searched, chunks_of, gather
from av_lens.isolation.naming.role_tests import CARRIERS, Named, family_size
from av_lens.isolation.naming.roles import confirm
from av_lens.isolation.sets.confirmed import confirmed_sets, ranked_curve
from av_lens.isolation.sets.members import InContext, in_context, member_roles, member_rows
from av_lens.isolation.sets.search import SearchedSets, search_sets
from av_lens.isolation.sets.sets import BuiltSet
from av_lens.isolation.sets.specificity import controls
from av_lens.results.halves import CONFIRMATION, DISCOVERY
from av_lens.results.statistics import holm
from av_lens.results.tables import RELEASING

NAMES = (*RELEASING, *CARRIERS)


@dataclass(eq=False)
class Held(BySite):
    """What confirmation found; a site is missing where discovery named nothing.

    Attributes:
        searched: the sets that were searched on discovery.
        roles: the chosen set's members with the roles that they have with the others edited.
        in_context: their evidence by half.
        confirmed: which rows hold, single heads' and members'.
        holm_p: each row's p after Holm.
        tables: the rows about sets, by table: `sets`, `members`, `steps`, `synergies`, `ablation`, `specificity`.
        named: the (layer, head, site) whose single release names a suppressor, or breaks.
    """

    searched: SearchedSets = field(default_factory=SearchedSets)
    roles: list[Named] = field(default_factory=list)
    in_context: dict[str, InContext] = field(default_factory=dict)
    confirmed: dict[Named, bool] = field(default_factory=dict)
    holm_p: dict[Named, float] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    named: frozenset[tuple[int, int, str]] = frozenset()

    @property
    def chosen(self) -> BuiltSet | None:
        """The set of largest release, if any was built."""
        return self.searched.chosen

    @property
    def named_members(self) -> list[Named]:
        """The members that no single release named: their rows in the table of heads are those in context."""
        return [row for row in self.roles if (*row.at, row.site) not in self.named]


def confirm_all(
    bench: Bench, halves: tuple[Half, Half], searched: Searched, *, s: float, seed: int, quick: bool = False
) -> Held:
    """Search the sets on discovery, and measure on confirmation what discovery named."""
    first, half = halves
    where, family = searched.first.site, family_size(len(bench.engine.heads), len(searched.sites))
    held = Held(sites={})
    held.searched = search_sets(searched.first, first, s=s, quick=quick)
    held.named = frozenset((*row.at, row.site) for row in searched.named if row.role in (*RELEASING, "breaks"))
    chunks = {site: chunks_of(bench, searched, half, site) for site in searched.sites}
    built = held.chosen
    for site in searched.sites:
        heads = {row.at for row in searched.named if row.site == site}
        heads |= set(built.members) if built is not None and site == where else set()
        if heads:
            held.sites[site] = gather(chunks[site], half, sorted(heads), site=site, s=s, family=family, seed=seed + 1)
    if built is not None:
        for number, (one, stacks) in enumerate(((first, searched.first.chunks), (half, chunks[where]))):
            held.in_context[one.name] = in_context(stacks, one, built, s=s, family=family, seed=seed + number)
        held.roles = member_roles(held.in_context[DISCOVERY], built, site=where)
    _confirm_rows(searched, held, s)
    held.tables = _confirm_sets(searched, held, chunks[where], halves, s=s, seed=seed)
    return held


def _confirm_rows(searched: Searched, held: Held, s: float) -> None:
    """Holm over the rows that got a name, single heads' and members' together, then the same cuts."""
    single, members = ([row for row in rows if row.role in NAMES] for rows in (searched.named, held.roles))
    groups = [(held.sites[name], [row for row in single if row.site == name]) for name in held.sites]
    groups += [(held.in_context[CONFIRMATION], members)] if members else []
    p = {row: of.tests.of(row) for of, rows in groups for row in rows}
    listed = [*single, *members]
    adjusted = holm(np.array([p[row] for row in listed], dtype=np.float64), family=len(listed))
    held.holm_p = {row: float(value) for row, value in zip(listed, adjusted, strict=True)}
    for of, rows in groups:
        outcome = confirm(of.evidence, rows, [held.holm_p[row] for row in rows], s=s)
        held.confirmed |= dict(zip(rows, outcome, strict=True))


def _confirm_sets(
    searched: Searched, held: Held, chunks: list[Chunk], halves: tuple[Half, Half], *, s: float, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Edit the sets on confirmation with their controls, and look at what else the chosen one breaks."""
    found, site, (first, half), chosen = held.searched, searched.first, halves, held.chosen
    ranked = ranked_curve(searched, chunks, half)
    sets, ablation = confirmed_sets(found.sets, site, chunks, halves, s=s, seed=seed)
    context = held.in_context.get(CONFIRMATION)
    members = member_rows(found, first, site.site, held.roles, context, held.confirmed)
    controlled = [] if chosen is None else controls(chunks, chosen.members, chosen.donor, half)
    tables = {"sets": sets, "members": members, "steps": found.steps, "synergies": found.synergies}
    return tables | {"ablation": ranked + ablation, "specificity": controlled}
