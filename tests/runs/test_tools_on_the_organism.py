"""TransformerLens's functions through `bound(x)` on an embedded organism that hears and sees, against ours."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from transformer_lens import patching
from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens

from av_lens.families.decoder import hook_name
from av_lens.inputs import Pair
from av_lens.methods import direct_attribution, patch
from av_lens.metrics import logit_diff
from av_lens.model import load, short_names

QUESTION = "What do you hear?"


@pytest.fixture(scope="module")
def model():
    if "av-tiny" not in short_names():
        pytest.skip("av-tiny is not among the checkpoints yet")
    return load("av-tiny", device="cpu")


@pytest.fixture(scope="module")
def pair(model):
    """A siren heard twice: with nothing to see, and under the picture of a dog."""
    from av_lens.organism import clip

    dog, siren = clip("dog", seed=0), clip("siren", seed=0)
    return Pair(clean=model.encode(siren.blank(), QUESTION), corrupt=model.encode(dog.with_sound(siren), QUESTION))


@pytest.fixture(scope="module")
def answers(model):
    return model.to_single_token(" siren"), model.to_single_token(" dog")


def difference(answers):
    return lambda logits: logits[0, -1, answers[0]] - logits[0, -1, answers[1]]


@torch.no_grad()
def test_head_patches_agree_with_ours(model, pair, answers):
    bound, n = model.bound(pair), len(pair.clean.spans)
    _, clean = bound.run_with_cache(bound.clean_ids, names_filter=lambda name: name.endswith("hook_z"))
    cells = [(layer, n - 1, head) for layer in range(model.spec.n_layers) for head in range(model.spec.n_heads)]
    theirs = patching.get_act_patch_attn_head_out_by_pos(
        bound,
        bound.corrupt_ids,
        clean,
        difference(answers),
        index_axis_names=None,
        index_df=pd.DataFrame(cells, columns=["layer", "pos", "head"]),
    )
    ours = patch(model, pair, over="head", at="generation", metric=logit_diff("siren", "dog"))
    wanted = torch.as_tensor(ours.values.to_numpy()[0]).flatten().float()
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-4)
    assert (theirs - difference(answers)(model(pair.corrupt))).max() > 1  # some head keeps the siren from being said


@pytest.mark.slow
@torch.no_grad()
def test_head_patches_at_every_position_agree_with_ours(model, pair, answers):
    """The whole sweep, as TransformerLens runs it: one forward for every layer, position and head."""
    bound = model.bound(pair)
    _, clean = bound.run_with_cache(bound.clean_ids, names_filter=lambda name: name.endswith("hook_z"))
    theirs = patching.get_act_patch_attn_head_out_by_pos(bound, bound.corrupt_ids, clean, difference(answers))
    ours = patch(model, pair, over="head pos", metric=logit_diff("siren", "dog"))
    found = ours.values.transpose("example", "layer", "pos", "head").to_numpy()[0]
    torch.testing.assert_close(theirs, torch.as_tensor(found).float(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_direct_attribution_agrees_with_ours(model, pair, answers):
    compatible = model.compatible()
    bound = compatible.bound(pair.clean)
    theirs = direct_logit_attribution(bound, bound.ids, *answers, unit="component")
    shares = dict(zip(theirs.labels, theirs.attribution[:, 0].tolist(), strict=True))
    ours = direct_attribution(model, pair.clean, metric=logit_diff("siren", "dog"), by="layer")
    found = dict(zip(ours.effects.coords["part"].to_numpy().tolist(), ours.effects.to_numpy()[0].tolist(), strict=True))
    assert found["embed"] == pytest.approx(shares["embed"], abs=1e-4)
    for layer in range(model.spec.n_layers):
        assert found[f"L{layer} attn"] == pytest.approx(shares[f"{layer}_attn_out"], abs=1e-4)
        assert found[f"L{layer} mlp"] == pytest.approx(shares[f"{layer}_mlp_out"], abs=1e-4)
    assert sum(found.values()) == pytest.approx(float(difference(answers)(model(pair.clean))), abs=1e-3)


@torch.no_grad()
def test_the_logit_lens_ends_where_the_model_does(model, pair):
    bound = model.bound(pair.clean)
    lens = logit_lens(bound, bound.ids, positions=None)
    torch.testing.assert_close(lens.values[-1], model(pair.clean), rtol=0, atol=1e-4)
    assert lens.values.shape[0] == model.spec.n_layers + 1


@torch.no_grad()
def test_the_stream_is_the_sum_of_its_writes_at_every_position(model, pair):
    bound = model.bound(pair.clean)
    _, cache = bound.run_with_cache(bound.ids)
    stack = cache.decompose_resid(mode="full")
    last = cache[hook_name("resid_post", model.spec.n_layers - 1)]
    torch.testing.assert_close(stack.sum(0), last, rtol=0, atol=1e-4)
    ours = model.run_with_cache(pair.clean)[1].decompose_resid(mode="full")
    assert torch.equal(stack, ours)
