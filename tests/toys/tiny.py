"""Tiny random Qwen2.5-Omni thinkers and their real processor, built offline.

The classes are the ones that real checkpoints use: only the sizes are small. Everything is deterministic in `seed`.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch

from av_lens.organism.anatomy import END_OF_TEXT, SPECIALS, TURN_END, TURN_START, byte_symbols

# Qwen2.5-Omni's own template: a default system message, one placeholder per picture, sound or video, and the header.
CHAT_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}{% set image_count = namespace(value=0) %}"
    "{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "{% if add_audio_id %}Audio {{ audio_count.value }}: {% endif %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def token_ids() -> dict[str, int]:
    """The id of every byte symbol and every special token."""
    return {
        token: i for i, token in enumerate([*byte_symbols(), END_OF_TEXT, TURN_START, TURN_END, *SPECIALS.values()])
    }


def letter(name: str) -> Any:
    """A letter as an answer to be taken literally: a random model may say it in another form."""
    from av_lens.inputs import Answer

    return Answer(name, ((token_ids()[name],),))


def tiny_processor() -> Any:
    """A real `Qwen2_5OmniProcessor` over bytes: 28 x 28 pixels per token as always, at most 16 tokens a picture."""
    from transformers import Qwen2_5OmniProcessor, Qwen2Tokenizer, WhisperFeatureExtractor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    vocab = {token: i for token, i in token_ids().items() if token not in SPECIALS.values()}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=None,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=dict(SPECIALS),
    )
    tokenizer.add_tokens([TURN_START], special_tokens=True)
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=32,
            sampling_rate=16000,
            hop_length=160,
            n_fft=400,
            chunk_length=300,
            return_attention_mask=True,
        ),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    # The processor's class-wide `videos_kwargs` would override the video processor's size (128 tokens at least).
    processor.videos_kwargs = {"size": dict(size)}
    return processor


def tiny_config(*, n_layers: int = 4, d_model: int = 64, n_heads: int = 4, n_kv_heads: int = 2, **text: Any) -> Any:
    """A thinker's config: real anatomy, tiny sizes; `text` overrides fields of the text config."""
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

    ids = token_ids()
    half = d_model // n_heads // 2
    temporal = half // 4
    rows = (half - temporal) // 2
    text_config = {
        "vocab_size": len(ids),
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [temporal, rows, half - temporal - rows],
        },
        "tie_word_embeddings": False,
        "pad_token_id": ids[END_OF_TEXT],
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
    } | text
    return Qwen2_5OmniThinkerConfig(
        text_config=text_config,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": text_config["hidden_size"],
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.1,
        },
        audio_config={
            "num_mel_bins": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "n_window": 100,
            "output_dim": text_config["hidden_size"],
            "max_source_positions": 1500,
            "initializer_range": 0.1,
        },
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
        user_token_id=ids["u"],
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=ids[END_OF_TEXT],
    )


@torch.no_grad()
def randomized(model_class: Any, config: Any, seed: int) -> Any:
    """A random model in evaluation mode; biases and norms are random too, so that nothing cancels by accident."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0.0, 0.1, generator=generator)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def tiny_hf_model(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random thinker."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    return randomized(Qwen2_5OmniThinkerForConditionalGeneration, tiny_config(**config), seed).to(dtype)


def tiny_media(seconds: float = 3.0, *, fps: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random frames `[time, 56, 84, 3]` uint8 at `fps`, and a random 16 kHz waveform, both `seconds` long."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (round(seconds * fps), 56, 84, 3), dtype=np.uint8)
    waveform = rng.normal(0.0, 0.2, round(seconds * 16000)).clip(-1, 1).astype(np.float32)
    return frames, waveform


def tiny_tensors(
    layout: str = "in_video", *, seconds: float = 3.0, seed: int = 0, question: str = "What?", processor: Any = None
) -> dict[str, Any]:
    """Keyword arguments of the HuggingFace forward, by the processor alone (its own 300 s mel padding kept)."""
    processor = processor or tiny_processor()
    frames, waveform = tiny_media(seconds, seed=seed)
    video, audio = {"type": "video", "video": "-"}, {"type": "audio", "audio": "-"}
    media = {"in_video": [video], "separate": [video, audio], "audio": [audio], "video": [video], "text": []}[layout]
    content = [*media, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    if layout in ("in_video", "separate", "video"):
        arguments |= {
            "videos": [frames],
            "videos_kwargs": {"fps": 2.0, "do_sample_frames": False, "cap_pixels_per_frame": True},
        }
    if layout in ("in_video", "separate", "audio"):
        arguments |= {"audio": [waveform]}
    if layout == "in_video":
        arguments |= {"audio_from_video_indices": [0], "load_audio_from_video": True}
    with warnings.catch_warnings():
        # The processor feeds torch scalars to numpy.arange, which warns under numpy 2.
        warnings.simplefilter("ignore", DeprecationWarning)
        batch = dict(processor(**arguments))
    batch.pop("num_audio_tokens", None)
    return batch | {"use_audio_in_video": layout == "in_video"}


def tiny_clip(seconds: float = 2.0, *, seed: int = 0, sound_seed: int | None = None) -> Any:
    """A `Clip` of random frames at 2 per second and random sound; `sound_seed` for the same picture, another sound."""
    from av_lens.media import Clip

    frames, waveform = tiny_media(seconds, seed=seed)
    if sound_seed is not None:
        waveform = tiny_media(seconds, seed=sound_seed)[1]
    return Clip.from_arrays(frames=frames, times=np.arange(len(frames)) / 2.0, waveform=waveform, rate=16000)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A `HookedAVLLM` around a tiny random thinker."""
    from av_lens.model import load

    return load(hf_model=tiny_hf_model(seed, dtype, **config), processor=tiny_processor())


def untouched(hf_model: Any) -> Any:
    """A copy to compare with, made before wrapping: HuggingFace's own eager attention, a configuration of its own."""
    copied = copy.deepcopy(hf_model)
    copied.set_attn_implementation("eager")
    return copied.eval()


def trimmed(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same input with its mel cut to the sound, as `encode` does it."""
    if "input_features" not in tensors:
        return tensors
    frames = int(tensors["feature_attention_mask"].sum(-1).max())
    return tensors | {
        "input_features": tensors["input_features"][..., :frames],
        "feature_attention_mask": tensors["feature_attention_mask"][:, :frames],
    }


class Tensors:
    """The least that a model runs: keyword arguments of the HuggingFace forward."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors
