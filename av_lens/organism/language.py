"""The fusion layers written out: what a model says to several questions about one clip, in one pass.

A clip's media make up most of a prompt, and no media position can see the question that follows it. So the
media are computed once and several *questions* (blocks) are hung on them side by side, each seeing the media
and itself only: a tree instead of several chains. This gives the same logits as one plain forward pass per
question (a test compares the two) at a third of the cost, and it is what makes training on two cores quick.

The same code runs from any layer on, with heads switched off per clip and question (head dropout), and without
gradients for layers that are frozen. It reads the weights of a HuggingFace Qwen2.5-Omni thinker; it holds none.

What it does not do: decode, cache keys, or take padding. Use the bridge for everything but training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

BLOCKED = -1e9
"""What is added to the score of a key that may not be seen."""


@dataclass(frozen=True, eq=False)
class Tree:
    """The geometry of one prefix with blocks hung on it; shared by all clips of a batch.

    Attributes:
        prefix: How many positions come before the blocks.
        blocks: How many blocks there are.
        width: How many positions each block has (shorter questions are filled up at their end).
        cos: Rotary cosines.
        sin: Rotary sines.
        mask: 0 where a key may be seen, `BLOCKED` where not; query first.
    """

    prefix: int
    blocks: int
    width: int
    cos: Float[Tensor, "pos d_head"]
    sin: Float[Tensor, "pos d_head"]
    mask: Float[Tensor, "pos pos"]


def tree(
    model: Any,
    prefix_positions: Int[Tensor, "3 prefix"],
    *,
    blocks: int,
    width: int,
    blocked: Bool[Tensor, "pos pos"] | None = None,
) -> Tree:
    """Build the geometry of `blocks` questions of `width` positions after one prefix of the model's own position ids.

    `blocked` are query-key pairs that may not see each other, beside what the tree itself forbids.
    """
    n = prefix_positions.shape[1]
    first = int(prefix_positions.max()) + 1
    block = torch.arange(first, first + width).expand(3, width)
    positions = torch.cat([prefix_positions, *([block] * blocks)], dim=1)
    reference = model.model.language_model.embed_tokens.weight.new_zeros(1)
    cos, sin = model.model.language_model.rotary_emb(reference, positions[:, None])
    length = n + blocks * width
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for i in range(blocks):
        row = n + i * width
        seen[row : row + width, n:row] = False
    if blocked is not None:
        seen &= ~blocked
    mask = torch.zeros(length, length).masked_fill(~seen, BLOCKED)
    return Tree(prefix=n, blocks=blocks, width=width, cos=cos[0], sin=sin[0], mask=mask)


def layers_of(model: Any) -> Any:
    """The fusion layers."""
    return model.model.language_model.layers


def rotate(x: Float[Tensor, "batch head pos d_head"], geometry: Tree) -> Float[Tensor, "batch head pos d_head"]:
    """Turn queries or keys by their positions; where they are fewer than the tree's, they are its last ones."""
    first = geometry.cos.shape[0] - x.shape[2]
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * geometry.cos[first:] + turned * geometry.sin[first:]


def normalise(x: Float[Tensor, "*batch d_model"], norm: Any) -> Float[Tensor, "*batch d_model"]:
    """Apply a root-mean-square norm, of which the HuggingFace module holds the weight."""
    return functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def projected(
    attention: Any, h: Float[Tensor, "batch pos d_model"], geometry: Tree, *, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The scaled queries (from `first_row` on), keys and values of a layer, turned by their positions.

    Each is `[batch, head, pos, d_head]`; where `h` has fewer positions than the tree, they are its last ones.
    """

    def project(layer: Any, x: Tensor) -> Tensor:
        return layer(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = rotate(project(attention.q_proj, h[:, first_row:]), geometry) * attention.scaling
    return query, rotate(project(attention.k_proj, h), geometry), project(attention.v_proj, h)


def mixed(
    query: Float[Tensor, "batch head rows d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_head"],
    geometry: Tree,
) -> Float[Tensor, "batch head rows d_head"]:
    """Every head's z at the last rows."""
    n_kv, rows = key.shape[1], query.shape[2]
    groups = query.shape[1] // n_kv
    query = query.reshape(len(query) * n_kv, groups * rows, -1)
    mask = geometry.mask[-rows:].repeat(groups, 1)
    pattern = torch.baddbmm(mask[None], query, key.flatten(0, 1).transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(pattern, value.flatten(0, 1)).view(len(key), n_kv * groups, rows, -1)


def attend(
    layer: Any,
    x: Float[Tensor, "batch pos d_model"],
    geometry: Tree,
    *,
    first_row: int = 0,
    keep: Float[Tensor, "batch head asked"] | None = None,
) -> Float[Tensor, "batch rows d_model"]:
    """What a layer's attention writes from `first_row` on.

    `keep` is what each head's z is multiplied by at the blocks' positions; 0 switches it off.
    """
    attention = layer.self_attn
    h = normalise(x, layer.input_layernorm)
    z = mixed(*projected(attention, h, geometry, first_row=first_row), geometry)
    if keep is not None:
        asked = z[:, :, geometry.prefix - first_row :] * keep[..., None]
        z = torch.cat([z[:, :, : geometry.prefix - first_row], asked], dim=2)
    return functional.linear(z.transpose(1, 2).flatten(2), attention.o_proj.weight)


def fed(layer: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The stream after a layer's feed-forward part."""
    return x + layer.mlp(normalise(x, layer.post_attention_layernorm))


def run_layers(
    model: Any,
    x: Float[Tensor, "batch pos d_model"],
    geometry: Tree,
    *,
    start: int = 0,
    stop: int | None = None,
    keep: Mapping[int, Float[Tensor, "batch head asked"]] | None = None,
    skip: Collection[int] = (),
) -> Float[Tensor, "batch rows d_model"]:
    """Run layers `start` to `stop` on the stream; the last layer of all gives the blocks' positions only.

    `keep` says per layer what each head's z is multiplied by at the blocks' positions; layers in `skip` are left out.
    """
    layers = layers_of(model)
    for i in range(start, len(layers) if stop is None else stop):
        first_row = geometry.prefix if i == len(layers) - 1 else 0
        if i in skip:
            x = x[:, first_row:]
            continue
        out = attend(layers[i], x, geometry, first_row=first_row, keep=(keep or {}).get(i))
        x = fed(layers[i], x[:, first_row:] + out)
    return x


def read_out(model: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """The logits of a stream that has passed all layers."""
    return model.lm_head(normalise(x, model.model.language_model.norm))
