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

from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.isolation.measuring.estimands import Figures, PerHead, donor_of
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.recordings import Head
from av_lens.results.statistics import benjamini_hochberg, sign_flips

DIRECT_CUT = DAMAGE_CUT = 0.5
PARTS = {
    "picture writer": ("release {}", "direct {}", "picture"),
    "sound opponent": ("release {}", "direct {}", "sound"),
    "gate": ("release {}", "indirect {}"),
}
"""What each suppressor's role consists of, by donor; all must hold."""
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
        return self.figures[(key, donor_of(key)) if isinstance(key, str) else key]

    def by_donor(self, name: str) -> dict[str, PerHead]:
        """An estimand's effects by each primary donor."""
        return {donor: self.figures[name, donor] for donor in PRIMARY_DONORS}

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
    flips = sign_flips(stacked, found[0].half.components, family=family, seed=seed)
    return [_by_role(names, flips.p[..., i], flips.p_maxt[..., i]) for i in range(len(found))]


def _parts(found: Evidence, s: float) -> dict[str, PerHead]:
    """What must be above 0 for each part of a role."""
    delta = (s * found.half.G)[:, None, None]
    parts: dict[str, PerHead] = {}
    for donor in PRIMARY_DONORS:
        release = found["release", donor]
        parts[f"release {donor}"] = release - delta
        parts[f"direct {donor}"] = found["direct", donor] - DIRECT_CUT * release
        parts[f"indirect {donor}"] = -parts[f"direct {donor}"]
    parts["picture"] = found["reads picture"] - found["reads sound"]
    parts["sound"] = -parts["picture"]
    return parts | {estimand: found[estimand] - delta for estimand in CARRIERS.values()}


def _by_role(names: Sequence[str], of_parts: np.ndarray, maxt_of_parts: np.ndarray) -> Tests:
    """A role's p is the largest of its parts'."""
    needs = {(role, donor): [part.format(donor) for part in parts]
             for donor in PRIMARY_DONORS for role, parts in PARTS.items()}  # fmt: skip
    needs |= {(role, ""): [estimand] for role, estimand in CARRIERS.items()}
    single, maxt = (
        {key: np.max([table[..., names.index(name)] for name in parts], axis=0) for key, parts in needs.items()}
        for table in (of_parts, maxt_of_parts)
    )
    release = {donor: names.index(f"release {donor}") for donor in PRIMARY_DONORS}
    return Tests(
        single,
        maxt,
        {donor: of_parts[..., i] for donor, i in release.items()},
        {donor: maxt_of_parts[..., i] for donor, i in release.items()},
    )


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
