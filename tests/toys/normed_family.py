"""A family whose layers norm their queries and keys: the tiny thinker with Qwen3's own attention in every layer.

All that av_lens is told is the family below, whose adapter says that the attention has `q_norm` and `k_norm`.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from tiny import tiny_config, tiny_hf_model, tiny_processor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

import av_lens as avl
from av_lens.families import qwen2_5_omni, registry
from av_lens.families.blocks import RealRMSNormBridge

N_LAYERS, N_HEADS, N_KV_HEADS = 4, 4, 2


class NormedAdapter(qwen2_5_omni.Qwen2_5OmniThinkerAdapter):
    """The thinker's adapter, its attention with the two norms."""

    def _build_attention_bridge(self) -> Any:
        norms = {f"{kind}_norm": RealRMSNormBridge(name=f"{kind}_norm", config=self.cfg) for kind in "qk"}
        return self._qkvo_attention_bridge(extra_submodules=norms)


class NormedThinker(Qwen2_5OmniThinkerForConditionalGeneration):
    """The thinker, as a class of its own."""


NORMED = dataclasses.replace(
    qwen2_5_omni.FAMILY, model_class=NormedThinker, adapter=NormedAdapter, model_types=(), inner_config={}
)


@torch.no_grad()
def normed_hf_model(n_kv_heads: int = N_KV_HEADS, dtype: torch.dtype = torch.float32) -> Any:
    """The HuggingFace model; its norms' weights are far from one, so that nothing is right without them."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    sizes = {"n_layers": N_LAYERS, "d_model": 32, "n_heads": N_HEADS, "n_kv_heads": n_kv_heads}
    model, config = tiny_hf_model(**sizes), copy.deepcopy(tiny_config(**sizes).text_config)
    config.attention_bias, config._attn_implementation = True, "eager"
    generator = torch.Generator().manual_seed(1)
    for number, layer in enumerate(model.model.language_model.layers):
        attention = Qwen3Attention(config, number)
        attention.load_state_dict({**layer.self_attn.state_dict()}, strict=False)
        attention.o_proj.bias.zero_()
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.uniform_(0.5, 3.0, generator=generator)
        layer.self_attn = attention.eval()
    return model.to(dtype)


def load_normed(hf_model: Any) -> Any:
    """Wrap such a model."""
    registry.families()
    with patch.dict(registry._KNOWN):  # known while such a model is loaded, and no longer
        registry.register_family(NORMED)
        hf_model.__class__ = NormedThinker
        return avl.load("normed", hf_model=hf_model, processor=tiny_processor())


@cache
def normed_model(dtype: torch.dtype = torch.float32) -> Any:
    """The wrapped model."""
    return load_normed(normed_hf_model(dtype=dtype))


@cache
def normed_twin(dtype: torch.dtype = torch.float32) -> Any:
    """The same with every key and value head written out once for each query head that shares it."""
    state, twin = normed_hf_model().state_dict(), normed_hf_model(N_HEADS, dtype)
    for name, tensor in state.items():
        if "language_model.layers" in name and ("k_proj" in name or "v_proj" in name):
            group = N_HEADS // N_KV_HEADS
            state[name] = tensor.unflatten(0, (N_KV_HEADS, -1)).repeat_interleave(group, dim=0).flatten(0, 1)
    twin.load_state_dict(state)
    return load_normed(twin)
