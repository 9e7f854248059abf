"""How sure are we of each head's effects? The evidence of a half, and the p-values of every part of every role.

p is a one-sided sign flip by component of effect - s G. A role's p is the largest of its parts: release;
direct - release / 2 (for a gate release / 2 - direct); the difference of the reads. q is Benjamini-Hochberg over
heads x sites x [3 roles x 3 donors + silenced + carries]. A second Benjamini-Hochberg over the same family, each role's
p replaced by its release part, says whether the release itself passes. (Protocol sections 5 and 7.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from av_lens.isolation.measuring.bench import PRIMARY_DONORS
from av_lens.isolation.measuring.effects import Effect, Request
from av_lens.results.statistics import Bootstrap, benjamini_hochberg, sign_flips
from av_lens.results.tables import SUPPRESSORS

DIRECT_CUT = DAMAGE_CUT = 0.5
PerHead = Float[np.ndarray, "example layer head"]
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
    """p-values of a half. By (role, donor): `p`, `p_maxt`; of the release alone by donor; donor "" for the carriers."""

    p: Mapping[tuple[str, str], Table]
    p_maxt: Mapping[tuple[str, str], Table]
    release_p: Mapping[str, Table]
    release_p_maxt: Mapping[str, Table]

    def of(self, row: Named) -> float:
        """Give the p of a named row.

        Args:
            row: the row.

        Returns:
            The role's p; the release's where the role has none of its own (breaks, undetermined).
        """
        table = self.p.get((row.role, row.donor), self.release_p.get(row.donor))
        return float("nan") if table is None else float(table[row.layer, row.head])


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
    return run_tests_together([found], s=s, family=family, seed=seed)[0]


def run_tests_together(found: Sequence[Evidence], *, s: float, family: int, seed: int) -> list[Tests]:
    """Test several sites of one half in the same flips, so that max-T is over all of them.

    Args:
        found: the evidence of each site.
        s: the threshold, a share of G.
        family: the size of the whole family, which sets how many flips are sampled.
        seed: of the sampled flips.

    Returns:
        Each site's p-values.
    """
    parts = [_parts(one, s) for one in found]
    names = list(parts[0])
    stacked = np.stack([np.stack([part[name] for name in names], axis=-1) for part in parts], axis=-1)
    flips = sign_flips(stacked, found[0].components, family=family, seed=seed)
    return [_by_role(names, flips.p[..., i], flips.p_maxt[..., i]) for i in range(len(found))]


def _parts(found: Evidence, s: float) -> dict[str, PerHead]:
    """What must be above 0 for each part of a role."""
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
    return parts


def _by_role(names: Sequence[str], of_parts: np.ndarray, maxt_of_parts: np.ndarray) -> Tests:
    """A role's p is the largest of its parts'."""
    single = {name: of_parts[..., i] for i, name in enumerate(names)}
    maxt = {name: maxt_of_parts[..., i] for i, name in enumerate(names)}
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
    release = {donor: f"release {donor}" for donor in PRIMARY_DONORS}
    return Tests(
        p,
        p_maxt,
        {donor: single[name] for donor, name in release.items()},
        {donor: maxt[name] for donor, name in release.items()},
    )


def adjust(
    tests: Sequence[Tests], *, n_sites: int | None = None
) -> tuple[list[dict[tuple[str, str], Table]], list[dict[str, Table]]]:
    """Correct for the family over all sites: q of every role, and q of the release alone.

    Args:
        tests: one per site set.
        n_sites: how many sites were asked for, where not all of them exist; None for as many as there are tests.

    Returns:
        Per site: q by (role, donor), and q of the release by donor.
    """
    keys = list(tests[0].p)
    role_p = np.stack([np.stack([test.p[key] for key in keys]) for test in tests])
    swapped = np.stack([np.stack([test.release_p.get(key[1], test.p[key]) for key in keys]) for test in tests])
    # The family is the one that was written down: donors and sites that could not be measured still count.
    family = role_p[0].size * (n_sites or len(tests))
    q, release_q = (benjamini_hochberg(p, family=family) for p in (role_p, swapped))
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


def largest_release(found: Evidence) -> Table:
    """Take each head's largest mean release over the primary donors.

    Args:
        found: the evidence.

    Returns:
        `[layer, head]`, NaN where none was measured.
    """
    return np.fmax.reduce([head_means(found.release[donor]) for donor in PRIMARY_DONORS])


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
