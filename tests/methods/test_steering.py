"""Steering: strengths interpolate the plan, pushes are full hooked forwards, random pushes are of equal size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_av import small_clip, small_inputs, small_model
from tiny import letter

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError, InterventionError
from av_lens.interventions import Plan, Site, add, replace, scale, zero
from av_lens.methods.steering import head_named, mean_difference, random_push, reweighed, steer, strengthened
from av_lens.metrics import logit_diff

METRIC = logit_diff(letter("a"), letter("b"))
PUSH = {"L1H0": 0.0, (2, 3): 3.0}


def by_hand(plan: Plan) -> np.ndarray:
    with torch.no_grad():
        return METRIC.bind()(run(small_model(), small_inputs(), plan=plan).logits).numpy()


def test_effects_are_those_of_full_forwards_at_every_strength():
    grid = steer(small_model(), small_inputs(), plan=reweighed(PUSH), metric=METRIC, n_random=1)
    assert grid.values.shape == (2, 2, 4)
    before = by_hand(Plan())
    for strength, (first, second) in {0.0: (1, 1), 0.5: (0.5, 2), 1.0: (0, 3), 2.0: (-1, 5)}.items():
        after = by_hand(Plan([scale(Site("z", 1, 0, "suffix"), first), scale(Site("z", 2, 3, "suffix"), second)]))
        found = grid.effects.sel(arm="plan", strength=strength).values
        np.testing.assert_allclose(found, after - before, atol=1e-5)
    assert abs(grid.effects.sel(arm="plan", strength=1.0)).min() > 1e-3
    np.testing.assert_allclose(grid.effects.sel(strength=0.0), 0, atol=1e-5)


def test_a_saved_push_steers_alike(tmp_path):
    path = reweighed(PUSH).save(tmp_path / "push", model=small_model())
    one, two = (
        steer(small_model(), [small_inputs((0,)), small_inputs((1,), sound="separate")], plan=push, metric=METRIC)
        for push in (path, reweighed(PUSH))
    )
    np.testing.assert_array_equal(one.values, two.values)


def test_the_mean_difference_is_the_mean_of_clean_minus_corrupt():
    model = small_model()
    pairs = [
        avl.Pair(clean=small_inputs((0,)), corrupt=model.encode(small_clip(0).muted(), "What?")),
        avl.Pair(clean=small_inputs((1,)), corrupt=model.encode(small_clip(1).muted(), "What?")),
    ]
    made = mean_difference(model, pairs, layer=2, at="audio|generation")
    where = pairs[0].clean.spans["audio|generation"].positions.tolist()
    with torch.no_grad():
        streams = [
            [run(model, x, capture="resid_pre").cache["resid_pre", 2][0, where] for x in (p.clean, p.corrupt)]
            for p in pairs
        ]
    wanted = torch.stack([(clean - corrupt).mean(0) for clean, corrupt in streams]).mean(0)
    assert wanted.norm() > 0.1
    torch.testing.assert_close(made.edits[0].value[0, 0], wanted, atol=1e-5, rtol=1e-5)
    one_head = mean_difference(model, pairs[0], layer=3, component="z", head=1)
    assert one_head.edits[0].value.shape == (1, 1, 16)
    grid = steer(model, pairs[0].corrupt, plan=one_head, metric=METRIC, strengths=(1,), n_random=1)
    assert abs(float(grid.effects.sel(arm="plan").squeeze())) > 1e-4


def test_random_pushes_are_of_equal_size_and_elsewhere():
    model = small_model()
    push = reweighed({f"L1H{h}": 0.0 for h in range(3)} | {"L3H1": 0.5})
    taken = {(1, 0), (1, 1), (1, 2), (3, 1)}
    drawn = [random_push(model, push, seed=0, draw=i) for i in range(8)]
    for plan in drawn:
        heads = [(e.site.layer, h, e.amount) for e in plan for h in e.site.heads]
        assert sorted(amount for *_, amount in heads) == [0.0, 0.0, 0.0, 0.5]
        assert len({(layer, head) for layer, head, _ in heads}) == 4
        assert not {(layer, head) for layer, head, _ in heads} & taken
        assert all(layer in (0, 1, 2) for layer, _, amount in heads if amount == 0.0)
    assert len({str([e.site for e in plan]) for plan in drawn}) > 4
    vector = add(Site("resid_pre", 2, positions="generation"), torch.arange(64.0)[None, None])
    other = random_push(model, Plan(vector), seed=0).edits[0].value
    torch.testing.assert_close(other.norm(), vector.value.norm())
    assert abs(torch.cosine_similarity(other.flatten(), vector.value.flatten(), dim=0)) < 0.5
    assert random_push(model, Plan(scale(Site("mlp_out", 1), 0.0)), seed=0) is None


def test_arms_without_a_control_are_not_measured():
    grid = steer(small_model(), small_inputs((0,)), plan=Plan(zero(Site("mlp_out", 1))), metric=METRIC, n_random=2)
    assert np.isnan(grid.values.sel(arm=["random 1", "random 2"])).all()
    assert np.isfinite(grid.values.sel(arm="plan")).all()


def test_strength_of_each_kind():
    vector = torch.ones(1, 1, 64)
    made = strengthened(Plan([add(Site("resid_pre", 0), vector), zero(Site("z", 1)), scale(Site("z", 2), 3.0)]), 0.5)
    assert (made.edits[0].value == 0.5).all()
    assert [edit.amount for edit in made.edits[1:]] == [0.5, 2.0]


def test_refusals():
    model, x = small_model(), small_inputs((0,))
    with pytest.raises(InterventionError, match="the plan is empty"):
        steer(model, x, plan=Plan(), metric=METRIC)
    with pytest.raises(InterventionError, match="edit 0 of the plan is a replace, which has no strength"):
        steer(model, x, plan=Plan(replace(Site("z", 1), torch.zeros(16))), metric=METRIC)
    with pytest.raises(InterventionError, match="layer 7 is past the end"):
        steer(model, x, plan=reweighed({"L7H0": 0.0}), metric=METRIC)
    with pytest.raises(InputError, match="steer needs strengths, finite numbers"):
        steer(model, x, plan=reweighed(PUSH), metric=METRIC, strengths=(float("nan"),))
    with pytest.raises(InputError, match=r"metric .*lambda.* is NaN or infinite on the run without a push for 1 of 1"):
        steer(model, x, plan=reweighed(PUSH), metric=lambda logits: logits[:, -1, 0] * torch.nan)
    with pytest.raises(InputError, match="names no head; write layer and head"):
        reweighed({"4.2": 0.0})
    with pytest.raises(InputError, match="at least one head"):
        reweighed({})
    with pytest.raises(InterventionError, match="needs a head"):
        mean_difference(model, avl.Pair(clean=x, corrupt=x), layer=1, component="z")
    assert head_named("L12H3") == (12, 3)
