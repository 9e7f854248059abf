"""Qwen2.5-Omni, thinker only: a Qwen2 decoder that reads video, image and audio embeddings in its stream.

The towers feed tokens that are scattered over placeholders; positions are three streams (time, row, column), which
the model derives itself. Talker and vocoder speak the answer and take no part in what is fused; they are never loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, UnembeddingBridge

from av_lens.bridge.attention import RealAttentionBridge
from av_lens.bridge.blocks import FullBlockBridge, RealRMSNormBridge, TowerBridge
from av_lens.bridge.stream import install_embed_hook
from av_lens.bridge.traits import ReplayTraits

ARCHITECTURE = "Qwen2_5OmniThinkerForConditionalGeneration"
FULL_MODEL_TYPE = "qwen2_5_omni"
THINKER_MODEL_TYPE = "qwen2_5_omni_thinker"


class Qwen2_5OmniThinkerAdapter(ArchitectureAdapter):
    """How TransformerLens's components map onto `Qwen2_5OmniThinkerForConditionalGeneration`."""

    # The pattern is a hook here; asking HuggingFace for attentions as well would only cost memory.
    supports_hf_output_attentions: bool = False
    _attention_bridge_cls = RealAttentionBridge

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.is_multimodal = True
        self.cfg.attn_implementation = "eager"
        self.cfg.default_prepend_bos = False
        self._set_rms_rotary_defaults()
        self.weight_processing_conversions = {**self._qkvo_weight_conversions(include_biases=True)}
        self.component_mapping = {
            "audio_encoder": TowerBridge("model.audio_tower", field="last_hidden_state"),
            "vision_encoder": TowerBridge("model.visual", field="pooler_output"),
            "embed": EmbeddingBridge(name="model.language_model.embed_tokens"),
            "blocks": FullBlockBridge(
                name="model.language_model.layers",
                config=self.cfg,
                submodules={
                    "ln1": RealRMSNormBridge(name="input_layernorm", config=self.cfg),
                    "ln2": RealRMSNormBridge(name="post_attention_layernorm", config=self.cfg),
                    "attn": self._build_attention_bridge(),
                    "mlp": self._gated_mlp(),
                },
            ),
            "ln_final": RealRMSNormBridge(name="model.language_model.norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }

    def setup_hook_compatibility(self, bridge: Any) -> None:
        """Give the bridge its `hook_embed`: the stream after the media are scattered in.

        Args:
            bridge: the TransformerBridge that is being built.
        """
        install_embed_hook(bridge)


def position_ids(hf_model: Any, tensors: Mapping[str, Any]) -> torch.Tensor:
    """The model's own three position streams for an input.

    Args:
        hf_model: the thinker, wrapped or not.
        tensors: keyword arguments of its forward.

    Returns:
        int64 `[3, batch, pos]`: time, row, column.
    """
    mask = tensors.get("feature_attention_mask")
    ids, _ = hf_model.model.get_rope_index(
        tensors["input_ids"],
        image_grid_thw=tensors.get("image_grid_thw"),
        video_grid_thw=tensors.get("video_grid_thw"),
        attention_mask=tensors["attention_mask"],
        use_audio_in_video=bool(tensors.get("use_audio_in_video")),
        audio_seqlens=None if mask is None else mask.sum(-1),
        second_per_grids=_tensor(tensors.get("video_second_per_grid")),
    )
    return ids


def replay_traits(config: Any) -> ReplayTraits:
    """Where this architecture breaks what a restart assumes: in layers with a sliding window, where a config has them.

    Media enter with the embeddings alone, every layer has its own keys and values, and attention is causal throughout.

    Args:
        config: the thinker's configuration.

    Returns:
        The declaration.
    """
    text = config.get_text_config()
    sliding = len(set(text.layer_types)) > 1 and "sliding_attention" in text.layer_types
    return ReplayTraits(sliding_window=text.sliding_window if sliding else None)


def _tensor(value: Any) -> torch.Tensor | None:
    return None if value is None else torch.as_tensor(value)
