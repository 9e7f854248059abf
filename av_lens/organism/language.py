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

from collections.abc import Mapping
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
    """Build the geometry of `blocks` questions of `width` positions after one prefix.

    Args:
        model: A Qwen2.5-Omni thinker.
        prefix_positions: The model's own three position ids of the prefix.
        blocks: How many blocks.
        width: Positions per block.
        blocked: Query-key pairs that may not see each other, beside what the tree itself forbids.

    Returns:
        The geometry, to be used with `run_layers`.
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


def rotate(x: Float[Tensor, "batch head pos d_head"], geometry: Tree) -> Float[Tensor, "batch head pos d_head"]:
    """Turn queries or keys by their positions.

    Args:
        x: Queries or keys; where they are fewer than the tree's positions, they are its last ones.
        geometry: Whose positions to use.

    Returns:
        The turned queries or keys.
    """
    first = geometry.cos.shape[0] - x.shape[2]
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * geometry.cos[first:] + turned * geometry.sin[first:]


def normalise(x: Float[Tensor, "*batch d_model"], norm: Any) -> Float[Tensor, "*batch d_model"]:
    """Apply a root-mean-square norm.

    Args:
        x: The stream.
        norm: The HuggingFace module that holds the weight.

    Returns:
        The normalised stream.
    """
    return functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def attend(
    attention: Any,
    h: Float[Tensor, "batch pos d_model"],
    geometry: Tree,
    *,
    first_row: int,
    keep: Float[Tensor, "batch head asked"] | None,
    weights: Mapping[str, Tensor],
) -> tuple[Float[Tensor, "batch rows d_model"], Float[Tensor, "batch head rows d_head"]]:
    """One attention layer: its output, and each head's z.

    Args:
        attention: The HuggingFace attention module.
        h: The normalised stream.
        geometry: Positions and mask.
        first_row: The first position whose output is wanted.
        keep: What each head's z is multiplied by at the blocks' positions (0 switches it off), or None.
        weights: Weights to use in place of the module's own, by parameter name ("q_proj.weight", …).

    Returns:
        The output and z, both from `first_row` on.
    """
    batch, length, _ = h.shape
    d_head = attention.head_dim
    groups = attention.num_key_value_groups
    own = dict(attention.named_parameters()) | dict(weights)

    def project(name: str, x: Tensor) -> Tensor:
        out = functional.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])
        return out.view(batch, x.shape[1], -1, d_head).transpose(1, 2)

    q = rotate(project("q_proj", h[:, first_row:]), geometry) * attention.scaling
    k = rotate(project("k_proj", h), geometry)
    v = project("v_proj", h)
    rows, n_kv = q.shape[2], k.shape[1]
    q = q.reshape(batch * n_kv, groups * rows, d_head)
    k = k.reshape(batch * n_kv, length, d_head)
    v = v.reshape(batch * n_kv, length, d_head)
    mask = geometry.mask[first_row:].repeat(groups, 1)
    pattern = torch.baddbmm(mask[None], q, k.transpose(1, 2)).softmax(dim=-1)
    z = torch.bmm(pattern, v).view(batch, n_kv * groups, rows, d_head)
    if keep is not None:
        asked = z[:, :, geometry.prefix - first_row :] * keep[..., None]
        z = torch.cat([z[:, :, : geometry.prefix - first_row], asked], dim=2)
    out = functional.linear(z.transpose(1, 2).reshape(batch, rows, -1), own["o_proj.weight"])
    return out, z


def run_layers(
    model: Any,
    x: Float[Tensor, "batch pos d_model"],
    geometry: Tree,
    *,
    start: int = 0,
    stop: int | None = None,
    keep: Mapping[int, Float[Tensor, "batch head asked"]] | None = None,
    skip: frozenset[int] = frozenset(),
    weights: Mapping[int, Mapping[str, Tensor]] | None = None,
    record: dict[int, Tensor] | None = None,
) -> Float[Tensor, "batch rows d_model"]:
    """Run layers `start` to `stop` on the stream; the last layer of all gives the blocks' positions only.

    Args:
        model: A Qwen2.5-Omni thinker.
        x: The stream before layer `start`.
        geometry: Positions and mask.
        start: The first layer to run.
        stop: The layer before which to stop (all layers by default).
        keep: Per layer, what each head's z is multiplied by at the blocks' positions.
        skip: Layers that are left out (the stream passes by them).
        weights: Per layer, attention weights to use in place of the model's own.
        record: Filled with every layer's z at the blocks' positions, where given.

    Returns:
        The stream after the last layer run.
    """
    layers = model.model.language_model.layers
    last = len(layers) if stop is None else stop
    for i in range(start, last):
        first_row = geometry.prefix if i == len(layers) - 1 else 0
        if i not in skip:
            layer = layers[i]
            out, z = attend(
                layer.self_attn,
                normalise(x, layer.input_layernorm),
                geometry,
                first_row=first_row,
                keep=None if keep is None else keep.get(i),
                weights={} if weights is None else weights.get(i, {}),
            )
            if record is not None:
                record[i] = z[:, :, geometry.prefix - first_row :]
            x = x[:, first_row:] + out
            x = x + layer.mlp(normalise(x, layer.post_attention_layernorm))
        else:
            x = x[:, first_row:]
    return x


def read_out(model: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """The logits of a stream that has passed all layers.

    Args:
        model: A Qwen2.5-Omni thinker.
        x: The stream.

    Returns:
        The logits.
    """
    return model.lm_head(normalise(x, model.model.language_model.norm))
