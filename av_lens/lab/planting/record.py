"""What is written down about a planted model: its truth, its decoys, its tries, and the slices that it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from av_lens.lab.planting.kinds import Kind
from av_lens.lab.planting.planted import FREE_RIDER, Truth, changed_elsewhere, measure
from av_lens.lab.planting.runs import Head, bench, whole
from av_lens.lab.planting.sheets import PLAIN, SILENCE, blanks_of
from av_lens.lab.planting.training import Learned
from av_lens.lab.training.head_slices import sharers
from av_lens.lab.training.material import Material

ENOUGH_ALONE = 0.25
"""Of two redundant plants, putting one back alone may restore at most this share of what both restore."""
CONFLICTS = 96


@dataclass(frozen=True, eq=False)
class Measured:
    """What brute force says about one try.

    Attributes:
        truth: The suppressors' truth; of decoys alone, without heads.
        decoys: For each decoy head, the rise of C when it is put back, as a share of G.
        missing: What the try is not, of what was asked for; empty where it is all of it.
    """

    truth: Truth
    decoys: dict[Head, float]
    missing: tuple[str, ...]


def measured(
    model: Any, base: Any, wanted: Kind, plants: Sequence[Sequence[Head]], judges: Material, *, seed: int
) -> Measured:
    """Measure a try, rounded to what is stored, by brute force, on features that it did not learn from."""
    silencing = [
        tuple(sharers(base, heads))
        for heads, plant in zip(plants, wanted.plants, strict=True)
        if plant.course.behaviour == SILENCE
    ]
    guilty = [head for heads in silencing for head in heads]
    others = [head for heads in plants for head in sharers(base, heads) if head not in guilty]
    pool = blanks_of(judges.pool, PLAIN)
    frame = judges.frames["both"][0]
    made = bench(model, base, [*guilty, *others], pool, judges.words, frame, n=CONFLICTS, seed=seed)
    truth = measure(made, guilty)
    risen = {
        head: (made.half(whole(made, "va", [head]).logits, whole(made, "av", [head]).logits) - truth.c) / truth.g
        for head in others
    }
    return Measured(truth, risen, tuple(missing(wanted, truth, silencing)))


def missing(wanted: Kind, truth: Truth, silencing: Sequence[Sequence[Head]]) -> list[str]:
    """Say what a try is not, of what was asked for: a sentence for each; `silencing` are the heads of each plant."""
    if not wanted.wanted:
        return []
    found: list[str] = []
    kinds = truth.kinds
    if not kinds:
        return ["no planted head is true"]
    if kinds[0] != wanted.wanted or 2 * kinds.count(wanted.wanted) < len(kinds):
        found.append(f"the true heads are {', '.join(kinds)}, not mostly {wanted.wanted}")
    if not wanted.free_riders and any(head.kind == FREE_RIDER for head in truth.heads):
        found.append("a planted head rides for free")
    if wanted.each_enough:
        limit = ENOUGH_ALONE * truth.restored(head for heads in silencing for head in heads)
        found += [
            f"putting back plant {i + 1} alone restores {truth.restored(heads):.2f} of the gap: the other is not enough"
            for i, heads in enumerate(silencing)
            if truth.restored(heads) > limit
        ]
    return found


def described(
    wanted: Kind,
    found: Measured,
    plants: Sequence[Sequence[Head]],
    *,
    model: Any,
    base: Any,
    shown: dict[str, float],
    learned: Sequence[Learned],
) -> dict[str, Any]:
    """Write a try down as plain data: the greater part of `planted.json`."""
    behaviours = [plant.course.behaviour for plant in wanted.plants]
    everyone = [head for heads in plants for head in sharers(base, heads)]
    return {
        **found.truth.as_dict(),
        "asked_for": wanted.name,
        "plants": [
            {"heads": [list(head) for head in heads], "behaviour": behaviour, "learned": dataclasses.asdict(went)}
            for heads, behaviour, went in zip(plants, behaviours, learned, strict=True)
        ],
        "decoys": [
            {"layer": layer, "head": head, "reversion_raises_C_by_share_of_G": rise}
            for (layer, head), rise in sorted(found.decoys.items())
        ],
        "missing": list(found.missing),
        "answers": shown,
        "changed_elsewhere": changed_elsewhere(model, base, everyone),
    }
