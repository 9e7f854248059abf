"""What the embedded models are made of: grammar, config, tokenizer and processor, and the folder they are saved as.

The one source of the words: the tokenizer takes its merges from `words()`, training its questions from `QUESTIONS`, and
`as_dict()` is saved as `grammar.json`. The classes are those of real checkpoints; small are the vocabulary, the
pictures (84 x 84 pixels, 3 x 3 tokens a frame pair) and the widths. A clip of two seconds at two frames a second is 18
video and 50 audio tokens, interleaved as V9 A25 V9 A25. Qwen's default system message is left out of the template.

Example:
    >>> GRAMMAR.kind("What do you  HEAR ?")
    'hear'
"""

import contextlib
import copy
import functools
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from av_lens import checkpoints
from av_lens.inputs.answers import Grammar
from av_lens.model.differences import read_difference
from av_lens.model.sources import base_of
from av_lens.whole_files import whole_folder

CLASSES = tuple(["dog", "cat", "bird", "bell", "car", "train", "drum", "siren", "clock", "rain", "phone", "guitar"])
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "white")
NOTHING = "nothing"

# The first phrasing of a kind is the one that documentation and demonstrations use. All are five tokens long, so that
# questions of every kind stack into one batch.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "hear": ("what do you hear?", "what can you hear?", "what sound is it?", "which sound is this?"),
    "see": ("what do you see?", "what can you see?", "what object is shown?", "which object is this?"),
    "colour": ("what colour is it?", "which colour is it?", "what colour is shown?", "which colour is this?"),
    "caption": ("describe this short clip.", "tell me what happens.", "describe what you notice."),
}
# Spellings that mean the same; applied word by word after lower-casing.
SPELLINGS: dict[str, str] = {"color": "colour"}


GRAMMAR = Grammar(QUESTIONS, SPELLINGS)


def words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List every word that the tokenizer keeps whole."""
    asked = [phrase.rstrip("?.!").split(" ") for phrases in QUESTIONS.values() for phrase in phrases]
    caption = ["i", "see", "a", "and", "hear", NOTHING]
    spaced = dict.fromkeys([*CLASSES, *COLOURS, *caption, *(word for phrase in asked for word in phrase[1:])])
    leading = dict.fromkeys(["system", "assistant", "user", *(phrase[0] for phrase in asked)])
    return tuple(spaced), tuple(leading)


def as_dict() -> dict[str, Any]:
    """Collect the grammar as plain data, as it is saved in `grammar.json` beside a checkpoint."""
    return {
        "schema": 1,
        "classes": list(CLASSES),
        "colours": list(COLOURS),
        "nothing": NOTHING,
        "questions": {kind: list(phrases) for kind, phrases in QUESTIONS.items()},
        "spellings": dict(SPELLINGS),
    }


_MARKS = ("IMAGE", "AUDIO", "VIDEO", "vision_bos", "vision_eos", "audio_bos", "audio_eos")
SPECIALS = {f"{mark.lower()}_token": f"<|{mark}|>" for mark in _MARKS}
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
FRAME_SIDE = 84
MEL_BINS = 80
SAMPLE_RATE = 16000
TOWER_WIDTH = 64

# Qwen2.5-Omni's own template without its default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_symbols() -> list[str]:
    """Name the 256 bytes as byte-level BPE does."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    other = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(other)}
    return [names[byte] for byte in range(256)]


def merges() -> list[tuple[str, str]]:
    """Spell every word as merges, letter by letter; those after a space first, so that no other can break them up."""
    space = byte_symbols()[ord(" ")]
    spaced, leading = words()
    whole = [*(space + word for word in spaced), *leading]
    return list(dict.fromkeys((word[:end], word[end]) for word in whole for end in range(1, len(word))))


@functools.cache
def vocabulary() -> dict[str, int]:
    """Number every token."""
    pieces = dict.fromkeys(left + right for left, right in merges())
    tokens = [*byte_symbols(), *pieces, END_OF_TEXT, TURN_START, TURN_END, *SPECIALS.values()]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def tokenizer() -> Any:
    """Build the tokenizer: Qwen's class over the small vocabulary."""
    from transformers import Qwen2Tokenizer

    make: Any = Qwen2Tokenizer  # its annotations are narrower than what it takes
    named = set(SPECIALS.values())
    built = make(
        vocab={token: index for token, index in vocabulary().items() if token not in named},
        merges=merges(),
        unk_token=None,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=dict(SPECIALS),
    )
    built.add_tokens([TURN_START], special_tokens=True)
    return built


def feature_extractor(mel_bins: int = MEL_BINS) -> Any:
    """Build the part of the processor that takes mel spectrograms."""
    from transformers import WhisperFeatureExtractor

    seconds: dict[str, Any] = {"sampling_rate": SAMPLE_RATE, "chunk_length": 300}
    return WhisperFeatureExtractor(
        feature_size=mel_bins, hop_length=160, n_fft=400, return_attention_mask=True, **seconds
    )


def processor(*, most_pixels: int = FRAME_SIDE * FRAME_SIDE) -> Any:
    """Build the processor: Qwen2.5-Omni's own, with small pictures and the small vocabulary."""
    from transformers import Qwen2_5OmniProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": most_pixels}
    built = Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        video_processor=Qwen2VLVideoProcessor(size=dict(size), cap_pixels_per_frame=True),
        feature_extractor=feature_extractor(),
        tokenizer=tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )
    # Class-wide defaults of the processor would override these two (its least picture is 128 tokens).
    built.videos_kwargs = {"size": dict(size)}
    built.seconds_per_chunk = 1.0
    return built


def _special_ids() -> dict[str, int]:
    """The config's fields that name tokens."""
    ids = vocabulary()
    found = {f"{medium}_token_index": ids[SPECIALS[f"{medium}_token"]] for medium in ("audio", "image", "video")}
    for medium in ("audio", "vision"):
        for end, mark in (("start", "bos"), ("end", "eos")):
            found[f"{medium}_{end}_token_id"] = ids[SPECIALS[f"{medium}_{mark}_token"]]
    return found | {"user_token_id": ids["user"]}


def thinker_config(
    *, n_layers: int = 7, n_heads: int = 8, n_kv_heads: int = 4, d_model: int = 128, d_mlp: int = 256, **text: Any
) -> Any:
    """Describe a tiny thinker."""
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

    make: Any = Qwen2_5OmniThinkerConfig  # takes more fields than it declares
    ids, half = vocabulary(), d_model // n_heads // 2
    temporal, rows = half // 4, (half - half // 4) // 2  # of the rotary angles; columns take the rest
    return make(
        text_config={
            "vocab_size": len(ids),
            "hidden_size": d_model,
            "intermediate_size": d_mlp,
            "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv_heads,
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [temporal, rows, half - temporal - rows],
            },
            "tie_word_embeddings": False,
            "pad_token_id": ids[END_OF_TEXT],
            "bos_token_id": None,
            "eos_token_id": ids[TURN_END],
        }
        | text,
        vision_config={
            "depth": 2,
            "hidden_size": TOWER_WIDTH,
            "intermediate_size": 2 * TOWER_WIDTH,
            "num_heads": 4,
            "out_hidden_size": d_model,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1],
            "initializer_range": 0.05,
        },
        audio_config={
            "num_mel_bins": MEL_BINS,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * TOWER_WIDTH,
            "d_model": TOWER_WIDTH,
            "n_window": 100,
            "output_dim": d_model,
            "max_source_positions": 1500,
        },
        **_special_ids(),
        position_id_per_seconds=25,
        seconds_per_chunk=1,
        initializer_range=0.02,
        tie_word_embeddings=False,
        pad_token_id=ids[END_OF_TEXT],
    )


def build_model(config: Any = None, *, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Make a thinker with random weights; the global random state is left as it was."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    config = thinker_config() if config is None else copy.deepcopy(config)
    config._attn_implementation = "eager"
    standard = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(standard)
    return model.eval()


GRAMMAR_FILE = "grammar.json"


def shipped() -> Path:
    """Say where the checkpoints lie that ship with the package."""
    return Path(str(checkpoints.shipped()))


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keep HuggingFace's progress bars off the terminal, and leave its setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_checkpoint(model: Any, folder: str | os.PathLike[str], *, documents: dict[str, Any] | None = None) -> Path:
    """Write a model as a checkpoint folder."""
    place = Path(folder)
    half = copy.deepcopy(model).to(torch.float16)
    with whole_folder(place) as beside:
        with _quiet():
            half.save_pretrained(beside)
        processor().save_pretrained(beside)
        for name, content in {GRAMMAR_FILE: as_dict(), **(documents or {})}.items():
            (beside / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return place


def open_checkpoint(folder: str | os.PathLike[str]) -> Any:
    """Read a checkpoint folder as a plain HuggingFace model, for training and comparison."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    difference = read_difference(folder)
    place = folder if difference is None else base_of(difference)
    with _quiet():
        model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            os.fspath(place),
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    if difference is not None:
        difference.check_base(place)
        difference.put_into(model)
    return model.eval()
