"""Text decoders: they take text alone, open with a bare tokenizer, and restart under windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_av import small_clip
from tiny_families import family_model, folder
from tiny_text import text_hf_model, text_tokenizer

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError, ModelError
from av_lens.families.adapter import ReplayTraits
from av_lens.families.decoder import as_forward
from av_lens.interventions import Plan, Site, zero


def test_media_are_refused_in_words():
    model = family_model("qwen2")
    with pytest.raises(
        InputError, match=r"this model reads text alone, and got Clip\(.*: ask model.encode\(None, quest"
    ):
        model.encode(small_clip(0), "What?")
    with pytest.raises(InputError, match=r"sound='separate' is asked of a model that takes text alone: use sound=None"):
        model.encode(small_clip(0), "What?", sound="separate")


def test_roles_are_those_of_the_template():
    x = family_model("qwen2").encode(None, "What?", system="Be brief.", prefix="I say", answer=7)
    text = "".join(x.tokens)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n")
    assert "".join(x.tokens[i] for i in x.spans.question) == "What?"
    assert "".join(x.tokens[i] for i in x.spans.system) == "Be brief."
    assert x.tokens[x.spans.generation_position] == "y"
    assert x.position_ids.tolist() == [[[*range(len(x.spans))]]]


def mistral(window: int) -> avl.HookedAVLLM:
    return avl.load(hf_model=text_hf_model("mistral", sliding_window=window), processor=text_tokenizer())


def test_a_window_that_all_layers_share_is_recorded():
    x = family_model("mistral").encode(None, "What?")
    trace = family_model("mistral").trace(x)
    assert not trace.hooked_because
    assert trace.mask is not None
    far = (trace.mask[0, 0] < -1e30).tril().any()  # earlier positions are out of reach
    assert bool(far)


@pytest.mark.parametrize("window", [24, 66])  # below the prompt, and passed while decoding
def test_decoding_past_the_window_is_huggingfaces(window):
    model = mistral(window)
    reference = text_hf_model("mistral", sliding_window=window)
    reference.set_attn_implementation("eager")
    x = model.encode(None, "What?")
    wanted = reference.generate(**x.tensors, max_new_tokens=8, do_sample=False)
    trace, plan = model.trace(x), Plan(zero(Site("z", 1, 2, "question")))
    assert torch.equal(model.generate(x, max_new_tokens=8), wanted)
    edited = model.generate(x, plan=plan, max_new_tokens=8)
    found = trace.generate([Plan(), plan], max_new_tokens=8)
    assert torch.equal(found[0].tokens, wanted)
    assert torch.equal(found[1].tokens, edited)


def test_windows_of_some_layers_are_hooked_and_said():
    changed = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    model = avl.load(hf_model=text_hf_model("qwen2", **changed), processor=text_tokenizer())
    x = model.encode(None, "What?")
    trace, plan = model.trace(x), Plan(zero(Site("z", 1, 2, "question")))
    assert "some of its layers read a sliding window of 16 positions, and there are" in trace.hooked_because
    torch.testing.assert_close(trace.replay([plan])[0], run(model, x, plan=plan).logits.detach(), atol=1e-5, rtol=0)
    shared = avl.load(
        hf_model=text_hf_model("qwen2", **(changed | {"max_window_layers": 0})), processor=text_tokenizer()
    )
    assert not shared.trace(x).hooked_because


def test_one_stream_loses_its_axis():
    assert as_forward(torch.zeros(1, 2, 5)).shape == (2, 5)
    assert as_forward(torch.zeros(3, 2, 5)).shape == (3, 2, 5)
    with pytest.raises(ModelError, match="a sliding window holds at least one position, not 0"):
        ReplayTraits(shared_window=0)


def test_a_folder_with_a_tokenizer_alone_opens(tmp_path):
    model = avl.load(folder("llama", tmp_path / "it"))
    x = model.encode(None, "What?")
    assert torch.equal(model(x), family_model("llama")(x))
    np.testing.assert_array_equal(model.encode([None, None], ["What?", "When?"]).ids[0], x.ids[0])
