"""The search on discovery: every node's effects at every site, their tests, and who is named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from av_lens.errors import ProtocolError
from av_lens.isolation.measuring.bench import Bench, Chunk
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.measuring.effects import (
    DLA,
    OF_ALL,
    Effect,
    PerNode,
    Request,
    direct_writes,
    figures,
    measure_requests,
    requests,
)
from av_lens.isolation.measuring.engine import MEDIA_SITES, MLP, PRIMARY_DONORS, Node
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming import roles, screen
from av_lens.isolation.naming.roles import CARRIERS, HELD, LEVEL, Evidence, Named, Tests, head_means
from av_lens.results.dealing import CONFIRMATION
from av_lens.results.record import RELEASING

PERCENTILE = 99
"""Of the null of other models: s is what the same edits reach under a question about neither sound nor picture."""


@dataclass(eq=False)
class SiteEvidence:
    """One half's effects at one site set; `screens` are the guesses that chose its nodes, best first, if any did."""

    site: str
    chunks: list[Chunk]
    evidence: Evidence
    tests: Tests
    screens: dict[Node, str] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Give every effect that was measured, for the record."""
        figures = self.evidence.figures.items()
        return {"/".join((self.site, *key)): values for key, values in figures if not np.isnan(values).all()}

    def rows(self, half: str) -> list[dict[str, Any]]:
        """Write the rows of the evidence table."""
        out: list[dict[str, Any]] = []
        for (estimand, donor), values in self.evidence.figures.items():
            nodes = [node for node in self.evidence.nodes if not np.isnan(values[:, *node]).all()]
            bounds = self.evidence.half.rows(values[:, *np.array(nodes).T], donor) if nodes else []
            of = {"half": half, "site": self.site, "estimand": estimand, "donor": donor}
            where = ({"layer": layer, "head": head} for layer, head in nodes)
            out += [of | at | found for at, found in zip(where, bounds, strict=True)]
        return out


@dataclass(eq=False)
class Searched:
    """What discovery found, and what confirmation needs from it alone: rows, means by site, s, size of the family."""

    sites: dict[str, SiteEvidence]
    named: list[Named]
    release_q: dict[str, dict[str, np.ndarray]]
    s: float
    means: dict[str, Means | None]
    family: int
    mlps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> SiteEvidence:
        """The evidence at the first site set that was asked for: the one on which the set is built."""
        return next(iter(self.sites.values()))

    @property
    def suppressors(self) -> list[Named]:
        """The rows of writers, opponents, gates and nodes of undetermined kind, largest release first."""
        rows = [row for row in self.named if row.role in RELEASING]
        return sorted(rows, key=lambda row: (-self.release_of(row), *row.at))

    def passes(self, row: Named, donor: str) -> bool:
        """Say whether a node's release with some donor passes on discovery: mean > delta and q < .05."""
        found = self.sites[row.site].evidence
        mean = head_means(found["release", donor])[row.at]
        return bool(mean > found.half.delta(self.s) and self.release_q[row.site][donor][row.at] < LEVEL)

    def role_alone(self, at: Node, site: str) -> str:
        """Name what a head does by its own release at a site, else what it carries there; "none" for nothing."""
        roles = [row.role for row in self.named if (row.at, row.site) == (at, site)]
        return ", ".join([role for role in roles if role not in CARRIERS] or roles) or "none"

    def release_of(self, row: Named) -> float:
        """Give a row's mean release on discovery."""
        return float(np.nanmean(self.sites[row.site].evidence["release", row.donor][:, row.layer, row.head]))


def gather(
    chunks: list[Chunk], half: Half, heads: Sequence[Node], *, site: str, s: float, family: int, seed: int
) -> SiteEvidence:
    """Measure and test the effects of some nodes at one site on one half; on confirmation all of each."""
    stage = f"exact effects of {len(heads)} nodes at {site}, {half.name}"
    bench = chunks[0].bench
    floor = None if half.name == CONFIRMATION or not bench.mlps else s
    effects = measured(chunks, half, heads, requests(chunks), floor=floor, stage=stage)
    written = {DLA: direct_writes(chunks, half.examples)}
    found = Evidence(figures(effects) | written, half, bench.mlps, chunks[0].encoding)
    return SiteEvidence(site, chunks, found, roles.run_tests(found, s=s, family=family, seed=seed))


def measured(
    chunks: Sequence[Chunk],
    half: Half,
    nodes: Sequence[Node],
    wanted: Sequence[Request],
    *,
    floor: float | None,
    stage: str,
) -> dict[Request, Effect]:
    """Run `OF_ALL` for all nodes, and the rest where a release may reach a share of G (None: for all nodes)."""
    first = [one for one in wanted if floor is None or one in OF_ALL]
    effects = measure_requests(chunks, first, heads=nodes, examples=half.examples, stage=stage)
    return effects if floor is None else completed(effects, chunks, half, nodes, wanted, s=floor)


def completed(
    effects: dict[Request, Effect],
    chunks: Sequence[Chunk],
    half: Half,
    nodes: Sequence[Node],
    wanted: Sequence[Request],
    *,
    s: float,
) -> dict[Request, Effect]:
    """Add what was not run for all nodes, for those of which some release's upper bound is not below delta."""
    at = tuple(np.array(nodes).T)
    large = np.full(len(nodes), chunks[0].bench.engine.everything)
    for donor in PRIMARY_DONORS:
        if (request := Request("va", donor)) in effects:
            release = effects[request].margin[:, *at]
            large |= ~(np.isnan(release).all(0) | (half.boot.mean(release).high < half.delta(s)))
    some = [node for node, one in zip(nodes, large, strict=True) if one]
    rest = [one for one in wanted if one not in OF_ALL] if some else []
    stage = f"what the effects of {len(some)} nodes at {chunks[0].site} are made of, {half.name}"
    return measure_requests(chunks, rest, heads=some, examples=half.examples, stage=stage, into=effects)


def gather_screened(
    chunks: list[Chunk], half: Half, *, site: str, s: float, family: int, seed: int
) -> tuple[SiteEvidence, str]:
    """Choose nodes by a screen, measure them in looks, and say how many stopped early."""
    bench, stopped, told = chunks[0].bench, list[Node](), list[str]()
    screens = screen.screen(screen.guesses(chunks, half.examples), bench.nodes)
    ids = [str(bench.conflicts[int(i)].id) for i in half.examples]
    parts = screen.looks_of(half.examples, ids, seed)
    found, effects = Evidence({}, half, bench.mlps, chunks[0].encoding), dict[Request, Effect]()
    wanted = requests(chunks)
    first = [one for one in wanted if one in OF_ALL]
    for number, part in enumerate(parts):
        heads = sorted(set(screens) - set(stopped))
        some = [one for chunk in chunks for one in chunk.taken(part)]
        if not some or not heads:
            continue
        stage = f"exact effects of {len(heads)} nodes at {site}, {half.name}, look {number + 1}"
        measure_requests(some, first, heads=heads, examples=half.examples, stage=stage, into=effects)
        found = replace(found, figures=figures(effects))
        if number < len(screen.LOOKS):
            more = screen.futile(found, heads, s=s)
            stopped += more
            told.append(f"{len(more)} at {screen.LOOKS[number]:.0%}")
    going_on = sorted(set(screens) - set(stopped))
    effects = completed(effects, chunks, half, going_on, wanted, s=s) if going_on else effects
    written = {DLA: direct_writes(chunks, half.examples)}
    found = replace(found, figures=figures(effects) | written, stopped=tuple(sorted(stopped)))
    tests = roles.run_tests(found, s=s, family=family, seed=seed)
    note = (
        f"Of {len(bench.nodes)} nodes a screen by gradients chose {len(screens)} at {site}; the others were not "
        f"measured and count as p = 1. Stopped early, as futile: {' of discovery, '.join(told)} of discovery; a node "
        f"that is found four times in five stops with a probability below {screen.power_lost(family):.1g}, which is "
        "the power lost."
    )
    return SiteEvidence(site, chunks, found, tests, screens), note


def hold(
    chunks: Sequence[Chunk], found: Evidence, layers: tuple[int, ...], heads: Mapping[str, Sequence[Node]]
) -> Evidence:
    """Measure some heads' releases by each donor with these layers' MLPs held, where they come after the head."""
    added: dict[tuple[str, str], PerNode] = {}
    for donor, some in heads.items():
        before = [head for head in some if head[1] != MLP and head[0] <= max(layers, default=-1)]
        if before:
            request = Request("va", donor, mlps=layers)
            stage = f"{len(before)} heads with MLPs held, {donor}"
            made = measure_requests(chunks, [request], heads=before, examples=found.half.examples, stage=stage)
            added[HELD, donor] = made[request].first
    return replace(found, figures={**found.figures, **added})


def null_share(
    chunks: Sequence[Chunk],
    examples: Int[np.ndarray, " example"],
    hearing: Float[np.ndarray, " example"],
    nodes: Sequence[Node] = (),
) -> float:
    """Measure how much the releases of most nodes reach under `control`, as a share of G; of a part of them a bound."""
    wanted = [Request("va", donor, question="control") for donor in PRIMARY_DONORS if chunks[0].has(donor)]
    stage = f"the same edits under the control question, {chunks[0].site}"
    every = chunks[0].bench.nodes
    found = measure_requests(chunks, wanted, heads=nodes or every, examples=examples, stage=stage)
    largest = np.fmax.reduce([head_means(found[request].margin) for request in wanted])
    if len(nodes or every) == len(every):
        return float(np.percentile(largest, PERCENTILE) / hearing.mean())
    return screen.upper_bound(largest[~np.isnan(largest)], PERCENTILE) / float(hearing.mean())


def search(
    bench: Bench, half: Half, *, s: float, floor: float | None, sites: Sequence[str], seed: int, family: int
) -> Searched:
    """Search all nodes at all sites on discovery; a `floor` of s is raised to what the control question shows."""
    searched, notes = _searchable(bench, half, sites)
    chunks = {site: bench.chunks(half.examples.tolist(), site) for site in searched}
    means = {site: with_means(chunks[site]) for site in searched}
    few = not bench.mlps or len(bench.nodes) <= roles.ALL_NODES
    if floor is not None:
        drawn = () if few else screen.drawn_nodes(bench.nodes, seed)
        s = max(floor, *(null_share(chunks[site], half.examples, half.G, drawn) for site in searched))
    options: dict[str, Any] = {"s": s, "family": family, "seed": seed}
    if few:
        found = [gather(chunks[site], half, bench.nodes, site=site, **options) for site in searched]
    else:
        both = [gather_screened(chunks[site], half, site=site, **options) for site in searched]
        found, notes = [one for one, _ in both], [*notes, *(note for _, note in both)]
    if len(found) > 1:  # the largest T of a flip is that of all sites
        together = roles.run_tests_together([site.evidence for site in found], s=s, family=family, seed=seed)
        for site, tests in zip(found, together, strict=True):
            site.tests = tests
    named, release_q = _named(found, {}, s=s, family=family)
    feeding = [site for site in found if not site.evidence.encoding]
    mlps = {site.site: tuple(row.layer for row in named if row.site == site.site and of_mlp(row)) for site in feeding}
    if any(mlps.values()):
        for site in feeding:
            p = site.tests.release_p
            likely = {by: [at for at in bench.nodes if p[by][at] <= LEVEL] for by in PRIMARY_DONORS}
            site.evidence = hold(site.chunks, site.evidence, mlps[site.site], likely)
        again = roles.run_tests_together([site.evidence for site in found], s=s, family=family, seed=seed)
        for site, tests in zip(found, again, strict=True):
            site.tests = roles.with_feeders(site.tests, tests)
        named, release_q = _named(found, mlps, s=s, family=family)
        named = [_through(next(site for site in found if site.site == row.site), mlps, row) for row in named]
    by_site = {site.site: site for site in found}
    return Searched(by_site, named, dict(zip(searched, release_q, strict=True)), s, means, family, mlps, notes)


def of_mlp(row: Named) -> bool:
    """Whether a row names an MLP as a suppressor."""
    return row.head == MLP and row.role in RELEASING


def _named(
    found: Sequence[SiteEvidence], mlps: Mapping[str, tuple[int, ...]], *, s: float, family: int
) -> tuple[list[Named], list[dict[str, np.ndarray]]]:
    q, release_q = roles.adjust([site.tests for site in found], family=family)
    rows = (
        roles.classify(one.evidence, one.tests, q[i], release_q[i], s=s, site=one.site, mlps=mlps.get(one.site, ()))
        for i, one in enumerate(found)
    )
    return [row for some in rows for row in some], release_q


def _through(found: SiteEvidence, mlps: Mapping[str, tuple[int, ...]], row: Named) -> Named:
    """Of several named MLPs after a head, find the one of which the holding alone costs most."""
    later = [layer for layer in mlps.get(row.site, ()) if layer >= row.layer]
    if row.through < 0 or len(later) < 2:
        return row
    requests = [Request("va", row.donor, mlps=(layer,)) for layer in later]
    made = measure_requests(found.chunks, requests, heads=[row.at], examples=found.evidence.half.examples)
    left = [float(head_means(made[one].first)[row.at]) for one in requests]
    return replace(row, through=later[int(np.argmin(left))])


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
