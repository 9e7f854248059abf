"""What was found, in words with its numbers (all of confirmation), for the sites that were searched.

*Named*: confirmed suppressors (or at most twelve heads of largest single release) restore half of the gap or more;
*spread*: it takes more heads; *nothing named*: nobody is confirmed and no number of heads does.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from av_lens.isolation.explaining.knowledge import Known
from av_lens.isolation.measuring.engine import PRIMARY_DONORS
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming.evidence import Searched
from av_lens.isolation.naming.roles import Named, head_means
from av_lens.isolation.running.preparing import ALSO_COUNTED_AT, Run
from av_lens.isolation.sets.confirmation import (
    BY_QUESTION,
    CONFIRMED,
    FEWEST_WORDS,
    NOT_REPLICATED,
    ON_WORDS,
    ONE_DONOR,
    STATUSES,
    UNTESTED,
    ranked_heads,
)
from av_lens.isolation.sets.search import MOST_MEMBERS
from av_lens.isolation.sets.sets import head_names
from av_lens.results.dyadic import SOURCE, Dyadic
from av_lens.results.power import FEWEST_PILOTS, conflicts_needed
from av_lens.results.record import ENCODING, FEEDER, RELEASING

UNSPECIFIC = {
    "not specific": "Not specific (harm of 5 points is not excluded)",
    "untested": "Specificity is untested (below 59 items)",
}
SINGLE_ONLY = "Pairs of heads were left out: of heads that stand in for each other this says nothing."
FED = {
    CONFIRMED: "hold on held-out clips",
    ONE_DONOR: "hold on held-out clips, by one donor alone",
    ON_WORDS: "hold on these words",
    NOT_REPLICATED: "do not hold on held-out clips",
}
"""What is said of feeders, by their status."""
MUCH_CUT = 0.1
"""Of a conflict's length: above it the verdict says that clips were cut."""


def verdict(run: Run, gap_kind: str, gap_sentence: str, known: Known) -> tuple[str, str]:
    """Say what was found: the verdict's kind, and its sentences."""
    held, gap, refused = known.held, known.confirmation.gap, bool(run.refused)
    parts = [f"Refused: {sentence}" for _, sentence in run.refused if sentence != gap_sentence]
    parts += [gap_sentence, *_named_sentences(run, known)]
    counts = counts_above(known)
    shares, heads = ", ".join(f"{share:.2f}" for share in counts), ", ".join(map(str, counts.values()))
    parts.append(f"Heads and MLPs whose largest single release on discovery is above {shares} of G: {heads}.")
    chosen = [row for row in held.tables["sets"] if row["chosen"]]
    parts += [_set_sentence(row, gap, refused=refused) for row in chosen]
    if any(one.role in RELEASING for one in held.roles):
        parts.append("A member's role is the same alone and in the set where not said otherwise.")
    parts.append(_hidden_sentence(held.tables["members"], delta=known.discovery.delta(known.searched.s)))
    if not chosen:
        parts.append("No set of heads was found either: taken apart head by head, none kept a release above delta.")
    if not held.searched.pairs:
        parts.append("Pairs of heads were left out of the search for sets.")
    crossing = crossing_half(known)
    number = None if crossing is None else int(crossing["k"])
    parts += [] if crossing is None else [_spread_sentence(crossing, gap)]
    for outcome, words in UNSPECIFIC.items():
        controls = [row["control"] for row in held.tables["specificity"] if row["verdict"] == outcome]
        parts += [f"{words}: {', '.join(controls)}."] if controls else []
    enough = any(row["release"] >= 0.5 * gap for row in chosen) or (number is not None and number <= MOST_MEMBERS)
    if refused:
        kind = run.refused[0][0]
    elif any(held.confirmed.get(row, False) for row in claimed(known)) and (enough or number is None):
        kind = "named"
    else:
        kind = "nothing named" if number is None else "spread"
    return kind, " ".join(part for part in parts if part)


def claimed(known: Known) -> list[Named]:
    """All suppressors that discovery named: by their own release, or as members of the chosen set."""
    return [*known.searched.suppressors, *(row for row in known.held.named_members if row.role in RELEASING)]


def _named_sentences(run: Run, known: Known) -> list[str]:
    held, sites, s, refused = known.held, ", ".join(known.searched.sites), known.searched.s, bool(run.refused)
    rows = {status: [row for row in claimed(known) if held.status.get(row) == status] for status in STATUSES}
    parts = [f"What the search would have named at {sites}:"] if refused else []
    if rows[CONFIRMED]:
        untested = any(held.words.get(row) == UNTESTED for row in rows[CONFIRMED])
        words = f", untested over words (fewer than {FEWEST_WORDS})" if untested else ""
        largest = max(held.holm_p[row] for row in rows[CONFIRMED])
        lead = f"holding on held-out clips{words}" if refused else f"Confirmed{words} at {sites}"
        parts.append(f"{lead}: {_by_role(rows[CONFIRMED], known)} (p after Holm at most {largest:.2g}).")
    else:
        lead = "no head or MLP" if refused else f"No head or MLP at {sites} is confirmed"
        parts += [f"{lead} as a suppressor above {s:.2f} of G. {_largest(known)}", _power_sentence(run, known)]
    parts.append(_feeder_sentence(known))
    if rows[ONE_DONOR]:
        listed = _by_role(rows[ONE_DONOR], known)
        parts.append(
            f"Replicated on held-out clips, by one donor alone: {listed}. Other edits release next to nothing."
        )
    if rows[BY_QUESTION]:
        parts.append(
            f"Replicated on held-out clips, by the question alone: {_by_role(rows[BY_QUESTION], known)}. They release "
            "where another question is put into them, not where picture or sound are: they carry what is asked."
        )
    if rows[ON_WORDS]:
        holds = "It holds on new clips, not over words: with other answers it may not."
        parts.append(f"On these words: {_by_role(rows[ON_WORDS], known)}. {holds}")
    if rows[NOT_REPLICATED]:
        parts.append(f"{len(rows[NOT_REPLICATED])} more named on discovery did not hold on confirmation.")
    return parts


def _feeder_sentence(known: Known) -> str:
    rows = [row for row in known.searched.named if row.role == FEEDER]
    told: list[str] = []
    for layer in sorted({row.through for row in rows}):
        for status, words in FED.items():
            fed = [row.at for row in rows if row.through == layer and known.held.status.get(row) == status]
            told += [f"{head_names(fed)} (of MLP {layer}; {words})"] if fed else []
    return (
        f"Feeders, which tell an MLP what is seen and suppress nothing themselves: {'; '.join(told)}." if told else ""
    )


def _by_role(rows: Sequence[Named], known: Known) -> str:
    listed: list[str] = []
    for role in RELEASING:
        groups: dict[str, dict[tuple[int, int], None]] = {}
        for row in (row for row in rows if row.role == role):
            groups.setdefault(_beside(row, known), {})[row.at] = None
        for beside, heads in groups.items():
            several = role not in ("undetermined", ENCODING) and len(heads) > 1
            words = f"{role}s" if several else {"undetermined": "kind undetermined"}.get(role, role)
            listed.append(f"{words} {head_names(list(heads))}{beside}")
    return "; ".join(listed)


def _beside(row: Named, known: Known) -> str:
    """Both roles of a head, where they differ; of one that is always on, the release of half a dose."""
    alone, together = known.searched.role_alone(row.at, row.site), known.held.role_in_set(row.at, row.site)
    said = [f"alone {alone}, in the set {together}"] if together not in ("", alone) else []
    if row in known.searched.named and always_on(row, known.searched):
        found = known.held.sites[row.site].evidence
        half, whole = (float(head_means(found["release", donor])[row.at]) for donor in ("half_dose", "zero"))
        said.append(f"always on: half a dose releases {half:.2f} of {whole:.2f} logits")
    return f" ({'; '.join(said)})" if said else ""


def always_on(row: Named, searched: Searched) -> bool:
    """Say whether a head's release passes by zero alone: its output is the same in every cell."""
    return row.donor == "zero" and not any(searched.passes(row, other) for other in PRIMARY_DONORS if other != "zero")


def _largest(known: Known) -> str:
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


def _set_sentence(row: dict[str, Any], gap: float, *, refused: bool) -> str:
    text = (
        f"Editing {row['members']} together ({row['donor']}) restores {row['release']:.2f} logits "
        f"[{row['low']:.2f}, {row['high']:.2f}], {row['share']:.2f} of G and {row['release'] / gap:.2f} of the gap, on "
        f"held-out conflicts; the sound is said in {row['says_sound']:.2f} of them, {row['says_sound_before']:.2f} "
        "before"
    )
    if row.get("random_n"):
        matched = "" if "widened" in row["flags"] else "matched "
        text += f"; {row['random_n']} {matched}random sets restore {row['random_mean']:.2f} (p = {row['p_random']:.3f}"
        text += f", floor {row['p_floor']:.3f})"
    text += f"; as many heads that `see` needs most restore {row['see_release']:.2f}"
    holds = bool(row.get("confirmed"))
    why = "".join(f" ({flag})" for flag in row["flags"].split("; ") if "widened" in flag or "too few" in flag)
    said = ("would hold" if holds else "would not hold") if refused else f"is {'' if holds else 'not '}confirmed"
    return f"{text}. The set {said}{why}."


def _hidden_sentence(rows: Sequence[dict[str, Any]], *, delta: float) -> str:
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
    number = int(row["k"])
    who = f"the {number} heads of largest single release together restore"
    who = "the head of largest single release alone restores" if number == 1 else who
    opening = "The suppression is spread over many heads: by" if number > MOST_MEMBERS else "By"
    fewer = "" if number == 1 else "; one fewer restores less"
    return f"{opening} {row['donor']}, {who} half of the gap ({row['release']:.2f} of {gap:.2f} logits{fewer})."


def _power_sentence(run: Run, known: Known) -> str:
    half, s = known.discovery, known.searched.s
    size, deviation = power(known.searched, half, family=run.family)
    g = float(half.G.mean())
    if math.isinf(size):
        return f"With these few components no effect, however large, could have passed {run.family} tests."
    shared = isinstance(half.boot, Dyadic) and half.boot.unit == SOURCE
    many = f"{len(half.examples)} conflicts" if shared else f"{len(set(half.components))} components"
    found = (
        f"The smallest release of a single head that {many} and {run.family} tests find with 80% power "
        f"is {s * g + size * deviation:.2f} logits ({s + size * deviation / g:.2f} of G)."
    )
    return found if known.held.searched.pairs else f"{found} {SINGLE_ONLY}"


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


def cut_sentence(rows: Sequence[dict[str, Any]]) -> str:
    """Name the conflicts of which much was cut away, because one of their clips is shorter; "" where there is none."""
    lost = [row for row in rows if 1 - row["cut_to_s"] / row["whole_s"] > MUCH_CUT]
    if not lost:
        return ""
    shown = [f"{row['id']} ({row['cut_to_s']:.2f} of {row['whole_s']:.2f} s)" for row in lost[:5]]
    listed = ", ".join(shown) + (", ..." if len(lost) > 5 else "")
    return f"{len(lost)} conflicts lose over a tenth of their length, cut to the shortest of their clips: {listed}."
