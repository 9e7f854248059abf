"""What was found, in words with its numbers.

A verdict names the sites that were searched. Kinds beside those of the gap ("no suppression", "not established"):
"named" (suppressors confirmed), "spread" (none is, but the largest releases together restore half of the gap),
"nothing named".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from av_lens.isolation.behaviour import Survey
from av_lens.isolation.confirmation import Held
from av_lens.isolation.evidence import Half, Searched
from av_lens.isolation.role_tests import head_means
from av_lens.isolation.sets import head_names
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
    named = [row for row in searched.suppressors if held.confirmed.get(row, False)]
    lost = len(searched.suppressors) - len(named)
    parts = [gap_sentence]
    if named:
        by_role = {role: [(row.layer, row.head) for row in named if row.role == role] for role in RELEASING}
        listed = "; ".join(
            f"{_role_words(role, len(heads))} {head_names(heads)}" for role, heads in by_role.items() if heads
        )
        parts.append(f"Confirmed at {sites}: {listed}.")
    else:
        parts.append(f"No head at {sites} is confirmed as a suppressor above {s:.2f} of G.")
        parts.append(power_sentence(searched, halves, s=s, family=family))
    if lost:
        parts.append(f"{lost} more named on discovery did not hold on confirmation.")
    parts += [_set_sentence(row) for row in held.set_rows if row["chosen"]]
    half_sentence = spread_sentence(held, halves)
    if half_sentence:
        parts.append(half_sentence)
    failed = [row["control"] for row in held.specificity_rows if row["verdict"] == "not specific"]
    untested = [row["control"] for row in held.specificity_rows if row["verdict"] == "untested"]
    if failed:
        parts.append(f"Not specific (harm of 5 points is not excluded): {', '.join(failed)}.")
    if untested:
        parts.append(f"Specificity is untested (below 59 items): {', '.join(untested)}.")
    if gap_kind in ("no suppression", "not established"):
        return gap_kind, " ".join(parts)
    kind = "named" if named else "spread" if half_sentence else "nothing named"
    return kind, " ".join(parts)


def _role_words(role: str, n: int) -> str:
    if role == "undetermined":
        return "kind undetermined"
    return f"{role}s" if n > 1 else role


def _set_sentence(row: dict[str, object]) -> str:
    text = (
        f"Editing {row['members']} together ({row['donor']}) restores {row['release']:.2f} logits "
        f"[{row['low']:.2f}, {row['high']:.2f}], {row['share']:.2f} of G, on held-out conflicts; the sound is said in "
        f"{row['says_sound']:.2f} of them, {row['says_sound_before']:.2f} before"
    )
    if row.get("random_n"):
        text += f"; {row['random_n']} matched random sets restore {row['random_mean']:.2f} (p = {row['p_random']:.3f}"
        text += f", floor {row['p_floor']:.3f})"
    return text + "."


def spread_sentence(held: Held, halves: Sequence[Half]) -> str:
    """Say how many of the heads with the largest releases together restore half of the gap.

    Args:
        held: what confirmation found.
        halves: discovery and confirmation.

    Returns:
        The sentence; empty where no number of them does.
    """
    half = next(one for one in halves if one.name == "confirmation")
    gap = float((half.G - half.C).mean())
    rows = [row for row in held.ablation_rows if row["arm"] == "ranked heads"]
    enough = [row for row in rows if row["release"] >= 0.5 * gap]
    if not enough or gap <= 0:
        return ""
    first = enough[0]
    who = f"the {first['k']} heads of largest single release together restore"
    who = "the head of largest single release alone restores" if first["k"] == 1 else who
    tried = ", ".join(str(row["k"]) for row in rows)
    return (
        f"By {first['donor']}, {who} half of the gap or more ({first['release']:.2f} of {gap:.2f} logits; "
        f"tried: {tried})."
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
        The effect in standard deviations between components, and their median over heads (NaN before the search).
    """
    components = np.asarray(halves[0].components)
    size = smallest_effect(len(np.unique(components)), family=family)
    if searched is None:
        return size, float("nan")
    evidence = searched.first.evidence
    values = evidence.release["blank_muted"]
    means = np.stack([head_means(values[components == c]) for c in np.unique(components)])
    return size, float(np.nanmedian(means.std(0, ddof=1))) if len(means) > 1 else float("nan")


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
        evidence = searched.first.evidence
        largest = np.nanmax(np.stack([head_means(values) for values in evidence.release.values()]), axis=0)
        out["largest release share"] = float(np.nanmax(largest) / out["G"])
        for share in (0.10, 0.03, 0.01):
            out[f"heads above {share:.2f}"] = float((largest > share * out["G"]).sum())
        out["named suppressors"] = float(len(searched.suppressors))
        out["confirmed suppressors"] = float(sum(held.confirmed.get(row, False) for row in searched.suppressors))
    return out
