"""The table of heads: what each named head does, its two halves side by side, and what it is besides.

One row per (head, site, role). A member of the chosen set that no single release would have named stands here too,
with the role, the effect and the test that it has while the other members are edited (`members`): its estimand is
"release in the set", and its single figures stand beside.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from av_lens.isolation.measuring.bench import PRIMARY_DONORS
from av_lens.isolation.naming.evidence import Searched, SiteEvidence
from av_lens.isolation.naming.role_tests import Evidence, Named, head_means
from av_lens.isolation.naming.roles import LEVEL
from av_lens.isolation.sets.confirmation import Held
from av_lens.results.halves import CONFIRMATION, DISCOVERY
from av_lens.results.tables import RELEASING

IN_THE_SET = "release in the set"


def head_rows(searched: Searched, held: Held) -> list[dict[str, Any]]:
    """Write `found.heads`: one row per (head, site, role), largest effect on confirmation first.

    Args:
        searched: what discovery found.
        held: what confirmation found.

    Returns:
        The rows.
    """
    rows = [_head_row(row, searched, held) for row in searched.named]
    rows += [_head_row(row, searched, held) for row in held.named_members]
    return sorted(rows, key=lambda row: (-abs(row["effect"]), row["layer"], row["head"], row["role"]))


def _head_row(row: Named, searched: Searched, held: Held) -> dict[str, Any]:
    site, again = searched.sites[row.site], held.sites.get(row.site)
    at, of_set = (slice(None), row.layer, row.head), row in held.named_members
    chosen = held.searched.chosen
    joined = chosen is not None and row.site == searched.first.site and (row.layer, row.head) in chosen.members
    estimand = {"silenced carrier": "silenced", "sound carrier": "carries"}.get(row.role, "release")
    out: dict[str, Any] = {
        "layer": row.layer, "head": row.head, "site": row.site, "role": row.role,
        "estimand": IN_THE_SET if of_set else estimand,
        "donor": row.donor or {"silenced": "blank_a - blank_muted", "carries": "blank_muted"}[estimand],
        "member_of": chosen.name if chosen is not None and joined and estimand == "release" else "",
        "q": row.q, "p_maxt": row.p_maxt, "discovery_p": row.p, "p_holm": held.holm_p.get(row, float("nan")),
        "confirmed": held.confirmed.get(row, False), "flags": _flags(row, searched, held),
    }  # fmt: skip
    both = (site.evidence, again.evidence if again else None)
    if of_set:
        both = (held.in_context[DISCOVERY].evidence, held.in_context[CONFIRMATION].evidence)
    for evidence, prefix in zip(both, ("discovery_", ""), strict=True):
        if evidence is not None:
            out |= _figures(evidence, row, estimand, prefix)
    return out | _side_by_side(again or site, at, row.donor)


def _figures(evidence: Evidence, row: Named, estimand: str, prefix: str) -> dict[str, float]:
    """A row's effect on one half, with its interval, its share of G and its direct share."""
    at = (slice(None), row.layer, row.head)
    values = {"release": evidence.release.get(row.donor), "silenced": evidence.silenced, "carries": evidence.carries}
    effect = values[estimand]
    assert effect is not None
    boot = evidence.boot
    mean, share = boot.mean(effect[at]), boot.ratio(effect[at], evidence.G)
    out = {f"{prefix}{name}": float(getattr(mean, name)) for name in ("low", "high")}
    out |= {f"{prefix}effect": float(mean.value), f"{prefix}share": float(share.value)}
    if not prefix:
        out |= {"share_low": float(share.low), "share_high": float(share.high)}
    if estimand == "release":
        out[f"{prefix}direct_share"] = float(boot.ratio(evidence.direct[row.donor][at], effect[at]).value)
    return out


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
    if row in held.named_members:
        return "named as a member: its release with the other members edited"
    if row.donor == "zero" and not any(searched.passes(row, donor) for donor in PRIMARY_DONORS if donor != "zero"):
        flags.append("always on")
    site = held.sites.get(row.site)
    if site is not None and not held.confirmed.get(row, False):
        p = float(site.tests.release_p[row.donor][row.layer, row.head])
        mean = head_means(site.evidence.release[row.donor])[row.layer, row.head]
        if p < LEVEL and mean > searched.s * site.evidence.G.mean():
            flags.append("the release holds (p uncorrected), the role does not")
    return "; ".join(flags)
