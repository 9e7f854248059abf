"""Norms of queries and keys, told to the layer alone: replay, path patching and edge scores are the brute force."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from brute_edges import naive
from brute_paths import Brute, ends, of
from normed_family import N_LAYERS, load_normed, normed_hf_model, normed_model, normed_twin
from tiny import letter, tiny_clip, untouched

import av_lens as avl
from av_lens.core import run
from av_lens.errors import ModelError
from av_lens.families.decoder import Layer, hook_name
from av_lens.interventions import Plan, Site, add, cut, zero
from av_lens.interventions import replace as put
from av_lens.interventions.edges import senders
from av_lens.methods import attribution_patch, edge_attribution, path_patch
from av_lens.metrics import logit_diff

METRIC = logit_diff(letter("a"), letter("b"))
# In float32 two ways to run all layers differ by up to 6e-6 by rounding alone.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}
EACH = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
PATHS = [
    ((0, 1), (1, 2, "q")),
    ((0, 3), (2, 1, "q")),
    ((1, 2), (2, 3, "q")),
    ((0, "mlp"), (2, 0, "q")),
    ((0, 0), (1, 3, "k")),
    ((0, 2), (2, 0, "k")),
    ((1, 1), (2, 2, "v")),
    ((0, 1), "L1KV0.k"),
    ((0, 1), [(1, 0, "q"), (1, 1, "k"), (2, 3, "q")]),
]


@cache
def pair(dtype=torch.float32):
    model = normed_model(dtype)
    encoded = [
        avl.AVInputs.stack([model.encode(tiny_clip(1.0, seed=seed), "What?") for seed in seeds])
        for seeds in ((0, 1), (2, 3))
    ]
    return avl.Pair(clean=encoded[0], corrupt=encoded[1])


def test_the_hooked_run_is_huggingfaces_to_the_bit_and_the_norms_stand_after_the_hooks():
    source = normed_hf_model()
    plain = untouched(source)
    model = load_normed(source)
    x = model.encode(tiny_clip(1.0), "What?")
    with torch.no_grad():
        assert torch.equal(model(x), plain(**x.tensors).logits)
    names = [f"blocks.1.attn.{name}" for name in ("hook_q", "hook_q_normed", "hook_rot_q")]
    _, cache_ = model.run_with_cache(x, names)
    q, normed, turned = (cache_[name] for name in names)
    own = model.bridge.blocks[1].attn.q_norm.original_component
    torch.testing.assert_close(own(q).transpose(1, 2), normed, atol=0, rtol=0)
    torch.testing.assert_close(normed.norm(dim=-1), turned.norm(dim=-1).transpose(1, 2))


@EACH
def test_replay_is_the_hooked_run_for_edits_before_and_after_the_norms(dtype):
    trace = normed_model(dtype).trace(pair(dtype).clean)
    assert trace.hooked_because == ""
    suffix = trace.spans.suffix.positions.tolist()
    plans = [
        Plan(add(Site("q", 1, (0, 2), suffix), torch.linspace(-2.0, 2.0, 8))),
        Plan(add(Site("k", 1, 1, suffix[:2]), torch.ones(8))),
        Plan(zero(Site("rot_q", 2, 3, suffix))),
        Plan([add(Site("resid_pre", 1, positions=suffix[:1]), torch.ones(32)), cut("generation", "audio")]),
        Plan(zero(Site("z", 0, 2, "audio"))),
    ]
    for plan, logits in zip(plans, trace.replay(plans, logits_at="all"), strict=True):
        whole = run(trace.model, trace.x, plan=plan, logits_at="all").logits.detach()
        torch.testing.assert_close(logits, whole, atol=TOLERANCE[dtype], rtol=0)
        assert float((whole - trace.logits("all")).abs().max()) > 1e-3


def test_answers_go_on_from_a_recorded_prompt_as_generation_does():
    model, x = normed_model(), pair().clean[:1]
    plan = Plan(zero(Site("z", 0, 2, "suffix")))
    found = model.trace(x).generate([Plan(), plan], max_new_tokens=4)
    for one, edits in zip(found, (None, plan), strict=True):
        wanted = model.generate(x, max_new_tokens=4, plan=edits, return_type="result")
        assert torch.equal(one.tokens, wanted.tokens)


@EACH
@pytest.mark.parametrize("mlps", ["frozen", "free"])
@pytest.mark.parametrize(("sender", "receiver"), PATHS)
def test_path_patching_is_the_brute_force(sender, receiver, mlps, dtype):
    model, one = normed_model(dtype), pair(dtype)
    spec = model.spec
    grid = path_patch(model, one, sender=sender, receiver=receiver, metric=METRIC, mlps=mlps)
    brute = Brute(normed_twin(dtype), one.corrupt, one.clean, spec.n_heads // spec.n_kv_heads, mlps=mlps)
    sending = next(iter(senders(sender, spec, one.clean.spans.roles).values()))
    wanted = of(METRIC, model, brute.value(sending, ends(receiver, spec)))
    np.testing.assert_allclose(grid.values.values.reshape(2), wanted, atol=TOLERANCE[dtype], rtol=0)
    assert float(np.abs(grid.effects.values).max()) > 1e-5


@EACH
def test_edges_are_the_gradients_of_the_definition(dtype):
    found = edge_attribution(normed_model(dtype), pair(dtype), metric=METRIC)
    wanted = naive(normed_twin(dtype), pair(dtype).corrupt, pair(dtype).clean, METRIC)
    for (sender, receiver), score in wanted.items():
        got = found.values.sel(sender=sender, receiver=receiver).values
        np.testing.assert_allclose(got, score.numpy(), atol=TOLERANCE[dtype], rtol=0, err_msg=f"{sender} to {receiver}")


def test_the_softmax_of_a_donors_queries_and_keys_is_recomputed_behind_the_norms():
    """In the last layer z reaches the answer by its own layer's write alone: the fix is exact up to the norms after."""
    model, last = normed_model(), N_LAYERS - 1
    for component in ("q", "k"):
        found = attribution_patch(model, pair(), component=component, metric=METRIC, at="suffix", fix=True)
        trace = model.trace(pair().corrupt)
        donor = run(model, pair().clean, capture=[Site(component, last)]).cache[hook_name(component, last)]
        z = hook_name("z", last)
        base = run(model, trace.x, capture=["z"]).cache[z]
        slope = trace.gradients(Site("z", last), METRIC).gradient[0]
        suffix = trace.spans.suffix.positions.tolist()
        for head in range(model.spec.n_heads if component == "q" else model.spec.n_kv_heads):
            edit = put(Site(component, last, head, suffix), donor[:, suffix, head])
            new = run(model, trace.x, plan=Plan(edit), capture=["z"]).cache[z]
            wanted = ((new - base) * slope).sum((1, 2, 3)).detach()
            got = found.effects.sel(layer=last, head=head, figure="atp_fixed").values
            np.testing.assert_allclose(got, wanted.numpy(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kept", [(), ("q",), ("k",)])
def test_a_layer_that_forgets_a_norm_is_refused_and_run_hooked(monkeypatch, kept):
    of_block = Layer.of

    def without(cls, block):
        layer = of_block(block)
        return replace(layer, norms={kind: norm for kind, norm in layer.norms.items() if kind in kept})

    monkeypatch.setattr(Layer, "of", classmethod(without))
    trace = load_normed(normed_hf_model()).trace(pair().clean)
    assert "a layout unknown" in trace.hooked_because
    with pytest.raises(ModelError, match="computes layers by themselves, and cannot here"):
        path_patch(trace.model, pair(), sender=(0, 1), receiver=(1, 2, "q"), metric=METRIC)


def test_what_only_re_readings_would_do_wrong_is_refused_too(monkeypatch):
    """A head's own projection is used by nobody but re-readings: the restart reproduces the run all the same."""

    def biasless(self, kind, index, normed):
        weight = getattr(self, kind).weight[index * self.d_head : (index + 1) * self.d_head]
        return normed @ weight.T

    monkeypatch.setattr(Layer, "head", biasless)
    trace = load_normed(normed_hf_model()).trace(pair().clean)
    assert "layer 0's keys, head by head, computed anew, are not those of the recorded run" in trace.hooked_because
