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
rows that were given a name (breaks and undetermined are not names), and the same cuts give the same role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from av_lens.isolation.bench import PRIMARY_DONORS
from av_lens.isolation.effects import Effect, Request
from av_lens.results.statistics import Bootstrap, Interval, benjamini_hochberg, sign_flips
from av_lens.results.tables import SUPPRESSORS

LEVEL = 0.05
DIRECT_CUT = 0.5
PerHead = Float[np.ndarray, "example layer head"]
Table = Float[np.ndarray, "layer head"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """A half's effects, per example and head, with what is needed to judge them.

    `release`, `direct`, `fall` (of G) and `rise` are by donor; `G` and `C` are per example.
    """

    release: Mapping[str, PerHead]
    direct: Mapping[str, PerHead]
    fall: Mapping[str, PerHead]
    rise: Mapping[str, PerHead]
    reads_picture: PerHead
    reads_sound: PerHead
    silenced: PerHead
    carries: PerHead
    sufficiency: PerHead
    mean_task: PerHead
    G: Float[np.ndarray, " example"]
    C: Float[np.ndarray, " example"]
    components: Sequence[int]
    boot: Bootstrap

    @classmethod
    def of(
        cls,
        effects: Mapping[Request, Effect],
        *,
        G: Float[np.ndarray, " example"],
        C: Float[np.ndarray, " example"],
        components: Sequence[int],
        boot: Bootstrap,
    ) -> Evidence:
        """Name the effects of `effects.requests`.

        Args:
            effects: the outcome of every request.
            G: hearing with nothing to see, per example.
            C: hearing under conflict, per example.
            components: the component of each example.
            boot: the half's weights.

        Returns:
            The evidence; NaN where a request was not made.
        """
        some = next(iter(effects.values())).margin
        none = np.full_like(some, np.nan)

        def margin(base: str, donor: str, *, freeze: bool = False) -> PerHead:
            found = effects.get(Request(base, donor, freeze))
            return none if found is None else found.margin

        donors = PRIMARY_DONORS
        return cls(
            release={d: margin("va", d) for d in donors},
            direct={d: margin("va", d, freeze=True) for d in donors},
            fall={d: -margin("blank_a", d) for d in donors},
            rise={d: effects[Request("va", d)].rise if Request("va", d) in effects else none for d in donors},
            reads_picture=margin("va", "wa"),
            reads_sound=margin("va", "vw"),
            silenced=margin("va", "blank_a") - margin("va", "blank_muted"),
            carries=-margin("blank_a", "blank_muted"),
            sufficiency=-margin("blank_a", "va"),
            mean_task=margin("va", "mean_task"),
            G=G,
            C=C,
            components=components,
            boot=boot,
        )


@dataclass(frozen=True, eq=False)
class Tests:
    """p-values of a half. By (role, donor): `p`, `p_maxt`; `release_p` by donor; donor "" for the carriers."""

    p: Mapping[tuple[str, str], Table]
    p_maxt: Mapping[tuple[str, str], Table]
    release_p: Mapping[str, Table]


def family_size(n_heads: int, n_sites: int) -> int:
    """Count the tests that q corrects for: heads x sites x (3 roles x 3 donors + silenced + carries).

    Args:
        n_heads: heads of all layers.
        n_sites: site sets searched.

    Returns:
        The number of tests.
    """
    return n_heads * n_sites * (len(SUPPRESSORS) * len(PRIMARY_DONORS) + 2)


def run_tests(found: Evidence, *, s: float, family: int, seed: int) -> Tests:
    """Test every part of every role on one half.

    Args:
        found: the evidence.
        s: the threshold, a share of G.
        family: the size of the whole family, which sets how many flips are sampled.
        seed: of the sampled flips.

    Returns:
        The p-values.
    """
    delta = (s * found.G)[:, None, None]
    parts: dict[str, PerHead] = {}
    for donor in PRIMARY_DONORS:
        parts[f"release {donor}"] = found.release[donor] - delta
        parts[f"direct {donor}"] = found.direct[donor] - DIRECT_CUT * found.release[donor]
        parts[f"indirect {donor}"] = -parts[f"direct {donor}"]
    parts["picture"] = found.reads_picture - found.reads_sound
    parts["sound"] = -parts["picture"]
    parts["silenced"] = found.silenced - delta
    parts["carries"] = found.carries - delta
    names = list(parts)
    flips = sign_flips(np.stack([parts[name] for name in names], axis=-1), found.components, family=family, seed=seed)
    single = {name: flips.p[..., i] for i, name in enumerate(names)}
    maxt = {name: flips.p_maxt[..., i] for i, name in enumerate(names)}
    p: dict[tuple[str, str], Table] = {}
    p_maxt: dict[tuple[str, str], Table] = {}
    for donor in PRIMARY_DONORS:
        needs = {
            "picture writer": (f"release {donor}", f"direct {donor}", "picture"),
            "sound opponent": (f"release {donor}", f"direct {donor}", "sound"),
            "gate": (f"release {donor}", f"indirect {donor}"),
        }
        for role, of in needs.items():
            p[role, donor] = np.max([single[name] for name in of], axis=0)
            p_maxt[role, donor] = np.max([maxt[name] for name in of], axis=0)
    for role, name in (("silenced carrier", "silenced"), ("sound carrier", "carries")):
        p[role, ""], p_maxt[role, ""] = single[name], maxt[name]
    return Tests(p, p_maxt, {donor: single[f"release {donor}"] for donor in PRIMARY_DONORS})


def adjust(tests: Sequence[Tests]) -> tuple[list[dict[tuple[str, str], Table]], list[dict[str, Table]]]:
    """Correct for the family over all sites: q of every role, and q of the release alone.

    Args:
        tests: one per site set.

    Returns:
        Per site: q by (role, donor), and q of the release by donor.
    """
    keys = list(tests[0].p)
    role_p = np.stack([np.stack([test.p[key] for key in keys]) for test in tests])
    swapped = np.stack([np.stack([test.release_p.get(key[1], test.p[key]) for key in keys]) for test in tests])
    q, release_q = benjamini_hochberg(role_p), benjamini_hochberg(swapped)
    by_role = [{key: q[i, k] for k, key in enumerate(keys)} for i in range(len(tests))]
    gate = {donor: keys.index(("gate", donor)) for donor in PRIMARY_DONORS}
    return by_role, [{donor: release_q[i, k] for donor, k in gate.items()} for i in range(len(tests))]


def pick_donors(found: Evidence) -> np.ndarray:
    """Choose each head's primary donor: the one with the largest mean release.

    Args:
        found: discovery's evidence.

    Returns:
        `[layer, head]` of donor names.
    """
    means = np.stack([head_means(found.release[donor]) for donor in PRIMARY_DONORS])
    return np.array(PRIMARY_DONORS, dtype=object)[np.where(np.isnan(means), -np.inf, means).argmax(0)]


def head_means(values: PerHead) -> Table:
    """Average over the examples where a head was measured.

    Args:
        values: per example and head.

    Returns:
        The means, NaN for heads that were not measured.
    """
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


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
        """Compute the intervals.

        Args:
            found: a half's evidence.
            donors: each head's donor.
            s: the threshold, a share of G.

        Returns:
            The intervals.
        """

        def chosen(of: Mapping[str, PerHead]) -> PerHead:
            out = np.full_like(of[PRIMARY_DONORS[0]], np.nan)
            for donor in PRIMARY_DONORS:
                out[:, donors == donor] = of[donor][:, donors == donor]
            return out

        boot, release = found.boot, chosen(found.release)
        return cls(
            release=boot.mean(release),
            damage=boot.mean(chosen(found.fall) - 0.5 * release),
            rise=boot.mean(chosen(found.rise)),
            share=boot.ratio(chosen(found.direct), release),
            reads=boot.mean(found.reads_picture - found.reads_sound),
            reads_picture=boot.mean(found.reads_picture),
            reads_sound=boot.mean(found.reads_sound),
            delta=float(s * found.G.mean()),
        )


def suppressor_role(cuts: Cuts, layer: int, head: int, passes: Mapping[str, bool]) -> str:
    """Name what a head whose release passes does.

    Args:
        cuts: the half's intervals.
        layer: the head's layer.
        head: the head.
        passes: for each suppressor role, whether its own test passes.

    Returns:
        "breaks", one of the three suppressors, or "undetermined".
    """
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


def classify(
    found: Evidence,
    tests: Tests,
    q: Mapping[tuple[str, str], Table],
    release_q: Mapping[str, Table],
    *,
    s: float,
    site: str,
) -> list[Named]:
    """Give every head its roles on discovery.

    Args:
        found: discovery's evidence.
        tests: its p-values.
        q: by (role, donor), from `adjust`.
        release_q: of the release alone, by donor.
        s: the threshold, a share of G.
        site: the site set.

    Returns:
        One row per head and role; heads that pass nothing have none.
    """
    donors = pick_donors(found)
    cuts = Cuts.of(found, donors, s=s)
    carried = {"silenced carrier": found.silenced, "sound carrier": found.carries}
    means = {role: head_means(values) for role, values in carried.items()}
    out: list[Named] = []
    for layer, head in np.ndindex(donors.shape):
        at, donor = (layer, head), str(donors[layer, head])
        roles: list[tuple[str, str]] = []
        if cuts.release.value[at] > cuts.delta and release_q[donor][at] < LEVEL:
            role = suppressor_role(cuts, layer, head, {r: bool(q[r, donor][at] < LEVEL) for r in SUPPRESSORS})
            roles.append((role, donor))
        for role in ("silenced carrier", "sound carrier"):
            first = role == "sound carrier" or not roles
            if first and means[role][at] > cuts.delta and q[role, ""][at] < LEVEL:
                roles.append((role, ""))
        for role, by in roles:
            if (role, by) in tests.p:
                figures = tests.p[role, by][at], q[role, by][at], tests.p_maxt[role, by][at]
            else:
                figures = tests.release_p[by][at], release_q[by][at], np.nan
            out.append(Named(layer, head, site, role, by, *(float(f) for f in figures)))
    return out


def confirm(found: Evidence, rows: Sequence[Named], holm_p: Sequence[float], *, s: float) -> list[bool]:
    """Say which rows hold on confirmation: same sign, role, site and donor, Holm's p below .05.

    Args:
        found: confirmation's evidence at the rows' site (other heads NaN).
        rows: discovery's rows.
        holm_p: their adjusted p on confirmation.
        s: the threshold, a share of G.

    Returns:
        True where the row is confirmed.
    """
    donors = np.full(found.silenced.shape[1:], PRIMARY_DONORS[0], dtype=object)
    for row in rows:
        if row.donor:
            donors[row.layer, row.head] = row.donor
    cuts = Cuts.of(found, donors, s=s)
    out: list[bool] = []
    for row, p in zip(rows, holm_p, strict=True):
        at = (row.layer, row.head)
        if not p < LEVEL:
            out.append(False)
        elif row.role in SUPPRESSORS:
            again = suppressor_role(cuts, row.layer, row.head, dict.fromkeys(SUPPRESSORS, True))
            out.append(bool(cuts.release.value[at] > cuts.delta and again == row.role))
        else:
            values = found.silenced if row.role == "silenced carrier" else found.carries
            out.append(bool(head_means(values)[at] > cuts.delta))
    return out
