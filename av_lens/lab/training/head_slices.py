"""Which weights are a head's own: rows of its queries, columns of its outputs, and its group's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from av_lens.model.differences import Slice

Head = tuple[int, int]


def groups_of(model: Any, heads: Sequence[Head]) -> list[Head]:
    """The key-value groups that some heads read, as (layer, group)."""
    config = model.config.text_config
    per_group = config.num_attention_heads // config.num_key_value_heads
    return sorted({(layer, head // per_group) for layer, head in heads})


def sharers(model: Any, heads: Sequence[Head]) -> list[Head]:
    """All heads of some heads' groups: those whose keys and values change if theirs do."""
    config = model.config.text_config
    per_group = config.num_attention_heads // config.num_key_value_heads
    return [(layer, group * per_group + i) for layer, group in groups_of(model, heads) for i in range(per_group)]


def head_slices(model: Any, heads: Sequence[Head]) -> list[Slice]:
    """The slices of weights that are some heads' own: queries and outputs of every head, keys and values of a group."""
    found: list[Slice] = []
    kinds = (("q_proj", "o_proj"), sorted(heads)), (("k_proj", "v_proj"), groups_of(model, heads))
    for names, units in kinds:
        for layer, unit in units:
            d = model.model.language_model.layers[layer].self_attn.head_dim
            for name in names:
                at = f"model.language_model.layers.{layer}.self_attn.{name}"
                parts = [("weight", 1)] if name == "o_proj" else [("weight", 0), ("bias", 0)]
                found += [Slice(f"{at}.{part}", axis, unit * d, (unit + 1) * d) for part, axis in parts]
    return found


def head_masks(model: Any, heads: Sequence[Head]) -> dict[str, Tensor]:
    """Mark the attention weights that are some heads' own: parameter name to 1 where a weight is theirs, else 0."""
    slices, held = head_slices(model, heads), dict(model.named_parameters())
    masks = {part.name: torch.zeros_like(held[part.name]) for part in slices}
    for part in slices:
        part.of(masks[part.name]).fill_(1)
    return masks
