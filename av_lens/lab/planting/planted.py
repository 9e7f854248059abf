"""What was planted: the heads of a planted model, measured by brute force and written down beside the weights.

The ruler by which `isolate` is judged (protocol section 9): every set of planted heads is put back to the balanced
model's weights, their keys and values for them alone, and C is read; `sheets` does the sums, without hooks. A head's
kind is measured with it alone put back where that adds at least half of the most that it adds to any set; otherwise
with that set put back, and `context` names it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch

from av_lens.lab.planting import sheets
from av_lens.lab.planting.kinds import Kind
from av_lens.lab.planting.sheets import MIRROR, SILENCE, Bench, Head, Run, directly, donated
from av_lens.lab.planting.training import Learned
from av_lens.lab.training.engine import head_masks, sharers
from av_lens.lab.training.pools import Material

TRUE_SHARE = 0.05  # A planted head is true if its reversion adds at least this share of the gap
ALONE = 0.5  # kinds are measured alone where the head alone adds at least this share of the most it adds to any set
FREE_RIDER = "free rider"
ENOUGH_ALONE = 0.25
"""Of two redundant plants, putting one back alone may restore at most this share of what both restore."""
CONFLICTS = 96
Planted = tuple[Sequence[Head], Learned]  # the heads of a plant, and how its learning went


@dataclass(frozen=True)
class HeadTruth:
    """What is known about one planted head."""

    layer: int  # its layer
    head: int  # its index in the layer
    # the largest rise of C that putting it back adds to a set of the others' reversions, as a share of the gap
    adds: float
    alone: float  # the rise of C when it alone is put back, as a share of the gap
    direct_share: float  # the part of its rise of C that does not pass through later heads
    reads_picture: float  # the rise of C when its output comes from another picture, as a share of G
    reads_sound: float  # the rise of C when its output comes from another sound, as a share of G
    kind: str  # "writer", "opponent", "gate" or "free rider"
    context: tuple[Head, ...] = ()  # the heads that were put back while its direct share and its reads were measured

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data: its attributes, and whether it is a free rider."""
        return {**vars(self), "context": [list(head) for head in self.context], "free_rider": self.kind == FREE_RIDER}


@dataclass(frozen=True)
class Truth:
    """What is known about a planted model."""

    heads: tuple[HeadTruth, ...]  # the planted heads
    g: float  # G, hearing with nothing to see, in logits
    c: float  # C, hearing under conflict, in logits
    c_reverted: float  # C with all planted heads put back
    n: int  # how many conflicts it was measured on
    # every set of planted heads with the rise of C when it is put back, as a share of the gap
    sets: tuple[tuple[tuple[Head, ...], float], ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the true heads, the one that adds most first."""
        ranked = sorted(self.heads, key=lambda head: -head.adds)
        return tuple(head.kind for head in ranked if head.kind != FREE_RIDER)

    def restored(self, heads: Iterable[Head]) -> float:
        """Look up the rise of C, as a share of the gap, when some of the planted heads are put back."""
        wanted = tuple(sorted(heads))
        return dict(self.sets)[wanted] if wanted else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data, as it is saved in `planted.json`."""
        return {
            "schema": 2,
            "layers": sorted({head.layer for head in self.heads}),
            "heads": [head.as_dict() for head in self.heads],
            "sets": [{"reverted": [list(head) for head in heads], "restores": share} for heads, share in self.sets],
            "G": self.g,
            "C": self.c,
            "C_reverted": self.c_reverted,
            "conflicts": self.n,
        }


def kind_of(*, adds: float, direct_share: float, reads_picture: float, reads_sound: float) -> str:
    """Name what a planted head does: "writer", "opponent", "gate" or "free rider"."""
    if adds < TRUE_SHARE:
        return FREE_RIDER
    if direct_share < 0.5:
        return "gate"
    return "writer" if reads_picture > reads_sound else "opponent"


def best_context(rises: Mapping[frozenset[Head], float], head: Head) -> tuple[float, frozenset[Head]]:
    """The most a head adds to a set of reversions (`rises` has every set's), and the set to measure its kind in."""
    added = {group: rises[group | {head}] - rise for group, rise in rises.items() if head not in group}
    best = max(added, key=lambda group: added[group])
    alone = rises[frozenset({head})]
    return added[best], frozenset() if alone >= ALONE * added[best] else best


@torch.no_grad()
def measure(made: Bench, heads: Sequence[Head] | None = None) -> Truth:
    """Find out by brute force what the planted heads (all of them by default) do."""
    chosen = tuple(sorted(made.heads if heads is None else heads))
    empty: frozenset[Head] = frozenset()

    @cache
    def run(cell: str, back: frozenset[Head]) -> Run:
        return sheets.whole(made, cell, back)

    def hearing(cell: str, mirror: str, back: frozenset[Head] = empty) -> float:
        return made.half(*(sheets.whole(made, one, back).logits for one in (cell, mirror)))

    c, g = hearing("va", "av"), hearing("blank_a", "blank_v")
    sets = [frozenset(group) for size in range(1, len(chosen) + 1) for group in combinations(chosen, size)]
    rises = {empty: 0.0, **{group: hearing("va", "av", group) - c for group in sets}}
    truths: list[HeadTruth] = []
    for head in chosen:
        adds, back = best_context(rises, head)
        held = c + rises[back]
        va, av = run("va", back), run("av", back)
        direct = made.half(*(directly(made, cell, head, back) for cell in (va, av))) - held
        reads = {
            donor: made.half(
                donated(made, va, run(donor, back), head, back), donated(made, av, run(mirror, back), head, back)
            )
            - held
            for donor, mirror in MIRROR.items()
        }
        total = rises[back | {head}] - rises[back]
        figures = {
            "adds": adds / (g - c),
            "direct_share": direct / total if total else float("nan"),
            "reads_picture": reads["wa"] / g,
            "reads_sound": reads["vw"] / g,
        }
        alone = rises[frozenset({head})] / (g - c)
        truths.append(HeadTruth(*head, alone=alone, context=tuple(sorted(back)), kind=kind_of(**figures), **figures))
    restored = tuple((tuple(sorted(group)), rises[group] / (g - c)) for group in sets)
    return Truth(tuple(truths), g=g, c=c, c_reverted=c + rises[frozenset(chosen)], n=len(made.sound), sets=restored)


def changed_elsewhere(model: Any, base: Any, heads: Sequence[Head]) -> int:
    """Count the single weights that differ from the base outside the planted heads; there should be none."""
    allowed, then = head_masks(base, heads), base.state_dict()
    count = 0
    for name, value in model.state_dict().items():
        differs = value != then[name]
        count += int((differs & (allowed[name] == 0) if name in allowed else differs).sum())
    return count


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
    plants: Sequence[Planted],
    *,
    model: Any,
    base: Any,
    judges: Material,
    answers: dict[str, float],
    seed: int,
) -> tuple[Truth, dict[str, Any]]:
    """Measure a try, rounded to what is stored, on features that it did not learn from: most of `planted.json`."""
    behaviours = [plant.course.behaviour for plant in wanted.plants]
    groups = [tuple(sharers(base, heads)) for heads, _ in plants]
    silencing = [heads for heads, behaviour in zip(groups, behaviours, strict=True) if behaviour == SILENCE]
    guilty, everyone = ([head for heads in some for head in heads] for some in (silencing, groups))
    others = [head for head in everyone if head not in guilty]
    pool, frame = sheets.blanks_of(judges.pool, sheets.PLAIN), judges.frames["both"][0]
    made = sheets.bench(model, base, [*guilty, *others], pool, judges.words, frame, n=CONFLICTS, seed=seed)
    truth = measure(made, guilty)
    decoys: list[dict[str, Any]] = []
    for layer, head in sorted({*others}):
        reverted = (sheets.whole(made, cell, [(layer, head)]).logits for cell in ("va", "av"))
        rise = (made.half(*reverted) - truth.c) / truth.g
        decoys.append({"layer": layer, "head": head, "reversion_raises_C_by_share_of_G": rise})
    return truth, {
        **truth.as_dict(),
        "asked_for": wanted.name,
        "plants": [
            {"heads": [list(head) for head in heads], "behaviour": behaviour, "learned": vars(went)}
            for (heads, went), behaviour in zip(plants, behaviours, strict=True)
        ],
        "decoys": decoys,
        "missing": missing(wanted, truth, silencing),
        "answers": answers,
        "changed_elsewhere": changed_elsewhere(model, base, everyone),
    }
