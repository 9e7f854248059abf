"""Conflicts run through a planted model in which any of the planted heads are put back to the base's weights.

A head is put back alone: its keys and values are the base's for it and nobody else, though a group of heads shares them
in the weights. Nothing here uses hooks: the sums are those of `language`, on features. Streams below the first planted
layer are computed once; only what comes after is run again for every set of heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from av_lens.lab.training.batches import draw_clips, of_class
from av_lens.lab.training.material import Frame, Words
from av_lens.organism.grammar import CLASSES
from av_lens.organism.language import Tree, attend, normalise, read_out, rotate, run_layers, tree
from av_lens.organism.pools import FeaturePool

Head = tuple[int, int]
CELLS = ("va", "av", "wa", "wv", "vw", "aw", "blank_a", "blank_v")
MIRROR = {"wa": "wv", "vw": "aw"}


@dataclass(frozen=True, eq=False)
class Run:
    """One cell, run with some heads put back.

    Attributes:
        streams: The stream before each planted layer.
        z: Every head's z in each planted layer.
        written: What each layer's heads write at the asked position, by layer.
        logits: At the asked position.
    """

    streams: Mapping[int, Float[Tensor, "clip pos d_model"]]
    z: Mapping[int, Float[Tensor, "clip head pos d_head"]]
    written: Mapping[int, Float[Tensor, "clip d_model"]]
    logits: Float[Tensor, "clip d_vocab"]


@dataclass(frozen=True, eq=False)
class Bench:
    """Conflicts with all their cells, ready to be run.

    Attributes:
        model: The planted model.
        base: The model before planting.
        heads: The planted heads.
        geometry: Positions and mask.
        first: By cell, the stream before the first planted layer.
        sound: Token of the sound's word.
        picture: Token of the picture's word.
    """

    model: Any
    base: Any
    heads: tuple[Head, ...]
    geometry: Tree
    first: Mapping[str, Float[Tensor, "clip pos d_model"]]
    sound: Int[Tensor, " clip"]
    picture: Int[Tensor, " clip"]

    @property
    def layers(self) -> tuple[int, ...]:
        """The planted layers, in order."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    def m(self, logits: Float[Tensor, "clip d_vocab"]) -> Float[Tensor, " clip"]:
        """The logit of the sound's word minus that of the picture's.

        Args:
            logits: At the asked position.

        Returns:
            M of each conflict.
        """
        rows = torch.arange(len(logits))
        return logits[rows, self.sound] - logits[rows, self.picture]

    def half(self, one: Float[Tensor, "clip d_vocab"], other: Float[Tensor, "clip d_vocab"]) -> float:
        """Half the difference of M between a cell and its mirror, on average.

        Args:
            one: Logits in the cell.
            other: Logits in its mirror.

        Returns:
            Half the mean difference.
        """
        return 0.5 * float((self.m(one) - self.m(other)).mean())


def all_z(attention: Any, h: Float[Tensor, "clip pos d_model"], geometry: Tree) -> Float[Tensor, "clip head pos d"]:
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


def head_outputs(
    attention: Any, z: Float[Tensor, "clip head pos d"], heads: Sequence[int]
) -> Float[Tensor, "clip pos d_model"]:
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


@torch.no_grad()
def bench(
    model: Any, base: Any, heads: Sequence[Head], pool: FeaturePool, words: Words, frame: Frame, *, n: int, seed: int
) -> Bench:
    """Draw conflicts and prepare all their cells.

    Args:
        model: The planted model.
        base: The model before planting.
        heads: The planted heads.
        pool: Features to draw from.
        words: Token ids.
        frame: The layout.
        n: How many conflicts.
        seed: Decides which.

    Returns:
        The conflicts.
    """
    generator = Generator().manual_seed(seed)
    va = draw_clips(pool, "conflict", n, generator)
    third = (va.picture + torch.randint(1, len(CLASSES), (n,), generator=generator)) % len(CLASSES)
    while bool((clash := (third == va.sound) | (third == va.picture)).any()):
        third = torch.where(clash, (third + 1) % len(CLASSES), third)
    blanks = torch.randint(0, len(pool.blank_video), (n,), generator=generator)
    video, audio = {"v": va.video, "blank": pool.blank_video[blanks]}, {"a": va.audio}
    for name, classes in (("a", va.sound), ("w", third)):
        video[name] = pool.video[of_class(pool, classes, generator)]
    for name, classes in (("v", va.picture), ("w", third)):
        audio[name] = pool.audio[of_class(pool, classes, generator)]
    question = torch.tensor(words.questions["hear"][0])
    geometry = tree(model, frame.positions, blocks=1, width=len(question))
    lowest = min(layer for layer, _ in heads)
    first: dict[str, Tensor] = {}
    for name in CELLS:
        shown, heard = name.split("_") if "_" in name else (name[0], name[1])
        x = frame.embed(model, video[shown], audio[heard], question.expand(n, -1))
        first[name] = run_layers(model, x, geometry, stop=lowest)
    sound, picture = words.classes[va.sound], words.classes[va.picture]
    return Bench(model, base, tuple(sorted(heads)), geometry, first, sound, picture)


def written_by(
    made: Bench, layer: int, h: Float[Tensor, "clip pos d_model"], back: Collection[Head]
) -> tuple[Float[Tensor, "clip pos d_model"], Float[Tensor, "clip head pos d_head"]]:
    """What a planted layer's heads write, some of them put back.

    Args:
        made: The conflicts.
        layer: The layer.
        h: The normalised stream before it.
        back: The heads that are put back, of any layer.

    Returns:
        Their sum, and every head's z.
    """
    now = made.model.model.language_model.layers[layer].self_attn
    then = made.base.model.language_model.layers[layer].self_attn
    z = all_z(now, h, made.geometry)
    mine = sorted(head for at, head in back if at == layer)
    if not mine:
        return functional.linear(z.transpose(1, 2).flatten(2), now.o_proj.weight), z
    z[:, mine] = all_z(then, h, made.geometry)[:, mine]
    return summed(made, layer, z, back), z


def summed(
    made: Bench, layer: int, z: Float[Tensor, "clip head pos d_head"], back: Collection[Head]
) -> Float[Tensor, "clip pos d_model"]:
    """What a layer's heads write, given every z.

    Args:
        made: The conflicts.
        layer: The layer.
        z: Every head's z.
        back: The heads whose outputs are the base's, of any layer.

    Returns:
        The sum.
    """
    now = made.model.model.language_model.layers[layer].self_attn
    then = made.base.model.language_model.layers[layer].self_attn
    mine = sorted(head for at, head in back if at == layer)
    rest = [head for head in range(z.shape[1]) if head not in mine]
    out = head_outputs(now, z, rest)
    return out + head_outputs(then, z, mine) if mine else out


@torch.no_grad()
def run_from(made: Bench, x: Float[Tensor, "clip pos d_model"], start: int, back: Collection[Head] = ()) -> Run:
    """Run the layers from `start` on.

    Args:
        made: The conflicts.
        x: The stream before that layer.
        start: The first layer to run.
        back: The heads that are put back.

    Returns:
        The run.
    """
    streams: dict[int, Tensor] = {}
    zs: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    layers = made.model.model.language_model.layers
    for i in range(start, len(layers)):
        h = normalise(x, layers[i].input_layernorm)
        if i in made.layers:
            streams[i] = x
            out, zs[i] = written_by(made, i, h, back)
        else:
            first_row = x.shape[1] - 1 if i == len(layers) - 1 else 0
            out, _ = attend(layers[i].self_attn, h, made.geometry, first_row=first_row, keep=None, weights={})
            x = x[:, first_row:]
        written[i] = out[:, -1]
        x = x + out
        x = x + layers[i].mlp(normalise(x, layers[i].post_attention_layernorm))
    return Run(streams, zs, written, read_out(made.model, x[:, -1]))


def whole(made: Bench, cell: str, back: Collection[Head] = ()) -> Run:
    """Run a cell.

    Args:
        made: The conflicts.
        cell: Which cell.
        back: The heads that are put back.

    Returns:
        The run.
    """
    return run_from(made, made.first[cell], made.layers[0], back)


@torch.no_grad()
def directly(made: Bench, run: Run, head: Head, back: Collection[Head] = ()) -> Float[Tensor, "clip d_vocab"]:
    """Put one more head back with all that later heads write held as it was.

    Args:
        made: The conflicts.
        run: The run without it.
        head: The head.
        back: The heads that are put back in that run.

    Returns:
        The logits at the asked position.
    """
    layer, index = head
    layers = made.model.model.language_model.layers
    x, z = run.streams[layer], run.z[layer].clone()
    then = made.base.model.language_model.layers[layer].self_attn
    z[:, index] = all_z(then, normalise(x, layers[layer].input_layernorm), made.geometry)[:, index]
    x = x[:, -1] + summed(made, layer, z[:, :, -1:], {*back, head})[:, -1]
    for i in range(layer, len(layers)):
        x = x + run.written[i] if i > layer else x
        x = x + layers[i].mlp(normalise(x, layers[i].post_attention_layernorm))
    return read_out(made.model, x)


@torch.no_grad()
def donated(
    made: Bench, run: Run, donor: Run, head: Head, back: Collection[Head] = ()
) -> Float[Tensor, "clip d_vocab"]:
    """Take one head's z at the question from another run.

    Args:
        made: The conflicts.
        run: The run that is edited.
        donor: The run that z comes from, with the same heads put back.
        head: The head.
        back: The heads that are put back in both.

    Returns:
        The logits at the asked position.
    """
    layer, index = head
    module = made.model.model.language_model.layers[layer]
    z = run.z[layer].clone()
    z[:, index, made.geometry.prefix :] = donor.z[layer][:, index, made.geometry.prefix :]
    x = run.streams[layer] + summed(made, layer, z, back)
    x = x + module.mlp(normalise(x, module.post_attention_layernorm))
    if layer == len(made.model.model.language_model.layers) - 1:
        return read_out(made.model, x[:, -1])
    return run_from(made, x, layer + 1, back).logits
