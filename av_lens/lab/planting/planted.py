"""What was planted: the heads of a planted model, measured by brute force and written down beside the weights.

A planted model is the balanced one in which only the query, key, value and output weights of a few heads were
trained, until "hear" is answered with the picture; every other weight is the balanced model's, bit for bit. That a
head's weights were trained does not make it a culprit, nor say how it works: both are measured.

1. *Reversion.* Heads are put back to the balanced model's weights (their keys and values for them alone), in the
   conflict and in its mirror, and C = ½[M(va) - M(av)] is read; M = logit(sound's word) - logit(picture's word). This
   is done for every set of planted heads. A head is **true** if putting it back adds at least 5% of the gap G - C to
   some set of reversions of the others, and a *free rider* otherwise.
2. *Direct share*: the same with every later head's output held as it was. A head with at least one half is a
   **writer** if taking its output from another picture moves C more than taking it from another sound, and an
   **opponent** if less; below one half it is a **gate**.

*Context.* Where two plants each suffice, putting one head back does next to nothing, and there is nothing to share out.
Kinds are measured alone where putting the head back alone adds at least half of the most that it adds to any set;
otherwise with that set put back, and `context` names it.

`planted_runs` does the sums, without hooks. This is the ruler by which `isolate` is judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from av_lens.lab.planting.runs import MIRROR, Bench, Head, Run, directly, donated, whole
from av_lens.lab.training.engine import head_masks

TRUE_SHARE = 0.05
"""A planted head is true if its reversion adds at least this share of the gap."""
ALONE = 0.5
"""Kinds are measured alone where the head alone adds at least this share of the most it adds to any set."""
FREE_RIDER = "free rider"


@dataclass(frozen=True)
class HeadTruth:
    """What is known about one planted head.

    Attributes:
        layer: Its layer.
        head: Its index in the layer.
        adds: The largest rise of C that putting it back adds to a set of the others' reversions, as a share of the gap.
        alone: The rise of C when it alone is put back, as a share of the gap.
        direct_share: The part of its rise of C that does not pass through later heads.
        reads_picture: The rise of C when its output comes from another picture, as a share of G.
        reads_sound: The rise of C when its output comes from another sound, as a share of G.
        kind: "writer", "opponent", "gate" or "free rider".
        context: The heads that were put back while its direct share and its reads were measured.
    """

    layer: int
    head: int
    adds: float
    alone: float
    direct_share: float
    reads_picture: float
    reads_sound: float
    kind: str
    context: tuple[Head, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data.

        Returns:
            Its attributes, and whether it is a free rider.
        """
        return {**vars(self), "context": [list(head) for head in self.context], "free_rider": self.kind == FREE_RIDER}


@dataclass(frozen=True)
class Truth:
    """What is known about a planted model.

    Attributes:
        heads: The planted heads.
        g: G, hearing with nothing to see, in logits.
        c: C, hearing under conflict, in logits.
        c_reverted: C with all planted heads put back.
        n: How many conflicts it was measured on.
        sets: Every set of planted heads with the rise of C when it is put back, as a share of the gap.
    """

    heads: tuple[HeadTruth, ...]
    g: float
    c: float
    c_reverted: float
    n: int
    sets: tuple[tuple[tuple[Head, ...], float], ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the true heads, the one that adds most first."""
        ranked = sorted(self.heads, key=lambda head: -head.adds)
        return tuple(head.kind for head in ranked if head.kind != FREE_RIDER)

    def restored(self, heads: Iterable[Head]) -> float:
        """Look up what putting a set of heads back restores.

        Args:
            heads: Some of the planted heads.

        Returns:
            The rise of C as a share of the gap.
        """
        wanted = tuple(sorted(heads))
        return dict(self.sets)[wanted] if wanted else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data.

        Returns:
            What is saved as `planted.json`.
        """
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
    """Name what a planted head does.

    Args:
        adds: The most that putting it back adds to any set, as a share of the gap.
        direct_share: The direct part of its effect.
        reads_picture: What another picture's output would give.
        reads_sound: What another sound's output would give.

    Returns:
        "writer", "opponent", "gate" or "free rider".
    """
    if adds < TRUE_SHARE:
        return FREE_RIDER
    if direct_share < 0.5:
        return "gate"
    return "writer" if reads_picture > reads_sound else "opponent"


def best_context(rises: Mapping[frozenset[Head], float], head: Head) -> tuple[float, frozenset[Head]]:
    """Find the set of the others' reversions to which a head adds most, and the one in which its kind is measured.

    Args:
        rises: The rise of C for every set of planted heads that is put back, the empty one included.
        head: The head.

    Returns:
        The most that it adds, and the set: the empty one where it alone adds at least half as much.
    """
    added = {group: rises[group | {head}] - rise for group, rise in rises.items() if head not in group}
    best = max(added, key=lambda group: added[group])
    alone = rises[frozenset({head})]
    return added[best], frozenset() if alone >= ALONE * added[best] else best


@torch.no_grad()
def measure(made: Bench, heads: Sequence[Head] | None = None) -> Truth:
    """Find out by brute force what the planted heads do.

    Args:
        made: Conflicts, ready to be run through the planted model.
        heads: The planted heads to measure; all of them by default.

    Returns:
        The truth.
    """
    chosen = tuple(sorted(made.heads if heads is None else heads))
    kept: dict[tuple[str, frozenset[Head]], Run] = {}

    def run(cell: str, back: frozenset[Head]) -> Run:
        if (cell, back) not in kept:
            kept[cell, back] = whole(made, cell, back)
        return kept[cell, back]

    def hearing(one: Tensor, other: Tensor) -> float:
        return made.half(one, other)

    empty: frozenset[Head] = frozenset()
    c = hearing(run("va", empty).logits, run("av", empty).logits)
    g = hearing(whole(made, "blank_a").logits, whole(made, "blank_v").logits)
    rises = {empty: 0.0}
    for size in range(1, len(chosen) + 1):
        for group in map(frozenset, itertools.combinations(chosen, size)):
            rises[group] = hearing(whole(made, "va", group).logits, whole(made, "av", group).logits) - c

    truths: list[HeadTruth] = []
    for head in chosen:
        adds, back = best_context(rises, head)
        held = c + rises[back]
        cells = {cell: run(cell, back) for cell in ("va", "av", *MIRROR, *MIRROR.values())}
        direct = hearing(*(directly(made, cells[cell], head, back) for cell in ("va", "av"))) - held
        reads = {
            donor: hearing(
                donated(made, cells["va"], cells[donor], head, back),
                donated(made, cells["av"], cells[MIRROR[donor]], head, back),
            )
            - held
            for donor in MIRROR
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
    sets = tuple((tuple(sorted(group)), rise / (g - c)) for group, rise in rises.items() if group)
    everything = rises[frozenset(chosen)]
    return Truth(tuple(truths), g=g, c=c, c_reverted=c + everything, n=len(made.sound), sets=sets)


def changed_elsewhere(model: Any, base: Any, heads: Sequence[Head]) -> int:
    """Count the weights that differ from the base outside the planted heads; there should be none.

    Args:
        model: The planted model.
        base: The model before planting.
        heads: The planted heads.

    Returns:
        How many single weights differ.
    """
    allowed: dict[str, Tensor] = {}
    for layer in {layer for layer, _ in heads}:
        allowed |= head_masks(base, layer, [head for at, head in heads if at == layer])
    then = base.state_dict()
    count = 0
    for name, value in model.state_dict().items():
        differs = value != then[name]
        if name in allowed:
            differs &= allowed[name] == 0
        count += int(differs.sum())
    return count
