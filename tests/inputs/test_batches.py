"""Stacks: the same numbers as one by one, one map, and no padding across layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from av_lens.errors import AlignmentError, InputError
from av_lens.families.media_layout import TensorAxes
from av_lens.inputs import Answer, AVInputs, Encoder
from av_lens.media import Clip


def logits(hf: Any, x: AVInputs) -> torch.Tensor:
    with torch.no_grad():
        return hf(**x.tensors).logits


@pytest.mark.parametrize(
    "options", [{}, {"sound": "separate"}, {"picture": "image"}, {"picture": None}, {"sound": None}]
)
def test_a_stack_gives_each_example_its_own_logits(encoder: Encoder, hf: Any, make_clip, options: dict[str, Any]):
    clips = [make_clip(2.3, seed=seed) for seed in range(3)]
    questions = ["Hear it", "See it!", "Smells?"]
    stack = encoder.encode(clips, questions, **options)
    assert len(stack) == 3
    whole = logits(hf, stack)
    for i, (clip, question) in enumerate(zip(clips, questions, strict=True)):
        alone = logits(hf, encoder.encode(clip, question, **options))
        torch.testing.assert_close(whole[i : i + 1], alone, atol=2e-5, rtol=1e-4)


def test_indexing_takes_a_stack_apart_to_the_bit(encoder: Encoder, make_clip):
    clips = [make_clip(2.3, seed=seed) for seed in range(3)]
    ones = [encoder.encode(clip, "What?") for clip in clips]
    stack = AVInputs.stack(ones)
    for one, part in zip(ones, stack, strict=True):
        assert set(part.tensors) == set(one.tensors)
        for name, value in one.tensors.items():
            assert (
                torch.equal(part.tensors[name], value)
                if isinstance(value, torch.Tensor)
                else part.tensors[name] == value
            )
        assert torch.equal(part.position_ids, one.position_ids)
        assert part.provenance == one.provenance
        assert np.array_equal(part.spans.source_start_s, one.spans.source_start_s, equal_nan=True)
    assert len(stack[1:]) == 2
    assert torch.equal(stack[-1].ids, ones[2].ids)
    with pytest.raises(IndexError):
        _ = stack[3]
    with pytest.raises(InputError, match="selects none of 3 examples"):
        _ = stack[3:]


def test_mels_of_one_layout_and_unequal_length_are_padded_with_their_mask(encoder: Encoder, hf: Any):
    # 200 and 201 mel frames both give 50 tokens.
    waves = [np.random.default_rng(n).normal(0, 0.2, n).clip(-1, 1).astype(np.float32) for n in (32_000, 32_100)]
    ones = [encoder.encode(Clip.from_arrays(waveform=wave), "What?") for wave in waves]
    stack = AVInputs.stack(ones)
    assert stack.tensors["input_features"].shape[-1] == 201
    assert stack.tensors["feature_attention_mask"].sum(dim=1).tolist() == [200, 201]
    assert stack[0].tensors["input_features"].shape[-1] == 200
    for i, one in enumerate(ones):
        torch.testing.assert_close(logits(hf, stack)[i : i + 1], logits(hf, one), atol=2e-5, rtol=1e-4)


def test_a_shared_map_shows_what_differs(encoder: Encoder):
    frames = np.zeros((8, 56, 84, 3), dtype=np.uint8)
    clips = [Clip.from_arrays(frames=frames, times=np.arange(8) / 4 + shift, duration=2.1) for shift in (0.0, 0.05)]
    stack = encoder.encode(clips, ["Hear", "Bear"])
    question = stack.spans.question.positions
    assert stack.tokens[question[0]] == "H|B"
    assert stack.tokens[question[1]] == "e"
    assert np.isnan(stack.spans.source_start_s[stack.spans.video.positions]).all()
    assert stack.spans.start_s[stack.spans.video.positions][0] == 0.0
    with pytest.raises(InputError, match=r"differ in their true times.*ask x\[i\].spans"):
        stack.spans.video.between(0, 1, clock="source")
    assert len(stack.spans.video.between(0, 1)) == 6
    assert len(stack[0].spans.video.between(0, 1, clock="source")) == 6
    assert stack[1].spans.source_start_s[stack.spans.video.positions][0] == pytest.approx(0.05)


def test_layouts_are_never_padded_together(encoder: Encoder, make_clip):
    with pytest.raises(
        AlignmentError, match=r"cannot be stacked: they first differ at position \d+: example 0 has .*never padded"
    ):
        encoder.encode([make_clip(2.0), make_clip(3.0)], "What?")
    with pytest.raises(AlignmentError, match="example 1"):
        encoder.encode(make_clip(2.0), ["Short?", "Much longer?"])
    with pytest.raises(InputError, match="2 clips and 3 questions"):
        encoder.encode([make_clip(2.0)] * 2, ["a", "b", "c"])
    with pytest.raises(InputError, match="at least one example"):
        AVInputs.stack([])


def test_continued_is_what_encoding_the_answer_gives(encoder: Encoder, hf: Any, make_clip):
    prompt = encoder.encode(make_clip(2.0), "What?")
    answered = encoder.encode(make_clip(2.0), "What?", answer=Answer("dog", (tuple(ord(c) for c in "dog"),)))
    new = answered.ids[:, len(prompt.spans) :]
    longer = prompt.continued(new, tokens=answered.tokens[len(prompt.spans) :])
    assert torch.equal(longer.ids, answered.ids)
    assert torch.equal(longer.position_ids, answered.position_ids)
    assert longer.spans.roles == answered.spans.roles
    assert longer.tokens == answered.tokens
    assert torch.equal(logits(hf, longer), logits(hf, answered))
    with pytest.raises(InputError, match=r"shape \[1, n\]"):
        prompt.continued(torch.zeros((2, 1), dtype=torch.long))


def test_to_moves_every_tensor(encoder: Encoder, make_clip):
    x = encoder.encode(make_clip(1.0), "What?").to("meta")
    assert all(value.is_meta for value in x.tensors.values() if isinstance(value, torch.Tensor))
    assert x.position_ids.is_meta


def test_what_it_shows_of_itself(encoder: Encoder, make_clip):
    x = encoder.encode(make_clip(2.0), "Is 1 < 2 & true?")
    text = x.describe()
    assert "'Is 1 < 2 & true?'" in text
    assert "2 x 3 patches" in text
    assert "pixel_values_videos [48, 1176]" in text
    page = x._repr_html_()
    assert "Is 1 &lt; 2 &amp; true?" in page
    # system, question, header and generation once; four boundaries; 2 s are one chunk of video and one of audio.
    assert page.count("<rect") == 9
    assert "<script" not in page
    assert "http" not in page
    assert "audio 50" in page


def test_tensors_that_lie_otherwise_than_their_axes_say_are_refused(encoder: Encoder, make_clip):
    x = encoder.encode([make_clip(2.0, seed=1), make_clip(2.0, seed=2)], "Hear?")
    with pytest.raises(InputError, match=r"pixel_values_videos \(.*\) has no row for each of 2 examples, and axes="):
        replace(x, axes=TensorAxes())
