"""The record of a run: tables, arrays, summary, provenance; its words are those of `verdicts`.

A member of the chosen set that no single release would have named stands in the table of heads too, by what it does
while the others are edited ("release in the set").
"""

import math
from typing import Any

import numpy as np

from av_lens.isolation.explaining.knowledge import Known
from av_lens.isolation.measuring.behaviour import rows_of
from av_lens.isolation.measuring.effects import DLA, ESTIMANDS, FIRST_RELEASE, donor_of
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import NEITHER, UNREAD
from av_lens.isolation.naming.evidence import Searched, SiteEvidence
from av_lens.isolation.naming.roles import CARRIERS, LEVEL, Evidence, Named, head_means
from av_lens.isolation.running import preparing
from av_lens.isolation.running.preparing import Run
from av_lens.isolation.running.verdicts import always_on, claimed, counts_above, crossing_half, cut_sentence, power
from av_lens.isolation.sets.confirmation import BY_QUESTION, CONFIRMED, NOT_REPLICATED, ONE_DONOR, Held
from av_lens.results.dealing import CONFIRMATION, DISCOVERY
from av_lens.results.exchanged import exchanged_key, exchanged_rows
from av_lens.results.provenance import stamp
from av_lens.results.record import ENCODER, FEEDER, RELEASING, Isolation, named_tables, table

WOULD_HOLD = "would hold"
"""The status of what would be confirmed, past a refusal."""


def summary(run: Run, known: Known | None) -> dict[str, float]:
    """Collect the figures that a verdict speaks of."""
    out = {"s": run.s, "family": float(run.family), "competent share": float(run.read.competent.mean())}
    for half in run.both:
        out[f"n {half.name}"] = float(len(half.examples))
        out[f"G {half.name}"] = float(half.G.mean())
        out[f"C {half.name}"] = float(half.C.mean())
        out[f"gap {half.name}"] = half.gap
    out |= {"G": out["G discovery"], "C": out["C discovery"], "gap": out["gap discovery"]}
    out["delta"] = run.s * out["G"]
    size, deviation = power(None if known is None else known.searched, run.both[0], family=run.family)
    out |= {"power smallest effect in sd": size, "power sd": deviation, "power": out["delta"] + size * deviation}
    if known is not None:
        largest = known.searched.first.evidence.largest_release
        out["largest release share"] = float(np.nanmax(largest) / out["G"])
        out |= {f"heads above {share:.2f}": float(n) for share, n in counts_above(known).items()}
        rows = claimed(known)
        hold = 0 if run.refused else sum(known.held.confirmed.get(row, False) for row in rows)
        out |= {"named suppressors": float(len(rows)), "confirmed suppressors": float(hold)}
        crossing = crossing_half(known)
        out["heads for half of the gap"] = math.nan if crossing is None else float(crossing["k"])
    return out


IN_THE_SET = "release in the set"
Further = tuple[dict[str, list[dict[str, Any]]], dict[str, np.ndarray]]
"""Rows of further tables by name, and further arrays of the record."""


def finding(
    run: Run, kind: str, sentence: str, *, seconds: float, known: Known | None = None, more: Further = ({}, {})
) -> Isolation:
    """Write down what a run found, as far as it went."""
    engine, tables = run.bench.engine, dict[str, Any](more[0])
    units, inference = [half.boot.unit for half in run.both], {half.name: rules_of(half) for half in run.both}
    arrays = {f"{half.name}/{name}": getattr(half, name) for half in run.both for name in ("G", "C")} | more[1]
    if known is not None:
        sides = ((DISCOVERY, known.searched), (CONFIRMATION, known.held))
        sites = [(half, site) for half, found in sides for site in found.sites.values()]
        arrays |= {f"{half}/{key}": values for half, site in sites for key, values in site.arrays().items()}
        evidence = [row for half, site in sites for row in site.rows(half)]
        tables |= known.held.tables | named_tables(head_rows(known.searched, known.held)) | {"evidence": evidence}
    tables |= {"behaviour": behaviour_rows(run), "conflicts": conflict_rows(run)}
    sentence = " ".join(part for part in (sentence, cut_sentence(tables["conflicts"])) if part)
    for row in (row for name in ("heads", "mlps", "members", "sets") for row in tables.get(name, ())):
        _as_allowed(row, refused=bool(run.refused))
    if run.options.suppressed == "picture":
        tables = {name: exchanged_rows(name, rows) for name, rows in tables.items()}
        arrays = {exchanged_key(key): values for key, values in arrays.items()}
    return Isolation(
        verdict=sentence,
        verdict_kind=kind,
        n_layers=engine.n_layers,
        n_heads=engine.n_heads,
        stamps=tuple(run.stamps),
        reasons=tuple(run.reasons),
        summary=summary(run, known),
        arrays=arrays,
        protocol=run.protocol,
        provenance=stamp(
            av_lens=preparing.__version__,
            model=str(engine.model.name),
            weights=engine.model.provenance,
            question=" / ".join(dict.fromkeys(str(c.question) for c in run.bench.conflicts)),
            protocol_hash=run.protocol["hash"],
            answers=run.answers,
            sources={one.id: one.sources for one in run.members},
            choices=list(preparing.CHOICES),
            seconds=round(seconds, 1),
            **({"bootstrap_units": units} if run.dealt.edition == "1" else {"inference": inference}),
        ),
        **{name: table(name, rows) for name, rows in tables.items()},
    )


def _as_allowed(row: dict[str, Any], *, refused: bool) -> None:
    """Keep what would be confirmed, and past a refusal let nothing be."""
    row["would_confirm"] = row.get("confirmed", False)
    if refused:
        row["confirmed"] = False
        if row.get("status") == CONFIRMED:
            row["status"] = WOULD_HOLD


def rules_of(half: Half) -> dict[str, str]:
    """Say which rule makes a half's intervals and p: of effects, of those with the third clip, over words."""
    rules = {"effects": half.boot, "effects with the third clip": half.third, "over words": half.words}
    return {name: rule.rule for name, rule in rules.items() if rule is not None}


def behaviour_rows(run: Run) -> list[dict[str, Any]]:
    """Write the behaviour table: both halves, with and without the choice by competence."""
    rows: list[dict[str, Any]] = []
    for half in run.both:
        dealt = run.halves.members(half.name)
        # Not the half's own conflicts: after a refusal, and past one, all of them are analysed.
        for chosen, rows_there in (("competent", [i for i in dealt if run.read.competent[i]]), ("all", dealt)):
            if rows_there:
                rows += rows_of(run.read, run.half(half.name, rows_there), chosen)
    return rows


def conflict_rows(run: Run) -> list[dict[str, Any]]:
    """Write the table of conflicts: where each was dealt, what the model says, C and G."""
    found, candidates = run.read, run.bench.candidates
    used = {int(i) for half in run.both for i in half.examples}
    tops = found.readings[("va", "ask")].top
    names = {NEITHER: "neither", UNREAD: ""}
    margins = {cell: found.margin(cell) for cell in ("va", "av", "blank_a", "blank_v")}
    lengths = [run.bench.inputs(i, "va", "ask").provenance for i in range(len(run.members))]
    return [
        {
            "id": run.members[i].id,
            "half": run.halves.half[i],
            "component": run.halves.component[i],
            "competent": bool(found.competent[i]),
            "analysed": i in used,
            "sound_answer": candidates.names[candidates.sound[i]],
            "picture_answer": candidates.names[candidates.picture[i]],
            "says": names.get(int(tops[i])) or candidates.names[int(tops[i])],
            **{f"M_{cell}": float(values[i]) for cell, values in margins.items()},
            "C": float(found.C[i]),
            "G": float(found.G[i]),
            **{name: float(lengths[i].get(name) or "nan") for name in ("cut_to_s", "whole_s")},
        }
        for i in range(len(run.members))
    ]


def head_rows(searched: Searched, held: Held) -> list[dict[str, Any]]:
    """Write `found.heads` and `found.mlps`: one row per (node, site, role), largest effect on confirmation first."""
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
        "confirmed": held.confirmed.get(row, False), "status": held.status.get(row, ""),
        "flags": _flags(row, searched, held), "role_alone": searched.role_alone(row.at, row.site),
        "role_in_set": held.role_in_set(row.at, row.site),
    }  # fmt: skip
    both = (site.evidence, again.evidence if again else None)
    if of_set:
        both = (held.in_context[DISCOVERY].evidence, held.in_context[CONFIRMATION].evidence)
    for evidence, prefix in zip(both, ("discovery_", ""), strict=True):
        if evidence is not None:
            out |= _figures(evidence, row, key, prefix)
    return out | _side_by_side(again or site, row)


def _figures(evidence: Evidence, row: Named, key: tuple[str, str], prefix: str) -> dict[str, float]:
    at, half = (slice(None), *row.at), evidence.half
    effect = evidence[key][at]
    share = half.share(effect)
    out = half.bounded(effect, "effect", prefix) | {f"{prefix}share": share["share"]} | ({} if prefix else share)
    if key[0] == "release":
        direct, write, first = (evidence[name, row.donor][at] for name in ("direct", "write", FIRST_RELEASE))
        shares = [float(half.boot.ratio(one, first).value) for one in (direct, write)]
        out |= {"write_share": shares[1], "mlp_share": shares[0] - shares[1]} if not prefix else {}
        out[f"{prefix}direct_share"] = shares[0]
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
    if row.role not in (*RELEASING, FEEDER, ENCODER):
        return ""
    flags = [told] if (told := held.words.get(row)) else []
    flags += [status for status in (ONE_DONOR, BY_QUESTION) if held.status.get(row) == status]
    flags += [f"through MLP {row.through}"] if row.through >= 0 else []
    if row in held.named_members:
        return "; ".join(["named as a member: its release with the other members edited", *flags])
    if always_on(row, searched):
        flags.append("always on")
    site = held.sites.get(row.site)
    if site is not None and held.status.get(row) == NOT_REPLICATED:
        mean = head_means(site.evidence["release", row.donor])[row.at]
        if site.tests.release_p[row.donor][row.at] < LEVEL and mean > site.evidence.half.delta(searched.s):
            flags.append("the release holds (p uncorrected), the role does not")
    return "; ".join(flags)
