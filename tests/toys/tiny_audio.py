"""Tiny random checkpoints of models that hear: Qwen2-Audio, and Phi-4-multimodal, which also sees.

Real classes, real processor classes and settings (mel bins, 30 s of padding, crops of 448 pixels); small widths.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny import randomized, tiny_processor, token_ids

from av_lens.organism.anatomy import END_OF_TEXT, TURN_END, byte_symbols


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
            "encoder_layers": 1,  # of 30 s, whatever the sound
            "encoder_attention_heads": 1,
            "encoder_ffn_dim": 32,
            "d_model": 16,
            "initializer_range": 0.5,
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


# By the description of the checkpoint in transformers' own form: turns between markers, media before the words.
PHI_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|image|>{% elif content['type'] == 'audio' %}<|audio|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHI_SPECIALS = {"image_token": "<|image|>", "audio_token": "<|audio|>"}
PHI_TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
SHORT = 256  # positions up to which the short tables of LongRoPE hold


def phi_tokens() -> dict[str, int]:
    return {token: i for i, token in enumerate([*byte_symbols(), *PHI_TURNS, *PHI_SPECIALS.values()])}


def phi_config() -> Any:
    """Phi-4-multimodal: prompts with an image are longer than the short tables of its LongRoPE hold."""
    from transformers import Phi4MultimodalConfig

    ids = phi_tokens()
    return Phi4MultimodalConfig(
        vocab_size=len(ids),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16 * SHORT,
        original_max_position_embeddings=SHORT,
        sliding_window=64 * SHORT,
        initializer_range=0.1,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5],
            "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
            "original_max_position_embeddings": SHORT,
        },
        tie_word_embeddings=True,
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|endoftext|>"], ids["<|end|>"]],
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_token_id": ids["<|image|>"],
        },
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 16,
            "initializer_range": 0.2,
            "audio_token_id": ids["<|audio|>"],
        },
    )


@torch.no_grad()
def phi_hf_model(seed: int = 0) -> Any:
    from transformers import Phi4MultimodalForCausalLM

    model = randomized(Phi4MultimodalForCausalLM, phi_config(), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # HuggingFace leaves the ends of rows at zero: all the same
        if "extensor" in name:
            parameter.normal_(0.0, 0.5, generator=generator)
        elif "img_projection_down" in name:  # a picture a hundred times as loud as the words would drown all
            parameter.mul_(0.05)
    return model


def phi_processor() -> Any:
    """A real `Phi4MultimodalProcessor` over bytes: crops of 448 pixels, 80 mel bins, 80 ms a token."""
    from transformers import (
        GPT2Tokenizer,
        Phi4MultimodalFeatureExtractor,
        Phi4MultimodalImageProcessor,
        Phi4MultimodalProcessor,
    )

    vocab = {token: i for token, i in phi_tokens().items() if token not in PHI_SPECIALS.values()}
    end = "<|endoftext|>"
    tokenizer = GPT2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=end,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        extra_special_tokens=dict(PHI_SPECIALS),
    )
    tokenizer.add_tokens([*PHI_TURNS], special_tokens=True)
    return Phi4MultimodalProcessor(
        image_processor=Phi4MultimodalImageProcessor(),
        audio_processor=Phi4MultimodalFeatureExtractor(),
        tokenizer=tokenizer,
        chat_template=PHI_TEMPLATE,
    )
