"""Qwen2-Audio: a Qwen2 decoder that reads sounds in its stream, and nothing else beside text.

The tower takes 30 seconds of mel and attends to the sound's own frames alone; a row stands for 4 mel frames (40 ms).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from av_lens.families.adapter import causal_decoder, decoder_adapter
from av_lens.families.media_layout import Media, MediaLayout, TensorAxes
from av_lens.families.one_stream import Counted, position_ids
from av_lens.families.qwen_media import QwenMedia
from av_lens.families.registry import Family


class Qwen2AudioMedia(QwenMedia):
    """Media in the prompts of Qwen2-Audio."""

    parts = ("tokenizer", "feature_extractor")
    kinds = ("audio",)
    axes = TensorAxes()
    disagreement = ""
    whole_mel = True

    @classmethod
    def clock_rate(cls, config: Any) -> float:
        """One id for each token, of 40 ms."""
        return 25.0

    require_frame_rate = MediaLayout.require_frame_rate
    expected_positions = MediaLayout.expected_positions

    def tensors(self, ids: np.ndarray, media: Media) -> dict[str, Any]:
        """As one call of the processor names them."""
        made = super().tensors(ids, media)
        del made["use_audio_in_video"]
        return made


class Hearing(Counted):
    """Mixed into the inner model."""

    audio_tower: Any

    def rows(self, told: Mapping[str, Any]) -> dict[str, Int64[Tensor, " item"]]:
        """What the tower's rows come to, by its own count."""
        mask = told.get("feature_attention_mask")
        return {} if mask is None else {"audio": self.audio_tower._get_feat_extract_output_lengths(mask.sum(-1))[1]}


FAMILY = Family(
    model_class=Qwen2AudioForConditionalGeneration,
    adapter=decoder_adapter(
        "Qwen2Audio",
        towers={"audio_encoder": ("model.audio_tower", "last_hidden_state")},
        media={"audio": "input_features"},
        inner=Hearing,
        biases=True,
    ),
    media=Qwen2AudioMedia,
    position_ids=position_ids,
    replay_traits=causal_decoder,
    checkpoints="Qwen/Qwen2-Audio-7B-Instruct, Qwen/Qwen2-Audio-7B",
    model_types=("qwen2_audio",),
)
