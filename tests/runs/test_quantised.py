"""Weights of 8 or 4 bits: what goes through modules works and is the hooked run's; what reads numbers is refused.

By a stand-in whose weights are packed bytes, and, where bitsandbytes is installed, by bitsandbytes on this CPU.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import Packing, pack
from small_av import small_inputs
from tiny import letter, tiny_config, tiny_hf_model, tiny_processor

import av_lens as avl
from av_lens.core import run
from av_lens.core.calls import is_packed
from av_lens.errors import ModelError
from av_lens.interventions import Plan, Site, add, cut, scale, zero
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.methods import edge_attribution, find_circuit, path_patch
from av_lens.metrics import logit_diff

METRIC = logit_diff(letter("a"), letter("b"))
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@cache
def packed_model() -> Any:
    return avl.load("tiny", hf_model=pack(tiny_hf_model()), processor=tiny_processor())


@cache
def dense_model() -> Any:
    """The same rounded weights, in plain layers."""
    return avl.load("tiny", hf_model=pack(tiny_hf_model(), dense=True), processor=tiny_processor())


@cache
def by_library(bits: int, place: Path) -> Any:
    """The same model, quantised by bitsandbytes on this CPU, and saved."""
    from transformers import BitsAndBytesConfig, Qwen2_5OmniThinkerForConditionalGeneration

    tiny_hf_model().save_pretrained(place / "plain")
    way = {4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, 8: {"load_in_8bit": True}}[bits]
    way["llm_int8_skip_modules"] = [
        "model.visual",
        "model.audio_tower",
        "lm_head",
    ]  # narrower than a block of 4-bit numbers
    hf_model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        place / "plain", quantization_config=BitsAndBytesConfig(**way), dtype=torch.float32, device_map={"": "cpu"}
    )
    hf_model.save_pretrained(place / str(bits))
    tiny_processor().save_pretrained(place / str(bits))
    return hf_model


def pair() -> Any:
    one, other = (small_inputs((seed,)) for seed in (0, 1))
    return avl.Pair(clean=one, corrupt=other)


@torch.no_grad()
def test_hooks_caches_replays_patching_and_generation_work():
    model, dense, x = packed_model(), dense_model(), small_inputs((0,))
    assert model.spec == dense.spec
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=0)
    _, cache_ = model.run_with_cache(x)
    _, wanted = dense.run_with_cache(x)
    for name in ("z", "pattern", "mlp_post", "resid_post"):
        torch.testing.assert_close(cache_[name, 2], wanted[name, 2], atol=1e-5, rtol=0)
    trace = model.trace(x)
    assert trace.hooked_because == ""
    plans = [
        Plan(zero(Site("z", 1, 2, "suffix"))),
        Plan(scale(Site("k", 2, 1, "media"), 0.5)),
        Plan(add(Site("mlp_post", 2, positions="generation"), torch.ones(1, 1, 128))),
        Plan(cut("generation", "video", layers=[1, 3])),
    ]
    for plan, found in zip(plans, trace.replay(plans), strict=True):
        torch.testing.assert_close(found, run(model, x, plan=plan).logits, atol=1e-5, rtol=0)
    grid, same = (avl.patch(one, pair(), at="generation", metric=METRIC) for one in (model, dense))
    torch.testing.assert_close(torch.tensor(grid.values.values), torch.tensor(same.values.values), atol=1e-5, rtol=0)
    tokens = dense.generate(x, max_new_tokens=6)
    assert torch.equal(model.generate(x, max_new_tokens=6), tokens)
    assert torch.equal(trace.generate(Plan(), max_new_tokens=6)[0].tokens, tokens)


def test_gradients_through_the_suffix_work():
    sites = [Site("z", layer, positions="suffix") for layer in range(4)]
    ours, theirs = (
        one.trace(small_inputs()).gradients(sites, METRIC).gradient for one in (packed_model(), dense_model())
    )
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_circuit_is_found_without_reading_weights():
    found, wanted = (find_circuit(one, pair(), metric=METRIC) for one in (packed_model(), dense_model()))
    assert list(found.nodes.index) == list(wanted.nodes.index)
    assert len(found.nodes)


READERS = {
    "direct attribution": lambda model: avl.direct_attribution(model, small_inputs((0,)), metric=METRIC),
    "neurons": lambda model: avl.direct_attribution(model, small_inputs((0,)), metric=METRIC, by="neuron"),
    "path patching": lambda model: path_patch(model, pair(), sender=(0, 1), receiver="logits", metric=METRIC),
    "edges": lambda model: edge_attribution(model, pair(), metric=METRIC),
    "results of heads": lambda model: model.run_with_cache(small_inputs((0,)), ["blocks.1.attn.hook_result"]),
    "an edit of one": lambda model: model.trace(small_inputs((0,))).replay([Plan(zero(Site("result", 1, 0)))]),
    "an isolation": lambda model: ModelEngine(model),
    "value-weighted attention": lambda model: avl.attention_flow(model, small_inputs((0,)), weight="value"),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_numbers_is_refused_with_the_mend(reader):
    with pytest.raises(ModelError) as error:
        READERS[reader](packed_model())
    text = str(error.value)
    assert text.startswith("the weights of this model are packed (")
    assert "Hooks, caches, patching, replays and generation work." in text
    assert 'avl.load(name, dtype="bfloat16", device_map="auto") spreads it over all GPUs, memory and disk.' in text


@pytest.mark.parametrize("weights", ["W_O", "W_in", "OV"])
def test_weights_of_all_layers_are_refused(weights):
    with pytest.raises(ModelError, match=rf"model\.{weights} puts weights together that are packed"):
        getattr(packed_model(), weights)


@pytest.mark.parametrize("verb", [lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.compatible()])
def test_packed_weights_are_neither_cast_nor_processed(verb):
    with pytest.raises(ModelError, match="this model is quantised, and its weights stay as and where they were loaded"):
        verb(packed_model())
    with pytest.raises(ModelError, match="this model is quantised"):
        avl.load("tiny", hf_model=pack(tiny_hf_model()), processor=tiny_processor(), dtype="float16")


def test_a_folder_of_such_weights_asks_for_the_library(tmp_path, monkeypatch):
    config = tiny_config().to_dict() | {"quantization_config": Packing().quantization_config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"which is not installed: pip install 'av_lens\[quantised\]'"):
        avl.load(tmp_path)


@needs_library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("opened", ["handed in", "folder"])
@torch.no_grad()
def test_bitsandbytes_on_this_cpu(bits, opened, tmp_path):
    """Equal to what HuggingFace computes with it, to the bit, and restarts equal to hooked runs."""
    hf_model, x = by_library(bits, tmp_path), small_inputs((0,))
    hf_model.set_attn_implementation("eager")
    wanted = hf_model.eval()(**x.tensors).logits
    if opened == "folder":
        model = avl.load(tmp_path / str(bits), dtype="float32")
    else:
        model = avl.load("tiny", hf_model=hf_model, processor=tiny_processor())
    assert is_packed(model.hf_model)
    assert torch.equal(model(x), wanted)
    _, kept = model.run_with_cache(x)
    assert kept["z", 2].shape[-1] == 16
    trace = model.trace(x)
    plans = [Plan(zero(Site("z", 1, 2, "suffix"))), Plan(zero(Site("mlp_out", 2, positions="media")))]
    for plan, found in zip(plans, trace.replay(plans), strict=True):
        hooked = run(model, x, plan=plan).logits
        torch.testing.assert_close(found, hooked, atol=1e-5, rtol=0)
        assert float((found - trace.logits()).abs().max()) > 0.05
    assert not trace.hooked_because
    with pytest.raises(ModelError, match=r"the weights of this model are packed \((bitsandbytes|Int8Params)"):
        avl.direct_attribution(model, x, metric=METRIC)
