"""Qwen3-VL: a Qwen3 decoder that reads pictures in its stream, and again after its first layers; time is text.

Each temporal patch stands after a text that says when it is; on the model's clock it lasts as long as its frames do.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped
from transformers import Qwen3VLForConditionalGeneration

from av_lens.families.adapter import causal_decoder, decoder_adapter, deepstack
from av_lens.families.media_layout import Media
from av_lens.families.qwen2_5_vl import PARTS, Qwen2_5VLMedia, position_ids
from av_lens.families.registry import Family


class Qwen3VLMedia(Qwen2_5VLMedia):
    """Media in the prompts of Qwen3-VL."""

    @classmethod
    def clock_rate(cls, config: Any) -> float:
        """Ids say no time."""
        return float("nan")

    def expansions(self, media: Media) -> dict[str, str]:
        """A video is its patches, each with its borders and its second, as the processor writes them."""
        picture = media.picture
        if picture is None or picture.kind != "video":
            return super().expansions(media)
        shown = SimpleNamespace(
            frames_indices=[*range(len(picture.frames))], fps=self.frames_per_patch / picture.step_s
        )
        told = {"video_grid_thw": [np.array(picture.grid)], "video_metadata": [shown]}
        return {self.processor.video_token: self.processor.replace_video_token(told, 0)}

    def tensors(self, ids: np.ndarray, media: Media) -> dict[str, Any]:
        """As one call of the processor names them."""
        made = super().tensors(ids, media)
        made.pop("second_per_grid_ts", None)
        return made

    def _clock(self, n: int, step_s: float) -> Int64[np.ndarray, " patch_t"]:
        return np.zeros(n, dtype=np.int64)

    def _seconds(self, kinds: np.ndarray, placed: np.ndarray, media: Media) -> Shaped[np.ndarray, "2 media"]:
        assert media.picture is not None
        patch = np.unravel_index(np.arange(int((kinds != "").sum())), media.picture.token_grid)[0]
        return (patch + np.array([[0], [1]])) * media.picture.step_s


FAMILY = Family(
    model_class=Qwen3VLForConditionalGeneration,
    adapter=decoder_adapter("Qwen3VL", **PARTS, qk_norm=True),
    media=Qwen3VLMedia,
    position_ids=position_ids,
    replay_traits=causal_decoder,
    added=deepstack,
    checkpoints="Qwen/Qwen3-VL-4B-Instruct, Qwen/Qwen3-VL-8B-Instruct",
    model_types=("qwen3_vl",),
)
