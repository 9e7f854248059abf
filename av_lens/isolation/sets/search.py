"""Which nodes belong together? Protocol section 6, on discovery, once for each primary donor.

First edition: above 64 heads all are measured, and the candidates are the 40 of best rank on release, sufficiency or
attention of the generation position to the video (mean over `va`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.core.readings import attention_mass
from av_lens.isolation.measuring.behaviour import LEAST_GAP
from av_lens.isolation.measuring.bench import Chunk, Progress, averaged
from av_lens.isolation.measuring.engine import MLP, PRIMARY_DONORS, Node
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming.evidence import SiteEvidence
from av_lens.isolation.naming.roles import ALL_NODES, head_means
from av_lens.isolation.naming.screen import best_ranked
from av_lens.isolation.sets.sets import BuiltSet, Members, SetReleases, Tick, head_names

SCREENED = 40
SYNERGIES, SHOWN_SYNERGIES = 5, 20
MOST_MEMBERS, PATIENCE = 12, 3
EXPLAINED = 0.5
"""Of the gap: where the chosen set releases less, a quick search looks at pairs after all."""


def n_candidates(heads: int) -> int:
    """Say of how many heads the search for sets tries all pairs."""
    return heads if heads <= ALL_NODES else SCREENED


@dataclass(frozen=True)
class Step:
    """One step of the search: action is "start", "add", "drop" or "take out"; `release` is the set's after it."""

    action: str
    head: Node
    release: float
    gain: float


@dataclass(frozen=True)
class Path:
    """A start, the steps from it, and the set that it leads to, in the order in which its members were taken in."""

    start: str
    members: Members
    release: float
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Synergy:
    """A pair's release and what of it neither head has alone."""

    pair: tuple[Node, Node]
    release: float
    synergy: float


@dataclass(eq=False)
class SearchedSets:
    """A set per primary donor (one `chosen`), paths, synergies; `in_turn`: the loss without each member, by donor."""

    sets: list[BuiltSet] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    synergies: list[dict[str, Any]] = field(default_factory=list)
    releases: dict[str, SetReleases] = field(default_factory=dict)
    screens: dict[Node, str] = field(default_factory=dict)
    pairs: bool = True
    in_turn: dict[Node, dict[str, float]] = field(default_factory=dict)

    @property
    def chosen(self) -> BuiltSet | None:
        """The donors' set of largest release, if any donor has one."""
        return next((one for one in self.sets if one.chosen), None)


def climb(
    releases: SetReleases, candidates: Sequence[Node], start: Members, *, delta: float
) -> tuple[Members, list[Step]]:
    """Add the head of largest gain until three gains in a row are below delta, or twelve heads are in."""
    members, release = list(start), releases.mean(start)
    steps = [Step("start", head, release, release) for head in start]
    small, kept, kept_release = 0, len(start), release
    while len(members) < MOST_MEMBERS and small < PATIENCE:
        rest = sorted(head for head in candidates if head not in members)
        if not rest:
            break
        values = releases.added(members, rest)
        best = int(np.nanargmax(values))
        gain, release = values[best] - release, values[best]
        members.append(rest[best])
        steps.append(Step("add", rest[best], release, gain))
        small = small + 1 if gain < delta else 0
        if not small:
            kept, kept_release = len(members), release
    if small == PATIENCE:
        steps += [Step("drop", head, kept_release, float("nan")) for head in reversed(members[kept:])]
        members = members[:kept]
    return tuple(members), steps


def thin(releases: SetReleases, members: Members, *, delta: float) -> tuple[Members, list[Step]]:
    """Take out the head that costs least, while that is less than delta."""
    steps: list[Step] = []
    while members:
        release = releases.mean(members)
        smaller = [tuple(other for other in members if other != head) for head in members]
        releases.measure(smaller)
        costs = [release - releases.mean(one) for one in smaller]
        least = min(range(len(members)), key=lambda i: (costs[i], -members[i][0], -members[i][1]))
        if not costs[least] < delta:
            break
        steps.append(Step("take out", members[least], release - costs[least], -costs[least]))
        members = smaller[least]
    return members, steps


def search(
    releases: SetReleases, candidates: Sequence[Node], synergies: Sequence[Synergy], *, delta: float
) -> tuple[Path, list[Path]]:
    """Climb and thin from the best head and from the best synergies; the set of largest release wins."""
    ordered = sorted(candidates)
    best = ordered[int(np.nanargmax(releases.added((), ordered)))]
    starts = [(f"best head {head_names([best])}", (best,))]
    starts += [(f"synergy {head_names(one.pair)}", one.pair) for one in synergies[:SYNERGIES]]
    paths: list[Path] = []
    for name, start in starts:
        climbed, up = climb(releases, ordered, start, delta=delta)
        members, down = thin(releases, climbed, delta=delta)
        paths.append(Path(name, members, releases.mean(members), (*up, *down)))
    return min(paths, key=lambda path: (-path.release, sorted(path.members))), paths


def pair_synergies(releases: SetReleases, candidates: Sequence[Node]) -> list[Synergy]:
    """Compute the synergy of every pair of candidates."""
    ordered = sorted(candidates)
    alone = {head: max(0.0, releases.mean((head,))) for head in ordered}
    found: list[Synergy] = []
    for pair in combinations(ordered, 2):
        release = releases.mean(pair)
        found.append(Synergy(pair, release, release - alone[pair[0]] - alone[pair[1]]))
    return sorted(found, key=lambda pair: (-pair.synergy, pair.pair))


def screened(
    screens: dict[str, Float[np.ndarray, "layer node"]], heads: Sequence[Node], *, most: int = ALL_NODES
) -> dict[Node, str]:
    """Choose those of best rank on any screen; all, where they are not too many."""
    if len(heads) <= most:
        return dict.fromkeys(heads, "all heads and MLPs" if any(head == MLP for _, head in heads) else "all heads")
    return dict(sorted(list(best_ranked(screens, heads).items())[:SCREENED]))


def search_sets(site: SiteEvidence, half: Half, *, s: float, quick: bool = False) -> SearchedSets:
    """Search sets on discovery, once per primary donor; `quick` leaves out pairs unless a gap stays unexplained."""
    out = _built(site, half, s=s, pairs=not quick)
    release = 0.0 if out.chosen is None else out.chosen.discovery_release
    established = half.words is not None and float(half.boot.mean(half.G - half.C - LEAST_GAP * half.G).low) > 0
    if quick and established and release < EXPLAINED * half.gap:
        out = _built(site, half, s=s, pairs=True, known=out.releases)
    if out.chosen is not None and half.words is not None:
        out.in_turn = _in_turn(out.chosen.members, out.releases)
    for chunk in site.chunks:
        chunk.drop_traces("va", "av")
    return out


def _in_turn(members: Members, by_donor: Mapping[str, SetReleases]) -> dict[Node, dict[str, float]]:
    out: dict[Node, dict[str, float]] = {head: {} for head in members}
    smaller = {head: tuple(other for other in members if other != head) for head in members}
    for donor, releases in by_donor.items():
        releases.measure([members, *smaller.values()])
        for head, others in smaller.items():
            out[head][donor] = releases.mean(members) - releases.mean(others)
    return out


def _built(
    site: SiteEvidence, half: Half, *, s: float, pairs: bool, known: Mapping[str, SetReleases] | None = None
) -> SearchedSets:
    """Build a set per donor, from the best synergies of pairs too or from the best head alone."""
    found, delta, g = site.evidence, half.delta(s), float(half.G.mean())
    screens = _screens(site)
    out = SearchedSets(screens=site.screens or screened(screens, found.nodes), pairs=pairs)
    candidates, progress = sorted(out.screens), site.chunks[0].bench.progress
    paired = sorted(screened(screens, candidates, most=SCREENED)) if site.screens else candidates
    for donor, release in found.by_donor("release").items():
        if np.isnan(release).all():
            continue
        stage = f"sets of heads by {donor}"
        expected = (len(paired) * (len(paired) - 1) if pairs else len(candidates)) * len(site.chunks)
        releases = (known or {}).get(donor) or SetReleases(site.chunks, half.examples, donor)
        releases.tick = _ticker(progress, stage, expected)
        releases.learn({head: release[:, head[0], head[1]] for head in candidates})
        synergies: list[Synergy] = []
        if pairs:
            releases.pairs(paired)
            synergies = pair_synergies(releases, paired)
        winner, paths = search(releases, candidates, synergies, delta=delta)
        progress(stage, 1, 1)
        out.releases[donor] = releases
        if winner.members:
            out.sets.append(BuiltSet(winner.members, donor, winner.release, screen=winner.start))
        of = {"site": site.site, "donor": donor}
        out.steps += [
            of | vars(step) | {"start": path.start, "step": number, "layer": step.head[0], "head": step.head[1]}
            for path in paths
            for number, step in enumerate(path.steps)
        ]
        out.synergies += [
            of
            | dict(zip(("layer", "head", "layer2", "head2"), chain(*one.pair), strict=True))
            | {"release": one.release, "synergy": one.synergy, "share": one.synergy / g}
            for one in synergies[:SHOWN_SYNERGIES]
        ]
    if out.sets:
        min(out.sets, key=lambda one: (-one.discovery_release, PRIMARY_DONORS.index(one.donor))).chosen = True
    return out


def _screens(site: SiteEvidence) -> dict[str, Float[np.ndarray, "layer node"]]:
    largest = site.evidence.largest_release
    screens = {"release": largest, "sufficiency": head_means(site.evidence["sufficiency"])}
    if largest.size > ALL_NODES and not site.screens:
        screens["attention to the video"] = averaged(site.chunks, "attention to the video", video_attention)
    return screens


def video_attention(chunk: Chunk) -> Float[np.ndarray, "layer node"]:
    """Average the generation position's attention to the video (mirrored: the sound) in `va`; MLPs have none."""
    inputs = chunk.run("va").inputs
    seen = "audio" if chunk.bench.engine.suppressed == "picture" else "video|image"
    asked, video = ([int(i) for i in inputs.spans[role].positions] for role in ("generation", seen))
    mass = attention_mass(chunk.bench.engine.model, inputs, {"generation": asked}, keys={"video": video})
    by_head = mass[..., 0, 0].double().numpy().mean(0)
    return np.pad(by_head, ((0, 0), (0, chunk.bench.mlps)), constant_values=np.nan)


def _ticker(progress: Progress, stage: str, expected: int) -> Tick:
    """Count measured sets; how many a climb needs is not known before, so the total stays open at the end."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        progress(stage, done, max(expected, done + 1))

    return tick
