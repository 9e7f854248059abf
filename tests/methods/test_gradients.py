"""Attribution patching: each guess is its definition computed naively, and the exact figures are those of `patch`."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from small_av import small_inputs, small_model
from tiny import letter, tiny_model

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError, InterventionError
from av_lens.families.decoder import hook_name
from av_lens.inputs.answers import Answer
from av_lens.interventions import Plan, Site, replace
from av_lens.methods import attribution_patch, edge_attribution, patch
from av_lens.metrics import each, log_prob, logit_diff, measure, rank
from av_lens.replay.stacks import read_with

METRIC = logit_diff(letter("a"), letter("b"))
LONG = logit_diff(Answer("dog", ((70, 71),)), Answer("cat", ((75, 76),)))


def pair(clean=(0, 1), corrupt=(2, 3), **options):
    return avl.Pair(clean=small_inputs(clean, **options), corrupt=small_inputs(corrupt, **options))


@cache
def guessed(**options):
    return attribution_patch(small_model(), pair(), metric=METRIC, **options)


def gradient_of(x, name, dropped=None):
    """The metric's gradient at a hook in a full hooked forward, one layer's writes held constant if asked."""
    model, kept = small_model(), []

    def keep(activation, hook):
        kept.append(activation)
        return activation

    hooks = [(name, keep)]
    if dropped is not None:
        held = [hook_name(part, dropped) for part in ("attn_out", "mlp_out")]
        hooks += [(one, lambda activation, hook: activation.detach()) for one in held]
    with torch.enable_grad():
        measured = METRIC.bind()(model.run_with_hooks(x, fwd_hooks=hooks)[:, -1:])
        found = torch.autograd.grad(measured.sum(), kept[0], allow_unused=True)[0]
    return torch.zeros_like(kept[0]) if found is None else found


def kept_in(x, component, layer, plan=None):
    with torch.no_grad():
        return run(small_model(), x, capture=[component], plan=plan).cache[hook_name(component, layer)]


@pytest.mark.parametrize(
    ("component", "over"), [("z", "head span"), ("resid_pre", "layer span"), ("v", "head"), ("mlp_out", "layer")]
)
def test_first_order_is_change_times_gradient(component, over):
    found = guessed(component=component, over=over, top=0, drop=False).effects
    base, donor = pair().corrupt, pair().clean
    spans = [str(role) for role in found.coords["span"].values] if "span" in found.dims else ["generation"]
    for layer in (0, 2, 3):
        change = kept_in(donor, component, layer) - kept_in(base, component, layer)
        product = (change * gradient_of(base, hook_name(component, layer))).sum(-1)
        for role in spans:
            wanted = product[:, base.spans[role].positions.tolist()].sum(1)
            got = found.sel(layer=layer, figure="atp")
            got = got.sel(span=role) if "span" in found.dims else got
            np.testing.assert_allclose(got.values, wanted.detach().numpy(), atol=1e-5)
    np.testing.assert_array_equal(found.sel(figure="atp").values, found.sel(figure="atp_fixed").values)
    assert float(abs(found.sel(figure="atp")).max()) > 1e-3
    assert bool(found.sel(figure=["atp_star", "exact", "error"]).isnull().all())


@pytest.mark.parametrize(
    ("component", "sound"), [("q", "in_video"), ("k", "separate"), ("rot_q", "separate"), ("rot_k", "in_video")]
)
def test_the_fix_is_the_change_of_the_pattern_times_its_gradient(component, sound):
    """The paper's definition: the pattern under the donor's queries or keys, less the base's, times dm/dpattern."""
    model, both = small_model(), pair(sound=sound)
    found = attribution_patch(model, both, metric=METRIC, component=component, over="head span", top=0, drop=False)
    base, layer = both.corrupt, 2
    given = kept_in(both.clean, component, layer)
    gradient = gradient_of(base, hook_name("pattern", layer))
    plain = kept_in(base, "pattern", layer)
    heads = given.shape[2]
    for role in ("video", "header", "generation"):
        positions = base.spans[role].positions.tolist()
        for head in (0, heads - 1):
            plan = Plan(replace(Site(component, layer, head, positions), given[:, positions, head]))
            moved = kept_in(base, "pattern", layer, plan) - plain
            wanted = (moved * gradient).sum((1, 2, 3)).detach().numpy()
            got = found.effects.sel(layer=layer, head=head, span=role)
            np.testing.assert_allclose(got.sel(figure="atp_fixed").values, wanted, atol=1e-5)
    gap = abs(found.effects.sel(figure="atp_fixed") - found.effects.sel(figure="atp"))
    assert float(gap.max()) > 1e-4
    unfixed = attribution_patch(
        model, both, metric=METRIC, component=component, over="head span", top=0, drop=False, fix=False
    )
    plainly, first = unfixed.effects.sel(figure="atp_fixed"), found.effects.sel(figure="atp")
    np.testing.assert_allclose(plainly.values, first.values, atol=1e-6)


@pytest.mark.parametrize("component", ["z", "resid_pre", "mlp_out", "attn_out"])
def test_dropping_layers_is_the_mean_size_with_each_layers_writes_held(component):
    over = "head" if component == "z" else "layer"
    found = guessed(component=component, over=over, top=0, at="suffix").effects
    base, donor = pair().corrupt, pair().clean
    rows = base.spans.suffix.positions.tolist()
    for layer in (0, 2, 3):
        change = kept_in(donor, component, layer) - kept_in(base, component, layer)
        sizes = []
        for dropped in range(4):
            if dropped == layer and component != "resid_pre":
                continue  # its own layer leaves it no way to the answer
            product = (change * gradient_of(base, hook_name(component, layer), dropped)).sum(-1)
            sizes.append(product[:, rows].sum(1).abs())
        wanted = torch.stack(sizes).mean(0).detach().numpy()
        np.testing.assert_allclose(found.sel(layer=layer, figure="atp_star").values, wanted, atol=1e-5)
    gap = found.sel(figure="atp_star") - abs(found.sel(figure="atp"))
    assert float(abs(gap).max()) > 1e-3


def test_the_drops_are_of_the_fixed_guess():
    found = guessed(component="q", at="suffix", top=0).effects
    base, donor = pair().corrupt, pair().clean
    rows, layer, head = base.spans.suffix.positions.tolist(), 1, 3
    value = kept_in(donor, "q", layer)[:, rows, head]
    plan = Plan(replace(Site("q", layer, head, rows), value))
    moved = kept_in(base, "pattern", layer, plan) - kept_in(base, "pattern", layer)
    sizes = [
        (moved * gradient_of(base, hook_name("pattern", layer), dropped)).sum((1, 2, 3)).abs() for dropped in (0, 2, 3)
    ]
    got = found.sel(layer=layer, head=head, figure="atp_star").values
    np.testing.assert_allclose(got, torch.stack(sizes).mean(0).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "direction"),
    [
        ({"over": "head"}, "denoise"),
        ({"over": "layer span"}, "noise"),
        ({"over": "group", "at": "suffix"}, "denoise"),
        ({"over": "head window:1s", "component": "k"}, "noise"),
        ({"over": "layer box:1x2", "component": "attn_out"}, "denoise"),
        ({"over": "layer", "at": "media", "component": "v"}, "noise"),
    ],
)
def test_the_largest_are_patched_exactly(options, direction):
    model, both = small_model(), pair()
    found = attribution_patch(model, both, metric=METRIC, top=5, direction=direction, **options)
    exact = patch(model, both, metric=METRIC, direction=direction, **options)
    got = found.effects.sel(figure="exact")
    assert got.dims == exact.effects.dims
    known = got.notnull()
    places = int(np.prod(got.shape[1:]))
    assert int(known.sum()) == 2 * min(5, places)
    np.testing.assert_allclose(got.where(known).values, exact.effects.where(known).values, atol=1e-5)
    np.testing.assert_allclose(found.baseline.values, exact.baseline.values, atol=1e-5)
    np.testing.assert_allclose(found.donor.values, exact.donor.values, atol=1e-5)
    assert found.direction.startswith(exact.direction)
    size = found.mean().sel(figure="atp_star").values
    chosen = known.isel(example=0).values
    assert size[chosen].min() >= size[~chosen].max() if (~chosen).any() else chosen.all()
    error = found.effects.sel(figure="error").values
    np.testing.assert_allclose(error, (found.effects.sel(figure="atp_fixed") - got).values, atol=1e-12)


def test_without_drops_the_largest_first_guesses_are_patched():
    found = guessed(drop=False, top=3)
    assert bool(found.effects.sel(figure="atp_star").isnull().all())
    size = abs(found.mean().sel(figure="atp_fixed").values)
    chosen = found.mean().sel(figure="exact").notnull().values
    assert int(chosen.sum()) == 3
    assert size[chosen].min() >= size[~chosen].max()


def test_small_changes_are_guessed_right():
    """Between runs that hardly differ the first guess is the patch: the error falls with the square of the change."""
    model, both = small_model(), pair()
    trace = model.trace(both.corrupt)
    site = Site("resid_pre", 1, positions="suffix")
    base, donor = (kept_in(x, "resid_pre", 1)[:, x.spans.suffix.positions.tolist()] for x in (both.corrupt, both.clean))
    guess = attribution_patch(model, both, metric=METRIC, over="layer", at="suffix", drop=False, top=0)
    step = 1e-2
    moved = trace.score([Plan(), Plan(replace(site, base + step * (donor - base)))], METRIC)
    slope = (moved[1] - moved[0]) / step
    np.testing.assert_allclose(guess.effects.sel(layer=1, figure="atp").values, slope.numpy(), atol=2e-3)


def test_edges_summed_to_a_sender_equal_its_guess():
    found = edge_attribution(small_model(), pair(), metric=METRIC).nodes().effects
    everywhere = small_inputs().spans.all
    heads = guessed(at=everywhere, direction="noise", drop=False, top=0).effects.sel(figure="atp")
    mlps = guessed(over="layer", component="mlp_out", at=everywhere, direction="noise", drop=False, top=0).effects
    for layer in range(4):
        names = [f"L{layer}H{head}" for head in range(4)]
        np.testing.assert_allclose(found.sel(sender=names).values, heads.sel(layer=layer).values, atol=1e-5)
        wanted = mlps.sel(layer=layer, figure="atp").values
        np.testing.assert_allclose(found.sel(sender=f"L{layer} mlp").values, wanted, atol=1e-5)


def test_several_pairs_of_several_layouts_keep_their_order_and_their_answers():
    model = small_model()
    pairs = [pair((0,), (2,)), pair((0,), (1,), sound="separate"), pair((3,), (4,))]
    options = {"component": "k", "over": "layer span", "top": 0}
    seen = []
    found = attribution_patch(
        model,
        pairs,
        metric=logit_diff(each([letter("a"), letter("c"), letter("e")]), letter("b")),
        progress=lambda stage, done, total: seen.append((stage, done, total)),
        **options,
    )
    assert seen[-1] == ("gradients", 10, 10)  # two stacks, each a plain gradient and four drops
    assert found.clusters == (0, 0, 1)
    for i, word in enumerate("ace"):
        alone = attribution_patch(model, pairs[i], metric=logit_diff(letter(word), letter("b")), **options)
        np.testing.assert_allclose(found.values[i].values, alone.values[0].values, atol=1e-5)


def test_what_was_patched_before_an_interruption_is_kept():
    def stop(stage, done, total):
        if stage != "gradients" and done >= 4:
            raise KeyboardInterrupt

    found = attribution_patch(small_model(), pair(), metric=METRIC, over="head", top=9, budget_gb=1e-9, progress=stop)
    kept = int(found.effects.sel(figure="exact").notnull().sum())
    assert 0 < kept < 18
    assert found.partial.startswith(f"interrupted: {kept} of 18 numbers measured")
    assert bool(found.effects.sel(figure="atp_star").notnull().all())


def test_a_model_of_one_layer_and_a_run_against_itself():
    model = tiny_model(n_layers=1)
    x = small_inputs()
    found = attribution_patch(model, avl.Pair(clean=x, corrupt=small_inputs((2, 3))), metric=METRIC, top=0)
    assert float(abs(found.effects.sel(figure="atp_star")).max()) == 0.0  # its own layer is all there is
    same = avl.Pair(clean=x, corrupt=x)
    still = attribution_patch(small_model(), same, metric=METRIC, over="head", component="k", top=2)
    assert float(abs(still.effects).max()) < 1e-5


def test_rereading_with_the_own_queries_gives_the_recorded_z():
    trace = small_model().trace(small_inputs(sound="separate"))
    rows = [5, 40, len(trace.spans) - 1]
    queries = kept_in(trace.x, "rot_q", 1)[:, rows]
    z = kept_in(trace.x, "z", 1)[:, rows]
    torch.testing.assert_close(read_with(trace, 1, rows, queries), z, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"over": "haed"}, InputError, "unknown axis 'haed'. Did you mean 'head'"),
        ({"over": "pair"}, InputError, "a first guess has no use for pair: it adds up"),
        ({"over": "layers:2"}, InputError, "a first guess has no use for layers"),
        ({"component": "attn_out"}, InterventionError, "attn_out has no heads to iterate"),
        ({"component": "pattern"}, InterventionError, "pattern cannot be guessed here"),
        ({"over": "layer", "component": "embed"}, InterventionError, "embed cannot be guessed here"),
        ({"over": "group", "component": "v"}, InterventionError, "v has key-value heads"),
        ({"direction": "denoize"}, InputError, "Did you mean 'denoise'"),
        ({"top": -1}, InputError, "how many places are patched exactly, 0 for none"),
        ({"at": "vidoe"}, InputError, "unknown role 'vidoe'"),
        ({"metric": rank(letter("a"))}, InputError, "a rank has no gradient"),
        (
            {"metric": LONG},
            InputError,
            "several tokens, and drop=True holds layers at the prompt's positions alone.*Write drop=False",
        ),
        (
            {"metric": LONG, "drop": False, "component": "k", "over": "head"},
            InputError,
            "an answer has several tokens, and fix=True reads keys anew .*Write fix=False",
        ),
        ({"metric": lambda logits: logits.mean()}, InputError, "Leave out the mean"),
        ({"metric": lambda logits: logits[:, -1, 0] / 0.0}, InputError, "is NaN or infinite on the run without edits"),
        ({"metric": log_prob(each([letter("a"), letter("c"), letter("d")]))}, InputError, "names 3 answers"),
    ],
)
def test_what_cannot_be_guessed_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        attribution_patch(small_model(), pair((0,), (2,)), **({"metric": METRIC} | options))


def test_answers_of_several_tokens():
    model, both = small_model(), pair((0,), (2,))
    found = attribution_patch(model, both, metric=LONG, drop=False, top=2)
    patched = patch(model, both, over="head", metric=LONG).values
    exact = found.effects.sel(figure="exact").squeeze()
    there = ~np.isnan(exact.values)
    assert there.sum() == 2
    effects = (patched - found.baseline).squeeze()
    np.testing.assert_allclose(exact.values[there], effects.values[there], atol=1e-5)
    np.testing.assert_allclose(found.donor.values, measure(model, both.clean, LONG).numpy(), atol=1e-5)
    guess = found.effects.sel(figure="atp").squeeze()
    last = [(3, head) for head in range(4)]  # at the last layer only the norm stands between z and the logits
    for layer, head in last:
        assert abs(float(guess[layer, head]) - float(effects[layer, head])) < 0.2 * float(np.abs(effects).max())


def test_no_pair_is_refused():
    with pytest.raises(InputError, match="compares two aligned inputs, and got nothing"):
        attribution_patch(small_model(), [], metric=METRIC)
    assert measure(small_model(), small_inputs(), METRIC).shape == (2,)
