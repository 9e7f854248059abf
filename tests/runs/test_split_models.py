"""A model in several places: by a map, or with weights that wait in memory or on disk until they are called.

Accelerate does it for real here, on tiny checkpoints. That layers on several GPUs mix no devices is shown with fake
tensors (`test_trace_devices`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from small_av import small_clip
from tiny import letter, tiny_hf_model, tiny_processor
from tiny_families import TINY, family_model, folder

import av_lens as avl
from av_lens.core import run
from av_lens.errors import ModelError
from av_lens.families.blocks import device_of
from av_lens.families.decoder import weight_of
from av_lens.interventions import Plan, Site, cut, replace, scale, zero
from av_lens.methods import edge_attribution, path_patch
from av_lens.metrics import logit_diff

METRIC = logit_diff(letter("a"), letter("b"))
TOWERS = {"model.visual": "cpu", "model.audio_tower": "cpu", "lm_head": "disk"}
TEXT = {f"model.language_model.{name}": place for name, place in {
    "embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu", "layers.3": "disk",
    "norm": "disk", "rotary_emb": "cpu"}.items()}  # fmt: skip


def inner_names(hf_model: Any) -> dict[str, str]:
    """The map of a family's own names: each module above in its place, all others in memory."""
    names = {name for name, _ in hf_model.named_modules()}
    return {name: place for name, place in (TOWERS | TEXT).items() if name in names}


@cache
def encoded(name: str, seed: int = 0) -> Any:
    return family_model(name).encode(small_clip(seed), "What?", **next(iter(TINY[name].layouts.values())))


@pytest.fixture(scope="module", params=["qwen2_5_omni", "qwen3_omni_moe"])
def on_disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A family's model, half of it on disk."""
    name, place = request.param, tmp_path_factory.mktemp(request.param)
    spread = inner_names(TINY[name].hf_model(0))
    path = folder(name, place / "it")
    return name, avl.load(path, dtype="float32", device_map=spread, offload_folder=place / "offload")


@pytest.fixture(scope="module")
def in_memory() -> tuple[str, Any]:
    """A model whose weights all wait in memory."""
    hf_model = cpu_offload(tiny_hf_model(), torch.device("cpu"))
    return "qwen2_5_omni", avl.load("tiny", hf_model=hf_model, processor=tiny_processor())


def same_everywhere(name: str, model: Any) -> None:
    """What a model split in this way computes is what the whole one does."""
    plain, x = family_model(name), encoded(name)
    waiting = [one for one in model.hf_model.parameters() if one.device.type == "meta"]
    assert waiting
    assert model.device.type == device_of(model.unembed).type == "cpu"
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        plans = [
            Plan(zero(Site("z", 1, 2, "suffix"))),
            Plan(zero(Site("mlp_out", 1, positions="media"))),
            Plan(scale(Site("result", 1, 0, "suffix"), 2.0)),
            Plan(cut("generation", "video", layers=[1, 3])),
            Plan(replace(Site("resid_pre", 3, positions="generation"), torch.ones(1, 1, 64))),
        ]
        trace = model.trace(x)
        assert trace.hooked_because == ""
        for plan, found in zip(plans, trace.replay(plans), strict=True):
            torch.testing.assert_close(found, run(model, x, plan=plan).logits, atol=1e-5, rtol=0)
            torch.testing.assert_close(found, run(plain, x, plan=plan).logits, atol=1e-5, rtol=0)
            assert float((found - trace.logits()).abs().max()) > 1e-3
        tokens = plain.generate(x, max_new_tokens=6)
        assert torch.equal(model.generate(x, max_new_tokens=6), tokens)
        assert torch.equal(trace.generate(Plan(), max_new_tokens=6)[0].tokens, tokens)
    assert all(one.device.type == "meta" for one in waiting)
    pair = avl.Pair(clean=x, corrupt=encoded(name, 1))
    for method in (
        lambda one: path_patch(one, pair, sender=(0, 1), receiver=(3, 2, "q"), metric=METRIC),
        lambda one: path_patch(one, pair, sender=(1, 1), receiver=(3, 0, "k"), metric=METRIC, mlps="free"),
        lambda one: avl.direct_attribution(one, x, metric=METRIC),
        lambda one: edge_attribution(one, pair, metric=METRIC),
    ):
        found, wanted = method(model), method(plain)
        np.testing.assert_allclose(found.values, wanted.values, atol=1e-5, rtol=0)
    sites = [Site("z", layer, positions="suffix") for layer in range(4)]
    ours, theirs = (one.trace(x).gradients(sites, METRIC).gradient for one in (model, plain))
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_model_half_on_disk_is_the_whole_one(on_disk):
    same_everywhere(*on_disk)


def test_weights_that_wait_in_memory_are_those_of_the_whole_one(in_memory):
    same_everywhere(*in_memory)


def test_every_hook_of_such_a_model_is_on_the_road(on_disk):
    name, model = on_disk
    assert not avl.model.check_model(model, encoded(name)).failed


def test_a_weight_is_fetched_and_left_where_it_was(on_disk):
    name, model = on_disk
    for number in (0, 1):
        linear, own = (one.blocks[number].attn.o.original_component for one in (model, family_model(name)))
        assert torch.equal(weight_of(linear), own.weight)
    assert model.blocks[1].attn.o.original_component.weight.device.type == "meta"


@pytest.mark.parametrize("weights", ["W_O", "W_Q", "W_U", "QK"])
def test_weights_of_all_layers_together_are_refused(on_disk, weights):
    with pytest.raises(
        ModelError, match=rf"model\.{weights} puts weights together that are packed, .* or wait on disk"
    ):
        getattr(on_disk[1], weights)


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        (lambda model, path: model.to("cpu"), "split over several places, and its weights stay"),
        (lambda model, path: model.to(torch.bfloat16), "split over several places"),
        (lambda model, path: model.compatible(), "split over several places"),
        (lambda model, path: model.enable_compatibility_mode(), "split over several places"),
        (
            lambda model, path: model.trace(encoded("qwen2_5_omni")).save(path / "t"),
            "some of this model's wait in memory",
        ),
    ],
)
def test_what_needs_all_weights_at_hand_is_refused(in_memory, tmp_path, verb, told):
    with pytest.raises(ModelError, match=told):
        verb(in_memory[1], tmp_path)


def test_a_map_to_one_place_is_no_split(tmp_path):
    path = folder("qwen2_5_omni", tmp_path / "it")
    model = avl.load(path, dtype="float32", device_map={"": "cpu"})
    x = encoded("qwen2_5_omni")
    assert torch.equal(model(x), family_model("qwen2_5_omni")(x))
    assert model.provenance["device"] == "{'': 'cpu'}"
    assert model.W_O.shape == (4, 4, 16, 64)


def test_the_precision_of_a_map_is_the_checkpoints(tmp_path):
    hf_model = tiny_hf_model(dtype=torch.bfloat16)
    hf_model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert avl.load(tmp_path).dtype == torch.float32  # on a CPU, where it fits
    assert avl.load(tmp_path, device_map={"": "cpu"}).dtype == torch.bfloat16


def test_a_layer_in_two_places_is_refused():
    hf_model = tiny_hf_model()
    hf_model.model.language_model.layers[1].mlp.to("meta")
    with pytest.raises(ModelError, match=r"layer 1 is spread over cpu and meta, .* Name whole layers in device_map="):
        avl.load(hf_model=hf_model, processor=tiny_processor())


def test_weights_that_are_nowhere_are_refused():
    hf_model = tiny_hf_model(n_layers=1)
    hf_model.lm_head.to("meta")
    with pytest.raises(ModelError, match=r"no weights at lm_head \(1 places\): they are mere shapes"):
        avl.load(hf_model=hf_model, processor=tiny_processor())


@pytest.mark.parametrize(
    "options",
    [{"max_memory": {"cpu": "1GiB"}}, {"device_map": "auto", "device": "cpu"}, {"offload_folder": "x"}],
)
def test_what_does_not_go_with_a_map_is_refused(options):
    with pytest.raises(ModelError, match=r"device_map= says where each part .* Give device_map= with a name"):
        avl.load("av-tiny", **options)


def test_a_difference_lies_in_one_place():
    with pytest.raises(ModelError, match=r"is a difference over .* Leave device_map= out"):
        avl.load("av-tiny-planted-gates", device_map="auto")
