"""Which role does a head play? Protocol section 5, from the effects of section 4, on numbers alone.

The first that holds, top to bottom; a sound carrier may join any:

| role | criterion |
|---|---|
| breaks | release passes, but the edit is mere damage (below) |
| picture writer | release passes; direct share >= .5; reads picture > reads sound |
| sound opponent | release passes; direct share >= .5; reads sound > reads picture |
| gate | release passes; direct share < .5 |
| undetermined | release passes, and no cut holds by its 95% interval |
| silenced carrier | silenced passes |
| sound carrier | carries passes |

delta = s x G of the half. *Mere damage*: the upper bound of [fall of G - release / 2] is >= 0, or the lower bound of
[rise of the heard answer over the candidates that are neither] is <= -delta. *Passes* on discovery: mean > delta and
q < .05. p is a one-sided sign flip by component of effect - s G; a role's p is the largest of its parts: release;
direct - release / 2 (for a gate release / 2 - direct); the difference of the reads. q is Benjamini-Hochberg over
heads x sites x [3 roles x 3 donors + silenced + carries].

Choices where the protocol is silent: that the *release* passes (breaks and undetermined need it) is judged by a second
Benjamini-Hochberg over the same family with each role's p replaced by its release part; a role's max-T p is the largest
of its parts' max-T p; on confirmation a row is confirmed if its mean is above delta, Holm's p is below .05 over the
rows that were given a name (breaks is none), and the same cuts give the same role. An undetermined head is named, its
kind is not: it is confirmed by its release alone, if it does not break.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.isolation.measuring.estimands import PerHead
from av_lens.isolation.naming.role_tests import (
    CARRIERS,
    DAMAGE_CUT,
    DIRECT_CUT,
    Evidence,
    Named,
    Table,
    Tests,
    head_means,
)
from av_lens.results.statistics import Interval
from av_lens.results.tables import RELEASING, SUPPRESSORS

LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class Cuts:
    """The intervals that decide a role, for the chosen donor of each head, each `[layer, head]`.

    `damage` is [fall of G - release / 2], `rise` the heard answer's rise over the other candidates, `share` the direct
    share, `reads` [reads picture - reads sound].
    """

    release: Interval
    damage: Interval
    rise: Interval
    share: Interval
    reads: Interval
    reads_picture: Interval
    reads_sound: Interval
    delta: float

    @classmethod
    def of(cls, found: Evidence, donors: np.ndarray, *, s: float) -> Cuts:
        """Compute the intervals, each head's by its own donor; `donors` is `[layer, head]`."""

        def chosen(name: str) -> PerHead:
            of = found.by_donor(name)
            out = np.full_like(of[PRIMARY_DONORS[0]], np.nan)
            for donor in PRIMARY_DONORS:
                out[:, donors == donor] = of[donor][:, donors == donor]
            return out

        boot, release = found.half.boot, chosen("release")
        return cls(
            release=boot.mean(release),
            damage=boot.mean(chosen("fall of G") - DAMAGE_CUT * release),
            rise=boot.mean(chosen("rise over others")),
            share=boot.ratio(chosen("direct"), release),
            reads=boot.mean(found["reads picture"] - found["reads sound"]),
            reads_picture=boot.mean(found["reads picture"]),
            reads_sound=boot.mean(found["reads sound"]),
            delta=found.half.delta(s),
        )


def suppressor_role(cuts: Cuts, layer: int, head: int, passes: Mapping[str, bool]) -> str:
    """Name what a head whose release passes does."""
    at = (layer, head)
    if cuts.damage.high[at] >= 0 or cuts.rise.low[at] <= -cuts.delta:
        return "breaks"
    direct, indirect = cuts.share.low[at] >= DIRECT_CUT, cuts.share.high[at] < DIRECT_CUT
    picture = cuts.reads.low[at] > 0 and cuts.reads_picture.low[at] > 0
    sound = cuts.reads.high[at] < 0 and cuts.reads_sound.low[at] > 0
    if direct and picture and passes["picture writer"]:
        return "picture writer"
    if direct and sound and passes["sound opponent"]:
        return "sound opponent"
    if indirect and passes["gate"]:
        return "gate"
    return "undetermined"


def classify(
    found: Evidence,
    tests: Tests,
    q: Mapping[tuple[str, str], Table],
    release_q: Mapping[str, Table],
    *,
    s: float,
    site: str,
) -> list[Named]:
    """Give every head its roles on discovery, by its primary donor: none, one, or two where it also carries sound."""
    donors = found.donors
    cuts = Cuts.of(found, donors, s=s)
    means = {role: head_means(found[estimand]) for role, estimand in CARRIERS.items()}
    out: list[Named] = []
    for layer, head in np.ndindex(donors.shape):
        at, donor = (layer, head), str(donors[layer, head])
        roles: list[tuple[str, str]] = []
        if cuts.release.value[at] > cuts.delta and release_q[donor][at] < LEVEL:
            role = suppressor_role(cuts, layer, head, {r: bool(q[r, donor][at] < LEVEL) for r in SUPPRESSORS})
            roles.append((role, donor))
        for role in CARRIERS:
            first = role == "sound carrier" or not roles
            if first and means[role][at] > cuts.delta and q[role, ""][at] < LEVEL:
                roles.append((role, ""))
        for key in roles:
            by = key[1]
            of_role = (tests.p, q, tests.p_maxt)
            tables = [table[key] for table in of_role] if key in tests.p else [
                tests.release_p[by], release_q[by], tests.release_p_maxt[by]]  # fmt: skip
            out.append(Named(layer, head, site, *key, *(float(table[at]) for table in tables)))
    return out


def confirm(found: Evidence, rows: Sequence[Named], holm_p: Sequence[float], *, s: float) -> list[bool]:
    """Say which rows hold on confirmation: same sign, role, site and donor, Holm's p below .05."""
    donors = np.full(found["silenced"].shape[1:], PRIMARY_DONORS[0], dtype=object)
    for row in rows:
        if row.donor:
            donors[row.at] = row.donor
    cuts = Cuts.of(found, donors, s=s)
    out: list[bool] = []
    for row, p in zip(rows, holm_p, strict=True):
        if not p < LEVEL:
            out.append(False)
        elif row.role in RELEASING:
            again = suppressor_role(cuts, *row.at, dict.fromkeys(SUPPRESSORS, True))
            same = again == row.role or (row.role == "undetermined" and again != "breaks")
            out.append(bool(cuts.release.value[row.at] > cuts.delta and same))
        else:
            out.append(bool(head_means(found[CARRIERS[row.role]])[row.at] > cuts.delta))
    return out
