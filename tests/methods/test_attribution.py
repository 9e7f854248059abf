"""Direct attribution: shares sum to the logit difference, and TransformerLens's own figures agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_av import small_inputs, small_model
from tiny import letter

from av_lens.core import run
from av_lens.errors import InputError
from av_lens.interventions import Plan, Site, add, zero
from av_lens.methods import direct_attribution
from av_lens.metrics import each, log_prob, logit_diff

METRIC = logit_diff(letter("a"), letter("b"))


@pytest.mark.parametrize("by", ["head", "layer", "component", "head span", "neuron"])
def test_shares_sum_to_the_logit_difference(by):
    grid = direct_attribution(small_model(), small_inputs(), metric=METRIC, by=by)
    assert float(abs(grid.closure_error).max()) < 1e-4
    assert float(abs(grid.effects).max()) > 0.01
    logits = small_model()(small_inputs())[:, -1].detach()
    a, b = (small_model().tokenizer(word)["input_ids"][0] for word in "ab")
    np.testing.assert_allclose(grid.baseline.values, (logits[:, a] - logits[:, b]).numpy(), atol=1e-5)


def test_heads_and_layers_are_the_same_sum():
    heads, layers = (
        direct_attribution(small_model(), small_inputs(), metric=METRIC, by=by) for by in ("head", "layer")
    )
    for layer in range(4):
        parts = [name for name in heads.values.coords["part"].values.tolist() if name.startswith(f"L{layer}H")]
        assert len(parts) == 4
        whole = heads.effects.sel(part=[*parts, f"L{layer} attn bias"]).sum("part")
        np.testing.assert_allclose(whole.values, layers.effects.sel(part=f"L{layer} attn").values, atol=1e-5)


def test_what_a_head_moved_from_each_role_sums_to_the_head():
    model, x = small_model(), small_inputs(sound="separate")
    heads = direct_attribution(model, x, metric=METRIC, by="head")
    split = direct_attribution(model, x, metric=METRIC, by="head span")
    named = [name for name in heads.values.coords["part"].values.tolist() if "H" in name]
    found = split.effects.sel(part=named)
    np.testing.assert_allclose(found.sum("source").values, heads.effects.sel(part=named).values, atol=1e-6)
    assert {"audio", "video", "question", "generation"} <= set(found.coords["source"].values.tolist())
    assert bool(found.sel(source="no source").isnull().all())
    # By hand: without the audio positions' values, a head writes its share less what it moved from the audio.
    cut_off = Plan(zero(Site("v", 3, 1, "audio")))
    with torch.no_grad():
        z = run(model, x, plan=cut_off, capture=[Site("z", 3, head=3, positions="generation")]).cache["z", 3][:, 0, 0]
        kept = run(model, x, capture=[Site("z", 3, head=3, positions="generation")]).cache["z", 3][:, 0, 0]
        scale = run(model, x, capture=[Site("final_scale", positions="generation")]).cache["ln_final.hook_scale"][:, 0]
    a, b = (model.tokenizer(word)["input_ids"][0] for word in "ab")
    read = (model.W_U[:, a] - model.W_U[:, b]) * model.ln_final.original_component.weight / scale
    by_hand = (((kept - z) @ model.W_O[3, 3]) * read).sum(-1).detach().numpy()
    np.testing.assert_allclose(found.sel(part="L3H3", source="audio").values, by_hand, atol=1e-5)


def test_inputs_of_several_layouts_keep_their_order_and_answers():
    model = small_model()
    inputs = [small_inputs(), small_inputs((2,), sound="separate")]
    metric = logit_diff(each([letter("a"), letter("c"), letter("b")]), each([letter("b"), letter("a"), letter("c")]))
    together = direct_attribution(model, inputs, metric=metric, by="head span", stack=1)
    bound = metric.bind()
    alone = direct_attribution(model, inputs[1], metric=bound.chosen([2]), by="head span")
    np.testing.assert_allclose(together.effects[2].values, alone.effects[0].values, atol=1e-6)
    assert float(abs(together.closure_error).max()) < 1e-4


def test_the_units_of_an_mlp_sum_to_it():
    layers, units = (
        direct_attribution(small_model(), small_inputs(), metric=METRIC, by=by) for by in ("layer", "neuron")
    )
    names = [name for name in units.values.coords["part"].values.tolist() if name.startswith("L2N")]
    assert len(names) == small_model().spec.d_mlp
    np.testing.assert_allclose(
        units.effects.sel(part=names).sum("part").values, layers.effects.sel(part="L2 mlp").values, atol=1e-6
    )


def test_a_share_is_what_taking_the_write_away_takes_at_a_frozen_norm():
    """Add a head's write once more to the last stream: with the scale frozen, the difference grows by its share."""
    model, x = small_model(), small_inputs()
    grid = direct_attribution(model, x, metric=METRIC, by="head")
    with torch.no_grad():
        z = run(model, x, capture=[Site("z", 2, head=1, positions="generation")]).cache["z", 2][:, :, 0]
        scale = run(model, x, capture=[Site("final_scale", positions="generation")]).cache["ln_final.hook_scale"]
    write = z @ model.W_O[2, 1].detach()
    more = add(Site("final", positions="generation"), write / scale)
    with torch.no_grad():
        after = METRIC.bind()(run(model, x, plan=Plan(more)).logits)
    np.testing.assert_allclose(after.numpy() - grid.baseline.values, grid.effects.sel(part="L2H1").values, atol=1e-4)


def test_transformer_lens_attribution_through_bound_agrees():
    from transformer_lens.tools.analysis import direct_logit_attribution

    model, x = small_model().compatible(), small_inputs((0,))
    a, b = (model.tokenizer(word)["input_ids"][0] for word in "ab")
    bridge = model.bound(x)
    theirs = direct_logit_attribution(bridge, bridge.ids, answer_tokens=a, incorrect_tokens=b, unit="head")
    grid = direct_attribution(model, x, metric=logit_diff(a, b), by="head")
    assert float(abs(grid.closure_error).max()) < 1e-4
    for layer, head in ((0, 1), (2, 3), (3, 0)):
        share = float(theirs.attribution[theirs.labels.index(f"L{layer}H{head}")].detach())
        np.testing.assert_allclose(share, float(grid.effects[0].sel(part=f"L{layer}H{head}")), atol=1e-4)


def test_every_example_is_attributed_to_its_own_answers():
    grid = direct_attribution(
        small_model(), small_inputs(), metric=logit_diff(each([letter("a"), letter("c")]), letter("b"))
    )
    for i, word in enumerate("ac"):
        alone = direct_attribution(small_model(), small_inputs(), metric=logit_diff(letter(word), letter("b")))
        np.testing.assert_allclose(grid.effects[i].values, alone.effects[i].values, atol=1e-6)


def test_metrics_that_are_not_linear_are_refused():
    with pytest.raises(InputError, match=r"is not linear in the logits"):
        direct_attribution(small_model(), small_inputs(), metric=log_prob(letter("a")))
    with pytest.raises(InputError, match=r"without synonyms"):
        direct_attribution(small_model(), small_inputs(), metric=logit_diff([5, 6], [7, 8]))
    with pytest.raises(InputError, match=r"unknown way of sharing 'heads'. Did you mean 'head'"):
        direct_attribution(small_model(), small_inputs(), metric=METRIC, by="heads")
