"""What is refused of a model, and in which words: one case each."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_av import small_clip
from tiny import tiny_hf_model, tiny_processor
from tiny_families import TINY, family_model

import av_lens as avl
from av_lens.errors import AvLensError
from av_lens.interventions import Plan, Site, zero


def heard(name: str = "qwen2_5_omni", **more: Any) -> Any:
    return family_model(name).encode(small_clip(0), "What?", picture=None, **more)


def seen(name: str = "qwen2_5_vl", **more: Any) -> Any:
    return family_model(name).encode(small_clip(0), "What?", sound=None, **more)


def with_one_token_less(x: Any, role: str) -> Any:
    """Run HuggingFace's model, as wrapped, on a prompt in which one medium's token is text."""
    model = family_model("qwen2_5_omni")
    ids = x.tensors["input_ids"].clone()
    ids[0, x.spans[role].positions[-1].item()] = 0
    return model.hf_model(**(dict(x.tensors) | {"input_ids": ids}))


def a_class_of_nobodys(place: Path) -> Any:
    (place / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    return avl.load(place)


def a_model_of_nobodys(place: Path) -> Any:
    return avl.load(hf_model=torch.nn.Linear(2, 2), processor=tiny_processor())


def no_type(place: Path) -> Any:
    (place / "config.json").write_text(json.dumps({"hidden_size": 8}))
    return avl.load(place)


def no_ears_in_the_processor(place: Path) -> Any:
    processor = copy.copy(tiny_processor())
    processor.feature_extractor = None
    return avl.load("x", hf_model=tiny_hf_model(n_layers=1), processor=processor)


def another_ones_processor(place: Path) -> Any:
    return avl.load("x", hf_model=TINY["qwen3_vl"].hf_model(0), processor=tiny_processor_of_more())


def tiny_processor_of_more() -> Any:
    processor = TINY["qwen3_vl"].processor()
    processor.tokenizer.add_tokens([f"<more{number}>" for number in range(9)], special_tokens=True)
    return processor


def sound_tokens_too_few(place: Path) -> Any:
    return with_one_token_less(heard(), "audio")


def video_tokens_too_few(place: Path) -> Any:
    return with_one_token_less(family_model("qwen2_5_omni").encode(small_clip(0), "What?", sound=None), "video")


def bare_placeholders(place: Path) -> Any:
    return family_model("qwen2_5_omni").hf_model(input_ids=heard().tensors["input_ids"])


def sound_without_ears(place: Path) -> Any:
    return family_model("qwen3_vl").encode(small_clip(0), "What?", sound="in_video")


def units_of_experts(place: Path) -> Any:
    model = family_model("qwen3_omni_moe")
    return avl.run(model, heard("qwen3_omni_moe"), plan=Plan(zero(Site("mlp_pre", 2))))


def a_hook_of_no_layer(place: Path) -> Any:
    return family_model("qwen2_5_vl").run_with_cache(seen(), ["blocks.9.attn.hook_z"])


def too_few_frames_a_second(place: Path) -> Any:
    return family_model("qwen2_5_omni").encode(small_clip(0), "What?", fps=0.5)


def no_frames_a_second(place: Path) -> Any:
    return seen(fps=0)


def wrapped_twice(place: Path) -> Any:
    return avl.load("x", hf_model=family_model("qwen2_5_vl").hf_model, processor=TINY["qwen2_5_vl"].processor())


CASES: dict[Callable[[Path], Any], str] = {
    a_class_of_nobodys: "no adapter for 'mamba'. Families with one: .*To add a family .*: write av_lens/families/",
    a_model_of_nobodys: "no adapter for 'Linear'. Families with one: ",
    no_type: r"the config.json of '.*' names no model_type. To add a family",
    no_ears_in_the_processor: "is Qwen2_5OmniProcessor, without feature_extractor: .* Complete the folder",
    another_ones_processor: "the tokenizer of 'x' is another model's: it has .* tokens, the model",
    sound_tokens_too_few: "the prompt has 49 tokens of sound and the sound's tower gives 50 rows: the rest",
    video_tokens_too_few: "Video features and video tokens do not match, tokens: 11, features: 12. Make the input",
    bare_placeholders: "these ids hold placeholders of audio, but input_features did not come with them",
    sound_without_ears: "sound='in_video' is asked of a model that takes text and video and image: use sound=None",
    units_of_experts: "layer 2 chooses among experts, .*, and has no mlp_pre: name mlp_in or mlp_out",
    a_hook_of_no_layer: "unknown hook 'blocks.9.attn.hook_z'",
    too_few_frames_a_second: "fps=0.5 is below 1: .* Use fps=1 or more",
    no_frames_a_second: "fps=0: frames are sampled at a rate above 0",
    wrapped_twice: "is wrapped already; use the HookedAVLLM or TransformerBridge that wraps it",
}


@pytest.mark.parametrize("asked", CASES, ids=lambda one: one.__name__)
def test_a_refusal_says_what_is_wrong_and_what_to_do(asked, tmp_path):
    with pytest.raises(AvLensError) as refused:
        asked(tmp_path)
    assert re.search(CASES[asked], str(refused.value), re.S), refused.value
