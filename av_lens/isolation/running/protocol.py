"""What was fixed before the first effect was measured? The contents of `protocol.json`.

Criteria, donors, sites, the family of tests, the threshold s, seeds and who was dealt where are written, with their
hash, before any head is edited; a finding that does not carry this hash was not made by this protocol.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from av_lens import __version__
from av_lens.core.attention_mass import SINK_TIMES
from av_lens.isolation.measuring.behaviour import LEAST_GAP, LEAST_MASS
from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.isolation.naming.evidence import PERCENTILE
from av_lens.isolation.naming.role_tests import DAMAGE_CUT, DIRECT_CUT
from av_lens.isolation.naming.roles import LEVEL
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

CHOICES = tuple((Path(__file__).parent / "choices.txt").read_text("utf-8").splitlines())
"""Where the protocol is silent: a sentence a line."""


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
    """Write the protocol of a run down."""
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
    """Hash what a protocol says."""
    said = {name: value for name, value in protocol.items() if name != "hash"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def power_sentence(protocol: Mapping[str, Any]) -> str:
    """Say before a run how small an effect it will be able to find."""
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
    """Say in what two protocols differ."""
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
