"""In lower precision an edit that changes nothing is null to the bit: base and edits are computed alike.

Whole forwards and restarts make the same operations in the same order there, so that replays are equal to hooked runs
too. A product's rounding may depend on how many rows are multiplied together; on CPUs it does not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from small_av import small_inputs
from tiny import tiny_hf_model, tiny_processor

import av_lens as avl
from av_lens.core import run
from av_lens.interventions import Plan, Site, cut, replace, scale, zero
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.metrics import logit_diff
from av_lens.replay import sweep

COARSE = (torch.bfloat16, torch.float16)
WHERE = ("suffix", "generation", "audio")
COMPONENTS = ("resid_pre", "q", "k", "v", "rot_k", "scores", "pattern", "z", "result", "attn_out", "resid_mid")
IN_MLP = ("mlp_in", "mlp_pre", "mlp_post", "mlp_out", "resid_post", "ln1")  # the last runs as a full hooked forward


@cache
def coarse_model(dtype: torch.dtype) -> Any:
    return avl.load("tiny", hf_model=tiny_hf_model(dtype=dtype), processor=tiny_processor())


@pytest.mark.parametrize("dtype", [COARSE[0], pytest.param(COARSE[1], marks=pytest.mark.slow)])
def test_scaling_by_one_changes_no_bit(dtype):
    model, x = coarse_model(dtype), small_inputs((0,))
    trace = model.trace(x)
    assert trace.hooked_because == ""
    plans = [
        Plan(scale(Site(component, 1 + number % 2, positions=WHERE[number % 3]), 1.0))
        for number, component in enumerate((*COMPONENTS, *IN_MLP))
    ]
    with torch.no_grad():
        assert torch.equal(trace.logits("all"), model(x))
    for logits in trace.replay(plans, logits_at="suffix"):
        assert torch.equal(logits, trace.logits("suffix"))


@pytest.mark.parametrize("dtype", [COARSE[0], pytest.param(COARSE[1], marks=pytest.mark.slow)])
def test_replays_are_the_hooked_runs_to_the_bit(dtype):
    model = coarse_model(dtype)
    for seeds in ((0,), (0, 1)):
        x = small_inputs(seeds)
        trace = model.trace(x)
        plans = [
            Plan(zero(Site("z", 1, 2, "suffix"))),
            Plan(zero(Site("z", 3, 1, "generation"))),
            Plan(cut("generation", "video", layers=[1, 3])),
            Plan(scale(Site("result", 2, 0, "question"), 2.0)),
            Plan([zero(Site("mlp_out", 1, positions="audio")), zero(Site("k", 3, 0, "suffix"))]),
        ]
        for plan, found in zip(plans, trace.replay(plans), strict=True):
            whole = run(model, x, plan=plan).logits.detach()
            assert torch.equal(found, whole)
            assert not torch.equal(found, trace.logits())


def check_every_head(model: Any, x: Any, answers: tuple[str, str]) -> None:
    """Null edits of every head by the verbs that users call."""
    n_layers, n_heads = model.spec.n_layers, model.spec.n_heads
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    metric = logit_diff(*answers)
    # sweep
    trace = model.trace(x)
    plans = {f"L{layer}H{head}": Plan(scale(Site("z", layer, head, "suffix"), 1.0)) for layer, head in heads}
    grid = sweep(trace, plans, metric)
    assert not grid.effects.values.any()
    # each head's own z, as a whole forward has it
    sites = [Site("z", layer, positions="suffix") for layer in range(n_layers)]
    own = run(model, x, capture=sites).cache
    plans = {
        f"L{layer}H{head}": Plan(replace(Site("z", layer, head, "suffix"), own["z", layer][:, :, [head]].detach()))
        for layer, head in heads
    }
    grid = sweep(trace, plans, metric)
    assert not grid.effects.values.any()
    # patch, a run into itself
    found = avl.patch(model, avl.Pair(clean=x, corrupt=x), at="suffix", metric=metric)
    assert found.values.shape[1:3] == (n_layers, n_heads)
    assert not found.effects.values.any()
    # what isolate measures
    engine = ModelEngine(model)
    recording = engine.record(x, np.asarray(x.spans.suffix.positions))
    z = {head: recording.at_site("z")[head[0], :, :, head[1]] for head in heads}
    plans = [recording.plan({head: z[head]}, freeze=freeze) for freeze in (False, True) for head in heads]
    assert all(torch.equal(one.logits, recording.logits) for one in engine.changed(recording, plans))


def test_every_head_is_null_in_bfloat16():
    check_every_head(coarse_model(torch.bfloat16), small_inputs((0, 1)), ("a", "b"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_head_of_av_tiny_is_null_on_twelve_conflicts(dtype):
    model = avl.load("av-tiny", dtype=dtype)
    words = ("dog", "siren", "drum", "bird")
    pairs = [(sound, picture) for sound in words for picture in words if sound != picture]
    assert (len(pairs), model.spec.n_layers * model.spec.n_heads) == (12, 56)
    for sound, picture in pairs:
        clip = avl.organism.clip(picture, seed=0).with_sound(avl.organism.clip(sound, seed=1))
        check_every_head(model, model.encode(clip, "What do you hear?"), (sound, picture))
