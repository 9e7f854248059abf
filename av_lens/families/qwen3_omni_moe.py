"""Qwen3-Omni, thinker only: a Qwen3 decoder with experts, which also reads pictures between its first layers.

A second has 13 position ids and 13 tokens of sound; ids of a video's patches are not whole numbers; a sound woven into
a video goes by time alone, without chunks, and its borders have ids of their own.
"""

import numpy as np
from jaxtyping import Float, Int64
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from av_lens.families.adapter import causal_decoder, decoder_adapter, deepstack
from av_lens.families.media_layout import MediaLayout
from av_lens.families.qwen2_5_omni import PARTS, position_ids
from av_lens.families.qwen_media import QwenMedia
from av_lens.families.registry import Family


class Qwen3OmniMedia(QwenMedia):
    """Media in the prompts of Qwen3-Omni's thinker."""

    chunk_s = float("inf")
    shared_borders = False
    disagreement = ""
    id_type = np.float32
    chunk_frames, chunk_tokens = 100, 13  # the sound's tower takes so many mel frames together
    frames_per_token = 8

    require_frame_rate = MediaLayout.require_frame_rate  # sound is woven in by time alone

    def sound_tokens(self, mel_frames: int) -> int:
        """Count the tokens of a sound: three convolutions of stride 2 over chunks of 100 frames, 13 tokens each."""
        whole, rest = divmod(mel_frames, self.chunk_frames)
        return whole * self.chunk_tokens + -(-rest // self.frames_per_token)

    def sound_frames(self, n_tokens: int) -> Int64[np.ndarray, "2 token"]:
        """First and last (excluded) mel frame behind each token; a chunk's last token has what is left of it."""
        chunk, within = np.divmod(np.arange(n_tokens), self.chunk_tokens)
        ends = np.minimum(np.stack([within, within + 1]) * self.frames_per_token, self.chunk_frames)
        return chunk * self.chunk_frames + ends

    def _clock(self, n: int, step_s: float) -> Float[np.ndarray, " patch_t"]:
        return np.arange(n).astype(np.float32) * np.float32(step_s) * np.float32(self.ids_per_second)


Qwen3OmniMoeThinkerAdapter = decoder_adapter("Qwen3OmniMoeThinker", **PARTS, qk_norm=True, experts=True)

FAMILY = Family(
    model_class=Qwen3OmniMoeThinkerForConditionalGeneration,
    adapter=Qwen3OmniMoeThinkerAdapter,
    media=Qwen3OmniMedia,
    position_ids=position_ids,
    replay_traits=causal_decoder,
    added=deepstack,
    checkpoints="Qwen/Qwen3-Omni-30B-A3B-Instruct (thinker only)",
    model_types=("qwen3_omni_moe_thinker", "qwen3_omni_moe"),
    inner_config={"qwen3_omni_moe": "thinker_config"},
)
