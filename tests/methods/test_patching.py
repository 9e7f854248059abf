"""Patching: nothing into nothing is nothing, everything into everything is everything, and TransformerLens agrees."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from small_av import small_inputs, small_model
from tiny import letter

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError, InterventionError
from av_lens.inputs.answers import Answer
from av_lens.interventions import Plan, Site, replace, zero
from av_lens.methods import patch
from av_lens.metrics import each, logit_diff, measure
from av_lens.model import short_names

METRIC = logit_diff(letter("a"), letter("b"))


def pair(clean=(0, 1), corrupt=(2, 3)):
    return avl.Pair(clean=small_inputs(clean), corrupt=small_inputs(corrupt))


@pytest.mark.parametrize("over", ["head", "layer span"])
def test_a_run_patched_into_itself_changes_nothing(over):
    same = avl.Pair(clean=small_inputs(), corrupt=small_inputs())
    assert float(abs(patch(small_model(), same, over=over, metric=METRIC).effects).max()) < 1e-5


def test_the_whole_stream_patched_is_the_donor_and_media_alone_suffice():
    grid = patch(small_model(), pair(), over="layer", at=small_inputs().spans.all, metric=METRIC)
    np.testing.assert_allclose(grid.normalized().values, 1.0, atol=1e-4)
    np.testing.assert_allclose(grid.values.values, np.broadcast_to(grid.donor.values[:, None], (2, 4)), atol=1e-5)
    media = patch(small_model(), pair(), over="layer", at="media", metric=METRIC)
    np.testing.assert_allclose(media.normalized().sel(layer=0).values, 1.0, atol=1e-4)  # the texts are equal
    assert float(abs(media.normalized().sel(layer=3) - 1).min()) > 1e-3


def test_signs_and_baselines_of_both_directions():
    model, both = small_model(), pair()
    clean, corrupt = (measure(model, x, METRIC).numpy() for x in (both.clean, both.corrupt))
    denoise = patch(model, both, over="layer", metric=METRIC)
    noise = patch(model, both, over="layer", metric=METRIC, direction="noise")
    np.testing.assert_allclose(denoise.baseline.values, corrupt, atol=1e-5)
    np.testing.assert_allclose(denoise.donor.values, clean, atol=1e-5)
    np.testing.assert_allclose(noise.baseline.values, clean, atol=1e-5)
    np.testing.assert_allclose(noise.donor.values, corrupt, atol=1e-5)
    assert "positive: the place restores" in denoise.direction
    assert "negative: the place is needed" in noise.direction
    turned = patch(model, avl.Pair(clean=both.corrupt, corrupt=both.clean), over="layer", metric=METRIC)
    np.testing.assert_allclose(turned.values.values, noise.values.values, atol=1e-5)


def test_transformer_lens_patching_through_bound_agrees():
    from transformer_lens import patching

    model, both = small_model(), pair((0,), (2,))
    bridge = model.bound(both)
    _, clean = bridge.run_with_cache(bridge.clean_ids)
    a, b = (model.tokenizer(word)["input_ids"][0] for word in "ab")
    at = both.clean.spans.generation_position
    rows = pd.DataFrame([(layer, at, head) for layer in (0, 2, 3) for head in (0, 3)], columns=["layer", "pos", "head"])
    theirs = patching.generic_activation_patch(
        bridge,
        bridge.corrupt_ids,
        clean,
        lambda logits: logits[0, -1, a] - logits[0, -1, b],
        patch_setter=patching.layer_pos_head_vector_patch_setter,
        activation_name="z",
        index_df=rows,
    )
    ours = patch(model, both, over="head", at="generation", metric=logit_diff(a, b)).values[0]
    wanted = [float(ours.sel(layer=layer, head=head)) for layer, _, head in rows.itertuples(index=False)]
    np.testing.assert_allclose(theirs.detach().numpy(), wanted, atol=1e-5)
    assert np.ptp(wanted) > 1e-4


@pytest.mark.slow
def test_transformer_lens_sweeps_of_all_heads_and_positions_agree_on_av_tiny():
    from transformer_lens import patching

    if "av-tiny" not in short_names():
        pytest.skip("av-tiny is not shipped yet")
    model = avl.load("av-tiny")
    clips = [
        avl.organism.clip(name, seed=0).with_sound(avl.organism.clip("siren", seed=0)) for name in ("siren", "dog")
    ]
    both = avl.Pair(
        **{
            side: model.encode(clip, "What do you hear?")
            for side, clip in zip(("clean", "corrupt"), clips, strict=True)
        }
    )
    bridge = model.bound(both)
    _, clean = bridge.run_with_cache(bridge.clean_ids)
    a, b = (model.to_single_token(word) for word in ("siren", "dog"))

    def metric(logits):
        return logits[0, -1, a] - logits[0, -1, b]

    theirs = patching.get_act_patch_attn_head_out_by_pos(bridge, bridge.corrupt_ids, clean, metric)
    ours = patch(model, both, over="head pos", metric=logit_diff(a, b)).values[0].transpose("layer", "pos", "head")
    np.testing.assert_allclose(theirs.detach().numpy(), ours.values, atol=1e-5)


def test_several_pairs_of_several_layouts_keep_their_order_and_their_answers():
    model = small_model()
    separate = avl.Pair(clean=small_inputs((0,), sound="separate"), corrupt=small_inputs((1,), sound="separate"))
    pairs = [pair((0,), (2,)), separate, pair((3,), (4,))]
    metric = logit_diff(each([letter("a"), letter("c"), letter("e")]), each([letter("b"), letter("d"), letter("f")]))
    grid = patch(model, pairs, over="layer", metric=metric, stack=2)
    for i, words in enumerate([(letter("a"), letter("b")), (letter("c"), letter("d")), (letter("e"), letter("f"))]):
        alone = patch(model, pairs[i], over="layer", metric=logit_diff(*words))
        np.testing.assert_allclose(grid.values[i].values, alone.values[0].values, atol=1e-5)
        np.testing.assert_allclose(grid.donor[i].item(), alone.donor[0].item(), atol=1e-5)
    assert grid.clusters == (0, 0, 1)  # the clips of seeds 0 and 1 are shared by the first two pairs


def test_answers_of_several_tokens():
    model, both = small_model(), pair((0,), (2,))
    metric = logit_diff(Answer("dog", ((70, 71),)), Answer("cat", ((75, 76),)))
    grid = patch(model, both, over="layer", at=both.clean.spans.all, metric=metric)
    np.testing.assert_allclose(grid.donor.values, measure(model, both.clean, metric).numpy(), atol=1e-5)
    np.testing.assert_allclose(grid.normalized().sel(layer=0).values, 1.0, atol=1e-4)
    # Later the answer's own first token has read the corrupt media already: what a full forward says, not the donor.
    with torch.no_grad():
        donor = run(model, both.clean, capture=[Site("resid_pre", 2)]).cache["resid_pre", 2]
    whole = measure(model, both.corrupt, metric, plan=Plan(replace(Site("resid_pre", 2), donor)))
    np.testing.assert_allclose(grid.values.sel(layer=2).values, whole.numpy(), atol=1e-5)
    assert abs(grid.normalized().sel(layer=2).item() - 1) > 1e-3
    assert "teacher-forced" in grid.provenance["notes"][0]


def test_axes_are_labelled_and_partition_what_they_should():
    model, both = small_model(), pair((0,), (2,))
    spans = both.clean.spans
    grid = patch(model, both, over="layer span", metric=METRIC)
    assert set(grid.values.coords["span"].values.tolist()) == set(spans.roles)
    windows = patch(model, both, over="layer window:1.0s", metric=METRIC)
    assert windows.values.coords["window"].values.tolist() == [0.0, 1.0]
    assert grid.provenance["component"] == "resid_pre"
    values = patch(model, both, over="head", component="v", at="audio", metric=METRIC)
    assert values.values.sizes["head"] == 2  # values are kept for key-value heads


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"over": "haed"}, InputError, "unknown axis 'haed'. Did you mean 'head'"),
        ({"over": "layer span pos"}, InputError, "at most one of span, pos, window"),
        ({"over": "span"}, InputError, "name one of layer, head, group"),
        ({"over": "layer window:0s"}, InputError, "write a window's length in seconds"),
        ({"component": "attn_out"}, InterventionError, "attn_out has no heads to iterate"),
        ({"over": "layers:9"}, InputError, "wider than the model, which has 4 layers"),
        ({"over": "layers:x"}, InputError, "write a whole number after the colon"),
        ({"over": "group", "component": "v"}, InterventionError, "each is a group's already"),
        ({"over": "pair", "heads": [(0, 1), (7, 0)]}, InputError, r"head \(7, 0\) is out of range"),
        ({"over": "pair", "heads": [(0, 1)]}, InputError, "at least two different heads"),
        ({"over": "coalition:2 span"}, InputError, "one set of positions"),
        ({"donor": "zeros"}, InputError, "unknown donor 'zeros'. Did you mean 'zero'"),
        ({"donor": small_inputs((0,), question="What else?")}, InputError, "the donor's layout is not the pair's"),
        ({"direction": "denoize"}, InputError, "Did you mean 'denoise'"),
        ({"at": "vidoe"}, InputError, "unknown role 'vidoe'"),
        ({"metric": lambda logits: logits.mean()}, InputError, "Leave out the mean"),
    ],
)
def test_what_cannot_be_patched_is_refused(options, error, text):
    options = {"metric": METRIC} | options
    with pytest.raises(error, match=text):
        patch(small_model(), pair((0,), (2,)), **options)


def test_equal_answers_are_refused():
    with pytest.raises(InputError, match=r"the two answers are equal"):
        patch(small_model(), pair((0,), (2,)), metric=logit_diff(letter("a"), letter("a")))


def test_logits_of_the_wrong_kind_of_tensor_never_pass():
    with pytest.raises(InputError, match=r"wanted one number for each of the 1 examples"):
        patch(small_model(), pair((0,), (2,)), metric=lambda logits: torch.zeros(3))


def test_boxes_of_the_picture_cover_it_and_agree_with_a_plan_by_hand():
    model, both = small_model(), pair()
    grid = patch(model, both, over="layer box:1x2", metric=METRIC)
    spans = both.clean.spans
    labels = grid.values.coords["box"].values.tolist()
    assert labels == ["rows 0:1 cols 0:2", "rows 0:1 cols 2:3", "rows 1:2 cols 0:2", "rows 1:2 cols 2:3"]
    box = spans.video.box(slice(0, 1), slice(2, 3))
    value = run(model, both.clean, capture=[Site("resid_pre", 1, positions=box)]).cache["blocks.1.hook_resid_pre"]
    by_hand = measure(model, both.corrupt, METRIC, plan=Plan(replace(Site("resid_pre", 1, positions=box), value)))
    found = grid.values.sel(layer=1, box="rows 0:1 cols 2:3").values
    np.testing.assert_allclose(found, by_hand.numpy(), atol=1e-5)
    with pytest.raises(InputError, match=r"rows and columns in picture tokens, such as box:4x4"):
        patch(model, both, over="layer box:4", metric=METRIC)


def donor_z(x, layer, at="generation"):
    return run(small_model(), x, capture=[Site("z", layer, positions=at)]).cache["z", layer]


def by_plan(x, *edits):
    return measure(small_model(), x, METRIC, plan=Plan(edits)).numpy()


def test_sets_of_heads_agree_with_plans_by_hand():
    model, both = small_model(), pair()
    z = {layer: donor_z(both.clean, layer) for layer in range(4)}
    groups = patch(model, both, over="group", metric=METRIC)
    assert groups.values.dims == ("example", "layer", "group")
    wanted = by_plan(both.corrupt, replace(Site("z", 2, (2, 3), "generation"), z[2][:, :, 2:4]))
    np.testing.assert_allclose(groups.values.sel(layer=2, group=1).values, wanted, atol=1e-5)
    pairs = patch(model, both, over="pair", heads=[(3, 0), (1, 2), (1, 3)], metric=METRIC)
    assert pairs.values.coords["pair"].values.tolist() == ["L3H0+L1H2", "L3H0+L1H3", "L1H2+L1H3"]
    first = replace(Site("z", 1, 2, "generation"), z[1][:, :, 2])
    second = replace(Site("z", 3, 0, "generation"), z[3][:, :, 0])
    np.testing.assert_allclose(
        pairs.values.sel(pair="L3H0+L1H2").values, by_plan(both.corrupt, first, second), atol=1e-5
    )
    windows = patch(model, both, over="layers:2", component="attn_out", metric=METRIC)
    assert windows.values.coords["layers"].values.tolist() == ["0-1", "1-2", "2-3"]
    outs = [
        run(model, both.clean, capture=[Site("attn_out", layer, positions="generation")]).cache["attn_out", layer]
        for layer in (1, 2)
    ]
    edits = [
        replace(Site("attn_out", layer, positions="generation"), out) for layer, out in zip((1, 2), outs, strict=True)
    ]
    np.testing.assert_allclose(windows.values.sel(layers="1-2").values, by_plan(both.corrupt, *edits), atol=1e-5)


def test_shapley_values_of_two_heads_are_the_closed_form():
    """phi_a = ½[v(a) - v()] + ½[v(ab) - v(b)]: one order and its reverse are all orders of two heads."""
    model, both = small_model(), pair()
    heads = [(1, 2), (3, 0)]
    grid = patch(model, both, over="coalition:2", heads=heads, metric=METRIC)
    single = patch(model, both, over="head", metric=METRIC).effects
    joint = patch(model, both, over="pair", heads=heads, metric=METRIC).effects.sel(pair="L1H2+L3H0").values
    alone = [single.sel(layer=layer, head=head).values for layer, head in heads]
    for (layer, head), own, other in zip(heads, alone, alone[::-1], strict=True):
        found = grid.effects.sel(layer=layer, head=head, figure="estimate").values
        np.testing.assert_allclose(found, 0.5 * own + 0.5 * (joint - other), atol=1e-5)
    estimates = grid.effects.sel(figure="estimate")
    np.testing.assert_allclose(estimates.sum(["layer", "head"]).values, joint, atol=1e-5)
    assert int(estimates.notnull().sum()) == 2 * len(heads)


def test_shapley_values_of_all_heads_sum_to_patching_all_and_have_errors():
    model, both = small_model(), pair((0,), (2,))
    grid = patch(model, both, over="coalition:8", metric=METRIC, seed=3)
    together = by_plan(
        both.corrupt,
        *(replace(Site("z", layer, positions="generation"), donor_z(both.clean, layer)) for layer in range(4)),
    )
    total = grid.effects.sel(figure="estimate").sum(["layer", "head"]).values
    np.testing.assert_allclose(total, together - grid.baseline.values, atol=1e-4)
    errors = grid.effects.sel(figure="error").values
    assert (errors > 0).all()
    again = patch(model, both, over="coalition:8", metric=METRIC, seed=3)
    np.testing.assert_allclose(again.values.values, grid.values.values, atol=1e-6)


def test_other_donors():
    model, both = small_model(), pair()
    zeroed = patch(model, both, metric=METRIC, donor="zero")
    np.testing.assert_allclose(
        zeroed.values.sel(layer=2, head=1).values, by_plan(both.corrupt, zero(Site("z", 2, 1, "generation"))), atol=1e-5
    )
    several = small_inputs((4, 5, 6))
    averaged = patch(model, both, metric=METRIC, donor=several)
    value = donor_z(several, 2)[:, :, 1].mean(0, keepdim=True)
    wanted = by_plan(both.corrupt, replace(Site("z", 2, 1, "generation"), value))
    np.testing.assert_allclose(averaged.values.sel(layer=2, head=1).values, wanted, atol=1e-5)
    assert averaged.provenance["donor"] == "mean over 3 examples"


def test_patterns_are_patched_row_by_row():
    model, both = small_model(), pair()
    grid = patch(model, both, component="pattern", metric=METRIC)
    rows = run(model, both.clean, capture=[Site("pattern", 2, 1, "generation")]).cache["pattern", 2]
    wanted = by_plan(both.corrupt, replace(Site("pattern", 2, 1, "generation"), rows[:, 0]))
    np.testing.assert_allclose(grid.values.sel(layer=2, head=1).values, wanted, atol=1e-5)
    assert float(abs(grid.effects).max()) > 1e-4
