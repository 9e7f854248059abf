"""A tiny random checkpoint of every family: the real classes and the real processor class, small sizes.

`TINY` says for each how its model and its processor are built; `folder` saves both as a full checkpoint.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import CHAT_TEMPLATE, randomized, tiny_hf_model, tiny_processor, token_ids
from tiny_audio import phi_hf_model, phi_processor, qwen2_audio_hf_model, qwen2_audio_processor
from tiny_gemma import GEMMA_LAYOUTS, gemma_hf_model, gemma_processor
from tiny_text import TEXT, text_hf_model, text_tokenizer

import av_lens as avl
from av_lens.organism.anatomy import END_OF_TEXT, SPECIALS, TURN_END

SIZE = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}


@dataclass(frozen=True)
class Tiny:
    """How a family's tiny checkpoint is built.

    Attributes:
        hf_model: seed -> the HuggingFace model.
        processor: its processor.
        layouts: what can be encoded, as keywords of `encode`, by name.
        questions: what is asked of the first clip and of the second; without media they tell two inputs apart.
        media: whether it takes clips.
        reach: seconds of sound before and after its own that a token sees through its tower's convolutions and the
            spectrogram's windows (of 25 ms, a mel frame each 10 ms).
    """

    hf_model: Callable[[int], Any]
    processor: Callable[[], Any]
    layouts: Mapping[str, Mapping[str, Any]]
    questions: tuple[str, str] = ("What?", "What?")
    media: bool = True
    reach: tuple[float, float] = (0.0, 0.0)


def picture_tokens() -> dict[str, int]:
    """Which tokens stand for pictures, as configurations say it."""
    ids = token_ids()
    return {
        "image_token_id": ids["<|IMAGE|>"],
        "video_token_id": ids["<|VIDEO|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
    }


def vl_config() -> Any:
    """Qwen2.5-VL: the fusion stack of `tiny_config`, a vision tower of its own."""
    from transformers import Qwen2_5_VLConfig

    ids = token_ids()
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(ids),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "pad_token_id": ids[END_OF_TEXT],
            "bos_token_id": None,
            "eos_token_id": ids[TURN_END],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "initializer_range": 0.1,
        },
        **picture_tokens(),
        tie_word_embeddings=False,
    )


def vl_hf_model(seed: int = 0) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return randomized(Qwen2_5_VLForConditionalGeneration, vl_config(), seed)


def vl_processor() -> Any:
    """A real `Qwen2_5_VLProcessor` over the tokens of `tiny_processor`."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = copy.deepcopy(tiny_processor().tokenizer)
    tokenizer.image_token, tokenizer.video_token = SPECIALS["image_token"], SPECIALS["video_token"]
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(SIZE)),
        video_processor=Qwen2VLVideoProcessor(size=dict(SIZE)),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def omni3_config() -> Any:
    """Qwen3-Omni's thinker: two of eight experts, a plain MLP in layer 1, pictures after layers 0 and 1."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    ids = token_ids()
    return Qwen3OmniMoeThinkerConfig(
        text_config={
            "vocab_size": len(ids),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
            },
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
            "tie_word_embeddings": False,
            "initializer_range": 0.1,
            "pad_token_id": ids[END_OF_TEXT],
            "eos_token_id": ids[TURN_END],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.1,
        },
        audio_config={
            "num_mel_bins": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "output_dim": 64,
            "n_window": 50,
            "n_window_infer": 800,
            "downsample_hidden_size": 16,
            "max_source_positions": 1500,
            "initializer_range": 0.1,
        },
        **picture_tokens(),
        audio_token_id=ids["<|AUDIO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        user_token_id=ids["u"],
        position_id_per_seconds=13,
        pad_token_id=ids[END_OF_TEXT],
    )


@torch.no_grad()
def omni3_hf_model(seed: int = 0) -> Any:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    model = randomized(Qwen3OmniMoeThinkerForConditionalGeneration, omni3_config(), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # HuggingFace leaves routers at zero: all experts would tie
        if "experts" in name or name.endswith("mlp.gate.weight"):
            parameter.normal_(0.0, 0.1, generator=generator)
    return model


def omni3_processor() -> Any:
    """A real `Qwen3OmniMoeProcessor` over the tokens of `tiny_processor`."""
    from transformers import Qwen3OmniMoeProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    own = tiny_processor()
    processor = Qwen3OmniMoeProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size), patch_size=16),
        video_processor=Qwen2VLVideoProcessor(size=dict(size), patch_size=16),
        feature_extractor=own.feature_extractor,
        tokenizer=own.tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    processor.videos_kwargs = {"size": dict(size)}
    return processor


def vl3_config() -> Any:
    """Qwen3-VL: pictures after layers 0 and 1."""
    from transformers import Qwen3VLConfig

    omni = omni3_config()
    text = {
        name: value
        for name, value in omni.text_config.to_dict().items()
        if name not in ("model_type", "architectures", "mlp_only_layers") and "expert" not in name and "moe" not in name
    }
    vision = {name: value for name, value in omni.vision_config.to_dict().items() if name != "model_type"}
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        **picture_tokens(),
        tie_word_embeddings=False,
    )


def vl3_hf_model(seed: int = 0) -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return randomized(Qwen3VLForConditionalGeneration, vl3_config(), seed)


def vl3_processor() -> Any:
    """A real `Qwen3VLProcessor` over the tokens of `tiny_processor`."""
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    size = {"shortest_edge": 64 * 64, "longest_edge": 4 * 128 * 128}
    tokenizer = vl_processor().tokenizer
    tokenizer.vision_start_token, tokenizer.vision_end_token = (
        SPECIALS["vision_bos_token"],
        SPECIALS["vision_eos_token"],
    )
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size), patch_size=16),
        video_processor=Qwen3VLVideoProcessor(size=dict(size)),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


_SEEN = {"video": {"sound": None}, "image": {"sound": None, "picture": "image"}, "text": {"picture": None}}

_HEARD = {
    "in_video": {},
    "separate": {"sound": "separate"},
    "audio": {"picture": None},
    **_SEEN,
    "text": {"sound": None, "picture": None},
}

_PHI = {
    "sound": {"picture": None},
    "still_sound": {},
    "still": {"sound": None},
    "text": {"sound": None, "picture": None},
}

TINY: dict[str, Tiny] = {
    "qwen2_5_omni": Tiny(tiny_hf_model, tiny_processor, _HEARD, reach=(0.0325, 0.0125)),  # mel frames 4k - 2 to 4k + 4
    "qwen3_omni_moe": Tiny(omni3_hf_model, omni3_processor, _HEARD, reach=(0.0825, 0.0025)),  # 8k - 7 to 8k + 7
    "qwen2_5_vl": Tiny(vl_hf_model, vl_processor, _SEEN),
    "qwen3_vl": Tiny(vl3_hf_model, vl3_processor, _SEEN),
    **{
        name: Tiny(partial(text_hf_model, name), text_tokenizer, {"text": {}}, ("What?", "When?"), False)
        for name in TEXT
    },
    "qwen2_audio": Tiny(qwen2_audio_hf_model, qwen2_audio_processor, {"sound": {}, "text": {"sound": None}}),
    "phi4_multimodal": Tiny(phi_hf_model, phi_processor, _PHI),
    "gemma4": Tiny(gemma_hf_model, gemma_processor, GEMMA_LAYOUTS, reach=(0.04, 0.0)),  # 4k - 3 to 4k + 3, of 20 ms
}


@cache
def family_model(name: str) -> Any:
    """The wrapped tiny model of a family."""
    return avl.load(name, hf_model=TINY[name].hf_model(0), processor=TINY[name].processor())


@cache
def reference(name: str) -> Any:
    """The same weights, never wrapped, with HuggingFace's eager attention."""
    model = TINY[name].hf_model(0)
    model.set_attn_implementation("eager")
    return model.eval()


@cache
def twin(name: str) -> Any:
    """The wrapped model with every key and value head written out once for each query head that shares it."""
    config = copy.deepcopy(TINY[name].hf_model(0).config)
    config.get_text_config().num_key_value_heads = config.get_text_config().num_attention_heads
    model, state = type(TINY[name].hf_model(0))(config).eval(), TINY[name].hf_model(0).state_dict()
    for key, tensor in state.items():
        if re.match(r"model\.(language_model\.)?layers\..*\.[kv]_proj", key):
            state[key] = tensor.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
        elif "qkv_proj" in key:  # 4 heads of queries, 2 of keys, 2 of values, stored as one
            heads = tensor.unflatten(0, (8, -1))
            state[key] = torch.cat((heads[:4], heads[4:].repeat_interleave(2, dim=0))).flatten(0, 1)
    model.load_state_dict(state)
    return avl.load(name, hf_model=model, processor=TINY[name].processor())


def full_folder(name: str, path: Path) -> Path:
    """The same as the thinker of a larger checkpoint, whose other weights lie beside it."""
    inner = TINY[name].hf_model(0)
    inner.save_pretrained(path)
    kind = str(inner.config.model_type).removesuffix("_thinker")
    (path / "config.json").write_text(json.dumps({"model_type": kind, "thinker_config": inner.config.to_dict()}))
    weights = {f"thinker.{key}": value for key, value in load_file(path / "model.safetensors").items()}
    save_file(weights | {"talker.weight": torch.zeros(3)}, path / "model.safetensors", metadata={"format": "pt"})
    TINY[name].processor().save_pretrained(path)
    return path


def folder(name: str, path: Path) -> Path:
    """Save a family's tiny checkpoint as a full folder."""
    TINY[name].hf_model(0).save_pretrained(path)
    TINY[name].processor().save_pretrained(path)
    return path
