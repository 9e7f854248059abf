"""What cannot be encoded is refused before anything runs, and the message says what to do."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from noise import model_positions, noise_clip

from av_lens.errors import InputError, ModelError
from av_lens.inputs import Encoder
from av_lens.media import Clip

SILENT = noise_clip(2.0, sound=False)
SOUND = Clip.from_arrays(waveform=np.zeros(32000, np.float32))
BOTH = noise_clip(2.0)


@pytest.mark.parametrize(
    ("clip", "question", "options", "text"),
    [
        (
            SILENT,
            "Hear?",
            {"sound": "in_video"},
            r"sound='in_video' is asked of Clip\(.*, which has no audio stream: use sound=None",
        ),
        (
            SILENT,
            "Hear?",
            {"sound": "separate"},
            r"no audio stream: use sound=None, or give it a sound with clip.with_sound",
        ),
        (None, "Hear?", {"sound": "separate"}, "is asked of no clip"),
        (
            SOUND,
            "See?",
            {"picture": "video"},
            r"picture='video' is asked of Clip\(.*, which has no picture: use picture=None",
        ),
        (SOUND, "Hear?", {"sound": "in_video"}, "sound='in_video' needs a video, and the picture is None"),
        (
            BOTH,
            "Hear?",
            {"sound": "in_video", "picture": "image"},
            "needs a video, and the picture is 'image': use sound='separate'",
        ),
        (BOTH, "Hear?", {"sound": "in video"}, r"unknown option sound= 'in video'. Did you mean 'in_video'\?"),
        (BOTH, "Hear?", {"picture": "vidoe"}, r"unknown option picture= 'vidoe'. Did you mean 'video'\?"),
        (
            BOTH,
            "Hear?",
            {"fps": 0.5},
            r"fps=0.5 is below 1: a patch of 2 frames .*Use fps=1 or more; .*start= and end=",
        ),
        (BOTH, "Hear?", {"fps": 0}, "fps=0 is below 1"),
        (BOTH, "Hear?", {"fps": float("nan")}, "fps=nan is below 1"),
        (BOTH, "  ", {}, "the question is empty"),
        (BOTH, "a<|VIDEO|>b", {}, r"the question holds the special token '<\|VIDEO\|>', which would break the prompt"),
        (BOTH, "Hear?", {"system": "<|im_end|>"}, "the system message holds the special token"),
        (BOTH, "Hear?", {"prefix": "<|im_start|>"}, "the prefix holds the special token"),
        (BOTH, "Hear?", {"answer": [97, 98]}, "answer= appends one answer, and .* lists 2 synonyms"),
        (BOTH, "Hear?", {"answer": "dog"}, r"the answer 'dog' is text, .*use .* model.encode\(..., answer=\)"),
        (
            Clip.from_arrays(waveform=np.zeros(320, np.float32)),
            "Hear?",
            {},
            "the sound lasts 20 ms: one token needs more",
        ),
        (
            Clip.from_arrays(waveform=np.zeros(16000 * 301, np.float32)),
            "Hear?",
            {},
            r"lasts 301.0 s and this processor hears at most 300 s: cut the clip first, e.g. clip.trimmed\(0, 300\)",
        ),
    ],
)
def test_refused(encoder: Encoder, clip: Clip | None, question: str, options: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        encoder.encode(clip, question, **options)


def test_a_rate_below_the_models_chunks_is_refused_only_where_they_matter(processor: Any, hf: Any):
    config = copy.deepcopy(hf.config)
    config.seconds_per_chunk = 1
    encoder = Encoder(processor, config, model_positions(hf))
    with pytest.raises(
        InputError, match=r"fps=1 makes a patch of 2 s, longer than this model's chunks of 1 s: use fps=2 or more"
    ):
        encoder.encode(BOTH, "Hear?", fps=1)
    assert encoder.encode(BOTH, "Hear?", fps=1, sound="separate").layout == "separate"


def test_a_question_outside_the_grammar(processor: Any, hf: Any):
    encoder = Encoder(processor, hf.config, model_positions(hf), grammar={"questions": {"hear": ["what do you hear?"]}})
    assert encoder.encode(BOTH, "What do you HEAR ?").questions == ("what do you hear?",)
    with pytest.raises(InputError, match=r"not taught that: unknown question 'why\?'"):
        encoder.encode(BOTH, "why?")


def test_a_processor_of_another_checkpoint(processor: Any, hf: Any):
    config = copy.deepcopy(hf.config)
    config.audio_token_id = 3
    with pytest.raises(
        ModelError, match=r"writes audio as token \d+ and the model reads token 3: .*different checkpoints"
    ):
        Encoder(processor, config, model_positions(hf))


def test_a_model_that_disagrees_is_refused_at_the_position(processor: Any, hf: Any):
    truth = model_positions(hf)

    def shifted(tensors: Any) -> torch.Tensor:
        positions = truth(tensors).clone()
        positions[2, 0, 60] += 1
        return positions

    with pytest.raises(
        InputError, match=r"disagree about which second and patch .*: position 60 \(token '.*', role \w+\)"
    ):
        Encoder(processor, hf.config, shifted).encode(BOTH, "Hear?")


def test_a_model_that_cannot_place_the_input(processor: Any, hf: Any):
    def broken(tensors: Any) -> torch.Tensor:
        raise IndexError("index 3 is out of bounds")

    with pytest.raises(InputError, match=r"cannot compute position ids for this input \(index 3 is out of bounds\)"):
        Encoder(processor, hf.config, broken).encode(BOTH, "Hear?")


def test_a_template_that_hides_the_question(processor: Any, hf: Any):
    odd = copy.copy(processor)
    odd.chat_template = "<|im_start|>assistant\n"
    with pytest.raises(ModelError, match="chat template does not show each message exactly once"):
        Encoder(odd, hf.config, model_positions(hf)).encode(None, "Hear?")


def test_without_a_template_the_prompt_is_media_and_question(processor: Any, hf: Any):
    plain = copy.copy(processor)
    plain.chat_template = None
    x = Encoder(plain, hf.config, model_positions(hf)).encode(noise_clip(1.0), "Hear?", sound="separate")
    assert x.spans.roles[-1] == "generation"
    assert "".join(np.array(x.tokens)[x.spans.question.positions]) == "Hear"
    assert len(x.spans.boundary) == 4
