"""A planted organism in a larger body: 12 layers of 12 heads, whose guilty heads are known.

The organism's own 7 layers keep their order and their weights: a head keeps its number, its layer moves to `PLACES`.
Each of its layers gets four more heads and two more key-value heads, and five whole layers stand between them, all of
random weights that write `noise` times as much as the organism's own do. Nothing is trained: at noise 0 the body says
what the organism says.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

import av_lens as avl
from av_lens.lab.calibration import model_folder
from av_lens.organism.anatomy import open_checkpoint

LAYERS, HEADS, KV_HEADS = 12, 12, 6
PLACES = (0, 2, 4, 5, 7, 9, 11)


@torch.no_grad()
def widened(name: str, *, noise: float, seed: int = 0) -> Any:
    """Load a shipped model in the larger body."""
    small = open_checkpoint(model_folder(name))
    config = copy.deepcopy(small.config)
    text = config.text_config
    text.head_dim = text.hidden_size // text.num_attention_heads
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = LAYERS, HEADS, KV_HEADS
    text.layer_types = ["full_attention"] * LAYERS
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        large = type(small)(config).float().eval()
    rest = {key: value for key, value in small.state_dict().items() if ".language_model.layers." not in key}
    _, strange = large.load_state_dict(rest, strict=False)
    assert not strange
    own, layers = small.model.language_model.layers, large.model.language_model.layers
    generator = torch.Generator().manual_seed(seed)
    for place, layer in enumerate(layers):
        known = place in PLACES
        source = own[PLACES.index(place)] if known else own[sum(one < place for one in PLACES) - 1]
        parts = dict(source.named_parameters())
        for part, given in layer.named_parameters():
            writes = part.endswith(("o_proj.weight", "down_proj.weight"))
            spread = float(parts[part].std()) * (noise if writes else 1.0)
            given.copy_(torch.randn(given.shape, generator=generator) * spread)
            if known or "norm" in part:
                given[tuple(map(slice, parts[part].shape))] = parts[part]
    return avl.load("widened", hf_model=large, processor=avl.load(name).processor)


def moved(head: tuple[int, int]) -> tuple[int, int]:
    """Say where one of the organism's heads is."""
    return PLACES[head[0]], head[1]
