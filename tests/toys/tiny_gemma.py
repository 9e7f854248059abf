"""A tiny random Gemma 4 of the real classes, with all that its layers may have in one small model.

Six layers: with a window and without, keys that are values too, keys of earlier layers, an embedding for each layer,
experts beside the plain MLP, frames whose tokens attend both ways, capped logits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny import randomized, tiny_processor, token_ids

from av_lens.organism.anatomy import END_OF_TEXT, TURN_END

KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
NAMED = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "boi_token": "<|vision_bos|>",
    "eoi_token": "<|vision_eos|>",
    "boa_token": "<|audio_bos|>",
    "eoa_token": "<|audio_eos|>",
}
GEMMA_LAYOUTS = {
    "separate": {"fps": 0.5},
    "audio": {"picture": None},
    "video": {"sound": None, "fps": 1.0},
    "image": {"picture": "image"},
    "text": {"sound": None, "picture": None},
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] }}"
    "{% else %}{{ {'image': '<|IMAGE|>', 'audio': '<|AUDIO|>', 'video': '<|video|>'}[content['type']] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def gemma_config(**text: Any) -> Any:
    """Its configuration; `text` overrides fields of the text configuration."""
    from transformers import Gemma4Config

    ids = token_ids()
    sizes = {
        "vocab_size": len(ids) + 1,
        "vocab_size_per_layer_input": len(ids) + 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "use_double_wide_mlp": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "layer_types": list(KINDS),
        "sliding_window": 24,
        "use_bidirectional_attention": "vision",
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "pad_token_id": ids[END_OF_TEXT],
        "bos_token_id": ids[END_OF_TEXT],
        "eos_token_id": ids[TURN_END],
    }
    tower = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "initializer_range": 0.1}
    return Gemma4Config(
        text_config=sizes | text,
        vision_config=tower
        | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
        audio_config=tower
        | {"output_proj_dims": 32, "subsampling_conv_channels": [32, 4], "use_clipped_linears": False},
        image_token_id=ids["<|IMAGE|>"],
        video_token_id=len(ids),
        audio_token_id=ids["<|AUDIO|>"],
        boi_token_id=ids["<|vision_bos|>"],
        eoi_token_id=ids["<|vision_eos|>"],
        boa_token_id=ids["<|audio_bos|>"],
        eoa_token_index=ids["<|audio_eos|>"],
        tie_word_embeddings=False,
    )


@torch.no_grad()
def gemma_hf_model(seed: int = 0, **text: Any) -> Any:
    """The model; scales of its layers differ from one, and so do the router's."""
    from transformers import Gemma4ForConditionalGeneration

    model = randomized(Gemma4ForConditionalGeneration, gemma_config(**text), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("layer_scalar", "router.scale", "per_expert_scale", "per_dim_scale")):
            tensor.uniform_(0.6, 1.4, generator=generator)
        elif name.endswith("position_embedding_table"):
            tensor.normal_(0.0, 0.3, generator=generator)
    return model


def gemma_processor() -> Any:
    """A real `Gemma4Processor` over the tokens of `tiny_processor`, and one more for videos."""
    from transformers import Gemma4Processor
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

    tokenizer = copy.deepcopy(tiny_processor().tokenizer)
    tokenizer.bos_token = END_OF_TEXT
    tokenizer._set_model_specific_special_tokens(special_tokens=NAMED)
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(feature_size=32),
        image_processor=Gemma4ImageProcessor(max_soft_tokens=70),
        video_processor=Gemma4VideoProcessor(max_soft_tokens=70),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )
