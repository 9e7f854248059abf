"""Causal tracing equals full hooked forwards, draw by draw; its draws, windows and controls are what they say."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from small_av import small_clip, small_inputs, small_model
from tiny import letter

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError, InterventionError
from av_lens.inputs.answers import Answer
from av_lens.interventions import Plan, Site, add, noise, replace, zero
from av_lens.methods import causal_trace
from av_lens.methods.shared.frame import Given
from av_lens.methods.shared.places import Axes
from av_lens.methods.tracing import _How, _Job, _largest_error
from av_lens.metrics import each, logit_diff, measure
from av_lens.replay.traces import record

METRIC = logit_diff(letter("a"), letter("b"))
ROLES = ("audio", "video", "question", "generation")


@cache
def traced(**options):
    return causal_trace(small_model(), small_inputs(), **({"metric": METRIC, "seeds": 2} | options))


def job(noised, **options):
    """The private part that draws, to hand its draws to a full hooked forward."""
    settings = {
        "component": "resid_post",
        "window": 1,
        "placebo": False,
        "corruption": "noise",
        "scale": 3.0,
        "seeds": 2,
        "seed": 0,
        "answer": "clean",
        "budget_gb": 1.0,
    } | options
    x = small_inputs()
    spoiled = {role: tuple(x.spans[role].positions.tolist()) for role in noised}
    return _Job(record(small_model(), x), None, spoiled, [], [0, 1], _How(**settings))


def spoiling(noised, number, **options):
    """The draw as a plan for a full forward."""
    one = job(noised, **options)
    return Plan([add(Site("embed", positions=some), one._change(some, number)) for some in one.spoiled.values()])


def restored(component, layers, role):
    x = small_inputs()
    with torch.no_grad():
        cache = run(small_model(), x, capture=[component]).cache
    rows = x.spans[role].positions.tolist()
    return Plan([replace(Site(component, layer, positions=rows), cache[component, layer][:, rows]) for layer in layers])


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, {0: [0], 2: [2]}),
        ({"component": "mlp_out", "window": 3}, {0: [0, 1], 2: [1, 2, 3]}),
        ({"component": "z", "window": 2, "noised": "audio"}, {1: [1, 2], 3: [3]}),
        ({"corruption": "mean", "noised": "video"}, {1: [1]}),
        ({"corruption": "zero", "component": "resid_pre"}, {3: [3]}),
    ],
)
def test_every_figure_is_that_of_full_hooked_forwards(options, layers):
    model, x, found = small_model(), small_inputs(), traced(**options)
    noised = (options.get("noised", "media"),) if options.get("noised") else ("audio", "video")
    draws = 2 if options.get("corruption", "noise") == "noise" else 1
    how = {key: value for key, value in options.items() if key in ("corruption",)}
    component = options.get("component", "resid_post")
    plans = [spoiling(noised, number, **how) for number in range(draws)]
    corrupted = torch.stack([measure(model, x, METRIC, plan=plan) for plan in plans]).mean(0).numpy()
    np.testing.assert_allclose(found.baseline.values, corrupted, atol=1e-5)
    np.testing.assert_allclose(found.donor.values, measure(model, x, METRIC).numpy(), atol=1e-5)
    for layer, window in layers.items():
        for role in ROLES:
            given = restored(component, window, role)
            wanted = torch.stack([measure(model, x, METRIC, plan=plan + given) for plan in plans]).mean(0)
            got = found.values.sel(layer=layer, span=role).values
            np.testing.assert_allclose(got, wanted.numpy(), atol=2e-5, err_msg=f"{role}, layer {layer}")
    assert float(abs(found.effects).max()) > 1e-2


def test_everything_given_back_is_the_clean_run_and_later_states_of_the_spoiled_span_are_too_late():
    found = traced().normalized()
    np.testing.assert_allclose(found.sel(layer=3, span="generation").values, 1.0, atol=1e-4)
    np.testing.assert_allclose(found.sel(layer=3, span="audio").values, 0.0, atol=1e-4)
    clean = avl.Pair(clean=small_inputs(), corrupt=small_inputs())
    assert float(abs(causal_trace(small_model(), clean, metric=METRIC).effects).max()) < 1e-5


def test_noise_has_three_deviations_of_its_own_roles_embeddings_and_a_fresh_draw_for_each_seed_and_example():
    one = job(("audio", "video"))
    for positions in one.spoiled.values():
        held = one.clean.stream(0, 0)[:, list(positions)]
        change, other = one._change(positions, 0), one._change(positions, 1)
        for i in range(2):
            assert abs(float(change[i].std() / held[i].std()) - 3.0) < 0.15
        assert float(torch.corrcoef(torch.stack([change[0].flatten(), other[0].flatten()]))[0, 1]) < 0.2
        assert not torch.allclose(change[0] / held[0].std(), change[1] / held[1].std(), atol=1e-2)
        torch.testing.assert_close(job(("audio",))._change(positions, 0), change)
    torch.testing.assert_close(job(("audio",), scale=1.5)._change((5, 6), 0) * 2, one._change((5, 6), 0))
    torch.testing.assert_close(one._change((5, 6), 0), job(("audio",), seed=0)._change((5, 6), 0))
    assert not torch.equal(one._change((5, 6), 0), job(("audio",), seed=1)._change((5, 6), 0))


def test_draws_do_not_depend_on_which_examples_run_together():
    together = traced()
    apart = causal_trace(small_model(), list(small_inputs()), metric=METRIC, seeds=2, stack=1)
    np.testing.assert_allclose(together.values.values, apart.values.values, atol=1e-5)
    assert together.provenance["seeds"] == 2
    assert together.provenance["standard_error_of_seeds"] > 0
    assert np.isnan(traced(corruption="zero").provenance["standard_error_of_seeds"])


def test_the_standard_error_is_that_of_the_mean_over_seeds():
    """Two draws by hand: the largest place's deviation over the root of two, and over two examples."""
    one = job(("audio", "video"))
    object.__setattr__(one, "places", Axes.parsed("layer pos").cut(small_inputs().spans, "header"))
    draws = [values for values, *_ in one.traced(METRIC.bind(), lambda *_: None)]
    second = 2 * draws[1] - draws[0]  # what is given is the mean so far
    deviations = np.std([draws[0], second], axis=0, ddof=1)
    wanted = (np.sqrt((deviations**2).sum(0)) / 2).max() / np.sqrt(2)
    found = [deviation for _, deviation, _ in one.traced(METRIC.bind(), lambda *_: None)]
    np.testing.assert_allclose(found[1], deviations, atol=1e-6)
    assert np.isnan(found[0]).all()
    assert _largest_error(found[1], 2) == pytest.approx(wanted, rel=1e-4)
    assert np.isnan(_largest_error(found[0], 1))


def test_the_answers_own_probabilities():
    model, x = small_model(), small_inputs()
    clean, corrupt = traced(metric=None, seeds=1), traced(metric=None, seeds=1, answer="corrupt")
    plan = spoiling(("audio", "video"), 0)
    with torch.no_grad():
        before, after = (run(model, x, plan=one).logits[:, -1].softmax(-1) for one in (Plan(), plan))
        back = run(model, x, plan=plan + restored("resid_post", [1], "generation")).logits[:, -1].softmax(-1)
    own, wrong = before.argmax(-1), after.argmax(-1)
    assert not torch.equal(own, wrong)
    rows = torch.arange(2)
    for found, tokens in ((clean, own), (corrupt, wrong)):
        np.testing.assert_allclose(found.donor.values, before[rows, tokens].numpy(), atol=1e-6)
        np.testing.assert_allclose(found.baseline.values, after[rows, tokens].numpy(), atol=1e-6)
        got = found.values.sel(layer=1, span="generation").values
        np.testing.assert_allclose(got, back[rows, tokens].numpy(), atol=1e-6)
        assert found.unit == "probability"
    last = {"layer": 3, "span": "generation"}
    assert float(clean.effects.sel(last).min()) > 0 > float(corrupt.effects.sel(last).max())


def test_a_pairs_corrupt_input_is_the_corrupted_run():
    model = small_model()
    both = avl.Pair(clean=small_inputs((0, 1)), corrupt=small_inputs((2, 3)))
    found = causal_trace(model, both, metric=METRIC)
    exact = avl.patch(model, both, over="layer span", metric=METRIC, component="resid_post")
    np.testing.assert_allclose(found.values.values, exact.values.values, atol=1e-5)
    np.testing.assert_allclose(found.baseline.values, exact.baseline.values, atol=1e-5)
    np.testing.assert_allclose(found.donor.values, exact.donor.values, atol=1e-5)
    assert found.provenance["noised"] == "the pair's corrupt input"
    assert found.provenance["seeds"] == 1
    assert found.clusters == exact.clusters


def test_a_conflict_is_traced_in_its_own_cell():
    model = small_model()
    conflict = avl.Conflict(
        sound=small_clip(0), picture=small_clip(1), question="What?", answers=(letter("a"), letter("b"))
    )
    found = causal_trace(model, [conflict], metric=METRIC, seeds=1, noised="audio")
    alone = causal_trace(model, conflict.cells(model)["va"], metric=METRIC, seeds=1, noised="audio")
    np.testing.assert_allclose(found.values.values, alone.values.values, atol=1e-6)


def test_placebos_restore_as_many_other_positions():
    model, x = small_model(), small_inputs()
    one = job(("audio", "video"), placebo=True)
    places = {role: tuple(x.spans[role].positions.tolist()) for role in ("audio", "question", "generation")}
    object.__setattr__(one, "places", list(places.items()))
    given = Given.of(model, x, "resid_post", range(4), range(len(x.spans)))
    plans = list(one._restorations(given, 0))
    assert len(plans) == 4 * len(places)
    for number, plan in enumerate(plans):
        positions, drawn = list(places.values())[number % 3], plan.edits[0].site.positions
        assert len(drawn) == len(positions)
        assert not set(drawn) & set(positions)
    again = [plan.edits[0].site.positions for plan in one._restorations(given, 0)]
    assert again == [plan.edits[0].site.positions for plan in plans]
    assert again != [plan.edits[0].site.positions for plan in one._restorations(given, 1)]
    found = traced(placebo=True)
    plain = traced()
    np.testing.assert_allclose(found.baseline.values, plain.baseline.values, atol=1e-6)
    assert abs(float(found.normalized().sel(layer=3, span="generation").mean())) < 0.1
    assert "placebo" in found.direction
    everything = causal_trace(model, x, metric=METRIC, seeds=1, over="layer window:60s", placebo=True)
    assert bool(everything.values.isnull().all()) == (2 * len(x.spans.media) > len(x.spans))


def test_answers_of_several_tokens_and_models_that_cannot_restart_are_traced_too(monkeypatch):
    model, x = small_model(), small_inputs()
    metric = logit_diff(Answer("dog", ((70, 71),)), Answer("cat", ((75, 76),)))
    found = traced(metric=metric, seeds=1)
    plan = spoiling(("audio", "video"), 0)
    np.testing.assert_allclose(found.baseline.values, measure(model, x, metric, plan=plan).numpy(), atol=1e-5)
    wanted = measure(model, x, metric, plan=plan + restored("resid_post", [2], "question"))
    np.testing.assert_allclose(found.values.sel(layer=2, span="question").values, wanted.numpy(), atol=1e-5)
    real = avl.methods.tracing.record

    def hooked(*args, **options):
        trace = real(*args, **options)
        return type(trace)(**(vars(trace) | {"hooked_because": "said so"}))

    monkeypatch.setattr("av_lens.methods.tracing.record", hooked)
    again = causal_trace(model, x[0], metric=METRIC, seeds=1, over="layer box:2x2")
    monkeypatch.undo()
    np.testing.assert_allclose(
        again.values.values,
        causal_trace(model, x[0], metric=METRIC, seeds=1, over="layer box:2x2").values.values,
        atol=1e-5,
    )


def test_progress_and_what_is_done_when_interrupted():
    model, both = small_model(), list(small_inputs())
    seen = []

    def stop(when):
        def callback(stage, done, total):
            seen.append((stage, done, total))
            if done > when * total:
                raise KeyboardInterrupt

        return callback

    found = causal_trace(model, both, metric=METRIC, seeds=2, stack=1, progress=stop(0.8))  # in the last of four draws
    assert seen[0][0] == "causal tracing"
    assert found.partial.startswith("interrupted: 56 of 56 numbers measured")
    np.testing.assert_allclose(found.values[0].values, traced().values[0].values, atol=1e-5)
    alone = causal_trace(model, both[1], metric=METRIC, seeds=1)
    assert float(abs(found.values[1].values - alone.values[0].values).max()) > 1e-3  # another example's draws
    half = causal_trace(model, both, metric=METRIC, seeds=2, stack=1, progress=stop(0.55))
    assert half.values[1].isnull().all()
    assert half.partial.startswith("interrupted: 28 of 56 numbers measured")
    with pytest.raises(KeyboardInterrupt):
        causal_trace(model, both, metric=METRIC, seeds=2, progress=stop(0.0))


def test_each_example_has_its_own_answer():
    found = traced(metric=logit_diff(each([letter("a"), letter("c")]), letter("b")), seeds=1)
    for i, word in enumerate("ac"):
        alone = traced(metric=logit_diff(letter(word), letter("b")), seeds=1)
        np.testing.assert_allclose(found.values[i].values, alone.values[i].values, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"over": "head"}, InputError, "causal_trace restores layers, not head"),
        ({"over": "layers:2"}, InputError, "causal_trace restores layers, not layers"),
        ({"corruption": "blank"}, InputError, "unknown corruption 'blank'. Known: noise, mean, zero"),
        ({"answer": "own", "metric": None}, InputError, "unknown answer 'own'. Known: clean, corrupt"),
        ({"component": "pattern"}, InterventionError, "pattern cannot be restored by layer and position"),
        ({"component": "embed"}, InterventionError, "embed cannot be restored"),
        ({"window": 5}, InputError, "window=5: restore 1 to 4 layers together"),
        ({"seeds": 0}, InputError, "both must be positive; 10 and 3 are usual"),
        ({"noised": "vidoe"}, InputError, "unknown role 'vidoe'"),
        ({"noised": "image"}, InterventionError, r"the noise names no position \('image'\)"),
        (
            {"metric": logit_diff(each([letter("a"), letter("c"), letter("d")]), letter("b"))},
            InputError,
            "names 3 answers",
        ),
        ({"metric": lambda logits: logits[:, -1, 0] * torch.nan}, InputError, "is NaN or infinite on the clean run"),
    ],
)
def test_what_cannot_be_traced_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        causal_trace(small_model(), small_inputs(), **({"metric": METRIC} | options))


def test_other_plans_are_not_noise_by_mistake():
    """A spoiled run differs from one that is zeroed or noised by the intervention of that name with its own seed."""
    x = small_inputs()
    media = x.spans.media.positions.tolist()
    zeroed = measure(small_model(), x, METRIC, plan=Plan(zero(Site("embed", positions=media)))).numpy()
    np.testing.assert_allclose(traced(corruption="zero").baseline.values, zeroed, atol=1e-5)
    noised = measure(small_model(), x, METRIC, plan=Plan(noise(Site("embed", positions=media), scale=3.0))).numpy()
    assert abs(traced().baseline.values - noised).max() > 1e-3
