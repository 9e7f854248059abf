"""Do the sets hold on conflicts that they were not found on, and do random heads do the same?

* Every donor's set is edited cumulatively on confirmation: its release, and how often the conflict is answered with the
  sound or with the picture (most likely token of the whole vocabulary).
* The chosen set is compared with at least 200 matched random sets (all, where fewer exist) and with as many top heads
  for `see` (`sets`). p = (1 + number of random sets with at least the set's release) / (1 + number of random sets); its
  floor is shown. Confirmed: its release's lower bound is above delta and it releases more than every random set.
* *Ranked heads*: the heads of largest single release are edited together, 1, 2, 4, ... of them, and then as many as it
  takes to find, by halving the interval, how many give half of the gap. This says over how many heads the suppression
  is spread. Where the curve is not monotone it is one crossing of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.isolation.measuring.bench import PRIMARY_DONORS, Chunk
from av_lens.isolation.measuring.effects import Progress
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.seam import Head
from av_lens.isolation.naming.evidence import Searched, SiteEvidence
from av_lens.isolation.naming.role_tests import head_means, largest_release
from av_lens.isolation.sets.sets import (
    RANDOM_SETS,
    BuiltSet,
    SetEffect,
    cumulative,
    curve_row,
    doubling,
    random_sets,
    release_of_sets,
    top_see_heads,
)

Row = dict[str, Any]


def ranked_curve(
    searched: Searched, chunks: Sequence[Chunk], half: Half, *, progress: Progress | None = None
) -> list[Row]:
    """Edit the heads of largest release together: how many restore half of the gap?

    Args:
        searched: what discovery found; it ranks the heads by their largest release over the donors, and gives the donor
            under which single releases add up to most.
        chunks: confirmation's conflicts.
        half: confirmation.
        progress: called as `progress(stage, done, total)`.

    Returns:
        Rows of `ablation`, fewest heads first.
    """
    heads, donor = ranked_heads(searched.first)
    goal = 0.5 * float((half.G - half.C).mean())
    rows: dict[int, Row] = {}

    def measure(sizes: Sequence[int]) -> None:
        wanted = [size for size in sizes if size not in rows]
        sets = [tuple(heads[:size]) for size in wanted]
        stage = "the largest releases together"
        effect = release_of_sets(chunks, sets, [donor] * len(sets), half.examples, progress=progress, stage=stage)
        for index, (size, one) in enumerate(zip(wanted, sets, strict=True)):
            rows[size] = _bounded(curve_row("ranked heads", one, donor, effect, index, -1), effect, index, half)

    measure(doubling(len(heads)))
    while (middle := between({size: row["release"] for size, row in rows.items()}, goal)) is not None:
        measure([middle])
    return [rows[size] for size in sorted(rows)]


def ranked_heads(site: SiteEvidence) -> tuple[list[Head], str]:
    """Order all heads by their largest single release on discovery, and choose the donor to edit them with.

    Args:
        site: discovery's evidence.

    Returns:
        The heads, and the donor whose positive single releases have the largest sum.
    """
    release = site.evidence.release
    best = largest_release(site.evidence)
    order = np.argsort(-np.where(np.isnan(best), -np.inf, best).ravel(), kind="stable")
    n_heads = best.shape[1]
    donor = max(PRIMARY_DONORS, key=lambda name: float(np.nansum(np.clip(head_means(release[name]), 0, None))))
    return [(int(i) // n_heads, int(i) % n_heads) for i in order], donor


def between(measured: dict[int, float], goal: float) -> int | None:
    """Choose the next size to measure on the way to the size at which a curve crosses a goal.

    Args:
        measured: size -> release; size 0 releases 0.
        goal: the release that is looked for.

    Returns:
        The middle between the smallest size that reaches the goal and the largest below it that does not; None where
        these are neighbours, or where no size reaches the goal.
    """
    enough = [size for size, release in measured.items() if release >= goal]
    if not enough or goal <= 0:
        return None
    first = min(enough)
    before = max([0, *(size for size in measured if size < first)])
    return (before + first) // 2 if first - before > 1 else None


def confirmed_sets(
    sets: Sequence[BuiltSet],
    site: SiteEvidence,
    chunks: Sequence[Chunk],
    halves: tuple[Half, Half],
    *,
    s: float,
    seed: int,
    progress: Progress | None = None,
) -> tuple[list[Row], list[Row]]:
    """Edit the sets on confirmation; the chosen one with its controls.

    Args:
        sets: what the search built.
        site: discovery's evidence, where norms and the top heads for `see` are measured.
        chunks: confirmation's conflicts.
        halves: discovery and confirmation.
        s: the threshold, a share of G.
        seed: of the random sets.
        progress: called as `progress(stage, done, total)`.

    Returns:
        Rows of `sets`, and rows of `ablation` for the chosen one.
    """
    first, half = halves
    rows: list[Row] = []
    ablation: list[Row] = []
    for built in sets:
        arms: list[tuple[str, tuple[Head, ...], int]] = [("set", one, -1) for one in cumulative(built.members)]
        if built.chosen:
            built.random, built.widened = random_sets(built.members, _write_norms(site.chunks), seed=seed)
            arms += [("see heads", tuple(top_see_heads(site.chunks, len(built.members))), -1)]
            arms += [("random", one, number) for number, one in enumerate(built.random)]
        heads = [one for _, one, _ in arms]
        stage = f"the set and {len(built.random)} random sets" if built.chosen else "the set with another donor"
        effect = release_of_sets(
            chunks, heads, [built.donor] * len(heads), half.examples, progress=progress, stage=stage
        )
        if built.chosen:
            ablation += [
                _bounded(curve_row(arm, one, built.donor, effect, index, draw), effect, index, half)
                for index, (arm, one, draw) in enumerate(arms)
            ]
        row = _set_row(built, effect, chunks, first, half)
        row |= {"site": site.site} | _against_random(built, row, effect, s * float(half.G.mean()))
        rows.append(row)
    return rows, ablation


def _write_norms(chunks: Sequence[Chunk]) -> Float[np.ndarray, "layer head"]:
    weights = [len(chunk.examples) for chunk in chunks]
    parts = [
        chunk.remember("norms of z W_O", {}, lambda chunk=chunk: {"norm": _norms(chunk)})["norm"] for chunk in chunks
    ]
    return np.average(np.stack(parts), axis=0, weights=weights)


def _norms(chunk: Chunk) -> Float[np.ndarray, "layer head"]:
    return chunk.bench.engine.write_norms(chunk.run("va"))


def _bounded(row: Row, effect: SetEffect, index: int, half: Half) -> Row:
    """Add the interval of a set's release, in logits, and its share of G."""
    mean = half.boot.mean(effect.release[index])
    share = half.boot.ratio(effect.release[index], half.G)
    return row | {"low": float(mean.low), "high": float(mean.high), "share": float(share.value)}


def _set_row(built: BuiltSet, effect: SetEffect, chunks: Sequence[Chunk], first: Half, half: Half) -> Row:
    last = len(built.members) - 1
    mean, share = half.boot.mean(effect.release[last]), half.boot.ratio(effect.release[last], half.G)
    before = {"sound": 0.0, "picture": 0.0}
    for chunk in chunks:
        top, candidates = chunk.reading("va").top, chunk.bench.candidates
        before["sound"] += float((top == candidates.sound[chunk.examples]).sum()) / len(half.examples)
        before["picture"] += float((top == candidates.picture[chunk.examples]).sum()) / len(half.examples)
    return {
        "name": built.name,
        "members": built.names,
        "k": len(built.members),
        "donor": built.donor,
        "screen": built.screen,
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
        "random_n": len(built.random),
    }


def _random_flags(built: BuiltSet, n: int) -> str:
    flags = [f"only {n} matched random sets exist"] if n < RANDOM_SETS else []
    if built.widened:
        flags.append(f"no set matched in norm: each member's pool was widened by the {built.widened} next nearest")
    return "; ".join(flags)


def _against_random(built: BuiltSet, row: Row, effect: SetEffect, delta: float) -> Row:
    """The chosen set's own verdict: its p among matched random sets, and whether it is confirmed."""
    if not built.random:
        return {"flags": "no matched random set exists: not confirmed"} if built.chosen else {}
    random, n = np.nanmean(effect.release[len(built.members) + 1 :], axis=1), len(built.random)
    return {
        "random_mean": float(random.mean()),
        "random_high": float(np.percentile(random, 97.5)),
        "random_max": float(random.max()),
        "p_random": (1 + int((random >= row["release"] - 1e-9).sum())) / (1 + n),
        "p_floor": 1 / (1 + n),
        "confirmed": bool(row["low"] > delta and row["release"] > random.max()),
        "flags": _random_flags(built, n),
    }
