"""Qwen2.5-Omni, thinker only: a Qwen2 decoder that reads video, image and audio embeddings in its stream."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerForConditionalGeneration

from av_lens.families.adapter import causal_decoder, decoder_adapter
from av_lens.families.qwen_media import QwenMedia
from av_lens.families.registry import Family

PARTS = {
    "towers": {
        "audio_encoder": ("model.audio_tower", "last_hidden_state"),
        "vision_encoder": ("model.visual", "pooler_output"),
    },
    "media": {"audio": "input_features", "image": "pixel_values", "video": "pixel_values_videos"},
}
"""A thinker's towers, and the tensors of what they encode."""
Qwen2_5OmniThinkerAdapter = decoder_adapter("Qwen2_5OmniThinker", **PARTS, biases=True)


def position_ids(hf_model: Any, tensors: Mapping[str, Any]) -> torch.Tensor:
    """The model's own three position streams for an input, int64 `[3, batch, pos]`: time, row, column."""
    mask, seconds = (tensors.get(name) for name in ("feature_attention_mask", "video_second_per_grid"))
    ids, _ = hf_model.model.get_rope_index(
        tensors["input_ids"],
        image_grid_thw=tensors.get("image_grid_thw"),
        video_grid_thw=tensors.get("video_grid_thw"),
        attention_mask=tensors["attention_mask"],
        use_audio_in_video=bool(tensors.get("use_audio_in_video")),
        audio_seqlens=None if mask is None else mask.sum(-1),
        second_per_grids=None if seconds is None else torch.as_tensor(seconds),
    )
    return ids


FAMILY = Family(
    model_class=Qwen2_5OmniThinkerForConditionalGeneration,
    adapter=Qwen2_5OmniThinkerAdapter,
    media=QwenMedia,
    position_ids=position_ids,
    replay_traits=causal_decoder,
    checkpoints="Qwen/Qwen2.5-Omni-3B, Qwen/Qwen2.5-Omni-7B (thinker only)",
    model_types=("qwen2_5_omni_thinker", "qwen2_5_omni"),
    inner_config={"qwen2_5_omni": "thinker_config"},
)
