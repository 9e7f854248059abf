"""Tiny random text decoders of the classes that own-code models carry, and a tokenizer for them."""

from __future__ import annotations

import copy
from typing import Any

import transformers
from tiny import CHAT_TEMPLATE, randomized, tiny_processor, token_ids

from av_lens.organism.anatomy import END_OF_TEXT, TURN_END

TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 24}),  # shorter than any prompt
}
"""The class, and what its configuration says beside the common sizes."""


def text_config(name: str, **changed: Any) -> Any:
    ids, (kind, own) = token_ids(), TEXT[name]
    sizes = {
        "vocab_size": len(ids),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "pad_token_id": ids[END_OF_TEXT],
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
    }
    return getattr(transformers, f"{kind}Config")(**(sizes | own | changed))


def text_hf_model(name: str, seed: int = 0, **changed: Any) -> Any:
    """A random decoder."""
    return randomized(getattr(transformers, f"{TEXT[name][0]}ForCausalLM"), text_config(name, **changed), seed)


def text_tokenizer() -> Any:
    """The tokenizer of `tiny_processor`, with its chat template."""
    tokenizer = copy.deepcopy(tiny_processor().tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
