"""What a run knows once its search is confirmed: where every further part begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from av_lens.isolation.measuring.bench import Bench, Chunk
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.recordings import Head
from av_lens.isolation.naming.evidence import Searched, chunks_of
from av_lens.isolation.sets.confirmation import NAMES, Held
from av_lens.results.tables import RELEASING

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A head that gets a card at a site: whether it releases (else it carries), and its donor."""

    layer: int
    head: int
    releases: bool
    donor: str

    @property
    def at(self) -> Head:
        """Layer and head."""
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
        """List the heads that get a card: named at the site, or in the chosen set; those that release first."""
        found: dict[Head, Subject] = {}
        here = [row for row in self.searched.named if row.site == site]
        found |= {row.at: Subject(*row.at, True, row.donor) for row in here if row.role in RELEASING}
        chosen = self.held.chosen
        if chosen is not None and site == self.searched.first.site:
            found = {head: Subject(*head, True, chosen.donor) for head in chosen.members} | found
        carrying = {row.at: Subject(*row.at, False, "blank_muted") for row in here if row.role in NAMES}
        return sorted((carrying | found).values(), key=lambda one: (not one.releases, one.at))
