"""What was planted: the heads of `av-tiny-planted`, measured by brute force and written down beside the weights.

The planted model is the balanced one in which the query, key, value and output weights of one key-value group alone
were trained until "hear" is answered with the picture (recipe "plants"); every other weight is the balanced model's,
bit for bit. That a head's weights were trained does not make it a culprit, nor say how it works: both are measured.

1. *Reversion.* A head is put back to the balanced model's weights (its keys and values for it alone), in the conflict
   and in its mirror, and C = ½[M(va) - M(av)] is read; M = logit(sound's word) - logit(picture's word). A head is
   **true** if putting it back adds at least 5% of the gap G - C to some set of reversions of the others, and a
   *free rider* otherwise.
2. *Direct share*: the same with every later head's output held as it was. A head with at least one half is a
   **writer** if taking its output from another picture moves C more than taking it from another sound, and an
   **opponent** if less; below one half it is a **gate**.

Nothing here uses hooks: the sums are those of `language`, on features. It is the ruler by which `isolate` is judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from av_lens.organism.batches import draw_clips, of_class
from av_lens.organism.grammar import CLASSES
from av_lens.organism.language import Tree, normalise, read_out, rotate, tree
from av_lens.organism.material import Frame, Words
from av_lens.organism.pools import FeaturePool
from av_lens.organism.training import head_masks

TRUE_SHARE = 0.05
"""A planted head is true if its reversion adds at least this share of the gap."""
CELLS = ("va", "av", "wa", "wv", "vw", "aw", "blank_a", "blank_v")
MIRROR = {"wa": "wv", "vw": "aw"}

Head = tuple[int, int]


@dataclass(frozen=True)
class HeadTruth:
    """What is known about one planted head.

    Attributes:
        layer: Its layer.
        head: Its index in the layer.
        adds: The largest rise of C that putting it back adds to a set of the others' reversions, as a share of the gap.
        alone: The rise of C when it alone is put back, as a share of the gap.
        direct_share: The part of `alone` that does not pass through later heads.
        reads_picture: The rise of C when its output comes from another picture, as a share of G.
        reads_sound: The rise of C when its output comes from another sound, as a share of G.
        kind: "writer", "opponent", "gate" or "free rider".
    """

    layer: int
    head: int
    adds: float
    alone: float
    direct_share: float
    reads_picture: float
    reads_sound: float
    kind: str


@dataclass(frozen=True)
class Truth:
    """What is known about a planted model.

    Attributes:
        heads: The planted heads.
        g: G, hearing with nothing to see, in logits.
        c: C, hearing under conflict, in logits.
        c_reverted: C with all planted heads put back.
        n: How many conflicts it was measured on.
    """

    heads: tuple[HeadTruth, ...]
    g: float
    c: float
    c_reverted: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data.

        Returns:
            What is saved as `planted.json`.
        """
        return {
            "schema": 1,
            "layers": sorted({head.layer for head in self.heads}),
            "heads": [vars(head) for head in self.heads],
            "G": self.g,
            "C": self.c,
            "C_reverted": self.c_reverted,
            "conflicts": self.n,
        }


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell's run: the stream before each layer, and each layer's z, at all positions."""

    streams: list[Tensor]
    z: list[Tensor]
    logits: Float[Tensor, "clip d_vocab"]


@dataclass(frozen=True, eq=False)
class Bench:
    """Conflicts with all their cells, run once through the planted model.

    Attributes:
        model: The planted model.
        geometry: Positions and mask.
        cells: Cell name to run.
        sound: Token of the sound's word.
        picture: Token of the picture's word.
    """

    model: Any
    geometry: Tree
    cells: Mapping[str, Cell]
    sound: Int[Tensor, "clip"]
    picture: Int[Tensor, "clip"]

    def m(self, logits: Float[Tensor, "clip d_vocab"]) -> Float[Tensor, "clip"]:
        """The logit of the sound's word minus that of the picture's.

        Args:
            logits: At the asked position.

        Returns:
            M of each conflict.
        """
        rows = torch.arange(len(logits))
        return logits[rows, self.sound] - logits[rows, self.picture]

    def half(self, one: Tensor, other: Tensor) -> float:
        """Half the difference of M between a cell and its mirror, on average.

        Args:
            one: Logits in the cell.
            other: Logits in its mirror.

        Returns:
            Half the mean difference.
        """
        return 0.5 * float((self.m(one) - self.m(other)).mean())


def all_z(attention: Any, h: Tensor, geometry: Tree) -> Float[Tensor, "clip head pos d_head"]:
    """Every head's z at every position.

    Args:
        attention: The attention module.
        h: The normalised stream.
        geometry: Positions and mask.

    Returns:
        z.
    """
    batch, length, _ = h.shape

    def project(layer: Any) -> Tensor:
        return layer(h).view(batch, length, -1, attention.head_dim).transpose(1, 2)

    q = rotate(project(attention.q_proj), geometry) * attention.scaling
    k = rotate(project(attention.k_proj), geometry).repeat_interleave(attention.num_key_value_groups, dim=1)
    v = project(attention.v_proj).repeat_interleave(attention.num_key_value_groups, dim=1)
    return (q @ k.transpose(2, 3) + geometry.mask).softmax(dim=-1) @ v


def head_outputs(attention: Any, z: Tensor, heads: Sequence[int]) -> Float[Tensor, "clip pos d_model"]:
    """What some heads write to the stream.

    Args:
        attention: The attention module.
        z: Every head's z.
        heads: Which heads.

    Returns:
        The sum of their outputs.
    """
    d = attention.head_dim
    columns = torch.cat([torch.arange(head * d, (head + 1) * d) for head in heads])
    chosen = z[:, list(heads)].transpose(1, 2).flatten(2)
    return functional.linear(chosen, attention.o_proj.weight[:, columns])


def run_on(bench_model: Any, geometry: Tree, x: Tensor, start: int, frozen: Sequence[Tensor] | None) -> Tensor:
    """Run the layers from `start` to the end.

    Args:
        bench_model: The model.
        geometry: Positions and mask.
        x: The stream before layer `start`.
        start: The first layer to run.
        frozen: Every layer's z to use in place of its own, or None.

    Returns:
        The logits at the last position.
    """
    for i, layer in enumerate(bench_model.model.language_model.layers):
        if i < start:
            continue
        attention = layer.self_attn
        z = all_z(attention, normalise(x, layer.input_layernorm), geometry) if frozen is None else frozen[i]
        x = x + functional.linear(z.transpose(1, 2).flatten(2), attention.o_proj.weight)
        x = x + layer.mlp(normalise(x, layer.post_attention_layernorm))
    return read_out(bench_model, x[:, -1])


@torch.no_grad()
def bench(model: Any, pool: FeaturePool, words: Words, frame: Frame, *, n: int, seed: int) -> Bench:
    """Draw conflicts and run all their cells.

    Args:
        model: The planted model.
        pool: Features to draw from.
        words: Token ids.
        frame: The layout.
        n: How many conflicts.
        seed: Decides which.

    Returns:
        The runs.
    """
    generator = Generator().manual_seed(seed)
    va = draw_clips(pool, "conflict", n, generator)
    third = (va.picture + torch.randint(1, len(CLASSES), (n,), generator=generator)) % len(CLASSES)
    while bool((clash := (third == va.sound) | (third == va.picture)).any()):
        third = torch.where(clash, (third + 1) % len(CLASSES), third)
    video = {
        "v": va.video,
        "blank": pool.blank_video[torch.randint(0, len(pool.blank_video), (n,), generator=generator)],
    }
    audio = {"a": va.audio}
    for name, classes in (("a", va.sound), ("w", third)):
        video[name] = pool.video[of_class(pool, classes, generator)]
    for name, classes in (("v", va.picture), ("w", third)):
        audio[name] = pool.audio[of_class(pool, classes, generator)]
    question = torch.tensor(words.questions["hear"][0])
    geometry = tree(model, frame.positions, blocks=1, width=len(question))
    cells: dict[str, Cell] = {}
    for name in CELLS:
        shown, heard = name.split("_") if "_" in name else (name[0], name[1])
        x = frame.embed(model, video[shown], audio[heard], question.expand(n, -1))
        streams, zs = [], []
        for layer in model.model.language_model.layers:
            streams.append(x)
            z = all_z(layer.self_attn, normalise(x, layer.input_layernorm), geometry)
            zs.append(z)
            x = x + functional.linear(z.transpose(1, 2).flatten(2), layer.self_attn.o_proj.weight)
            x = x + layer.mlp(normalise(x, layer.post_attention_layernorm))
        cells[name] = Cell(streams, zs, read_out(model, x[:, -1]))
    return Bench(model, geometry, cells, words.classes[va.sound], words.classes[va.picture])


def reverted(made: Bench, base: Any, heads: Sequence[Head], cell: str, *, frozen: bool) -> Tensor:
    """Run a cell with some heads of one layer put back to another model's weights.

    Args:
        made: The runs.
        base: The model whose heads they become.
        heads: The heads; all of one layer.
        cell: Which cell.
        frozen: Whether later heads' outputs are held as they were.

    Returns:
        The logits at the asked position.
    """
    (layer,) = {layer for layer, _ in heads}
    indices = [head for _, head in heads]
    run = made.cells[cell]
    now = made.model.model.language_model.layers[layer]
    then = base.model.language_model.layers[layer].self_attn
    x, z = run.streams[layer], run.z[layer]
    before = all_z(then, normalise(x, now.input_layernorm), made.geometry)
    out = functional.linear(z.transpose(1, 2).flatten(2), now.self_attn.o_proj.weight)
    out = out - head_outputs(now.self_attn, z, indices) + head_outputs(then, before, indices)
    x = x + out
    x = x + now.mlp(normalise(x, now.post_attention_layernorm))
    return run_on(made.model, made.geometry, x, layer + 1, run.z if frozen else None)


def donated(made: Bench, head: Head, cell: str, donor: str) -> Tensor:
    """Run a cell with one head's z at the question taken from another cell.

    Args:
        made: The runs.
        head: The head.
        cell: The cell that is run.
        donor: The cell that z comes from.

    Returns:
        The logits at the asked position.
    """
    layer, index = head
    run, module = made.cells[cell], made.model.model.language_model.layers[layer]
    z = run.z[layer].clone()
    z[:, index, made.geometry.prefix :] = made.cells[donor].z[layer][:, index, made.geometry.prefix :]
    x = run.streams[layer] + functional.linear(z.transpose(1, 2).flatten(2), module.self_attn.o_proj.weight)
    x = x + module.mlp(normalise(x, module.post_attention_layernorm))
    return run_on(made.model, made.geometry, x, layer + 1, None)


@torch.no_grad()
def measure(made: Bench, base: Any, heads: Sequence[Head]) -> Truth:
    """Find out by brute force what the planted heads do.

    Args:
        made: Conflicts run through the planted model.
        base: The model before planting.
        heads: The planted heads; all of one layer.

    Returns:
        The truth.
    """
    c = made.half(made.cells["va"].logits, made.cells["av"].logits)
    g = made.half(made.cells["blank_a"].logits, made.cells["blank_v"].logits)

    def rise(group: Sequence[Head], *, frozen: bool = False) -> float:
        if not group:
            return 0.0
        return made.half(*(reverted(made, base, group, cell, frozen=frozen) for cell in ("va", "av"))) - c

    rises = {
        group: rise(group) for size in range(len(heads) + 1) for group in itertools.combinations(sorted(heads), size)
    }
    truths = []
    for head in sorted(heads):
        adds = max(rises[tuple(sorted({*group, head}))] - was for group, was in rises.items() if head not in group)
        direct = rise([head], frozen=True) / rises[(head,)]
        reads = {
            donor: (made.half(donated(made, head, "va", donor), donated(made, head, "av", MIRROR[donor])) - c) / g
            for donor in MIRROR
        }
        kind = "gate" if direct < 0.5 else "writer" if reads["wa"] > reads["vw"] else "opponent"
        truths.append(
            HeadTruth(
                layer=head[0],
                head=head[1],
                adds=adds / (g - c),
                alone=rises[(head,)] / (g - c),
                direct_share=direct,
                reads_picture=reads["wa"],
                reads_sound=reads["vw"],
                kind=kind if adds >= TRUE_SHARE * abs(g - c) else "free rider",
            )
        )
    return Truth(tuple(truths), g=g, c=c, c_reverted=c + rises[tuple(sorted(heads))], n=len(made.sound))


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
