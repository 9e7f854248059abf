"""Which role does a head or an MLP play, and how sure are we? Protocol sections 5 and 7, from section 4's effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from av_lens.isolation.measuring.effects import ENCODES, FIRST_RELEASE, Figures, PerNode, donor_of
from av_lens.isolation.measuring.engine import MLP, PRIMARY_DONORS, Node, listed_nodes
from av_lens.isolation.measuring.halves import Half
from av_lens.results.dyadic import Inference
from av_lens.results.record import ENCODER, ENCODING, FEEDER, RELEASING, SUPPRESSORS
from av_lens.results.statistics import Interval, benjamini_hochberg

DIRECT_CUT = DAMAGE_CUT = HELD_CUT = ENCODES_CUT = 0.5
ALL_NODES = 64
"""Up to so many nodes are all measured; above, those that a screen chooses."""
WRITE_CUT = 0.25
HELD = "release with the named MLPs held"
"""At the first token, as direct shares; only heads before a named MLP have it."""
PARTS = {
    "picture writer": ("release {}", "direct {}", "picture"),
    "sound opponent": ("release {}", "direct {}", "sound"),
    "gate": ("release {}", "indirect {}"),
    FEEDER: ("release {}", "held {}", "write {}"),
}
"""What each suppressor's role consists of, by donor; all must hold."""
READS = ("picture", "sound")
"""The parts that use the third clip."""
CARRIERS = {"silenced carrier": "silenced", "sound carrier": "carries"}
"""The estimand that makes a head a carrier."""
Table = Float[np.ndarray, "layer node"]


@dataclass(frozen=True)
class Named:
    """A row of the role table; `through` is the layer of the MLP through which half of its release passes, or -1."""

    layer: int
    head: int
    site: str
    role: str
    donor: str
    p: float
    q: float
    p_maxt: float
    through: int = -1

    @property
    def at(self) -> Node:
        """The node."""
        return self.layer, self.head


@dataclass(frozen=True, eq=False)
class Evidence:
    """A half's effects, per example and node, by (estimand, donor); what `stopped` early passes no test."""

    figures: Figures
    half: Half
    mlps: bool = False
    encoding: bool = False
    stopped: tuple[Node, ...] = ()

    def __getitem__(self, key: str | tuple[str, str]) -> PerNode:
        """An estimand's effects; NaN where it was not measured."""
        name, donor = (key, donor_of(key)) if isinstance(key, str) else key
        if name == FIRST_RELEASE and (name, donor) not in self.figures:
            name = "release"  # where all answers have one token
        if name in ("write", HELD, ENCODES) and (name, donor) not in self.figures:
            return np.full_like(self.figures["release", donor], np.nan)
        return self.figures[name, donor]

    @property
    def nodes(self) -> list[Node]:
        """All nodes, in the order of the tables."""
        n_layers, n_columns = self["silenced"].shape[1:]
        return listed_nodes(n_layers, n_columns, self.mlps)

    @property
    def screened(self) -> bool:
        """Whether there are more nodes than are all measured; the first edition measures all."""
        return self.mlps and len(self.nodes) > ALL_NODES

    @property
    def measured(self) -> list[Node]:
        """The nodes that have a release."""
        known = ~np.isnan(self.largest_release)
        return [node for node in self.nodes if known[node]]

    @property
    def holds(self) -> bool:
        """Whether anything was measured with MLPs held."""
        return any(name == HELD for name, _ in self.figures)

    def by_donor(self, name: str) -> dict[str, PerNode]:
        """An estimand's effects by each primary donor."""
        return {donor: self[name, donor] for donor in PRIMARY_DONORS}

    @property
    def largest_release(self) -> Table:
        """Each node's largest mean release over the primary donors; NaN where not measured."""
        return np.fmax.reduce([head_means(values) for values in self.by_donor("release").values()])

    @property
    def donors(self) -> np.ndarray:
        """Each node's primary donor: the one with the largest mean release."""
        means = np.stack([head_means(values) for values in self.by_donor("release").values()])
        return np.array(PRIMARY_DONORS, dtype=object)[np.where(np.isnan(means), -np.inf, means).argmax(0)]


@dataclass(frozen=True, eq=False)
class Tests:
    """p-values of a half. By (role, donor): `p`, `p_maxt`; of the release alone by donor; donor "" for the carriers."""

    p: Mapping[tuple[str, str], Table]
    p_maxt: Mapping[tuple[str, str], Table]
    release_p: Mapping[str, Table]
    release_p_maxt: Mapping[str, Table]
    encoding: bool = False

    def of(self, row: Named) -> float:
        """Give the p of a named row."""
        table = self.p.get((row.role, row.donor), self.release_p.get(row.donor))
        return float("nan") if table is None else float(table[row.at])


def family_size(n_heads: int, n_sites: int, n_mlps: int = 0, *, n_encoding: int = 0) -> int:
    """Count the tests that q corrects for, `n_encoding` of the sites being `audio` or `video` (protocol section 7)."""
    of_mlp = len(SUPPRESSORS) * len(PRIMARY_DONORS)
    of_head = of_mlp + (len(PRIMARY_DONORS) if n_mlps else 0) + len(CARRIERS)
    whole = n_heads * of_head + n_mlps * of_mlp
    small = 2 * (n_heads + n_mlps) + n_heads * len(CARRIERS) if n_mlps else whole
    return (n_sites - n_encoding) * whole + n_encoding * small


def run_tests(found: Evidence, *, s: float, family: int, seed: int) -> Tests:
    """Test every part of every role on one half."""
    return run_tests_together([found], s=s, family=family, seed=seed)[0]


def run_tests_together(found: Sequence[Evidence], *, s: float, family: int, seed: int) -> list[Tests]:
    """Test several sites of one half in the same flips, so that max-T is over all of them."""
    holds = any(one.holds for one in found)
    parts = [_parts(one, s, holds) for one in found]
    names = list(parts[0])
    stacked = np.stack([np.stack([part[name] for name in names], axis=-1) for part in parts], axis=-1)
    for i, one in enumerate(found):
        for node in one.stopped:
            stacked[:, *node, :, i] = np.nan
    p, p_maxt = np.full((2, *stacked.shape[1:]), np.nan)
    for inference, some in _by_rule(found[0].half, names):
        tested = inference.test(stacked[..., some, :], family=family, seed=seed)
        p[..., some, :], p_maxt[..., some, :] = tested.p, tested.p_maxt
    for i, one in enumerate(found):
        for node in one.stopped:
            p[*node, :, i] = 1.0
    if found[0].screened:  # who was measured was chosen by the same conflicts
        p_maxt = np.minimum(1.0, p * family)
    encoding = any(one.encoding for one in found)
    return [_by_role(names, p[..., i], p_maxt[..., i], encoding, one.encoding) for i, one in enumerate(found)]


def _by_rule(half: Half, names: Sequence[str]) -> list[tuple[Inference, list[int]]]:
    """Group the parts that are tested together: all, or those that use the third clip apart."""
    reads = [number for number, name in enumerate(names) if name in READS and half.third is not None]
    rest = [number for number in range(len(names)) if number not in reads]
    return [(half.boot, rest), *([(half.third, reads)] if half.third is not None else [])]


def _parts(found: Evidence, s: float, holds: bool) -> dict[str, PerNode]:
    """What must be above 0 for each part of a role."""
    delta = (s * found.half.G)[:, None, None]
    parts: dict[str, PerNode] = {}
    for donor in PRIMARY_DONORS:
        release, first = found["release", donor], found[FIRST_RELEASE, donor]
        parts[f"release {donor}"] = release - delta
        parts[f"direct {donor}"] = found["direct", donor] - DIRECT_CUT * first
        parts[f"indirect {donor}"] = -parts[f"direct {donor}"]
        if holds:
            parts[f"held {donor}"] = HELD_CUT * first - found[HELD, donor]
            parts[f"write {donor}"] = WRITE_CUT * first - found["write", donor]
    parts["picture"] = found["reads picture"] - found["reads sound"]
    parts["sound"] = -parts["picture"]
    parts |= {estimand: found[estimand] - delta for estimand in CARRIERS.values()}
    if found.mlps:  # MLPs are no carriers
        for estimand in CARRIERS.values():
            parts[estimand][..., MLP] = np.nan
    return parts


def _by_role(
    names: Sequence[str], of_parts: np.ndarray, maxt_of_parts: np.ndarray, encoding: bool, here: bool
) -> Tests:
    """A role's p is the largest of its parts'; `encoding` where some site, `here` where this one is audio or video."""
    roles = {role: parts for role, parts in PARTS.items() if role != FEEDER or f"held {PRIMARY_DONORS[0]}" in names}
    needs = {(role, donor): [part.format(donor) for part in parts]
             for donor in PRIMARY_DONORS for role, parts in roles.items()}  # fmt: skip
    needs = {key: [] if here else parts for key, parts in needs.items()}
    if encoding:
        needs |= {(ENCODING, donor): [f"release {donor}"] if here else [] for donor in PRIMARY_DONORS}
    needs |= {(role, ""): [estimand] for role, estimand in CARRIERS.items()}
    nowhere = np.full(of_parts.shape[:-1], np.nan)
    both = [{name: table[..., number] for number, name in enumerate(names)} for table in (of_parts, maxt_of_parts)]
    p, p_maxt = (
        {key: np.max([one[name] for name in parts], axis=0) if parts else nowhere for key, parts in needs.items()}
        for one in both
    )
    release, release_maxt = ({donor: one[f"release {donor}"] for donor in PRIMARY_DONORS} for one in both)
    return Tests(p, p_maxt, release, release_maxt, here)


def with_feeders(tests: Tests, again: Tests) -> Tests:
    """Take feeders' p from tests that hold MLPs; all else stays."""
    added = [{key: p for key, p in table.items() if key[0] == FEEDER} for table in (again.p, again.p_maxt)]
    return replace(tests, p={**tests.p, **added[0]}, p_maxt={**tests.p_maxt, **added[1]})


def adjust(tests: Sequence[Tests], *, family: int) -> tuple[list[dict[tuple[str, str], Table]], list[dict[str, Table]]]:
    """Correct for the family over all sites: q of every role, and q of the release alone."""
    keys = list(tests[0].p)
    role_p = np.stack([np.stack([test.p[key] for key in keys]) for test in tests])
    swapped = np.stack([np.stack([test.release_p.get(key[1], test.p[key]) for key in keys]) for test in tests])
    feeders = [number for number, key in enumerate(keys) if key[0] == FEEDER]
    swapped[:, feeders] = np.where(np.isnan(role_p[:, feeders]), np.nan, swapped[:, feeders])
    if any(test.encoding for test in tests):  # each site has the roles of its kind alone
        other = [[key[0] != ENCODING and key[1] != "" if test.encoding else key[0] == ENCODING for key in keys]
                 for test in tests]  # fmt: skip
        swapped[np.array(other)] = np.nan
    # The family is the one that was written down: donors and sites that could not be measured still count.
    q, release_q = (_adjusted(p, feeders, family) for p in (role_p, swapped))
    by_role = [{key: q[i, k] for k, key in enumerate(keys)} for i in range(len(tests))]
    roles = [ENCODING if test.encoding else "gate" for test in tests]
    return by_role, [
        {donor: release_q[i, keys.index((role, donor))] for donor in PRIMARY_DONORS} for i, role in enumerate(roles)
    ]


def _adjusted(p: np.ndarray, feeders: list[int], family: int) -> np.ndarray:
    """Without feeders, and for heads once more with them."""
    if not feeders:
        return benjamini_hochberg(p, family=family)
    alone = p.copy()
    alone[:, feeders] = np.nan
    q = benjamini_hochberg(p, family=family)
    q[..., MLP] = benjamini_hochberg(alone, family=family)[..., MLP]
    return q


def head_means(values: PerNode) -> Table:
    """Average over the examples where a node was measured."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


LEVEL = 0.05
NOWHERE = Interval(*np.full((3, 0), np.nan))


@dataclass(frozen=True, eq=False)
class Cuts:
    """The intervals `[layer, node]` that decide a role (protocol section 5), by the chosen donor of each node."""

    release: Interval
    damage: Interval
    rise: Interval
    share: Interval
    write: Interval
    lost: Interval
    reads: Interval
    reads_picture: Interval
    reads_sound: Interval
    delta: float
    encodes: Interval = NOWHERE
    encoding: bool = False

    @classmethod
    def of(cls, found: Evidence, donors: np.ndarray, *, s: float) -> Cuts:
        """Compute the intervals, each node's by its own donor; `donors` is `[layer, node]`."""

        def chosen(name: str) -> PerNode:
            of = found.by_donor(name)
            return np.select([donors == donor for donor in of], list(of.values()), np.nan)

        boot, third, release = found.half.boot, found.half.by("wa"), chosen("release")
        first, unknown = chosen(FIRST_RELEASE), np.full(donors.shape, np.nan)
        known = found.holds
        return cls(
            release=boot.mean(release),
            damage=boot.mean(chosen("fall of G") - DAMAGE_CUT * release),
            rise=boot.mean(chosen("rise over others")),
            share=boot.ratio(chosen("direct"), first),
            write=boot.ratio(chosen("write"), first) if known else Interval(unknown, unknown, unknown),
            lost=boot.ratio(first - chosen(HELD), first) if known else Interval(unknown, unknown, unknown),
            reads=third.mean(found["reads picture"] - found["reads sound"]),
            reads_picture=third.mean(found["reads picture"]),
            reads_sound=third.mean(found["reads sound"]),
            delta=found.half.delta(s),
            encodes=boot.mean(chosen(ENCODES) - ENCODES_CUT * release) if found.encoding else NOWHERE,
            encoding=found.encoding,
        )


def suppressor_role(cuts: Cuts, at: Node, passes: Mapping[str, bool]) -> str:
    """Name what a node whose release passes does."""
    if cuts.damage.high[at] >= 0 or cuts.rise.low[at] <= -cuts.delta:
        return "breaks"
    if cuts.encoding:
        encodes = cuts.encodes.low[at] >= 0
        return ENCODER if encodes else ENCODING if cuts.encodes.high[at] < 0 else "undetermined"
    if cuts.lost.low[at] >= HELD_CUT and cuts.write.high[at] < WRITE_CUT and passes[FEEDER]:
        return FEEDER
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


CUT_ROLES = (*SUPPRESSORS, FEEDER)
"""Roles that cuts tell apart."""


def classify(
    found: Evidence,
    tests: Tests,
    q: Mapping[tuple[str, str], Table],
    release_q: Mapping[str, Table],
    *,
    s: float,
    site: str,
    mlps: Sequence[int] = (),
) -> list[Named]:
    """Give every node its roles on discovery, by its primary donor: none, one, or two where it also carries sound."""
    donors = found.donors
    cuts = Cuts.of(found, donors, s=s)
    means = {role: head_means(found[estimand]) for role, estimand in CARRIERS.items()}
    out: list[Named] = []
    for at in found.nodes:
        donor = str(donors[at])
        roles: list[tuple[str, str]] = []
        if cuts.release.value[at] > cuts.delta and release_q[donor][at] < LEVEL:
            passes = {r: (r, donor) in q and bool(q[r, donor][at] < LEVEL) for r in CUT_ROLES}
            roles.append((suppressor_role(cuts, at, passes), donor))
        for role in CARRIERS if at[1] != MLP else ():
            first = role == "sound carrier" or not roles
            if first and means[role][at] > cuts.delta and q[role, ""][at] < LEVEL:
                roles.append((role, ""))
        for key in roles:
            by = key[1]
            of_role = (tests.p, q, tests.p_maxt)
            tables = [table[key] for table in of_role] if key in tests.p else [
                tests.release_p[by], release_q[by], tests.release_p_maxt[by]]  # fmt: skip
            through = next((one for one in mlps if one >= at[0]), -1) if by and cuts.lost.low[at] >= HELD_CUT else -1
            out.append(Named(*at, site, *key, *(float(table[at]) for table in tables), through=through))
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
        elif row.role in (*RELEASING, FEEDER, ENCODER):
            again = suppressor_role(cuts, row.at, dict.fromkeys(CUT_ROLES, True))
            same = again == row.role or (row.role == "undetermined" and again != "breaks")
            out.append(bool(cuts.release.value[row.at] > cuts.delta and same))
        else:
            out.append(bool(head_means(found[CARRIERS[row.role]])[row.at] > cuts.delta))
    return out
