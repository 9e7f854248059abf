"""One run: what it keeps, what it refuses; measuring answers of one and several tokens in the model."""

from __future__ import annotations

import pytest
import torch
from small_av import small_inputs, small_model
from tiny import letter

from av_lens.core import run
from av_lens.errors import BudgetError, InputError, InterventionError
from av_lens.inputs.answers import Answer
from av_lens.interventions import Plan, Site, replace, zero
from av_lens.metrics import log_prob, logit_diff, measure, rank
from av_lens.replay import measure_plans

DOG, SIREN = Answer("dog", ((70, 71, 72),)), Answer("siren", ((75, 76),))


def test_captures_equal_the_cache_and_slices_equal_slices():
    model, x = small_model(), small_inputs()
    logits, cache = model.run_with_cache(x)
    at = x.spans.generation_position
    out = run(
        model,
        x,
        capture=["resid_post", Site("z", 1, head=2, positions="generation"), Site("pattern", 0, head=(0, 3))],
        logits_at="all",
    )
    torch.testing.assert_close(out.logits, logits)
    for layer in range(4):
        assert torch.equal(out.cache["resid_post", layer], cache["resid_post", layer])
    assert torch.equal(out.cache["z", 1], cache["z", 1][:, [at]][:, :, [2]])
    assert torch.equal(out.cache["pattern", 0], cache["pattern", 0][:, [0, 3]])
    assert torch.equal(
        run(model, x, capture=lambda name: name.endswith("2.hook_mlp_out")).cache["mlp_out", 2], cache["mlp_out", 2]
    )


def test_asked_positions_are_those_of_the_full_logits():
    model, x = small_model(), small_inputs()
    whole = model(x)
    out = run(model, x, logits_at="question|generation")
    assert out.asked == (*x.spans.question.positions.tolist(), x.spans.generation_position)
    torch.testing.assert_close(out.logits, whole[:, list(out.asked)])
    assert run(model, x).logits.shape[1] == 1


def test_a_capture_sees_what_the_plan_wrote():
    model, x = small_model(), small_inputs()
    value = torch.full((1, 1, 16), 0.25)
    site = Site("z", 1, head=2, positions="generation")
    out = run(model, x, plan=Plan(replace(site, value)), capture=[site])
    assert torch.equal(out.cache["z", 1], torch.full((2, 1, 1, 16), 0.25))


def test_gradients_reach_an_edits_value():
    model, x = small_model(), small_inputs()
    value = torch.zeros(2, 1, 16, requires_grad=True)
    out = run(model, x, plan=Plan(replace(Site("z", 1, head=2, positions="generation"), value)))
    out.logits[:, -1, 5].sum().backward()
    assert value.grad is not None
    assert float(value.grad.abs().min()) > 0


def test_unknown_captures_and_huge_ones_are_refused_before_running():
    model, x = small_model(), small_inputs()
    with pytest.raises(InterventionError, match=r"unknown component or hook 'patern'. Did you mean 'pattern'"):
        run(model, x, capture="patern")
    with pytest.raises(BudgetError, match=r"beyond budget_gb=1e-06"):
        run(model, x, capture="pattern", budget_gb=1e-6)
    with pytest.raises(BudgetError, match=r"the captured sites need about .* Name fewer layers"):
        run(model, x, capture=[Site("result", 1)], budget_gb=1e-4)
    with pytest.raises(InterventionError, match=r"names blocks.1.attn.hook_z twice"):
        run(model, x, capture=[Site("z", 1, head=0), Site("z", 1, head=1)])


def test_several_tokens_are_scored_as_their_own_product_of_probabilities():
    """The chain rule by hand: each token's log-probability after the prompt and the tokens before it."""
    model, x = small_model(), small_inputs()
    wanted = torch.zeros(2)
    tokens = torch.tensor([[70, 71, 72]] * 2)
    for i in range(3):
        longer = x if i == 0 else x.continued(tokens[:, :i])
        with torch.no_grad():
            wanted += model(longer)[:, -1].log_softmax(-1)[:, tokens[0, i]]
    torch.testing.assert_close(measure(model, x, log_prob(DOG)), wanted, atol=1e-5, rtol=0)
    assert float(measure(model, x, rank(DOG)).min()) >= 0


def test_plans_measured_by_replay_equal_plans_measured_by_full_forwards():
    model, x = small_model(), small_inputs()
    plans = [Plan(), Plan(zero(Site("z", 1, 2, "suffix"))), Plan(zero(Site("mlp_out", 2)))]
    trace = model.trace(x)
    for metric in (logit_diff(letter("a"), letter("b")), logit_diff(DOG, SIREN), log_prob([70, 75])):
        found = measure_plans(trace, plans, metric)
        wanted = torch.stack([measure(model, x, metric, plan=plan) for plan in plans])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert float((found[1:] - found[0]).abs().min()) > 1e-4


def test_a_scalar_metric_is_refused():
    with pytest.raises(InputError, match=r"Leave out the mean"):
        measure(small_model(), small_inputs(), lambda logits: logits[:, -1, 3].mean())
