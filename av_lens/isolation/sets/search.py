"""Which heads belong together? The search for sets of protocol section 6, on discovery.

Heads hide each other: where each of two pairs of heads suffices, no single release shows any of them. Once for each
primary donor:

1. *Candidates*: all heads where there are at most 64; else the 40 of best rank on any of three screens: the largest
   release, sufficiency, attention of the generation position to the video (mean over `va`).
2. *Pair synergy* = release({h, k}) - max(0, release h) - max(0, release k), for all pairs of candidates.
3. *Forward*, from the best head and from the five pairs of largest synergy: add the head of largest gain; stop after 3
   gains in a row below delta (and drop these), or at 12 heads.
4. *Backward*: take out the head that costs least (of equals the last) while that is less than delta, measuring again
   after each.
5. The set of largest release wins (ties by layer and head). Of the donors' sets the one of largest release is *chosen*.

delta = s G of discovery. Everything is a mean over discovery's conflicts. `quick=True` leaves the pairs out, and with
them the five starts.

Choices where the protocol is silent: small gains at the end of a climb that stopped at 12 heads are left to the
backward steps; a set whose last head releases less than delta is taken apart to nothing, and then that donor has no
set; a head's rank by release is that of its largest release over the donors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from av_lens.core.attention_mass import attention_mass
from av_lens.isolation.measuring.bench import Chunk, Progress, averaged
from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.recordings import Head
from av_lens.isolation.naming.evidence import SiteEvidence
from av_lens.isolation.naming.role_tests import head_means
from av_lens.isolation.sets.releases import Members, SetReleases, Tick
from av_lens.isolation.sets.sets import BuiltSet, head_names

ALL_HEADS, SCREENED = 64, 40
SYNERGIES, SHOWN_SYNERGIES = 5, 20
MOST_MEMBERS, PATIENCE = 12, 3


def n_candidates(heads: int) -> int:
    """Say how many heads the search for sets tries."""
    return heads if heads <= ALL_HEADS else SCREENED


@runtime_checkable
class Releases(Protocol):
    """What the search asks: the mean release of a set (0 for the empty one), and of a set with one more head."""

    def mean(self, members: Sequence[Head]) -> float:
        """The mean release of a set."""
        ...

    def added(self, members: Sequence[Head], heads: Sequence[Head]) -> list[float]:
        """The mean release of a set with one more head, for each of several."""
        ...

    def measure(self, sets: Sequence[Members]) -> None:
        """Get several sets ready together."""
        ...


@dataclass(frozen=True)
class Step:
    """One step of the search: action is "start", "add", "drop" or "take out"; `release` is the set's after it."""

    action: str
    head: Head
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

    pair: tuple[Head, Head]
    release: float
    synergy: float


@dataclass(eq=False)
class SearchedSets:
    """What the search found on discovery: a set per primary donor (`chosen` marks one), its paths and the synergies."""

    sets: list[BuiltSet] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    synergies: list[dict[str, Any]] = field(default_factory=list)
    releases: dict[str, SetReleases] = field(default_factory=dict)
    screens: dict[Head, str] = field(default_factory=dict)
    quick: bool = False

    @property
    def chosen(self) -> BuiltSet | None:
        """The donors' set of largest release, if any donor has one."""
        return next((one for one in self.sets if one.chosen), None)


def climb(
    releases: Releases, candidates: Sequence[Head], start: Members, *, delta: float
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


def thin(releases: Releases, members: Members, *, delta: float) -> tuple[Members, list[Step]]:
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
    releases: Releases, candidates: Sequence[Head], synergies: Sequence[Synergy], *, delta: float
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


def pair_synergies(releases: Releases, candidates: Sequence[Head]) -> list[Synergy]:
    """Compute the synergy of every pair of candidates."""
    ordered = sorted(candidates)
    alone = {head: max(0.0, releases.mean((head,))) for head in ordered}
    found: list[Synergy] = []
    for i, one in enumerate(ordered):
        for two in ordered[i + 1 :]:
            release = releases.mean((one, two))
            found.append(Synergy((one, two), release, release - alone[one] - alone[two]))
    return sorted(found, key=lambda pair: (-pair.synergy, pair.pair))


def screened(screens: dict[str, Float[np.ndarray, "layer head"]]) -> dict[Head, str]:
    """Choose the candidates."""
    shape = next(iter(screens.values())).shape
    heads = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
    if len(heads) <= ALL_HEADS:
        return dict.fromkeys(heads, "all heads")
    best: dict[Head, tuple[int, str]] = {}
    for name, figures in screens.items():
        order = sorted(heads, key=lambda head: (-np.nan_to_num(figures[head], nan=-np.inf), head))
        for rank, head in enumerate(order):
            if head not in best or rank < best[head][0]:
                best[head] = (rank, name)
    chosen = sorted(heads, key=lambda head: (best[head][0], head))[:SCREENED]
    return {head: f"{best[head][1]} (rank {best[head][0] + 1})" for head in sorted(chosen)}


def search_sets(site: SiteEvidence, half: Half, *, s: float, quick: bool = False) -> SearchedSets:
    """Search sets of heads on discovery, once per primary donor; `quick` leaves out all pairs."""
    found, delta, g = site.evidence, half.delta(s), float(half.G.mean())
    out = SearchedSets(screens=screened(_screens(site)), quick=quick)
    candidates, progress = sorted(out.screens), site.chunks[0].bench.progress
    for donor, release in found.by_donor("release").items():
        if np.isnan(release).all():
            continue
        stage = f"sets of heads by {donor}"
        expected = len(candidates) * (1 if quick else len(candidates) - 1) * len(site.chunks)
        releases = SetReleases(site.chunks, half.examples, donor, _ticker(progress, stage, expected))
        releases.learn({head: release[:, head[0], head[1]] for head in candidates})
        synergies: list[Synergy] = []
        if not quick:
            releases.pairs(candidates)
            synergies = pair_synergies(releases, candidates)
        winner, paths = search(releases, candidates, synergies, delta=delta)
        progress(stage, 1, 1)
        out.releases[donor] = releases
        if winner.members:
            out.sets.append(BuiltSet(winner.members, donor, winner.release, screen=winner.start))
        of = {"site": site.site, "donor": donor}
        out.steps += [of | row for path in paths for row in _step_rows(path)]
        out.synergies += [of | _synergy_row(one, g) for one in synergies[:SHOWN_SYNERGIES]]
    if out.sets:
        min(out.sets, key=lambda one: (-one.discovery_release, PRIMARY_DONORS.index(one.donor))).chosen = True
    for chunk in site.chunks:
        chunk.drop_traces("va", "av")
    return out


def _screens(site: SiteEvidence) -> dict[str, Float[np.ndarray, "layer head"]]:
    largest = site.evidence.largest_release
    screens = {"release": largest, "sufficiency": head_means(site.evidence["sufficiency"])}
    if largest.size > ALL_HEADS:
        screens["attention to the video"] = averaged(site.chunks, "attention to the video", video_attention)
    return screens


def video_attention(chunk: Chunk) -> Float[np.ndarray, "layer head"]:
    """Average the attention of the generation position to the video, in `va`."""
    inputs = chunk.run("va").inputs
    asked, video = ([int(i) for i in inputs.spans[role].positions] for role in ("generation", "video|image"))
    mass = attention_mass(chunk.bench.engine.model, inputs, {"generation": asked}, keys={"video": video})
    return mass[..., 0, 0].double().numpy().mean(0)


def _ticker(progress: Progress, stage: str, expected: int) -> Tick:
    """Count measured sets; how many a climb needs is not known before, so the total stays open at the end."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        progress(stage, done, max(expected, done + 1))

    return tick


def _step_rows(path: Path) -> list[dict[str, Any]]:
    return [
        {"start": path.start, "step": number, "action": step.action, "release": step.release, "gain": step.gain}
        | dict(zip(("layer", "head"), step.head, strict=True))
        for number, step in enumerate(path.steps)
    ]


def _synergy_row(one: Synergy, g: float) -> dict[str, Any]:
    heads = zip(("layer", "head", "layer2", "head2"), (*one.pair[0], *one.pair[1]), strict=True)
    return {**dict(heads), "release": one.release, "synergy": one.synergy, "share": one.synergy / g}
