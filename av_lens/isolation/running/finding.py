"""What was found, in words with its numbers, and the record that is saved: tables, arrays, summary, provenance.

A verdict names the sites that were searched. Its kinds, beside those of the gap ("no suppression", "not established";
interference and dominance are told apart in the first sentence) and of the refusals ("does not hear", ...):

* *named*: suppressors are confirmed, single or as members of a set, and the set restores half of the gap or more (or
  the heads of largest single release do, and they are twelve or fewer, as many as a set can hold);
* *spread*: not so, but the heads of largest single release together restore half of the gap, and it takes so many;
* *nothing named*: nobody is confirmed, and no number of heads restores half of the gap.

The gap is G - C on confirmation, where everything that a verdict says was measured.

The table of heads has one row per (head, site, role), its two halves side by side. A member of the chosen set that no
single release would have named stands there too, with the role, the effect and the test that it has while the other
members are edited (`members`): its estimand is "release in the set", and its single figures stand beside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from av_lens.isolation.explaining.knowledge import Known
from av_lens.isolation.measuring.behaviour import rows_of
from av_lens.isolation.measuring.bench import Half
from av_lens.isolation.measuring.effects import DLA, ESTIMANDS, FIRST_RELEASE, donor_of
from av_lens.isolation.measuring.engine import MLP, PRIMARY_DONORS
from av_lens.isolation.measuring.scoring import NEITHER, UNREAD
from av_lens.isolation.naming.evidence import Searched, SiteEvidence
from av_lens.isolation.naming.roles import CARRIERS, LEVEL, Evidence, Named, head_means
from av_lens.isolation.running import preparing
from av_lens.isolation.running.preparing import ALSO_COUNTED_AT, Run
from av_lens.isolation.sets.confirmation import FEWEST_WORDS, ON_WORDS, UNTESTED, Held, ranked_heads
from av_lens.isolation.sets.search import MOST_MEMBERS
from av_lens.isolation.sets.sets import head_names
from av_lens.results.dealing import CONFIRMATION, DISCOVERY
from av_lens.results.dyadic import SOURCE, Dyadic
from av_lens.results.power import FEWEST_PILOTS, conflicts_needed
from av_lens.results.provenance import stamp
from av_lens.results.record import ENCODER, ENCODING, FEEDER, RELEASING, Isolation, table

UNSPECIFIC = {
    "not specific": "Not specific (harm of 5 points is not excluded)",
    "untested": "Specificity is untested (below 59 items)",
}


def verdict(gap_kind: str, gap_sentence: str, known: Known, family: int) -> tuple[str, str]:
    """Say what was found: the verdict's kind, and its sentences."""
    held, sites, s = known.held, ", ".join(known.searched.sites), known.searched.s
    claimed, gap = _claimed(known), known.confirmation.gap
    named = [row for row in claimed if held.confirmed.get(row, False)]
    parts = [gap_sentence]
    if named:
        untested = any(held.words.get(row) == UNTESTED for row in named)
        words = f", untested over words (fewer than {FEWEST_WORDS})" if untested else ""
        parts.append(f"Confirmed{words} at {sites}: {_by_role(named)}.")
    else:
        parts.append(f"No head or MLP at {sites} is confirmed as a suppressor above {s:.2f} of G. {_largest(known)}")
        parts.append(_power_sentence(known, family))
    parts.append(feeder_sentence(known))
    tied = [row for row in claimed if held.words.get(row) == ON_WORDS]
    if tied:
        parts.append(
            f"On these words: {_by_role(tied)}. It holds on new clips, not over words: with other answers it may not."
        )
    if len(claimed) > len(named) + len(tied):
        parts.append(f"{len(claimed) - len(named) - len(tied)} more named on discovery did not hold on confirmation.")
    counts = counts_above(known)
    shares, heads = ", ".join(f"{share:.2f}" for share in counts), ", ".join(map(str, counts.values()))
    parts.append(f"Heads whose largest single release on discovery is above {shares} of G: {heads}.")
    chosen = [row for row in held.tables["sets"] if row["chosen"]]
    parts += [_set_sentence(row, gap) for row in chosen]
    parts.append(_hidden_sentence(held.tables["members"], delta=known.discovery.delta(s)))
    if not chosen:
        parts.append("No set of heads was found either: taken apart head by head, none kept a release above delta.")
    if held.searched.quick:
        parts.append("Pairs of heads were left out of the search for sets.")
    crossing = crossing_half(known)
    number = None if crossing is None else int(crossing["k"])
    parts += [] if crossing is None else [_spread_sentence(crossing, gap)]
    for outcome, words in UNSPECIFIC.items():
        controls = [row["control"] for row in held.tables["specificity"] if row["verdict"] == outcome]
        parts += [f"{words}: {', '.join(controls)}."] if controls else []
    enough = any(row["release"] >= 0.5 * gap for row in chosen) or (number is not None and number <= MOST_MEMBERS)
    if gap_kind in ("no suppression", "not established"):
        kind = gap_kind
    elif named and (enough or number is None):
        kind = "named"
    else:
        kind = "nothing named" if number is None else "spread"
    return kind, " ".join(part for part in parts if part)


def _claimed(known: Known) -> list[Named]:
    """All suppressors that discovery named: by their own release, or as members of the chosen set."""
    return [*known.searched.suppressors, *(row for row in known.held.named_members if row.role in RELEASING)]


def _by_role(rows: Sequence[Named]) -> str:
    listed: list[str] = []
    for role in RELEASING:
        heads = list(dict.fromkeys(row.at for row in rows if row.role == role))
        several = role not in ("undetermined", ENCODING) and len(heads) > 1
        words = f"{role}s" if several else {"undetermined": "kind undetermined"}.get(role, role)
        listed += [f"{words} {head_names(heads)}"] if heads else []
    return "; ".join(listed)


def _largest(known: Known) -> str:
    """Say how large the largest single release is."""
    first = known.searched.first
    heads, _ = ranked_heads(first)
    figures = {name: float(head_means(values)[heads[0]]) for name, values in first.evidence.by_donor("release").items()}
    donor = max(figures, key=lambda name: -math.inf if math.isnan(figures[name]) else figures[name])
    share = figures[donor] / float(known.discovery.G.mean())
    return f"The largest single release on discovery is {head_names(heads[:1])}'s ({donor}), {share:.2f} of G."


def counts_above(known: Known) -> dict[float, int]:
    """Count the heads whose largest single release on discovery is above some shares of G, at the first site."""
    shares = known.searched.first.evidence.largest_release / float(known.discovery.G.mean())
    return {share: int((shares > share).sum()) for share in ALSO_COUNTED_AT}


def _set_sentence(row: dict[str, Any], gap: float) -> str:
    text = (
        f"Editing {row['members']} together ({row['donor']}) restores {row['release']:.2f} logits "
        f"[{row['low']:.2f}, {row['high']:.2f}], {row['share']:.2f} of G and {row['release'] / gap:.2f} of the gap, on "
        f"held-out conflicts; the sound is said in {row['says_sound']:.2f} of them, {row['says_sound_before']:.2f} "
        "before"
    )
    if row.get("random_n"):
        text += f"; {row['random_n']} matched random sets restore {row['random_mean']:.2f} (p = {row['p_random']:.3f}"
        text += f", floor {row['p_floor']:.3f})"
    return f"{text}. The set is {'confirmed' if row.get('confirmed') else 'not confirmed'}."


def _hidden_sentence(rows: Sequence[dict[str, Any]], *, delta: float) -> str:
    """Say which members of the chosen set hide behind each other: next to nothing alone, and much with the others."""
    hidden = [row for row in rows if row["chosen"] and row["single"] <= delta < row["without"]]
    if not hidden:
        return ""
    names = head_names([(row["layer"], row["head"]) for row in hidden])
    alone, among = (", ".join(f"{row[name]:.2f}" for row in hidden) for name in ("single", "without"))
    verb = "releases" if len(hidden) == 1 else "release"
    return (
        f"Redundant: {names} {verb} next to nothing alone ({alone} logits; delta is {delta:.2f}) and {among} with the "
        "other members edited, because the members stand in for each other."
    )


def crossing_half(known: Known) -> dict[str, Any] | None:
    """Find the fewest heads of largest release that together restore half of the gap: their row of `ablation`."""
    goal = 0.5 * known.confirmation.gap
    rows = [row for row in known.held.tables["ablation"] if row["arm"] == "ranked heads" and row["release"] >= goal]
    return min(rows, key=lambda row: row["k"], default=None) if goal > 0 else None


def _spread_sentence(row: dict[str, Any], gap: float) -> str:
    """Say how many of the heads with the largest releases together restore half of the gap."""
    number = int(row["k"])
    who = f"the {number} heads of largest single release together restore"
    who = "the head of largest single release alone restores" if number == 1 else who
    opening = "The suppression is spread over many heads: by" if number > MOST_MEMBERS else "By"
    fewer = "" if number == 1 else "; one fewer restores less"
    return f"{opening} {row['donor']}, {who} half of the gap ({row['release']:.2f} of {gap:.2f} logits{fewer})."


def _power_sentence(known: Known, family: int) -> str:
    """Say how small an effect this run could have found."""
    half, s = known.discovery, known.searched.s
    size, deviation = power(known.searched, half, family=family)
    g = float(half.G.mean())
    if math.isinf(size):
        return f"With these few components no effect, however large, could have passed {family} tests."
    shared = isinstance(half.boot, Dyadic) and half.boot.unit == SOURCE
    many = f"{len(half.examples)} conflicts" if shared else f"{len(set(half.components))} components"
    return (
        f"The smallest release that {many} and {family} tests find with 80% power "
        f"is {s * g + size * deviation:.2f} logits ({s + size * deviation / g:.2f} of G)."
    )


def planned(known: Known, family: int) -> str:
    """Take a run that is too small for a pilot: how many conflicts would its largest single release need?"""
    heads, donor = ranked_heads(known.searched.first)
    half = known.discovery
    release = known.searched.first.evidence["release", donor][:, *heads[0]] - known.searched.s * half.G
    if (~np.isnan(release)).sum() < FEWEST_PILOTS:
        return ""
    plan = conflicts_needed(release, family=family).sentence()
    return f"The largest single release is {head_names(heads[:1])}'s ({donor}). {plan}"


def power(searched: Searched | None, half: Half, *, family: int) -> tuple[float, float]:
    """Compute the smallest effect above the threshold, and the standard deviation that it is counted in."""
    size = half.boot.smallest_effect(family=family)
    if searched is None:
        return size, float("nan")
    evidence = searched.first.evidence
    values = evidence["release", "blank_muted"] - (searched.s * evidence.half.G)[:, None, None]
    deviation = half.boot.deviation(values)
    known = deviation[~np.isnan(deviation)]
    return size, float(np.percentile(known, 90)) if len(known) else float("nan")


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
        claimed = _claimed(known)
        out["named suppressors"] = float(len(claimed))
        out["confirmed suppressors"] = float(sum(known.held.confirmed.get(row, False) for row in claimed))
        crossing = crossing_half(known)
        out["heads for half of the gap"] = math.nan if crossing is None else float(crossing["k"])
    return out


def feeder_sentence(known: Known) -> str:
    """Say which heads tell a named MLP what is seen, and which of them hold."""
    rows = [row for row in known.searched.named if row.role == FEEDER]
    told: list[str] = []
    for layer in sorted({row.through for row in rows}):
        for holds, words in ((True, "hold on held-out clips"), (False, "do not hold on held-out clips")):
            fed = [row.at for row in rows if row.through == layer and known.held.confirmed.get(row, False) is holds]
            told += [f"{head_names(fed)} (of MLP {layer}; {words})"] if fed else []
    return (
        f"Feeders, which tell an MLP what is seen and suppress nothing themselves: {'; '.join(told)}." if told else ""
    )


IN_THE_SET = "release in the set"
Further = tuple[dict[str, list[dict[str, Any]]], dict[str, np.ndarray]]
"""Rows of further tables by name, and further arrays of the record."""


def finding(
    run: Run, kind: str, sentence: str, *, seconds: float, known: Known | None = None, more: Further = ({}, {})
) -> Isolation:
    """Write down what a run found, as far as it went."""
    engine, tables = run.bench.engine, dict[str, Any](more[0])
    units = [half.boot.unit for half in run.both]
    inference = {half.name: rules_of(half) for half in run.both}
    arrays = {f"{half.name}/{name}": getattr(half, name) for half in run.both for name in ("G", "C")} | more[1]
    if known is not None:
        sides = ((DISCOVERY, known.searched), (CONFIRMATION, known.held))
        sites = [(half, site) for half, found in sides for site in found.sites.values()]
        arrays |= {f"{half}/{key}": values for half, site in sites for key, values in site.arrays().items()}
        evidence = [row for half, site in sites for row in site.rows(half)]
        rows = head_rows(known.searched, known.held)
        heads, mlps = ([row for row in rows if (row["head"] == MLP) is apart] for apart in (False, True))
        tables |= known.held.tables | {"heads": heads, "evidence": evidence}
        tables["mlps"] = [{name: value for name, value in row.items() if name != "head"} for row in mlps]
    tables |= {"behaviour": behaviour_rows(run), "conflicts": conflict_rows(run)}
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
            choices=list(preparing.CHOICES),
            seconds=round(seconds, 1),
            **({"bootstrap_units": units} if run.dealt.edition == "1" else {"inference": inference}),
        ),
        **{name: table(name, rows) for name, rows in tables.items()},
    )


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
        direct, write, first = (evidence[name, row.donor][at] for name in ("direct", "write", FIRST_RELEASE))
        out[f"{prefix}direct_share"] = shares = float(half.boot.ratio(direct, first).value)
        if not prefix:
            out["write_share"] = float(half.boot.ratio(write, first).value)
            out["mlp_share"] = shares - out["write_share"]
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
    words = [told] if (told := held.words.get(row)) else []
    words += [f"through MLP {row.through}"] if row.through >= 0 else []
    if row in held.named_members:
        return "; ".join(["named as a member: its release with the other members edited", *words])
    flags = words
    if row.donor == "zero" and not any(searched.passes(row, donor) for donor in PRIMARY_DONORS if donor != "zero"):
        flags.append("always on")
    site = held.sites.get(row.site)
    if site is not None and not words and not held.confirmed.get(row, False):
        mean = head_means(site.evidence["release", row.donor])[row.at]
        if site.tests.release_p[row.donor][row.at] < LEVEL and mean > site.evidence.half.delta(searched.s):
            flags.append("the release holds (p uncorrected), the role does not")
    return "; ".join(flags)
