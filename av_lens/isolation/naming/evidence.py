"""The search on discovery: every head's effects at every site, their tests, and who is named.

One `SiteEvidence` per site set; q runs over all of them together. `Searched` also keeps what confirmation needs from
discovery alone: the means, the donors, the rows.

The threshold s, as a share of G, where nobody gave one: .10 for organisms; for other models .03, or, if larger, the
99th percentile over heads of the largest of the three releases with base and donor cells asked `control` (the same
answers, a question about neither), over G: what the same edits do to a question that has nothing to do with hearing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from av_lens.errors import ProtocolError
from av_lens.isolation.measuring.bench import Bench, Chunk, Half
from av_lens.isolation.measuring.effects import DLA, Request, direct_writes, figures, measure_requests, requests
from av_lens.isolation.measuring.engine import MEDIA_SITES, PRIMARY_DONORS, Head, Means
from av_lens.isolation.naming import roles
from av_lens.isolation.naming.roles import CARRIERS, LEVEL, Evidence, Named, Tests, head_means
from av_lens.results.dealing import CONFIRMATION
from av_lens.results.record import RELEASING

PERCENTILE = 99
"""Of the null of other models: s is what the same edits reach under a question about neither sound nor picture."""


@dataclass(eq=False)
class SiteEvidence:
    """One half's effects at one site set."""

    site: str
    chunks: list[Chunk]
    evidence: Evidence
    tests: Tests

    def arrays(self) -> dict[str, np.ndarray]:
        """Give every effect that was measured, for the record."""
        figures = self.evidence.figures.items()
        return {"/".join((self.site, *key)): values for key, values in figures if not np.isnan(values).all()}

    def rows(self, half: str) -> list[dict[str, Any]]:
        """Write the rows of the evidence table."""
        out: list[dict[str, Any]] = []
        for (estimand, donor), values in self.evidence.figures.items():
            heads = np.argwhere((~np.isnan(values)).any(0))
            bounds = self.evidence.half.rows(values[:, *heads.T], donor) if len(heads) else []
            of = {"half": half, "site": self.site, "estimand": estimand, "donor": donor}
            where = ({"layer": layer, "head": head} for layer, head in heads.tolist())
            out += [of | at | found for at, found in zip(where, bounds, strict=True)]
        return out


@dataclass(eq=False)
class Searched:
    """What discovery found.

    Attributes:
        sites: the evidence by site set.
        named: the rows of the role table.
        release_q: q of the release alone, by site and donor.
        s: the threshold as a share of G.
        means: discovery's means by site, for confirmation.
        n_sites: how many sites were asked for, searched or not.
        notes: what could not be searched, in words.
    """

    sites: dict[str, SiteEvidence]
    named: list[Named]
    release_q: dict[str, dict[str, np.ndarray]]
    s: float
    means: dict[str, Means | None]
    n_sites: int
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> SiteEvidence:
        """The evidence at the first site set that was asked for: the one on which the set is built."""
        return next(iter(self.sites.values()))

    @property
    def suppressors(self) -> list[Named]:
        """The rows of writers, opponents, gates and heads of undetermined kind, largest release first."""
        rows = [row for row in self.named if row.role in RELEASING]
        return sorted(rows, key=lambda row: (-self.release_of(row), *row.at))

    def passes(self, row: Named, donor: str) -> bool:
        """Say whether a head's release with some donor passes on discovery: mean > delta and q < .05."""
        found = self.sites[row.site].evidence
        mean = head_means(found["release", donor])[row.at]
        return bool(mean > found.half.delta(self.s) and self.release_q[row.site][donor][row.at] < LEVEL)

    def role_alone(self, at: Head, site: str) -> str:
        """Name what a head does by its own release at a site, else what it carries there; "none" for nothing."""
        roles = [row.role for row in self.named if (row.at, row.site) == (at, site)]
        return ", ".join([role for role in roles if role not in CARRIERS] or roles) or "none"

    def release_of(self, row: Named) -> float:
        """Give a row's mean release on discovery."""
        return float(np.nanmean(self.sites[row.site].evidence["release", row.donor][:, row.layer, row.head]))


def gather(
    chunks: list[Chunk], half: Half, heads: Sequence[Head], *, site: str, s: float, family: int, seed: int
) -> SiteEvidence:
    """Measure and test the effects of some heads at one site on one half."""
    stage = f"exact effects of {len(heads)} heads at {site}, {half.name}"
    wanted = requests(chunks)
    effects = measure_requests(chunks, wanted, heads=heads, examples=half.examples, stage=stage)
    found = Evidence(figures(effects) | {DLA: direct_writes(chunks, half.examples)}, half)
    return SiteEvidence(site, chunks, found, roles.run_tests(found, s=s, family=family, seed=seed))


def null_share(
    chunks: Sequence[Chunk], examples: Int[np.ndarray, " example"], hearing: Float[np.ndarray, " example"]
) -> float:
    """Measure how much the releases of most heads reach under `control`, as a share of G."""
    wanted = [Request("va", donor, question="control") for donor in PRIMARY_DONORS if chunks[0].has(donor)]
    stage = f"the same edits under the control question, {chunks[0].site}"
    heads = chunks[0].bench.engine.heads
    found = measure_requests(chunks, wanted, heads=heads, examples=examples, stage=stage)
    largest = np.fmax.reduce([head_means(found[request].margin) for request in wanted])
    return float(np.percentile(largest, PERCENTILE) / hearing.mean())


def search(bench: Bench, half: Half, *, s: float, floor: float | None, sites: Sequence[str], seed: int) -> Searched:
    """Search all heads at all sites on discovery; a `floor` of s is raised to what the control question shows."""
    heads = bench.engine.heads
    family = roles.family_size(len(heads), len(sites))
    searched, notes = _searchable(bench, half, sites)
    chunks = {site: bench.chunks(half.examples.tolist(), site) for site in searched}
    means = {site: with_means(chunks[site]) for site in searched}
    if floor is not None:
        s = max(floor, *(null_share(chunks[site], half.examples, half.G) for site in searched))
    found = [gather(chunks[site], half, heads, site=site, s=s, family=family, seed=seed) for site in searched]
    if len(found) > 1:  # the largest T of a flip is that of all sites
        together = roles.run_tests_together([site.evidence for site in found], s=s, family=family, seed=seed)
        for site, tests in zip(found, together, strict=True):
            site.tests = tests
    q, release_q = roles.adjust([site.tests for site in found], n_sites=len(sites))
    named = [
        row
        for i, site in enumerate(found)
        for row in roles.classify(site.evidence, site.tests, q[i], release_q[i], s=s, site=site.site)
    ]
    by_site = {site.site: site for site in found}
    return Searched(by_site, named, dict(zip(searched, release_q, strict=True)), s, means, len(sites), notes)


def _searchable(bench: Bench, half: Half, sites: Sequence[str]) -> tuple[list[str], list[str]]:
    """Find the sinks where they were asked for; the sites that exist, and a sentence on one that does not."""
    if "sinks" not in sites:
        return list(sites), []
    bench.find_sinks(half.examples.tolist())
    if any(positions for _, positions in bench.sinks):
        return list(sites), []
    why = (
        "the site 'sinks' was not searched: no media position gets 10 times the mean value-weighted attention from the "
        "suffix in discovery's conflicts"
    )
    found = [site for site in sites if site != "sinks"]
    if not found:
        raise ProtocolError(f"{why}, and no other site was asked for. Search the suffix.")
    return found, [f"{why}."]


def with_means(chunks: list[Chunk]) -> Means | None:
    """Collect discovery's means and hand them to its chunks; media positions have none."""
    means = None if chunks[0].site in MEDIA_SITES else Means.over(chunks)
    for chunk in chunks:
        chunk.means = means
    return means


def chunks_of(bench: Bench, searched: Searched, half: Half, site: str) -> list[Chunk]:
    """Stack confirmation's conflicts with discovery's means."""
    assert half.name == CONFIRMATION
    chunks = bench.chunks(half.examples.tolist(), site)
    for chunk in chunks:
        chunk.means = searched.means[site]
    return chunks
