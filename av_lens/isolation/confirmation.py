"""Does it hold on conflicts that played no part in finding it? Named rows, the set, its controls, its side effects.

Everything is fixed on discovery: the rows, their donors, the set and its order, the means. Here the same effects are
measured on the other half; `found.heads` takes its `effect low high` from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.isolation.bench import PRIMARY_DONORS, Bench, Chunk
from av_lens.isolation.effects import Progress, requests
from av_lens.isolation.engine import Head
from av_lens.isolation.evidence import BySite, Half, Searched, SiteEvidence, chunks_of, gather, primary_donor
from av_lens.isolation.role_tests import Named, family_size, head_means
from av_lens.isolation.roles import LEVEL, confirm
from av_lens.isolation.seam import MEDIA_SITES
from av_lens.isolation.sets import (
    RANDOM_SETS,
    BuiltSet,
    SetEffect,
    build_sets,
    cumulative,
    curve_row,
    doubling,
    random_sets,
    release_of_sets,
    top_see_heads,
)
from av_lens.isolation.specificity import controls
from av_lens.results.halves import CONFIRMATION, DISCOVERY
from av_lens.results.statistics import holm
from av_lens.results.tables import RELEASING

NAMES = (*RELEASING, "silenced carrier", "sound carrier")


@dataclass(eq=False)
class Held(BySite):
    """What confirmation found; a site is missing where discovery named nothing."""

    confirmed: dict[Named, bool] = field(default_factory=dict)
    holm_p: dict[Named, float] = field(default_factory=dict)
    sets: list[BuiltSet] = field(default_factory=list)
    set_rows: list[dict[str, Any]] = field(default_factory=list)
    ablation_rows: list[dict[str, Any]] = field(default_factory=list)
    specificity_rows: list[dict[str, Any]] = field(default_factory=list)


def confirm_all(
    bench: Bench, halves: Sequence[Half], searched: Searched, *, s: float, seed: int, progress: Progress | None
) -> Held:
    """Measure on confirmation what discovery named.

    Args:
        bench: the conflicts.
        halves: discovery and confirmation.
        searched: what discovery found.
        s: the threshold, a share of G.
        seed: of the flips and the random sets.
        progress: called as `progress(stage, done, total)`.

    Returns:
        What held.
    """
    half = next(one for one in halves if one.name == CONFIRMATION)
    first = next(one for one in halves if one.name == DISCOVERY)
    engine = bench.engine
    family = family_size(engine.n_layers * engine.n_heads, len(searched.sites))
    held = Held(sites={})
    for site in searched.sites:
        chunks = chunks_of(bench, searched, half, site)
        heads = sorted({(row.layer, row.head) for row in searched.named if row.site == site})
        if heads:
            wanted = requests(
                with_means=chunks[0].means is not None,
                with_third=any(bench.has_third(int(i)) for i in half.examples),
                with_audio_only=site not in MEDIA_SITES,
            )
            held.sites[site] = gather(
                chunks, half, wanted, heads, site=site, s=s, family=family, seed=seed + 1, progress=progress
            )
    _confirm_rows(searched, held, s)
    chunks = chunks_of(bench, searched, half, searched.first.site)
    _confirm_set(bench, first, half, searched, held, chunks, seed, progress)
    return held


def _confirm_rows(searched: Searched, held: Held, s: float) -> None:
    """Holm over the rows that got a name, then the same cuts."""
    named = [row for row in searched.named if row.role in NAMES]
    adjusted = holm(np.array([held.sites[row.site].tests.of(row) for row in named], dtype=np.float64))
    held.holm_p = {row: float(value) for row, value in zip(named, adjusted, strict=True)}
    for name, site in held.sites.items():
        rows = [row for row in named if row.site == name]
        outcome = confirm(site.evidence, rows, [held.holm_p[row] for row in rows], s=s)
        held.confirmed |= dict(zip(rows, outcome, strict=True))


def _confirm_set(
    bench: Bench,
    first: Half,
    half: Half,
    searched: Searched,
    held: Held,
    chunks: list[Chunk],
    seed: int,
    progress: Progress | None,
) -> None:
    """Build the set on discovery's first site, edit it here with its controls, and look at what else breaks."""
    site = searched.first
    members = list(dict.fromkeys((row.layer, row.head) for row in searched.suppressors if row.site == site.site))
    held.sets = build_sets(site.chunks, members, dict(site.evidence.release), first.examples)
    _ranked_curve(searched, chunks, half, held, progress)
    for built in held.sets:
        if built.chosen:
            built.random, built.widened = random_sets(built.members, _write_norms(site.chunks), seed=seed)
        _set_rows(built, site, chunks, first, half, held, searched.s * float(half.G.mean()), progress)
        if built.chosen:
            held.specificity_rows = controls(chunks, built.members, built.donor, examples=half.examples, boot=half.boot)


def _write_norms(chunks: Sequence[Chunk]) -> Float[np.ndarray, "layer head"]:
    weights = [len(chunk.examples) for chunk in chunks]
    each = [chunk.bench.engine.write_norms(chunk.run("va")) for chunk in chunks]
    return np.average(np.stack(each), axis=0, weights=weights)


def _bounded(row: dict[str, Any], effect: SetEffect, index: int, half: Half) -> dict[str, Any]:
    """Add the interval of a set's release, in logits and as a share of G."""
    mean = half.boot.mean(effect.release[index])
    share = half.boot.ratio(effect.release[index], half.G)
    return row | {
        "low": float(mean.low),
        "high": float(mean.high),
        "share": float(share.value),
    }


def _ranked_curve(searched: Searched, chunks: list[Chunk], half: Half, held: Held, progress: Progress | None) -> None:
    """Edit the 1, 2, 4, ... heads of largest release together: over how many is the suppression spread?"""
    site = searched.first
    donors = primary_donor(site.evidence)
    best = np.stack([head_means(site.evidence.release[donor]) for donor in PRIMARY_DONORS])
    order = np.argsort(-np.where(np.isnan(best), -np.inf, best).max(0).ravel(), kind="stable")
    shape = donors.shape
    heads: list[Head] = [(int(i) // shape[1], int(i) % shape[1]) for i in order]
    donor = max(
        PRIMARY_DONORS, key=lambda name: float(np.nansum(np.clip(head_means(site.evidence.release[name]), 0, None)))
    )
    sets = [tuple(heads[:k]) for k in doubling(len(heads))]
    effect = release_of_sets(
        chunks, sets, [donor] * len(sets), half.examples, progress=progress, stage="the largest releases together"
    )
    for index, one in enumerate(sets):
        row = curve_row("ranked heads", one, donor, effect, index, -1)
        held.ablation_rows.append(_bounded(row, effect, index, half))


def _set_rows(
    built: BuiltSet,
    site: SiteEvidence,
    chunks: list[Chunk],
    first: Half,
    half: Half,
    held: Held,
    delta: float,
    progress: Progress | None,
) -> None:
    """Edit a set cumulatively, and, for the chosen one, random sets and the top heads for `see`."""
    arms: list[tuple[str, tuple[Head, ...], int]] = [("set", one, -1) for one in cumulative(built.members)]
    if built.chosen:
        see = top_see_heads(site.chunks, len(built.members))
        arms += [("see heads", tuple(see), -1)]
        arms += [("random", one, number) for number, one in enumerate(built.random)]
    sets = [one for _, one, _ in arms]
    stage = f"the set and {len(built.random)} random sets" if built.chosen else "the set with another donor"
    effect = release_of_sets(chunks, sets, [built.donor] * len(sets), half.examples, progress=progress, stage=stage)
    if built.chosen:
        for index, (arm, one, draw) in enumerate(arms):
            held.ablation_rows.append(
                _bounded(curve_row(arm, one, built.donor, effect, index, draw), effect, index, half)
            )
    last = len(built.members) - 1
    random = effect.release[len(built.members) + 1 :].mean(1) if built.random else np.array([])
    held.set_rows.append(_set_row(built, site.site, effect, last, random, chunks, first, half, delta))


def _set_row(
    built: BuiltSet,
    site: str,
    effect: SetEffect,
    last: int,
    random: np.ndarray,
    chunks: list[Chunk],
    first: Half,
    half: Half,
    delta: float,
) -> dict[str, Any]:
    mean, share = half.boot.mean(effect.release[last]), half.boot.ratio(effect.release[last], half.G)
    before = {"sound": 0.0, "picture": 0.0}
    for chunk in chunks:
        top, candidates = chunk.reading("va").top, chunk.bench.candidates
        before["sound"] += float((top == candidates.sound[chunk.examples]).sum()) / len(half.examples)
        before["picture"] += float((top == candidates.picture[chunk.examples]).sum()) / len(half.examples)
    row: dict[str, Any] = {
        "name": "named suppressors",
        "site": site,
        "members": built.names,
        "k": len(built.members),
        "donor": built.donor,
        "screen": "release",
        "chosen": built.chosen,
        "discovery_release": built.discovery_release,
        "discovery_share": built.discovery_release / float(first.G.mean()),
        "release": float(mean.value),
        "low": float(mean.low),
        "high": float(mean.high),
        "share": float(share.value),
        "share_low": float(share.low),
        "share_high": float(share.high),
        "says_sound_before": before["sound"],
        "says_sound": float(np.nanmean(effect.says_sound[last])),
        "says_picture_before": before["picture"],
        "says_picture": float(np.nanmean(effect.says_picture[last])),
        "random_n": len(random),
    }
    if len(random):
        p = (1 + int((random >= float(mean.value) - 1e-9).sum())) / (1 + len(random))
        row |= {
            "random_mean": float(random.mean()),
            "random_high": float(np.percentile(random, 97.5)),
            "random_max": float(random.max()),
            "p_random": p,
            "p_floor": 1 / (1 + len(random)),
            "confirmed": bool(mean.low > delta and mean.value > random.max()),
            "flags": _set_flags(built, len(random)),
        }
    elif built.chosen:
        row["flags"] = "no matched random set exists: not confirmed"
    return row


def _set_flags(built: BuiltSet, n: int) -> str:
    flags = [f"only {n} matched random sets exist"] if n < RANDOM_SETS else []
    if built.widened:
        flags.append(f"each member's pool was widened by the {built.widened} next nearest in norm")
    return "; ".join(flags)


def head_rows(searched: Searched, held: Held) -> list[dict[str, Any]]:
    """Write `found.heads`: one row per (head, site, role), largest effect on confirmation first.

    Args:
        searched: what discovery found.
        held: what confirmation found.

    Returns:
        The rows.
    """
    rows = [_head_row(row, searched, held) for row in searched.named]
    return sorted(rows, key=lambda row: (-abs(row["effect"]), row["layer"], row["head"], row["role"]))


def _head_row(row: Named, searched: Searched, held: Held) -> dict[str, Any]:
    site, again = searched.sites[row.site], held.sites.get(row.site)
    at = (slice(None), row.layer, row.head)
    members = {head for built in held.sets if built.chosen for head in built.members}
    estimand = {"silenced carrier": "silenced", "sound carrier": "carries"}.get(row.role, "release")
    out: dict[str, Any] = {
        "layer": row.layer, "head": row.head, "site": row.site, "role": row.role, "estimand": estimand,
        "donor": row.donor or {"silenced": "blank_a - blank_muted", "carries": "blank_muted"}[estimand],
        "member_of": "named suppressors" if (row.layer, row.head) in members and row.role in RELEASING else "",
        "q": row.q, "p_maxt": row.p_maxt, "discovery_p": row.p, "p_holm": held.holm_p.get(row, float("nan")),
        "confirmed": held.confirmed.get(row, False), "flags": _flags(row, searched, held),
    }  # fmt: skip
    for evidence, prefix in ((site.evidence, "discovery_"), (again.evidence if again else None, "")):
        if evidence is None:
            continue
        values = {
            "release": evidence.release.get(row.donor),
            "silenced": evidence.silenced,
            "carries": evidence.carries,
        }
        effect = values[estimand]
        assert effect is not None
        boot = evidence.boot
        mean, share = boot.mean(effect[at]), boot.ratio(effect[at], evidence.G)
        out |= {
            f"{prefix}effect": float(mean.value),
            f"{prefix}low": float(mean.low),
            f"{prefix}high": float(mean.high),
        }
        out[f"{prefix}share"] = float(share.value)
        if not prefix:
            out |= {"share_low": float(share.low), "share_high": float(share.high)}
        if estimand == "release":
            out[f"{prefix}direct_share"] = float(boot.ratio(evidence.direct[row.donor][at], effect[at]).value)
    return out | _side_by_side(again or site, at, row.donor)


def _side_by_side(site: SiteEvidence, at: tuple[slice, int, int], donor: str) -> dict[str, Any]:
    found = site.evidence
    columns = {f"release_{donor}": found.release[donor] for donor in PRIMARY_DONORS} | {
        "question_share": found.release["mean_other"] - found.mean_task,
        "reads_picture": found.reads_picture,
        "reads_sound": found.reads_sound,
        "sufficiency": found.sufficiency,
        "silenced": found.silenced,
        "carries": found.carries,
        "repair": site.figure("repair", donor),
        "release_on_sound": site.figure("release on sound", donor),
        "release_on_picture": site.figure("release on picture", donor),
        "release_norm_frozen": site.figure("release (norm frozen)", donor),
        "dla": site.dla,
    }
    return {name: float(np.nanmean(v[at])) if (~np.isnan(v[at])).any() else float("nan") for name, v in columns.items()}


def _flags(row: Named, searched: Searched, held: Held) -> str:
    """Mark a suppressor that zero alone finds (its output is the same in every cell), and a role that did not hold."""
    if row.role not in RELEASING:
        return ""
    flags: list[str] = []
    if row.donor == "zero" and not any(searched.passes(row, donor) for donor in PRIMARY_DONORS if donor != "zero"):
        flags.append("always on")
    site = held.sites.get(row.site)
    if site is not None and not held.confirmed.get(row, False):
        p = float(site.tests.release_p[row.donor][row.layer, row.head])
        mean = head_means(site.evidence.release[row.donor])[row.layer, row.head]
        if p < LEVEL and mean > searched.s * site.evidence.G.mean():
            flags.append("the release holds (p uncorrected), the role does not")
    return "; ".join(flags)
