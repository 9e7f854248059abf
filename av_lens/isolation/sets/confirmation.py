"""Does it hold on conflicts that played no part in finding it? Protocol sections 5, 7 and 8.

In the first edition a set is confirmed if it releases more than every random set. *Ranked heads*: how many heads of
largest single release, edited together, give half of the gap? If the curve is not monotone it is one of several.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from av_lens.isolation.measuring.bench import Bench, Chunk
from av_lens.isolation.measuring.effects import Request, measure_requests
from av_lens.isolation.measuring.engine import MLP, PRIMARY_DONORS, Node
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming.evidence import Searched, SiteEvidence, chunks_of, gather, hold
from av_lens.isolation.naming.roles import (
    CARRIERS,
    Named,
    confirm,
    head_means,
    run_tests,
)
from av_lens.isolation.sets.matching import RANDOM_SETS, random_sets
from av_lens.isolation.sets.members import ASKED_ALIKE, InContext, in_context, member_roles, member_rows
from av_lens.isolation.sets.search import SearchedSets, search_sets
from av_lens.isolation.sets.sets import BuiltSet, SetEffect, controls, cumulative, head_names, release_of_sets
from av_lens.results.dealing import CONFIRMATION, DISCOVERY
from av_lens.results.record import ENCODER, FEEDER, RELEASING
from av_lens.results.statistics import holm

Row = dict[str, Any]
NAMES = (*RELEASING, FEEDER, ENCODER, *CARRIERS)
LARGEST_P = 0.05
FEWEST_WORDS = 8
ON_WORDS, UNTESTED = "on these words", "untested over words"
CONFIRMED, ONE_DONOR, NOT_REPLICATED = "confirmed", "replicated, one donor alone", "not replicated"
BY_QUESTION = "replicated, by the question alone"
SECOND_DONOR, SAME_QUESTION = 0.5, 0.25
"""Shares of the largest release that another donor, and one that was asked the same question, must reach."""
STATUSES = (CONFIRMED, ONE_DONOR, BY_QUESTION, ON_WORDS, NOT_REPLICATED)


@dataclass(eq=False)
class Held:
    """What confirmation found, by site where discovery named something; `roles` are the chosen set's members'."""

    sites: dict[str, SiteEvidence]
    searched: SearchedSets = field(default_factory=SearchedSets)
    roles: list[Named] = field(default_factory=list)
    in_context: dict[str, InContext] = field(default_factory=dict)
    status: dict[Named, str] = field(default_factory=dict)
    words: dict[Named, str] = field(default_factory=dict)
    holm_p: dict[Named, float] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    named: frozenset[tuple[int, int, str]] = frozenset()

    @property
    def chosen(self) -> BuiltSet | None:
        """The set of largest release, if any was built."""
        return self.searched.chosen

    @property
    def confirmed(self) -> dict[Named, bool]:
        """Which rows are confirmed, whatever a refusal forbids to say."""
        return {row: status == CONFIRMED for row, status in self.status.items()}

    def role_in_set(self, at: Node, site: str) -> str:
        """Name what a head does in the chosen set, the other members edited; "" where it is no member."""
        return next((row.role for row in self.roles if (row.at, row.site) == (at, site)), "")

    @property
    def named_members(self) -> list[Named]:
        """The members that no single release named: their rows in the table of heads are those in context."""
        return [row for row in self.roles if (*row.at, row.site) not in self.named]


def confirm_all(
    bench: Bench, halves: tuple[Half, Half], searched: Searched, *, s: float, seed: int, quick: bool = False
) -> Held:
    """Search the sets on discovery, and measure on confirmation what discovery named."""
    first, half = halves
    where, family = searched.first.site, searched.family
    held = Held(sites={})
    held.searched = search_sets(searched.first, first, s=s, quick=quick)
    named = (row for row in searched.named if row.role in (*RELEASING, FEEDER, ENCODER, "breaks"))
    held.named = frozenset((*row.at, row.site) for row in named)
    chunks = {site: chunks_of(bench, searched, half, site) for site in searched.sites}
    built = held.chosen
    for site in searched.sites:
        heads = {row.at for row in searched.named if row.site == site}
        heads |= set(built.members) if built is not None and site == where else set()
        if heads:
            again = gather(chunks[site], half, sorted(heads), site=site, s=s, family=family, seed=seed + 1)
            if mlps := searched.mlps.get(site):
                here = (row for row in searched.named if row.site == site)
                released = {row.at for row in here if row.role in (*RELEASING, FEEDER)}
                by_donor: dict[str, list[Node]] = dict.fromkeys(PRIMARY_DONORS, sorted(released))
                again.evidence = hold(chunks[site], again.evidence, mlps, by_donor)
                again.tests = run_tests(again.evidence, s=s, family=family, seed=seed + 1)
            held.sites[site] = again
    if built is not None:
        for number, (one, stacks) in enumerate(((first, searched.first.chunks), (half, chunks[where]))):
            mlps = searched.mlps.get(where, ())
            held.in_context[one.name] = in_context(
                stacks, one, built, s=s, family=family, seed=seed + number, mlps=mlps
            )
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
        holds = [row for row, one in zip(rows, outcome, strict=True) if one]
        held.words |= {row: said for row in holds if (said := _over_words(of, row, s))}
        for row in rows:
            on_words = ON_WORDS if held.words.get(row) == ON_WORDS else CONFIRMED
            held.status[row] = (_weak(searched, held, row) or on_words) if row in holds else NOT_REPLICATED
    # A feeder is no more sure than the MLP that it feeds.
    sure = {(row.at, row.site) for row, status in held.status.items() if status == CONFIRMED and row.head == MLP}
    for row in [row for row in held.status if row.role == FEEDER and row.through >= 0]:
        if ((row.through, MLP), row.site) not in sure:
            held.status[row] = NOT_REPLICATED


def one_donor_alone(releases: Iterable[float]) -> bool:
    """Say whether a role rests on one donor alone, by a node's mean releases by the primary donors on discovery."""
    largest, second = sorted((one for one in (*releases, -np.inf, -np.inf) if not np.isnan(one)), reverse=True)[:2]
    return bool(second < SECOND_DONOR * largest)


def by_the_question_alone(releases: Mapping[str, float]) -> bool:
    """Say whether a release comes only where another question is put in, by means on discovery of all known donors."""
    known = {donor: value for donor, value in releases.items() if not np.isnan(value)}
    alike = [known[donor] for donor in ASKED_ALIKE if donor in known]
    return bool(alike) and max(alike) < SAME_QUESTION * max(known.values())


def _weak(searched: Searched, held: Held, row: Named) -> str:
    """Say what keeps a role that holds from being confirmed, by means on discovery (a member's: the others edited)."""
    if row.role not in (*RELEASING, FEEDER) or searched.first.evidence.half.words is None:
        return ""
    found = searched.sites[row.site].evidence
    primary = {donor: float(head_means(values)[row.at]) for donor, values in found.by_donor("release").items()}
    if row.site == searched.first.site and row.at in held.searched.in_turn:
        primary, found = held.searched.in_turn[row.at], held.in_context[DISCOVERY].evidence
    if one_donor_alone(primary.values()):
        return ONE_DONOR
    further = [donor for donor in ASKED_ALIKE if donor not in primary and ("release", donor) in found.figures]
    releases = {**primary, **{donor: float(head_means(found["release", donor])[row.at]) for donor in further}}
    return BY_QUESTION if row.role != FEEDER and by_the_question_alone(releases) else ""


def _over_words(found: SiteEvidence | InContext, row: Named, s: float) -> str:
    """Say what is to be said of a suppressor over words: its release - s G by the two answers' words as sources."""
    half = found.evidence.half
    if row.role not in (*RELEASING, FEEDER, ENCODER) or half.words is None:
        return ""
    if half.words.n_sources < FEWEST_WORDS:
        return UNTESTED
    release = found.evidence["release", row.donor][:, *row.at]
    return "" if float(half.words.mean(release - s * half.G).low) > 0 else ON_WORDS


def _confirm_sets(
    searched: Searched, held: Held, chunks: list[Chunk], halves: tuple[Half, Half], *, s: float, seed: int
) -> dict[str, list[dict[str, Any]]]:
    found, site, (first, half), chosen = held.searched, searched.first, halves, held.chosen
    ranked = ranked_curve(searched, chunks, half)
    sets, ablation = confirmed_sets(searched, held, chunks, halves, s=s, seed=seed)
    context = held.in_context.get(CONFIRMATION)
    members = member_rows(found, first, site.site, held.roles, context, held.confirmed)
    for row in (row for row in members if row.get("role")):
        row["role_alone"] = searched.role_alone((row["layer"], row["head"]), site.site)
    controlled = [] if chosen is None else controls(chunks, chosen.members, chosen.donor, half)
    tables = {"sets": sets, "members": members, "steps": found.steps, "synergies": found.synergies}
    return tables | {"ablation": ranked + ablation, "specificity": controlled}


def ranked_curve(searched: Searched, chunks: Sequence[Chunk], half: Half) -> list[Row]:
    """Edit the heads of largest release together: how many restore half of the gap? Rows of `ablation` by size."""
    heads, donor = ranked_heads(searched.first)
    goal = 0.5 * half.gap
    rows: dict[int, Row] = {}
    sizes = doubling(len(heads))
    while sizes:
        sets = [tuple(heads[:size]) for size in sizes]
        stage = "the largest releases together"
        effect = release_of_sets(chunks, sets, [donor] * len(sets), half.examples, stage)
        for index, (size, one) in enumerate(zip(sizes, sets, strict=True)):
            rows[size] = curve_row("ranked heads", one, donor, effect, index, -1, half)
        middle = between({size: row["release"] for size, row in rows.items()}, goal)
        sizes = [] if middle is None else [middle]
    return [rows[size] for size in sorted(rows)]


def ranked_heads(site: SiteEvidence) -> tuple[list[Node], str]:
    """Order the measured nodes by their largest single release on discovery, and choose the donor to edit them with."""
    best = site.evidence.largest_release
    order = np.argsort(-np.where(np.isnan(best), -np.inf, best).ravel(), kind="stable")
    release = site.evidence.by_donor("release")
    donor = max(release, key=lambda name: float(np.nansum(np.clip(head_means(release[name]), 0, None))))
    nodes, known = site.evidence.nodes, ~np.isnan(best.ravel())
    return [nodes[int(i)] for i in order if known[i]], donor


def between(measured: dict[int, float], goal: float) -> int | None:
    """Choose the next size to measure on the way to the size at which a curve crosses a goal; None when it is known."""
    enough = [size for size, release in measured.items() if release >= goal]
    if not enough or goal <= 0:
        return None
    first = min(enough)
    before = max([0, *(size for size in measured if size < first)])
    return (before + first) // 2 if first - before > 1 else None


def confirmed_sets(
    searched: Searched, held: Held, chunks: list[Chunk], halves: tuple[Half, Half], *, s: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Edit the sets on confirmation, the chosen one with its controls: rows of `sets` and of `ablation`."""
    site, half = searched.first, halves[1]
    rows: list[Row] = []
    ablation: list[Row] = []
    for built in held.searched.sets:
        arms: list[tuple[str, tuple[Node, ...], int]] = [("set", one, -1) for one in cumulative(built.members)]
        if built.chosen:
            built.random, built.widened = random_sets(site.chunks, built.members, seed=seed)
            arms += [("see heads", tuple(top_see_heads(site.chunks, len(built.members))), -1)]
            arms += [("random", one, number) for number, one in enumerate(built.random)]
        heads = [one for _, one, _ in arms]
        stage = f"the set and {len(built.random)} random sets" if built.chosen else "the set with another donor"
        donors = [built.donor] * len(heads)
        effect = release_of_sets(chunks, heads, donors, half.examples, stage)
        if built.chosen:
            ablation += [
                curve_row(arm, one, built.donor, effect, index, draw, half)
                for index, (arm, one, draw) in enumerate(arms)
            ]
        row = _set_row(built, effect, chunks, halves) | {"site": site.site}
        if built.chosen:
            row["see_release"] = float(np.nanmean(effect.release[len(built.members)]))
        rows.append(row | _against_random(built, row, effect, half.delta(s), strict=not chunks[0].bench.mlps))
    return rows, ablation


def _set_row(built: BuiltSet, effect: SetEffect, chunks: Sequence[Chunk], halves: tuple[Half, Half]) -> Row:
    last, (first, half) = len(built.members) - 1, halves
    release = effect.release[last]
    out: Row = {
        "name": built.name, "members": head_names(built.members), "k": len(built.members), "donor": built.donor,
        "screen": built.screen, "chosen": built.chosen, "random_n": len(built.random),
        "discovery_release": built.discovery_release,
        "discovery_share": built.discovery_release / float(first.G.mean()),
    }  # fmt: skip
    for answer in ("sound", "picture"):
        out[f"says_{answer}_before"] = sum(float(chunk.says(answer).sum()) / len(half.examples) for chunk in chunks)
        out[f"says_{answer}"] = float(np.nanmean(getattr(effect, f"says_{answer}")[last]))
    return out | half.bounded(release, "release") | half.share(release)


def _against_random(built: BuiltSet, row: Row, effect: SetEffect, delta: float, *, strict: bool) -> Row:
    """The chosen set's own verdict: its p among random sets, and whether it is confirmed."""
    if not built.random:
        return {"flags": "no matched random set exists: not confirmed"} if built.chosen else {}
    random, n = np.nanmean(effect.release[len(built.members) + 1 :], axis=1), len(built.random)
    p = (1 + int((random >= row["release"] - 1e-9).sum())) / (1 + n)
    flags = [f"only {n}{'' if built.widened else ' matched'} random sets exist"] if n < RANDOM_SETS else []
    if built.widened:
        flags.append(f"too few sets matched: the pool was widened to {built.widened}")
    beyond = row["release"] > random.max()
    if beyond and 1 / (1 + n) > LARGEST_P:
        flags.append(f"larger than all {n} sets there are: too few to test")
    return {
        "random_mean": float(random.mean()),
        "random_high": float(np.percentile(random, 97.5)),
        "random_max": float(random.max()),
        "p_random": p,
        "p_floor": 1 / (1 + n),
        "confirmed": bool(row["low"] > delta and (beyond if strict else p <= LARGEST_P)),
        "flags": "; ".join(flags),
    }


def curve_row(
    arm: str, members: Sequence[Node], donor: str, effect: SetEffect, row: int, draw: int, half: Half
) -> dict[str, Any]:
    """Write one row of the ablation table."""
    release = effect.release[row]
    out: dict[str, Any] = {"arm": arm, "k": len(members), "draw": draw, "members": head_names(members), "donor": donor}
    out |= {name: float(np.nanmean(getattr(effect, name)[row])) for name in ("says_sound", "says_picture")}
    bounds, share = half.boot.mean(release), half.shares(release)
    out |= {"low": float(bounds.low), "high": float(bounds.high), "share": float(share.value)}
    return out | {"release": float(np.nanmean(release))}


def doubling(n: int) -> list[int]:
    """List 1, 2, 4, ... up to n, n included."""
    sizes = [2**k for k in range(n.bit_length()) if 2**k < n]
    return [*sizes, n] if n else []


def top_see_heads(chunks: Sequence[Chunk], n: int) -> list[Node]:
    """Find the heads that `see` needs most, by zeroing each: those whose zeroing moves M towards the sound's answer."""
    heads = chunks[0].bench.engine.heads
    zeroed = Request("va", "zero", question="see")
    examples = np.concatenate([chunk.examples for chunk in chunks])
    found = measure_requests(chunks, [zeroed], heads=heads, examples=examples)
    mean = head_means(found[zeroed].margin)[:, : chunks[0].bench.engine.n_heads].ravel()
    return [heads[j] for j in np.argsort(-mean, kind="stable")[:n]]
