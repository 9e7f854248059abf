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
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerModel,
)

from av_lens.errors import InputError
from av_lens.families.blocks import (
    FullBlockBridge,
    RealAttentionBridge,
    RealRMSNormBridge,
    TowerBridge,
    install_embed_hook,
)
from av_lens.families.decoder import ReplayTraits
from av_lens.families.qwen_media import QwenMedia
from av_lens.families.registry import Family


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

    def prepare_model(self, hf_model: Any) -> None:
        """Let the thinker run as TransformerLens calls it: without positions or mask, never without its media."""
        super().prepare_model(hf_model)
        own = type(hf_model.model)  # a torch hook would stand among the caller's
        plain = own is Qwen2_5OmniThinkerModel
        hf_model.model.__class__ = ContinuedThinker if plain else type(own.__name__, (ContinuedThinker, own), {})

    def setup_hook_compatibility(self, bridge: Any) -> None:
        """Give the bridge its `hook_embed`: the stream after the media are scattered in."""
        install_embed_hook(bridge)


def position_ids(hf_model: Any, tensors: Mapping[str, Any]) -> torch.Tensor:
    """The model's own three position streams for an input, int64 `[3, batch, pos]`: time, row, column."""
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
    """Restarts are exact but for layers with a sliding window, where a config has them.

    Media enter with the embeddings alone, every layer has its own keys and values, and attention is causal throughout.
    """
    text = config.get_text_config()
    sliding = len(set(text.layer_types)) > 1 and "sliding_attention" in text.layer_types
    return ReplayTraits(sliding_window=text.sliding_window if sliding else None)


class ContinuedThinker(Qwen2_5OmniThinkerModel):
    """HuggingFace's own, which also continues a cache without being told positions.

    HuggingFace's positions of such a step are those of the whole mask, and how far media moved them is remembered of
    the last prompt alone. A prompt that comes without a mask is whole: HuggingFace would count its media as text.
    """

    def forward(self, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the thinker."""
        ids, embeds, cache = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
        past = 0 if cache is None else cache.get_seq_length()
        if kwargs.get("position_ids") is None and past:
            kwargs["position_ids"] = _continued(ids if ids is not None else embeds, cache, kwargs.get("attention_mask"))
        elif kwargs.get("position_ids") is None and ids is not None:
            _require_media(self.config, ids, kwargs)
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = torch.ones_like(ids)
        output: Any = super().forward(**kwargs)
        if output.past_key_values is not None and not past:
            output.past_key_values.rope_deltas = self.rope_deltas
        return output


def _continued(new: Any, cache: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Positions `[3, batch, pos]` of tokens that continue a cache."""
    if mask is None:
        mask = torch.ones(new.shape[0], cache.get_seq_length() + new.shape[1], dtype=torch.long, device=new.device)
    positions = (mask.long().cumsum(-1) - 1)[:, -new.shape[1] :]
    deltas = getattr(cache, "rope_deltas", None)
    if deltas is not None:
        positions = positions + deltas.repeat_interleave(len(positions) // len(deltas), 0).to(positions.device)
    return positions.expand(3, -1, -1)


def _require_media(config: Any, ids: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
    """Refuse placeholders whose media did not come along: a run that reads them bare is about nothing."""
    media = {"audio": "input_features", "image": "pixel_values", "video": "pixel_values_videos"}
    for kind, tensor in media.items():
        missing = kwargs.get(tensor) is None and kwargs.get("mm_encoder_outputs") is None
        if missing and bool((ids == getattr(config, f"{kind}_token_id")).any()):
            raise InputError(
                f"these ids hold placeholders of {kind}, but {tensor} did not come with them: the model would read "
                "bare placeholders. Use model(x), model.generate(x), or model.bound(x) for tools that take ids. "
                "(TransformerLens's generate hands media on with the cache alone: leave use_past_kv_cache on.)"
            )


def _tensor(value: Any) -> torch.Tensor | None:
    return None if value is None else torch.as_tensor(value)


FAMILY = Family(
    model_class=Qwen2_5OmniThinkerForConditionalGeneration,
    adapter=Qwen2_5OmniThinkerAdapter,
    media=QwenMedia,
    position_ids=position_ids,
    replay_traits=replay_traits,
    model_types=("qwen2_5_omni_thinker", "qwen2_5_omni"),
    inner_config={"qwen2_5_omni": "thinker_config"},
)
