"""Knockout: equal to a forward masked by hand, in the prompt and while decoding, with its controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_av import small_clip, small_inputs, small_model
from tiny import letter

import av_lens as avl
from av_lens.core.readings import incoming_mass, sink_positions
from av_lens.errors import InputError, InterventionError
from av_lens.families.decoder import hook_name
from av_lens.interventions import Plan, cut
from av_lens.methods import knockout
from av_lens.methods.shared.matched_cuts import EdgeCut, prefix
from av_lens.metrics import logit_diff, measure

METRIC = logit_diff(letter("a"), letter("b"))


def masked_by_hand(model, x, queries, keys, layers, heads=range(4), renormalize=True):
    """The metric of a full forward in which a plain hook masks the scores (or zeroes the pattern)."""

    def mask(edges, hook=None):
        del hook
        new = edges.clone()
        for head in heads:
            for query in queries:
                new[:, head, query, list(keys)] = -1e30 if renormalize else 0.0
        return new

    hooked = [(hook_name("scores" if renormalize else "pattern", layer), mask) for layer in layers]
    with torch.no_grad():
        logits = model.run_with_hooks(x, fwd_hooks=hooked)
    return METRIC.bind()(logits).numpy()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    "edge", ["video -> generation", "video|audio -> question", "video -> audio", "media -> suffix"]
)
def test_a_cut_equals_a_forward_masked_by_hand(edge, renormalize):
    model, x = small_model(), small_inputs()
    source, target = edge.split(" -> ")
    options = {"edges": edge, "metric": METRIC, "controls": False, "renormalize": renormalize}
    keys, queries = (x.spans[side].positions.tolist() for side in (source, target))
    grid = knockout(model, x, **options)
    wanted = masked_by_hand(model, x, queries, keys, range(4), renormalize=renormalize)
    np.testing.assert_allclose(grid.values.sel(edge=edge, condition="cut").values, wanted, atol=1e-5)
    assert float(abs(grid.effects).min()) > 1e-4
    some = knockout(model, x, **options, layers=(1, 3), heads=(0, 2))
    wanted = masked_by_hand(model, x, queries, keys, (1, 3), (0, 2), renormalize)
    np.testing.assert_allclose(some.values.sel(edge=edge, condition="cut").values, wanted, atol=1e-5)


def test_windows_and_heads_are_those_that_their_labels_say():
    model, x = small_model(), small_inputs()
    keys, at = x.spans.video.positions.tolist(), [x.spans.generation_position]
    options = {"edges": "video -> generation", "metric": METRIC, "controls": False}
    windows = knockout(model, x, **options, over="layer", width=(1, 3)).values.squeeze(["edge", "condition"])
    for width, layer, wanted in ((1, 2, [2]), (3, 0, [0, 1]), (3, 2, [1, 2, 3]), (3, 3, [2, 3])):
        found = windows.sel(width=width, layer=layer).values
        np.testing.assert_allclose(found, masked_by_hand(model, x, at, keys, wanted), atol=1e-5)
    heads = knockout(model, x, **options, over="head", layers=(1, 2)).values.squeeze(["edge", "condition"])
    assert heads.coords["layer"].values.tolist() == [1, 2]
    np.testing.assert_allclose(heads.sel(layer=2, head=3), masked_by_hand(model, x, at, keys, [2], [3]), atol=1e-5)
    pairs = knockout(model, x, **options, heads=[(1, 0), (3, 2), (3, 3)]).values.squeeze(["edge", "condition"])
    plan = Plan([cut("generation", "video", layers=[1], heads=0), cut("generation", "video", layers=[3], heads=(2, 3))])
    np.testing.assert_allclose(pairs.values, measure(model, x, METRIC, plan=plan).numpy(), atol=1e-5)
    few = knockout(model, x, **options, over="head", heads=[(1, 0)]).values.squeeze(["edge", "condition"])
    assert np.isnan(few.values).sum() == 2 * 15


def test_the_studys_variant_never_touches_the_first_token_and_ours_does():
    model, x = small_model(), small_inputs((0,))
    options = {"edges": "media -> generated", "metric": METRIC, "controls": False, "max_new_tokens": 4}
    ours = knockout(model, x, **options)
    study = knockout(model, x, **options, include_generation=False)
    assert float(abs(study.effects).max()) == 0.0
    assert float(abs(ours.effects).min()) > 1e-3
    keys, at = x.spans.media.positions.tolist(), x.spans.generation_position
    for grid, first in ((ours, at), (study, at + 1)):

        def mask(scores, hook=None, first=first):
            del hook
            offset = scores.shape[3] - scores.shape[2]
            new = scores.clone()
            rows = [row for row in range(scores.shape[2]) if row + offset >= first]
            for row in rows:
                new[:, :, row, keys] = -1e30
            return new

        hooks = [(hook_name("scores", layer), mask) for layer in range(4)]
        wanted = model.generate(x, max_new_tokens=4, fwd_hooks=hooks, return_type="text")
        said = grid.provenance["texts"][0]
        assert said["media -> generated, cut"] == (wanted if isinstance(wanted, str) else wanted[0])
        plain = model.generate(x, max_new_tokens=4, return_type="text")
        assert said["no cut"] == (plain if isinstance(plain, str) else plain[0])


def test_conflicts_are_measured_as_hearing_under_conflict():
    model = small_model()
    conflicts = [
        avl.Conflict(
            sound=small_clip(i),
            picture=small_clip(i + 5),
            question="What?",
            answers=(letter("a"), letter("b")),
            id=str(i),
        )
        for i in range(2)
    ]
    grid = knockout(model, conflicts, edges="video -> generation", controls=False)
    plan = Plan(cut("generation", "video"))
    for i, conflict in enumerate(conflicts):
        cells = conflict.cells(model)
        wanted = [
            (measure(model, cells["va"], METRIC, plan=p) - measure(model, cells["av"], METRIC, plan=p)) / 2
            for p in (Plan(), plan)
        ]
        np.testing.assert_allclose(grid.baseline[i].item(), wanted[0].item(), atol=1e-5)
        np.testing.assert_allclose(grid.values[i].item(), wanted[1].item(), atol=1e-5)
    assert grid.metric.startswith("C,")
    one = knockout(model, conflicts, edges="video -> generation", controls=False, metric=METRIC)
    va = conflicts[1].cells(model)["va"]
    np.testing.assert_allclose(one.values[1].item(), measure(model, va, METRIC, plan=plan).item(), atol=1e-5)


def edge(heads, keys=(1, 2, 3, 4), n_heads=3):
    return EdgeCut("generation", (9,), keys, heads, n_heads, {})


def test_prefixes_come_as_close_as_they_can():
    assert prefix(np.array([7, 5, 6]), np.array([1.0, 2.0, 4.0]), 4.6, [5, 6, 7]) == ([5, 7], 5.0)
    assert prefix(np.array([7, 5, 6]), np.array([1.0, 2.0, 4.0]), 100.0, [5, 6, 7]) == ([5, 6, 7], 7.0)
    assert prefix(np.array([7, 5, 6]), np.array([1.0, 2.0, 4.0]), 1.0, [5, 6, 7]) == ([], 0.0)


def test_equal_mass_takes_whole_heads_and_part_of_one_by_hand():
    mass = np.zeros((1, 3, 10))
    mass[0, 0, 1:5] = 1.0  # cut: 4
    mass[0, 1, 1:5] = 0.75  # 3, whole
    mass[0, 2, 1:5] = 0.5  # two of its keys give the last 1
    plan, ratio = edge({0: (0,)}).equal_mass(mass, [], (0, 0))
    taken = {(one.heads, len(one.key)) for one in plan}
    assert len(plan) == 2
    if ((1,), 4) in taken:  # the order is drawn: 3 and two of .5, or 2 and three of .75
        assert (taken, ratio) == ({((1,), 4), ((2,), 2)}, pytest.approx(1.0))
    else:
        assert (taken, ratio) == ({((2,), 4), ((1,), 3)}, pytest.approx(4.25 / 4))
    assert edge({0: (0,)}).mass(mass) == pytest.approx(1.0)
    poor, ratio = edge({0: (0,)}).equal_mass(mass * np.array([1, 0.1, 0.1])[:, None], [], (0, 0))
    assert ratio == pytest.approx(0.125 * 1.0)
    assert {(one.heads, len(one.key)) for one in poor} == {((1,), 4), ((2,), 4)}


def test_equal_mass_looks_for_heads_one_layer_away_by_hand():
    mass = np.zeros((5, 3, 10))
    mass[2, 0, 1:5] = 1.0
    mass[[0, 4], :, 1:5] = 1.0  # two layers away
    mass[3, 1, 1:5] = 1.0
    for draw in range(5):
        plan, ratio = edge({2: (0,)}).equal_mass(mass, [], (0, draw))
        assert ratio == pytest.approx(1.0)
        assert [(one.layers, one.heads, len(one.key)) for one in plan] == [((3,), (1,), 4)]


def test_other_heads_are_as_many_and_at_most_one_layer_away():
    seen = set()
    for draw in range(20):
        plan = edge({2: (0,), 3: (1, 2)}).other_heads(6, (0, draw))
        assert plan is not None
        drawn = [(one.layers[0], one.heads[0]) for one in plan]
        assert len(set(drawn)) == 3
        assert not set(drawn) & {(2, 0), (3, 1), (3, 2)}
        assert abs(drawn[0][0] - 2) <= 1
        assert all(abs(layer - 3) <= 1 for layer, _ in drawn[1:])
        assert all(set(one.key) == {1, 2, 3, 4} for one in plan)
        seen |= set(drawn)
    assert len(seen) > 6
    assert edge({0: None}).other_heads(1, (0, 0)) is None
    assert edge({0: None, 1: None}).other_heads(3, (0, 0)) is None  # three heads are left for six


def test_where_all_heads_are_cut_the_mass_comes_from_other_keys_by_hand():
    mass = np.zeros((2, 3, 10))
    mass[1, :, 1:5] = 0.5  # cut: 6
    mass[1, :, 6:9] = 1.0  # any two of these keys are as much
    plan, ratio = edge({1: None}).equal_mass(mass, [6, 7, 8], (0, 0))
    assert ratio == pytest.approx(1.0)
    (found,) = plan
    assert found.heads is None
    assert found.layers == (1,)
    assert len(found.key) == 2
    assert set(found.key) < {6, 7, 8}


def test_counts_need_three_times_as_many_others_and_fractions_are_nested():
    assert edge({0: None}).equal_count(10, (0, 0)) is None  # 6 others for 4 keys
    plan = edge({0: None}, keys=(1, 2)).equal_count(10, (0, 0))
    assert plan is not None
    (found,) = plan
    assert len(found.key) == 2
    assert not set(found.key) & {1, 2}
    wide = EdgeCut("generation", (99,), tuple(range(50)), {0: None}, 3, {})
    kept = [set(next(iter(wide.fraction(share, 4))).key) for share in (0.1, 0.3, 1.0)]
    assert [len(keys) for keys in kept] == [5, 15, 50]
    assert kept[0] < kept[1] < kept[2]


def test_controls_remove_in_the_model_what_they_say_and_are_means_over_draws():
    model, x = small_model(), small_inputs()
    options = {"edges": "video -> generation", "metric": METRIC, "heads": [(1, 0), (2, 3)], "seed": 3}
    grid = knockout(model, x, **options, draws=2, fractions=(0.5,))
    assert grid.values.coords["condition"].values.tolist() == [
        "cut",
        "equal mass",
        "other heads",
        "equal count",
        "50% of keys",
    ]
    (matched,) = grid.provenance["matched"]["video -> generation"]
    assert matched["draws"] == matched["draws_matched"] == 2
    assert matched["mass_ratio"] == pytest.approx(1.0, abs=0.2)
    assert 0 < matched["share_of_mass"] < 1
    again = knockout(model, x, **options, draws=2, fractions=(0.5,))
    np.testing.assert_array_equal(grid.values.values, again.values.values)
    _, cache = model.run_with_cache(x)
    at, keys = x.spans.generation_position, x.spans.video.positions.copy()
    mass = np.zeros((4, 4, len(x.spans)))
    for layer in range(4):
        values = cache["v", layer].detach().repeat_interleave(2, dim=2)
        moved = torch.einsum("bkhd,hdm->bhkm", values, model.W_O[layer].detach()).norm(dim=-1)
        mass[layer] = (cache["pattern", layer].detach()[:, :, at] * moved).mean(0).numpy()
    target = mass[1, 0, keys].sum() + mass[2, 3, keys].sum()
    one = EdgeCut("generation", (at,), tuple(keys.tolist()), {1: (0,), 2: (3,)}, 4, {})
    measured = []
    for draw in range(2):
        plan, ratio = one.equal_mass(mass, [], (3, draw, 0))
        removed = sum(mass[edit.layers[0]][list(edit.heads)][:, list(edit.key)].sum() for edit in plan)
        assert removed / target == pytest.approx(ratio)
        assert not {(layer, h) for edit in plan for layer in edit.layers for h in edit.heads} & {(1, 0), (2, 3)}
        measured.append(measure(model, x, METRIC, plan=plan).numpy())
    found = grid.values.sel(edge="video -> generation", condition="equal mass").values
    np.testing.assert_allclose(found, np.mean(measured, 0), atol=1e-5)


def test_a_control_that_cannot_be_matched_is_not_measured():
    model, x = small_model(), small_inputs()
    grid = knockout(model, x, edges="system|boundary|media -> generation", metric=METRIC)
    (matched,) = grid.provenance["matched"]["system|boundary|media -> generation"]
    assert matched["mass_ratio"] < 0.8
    assert matched["draws_matched"] == 0
    assert np.isnan(grid.values.sel(condition="equal mass").values).all()
    assert np.isnan(grid.values.sel(condition="equal count").values).all()
    assert not np.isnan(grid.values.sel(condition="30% of keys").values).any()


def test_sinks_are_named_by_a_span_or_by_the_rule_and_are_nan_where_there_are_none():
    model, x = small_model(), small_inputs()
    span = x.spans.span(x.spans.video.positions.tolist()[:2])
    options = {"metric": METRIC, "controls": False}
    grid = knockout(model, x, edges=["sinks -> generation", "media - sinks -> generation"], sinks=span, **options)
    wanted = measure(model, x, METRIC, plan=Plan(cut("generation", span)))
    np.testing.assert_allclose(grid.values.sel(edge="sinks -> generation").squeeze().values, wanted.numpy(), atol=1e-5)
    rest = measure(model, x, METRIC, plan=Plan(cut("generation", x.spans.media - span)))
    found = grid.values.sel(edge="media - sinks -> generation").squeeze().values
    np.testing.assert_allclose(found, rest.numpy(), atol=1e-5)
    none = knockout(model, x, edges=["sinks -> generation", "video -> generation"], sinks=1000, **options)
    assert np.isnan(none.values.sel(edge="sinks -> generation").values).all()
    assert not np.isnan(none.values.sel(edge="video -> generation").values).any()
    with pytest.raises(InterventionError, match="no media position receives over 1000 times the mean"):
        knockout(model, x, edges="media -> sinks", sinks=1000, **options)


def test_conflicts_have_one_set_of_sinks_found_where_sound_and_picture_disagree():
    model = small_model()
    conflicts = [
        avl.Conflict(
            sound=small_clip(i), picture=small_clip(i + 5), question="What?", answers=(letter("a"), letter("b"))
        )
        for i in (0, 1)
    ]
    grid = knockout(model, conflicts, edges="sinks -> generation", sinks=1, controls=False, stack=1)
    va = avl.AVInputs.stack([conflict.cells(model)["va"] for conflict in conflicts])
    wanted = sink_positions(incoming_mass(model, va).numpy(), va.spans, times=1).tolist()
    assert grid.provenance["sinks"] == [wanted]
    plan = Plan(cut("generation", wanted))
    cells = conflicts[1].cells(model)
    sides = [measure(model, cells[name], METRIC, plan=plan).item() for name in ("va", "av")]
    np.testing.assert_allclose(grid.values[1].item(), (sides[0] - sides[1]) / 2, atol=1e-5)


def test_layouts_are_mixed_and_a_missing_role_is_nan():
    model, x = small_model(), small_inputs((0,))
    silent = model.encode(small_clip(0), "What?", sound=None)
    grid = knockout(model, [silent, x], edges=["audio -> generation", "video -> generation"], metric=METRIC)
    cuts = grid.values.sel(condition="cut")
    assert np.isnan(cuts.sel(edge="audio -> generation").values).tolist() == [True, False]
    assert not np.isnan(cuts.sel(edge="video -> generation").values).any()
    with pytest.raises(InterventionError, match=r"no input has \['audio -> generation'\]: they have the roles .*video"):
        knockout(model, silent, edges="audio -> generation", metric=METRIC)


def test_an_interrupted_knockout_keeps_what_is_done():
    model, x = small_model(), small_inputs((0,))
    separate = small_inputs((0,), sound="separate")

    def stop(stage, done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    grid = knockout(model, [x, separate], edges="video -> generation", metric=METRIC, progress=stop)
    assert "interrupted" in grid.partial
    assert not np.isnan(grid.values[0].sel(condition="cut")).any()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"edges": "video"}, InputError, "write 'source -> target'"),
        ({"edges": "vidoe -> generation"}, InputError, "unknown role 'vidoe'"),
        ({"edges": "generation -> video"}, InterventionError, "were the two swapped"),
        ({"over": "layers"}, InputError, "Did you mean 'layer'"),
        ({"over": "layer", "width": 0}, InputError, "width"),
        ({"layers": ()}, InterventionError, "no layer is named"),
        ({"layers": (9,)}, InterventionError, "layer 9 is past the end"),
        ({"heads": (7,)}, InterventionError, "head 7 of the attention pattern is out of range"),
        ({"heads": [(1, 0), 2]}, InputError, "or pairs"),
        ({"metric": None}, InputError, "conflicts bring their own"),
        ({"metric": lambda logits: logits[:, -1, 0] * float("nan")}, InputError, "NaN or infinite"),
        ({"draws": 0}, InputError, "draws"),
        ({"over": "head", "max_new_tokens": 2}, InputError, "needs over='all'"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        knockout(small_model(), small_inputs(), **{"edges": "video -> generation", "metric": METRIC} | options)
