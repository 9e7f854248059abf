"""The table of heads: what each named head does, its two halves side by side, and what it is besides.

One row per (head, site, role). `effect low high` are confirmation's, of the row's estimand: a suppressor's release by
its donor, what is silenced, or what is carried. A member of the set that no single release named has its release with
the other members edited (`estimand` "release in the set").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.isolation.measuring.estimands import ESTIMANDS, donor_of
from av_lens.isolation.measuring.logit_writes import DLA
from av_lens.isolation.naming.evidence import Searched, SiteEvidence
from av_lens.isolation.naming.role_tests import CARRIERS, Evidence, Named, head_means
from av_lens.isolation.naming.roles import LEVEL
from av_lens.isolation.sets.confirmation import Held
from av_lens.results.halves import CONFIRMATION, DISCOVERY
from av_lens.results.tables import RELEASING

IN_THE_SET = "release in the set"


def head_rows(searched: Searched, held: Held) -> list[dict[str, Any]]:
    """Write `found.heads`: one row per (head, site, role), largest effect on confirmation first."""
    rows = [_head_row(row, searched, held) for row in (*searched.named, *held.named_members)]
    return sorted(rows, key=lambda row: (-abs(row["effect"]), row["layer"], row["head"], row["role"]))


def _head_row(row: Named, searched: Searched, held: Held) -> dict[str, Any]:
    site, again = searched.sites[row.site], held.sites.get(row.site)
    of_set, chosen = row in held.named_members, held.chosen
    joined = chosen is not None and row.site == searched.first.site and row.at in chosen.members
    estimand = CARRIERS.get(row.role, "release")
    key = (estimand, row.donor or donor_of(estimand))
    out: dict[str, Any] = {
        "layer": row.layer, "head": row.head, "site": row.site, "role": row.role,
        "estimand": IN_THE_SET if of_set else estimand, "donor": key[1],
        "member_of": chosen.name if chosen is not None and joined and estimand == "release" else "",
        "q": row.q, "p_maxt": row.p_maxt, "discovery_p": row.p, "p_holm": held.holm_p.get(row, float("nan")),
        "confirmed": held.confirmed.get(row, False), "flags": _flags(row, searched, held),
    }  # fmt: skip
    both = (site.evidence, again.evidence if again else None)
    if of_set:
        both = (held.in_context[DISCOVERY].evidence, held.in_context[CONFIRMATION].evidence)
    for evidence, prefix in zip(both, ("discovery_", ""), strict=True):
        if evidence is not None:
            out |= _figures(evidence, row, key, prefix)
    return out | _side_by_side(again or site, row)


def _figures(evidence: Evidence, row: Named, key: tuple[str, str], prefix: str) -> dict[str, float]:
    """A row's effect on one half, with its interval, its share of G and its direct share."""
    at, half = (slice(None), *row.at), evidence.half
    effect = evidence[key][at]
    share = half.share(effect)
    out = half.bounded(effect, "effect", prefix) | {f"{prefix}share": share["share"]} | ({} if prefix else share)
    if key[0] == "release":
        out[f"{prefix}direct_share"] = float(half.boot.ratio(evidence["direct", row.donor][at], effect).value)
    return out


def _side_by_side(site: SiteEvidence, row: Named) -> dict[str, Any]:
    """A head's other estimands: those of one donor, and of several donors the row's own."""
    at, columns = (slice(None), *row.at), {"dla": site.evidence[DLA]}
    several = [one.column for one in ESTIMANDS]
    for one in ESTIMANDS:
        if one.column and (several.count(one.column) == 1 or one.donor == row.donor):
            columns[one.column] = site.evidence[one.name, one.donor]
    return {name: float(np.nanmean(v[at])) if (~np.isnan(v[at])).any() else float("nan") for name, v in columns.items()}


def _flags(row: Named, searched: Searched, held: Held) -> str:
    """Mark a suppressor that zero alone finds (its output is the same in every cell), and a role that did not hold."""
    if row.role not in RELEASING:
        return ""
    if row in held.named_members:
        return "named as a member: its release with the other members edited"
    flags: list[str] = []
    if row.donor == "zero" and not any(searched.passes(row, donor) for donor in PRIMARY_DONORS if donor != "zero"):
        flags.append("always on")
    site = held.sites.get(row.site)
    if site is not None and not held.confirmed.get(row, False):
        mean = head_means(site.evidence["release", row.donor])[row.at]
        if site.tests.release_p[row.donor][row.at] < LEVEL and mean > site.evidence.half.delta(searched.s):
            flags.append("the release holds (p uncorrected), the role does not")
    return "; ".join(flags)
