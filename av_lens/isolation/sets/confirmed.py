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

from av_lens.isolation.measuring.bench import Chunk, averaged
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.recordings import Head
from av_lens.isolation.naming.evidence import Searched, SiteEvidence
from av_lens.isolation.naming.role_tests import head_means
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


def ranked_curve(searched: Searched, chunks: Sequence[Chunk], half: Half) -> list[Row]:
    """Edit the heads of largest release together: how many restore half of the gap? Rows of `ablation` by size.

    Sizes double, then the crossing is closed in by halves.
    """
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


def ranked_heads(site: SiteEvidence) -> tuple[list[Head], str]:
    """Order all heads by their largest single release on discovery, and choose the donor to edit them with."""
    best = site.evidence.largest_release
    n_heads = best.shape[1]
    order = np.argsort(-np.where(np.isnan(best), -np.inf, best).ravel(), kind="stable")
    release = site.evidence.by_donor("release")
    donor = max(release, key=lambda name: float(np.nansum(np.clip(head_means(release[name]), 0, None))))
    return [(int(i) // n_heads, int(i) % n_heads) for i in order], donor


def between(measured: dict[int, float], goal: float) -> int | None:
    """Choose the next size to measure on the way to the size at which a curve crosses a goal; None when it is known."""
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
) -> tuple[list[Row], list[Row]]:
    """Edit the sets on confirmation, the chosen one with its controls: rows of `sets` and of `ablation`."""
    half = halves[1]
    rows: list[Row] = []
    ablation: list[Row] = []
    for built in sets:
        arms: list[tuple[str, tuple[Head, ...], int]] = [("set", one, -1) for one in cumulative(built.members)]
        if built.chosen:
            norms = averaged(site.chunks, "norms of z W_O", lambda one: one.bench.engine.write_norms(one.run("va")))
            built.random, built.widened = random_sets(built.members, norms, seed=seed)
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
        rows.append(row | _against_random(built, row, effect, half.delta(s)))
    return rows, ablation


def _set_row(built: BuiltSet, effect: SetEffect, chunks: Sequence[Chunk], halves: tuple[Half, Half]) -> Row:
    last, (first, half) = len(built.members) - 1, halves
    release = effect.release[last]
    out: Row = {
        "name": built.name, "members": built.names, "k": len(built.members), "donor": built.donor,
        "screen": built.screen, "chosen": built.chosen, "random_n": len(built.random),
        "discovery_release": built.discovery_release,
        "discovery_share": built.discovery_release / float(first.G.mean()),
    }  # fmt: skip
    for answer in ("sound", "picture"):
        out[f"says_{answer}_before"] = sum(float(chunk.says(answer).sum()) / len(half.examples) for chunk in chunks)
        out[f"says_{answer}"] = float(np.nanmean(getattr(effect, f"says_{answer}")[last]))
    return out | half.bounded(release, "release") | half.share(release)


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
