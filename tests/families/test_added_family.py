"""The worked example of docs/families.md, run: a family that is added from outside holds the proofs at the door."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media_moves import by_square
from small_av import small_clip
from tiny import randomized, untouched
from tiny_families import vl_config, vl_processor

import av_lens as avl
from av_lens.families import registry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
LAYOUTS = {"video": {}, "image": {"picture": "image"}, "text": {"picture": None}}


def qwen2_vl_hf_model() -> Any:
    """A tiny Qwen2-VL of the sizes of `vl_config`."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    told = vl_config().to_dict()
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "initializer_range": 0.1}
    text = {name: value for name, value in told["text_config"].items() if name not in ("model_type", "architectures")}
    tokens = {name: value for name, value in told.items() if name.endswith("token_id")}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens, tie_word_embeddings=False)
    return randomized(Qwen2VLForConditionalGeneration, config, 0)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    registry.families()
    monkeypatch.setattr(registry, "_KNOWN", dict(registry._KNOWN))  # known in this test, and no longer
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    exec(compile(block, str(PAGE), "exec"), {})
    return avl.load("qwen2_vl", hf_model=qwen2_vl_hf_model(), processor=vl_processor())


@cache
def plain() -> Any:
    return untouched(qwen2_vl_hf_model())


def test_the_example_of_the_page_is_huggingfaces_to_the_bit_and_restarts(model):
    for layout in LAYOUTS.values():
        x = model.encode(small_clip(0), "What?", **layout)
        with torch.no_grad():
            assert torch.equal(model(x), plain()(**x.tensors).logits)
        wanted = plain().generate(**x.tensors, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(x, max_new_tokens=8), wanted)
        assert model.trace(x).hooked_because == ""
    assert not avl.model.check_model(model, model.encode(small_clip(0), "What?")).failed


def test_its_map_holds_the_third_proof(model):
    for layout in ("video", "image"):
        for found, said in by_square(model, LAYOUTS[layout]):
            assert found == said
    video = model.encode(small_clip(0, 4.0), "What?").table().query("role == 'video'")
    np.testing.assert_allclose(video["start_s"].unique(), np.arange(4.0))


def test_a_wrong_map_is_refused_before_anything_runs(model, monkeypatch):
    layout = type(model.encoder.layout)
    monkeypatch.setattr(layout, "_clock", lambda self, n, step_s: 2 * np.arange(n))
    with pytest.raises(avl.errors.InputError, match="the model and this map disagree about which second and patch"):
        model.encode(small_clip(0), "What?")
