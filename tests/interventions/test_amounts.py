"""Factors and deviations: in the activation's own precision, and never opening an edge that the mask forbids."""

from __future__ import annotations

import pytest
import torch
from small_av import small_inputs, small_model
from tiny import tiny_hf_model, tiny_processor

import av_lens as avl
from av_lens.core import run
from av_lens.interventions import Plan, Site, noise, scale, zero


def test_amounts_take_the_precision_of_the_activation():
    """Given in float32, at scattered positions of a bfloat16 run, where torch casts nothing by itself."""
    model = avl.load("tiny", hf_model=tiny_hf_model(dtype=torch.bfloat16), processor=tiny_processor())
    x = small_inputs()
    site = Site("z", 1, (3, 1), x.spans.suffix.positions[[0, 3, 4]].tolist())
    scaled, same = (run(model, x, plan=Plan(scale(site, factor))).logits for factor in (torch.full((16,), 0.5), 0.5))
    assert torch.equal(scaled, same)
    noisy, again = (run(model, x, plan=Plan(noise(site, scale=size))).logits for size in (torch.full((16,), 0.5), 0.5))
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, scaled)


@pytest.mark.parametrize("factor", [-1.0, 0.0, 2.0, -3.0])
def test_scaled_scores_leave_forbidden_edges_forbidden(factor: float):
    """The mask's number times a factor is another number: infinite, zero, or the greatest of all."""
    model, x = small_model(), small_inputs()
    n = len(x.spans)
    plan = Plan(scale(Site("scores", 1, (0, 2)), torch.full((n,), factor)))
    out = run(model, x, plan=plan, capture=["pattern", "rot_q", "rot_k"])
    pattern, q, k = (out.cache[name, 1].detach() for name in ("pattern", "rot_q", "rot_k"))
    assert float(pattern.triu(1).abs().max()) == 0.0
    for head in (0, 2):
        scores = q[:, :, head] @ k[:, :, head // 2].transpose(-1, -2) / 16**0.5 * factor
        wanted = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        torch.testing.assert_close(pattern[:, head], wanted, atol=1e-5, rtol=0)


def test_zeroed_scores_read_every_allowed_key_alike():
    model, x = small_model(), small_inputs()
    out = run(model, x, plan=Plan(zero(Site("scores", 1, 2))), capture="pattern")
    pattern, n = out.cache["pattern", 1][:, 2], len(x.spans)
    wanted = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    torch.testing.assert_close(pattern, wanted.expand_as(pattern), atol=1e-6, rtol=0)
