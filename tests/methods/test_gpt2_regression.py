"""A regression that everyone who comes from GPT-2 can check: TransformerLens's numbers, from our text path.

"GPT-2-shaped" means two things here.

1. A random thinker of GPT-2's shape, as text alone: twelve heads in every layer with keys and values of their own (no
   groups), no media in the prompt, an indirect-object prompt and its counterpart with the names exchanged.
   TransformerLens's own head patching, direct path patching into Q, K and V, and direct logit attribution run on it
   through `bound(...)`; ours run on the same inputs and must give the same numbers. TransformerLens refuses K and V
   paths where keys are grouped; without groups its numbers are defined, and ours are held to them.
2. A real, randomly initialised GPT-2 (`GPT2LMHeadModel` in TransformerLens's bridge) under the parts of ours that know
   no family: plans as hooks, cuts, metrics.

What cannot be: `model.trace`, `patch`, `path_patch` and `direct_attribution` on GPT-2 itself. Restarting a layer needs
rotary positions, a gated MLP and a pre-norm without bias, and our models are thinkers; GPT-2 has learned positions,
LayerNorms with biases and a plain MLP. Nor are these GPT-2's weights: nothing is downloaded, the shape is.
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import letter, tiny_hf_model, tiny_processor, untouched
from transformer_lens import patching
from transformer_lens.tools.analysis import direct_logit_attribution

import av_lens as avl
from av_lens.core.budget import ModelSpec
from av_lens.interventions import Plan, Site, cut, replace
from av_lens.metrics import logit_diff, measure
from av_lens.spans import SpanMap

N_LAYERS, N_HEADS, D_MODEL = 3, 12, 96
CLEAN, CORRUPT = "Ann and Bob met. Bob gave Ann", "Bob and Ann met. Ann gave Bob"
METRIC = logit_diff(letter("A"), letter("B"))


@cache
def thinker():
    """The wrapped model, a copy that nothing has touched, and the pair of prompts."""
    hf_model = tiny_hf_model(n_layers=N_LAYERS, d_model=D_MODEL, n_heads=N_HEADS, n_kv_heads=N_HEADS)
    plain = untouched(hf_model)
    model = avl.load("tiny", hf_model=hf_model, processor=tiny_processor())
    pair = avl.Pair(
        clean=model.encode(None, CLEAN, system="Say who."), corrupt=model.encode(None, CORRUPT, system="Say who.")
    )
    return model, plain, pair


def difference(logits):
    model = thinker()[0]
    a, b = (model.tokenizer(word)["input_ids"][0] for word in "AB")
    return logits[0, -1, a] - logits[0, -1, b]


@cache
def through_bound():
    """What TransformerLens's tools take: a bridge, the ids of both prompts, and both caches."""
    model, _, pair = thinker()
    bridge = model.bound(pair)
    ids = bridge.clean_ids, bridge.corrupt_ids
    with torch.no_grad():
        caches = [bridge.run_with_cache(one)[1] for one in ids]
    return bridge, ids, caches


def test_head_patching_at_all_positions():
    model, _, pair = thinker()
    bridge, (_, corrupt), (clean, _) = through_bound()
    theirs = patching.get_act_patch_attn_head_out_all_pos(bridge, corrupt, clean, difference)
    ours = avl.patch(model, pair, over="head", at=pair.clean.spans.all, metric=METRIC)
    np.testing.assert_allclose(ours.values[0], theirs.detach(), atol=1e-5)
    assert float(np.abs(ours.effects).max()) > 1e-2


def test_head_patching_position_by_position():
    model, _, pair = thinker()
    bridge, (_, corrupt), (clean, _) = through_bound()
    asked = pair.clean.spans.generation_position
    rows = pd.DataFrame(
        [(layer, pos, head) for layer in range(N_LAYERS) for pos in (asked, asked - 12) for head in (0, 7, 11)],
        columns=["layer", "pos", "head"],
    )
    theirs = patching.generic_activation_patch(
        bridge,
        corrupt,
        clean,
        difference,
        patch_setter=patching.layer_pos_head_vector_patch_setter,
        activation_name="z",
        index_df=rows,
    )
    ours = avl.patch(model, pair, over="head pos", metric=METRIC).values[0]
    wanted = [float(ours.sel(layer=layer, pos=pos, head=head)) for layer, pos, head in rows.itertuples(index=False)]
    np.testing.assert_allclose(theirs.detach().numpy(), wanted, atol=1e-5)
    assert np.ptp(wanted) > 1e-4


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_path_patching(component):
    model, _, pair = thinker()
    bridge, (_, corrupt), (clean, base) = through_bound()
    layer, head = 0, 5
    with torch.no_grad():
        theirs = patching.get_act_patch_direct_path(
            bridge, corrupt, clean, base, difference, layer, head, component=component, verbose=False
        )
    ours = avl.path_patch(model, pair, sender=(layer, head), receiver=f"heads.{component}", metric=METRIC)
    found = ours.values[0, 0].values.reshape(N_LAYERS, N_HEADS)
    np.testing.assert_allclose(found[1:], theirs[1:], atol=1e-5)
    assert np.abs(found[1:] - float(ours.baseline[0])).max() > 1e-4
    assert np.isnan(found[0]).all()  # where TransformerLens writes 0.0 for what it did not measure


def test_direct_logit_attribution_of_every_head():
    model = thinker()[0].compatible()
    x = thinker()[2].clean
    bridge = model.bound(x)
    a, b = (model.tokenizer(word)["input_ids"][0] for word in "AB")
    theirs = direct_logit_attribution(bridge, bridge.ids, answer_tokens=a, incorrect_tokens=b, unit="head")
    ours = avl.direct_attribution(model, x, metric=logit_diff(a, b), by="head")
    names = [f"L{layer}H{head}" for layer in range(N_LAYERS) for head in range(N_HEADS)]
    wanted = [float(theirs.attribution[theirs.labels.index(name)].detach()) for name in names]
    np.testing.assert_allclose(ours.effects[0].sel(part=names), wanted, atol=1e-5)
    assert float(np.abs(ours.closure_error).max()) < 1e-4


def masked_by_hand(n, queries, keys):
    """The additive mask of a causal model without some edges."""
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    allowed[torch.tensor(queries)[:, None], torch.tensor(keys)[None]] = False
    return torch.zeros(1, 1, n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)


def test_the_knockout_is_a_hand_masked_forward():
    model, plain, pair = thinker()
    x = pair.clean
    n, asked = len(x.spans), x.spans.generation_position
    question = x.spans.question.positions.tolist()
    text = plain.model.language_model
    with torch.no_grad():
        hidden = text(
            inputs_embeds=text.embed_tokens(x.ids),
            attention_mask=masked_by_hand(n, [asked], question),
            position_ids=x.position_ids,
        )[0]
        wanted = plain.lm_head(hidden)[:, -1]
    a, b = (model.tokenizer(word)["input_ids"][0] for word in "AB")
    by_hand = float(wanted[0, a] - wanted[0, b])
    ours = measure(model, x, METRIC, plan=Plan(cut("generation", "question")))
    np.testing.assert_allclose(ours, [by_hand], atol=1e-5)
    grid = avl.knockout(model, x, edges="question -> generation", metric=METRIC, controls=False)
    np.testing.assert_allclose(np.ravel(grid.values), [by_hand], atol=1e-5)
    assert abs(by_hand - float(grid.baseline[0])) > 1e-3


# A real GPT-2


@cache
def gpt2():
    """A random GPT-2 in TransformerLens's bridge, an untouched copy, ids, and what plans compile against."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=N_LAYERS, n_head=N_HEADS, n_embd=D_MODEL, vocab_size=270, n_positions=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model = GPT2LMHeadModel(config).eval()
        for parameter in hf_model.parameters():
            parameter.data.mul_(3.0)  # GPT-2 starts so small that heads hardly speak
    plain = copy.deepcopy(hf_model)
    plain.set_attn_implementation("eager")
    bridge = build_bridge_from_module(hf_model, "GPT2LMHeadModel", hf_config=hf_model.config, model_name="gpt2-like")
    ids = [torch.tensor([list(text.encode())]) for text in (CLEAN, CORRUPT)]
    n = ids[0].shape[1]
    spans = SpanMap.of_roles(["system"] * 10 + ["question"] * (n - 12) + ["header", "generation"])
    spec = ModelSpec(N_LAYERS, N_HEADS, N_HEADS, D_MODEL, D_MODEL // N_HEADS, 4 * D_MODEL, 270)
    return bridge, plain, ids, spans, spec


def read(logits):
    return logit_diff(ord("A"), ord("B"))(logits)


def under(plan):
    """GPT-2's corrupt run under one of our plans."""
    bridge, _, (_, corrupt), spans, spec = gpt2()
    compiled = plan.compile(spec, spans, batch=1)
    with torch.no_grad():
        logits = bridge.run_with_hooks(corrupt, fwd_hooks=compiled.fwd_hooks)
    compiled.verify()
    return logits


def test_our_plans_patch_gpt2_as_transformer_lens_does():
    bridge, _, (clean, corrupt), spans, _ = gpt2()
    with torch.no_grad():
        cache = bridge.run_with_cache(clean)[1]
    asked = spans.generation_position
    rows = pd.DataFrame(
        [(layer, asked, h) for layer in range(N_LAYERS) for h in (0, 5, 11)], columns=["layer", "pos", "head"]
    )
    theirs = patching.generic_activation_patch(
        bridge,
        corrupt,
        cache,
        lambda logits: read(logits)[0],
        patch_setter=patching.layer_pos_head_vector_patch_setter,
        activation_name="z",
        index_df=rows,
    )
    ours = [
        float(read(under(Plan(replace(Site("z", layer, head, "generation"), cache["z", layer][:, [pos], head]))))[0])
        for layer, pos, head in rows.itertuples(index=False)
    ]
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5)
    assert np.ptp(ours) > 1e-4


@pytest.mark.parametrize("layers", [None, [1]])
def test_our_cuts_on_gpt2_are_a_hand_masked_forward(layers):
    _, plain, (_, corrupt), spans, _ = gpt2()
    mask = masked_by_hand(len(spans), [spans.generation_position], spans.question.positions.tolist())
    kept = masked_by_hand(len(spans), [0], [len(spans) - 1])  # that edge is not there anyway: plainly causal
    hooks = []
    for layer, block in enumerate(plain.transformer.h):
        chosen = mask if layers is None or layer in layers else kept

        def swap(module, args, kwargs, chosen=chosen):
            return args, kwargs | {"attention_mask": chosen}

        hooks.append(block.attn.register_forward_pre_hook(swap, with_kwargs=True))
    with torch.no_grad():
        wanted = plain(corrupt).logits
        for hook in hooks:
            hook.remove()
        free = plain(corrupt).logits
    found = under(Plan(cut("generation", "question", layers=layers)))
    torch.testing.assert_close(found[:, -1], wanted[:, -1], atol=1e-5, rtol=0)
    assert (wanted - free)[:, -1].abs().max() > 1e-3
