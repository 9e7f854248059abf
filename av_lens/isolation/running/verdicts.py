"""What was found, in words with its numbers.

A verdict names the sites that were searched. Its kinds, beside those of the gap ("no suppression", "not established";
interference and dominance are told apart in the first sentence) and of the refusals ("does not hear", ...):

* *named*: suppressors are confirmed, single or as members of a set, and the set restores half of the gap or more (or
  the heads of largest single release do, and they are twelve or fewer, as many as a set can hold);
* *spread*: not so, but the heads of largest single release together restore half of the gap, and it takes so many;
* *nothing named*: nobody is confirmed, and no number of heads restores half of the gap.

The gap is G - C on confirmation, where everything that a verdict says was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from av_lens.isolation.measuring.behaviour import Survey
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming.evidence import Searched
from av_lens.isolation.naming.role_tests import Named, head_means, largest_release
from av_lens.isolation.running.protocol import ALSO_COUNTED_AT
from av_lens.isolation.sets.confirmation import Held
from av_lens.isolation.sets.confirmed import ranked_heads
from av_lens.isolation.sets.search import MOST_MEMBERS
from av_lens.isolation.sets.sets import head_names
from av_lens.results.halves import CONFIRMATION
from av_lens.results.statistics import smallest_effect
from av_lens.results.tables import RELEASING


def verdict(
    gap_kind: str,
    gap_sentence: str,
    searched: Searched,
    held: Held,
    halves: Sequence[Half],
    *,
    s: float,
    family: int,
) -> tuple[str, str]:
    """Say what was found.

    Args:
        gap_kind: from `gap_verdict`.
        gap_sentence: its sentence.
        searched: what discovery found.
        held: what confirmation found.
        halves: discovery and confirmation.
        s: the threshold, a share of G.
        family: how many tests q corrects for.

    Returns:
        The kind and the sentences.
    """
    sites = ", ".join(searched.sites)
    claimed = _claimed(searched, held)
    named = [row for row in claimed if held.confirmed.get(row, False)]
    gap = _gap(halves)
    parts = [gap_sentence]
    if named:
        parts.append(f"Confirmed at {sites}: {_by_role(named)}.")
    else:
        parts.append(
            f"No head at {sites} is confirmed as a suppressor above {s:.2f} of G. {_largest(searched, halves)}"
        )
        parts.append(power_sentence(searched, halves, s=s, family=family))
    if len(claimed) > len(named):
        parts.append(f"{len(claimed) - len(named)} more named on discovery did not hold on confirmation.")
    parts.append(counts_sentence(searched, halves))
    chosen = [row for row in held.set_rows if row["chosen"]]
    parts += [_set_sentence(row, gap) for row in chosen]
    parts += [hidden_sentence(held.member_rows, delta=s * float(halves[0].G.mean()))]
    if not chosen:
        parts.append("No set of heads was found either: taken apart head by head, none kept a release above delta.")
    if held.searched.quick:
        parts.append("Pairs of heads were left out of the search for sets.")
    half_sentence = spread_sentence(held, halves)
    parts.append(half_sentence)
    for words, outcome in (
        ("Not specific (harm of 5 points is not excluded)", "not specific"),
        ("Specificity is untested (below 59 items)", "untested"),
    ):
        controls = [row["control"] for row in held.specificity_rows if row["verdict"] == outcome]
        parts += [f"{words}: {', '.join(controls)}."] if controls else []
    sentences = " ".join(part for part in parts if part)
    if gap_kind in ("no suppression", "not established"):
        return gap_kind, sentences
    number = heads_for_half(held, halves)
    enough = any(row["release"] >= 0.5 * gap for row in chosen) or (number is not None and number <= MOST_MEMBERS)
    if named and (enough or number is None):
        return "named", sentences
    return ("nothing named" if number is None else "spread"), sentences


def _claimed(searched: Searched, held: Held) -> list[Named]:
    """All suppressors that discovery named: by their own release, or as members of the chosen set."""
    return [*searched.suppressors, *(row for row in held.named_members if row.role in RELEASING)]


def _by_role(rows: Sequence[Named]) -> str:
    listed: list[str] = []
    for role in RELEASING:
        heads = list(dict.fromkeys((row.layer, row.head) for row in rows if row.role == role))
        if heads:
            listed.append(f"{_role_words(role, len(heads))} {head_names(heads)}")
    return "; ".join(listed)


def _gap(halves: Sequence[Half]) -> float:
    half = next(one for one in halves if one.name == CONFIRMATION)
    return float((half.G - half.C).mean())


def _role_words(role: str, n: int) -> str:
    if role == "undetermined":
        return "kind undetermined"
    return f"{role}s" if n > 1 else role


def _largest(searched: Searched, halves: Sequence[Half]) -> str:
    """Say how large the largest single release is."""
    heads, _ = ranked_heads(searched.first)
    release = searched.first.evidence.release
    figures = {donor: float(head_means(values)[heads[0]]) for donor, values in release.items()}
    donor = max(figures, key=lambda name: -math.inf if math.isnan(figures[name]) else figures[name])
    share = figures[donor] / float(halves[0].G.mean())
    return f"The largest single release on discovery is {head_names(heads[:1])}'s ({donor}), {share:.2f} of G."


def counts_above(searched: Searched, halves: Sequence[Half]) -> dict[float, int]:
    """Count the heads whose largest single release on discovery is above some shares of G, at the first site.

    Args:
        searched: what discovery found.
        halves: discovery and confirmation.

    Returns:
        Share -> heads.
    """
    shares = largest_release(searched.first.evidence) / float(halves[0].G.mean())
    return {share: int((shares > share).sum()) for share in ALSO_COUNTED_AT}


def counts_sentence(searched: Searched, halves: Sequence[Half]) -> str:
    """Say how many heads would be large enough at other thresholds; the protocol wants these counts always shown.

    Args:
        searched: what discovery found.
        halves: discovery and confirmation.

    Returns:
        The sentence.
    """
    counts = counts_above(searched, halves)
    shares = ", ".join(f"{share:.2f}" for share in counts)
    heads = ", ".join(str(n) for n in counts.values())
    return f"Heads whose largest single release on discovery is above {shares} of G: {heads}."


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


def hidden_sentence(rows: Sequence[dict[str, Any]], *, delta: float) -> str:
    """Say which members of the chosen set hide behind each other: next to nothing alone, and much with the others.

    Args:
        rows: of the table of members.
        delta: the least release that counts, on discovery.

    Returns:
        The sentence; empty where every member shows alone.
    """
    hidden = [row for row in rows if row["chosen"] and row["single"] <= delta < row["without"]]
    if not hidden:
        return ""
    names = head_names([(row["layer"], row["head"]) for row in hidden])
    alone = ", ".join(f"{row['single']:.2f}" for row in hidden)
    among = ", ".join(f"{row['without']:.2f}" for row in hidden)
    verb = "releases" if len(hidden) == 1 else "release"
    return (
        f"Redundant: {names} {verb} next to nothing alone ({alone} logits; delta is {delta:.2f}) and {among} with the "
        "other members edited, because the members stand in for each other."
    )


def heads_for_half(held: Held, halves: Sequence[Half]) -> int | None:
    """Count the heads of largest release that together restore half of the gap.

    Args:
        held: what confirmation found.
        halves: discovery and confirmation.

    Returns:
        The number; None where no number of them does.
    """
    goal = 0.5 * _gap(halves)
    rows = [row for row in held.ablation_rows if row["arm"] == "ranked heads" and row["release"] >= goal]
    return min((int(row["k"]) for row in rows), default=None) if goal > 0 else None


def spread_sentence(held: Held, halves: Sequence[Half]) -> str:
    """Say how many of the heads with the largest releases together restore half of the gap.

    Args:
        held: what confirmation found.
        halves: discovery and confirmation.

    Returns:
        The sentence; empty where no number of them does.
    """
    number = heads_for_half(held, halves)
    if number is None:
        return ""
    row = next(row for row in held.ablation_rows if row["arm"] == "ranked heads" and row["k"] == number)
    who = f"the {number} heads of largest single release together restore"
    who = "the head of largest single release alone restores" if number == 1 else who
    opening = "The suppression is spread over many heads: by" if number > MOST_MEMBERS else "By"
    fewer = "" if number == 1 else "; one fewer restores less"
    return (
        f"{opening} {row['donor']}, {who} half of the gap ({row['release']:.2f} of {_gap(halves):.2f} logits{fewer})."
    )


def power_sentence(searched: Searched, halves: Sequence[Half], *, s: float, family: int) -> str:
    """Say how small an effect this run could have found.

    Args:
        searched: what discovery found.
        halves: discovery and confirmation.
        s: the threshold, a share of G.
        family: how many tests q corrects for.

    Returns:
        The sentence.
    """
    size, deviation = power(searched, halves, family=family)
    g = float(halves[0].G.mean())
    if math.isinf(size):
        return f"With these few components no effect, however large, could have passed {family} tests."
    return (
        f"The smallest release that {len(set(halves[0].components))} components and {family} tests find with 80% power "
        f"is {s * g + size * deviation:.2f} logits ({s + size * deviation / g:.2f} of G)."
    )


def power(searched: Searched | None, halves: Sequence[Half], *, family: int) -> tuple[float, float]:
    """Compute the smallest effect above the threshold, and the standard deviation that it is counted in.

    Args:
        searched: what discovery found, or None before the search.
        halves: discovery and confirmation.
        family: how many tests q corrects for.

    Returns:
        The effect in standard deviations between components, and their 90th percentile over heads, of what is tested:
        release - s G (NaN before the search).
    """
    components = np.asarray(halves[0].components)
    size = smallest_effect(len(np.unique(components)), family=family)
    if searched is None:
        return size, float("nan")
    evidence = searched.first.evidence
    values = evidence.release["blank_muted"] - (searched.s * evidence.G)[:, None, None]
    means = np.stack([head_means(values[components == c]) for c in np.unique(components)])
    return size, float(np.nanpercentile(means.std(0, ddof=1), 90)) if len(means) > 1 else float("nan")


def summary(
    found: Survey,
    halves: Sequence[Half],
    searched: Searched | None,
    held: Held | None,
    *,
    s: float,
    family: int,
) -> dict[str, float]:
    """Collect the figures that a verdict speaks of.

    Args:
        found: the survey of all cells.
        halves: discovery and confirmation.
        searched: what discovery found, if the search was made.
        held: what confirmation found, likewise.
        s: the threshold, a share of G.
        family: how many tests q corrects for.

    Returns:
        Name -> figure.
    """
    out: dict[str, float] = {"s": s, "family": float(family), "competent share": float(found.competent.mean())}
    for half in halves:
        out[f"n {half.name}"] = float(len(half.examples))
        out[f"G {half.name}"] = float(half.G.mean())
        out[f"C {half.name}"] = float(half.C.mean())
        out[f"gap {half.name}"] = float((half.G - half.C).mean())
    out |= {"G": out["G discovery"], "C": out["C discovery"], "gap": out["gap discovery"]}
    out["delta"] = s * out["G"]
    size, deviation = power(searched, halves, family=family)
    out |= {"power smallest effect in sd": size, "power sd": deviation, "power": out["delta"] + size * deviation}
    if searched is not None and held is not None:
        out["largest release share"] = float(np.nanmax(largest_release(searched.first.evidence)) / out["G"])
        out |= {f"heads above {share:.2f}": float(n) for share, n in counts_above(searched, halves).items()}
        claimed = _claimed(searched, held)
        out["named suppressors"] = float(len(claimed))
        out["confirmed suppressors"] = float(sum(held.confirmed.get(row, False) for row in claimed))
        number = heads_for_half(held, halves)
        out["heads for half of the gap"] = math.nan if number is None else float(number)
    return out
