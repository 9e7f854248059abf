"""The search on discovery: every head's effects at every site, their tests, and who is named.

One `SiteEvidence` per site set; q runs over all of them together. `Searched` also keeps what confirmation needs from
discovery alone: the means, the donors, the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.errors import ProtocolError
from av_lens.isolation.measuring.bench import Bench, Chunk, Means
from av_lens.isolation.measuring.effects import Effect, Progress, Request, measure_requests, requests
from av_lens.isolation.measuring.estimands import estimands
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.logit_writes import direct_writes
from av_lens.isolation.measuring.seam import MEDIA_SITES, Head
from av_lens.isolation.naming.role_tests import (
    Evidence,
    Named,
    Tests,
    adjust,
    family_size,
    head_means,
    run_tests,
    run_tests_together,
)
from av_lens.isolation.naming.roles import LEVEL, classify
from av_lens.isolation.naming.threshold import null_share
from av_lens.results.halves import CONFIRMATION, DISCOVERY
from av_lens.results.tables import RELEASING

PerHead = Float[np.ndarray, "example layer head"]


@dataclass(eq=False)
class SiteEvidence:
    """One half's effects at one site set."""

    site: str
    chunks: list[Chunk]
    effects: Mapping[Request, Effect]
    evidence: Evidence
    tests: Tests
    dla: PerHead

    def named_arrays(self) -> Iterator[tuple[str, str, PerHead]]:
        """List every estimand with its donor and its effects.

        Yields:
            (estimand, donor, `[example, layer, head]`).
        """
        yield from estimands(self.effects)
        yield "dla", "", self.dla

    def figure(self, estimand: str, donor: str) -> PerHead:
        """Find one estimand's effects.

        Args:
            estimand: such as "repair"; see `estimands`.
            donor: its donor.

        Returns:
            `[example, layer, head]`, NaN where it was not measured.
        """
        for name, by, values in self.named_arrays():
            if (name, by) == (estimand, donor):
                return values
        return np.full_like(self.dla, np.nan)

    def arrays(self) -> dict[str, np.ndarray]:
        """Give every effect that was measured, for the record.

        Returns:
            "site/estimand/donor" -> `[example, layer, head]`.
        """
        return {
            f"{self.site}/{estimand}/{donor}": values
            for estimand, donor, values in self.named_arrays()
            if (~np.isnan(values)).any()
        }

    def rows(self, half: str) -> list[dict[str, Any]]:
        """Write the rows of the evidence table.

        Args:
            half: the half's name.

        Returns:
            One row per estimand, donor and measured head, with intervals in logits and as a share of G.
        """
        out: list[dict[str, Any]] = []
        boot, g = self.evidence.boot, self.evidence.G[:, None, None]
        for estimand, donor, values in self.named_arrays():
            known = ~np.isnan(values)
            heads = np.argwhere(known.any(0))
            if not len(heads):
                continue
            picked = values[:, heads[:, 0], heads[:, 1]]
            mean, share = boot.mean(picked), boot.ratio(picked, np.broadcast_to(g[:, :, 0], picked.shape))
            counts = known.sum(0)[heads[:, 0], heads[:, 1]]
            for i, (layer, head) in enumerate(heads.tolist()):
                out.append(
                    {
                        "half": half,
                        "site": self.site,
                        "layer": layer,
                        "head": head,
                        "estimand": estimand,
                        "donor": donor,
                        "mean": float(mean.value[i]),
                        "low": float(mean.low[i]),
                        "high": float(mean.high[i]),
                        "share": float(share.value[i]),
                        "share_low": float(share.low[i]),
                        "share_high": float(share.high[i]),
                        "n": int(counts[i]),
                    }
                )
        return out


@dataclass(eq=False)
class BySite:
    """One half's evidence at every site set, by name; `Searched` and `confirmation.Held` are two of these."""

    sites: dict[str, SiteEvidence]

    def arrays(self) -> dict[str, np.ndarray]:
        """Give every effect of every site."""
        return {key: values for site in self.sites.values() for key, values in site.arrays().items()}

    def rows(self, half: str) -> list[dict[str, Any]]:
        """Write the evidence table's rows.

        Args:
            half: the half's name.

        Returns:
            The rows of all sites.
        """
        return [row for site in self.sites.values() for row in site.rows(half)]


@dataclass(eq=False)
class Searched(BySite):
    """What discovery found.

    Attributes:
        named: a row for each (head, site, role).
        release_q: by site and donor.
        s: the threshold, a share of G.
        means: by site.
        n_sites: how many sites were asked for: the family counts them all.
        notes: which sites could not be searched, and why.
    """

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
        return sorted(rows, key=lambda row: (-self.release_of(row), row.layer, row.head))

    def passes(self, row: Named, donor: str) -> bool:
        """Say whether a head's release with some donor passes on discovery: mean > delta and q < .05.

        Args:
            row: the head and its site.
            donor: the donor.

        Returns:
            True if it does.
        """
        found = self.sites[row.site].evidence
        mean = head_means(found.release[donor])[row.layer, row.head]
        return bool(mean > self.s * found.G.mean() and self.release_q[row.site][donor][row.layer, row.head] < LEVEL)

    def release_of(self, row: Named) -> float:
        """Give a row's mean release on discovery.

        Args:
            row: a named suppressor.

        Returns:
            The mean over conflicts.
        """
        return float(np.nanmean(self.sites[row.site].evidence.release[row.donor][:, row.layer, row.head]))


def gather(
    chunks: list[Chunk],
    half: Half,
    wanted: Sequence[Request],
    heads: Sequence[Head],
    *,
    site: str,
    s: float,
    family: int,
    seed: int,
    progress: Progress | None,
) -> SiteEvidence:
    """Measure, name and test the effects of some heads at one site on one half.

    Args:
        chunks: the half's conflicts, stacked.
        half: the half.
        wanted: the requests.
        heads: the heads.
        site: the site set.
        s: the threshold, a share of G.
        family: the size of the whole family of tests.
        seed: of the flips.
        progress: called as `progress(stage, done, total)`.

    Returns:
        The evidence.
    """
    stage = f"exact effects of {len(heads)} heads at {site}, {half.name}"
    effects = measure_requests(chunks, wanted, heads=heads, examples=half.examples, progress=progress, stage=stage)
    found = Evidence.of(effects, G=half.G, C=half.C, components=half.components, boot=half.boot)
    tests = run_tests(found, s=s, family=family, seed=seed)
    engine = chunks[0].bench.engine
    dla = direct_writes(chunks, half.examples, engine.n_layers, engine.n_heads)
    return SiteEvidence(site, chunks, effects, found, tests, dla)


def search(
    bench: Bench,
    halves: Sequence[Half],
    *,
    s: float,
    floor: float | None,
    sites: Sequence[str],
    seed: int,
    progress: Progress | None,
) -> Searched:
    """Search all heads at all sites on discovery.

    Args:
        bench: the conflicts.
        halves: discovery and confirmation.
        s: the threshold, a share of G.
        floor: where the threshold is to be measured (`threshold.null_share`), the least that it can be; else None.
        sites: the site sets.
        seed: of the flips.
        progress: called as `progress(stage, done, total)`.

    Returns:
        What was found.

    Raises:
        ProtocolError: only the sinks were asked for, and there are none.
    """
    half = next(one for one in halves if one.name == DISCOVERY)
    engine = bench.engine
    heads = [(layer, head) for layer in range(engine.n_layers) for head in range(engine.n_heads)]
    family = family_size(len(heads), len(sites))
    searched, notes = _searchable(bench, half, sites)
    chunks = {site: bench.chunks(half.examples.tolist(), site) for site in searched}
    means = {site: _with_means(chunks[site]) for site in searched}
    if floor is not None:
        nulls = [null_share(chunks[site], half.examples, half.G, progress=progress) for site in searched]
        s = max(floor, *nulls)
    found: list[SiteEvidence] = []
    for site in searched:
        wanted = requests(
            with_means=means[site] is not None,
            with_third=any(bench.has_third(int(i)) for i in half.examples),
            with_audio_only=site not in MEDIA_SITES,
        )
        found.append(
            gather(chunks[site], half, wanted, heads, site=site, s=s, family=family, seed=seed, progress=progress)
        )
    if len(found) > 1:  # the largest T of a flip is that of all sites
        together = run_tests_together([site.evidence for site in found], s=s, family=family, seed=seed)
        for site, tests in zip(found, together, strict=True):
            site.tests = tests
    q, release_q = adjust([site.tests for site in found], n_sites=len(sites))
    named = [
        row
        for i, site in enumerate(found)
        for row in classify(site.evidence, site.tests, q[i], release_q[i], s=s, site=site.site)
    ]
    return Searched(
        sites={site.site: site for site in found},
        named=named,
        release_q=dict(zip(searched, release_q, strict=True)),
        s=s,
        means=means,
        n_sites=len(sites),
        notes=notes,
    )


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


def _with_means(chunks: list[Chunk]) -> Means | None:
    """Collect discovery's means and hand them to its chunks; media positions have none."""
    means = None if chunks[0].site in MEDIA_SITES else Means.over(chunks)
    for chunk in chunks:
        chunk.means = means
    return means


def chunks_of(bench: Bench, searched: Searched, half: Half, site: str) -> list[Chunk]:
    """Stack confirmation's conflicts with discovery's means.

    Args:
        bench: the conflicts.
        searched: what discovery found.
        half: confirmation.
        site: the site set.

    Returns:
        The chunks.
    """
    assert half.name == CONFIRMATION
    chunks = bench.chunks(half.examples.tolist(), site)
    for chunk in chunks:
        chunk.means = searched.means[site]
    return chunks
