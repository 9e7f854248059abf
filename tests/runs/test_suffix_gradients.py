"""Gradients of a restart equal those of the hooked full forward, at every component, in both layouts."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from small_av import small_inputs, small_model
from tiny import letter

from av_lens.errors import BudgetError, InputError, InterventionError
from av_lens.families.decoder import COMPONENTS, hook_name
from av_lens.inputs.answers import Answer
from av_lens.interventions import Plan, Site, add, cut, replace, scale, zero
from av_lens.metrics import kl, log_prob, logit_diff, measure, rank
from av_lens.replay.rerun import RESTARTABLE

LAYOUTS = ("in_video", "separate")
METRIC = logit_diff(letter("a"), letter("b"))
RESTARTED = tuple(sorted(RESTARTABLE))


@cache
def recorded(sound="in_video"):
    return small_model().trace(small_inputs(sound=sound))


def of_full_forward(trace, sites, plan=None, rows=slice(-1, None)):
    """Activations kept in one hooked forward with gradients, and the metric's gradient there."""
    model, x = trace.model, trace.x
    kept = {}

    def keep(name):
        def fn(activation, hook):
            kept[name] = activation
            return activation

        return fn

    names = [hook_name(site.component, site.layer) for site in sites]
    hooks = plan.compile(model.spec, x.spans, batch=len(x)).fwd_hooks if plan else []
    with torch.enable_grad():
        logits = model.run_with_hooks(x, fwd_hooks=[*hooks, *((name, keep(name)) for name in dict.fromkeys(names))])
        metric = METRIC.bind()(logits[:, rows])
        grads = torch.autograd.grad(metric.sum(), [kept[name] for name in names])
    return [
        (part(site, trace, grad), part(site, trace, kept[name].detach()))
        for site, name, grad in zip(sites, names, grads, strict=True)
    ]


def part(site, trace, activation):
    """The site's own positions and heads, positions before heads."""
    seen = activation.transpose(1, 2) if site.heads_first else activation
    if site.positions is not None:
        seen = seen[:, trace.spans[site.positions].positions.tolist()]
    return seen if site.heads is None else seen[:, :, list(site.heads)]


def agree(trace, sites, plan=None):
    found = trace.gradients(sites, METRIC, plan=plan)
    for i, (site, (gradient, value)) in enumerate(zip(sites, of_full_forward(trace, sites, plan), strict=True)):
        assert float(gradient.abs().max()) > 1e-5, f"{site} has no gradient, so that agreement proves nothing"
        for got, wanted in ((found.gradient[i], gradient), (found.value[i], value)):
            wanted = wanted.masked_fill(wanted < -1e30, 0.0)
            got = got.masked_fill(got < -1e30, 0.0)
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4, msg=lambda text, site=site: f"{site}: {text}")
    return found


def sites_at(component, positions, layers=(0, 2, 3)):
    if not COMPONENTS[component].layered:
        return [Site(component, positions=positions)]
    return [Site(component, layer, positions=positions) for layer in layers]


@pytest.mark.parametrize("sound", LAYOUTS)
def test_gradients_equal_those_of_the_hooked_full_forward_at_every_component(sound):
    trace = recorded(sound)
    assert trace.hooked_because == ""
    agree(trace, [site for component in RESTARTED for site in sites_at(component, "suffix")])


@pytest.mark.parametrize("component", ["ln1", "ln2_scale", "q_input", "final", "embed_text"])
def test_components_without_restart_run_hooked_and_agree(component):
    agree(recorded(), sites_at(component, "suffix", (1,)))


def test_parts_of_a_component_early_positions_and_late_sites_beside_early_ones():
    sites = [
        Site("z", 1, 2, "audio"),
        Site("z", 2, (3, 1), "question|generation"),
        Site("resid_pre", 0),
        Site("v", 2, 1, "video"),
        Site("pattern", 3, (0, 3), "generation"),
        Site("z", 3, 0, "suffix"),
    ]
    found = agree(recorded(), sites)
    assert [tuple(gradient.shape[2:]) for gradient in found.gradient] == [
        (1, 16),
        (2, 16),
        (64,),
        (1, 16),
        (2, 128),
        (1, 16),
    ]
    assert found.positions[1] == tuple(recorded().spans["question|generation"].positions.tolist())


def test_with_a_plan_the_edited_run_is_differentiated():
    trace = recorded()
    sites = [Site("z", layer, positions="suffix") for layer in range(4)]
    draws = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    plan = Plan(
        [
            scale(Site("z", 1, 2, "suffix"), -2.0),
            replace(Site("resid_post", 0, positions="header"), draws),
            zero(Site("mlp_post", 2, positions="suffix")),
            cut("generated", "video", layers=[2]),
        ]
    )
    edited, plain = agree(trace, sites, plan), trace.gradients(sites, METRIC)
    assert not torch.allclose(edited.gradient[3], plain.gradient[3], atol=1e-3)
    torch.testing.assert_close(
        edited.value[1][:, :, 2], -2.0 * agree(trace, sites, Plan(list(plan)[1:])).value[1][:, :, 2]
    )


def test_a_gradient_is_what_small_changes_do():
    """Central differences of replayed edits: the steepest way, and with half of the units turned about."""
    trace = recorded()
    site = Site("resid_pre", 1, positions="question")
    found = trace.gradients(site, METRIC)
    steepest = found.gradient[0].sign()
    half = steepest * torch.where(torch.arange(64) % 2 == 0, 1.0, -0.5)
    step = 3e-3
    for direction in (steepest, half):
        up, down = trace.score([Plan(add(site, step * direction)), Plan(add(site, -step * direction))], METRIC)
        wanted = (found.gradient[0] * direction).sum((1, 2))
        assert float(wanted.abs().min()) > 0.1
        torch.testing.assert_close((up - down) / (2 * step), wanted, atol=0, rtol=5e-3)
    torch.testing.assert_close(found.metric, trace.score([Plan()], METRIC)[0], atol=1e-5, rtol=0)


def test_other_metrics_and_asked_positions():
    trace = recorded()
    site = Site("z", 1, positions="question")
    reference = trace.logits("suffix").roll(1, 0)

    def spread(logits):
        return logits.std((1, 2))

    for metric in (log_prob(letter("a")), kl(reference), spread):
        found = trace.gradients(site, metric, logits_at="suffix")
        leaf = found.value[0].clone().requires_grad_()
        plan = Plan(replace(site, leaf)).compile(trace.model.spec, trace.spans, batch=2)
        with torch.enable_grad():
            logits = trace.model.run_with_hooks(trace.x, fwd_hooks=plan.fwd_hooks)
            asked = logits[:, trace.spans.suffix.positions.tolist()]
            measured = metric(asked) if metric is spread else metric.bind()(asked)
            wanted = torch.autograd.grad(measured.sum(), leaf)[0]
        assert float(wanted.abs().max()) > 1e-5
        torch.testing.assert_close(found.gradient[0], wanted, atol=1e-5, rtol=1e-4)


def test_where_nothing_asked_follows_the_gradient_is_zero_and_the_value_is_there():
    trace = recorded()
    late, beside = Site("z", 2, 1, "generation"), Site("z", 3, 0, "question")
    found = trace.gradients(late, METRIC, logits_at="question")
    assert not found.gradient[0].any()
    assert found.value[0].any()
    both = trace.gradients([late, beside], METRIC)
    assert not both.gradient[1].any()
    assert both.gradient[0].any()


def test_a_batch_and_single_prompts_agree():
    trace = recorded()
    sites = [Site("z", 2, positions="suffix"), Site("rot_k", 1, positions="audio")]
    both = trace.gradients(sites, METRIC)
    alone = trace.model.trace(trace.x[1]).gradients(sites, METRIC)
    for whole, one in zip(both.gradient, alone.gradient, strict=True):
        torch.testing.assert_close(whole[1:], one, atol=1e-5, rtol=1e-4)


def test_weights_collect_nothing_and_the_record_stays():
    trace = recorded()
    parameters = list(trace.model.hf_model.parameters())
    assert all(parameter.requires_grad for parameter in parameters)
    for parameter in parameters:
        parameter.grad = None  # other tests of the shared model may have left theirs
    before = [tensor.clone() for tensor in (*trace.resid, *trace.keys, *trace.values)]
    with torch.no_grad():
        trace.gradients([Site("embed"), Site("ln1", 1)], METRIC)
        found = trace.gradients([Site("embed"), Site("z", 1)], METRIC)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)
    kept = (*trace.resid, *trace.keys, *trace.values)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, kept, strict=True))
    assert not any(tensor.requires_grad for tensor in (*found.gradient, *found.value, found.metric))


def test_a_trace_that_cannot_restart_differentiates_hooked():
    model, x = small_model(), small_inputs()
    sites = [Site("z", 1, positions="suffix"), Site("mlp_out", 1, positions="suffix")]
    with model.hooks(fwd_hooks=[("blocks.2.hook_mlp_out", lambda activation, hook: activation * 0.5)]):
        trace = model.trace(x)
        assert "hooks stand at blocks.2.mlp.hook_out" in trace.hooked_because
        agree(trace, sites)


@pytest.mark.parametrize("plan", [None, Plan(zero(Site("z", 0, head=1, positions="suffix")))])
def test_answers_of_several_tokens_are_differentiated_after_the_prompt(plan):
    """Against one hooked forward for each answer, whose gradients add up."""
    trace, sites = recorded(), [Site("z", 1, positions="suffix"), Site("k", 2, positions="audio"), Site("resid_pre", 0)]
    model, x, answers = trace.model, trace.x, {1: (70, 71, 72), -1: (75, 76)}
    metric = logit_diff(*(Answer("word", (ids,)) for ids in answers.values()))
    metric = dataclasses.replace(metric.bind(), summed=True)
    wanted = [0.0, 0.0, 0.0]
    for sign, ids in answers.items():
        longer, kept = x.continued(torch.tensor([ids[:-1]]).expand(len(x), -1)), {}
        names = [hook_name(site.component, site.layer) for site in sites]
        hooks = plan.compile(model.spec, longer.spans, batch=len(x)).fwd_hooks if plan else []
        looks = [(name, lambda value, hook, at=name, kept=kept: kept.setdefault(at, value)) for name in names]
        with torch.enable_grad():
            logits = model.run_with_hooks(longer, fwd_hooks=[*hooks, *looks])[:, -len(ids) :].log_softmax(-1)
            total = sum(logits[:, i, token].sum() for i, token in enumerate(ids))
            grads = torch.autograd.grad(sign * total, [kept[name] for name in names])
        for i, (site, grad) in enumerate(zip(sites, grads, strict=True)):
            wanted[i] = wanted[i] + part(site, trace, grad)[:, : len(x.spans)]
    found = trace.gradients(sites, metric, plan=plan)
    for got, want in zip(found.gradient, wanted, strict=True):
        assert float(want.abs().max()) > 1e-5
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.metric, measure(model, x, metric, plan=plan), atol=1e-5, rtol=0)


def test_what_has_no_gradient_is_refused():
    trace, site = recorded(), Site("z", 1, positions="suffix")
    with pytest.raises(InputError, match=r"several tokens, .* where no restart is possible .*Use answers of one token"):
        trace.gradients(Site("ln1", 1, positions="suffix"), log_prob(Answer("dog", ((70, 71),))))
    with pytest.raises(InputError, match=r"a rank has no gradient. Use logit_diff"):
        trace.gradients(site, rank(letter("a")))
    with pytest.raises(InputError, match="has no gradient: it was taken of detached logits"):
        trace.gradients(site, lambda logits: logits.detach()[:, -1, 0])
    with pytest.raises(InputError, match="Leave out the mean"):
        trace.gradients(site, lambda logits: logits.mean())
    with pytest.raises(InterventionError, match="layer 9 is past the end"):
        trace.gradients(Site("z", 9), METRIC)
    with pytest.raises(InterventionError, match="positions that only decoding adds"):
        trace.gradients(Site("z", 1, positions="generated"), METRIC)
    with pytest.raises(
        BudgetError, match=r"a backward pass through 3 layers at 128 positions of 2 examples needs about"
    ):
        trace.gradients(Site("z", 1), METRIC, budget_gb=1e-3)
    parameters = trace.model.hf_model.parameters()
    assert all(parameter.requires_grad for parameter in parameters)
