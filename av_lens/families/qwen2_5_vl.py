"""Qwen2.5-VL: a Qwen2 decoder that reads video and image embeddings in its stream; what the omni models began as.

A temporal patch is `tokens_per_second` ids a second apart; text after a picture resumes at its first id plus the larger
of its rows and columns, so that a long video's ids overlap with the text's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from transformers import Qwen2_5_VLForConditionalGeneration

from av_lens.families.adapter import causal_decoder, decoder_adapter
from av_lens.families.media_layout import Media, MediaLayout, TensorAxes
from av_lens.families.qwen_media import QwenMedia
from av_lens.families.registry import Family

PARTS = {
    "towers": {"vision_encoder": ("model.visual", "pooler_output")},
    "media": {"image": "pixel_values", "video": "pixel_values_videos"},
}
"""The tower, and the tensors of what it encodes."""
TYPES = {"image": 1, "video": 2}  # how the model is told which positions are pictures


class Qwen2_5VLMedia(QwenMedia):
    """Media in the prompts of Qwen2.5-VL."""

    parts = ("tokenizer", "image_processor", "video_processor")
    kinds = ("video", "image")
    axes = TensorAxes(patches=QwenMedia.axes.patches, lengthened={"attention_mask": 1, "mm_token_type_ids": 0})
    disagreement = ""

    @classmethod
    def clock_rate(cls, config: Any) -> float:
        """As the vision tower's configuration says."""
        return float(config.vision_config.tokens_per_second)

    require_frame_rate = MediaLayout.require_frame_rate

    def bare(self, kind: str) -> str:
        """Vision start, placeholder, vision end."""
        return f"<|vision_start|>{getattr(self.processor, f'{kind}_token')}<|vision_end|>"

    def tensors(self, ids: np.ndarray, media: Media) -> dict[str, Any]:
        """As one call of the processor names them."""
        made = super().tensors(ids, media)
        del made["use_audio_in_video"]
        if "video_second_per_grid" in made:
            made["second_per_grid_ts"] = made.pop("video_second_per_grid")
        made["mm_token_type_ids"] = torch.zeros_like(made["input_ids"])
        for kind, number in TYPES.items():
            made["mm_token_type_ids"][made["input_ids"] == self.tokens[kind]] = number
        return made

    def _clock(self, n: int, step_s: float) -> Int64[np.ndarray, " patch_t"]:
        between = np.float32(self.ids_per_second) * np.float32(step_s)
        return (np.arange(n).astype(np.float32) * between).astype(np.int64)

    def _resumed(self, block: Int64[np.ndarray, "3 _"]) -> Any:
        return block[1:].max() + 1


def position_ids(hf_model: Any, tensors: Mapping[str, Any]) -> torch.Tensor:
    """The model's own three position streams for an input, int64 `[3, batch, pos]`: time, row, column."""
    told = {name: tensors.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    ids, types, mask = (tensors[name] for name in ("input_ids", "mm_token_type_ids", "attention_mask"))
    found, _ = hf_model.model.get_rope_index(ids, types, attention_mask=mask, **told)
    return found


FAMILY = Family(
    model_class=Qwen2_5_VLForConditionalGeneration,
    adapter=decoder_adapter("Qwen2_5VL", **PARTS, biases=True),
    media=Qwen2_5VLMedia,
    position_ids=position_ids,
    replay_traits=causal_decoder,
    checkpoints="Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct",
    model_types=("qwen2_5_vl",),
)
