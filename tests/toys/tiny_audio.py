"""Tiny random checkpoints of models that hear: Qwen2-Audio, and Phi-4-multimodal, which also sees.

Real classes, real processor classes and settings (mel bins, 30 s of padding, crops of 448 pixels); small widths.
"""

from __future__ import annotations

import copy
from typing import Any

from tiny import randomized, tiny_processor, token_ids

from av_lens.organism.anatomy import END_OF_TEXT, TURN_END


def qwen2_audio_config() -> Any:
    """Qwen2-Audio: the decoder of `tiny_config`, a tower of its own."""
    from transformers import Qwen2AudioConfig

    ids = token_ids()
    return Qwen2AudioConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(ids),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": ids[END_OF_TEXT],
            "bos_token_id": None,
            "eos_token_id": ids[TURN_END],
            "tie_word_embeddings": False,
        },
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "initializer_range": 0.1,
        },
        audio_token_index=ids["<|AUDIO|>"],
        tie_word_embeddings=False,
    )


def qwen2_audio_hf_model(seed: int = 0) -> Any:
    from transformers import Qwen2AudioForConditionalGeneration

    return randomized(Qwen2AudioForConditionalGeneration, qwen2_audio_config(), seed)


def qwen2_audio_processor() -> Any:
    """A real `Qwen2AudioProcessor`, its own chat template, over the tokens of `tiny_processor`."""
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    ears = WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16000, hop_length=160, n_fft=400, chunk_length=30, return_attention_mask=True
    )
    return Qwen2AudioProcessor(feature_extractor=ears, tokenizer=copy.deepcopy(tiny_processor().tokenizer))
