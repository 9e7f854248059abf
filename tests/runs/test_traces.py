"""Replay equals the hooked full forward, for every kind of edit, component and position, and says so when it cannot."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from small_av import small_inputs, small_model
from tiny import letter, tiny_hf_model, tiny_processor

import av_lens as avl
from av_lens.core import run
from av_lens.errors import BudgetError, InputError, InterventionError
from av_lens.families.adapter import TowerBridge
from av_lens.interventions import Plan, Site, add, cut, mean, noise, replace, resample, scale, zero
from av_lens.metrics import logit_diff
from av_lens.replay import recording
from av_lens.replay.rerun import may_be_lean, recorded_lean

LAYOUTS = ("in_video", "separate")


@cache
def recorded(sound="in_video"):
    return small_model().trace(small_inputs(sound=sound))


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plans_of(x):
    """One plan for every component, kind of edit and kind of position."""
    suffix, n, b = x.spans.suffix, len(x.spans.suffix), len(x)
    everything = range(len(x.spans))
    return {
        "z zero, one head": Plan(zero(Site("z", 1, 2, suffix))),
        "z replaced, one head": Plan(replace(Site("z", 2, 1, suffix), draws(b, n, 16))),
        "z replaced, heads apart": Plan(replace(Site("z", 0, (3, 1), "generation"), draws(b, 1, 2, 16))),
        "z, scattered positions": Plan(scale(Site("z", 1, (0, 3), suffix.positions[[0, 3, 4]].tolist()), 2.0)),
        "z, audio": Plan(zero(Site("z", 1, 2, "audio"))),
        "z, a window of seconds": Plan(zero(Site("z", 1, 2, x.spans.audio.between(0.5, 1.0)))),
        "z, a box of the picture": Plan(zero(Site("z", 2, 2, x.spans.video.box(row=0, col=1)))),
        "z, everywhere": Plan(zero(Site("z", 1, 2))),
        "q": Plan(zero(Site("q", 1, 2, suffix))),
        "k": Plan(scale(Site("k", 1, 1, suffix), 2.0)),
        "v": Plan(add(Site("v", 1, positions="question"), draws(16))),
        "rot_q": Plan(noise(Site("rot_q", 1, 0, suffix), scale=0.5, seed=3)),
        "rot_k": Plan(noise(Site("rot_k", 2, 0, suffix), scale=0.5, seed=3)),
        "scores": Plan(scale(Site("scores", 2, 3, "generation"), 0.5)),
        "pattern": Plan(zero(Site("pattern", 2, 3, suffix))),
        "pattern replaced": Plan(replace(Site("pattern", 2, 3, "generation"), draws(1, 1, len(x.spans)).softmax(-1))),
        "result": Plan(zero(Site("result", 2, 3, suffix))),
        "attn_out": Plan(zero(Site("attn_out", 2, positions=suffix))),
        "resid_pre": Plan(replace(Site("resid_pre", 3, positions="generation"), draws(b, 1, 64))),
        "resid_mid": Plan(resample(Site("resid_mid", 1, positions=suffix), draws(5, n, 64), seed=2)),
        "resid_post": Plan(replace(Site("resid_post", 3, positions=suffix), draws(b, n, 64))),
        "mlp_in": Plan(scale(Site("mlp_in", 2, positions=suffix), draws(64))),
        "mlp_pre": Plan(zero(Site("mlp_pre", 3, positions=suffix))),
        "mlp_pre_linear": Plan(zero(Site("mlp_pre_linear", 2, positions="header"))),
        "mlp_post": Plan(mean(Site("mlp_post", 1, positions=suffix), draws(7, n, 128))),
        "mlp_out": Plan(zero(Site("mlp_out", 3, positions="generation"))),
        "embed": Plan(add(Site("embed", positions="audio"), draws(64))),
        "cut": Plan(cut("generated", "video", layers=[1, 2])),
        "cut, some heads": Plan(cut("question|generation", "audio|video", layers=[3], heads=[0, 3])),
        "cut without renormalising": Plan(cut("audio", "video", layers=[0, 1], renormalize=False)),
        "cut of all keys": Plan(cut("generation", everything, layers=[1], heads=1)),
        "several": Plan(
            [
                zero(Site("z", 1, 2, suffix)),
                cut("generated", "audio", layers=[3]),
                add(Site("resid_post", 0, positions="header"), draws(64)),
            ]
        ),
        "nothing": Plan(),
    }


@pytest.mark.parametrize("sound", LAYOUTS)
def test_replay_equals_the_hooked_full_forward(sound):
    trace = recorded(sound)
    assert trace.hooked_because == ""
    model, x = trace.model, trace.x
    plans = plans_of(x)
    base = run(model, x, logits_at="all").logits.detach()
    stacked = trace.replay(list(plans.values()), logits_at="all")
    at_end = trace.replay(list(plans.values()))
    for number, (name, plan) in enumerate(plans.items()):
        whole = run(model, x, plan=plan, logits_at="all").logits.detach()
        torch.testing.assert_close(
            stacked[number], whole, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        torch.testing.assert_close(at_end[number], whole[:, -1:], atol=1e-5, rtol=0)
        changed = float((whole - base).abs().max())
        assert changed > 1e-3 or name == "nothing", f"{name} changes nothing, so that its agreement proves nothing"


@pytest.mark.slow
def test_random_plans_of_several_edits_replay_exactly():
    trace = recorded()
    model, x = trace.model, trace.x
    rng = np.random.default_rng(0)
    pool = [edit for plan in plans_of(x).values() for edit in plan]
    for _ in range(40):
        plan = Plan([pool[i] for i in rng.choice(len(pool), size=int(rng.integers(2, 5)), replace=False)])
        whole = run(model, x, plan=plan, logits_at="suffix").logits.detach()
        torch.testing.assert_close(trace.replay(plan, logits_at="suffix")[0], whole, atol=1e-5, rtol=0)


def test_firing_records_of_replay_are_those_of_a_full_forward():
    trace = recorded()
    for plan in plans_of(trace.x).values():
        compiled = plan.compile(trace.model.spec, trace.spans, batch=trace.batch)
        trace.replay(compiled)
        assert compiled.fired == run(trace.model, trace.x, plan=plan).fired


def test_an_edit_after_everything_asked_must_fire_too():
    trace = recorded()
    compiled = Plan(zero(Site("z", 1, 2, "generation"))).compile(trace.model.spec, trace.spans)
    logits = trace.replay(compiled, logits_at="question")
    torch.testing.assert_close(logits[0], trace.logits("question"))
    assert compiled.fired == {(0, "blocks.1.attn.hook_z"): 1}


def test_the_towers_never_run_again(monkeypatch):
    trace = recorded()

    def never(tower, *args, **kwargs):
        raise AssertionError("a tower ran during replay")

    monkeypatch.setattr(TowerBridge, "forward", never)
    trace.replay([Plan(zero(Site("z", 0, 0))), Plan(zero(Site("resid_pre", 0, positions="audio")))])


def test_a_batch_and_single_prompts_agree():
    trace = recorded()
    model = trace.model
    plan = Plan([zero(Site("z", 1, 2, "suffix")), cut("generated", "video", layers=[2])])
    both = trace.replay(plan)[0]
    for i in range(2):
        torch.testing.assert_close(model.trace(trace.x[i]).replay(plan)[0, 0], both[i], atol=1e-5, rtol=0)


def test_the_recorded_run_is_never_changed():
    trace = recorded()
    before = [t.clone() for t in (*trace.resid, *trace.keys, *trace.values)]
    trace.replay(list(plans_of(trace.x).values()))
    assert all(torch.equal(a, b) for a, b in zip(before, (*trace.resid, *trace.keys, *trace.values), strict=True))


def test_a_component_without_restart_runs_hooked_and_is_exact():
    trace = recorded()
    plan = Plan(zero(Site("ln1", 1, positions="suffix")))
    whole = run(trace.model, trace.x, plan=plan).logits.detach()
    torch.testing.assert_close(trace.replay(plan)[0], whole, atol=1e-6, rtol=0)
    assert not torch.allclose(whole, trace.logits(), atol=1e-3)


def test_hooks_left_on_the_model_are_noticed_and_replays_run_hooked():
    model, x = small_model(), small_inputs()
    with model.hooks(fwd_hooks=[("blocks.2.hook_mlp_out", lambda activation, hook: activation * 0)]):
        trace = model.trace(x)
        plan = Plan(zero(Site("z", 1, 2, "suffix")))
        assert trace.hooked_because == "hooks stand at blocks.2.mlp.hook_out, and a restart would pass them by"
        whole = run(model, x, plan=plan).logits.detach()
        torch.testing.assert_close(trace.replay(plan)[0], whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sound", LAYOUTS)
def test_records_made_without_hooks_equal_those_made_with_them(sound):
    model = avl.load("tiny", hf_model=tiny_hf_model(), processor=tiny_processor())
    x = small_inputs(sound=sound)
    first = model.trace(x)  # proves, by a hooked run, that a restart reproduces the run
    assert may_be_lean(model)
    hooked, _ = recording.recorded(model, x, None)
    lean, _ = recorded_lean(model, x, None)
    for name in ("resid", "keys", "values"):
        for with_hooks, without in zip(hooked[name], lean[name], strict=True):
            torch.testing.assert_close(without, with_hooks, atol=1e-5, rtol=0)
        # Which record was a model's first does not show: a run that is resumed has the bits of one that never stopped.
        assert all(torch.equal(one, again) for one, again in zip(getattr(first, name), lean[name], strict=True))
    assert lean["mask"] is None
    plan = Plan(zero(Site("z", 1, 2, "suffix")))
    assert torch.equal(model.trace(x).replay(plan), first.replay(plan))
    assert not may_be_lean(model.compatible())  # other numerics are proved anew


def test_other_numerics_restart_too():
    """HookedTransformer's numerics (folded norms), and bfloat16 within its own rounding."""
    plan, x = Plan(zero(Site("z", 1, 2, "suffix"))), small_inputs()
    folded = small_model().compatible()
    trace = folded.trace(x)
    assert trace.hooked_because == ""
    torch.testing.assert_close(trace.replay(plan)[0], run(folded, x, plan=plan).logits.detach(), atol=1e-5, rtol=0)
    coarse = avl.load("tiny", hf_model=tiny_hf_model(dtype=torch.bfloat16), processor=tiny_processor())
    trace = coarse.trace(x)
    assert trace.hooked_because == ""
    whole, base = (run(coarse, x, plan=p).logits.detach().float() for p in (plan, None))
    gap = (trace.replay(plan)[0].float() - whole).abs().max()
    assert float(gap) < 0.1 * float((whole - base).abs().max())


def test_score_keeps_one_number_for_each_plan_and_example():
    trace = recorded()
    plans = list(plans_of(trace.x).values())
    metric = logit_diff(letter("a"), letter("b")).bind()
    wanted = torch.stack([metric(logits) for logits in trace.replay(plans)])
    torch.testing.assert_close(trace.score(plans, metric, budget_gb=0.001), wanted, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match=r"Leave out the mean"):
        trace.score(plans[:1], lambda logits: logits.mean())


def test_what_does_not_fit_is_refused_before_running():
    trace = recorded()
    with pytest.raises(InterventionError, match=r"layer 9 is past the end"):
        trace.replay([Plan(zero(Site("z", 1))), Plan(zero(Site("z", 9)))])
    with pytest.raises(BudgetError, match=r"Use trace.score\(plans, metric\)"):
        trace.replay([Plan()] * 200, logits_at="all", budget_gb=1e-4)
    with pytest.raises(BudgetError, match=r"a trace of 2 examples x"):
        trace.model.trace(trace.x, budget_gb=1e-6)
    for start in (-1, len(trace.spans)):
        with pytest.raises(InputError, match=rf"a run of \d+ positions has no position {start} to restart at"):
            trace.window(start)
