"""Prompts of the embedded models as ids, positions and embeddings, for training on features that were computed once.

A layout says where the 18 video and the 50 audio tokens stand. The text comes from the processor's own chat template,
the expansion of the placeholders from the processor itself, and the position ids from the model's own `get_rope_index`;
this module only remembers them, and puts features where the processor put placeholders.

Example:
    `prompt("what do you hear?", "in_video")` interleaves V9 A25 V9 A25 between two pairs of boundary tokens.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_lens.errors import InputError, unknown
from av_lens.organism import anatomy, grammar

LAYOUTS: tuple[str, ...] = ("separate", "in_video", "audio", "video")
N_VIDEO, N_AUDIO = 18, 50
MEL_FRAMES = 200
GRID = (2, 6, 6)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question in one layout: ids, position ids, and where the media stand.

    Attributes:
        ids: int64 `[pos]`.
        position_ids: int64 `[3, pos]`.
        video: int64 positions of the video tokens, in their order.
        audio: int64 positions of the audio tokens, in their order.
        question: int64 positions of the question's tokens.
        suffix: the first position after the media and their boundaries; the rest of the prompt is text.
    """

    ids: Tensor
    position_ids: Tensor
    video: Tensor
    audio: Tensor
    question: Tensor
    suffix: int


def message(question: str, layout: str) -> list[dict[str, Any]]:
    """Write a question as the chat message of a layout."""
    if layout not in LAYOUTS:
        raise InputError(unknown("layout", layout, LAYOUTS))
    media = {"separate": ["video", "audio"], "in_video": ["video"], "audio": ["audio"], "video": ["video"]}[layout]
    content: list[dict[str, Any]] = [{"type": kind} for kind in media]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


@functools.cache
def _tools() -> tuple[Any, Any]:
    """The processor, and a thinker with one layer whose `get_rope_index` is that of every organism."""
    return anatomy.processor(), anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=0)


@functools.cache
def prompt(question: str, layout: str) -> Prompt:
    """Make the prompt of one question in one layout."""
    processor, model = _tools()
    text = processor.apply_chat_template(message(question, layout), add_generation_prompt=True, tokenize=False)
    arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    if layout != "audio":
        arguments["videos"] = [np.zeros((4, anatomy.FRAME_SIDE, anatomy.FRAME_SIDE, 3), np.uint8)]
        arguments["videos_kwargs"] = {"fps": 2.0, "do_sample_frames": False, "cap_pixels_per_frame": True}
    if layout != "video":
        arguments["audio"] = [np.zeros(2 * anatomy.SAMPLE_RATE, np.float32)]
    if layout == "in_video":
        arguments |= {"audio_from_video_indices": [0], "load_audio_from_video": True}
    with warnings.catch_warnings():  # the processor gives NumPy a tensor in a way that NumPy 2 deprecates
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        made = processor(**arguments)
    ids = made["input_ids"]
    with torch.no_grad():
        positions, _ = model.model.get_rope_index(
            ids,
            video_grid_thw=made.get("video_grid_thw"),
            attention_mask=torch.ones_like(ids),
            use_audio_in_video=layout == "in_video",
            audio_seqlens=None if layout == "video" else torch.tensor([MEL_FRAMES]),
            second_per_grids=None if layout == "audio" else torch.tensor([1.0]),
        )
    vocabulary = anatomy.vocabulary()
    flat = ids[0]
    media = torch.isin(flat, torch.tensor([vocabulary[token] for token in anatomy.SPECIALS.values()]))
    suffix = int(media.nonzero().max()) + 1
    turn_end = int((flat == vocabulary[anatomy.TURN_END]).nonzero()[0])
    return Prompt(
        ids=flat,
        position_ids=positions[:, 0],
        video=(flat == vocabulary[anatomy.SPECIALS["video_token"]]).nonzero()[:, 0],
        audio=(flat == vocabulary[anatomy.SPECIALS["audio_token"]]).nonzero()[:, 0],
        question=torch.arange(suffix, turn_end),
        suffix=suffix,
    )


def answer_ids(text: str) -> list[int]:
    """Spell an answer as the model writes it: after a space, one token a word."""
    vocabulary = anatomy.vocabulary()
    space = anatomy.byte_symbols()[ord(" ")]
    return [vocabulary[space + word] for word in text.split(" ")]


def class_ids() -> Tensor:
    """List the answer token of every class."""
    return torch.tensor([answer_ids(name)[0] for name in grammar.CLASSES])
