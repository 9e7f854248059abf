"""Sweeps: every number where it belongs, and nothing lost when they are interrupted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_av import small_inputs, small_model
from tiny import letter

import av_lens as avl
from av_lens.core.budget import watched
from av_lens.errors import InputError, InterventionError
from av_lens.inputs.answers import Answer
from av_lens.interventions import Plan, Site, cut, zero
from av_lens.metrics import each, log_prob, logit_diff, measure
from av_lens.replay import sweep

METRIC = logit_diff(letter("a"), letter("b"))
DOG, CAT = Answer("dog", ((70, 71),)), Answer("cat", ((75, 76),))


def head_plans(n_layers=4, n_heads=4):
    """Every head at the suffix, last layers first: not in the order in which they run."""
    return {
        f"L{layer}H{head}": Plan(zero(Site("z", layer, head, "suffix")))
        for layer in reversed(range(n_layers))
        for head in range(n_heads)
    }


def test_every_plan_and_example_is_where_its_own_full_run_says():
    model, x = small_model(), small_inputs()
    plans = head_plans() | {"early": Plan(zero(Site("z", 1, 2, "audio"))), "nothing": Plan()}
    grid = sweep(model.trace(x), plans, METRIC)
    assert grid.values.dims == ("example", "plan")
    wanted = np.stack([measure(model, x, METRIC, plan=plan).numpy() for plan in plans.values()], axis=1)
    np.testing.assert_allclose(grid.values.values, wanted, atol=1e-5)
    np.testing.assert_allclose(grid.baseline.values, measure(model, x, METRIC).numpy(), atol=1e-5)
    assert float(abs(grid.effects.sel(plan="nothing")).max()) < 1e-5
    assert float(abs(grid.effects.sel(plan="early")).max()) > 1e-4
    assert grid.partial == ""


def test_prompts_of_several_layouts_run_in_turn_with_their_own_answers():
    model = small_model()
    both = [small_inputs(), small_inputs(seeds=(2,), sound="separate")]
    metric = logit_diff(each([letter("a"), letter("b"), letter("c")]), each([letter("b"), letter("c"), letter("a")]))

    def plans(trace):
        return {"late": Plan(zero(Site("z", 3, 1, trace.spans.suffix))), "media": Plan(cut("suffix", "audio"))}

    grid = sweep([model.trace(x) for x in both], plans, metric)
    bound = metric.bind()
    for name, layer_plan in plans(model.trace(both[0])).items():
        wanted = [
            *measure(model, both[0], bound.chosen([0, 1]), plan=layer_plan).tolist(),
            *measure(model, both[1], bound.chosen([2]), plan=plans(model.trace(both[1]))[name]).tolist(),
        ]
        np.testing.assert_allclose(grid.values.sel(plan=name).values, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "metric", [METRIC, logit_diff(DOG, CAT), log_prob(letter("a"))], ids=["token", "tokens", "all"]
)
def test_an_interrupted_sweep_keeps_what_is_done(metric, monkeypatch):
    from av_lens.replay import stacks, traces

    monkeypatch.setattr(stacks, "STACK_ROWS", 30)
    monkeypatch.setattr(traces, "BLOCK", 5)
    trace, plans = small_model().trace(small_inputs()), head_plans()
    whole = sweep(trace, plans, metric)

    def stop(stage, done, total):
        assert "plans in" in stage
        assert total == len(plans) + 1
        if done >= 6:
            raise KeyboardInterrupt

    grid = sweep(trace, plans, metric, progress=stop)
    measured = ~np.isnan(grid.values.values)
    assert 0 < measured.sum() < measured.size
    np.testing.assert_allclose(grid.values.values[measured], whole.values.values[measured], atol=1e-5)
    assert grid.partial.startswith("interrupted: ")
    assert "interrupted" in repr(grid)


def test_patching_interrupted_keeps_what_is_done_and_nothing_done_stops():
    pairs = [avl.Pair(clean=small_inputs((i,)), corrupt=small_inputs((i + 1,))) for i in range(3)]
    whole = avl.patch(small_model(), pairs, metric=METRIC, stack=1)

    def stop(stage, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    grid = avl.patch(small_model(), pairs, metric=METRIC, stack=1, progress=stop)
    np.testing.assert_allclose(grid.values.values[:2], whole.values.values[:2], atol=1e-5)
    assert np.isnan(grid.values.values[2]).any()
    assert grid.partial

    def at_once(stage, done, total):
        raise KeyboardInterrupt

    trace = small_model().trace(small_inputs())
    spoiled = Plan(zero(Site("z", 1, 2, "suffix")))
    with pytest.raises(KeyboardInterrupt):
        sweep(trace, [spoiled], lambda logits: at_once("", 0, 0))


def test_the_estimate_is_made_before_anything_runs():
    trace = small_model().trace(small_inputs())
    n, suffix = len(trace.spans), len(trace.spans.suffix)
    schedule = trace.schedule(list(head_plans().values()))
    wanted = sum(4 * (4 - layer) * suffix for layer in range(4)) / (4 * n)
    assert schedule.forwards == pytest.approx(wanted)
    assert str(schedule).startswith("16 plans in 1 stacks: the work of about ")
    alone = trace.schedule([Plan(zero(Site("ln1", 1))), Plan()])
    assert "1 of them as full hooked forwards" in str(alone)
    tight = trace.schedule(list(head_plans().values()), budget_gb=1e-4)
    assert len(tight.stacks) > 1


def test_stacks_of_any_size_agree(monkeypatch):
    from av_lens.replay import stacks

    trace, plans = small_model().trace(small_inputs()), head_plans()
    whole = sweep(trace, plans, METRIC).values.values
    for rows in (1, 60, 100):
        monkeypatch.setattr(stacks, "STACK_ROWS", rows)
        np.testing.assert_allclose(sweep(trace, plans, METRIC).values.values, whole, atol=1e-5)


def test_only_asked_tokens_are_unembedded():
    trace = small_model().trace(small_inputs())
    bound, tokens = logit_diff([97, 99], [98, 100]).bind().few_tokens()
    logits = trace.logits()
    wanted = logit_diff([97, 99], [98, 100]).bind()(logits)
    torch.testing.assert_close(bound(logits[..., tokens]), wanted)
    assert len(tokens) == 4
    assert log_prob(letter("a")).bind().few_tokens()[1] is None


def test_bad_sweeps_are_refused_before_running():
    trace = small_model().trace(small_inputs())
    with pytest.raises(InputError, match="at least one plan"):
        sweep(trace, [], METRIC)
    with pytest.raises(InterventionError, match="layer 9 is past the end"):
        sweep(trace, [Plan(zero(Site("z", 1))), Plan(zero(Site("z", 9)))], METRIC)
    with pytest.raises(InputError, match=r"2 answers for|names 3 answers for 2 examples"):
        sweep(trace, [Plan()], logit_diff(each([letter("a"), letter("b"), letter("c")]), letter("d")))
    with pytest.raises(InputError, match="at least one trace"):
        sweep([], [Plan()], METRIC)


def test_watched_shows_bars_or_nothing(capsys):
    with watched(None) as show:
        show("x", 1, 2)
    with watched(True) as show:
        show("heads", 2, 2)
    assert "heads: 2 in" in capsys.readouterr().err


def test_a_metric_that_is_nan_is_refused_before_any_plan_runs():
    def nothing(logits):
        return logits[:, -1, 0] * float("nan")

    with pytest.raises(InputError, match=r"is NaN or infinite on the recorded run for 2 of 2 examples"):
        sweep(small_model().trace(small_inputs()), [Plan()], nothing)
    pair = avl.Pair(clean=small_inputs((0,)), corrupt=small_inputs((2,)))
    with pytest.raises(InputError, match=r"Mend the metric: a log of 0"):
        avl.patch(small_model(), pair, metric=nothing)
