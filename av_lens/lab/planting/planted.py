"""What was planted: the nodes of a planted model, measured by brute force and written down beside the weights.

The ruler by which `isolate` is judged (protocol section 9): every set of planted nodes is put back to the balanced
model's weights, heads' keys and values for them alone, and C is read; `sheets` does the sums, without hooks. A node's
kind is measured with it alone put back where that adds at least half of the most that it adds to any set; otherwise
with that set put back, and `context` names it. An MLP is the head `MLP` of its layer.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from typing import Any

import torch

from av_lens.isolation.measuring.engine import MLP, Node
from av_lens.lab.planting import sheets
from av_lens.lab.planting.kinds import Kind
from av_lens.lab.planting.sheets import MIRROR, SILENCE, Bench, Run, directly, donated
from av_lens.lab.training.engine import sharers
from av_lens.lab.training.pools import Material
from av_lens.model.differences import Slice

TRUE_SHARE = 0.05  # A planted node is true if its reversion adds at least this share of the gap
ALONE = 0.5  # kinds are measured alone where the node alone adds at least this share of the most it adds to any set
FREE_RIDER = "free rider"
ENOUGH_ALONE = 0.25
"""Of two redundant plants, putting one back alone may restore at most this share of what both restore."""
LEAST_GAP = 0.3  # a plant that silences takes at least this share of G
CONFLICTS = 96
MOST_NODES = 8  # of more nodes the sets are not all tried


@dataclass(frozen=True)
class Planted:
    """What was planted together."""

    nodes: tuple[Node, ...]  # the nodes whose weights changed
    slices: tuple[Slice, ...]  # these weights
    behaviour: str  # what they are to bring about
    made: Mapping[str, Any] = field(default_factory=dict[str, Any])  # how it was made, for the record
    early: frozenset[Node] = frozenset()  # those of its nodes that act while the media are read, at a sink


@dataclass(frozen=True)
class NodeTruth:
    """What is known about one planted node."""

    layer: int  # its layer
    head: int  # its index in the layer, or `MLP`
    # the largest rise of C that putting it back adds to a set of the others' reversions, as a share of the gap
    adds: float
    alone: float  # the rise of C when it alone is put back, as a share of the gap
    direct_share: float  # the part of its rise of C that does not pass through later heads
    reads_picture: float  # the rise of C when its output comes from another picture, as a share of G
    reads_sound: float  # the rise of C when its output comes from another sound, as a share of G
    kind: str  # "writer", "opponent", "gate" or "free rider"
    # the largest threshold s, a share of G, at which it is true; above it a node that is no free rider is minor
    true_up_to_s: float = 1.0
    site: str = "suffix"  # where it acts: "suffix" or "sinks"
    context: tuple[Node, ...] = ()  # the nodes that were put back while its direct share and its reads were measured

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data: its attributes, and whether it is a free rider."""
        return {**vars(self), "context": [list(node) for node in self.context], "free_rider": self.kind == FREE_RIDER}


@dataclass(frozen=True)
class Truth:
    """What is known about a planted model."""

    nodes: tuple[NodeTruth, ...]  # the planted nodes
    g: float  # G, hearing with nothing to see, in logits
    c: float  # C, hearing under conflict, in logits
    c_reverted: float  # C with all planted nodes put back
    n: int  # how many conflicts it was measured on
    # every set of planted nodes with the rise of C when it is put back, as a share of the gap
    sets: tuple[tuple[tuple[Node, ...], float], ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the true nodes, the one that adds most first."""
        ranked = sorted(self.nodes, key=lambda node: -node.adds)
        return tuple(node.kind for node in ranked if node.kind != FREE_RIDER)

    def restored(self, nodes: Iterable[Node]) -> float:
        """Look up the rise of C, as a share of the gap, when some of the planted nodes are put back."""
        wanted = tuple(sorted(nodes))
        return dict(self.sets)[wanted] if wanted else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data, as it is saved in `planted.json`."""
        return {
            "schema": 3,
            "layers": sorted({node.layer for node in self.nodes}),
            "heads": [node.as_dict() for node in self.nodes],
            "sets": [{"reverted": [list(node) for node in nodes], "restores": share} for nodes, share in self.sets],
            "G": self.g,
            "C": self.c,
            "C_reverted": self.c_reverted,
            "conflicts": self.n,
        }


def kind_of(*, adds: float, direct_share: float, reads_picture: float, reads_sound: float) -> str:
    """Name what a planted node does: "writer", "opponent", "gate" or "free rider"."""
    if adds < TRUE_SHARE:
        return FREE_RIDER
    if direct_share < 0.5:
        return "gate"
    return "writer" if reads_picture > reads_sound else "opponent"


def best_context(rises: Mapping[frozenset[Node], float], node: Node) -> tuple[float, frozenset[Node]]:
    """The most a node adds to a set of reversions (`rises` has every set's), and the set to measure its kind in."""
    added = {group: rises[group | {node}] - rise for group, rise in rises.items() if node not in group}
    best = max(added, key=lambda group: added[group])
    alone = rises[frozenset({node})]
    return added[best], frozenset() if alone >= ALONE * added[best] else best


def hearing(made: Bench, cells: tuple[str, str] = ("va", "av"), back: Collection[Node] = ()) -> float:
    """C with some nodes put back; from the cells with a blank picture, G."""
    return made.half(*(sheets.whole(made, cell, back).logits for cell in cells))


def g_of(made: Bench) -> float:
    """G: hearing with nothing to see."""
    return hearing(made, ("blank_a", "blank_v"))


@torch.no_grad()
def measure(made: Bench, nodes: Sequence[Node] | None = None, *, early: Collection[Node] = ()) -> Truth:
    """Find out by brute force what the planted nodes (all of them by default) do; `early` ones act at the sinks."""
    chosen = tuple(sorted(made.nodes if nodes is None else nodes))
    empty: frozenset[Node] = frozenset()

    @cache
    def run(cell: str, back: frozenset[Node]) -> Run:
        return sheets.whole(made, cell, back)

    c, g = hearing(made), g_of(made)
    sets = [frozenset(group) for size in range(1, len(chosen) + 1) for group in combinations(chosen, size)]
    rises = {empty: 0.0, **{group: hearing(made, back=group) - c for group in sets}}
    truths: list[NodeTruth] = []
    for node in chosen:
        adds, back = best_context(rises, node)
        held, first = c + rises[back], 0 if node in early else None
        va, av = run("va", back), run("av", back)
        direct = made.half(*(directly(made, cell, node, back) for cell in (va, av))) - held
        reads = {
            donor: made.half(
                donated(made, va, run(donor, back), node, back, first=first),
                donated(made, av, run(mirror, back), node, back, first=first),
            )
            - held
            for donor, mirror in MIRROR.items()
        }
        total = rises[back | {node}] - rises[back]
        figures = {
            "adds": adds / (g - c),
            "direct_share": direct / total if total else float("nan"),
            "reads_picture": reads["wa"] / g,
            "reads_sound": reads["vw"] / g,
        }
        alone, site = rises[frozenset({node})] / (g - c), "sinks" if node in early else "suffix"
        truths.append(
            NodeTruth(
                *node, **figures, alone=alone, true_up_to_s=adds / g, kind=kind_of(**figures), site=site,
                context=tuple(sorted(back)),
            )
        )  # fmt: skip
    restored = tuple((tuple(sorted(group)), rises[group] / (g - c)) for group in sets)
    return Truth(tuple(truths), g=g, c=c, c_reverted=c + rises[frozenset(chosen)], n=len(made.sound), sets=restored)


def changed_elsewhere(model: Any, base: Any, slices: Iterable[Slice]) -> int:
    """Count the single weights that differ from the base outside some slices; there should be none."""
    then = base.state_dict()
    differs = {name: value != then[name] for name, value in model.state_dict().items()}
    for part in slices:
        part.of(differs[part.name]).fill_(False)
    return sum(int(one.sum()) for one in differs.values())


def missing(wanted: Kind, truth: Truth, silencing: Sequence[Sequence[Node]]) -> list[str]:
    """Say what a try is not, of what was asked for: a sentence for each; `silencing` are the nodes of each plant."""
    if not wanted.wanted:
        return []
    found: list[str] = []
    kinds = truth.kinds
    if not kinds:
        return ["no planted node is true"]
    if kinds[0] not in wanted.wanted or 2 * sum(kind in wanted.wanted for kind in kinds) < len(kinds):
        found.append(f"the true nodes are {', '.join(kinds)}, not mostly {' or '.join(wanted.wanted)}")
    if (lost := 1 - truth.c / truth.g) < LEAST_GAP:
        found.append(f"gap/G is {lost:.2f}: nothing much is lost")
    if not wanted.free_riders and any(node.kind == FREE_RIDER for node in truth.nodes):
        found.append("a planted node rides for free")
    if wanted.each_enough:
        limit = ENOUGH_ALONE * truth.restored(node for nodes in silencing for node in nodes)
        found += [
            f"putting back plant {i + 1} alone restores {truth.restored(nodes):.2f} of the gap: the other is not enough"
            for i, nodes in enumerate(silencing)
            if truth.restored(nodes) > limit
        ]
    return found


def planted_nodes(base: Any, nodes: Iterable[Node]) -> list[Node]:
    """The nodes that planting some nodes changes: MLPs, and all heads that share the heads' keys and values."""
    listed = list(nodes)
    mlps = [node for node in listed if node[1] == MLP]
    return mlps + sharers(base, [node for node in listed if node[1] != MLP])


def described(
    plants: Sequence[Planted], *, model: Any, base: Any, judges: Material, answers: Mapping[str, float], seed: int
) -> tuple[Truth, dict[str, Any]]:
    """Measure a model, rounded to what is stored, on features that it did not learn from: most of `planted.json`."""
    guilty = [node for plant in plants if plant.behaviour == SILENCE for node in plant.nodes]
    others = [node for plant in plants for node in plant.nodes if node not in guilty]
    early = frozenset[Node]().union(*(plant.early for plant in plants))
    made = bench_of(model, base, [*guilty, *others], judges, seed=seed)
    truth = measure(made, guilty, early=early)
    decoys: list[dict[str, Any]] = []
    for layer, head in sorted({*others}):
        rise = (hearing(made, back=[(layer, head)]) - truth.c) / truth.g
        decoys.append({"layer": layer, "head": head, "reversion_raises_C_by_share_of_G": rise})
    return truth, {
        **truth.as_dict(),
        "plants": [
            {"heads": [list(node) for node in plant.nodes], "behaviour": plant.behaviour, **plant.made}
            for plant in plants
        ],
        "decoys": decoys,
        "answers": dict(answers),
        "changed_elsewhere": changed_elsewhere(model, base, [part for plant in plants for part in plant.slices]),
    }


def bench_of(model: Any, base: Any, nodes: Sequence[Node], judges: Material, *, seed: int, layout: int = 0) -> Bench:
    """Draw the conflicts on which a model is measured, in one layout, blanks black or dim."""
    pool, frame = sheets.blanks_of(judges.pool, sheets.PLAIN), judges.frames["both"][layout]
    return sheets.bench(model, base, nodes, pool, judges.words, frame, n=CONFLICTS, seed=seed)
