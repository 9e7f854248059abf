"""Plans: the firing record is right, and a hook that does not fire raises."""

from __future__ import annotations

import pytest
import torch
from small_av import small_inputs, small_model

from av_lens.core import run
from av_lens.errors import InterventionError
from av_lens.interventions import Plan, Site, add, cut, noise, resample, zero


def test_an_edit_that_never_fires_raises():
    model, x = small_model(), small_inputs()
    compiled = Plan(zero(Site("z", 1, head=2))).compile(model.spec, x.spans)
    with pytest.raises(InterventionError, match=r"edit 0 at blocks.1.attn.hook_z fired 0 times, expected 1"):
        compiled.verify()
    hook = dict(compiled.fwd_hooks)["blocks.1.attn.hook_z"]
    hook(torch.zeros(2, len(x.spans), 4, 16))
    compiled.verify()
    with pytest.raises(InterventionError, match=r"fired 1 times, expected 3"):
        compiled.verify(decode_steps=2)


def test_a_compiled_plan_serves_one_run_and_one_length():
    model, x = small_model(), small_inputs()
    compiled = Plan(zero(Site("z", 1))).compile(model.spec, x.spans)
    hook = dict(compiled.fwd_hooks)["blocks.1.attn.hook_z"]
    with pytest.raises(InterventionError, match=r"compiled for a prompt of"):
        hook(torch.zeros(2, 5, 4, 16))
    hook(torch.zeros(2, len(x.spans), 4, 16))
    with pytest.raises(InterventionError, match=r"serves one run"):
        hook(torch.zeros(2, len(x.spans), 4, 16))


def test_edits_at_one_hook_are_applied_in_order():
    model, x = small_model(), small_inputs()
    site = Site("z", 1, head=2, positions="generation")
    one = torch.ones(16)
    first = run(model, x, plan=Plan([zero(site), add(site, one)]), capture=[site]).cache["z", 1]
    last = run(model, x, plan=Plan([add(site, one), zero(site)]), capture=[site]).cache["z", 1]
    assert torch.equal(first, torch.ones(2, 1, 1, 16))
    assert float(last.detach().abs().max()) == 0.0


def test_noise_and_resampling_depend_on_the_seed_alone():
    model, x = small_model(), small_inputs()
    site = Site("resid_mid", 1, positions="suffix")
    values = torch.randn(5, len(x.spans.suffix), 64, generator=torch.Generator().manual_seed(1))

    def logits(edit):
        torch.manual_seed(int(torch.randint(0, 100, ()).item()))
        return run(model, x, plan=Plan(edit)).logits.detach()

    for make in (lambda seed: noise(site, scale=0.5, seed=seed), lambda seed: resample(site, values, seed=seed)):
        assert torch.equal(logits(make(3)), logits(make(3)))
        assert not torch.allclose(logits(make(3)), logits(make(4)))


def test_the_global_generator_is_untouched():
    model, x = small_model(), small_inputs()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    run(model, x, plan=Plan(noise(Site("z", 1), scale=1.0, seed=3)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_generation_fires_in_the_prompt_and_at_every_decoding_step():
    model, x = small_model(), small_inputs((0,))
    plan = Plan(
        [
            cut("generated", "video", layers=[1]),
            zero(Site("z", 2, head=0)),
            zero(Site("z", 3, head=0, positions="suffix")),
            zero(Site("z", 0, head=1, positions="generated")),
        ]
    )
    out = model.generate(x, max_new_tokens=4, plan=plan, return_type="result", eos_token_id=None)
    assert out.tokens.shape[1] == len(x.spans) + 4
    assert out.fired == {
        (0, "blocks.1.attn.hook_attn_scores"): 4,
        (0, "blocks.1.attn.hook_pattern"): 4,
        (1, "blocks.2.attn.hook_z"): 4,
        (2, "blocks.3.attn.hook_z"): 1,
        (3, "blocks.0.attn.hook_z"): 3,
    }


def test_a_decoded_token_under_a_plan_equals_one_long_forward_under_it():
    """Cached decoding with a cut and an edit on generated positions is the prompt with the tokens in it."""
    model, x = small_model(), small_inputs((0,))
    plan = Plan([cut("generated", "audio", layers=[1, 2]), zero(Site("z", 2, head=0, positions="generated"))])
    out = model.generate(x, max_new_tokens=3, plan=plan, return_type="result", eos_token_id=None)
    new = out.tokens[:, len(x.spans) :]
    longer = x.continued(new[:, :-1])
    whole = run(model, longer, plan=plan, logits_at="generation|generated").logits.detach()
    torch.testing.assert_close(out.logits, whole, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, run(model, longer, logits_at="generation|generated").logits.detach(), atol=1e-4)
