"""Taking the sound out of a prompt: the prompt of the picture alone, and which positions both prompts have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_av import small_clip, small_model

from av_lens.errors import AlignmentError, InputError
from av_lens.inputs.pairs import shared_positions, without_sound


@pytest.mark.parametrize("sound", ["in_video", "separate"])
def test_the_silent_prompt_is_that_of_the_picture_alone(sound):
    model = small_model()
    x = model.encode(small_clip(0, 3.0), "What now?", sound=sound, fps=4.0, system="Be brief.", prefix="I see")
    silent = without_sound(model, x)
    wanted = model.encode(small_clip(0, 3.0), "What now?", sound=None, fps=4.0, system="Be brief.", prefix="I see")
    assert torch.equal(silent.ids, wanted.ids)
    assert torch.equal(silent.position_ids, wanted.position_ids)
    assert torch.equal(silent.tensors["pixel_values_videos"], wanted.tensors["pixel_values_videos"])
    assert silent.layout == "video_only"


@pytest.mark.parametrize("sound", ["in_video", "separate"])
def test_shared_positions_have_the_same_tokens_patches_and_times(sound):
    model = small_model()
    x = model.encode([small_clip(0, 3.0), small_clip(1, 3.0)], "What now?", sound=sound)
    silent = without_sound(model, x)
    here, there = shared_positions(x, silent, model.config)
    assert torch.equal(x.ids[:, here], silent.ids[:, there])
    assert len(there) == len(silent.spans)
    left = sorted(set(range(len(x.spans))) - set(here.tolist()))
    assert {x.spans.roles[p] for p in left} == {"audio", "boundary"}
    assert len(left) == len(x.spans.audio) + 2
    for column in ("row", "col", "start_s", "end_s"):
        np.testing.assert_array_equal(getattr(x.spans, column)[here], getattr(silent.spans, column)[there])
    moved = x.position_ids[:, 0, list(x.spans.video)] - silent.position_ids[:, 0, list(silent.spans.video)]
    assert len(torch.unique(moved)) == 1  # the picture keeps its own clock, text comes nearer
    assert int(x.position_ids[0, 0, -1]) > int(silent.position_ids[0, 0, -1])


def test_sound_alone_becomes_text_alone():
    model = small_model()
    x = model.encode(small_clip(0), "What?", picture=None, sound="separate")
    assert without_sound(model, x).layout == "text"


def test_refusals():
    model = small_model()
    x = model.encode(small_clip(0), "What?")
    other = without_sound(model, model.encode(small_clip(0), "When?"))
    with pytest.raises(AlignmentError, match=r"their token \d+, sound left out, is 'a' .*question.* and 'e'"):
        shared_positions(x, other, model.config)
    longer = without_sound(model, model.encode(small_clip(0), "What?", prefix="I"))
    with pytest.raises(AlignmentError, match="differ in more than the sound"):
        shared_positions(x, longer, model.config)
    with pytest.raises(InputError, match="hold an answer"):
        without_sound(model, x.continued(torch.tensor([[5]])))
    with pytest.raises(AlignmentError, match="1 examples against 2"):
        shared_positions(x, model.encode([small_clip(0), small_clip(1)], "What?", sound=None), model.config)
