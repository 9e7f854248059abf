"""What was fixed before the first effect was measured? The contents of `protocol.json`.

Criteria, donors, sites, the family of tests, the threshold s, seeds and who was dealt where are written, with their
hash, before any head is edited; a finding that does not carry this hash was not made by this protocol.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from av_lens import __version__
from av_lens.core.attention_mass import SINK_TIMES
from av_lens.isolation.measuring.behaviour import LEAST_GAP, LEAST_MASS
from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.isolation.naming.role_tests import DAMAGE_CUT, DIRECT_CUT
from av_lens.isolation.naming.roles import LEVEL
from av_lens.isolation.naming.threshold import PERCENTILE
from av_lens.isolation.sets.search import ALL_HEADS, MOST_MEMBERS, PATIENCE, SCREENED, SYNERGIES
from av_lens.isolation.sets.sets import FEWEST_SETS, NEAREST, NORM_FACTOR, RANDOM_SETS
from av_lens.isolation.sets.specificity import MARGIN
from av_lens.results.halves import DISCOVERY, FEWEST, FIRM_COMPONENTS, FIRM_CONFLICTS, LARGEST_SHARE, Halves
from av_lens.results.provenance import plain
from av_lens.results.statistics import DRAWS, FEWEST_CLIPS, FEWEST_COMPONENTS, FEWEST_ITEMS, MOST_EXACT, smallest_effect

S_ORGANISM, S_OTHER = 0.10, 0.03
ALSO_COUNTED_AT = (0.10, 0.03, 0.01)
"""Shares of G at which the verdict counts heads, whatever s is."""
MOST_SAID = 5
LEFT_OUT_QUICK = ("robustness", "pairs")
MEASURED = (
    "other model: at least this, or the 99th percentile over heads of the largest release under the control question"
)

CHOICES = (
    "Conflicts are dealt to halves before the choice by competence, so that the halves do not depend on the model; "
    "sizes are judged on the competent conflicts.",
    "Competence is M's sign (best of the two answers) in blank_a and blank_v, and under `see` in v_muted and a_muted.",
    "The refusals 'says neither' and 'does not hear' are judged on all of discovery, before the choice by competence.",
    "A component above 40% is measured against the conflicts that remain.",
    "Ties of the deal go by sha256 of 'seed:id'. The third clip w is the one of smallest sha256 of "
    "'seed:id:w:candidate' (the candidate conflict's id), among all conflicts of the same half.",
    "Accuracy is shown for the cells that have both answers' own clips; cells with w serve as donors.",
    "Bootstrap draws are seeded by the seed on discovery and by seed + 1 on confirmation.",
    "With gate='report' and too few competent conflicts all conflicts are used, competent or not, and every page is "
    "stamped; for other models the threshold s is at least .03, and what the control question shows is measured first "
    "and written into the finding.",
    "A run below 60 conflicts or 20 components a half is stamped exploratory; what it saw is told after these words.",
    "A donor of other length than the site is aligned from the end; what overhangs keeps the run's own z.",
    "mean_other and mean_task are means over the competent conflicts of discovery, in both halves.",
    "That the release itself passes (for `breaks` and `undetermined`) is judged by a second Benjamini-Hochberg over "
    "the same family, each role's p replaced by its release part.",
    "A role's max-T p is the largest of its parts' max-T p; T = sum / sqrt(sum of squares) of the component sums.",
    "Holm runs over the rows that got a name (`breaks` is none); a row is confirmed if, besides, its mean is above "
    "delta and, for a releasing role, the cuts give the same role on confirmation.",
    "A head of undetermined kind is named (its kind is not): it belongs to the set, and is confirmed by its release "
    "alone, if it does not break.",
    "Sets are searched at the first site set that was asked for.",
    "Sets: a climb that stops at 12 heads leaves its last small gains to the backward steps; three small gains stop "
    "it where they come in a row; a set whose last head releases less than delta is taken apart to nothing. Above 64 "
    "heads the screen by release ranks a head by its largest release over the donors.",
    "Undetermined (the release passes, no kind's cut holds) comes before silenced carrier: a head whose release passes "
    "is never called a victim.",
    "A verdict is 'named' if the confirmed set, or at most 12 heads of largest single release together, restore half "
    "of the gap, 'spread' if it takes more; the order of these heads and their donor come from discovery, how many "
    "reach half is read off the curve on confirmation and chooses nothing.",
    "Where two backward steps cost alike the member taken in last is taken out.",
    "Members of the chosen set are measured with the other members edited: release, direct share, reads, damage. Their "
    "roles follow from the same cuts (they have no q and no max-T p); a member that no single release named stands in "
    "the table of heads with these figures.",
    "Holm runs over single heads' rows and the chosen set's members together.",
    "The set is confirmed if its release's lower bound is above delta and it releases more than every matched random "
    "set; p and its floor stand beside, since few matched sets may exist.",
    "Where members share so few matching heads that no random set of distinct heads exists, each member's pool is "
    "widened by its next nearest heads within one layer, one at a time, until there are 20 sets; the set is flagged.",
    "Specificity has one item per conflict; donors there are asked the control's own question where the layout is "
    "the same.",
    "audio_only is a secondary donor of the release alone, at suffix and generation, laid on from the end as far "
    "as the token ids are equal; its mirror is the picture's sound alone.",
    "The text-only prompt is the bare question, without a conflict's prefix.",
    "An effect's parts are centred over the distinct answers of all conflicts given; with the norm frozen both the "
    "edited and the unedited run are read out with what the final norm divided by in the unedited one.",
    "A sink receives over 10 times the mean over the media positions, summed over layers and heads. Norms that random "
    "sets are matched by are those in `va`.",
    "Sinks are found per layout, from the mean over discovery's analysed conflicts of that layout; a layout that "
    "discovery lacks has none, and its figures there are NaN.",
    "The null under `control` is the largest over the sites searched; mean_other stays the mean under `see` there.",
    "The unit `layer` is the layer's attention and MLP together (what it adds to the stream); keys of a group are "
    "replaced before rotary position.",
    "The direct logit attribution is at the asked position, at the run's own norm scale, mirrored: (va - av) / 2.",
    "Cards: paths go to the heads after the first that releases, named or not, 24 at most (the named, then the largest "
    "on discovery), keys and values for that query head alone; run 3 recomputes MLPs and norms. A pattern is called "
    "driven by its queries (keys) where the interval of their part of the moved attention to the picture is above "
    "(below) one half.",
    "Edge cuts: masses are those of `va`; equal mass is taken from other heads at most one layer away that do not "
    "release themselves, within a quarter, the mean of 3 draws, beside the renormalised cut.",
    "Routes are cut in all heads, renormalised, in windows at the depths of the studies; equal mass may there be other "
    "keys that hold no media.",
    "The lens counts a word among the top 5, at no more than 64 evenly spaced positions of a span; probes read the "
    "stream averaged over a span.",
    "Power counts in the 90th percentile over heads of the standard deviation of release - s G between components.",
    "Robustness keeps the main search's choice by competence; its sampled flips resolve half of the first step of the "
    "ladder at one site, its bootstraps of clips have intervals of 1,000 draws.",
    "The power before a run is that of discovery's components as dealt, before the choice by competence.",
    "Intervals of rates are the same bootstrap as all others, so a rate of 1.0 has the interval 1.0 to 1.0.",
)


_FEWEST_TO_DRAW = {"fewest_clips": FEWEST_CLIPS, "fewest_components": FEWEST_COMPONENTS}


def protocol_of(
    *,
    options: Mapping[str, Any],
    halves: Halves,
    ids: Sequence[str],
    model: Mapping[str, Any],
    conflicts: Mapping[str, Mapping[str, str]],
    family: int,
) -> dict[str, Any]:
    """Write the protocol of a run down.

    Args:
        options: `sites`, `s` and its rule, `gate`, `seed`, `layout`, `quick`.
        halves: where every conflict was dealt.
        ids: the conflicts' ids.
        model: the model's sizes, a hash of its weights, how it computes.
        conflicts: by id, a hash of each clip and of the words.
        family: how many tests q corrects for.

    Returns:
        The protocol, with the sha256 of its canonical json under "hash".
    """
    components = len({halves.component[i] for i in halves.members(DISCOVERY)})
    size = smallest_effect(components, family=family)
    out: dict[str, Any] = {
        "av_lens": __version__,
        "primary": "release: effect on C = (M(va) - M(av)) / 2",
        "donors": list(PRIMARY_DONORS),
        **plain(options),
        "left_out": list(LEFT_OUT_QUICK) if options["quick"] else [],
        "also_counted_at": list(ALSO_COUNTED_AT),
        "level": LEVEL,
        "direct_share_cut": DIRECT_CUT,
        "family": family,
        "power": {
            "discovery_components": components,
            # The smallest release above s x G that is found in 4 of 5 runs, in standard deviations between components.
            "smallest_effect_in_sd": size if math.isfinite(size) else None,
        },
        "model": dict(model),
        "conflicts": {name: dict(parts) for name, parts in conflicts.items()},
        "least_mass_on_the_answers": LEAST_MASS,
        "least_gap_share": LEAST_GAP,
        "halves": {
            "largest_component": LARGEST_SHARE,
            "fewest_conflicts": FEWEST,
            "firm_conflicts": FIRM_CONFLICTS,
            "firm_components": FIRM_COMPONENTS,
            "dealt": dict(zip(ids, halves.half, strict=True)),
            "lost": halves.n_lost,
        },
        "bootstrap": {"draws": DRAWS, "level": 0.95} | _FEWEST_TO_DRAW,
        "sign_flips": {"most_exact_components": MOST_EXACT, "least_sampled": "10 x family / .05"},
        "random_sets": RANDOM_SETS,
        "damage": {"fall_of_G_over_release": DAMAGE_CUT, "heard_answer_over_delta": -1},
        "null_percentile_under_control": PERCENTILE,
        "sinks_times_the_mean": SINK_TIMES,
        "sets": {
            "all_heads_up_to": ALL_HEADS,
            "screened": SCREENED,
            "synergies": SYNERGIES,
            "most_members": MOST_MEMBERS,
            "small_gains_in_a_row": PATIENCE,
            "random_norm_factor": NORM_FACTOR,
            "random_nearest": NEAREST,
            "random_fewest": FEWEST_SETS,
        },
        "non_inferiority": {"margin": MARGIN, "fewest_items": FEWEST_ITEMS},
        "choices": list(CHOICES),
    }
    out["hash"] = hash_of(out)
    return out


def hash_of(protocol: Mapping[str, Any]) -> str:
    """Hash what a protocol says.

    Args:
        protocol: with or without its "hash".

    Returns:
        The sha256 of its canonical json, in hex.
    """
    said = {name: value for name, value in protocol.items() if name != "hash"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def power_sentence(protocol: Mapping[str, Any]) -> str:
    """Say before a run how small an effect it will be able to find.

    Args:
        protocol: from `protocol_of`.

    Returns:
        The sentence.
    """
    power, tests = protocol["power"], f"{protocol['family']} tests"
    if power["smallest_effect_in_sd"] is None:
        return (
            f"Power: {power['discovery_components']} components on discovery are too few for {tests}: no effect, "
            "however large, could pass them."
        )
    return (
        f"Power: {power['discovery_components']} components on discovery and {tests} find, four times in five, a "
        f"release that exceeds {protocol['s']:g} of G by {power['smallest_effect_in_sd']:.2f} standard deviations "
        "between components."
    )


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], clips: Mapping[tuple[str, str], str] | None = None
) -> list[str]:
    """Say in what two protocols differ.

    Args:
        there: the one that was found.
        here: the one of this run.
        clips: this run's files, by conflict and "sound", "picture" or "third".

    Returns:
        One phrase for each entry that differs.
    """
    out: list[str] = []
    for name in dict.fromkeys([*here, *there]):
        one, two = there.get(name), here.get(name)
        if one == two or name in ("hash", "power", "family"):
            continue
        if name == "conflicts" and isinstance(one, Mapping) and isinstance(two, Mapping):
            out += _changed(one, two, clips or {})
        elif name == "halves":
            dealt = [len((side or {}).get("dealt", {})) for side in (one, two)]
            out.append(f"conflicts or halves ({dealt[0]} conflicts there, {dealt[1]} here)")
        elif isinstance(one, Mapping) and isinstance(two, Mapping):
            out.append(f"{name} ({', '.join(_inner(one, two))})")
        elif len(f"{one}{two}") > 60:
            out.append(str(name))
        else:
            out.append(f"{name} ({one} there, {two} here)")
    return out


def _inner(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """The keys under which two mappings differ, with what is a number."""
    found: list[str] = []
    for key in dict.fromkeys([*two, *one]):
        sides = one.get(key, "not noted"), two.get(key, "not noted")
        if sides[0] != sides[1]:
            number = any(isinstance(side, int | float) for side in sides)
            found.append(f"{key}: {sides[0]} there, {sides[1]} here" if number else str(key))
    return found


def _changed(one: Mapping[str, Any], two: Mapping[str, Any], clips: Mapping[tuple[str, str], str]) -> list[str]:
    """The clips and words that changed of conflicts that both have; a third that was drawn anew is no cause."""
    both = [name for name in two if isinstance(one.get(name), Mapping)]
    found = [(name, part) for name in both for part in two[name] if one[name].get(part) != two[name][part]]
    found = [place for place in found if place[1] != "third"] or found
    said = [
        f"the {part} of conflict {name!r}" + (f" ({clips[name, part]})" if (name, part) in clips else "")
        for name, part in found[:MOST_SAID]
    ]
    return said + ([f"{len(found) - MOST_SAID} more clips or words"] if len(found) > MOST_SAID else [])
