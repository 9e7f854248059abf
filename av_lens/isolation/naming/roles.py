"""Which role does a head play, and how sure are we? Protocol sections 5 and 7, from the effects of section 4.

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

*One donor alone* (second edition): a role whose head is released by one donor alone on discovery (`one_donor_alone`)
may hold on held-out clips, and is then told as replicated, by one donor alone, never as confirmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from av_lens.isolation.measuring.bench import Half
from av_lens.isolation.measuring.effects import FIRST_RELEASE, Figures, PerHead, donor_of
from av_lens.isolation.measuring.engine import PRIMARY_DONORS, Head
from av_lens.results.dyadic import Inference
from av_lens.results.record import RELEASING, SUPPRESSORS
from av_lens.results.statistics import Interval, benjamini_hochberg

DIRECT_CUT = DAMAGE_CUT = 0.5
ONE_DONOR_SHARE, ONE_DONOR_OF_LARGEST = 0.10, 0.5
PARTS = {
    "picture writer": ("release {}", "direct {}", "picture"),
    "sound opponent": ("release {}", "direct {}", "sound"),
    "gate": ("release {}", "indirect {}"),
}
"""What each suppressor's role consists of, by donor; all must hold."""
READS = ("picture", "sound")
"""The parts that use the third clip."""
CARRIERS = {"silenced carrier": "silenced", "sound carrier": "carries"}
"""The estimand that makes a head a carrier."""
Table = Float[np.ndarray, "layer head"]


@dataclass(frozen=True)
class Named:
    """A row of the role table: a head at a site with its role, donor and discovery's p, q and max-T p."""

    layer: int
    head: int
    site: str
    role: str
    donor: str
    p: float
    q: float
    p_maxt: float

    @property
    def at(self) -> Head:
        """Layer and head."""
        return self.layer, self.head


@dataclass(frozen=True, eq=False)
class Evidence:
    """A half's effects, per example and head, by (estimand, donor); `evidence["silenced"]` where it has one donor."""

    figures: Figures
    half: Half

    def __getitem__(self, key: str | tuple[str, str]) -> PerHead:
        """An estimand's effects; NaN where it was not measured."""
        name, donor = (key, donor_of(key)) if isinstance(key, str) else key
        if name == FIRST_RELEASE and (name, donor) not in self.figures:
            name = "release"  # where all answers have one token
        return self.figures[name, donor]

    def by_donor(self, name: str) -> dict[str, PerHead]:
        """An estimand's effects by each primary donor."""
        return {donor: self[name, donor] for donor in PRIMARY_DONORS}

    @property
    def largest_release(self) -> Table:
        """Each head's largest mean release over the primary donors; NaN where not measured."""
        return np.fmax.reduce([head_means(values) for values in self.by_donor("release").values()])

    @property
    def donors(self) -> np.ndarray:
        """Each head's primary donor: the one with the largest mean release."""
        means = np.stack([head_means(values) for values in self.by_donor("release").values()])
        return np.array(PRIMARY_DONORS, dtype=object)[np.where(np.isnan(means), -np.inf, means).argmax(0)]


@dataclass(frozen=True, eq=False)
class Tests:
    """p-values of a half. By (role, donor): `p`, `p_maxt`; of the release alone by donor; donor "" for the carriers."""

    p: Mapping[tuple[str, str], Table]
    p_maxt: Mapping[tuple[str, str], Table]
    release_p: Mapping[str, Table]
    release_p_maxt: Mapping[str, Table]

    def of(self, row: Named) -> float:
        """Give the p of a named row."""
        table = self.p.get((row.role, row.donor), self.release_p.get(row.donor))
        return float("nan") if table is None else float(table[row.at])


def family_size(n_heads: int, n_sites: int) -> int:
    """Count the tests that q corrects for: heads x sites x (3 roles x 3 donors + silenced + carries)."""
    return n_heads * n_sites * (len(PARTS) * len(PRIMARY_DONORS) + len(CARRIERS))


def run_tests(found: Evidence, *, s: float, family: int, seed: int) -> Tests:
    """Test every part of every role on one half."""
    return run_tests_together([found], s=s, family=family, seed=seed)[0]


def run_tests_together(found: Sequence[Evidence], *, s: float, family: int, seed: int) -> list[Tests]:
    """Test several sites of one half in the same flips, so that max-T is over all of them."""
    parts = [_parts(one, s) for one in found]
    names = list(parts[0])
    stacked = np.stack([np.stack([part[name] for name in names], axis=-1) for part in parts], axis=-1)
    p, p_maxt = np.full((2, *stacked.shape[1:]), np.nan)
    for inference, some in _by_rule(found[0].half, names):
        tested = inference.test(stacked[..., some, :], family=family, seed=seed)
        p[..., some, :], p_maxt[..., some, :] = tested.p, tested.p_maxt
    return [_by_role(names, p[..., i], p_maxt[..., i]) for i in range(len(found))]


def _by_rule(half: Half, names: Sequence[str]) -> list[tuple[Inference, list[int]]]:
    """Group the parts that are tested together: all, or those that use the third clip apart."""
    reads = [number for number, name in enumerate(names) if name in READS and half.third is not None]
    rest = [number for number in range(len(names)) if number not in reads]
    return [(half.boot, rest), *([(half.third, reads)] if half.third is not None else [])]


def _parts(found: Evidence, s: float) -> dict[str, PerHead]:
    """What must be above 0 for each part of a role."""
    delta = (s * found.half.G)[:, None, None]
    parts: dict[str, PerHead] = {}
    for donor in PRIMARY_DONORS:
        release = found["release", donor]
        parts[f"release {donor}"] = release - delta
        parts[f"direct {donor}"] = found["direct", donor] - DIRECT_CUT * found[FIRST_RELEASE, donor]
        parts[f"indirect {donor}"] = -parts[f"direct {donor}"]
    parts["picture"] = found["reads picture"] - found["reads sound"]
    parts["sound"] = -parts["picture"]
    return parts | {estimand: found[estimand] - delta for estimand in CARRIERS.values()}


def _by_role(names: Sequence[str], of_parts: np.ndarray, maxt_of_parts: np.ndarray) -> Tests:
    """A role's p is the largest of its parts'."""
    needs = {(role, donor): [part.format(donor) for part in parts]
             for donor in PRIMARY_DONORS for role, parts in PARTS.items()}  # fmt: skip
    needs |= {(role, ""): [estimand] for role, estimand in CARRIERS.items()}
    both = [{name: table[..., number] for number, name in enumerate(names)} for table in (of_parts, maxt_of_parts)]
    p, p_maxt = ({key: np.max([one[name] for name in parts], axis=0) for key, parts in needs.items()} for one in both)
    release, release_maxt = ({donor: one[f"release {donor}"] for donor in PRIMARY_DONORS} for one in both)
    return Tests(p, p_maxt, release, release_maxt)


def adjust(
    tests: Sequence[Tests], *, n_sites: int | None = None
) -> tuple[list[dict[tuple[str, str], Table]], list[dict[str, Table]]]:
    """Correct for the family over all sites: q of every role, and q of the release alone."""
    keys = list(tests[0].p)
    role_p = np.stack([np.stack([test.p[key] for key in keys]) for test in tests])
    swapped = np.stack([np.stack([test.release_p.get(key[1], test.p[key]) for key in keys]) for test in tests])
    # The family is the one that was written down: donors and sites that could not be measured still count.
    family = role_p[0].size * (n_sites or len(tests))
    q, release_q = (benjamini_hochberg(p, family=family) for p in (role_p, swapped))
    by_role = [{key: q[i, k] for k, key in enumerate(keys)} for i in range(len(tests))]
    gate = {donor: keys.index(("gate", donor)) for donor in PRIMARY_DONORS}
    return by_role, [{donor: release_q[i, k] for donor, k in gate.items()} for i in range(len(tests))]


def head_means(values: PerHead) -> Table:
    """Average over the examples where a head was measured."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


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
            return np.select([donors == donor for donor in of], list(of.values()), np.nan)

        boot, third, release = found.half.boot, found.half.by("wa"), chosen("release")
        return cls(
            release=boot.mean(release),
            damage=boot.mean(chosen("fall of G") - DAMAGE_CUT * release),
            rise=boot.mean(chosen("rise over others")),
            share=boot.ratio(chosen("direct"), chosen(FIRST_RELEASE)),
            reads=third.mean(found["reads picture"] - found["reads sound"]),
            reads_picture=third.mean(found["reads picture"]),
            reads_sound=third.mean(found["reads sound"]),
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


def one_donor_alone(releases: Iterable[float], hearing: float) -> bool:
    """Say whether a role rests on one donor alone, by a head's mean releases on discovery and the mean of G.

    It does where the second largest release is below .10 G and below half of the largest.
    """
    largest, second = sorted((one for one in (*releases, -np.inf, -np.inf) if not np.isnan(one)), reverse=True)[:2]
    return bool(second < min(ONE_DONOR_SHARE * hearing, ONE_DONOR_OF_LARGEST * largest))


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
