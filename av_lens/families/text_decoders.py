"""Text decoders, as models with code of their own carry them: Qwen2, Qwen3, Llama, Mistral.

Mistral's layers all read one window: its mask is recorded, so only decoding past the window runs hooked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from av_lens.errors import InputError
from av_lens.families.adapter import causal_decoder, decoder_adapter
from av_lens.families.media_layout import Media, MediaLayout
from av_lens.families.one_stream import from_zero
from av_lens.families.registry import Family
from av_lens.spans import SpanMap


class TextProcessor:
    """A tokenizer in the place of a processor: what is asked of one is answered, media are not."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's."""
        return self.tokenizer.chat_template

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Render messages, each a list of texts, for a template that takes one text."""
        messages = [
            {"role": one["role"], "content": "".join(part["text"] for part in one["content"])} for one in conversation
        ]
        return self.tokenizer.apply_chat_template(messages, **options)


class TextMedia(MediaLayout):
    """No media."""

    parts = ("tokenizer",)
    kinds = ()

    def __init__(self, processor: Any, config: Any, *, cache_bytes: int = 0) -> None:
        del config, cache_bytes
        self.processor = processor

    @classmethod
    def opened(cls, processor: Any) -> Any:
        """A bare tokenizer is taken too."""
        return processor if hasattr(processor, "tokenizer") else TextProcessor(processor)

    @classmethod
    def placeholders(cls, config: Any) -> dict[str, int]:
        """None."""
        return {}

    @classmethod
    def sound_borders(cls, config: Any) -> tuple[int, ...]:
        """None."""
        return ()

    def media(self, clip: Any, *, picture: str | None, sound: str | None, fps: float | int) -> Media:
        """Refuse a clip."""
        raise InputError(
            f"this model reads text alone, and got {clip!r}: ask model.encode(None, question). To feed it what your "
            "own encoders make of a clip, wrap it with av_lens.bring.wrap."
        )

    def bare(self, kind: str) -> str:
        """Nothing stands for media."""
        return ""

    def expansions(self, media: Media) -> dict[str, str]:
        """None."""
        return {}

    def span_map(self, ids: np.ndarray, roles: Sequence[str], tokens: Sequence[str], media: Media) -> SpanMap:
        """Roles alone."""
        return SpanMap.of_roles(roles, tokens)

    def provenance(self, clip: Any, media: Media, fps: float | int) -> dict[str, Any]:
        """Nothing was made."""
        return {}


_TEXT: dict[str, Any] = {"media": TextMedia, "position_ids": from_zero, "replay_traits": causal_decoder}

FAMILIES = (
    Family(
        model_class=Qwen2ForCausalLM,
        adapter=decoder_adapter("Qwen2", decoder="model", biases=True),
        checkpoints="Qwen2 and Qwen2.5 text models; the decoder of VideoLLaMA2.1-AV and MiniCPM-o 2.6 (av_lens.bring)",
        model_types=("qwen2",),
        **_TEXT,
    ),
    Family(
        model_class=Qwen3ForCausalLM,
        adapter=decoder_adapter("Qwen3", decoder="model", qk_norm=True),
        checkpoints="Qwen3 text models (not the mixtures of experts)",
        model_types=("qwen3",),
        **_TEXT,
    ),
    Family(
        model_class=LlamaForCausalLM,
        adapter=decoder_adapter("Llama", decoder="model"),
        checkpoints="Llama 2 and 3, Vicuna and their like",
        model_types=("llama",),
        **_TEXT,
    ),
    Family(
        model_class=MistralForCausalLM,
        adapter=decoder_adapter("Mistral", decoder="model"),
        checkpoints="Mistral 7B and its like",
        model_types=("mistral",),
        **_TEXT,
    ),
)
