"""Generation from a trace says, token for token, what generation from the prompt says under the same plan."""

from __future__ import annotations

from dataclasses import replace as changed
from functools import cache

import pytest
import torch
from small_av import small_inputs, small_model
from test_traces import LAYOUTS, draws, plans_of, recorded

import av_lens as avl
from av_lens.core import run
from av_lens.core.calls import heads_first
from av_lens.errors import InputError, InterventionError
from av_lens.families.adapter import TowerBridge
from av_lens.families.decoder import hook_name
from av_lens.interventions import Plan, Site, add, cut, noise, scale, zero
from av_lens.replay import continuation
from av_lens.replay.stacks import restarted

ENDLESS = {"eos_token_id": None}  # a random model may end at once


def decoding_plans():
    """Edits that act on every token that decoding adds."""
    return {
        "z, while decoding too": Plan(scale(Site("z", 1, 2), -3.0)),
        "noise, while decoding too": Plan(noise(Site("resid_pre", 0), scale=0.2, seed=1)),
        "embed, while decoding too": Plan(scale(Site("embed"), 3.0)),
        "steering every position": Plan(add(Site("resid_post", 1), draws(64))),
        "keys while decoding": Plan(scale(Site("rot_k", 2, 0), 3.0)),
        "result while decoding": Plan(scale(Site("result", 3), 5.0)),
        "only after the prompt": Plan(cut("generated", "video|question", layers=[0, 1, 2], include_generation=False)),
        "pattern after the prompt": Plan(scale(Site("pattern", 3, positions="generated"), 4.0)),
        "two kinds": Plan([zero(Site("z", 2, 1, "suffix")), scale(Site("mlp_out", 3), -2.0)]),
    }


def agree(trace, plans, n=12, **options):
    """Both ways give equal tokens, texts, firings, and logits to 1e-4."""
    found = trace.generate(plans, max_new_tokens=n, **options)
    for plan, one in zip(plans, found, strict=True):
        wanted = trace.model.generate(trace.x, plan=plan, max_new_tokens=n, return_type="result", **options)
        name = [f"{type(edit).__name__} {getattr(edit, 'site', edit)}" for edit in plan]
        assert torch.equal(one.tokens, wanted.tokens), name
        assert one.text == wanted.text
        assert one.fired == wanted.fired, name
        torch.testing.assert_close(one.logits, wanted.logits, atol=1e-4, rtol=0)
    return found


@pytest.mark.parametrize("sound", LAYOUTS)
def test_greedy_tokens_equal_those_of_generation_from_the_prompt(sound):
    trace = recorded(sound)
    assert trace.hooked_because == ""
    plans = plans_of(trace.x) | decoding_plans()
    found = agree(trace, list(plans.values()), n=8, **ENDLESS)
    n = len(trace.spans)
    assert found[0].tokens.shape == (2, n + 8)
    assert found[0].logits.shape == (2, 8, 266)
    assert len({tuple(one.tokens[:, n:].flatten().tolist()) for one in found}) > 10, (
        "the plans must not all say the same"
    )
    assert sum(found[list(plans).index("z, while decoding too")].fired.values()) == 8


def test_sequences_end_where_huggingface_ends_them():
    """An end for each plan and example at its own step, pads after it, and firings counted to the plan's own end."""
    trace = recorded()
    n = len(trace.spans)
    plans = [*decoding_plans().values(), Plan(), *list(plans_of(trace.x).values())[:6]]
    free = trace.generate(plans, max_new_tokens=10, return_type="tokens", **ENDLESS)
    ends = sorted({int(tokens[i, n + place]) for tokens in free for i, place in ((0, 2), (1, 5))})[:6]
    found = agree(trace, plans, n=10, eos_token_id=ends, pad_token_id=7)
    lengths = {one.tokens.shape[1] - n for one in found}
    assert len(lengths) > 2, lengths
    padded = [one.tokens[i, n:].tolist() for one in found for i in range(2) if int(one.tokens[i, -1]) == 7]
    assert any(len(row) > row.index(7) > 0 and set(row[row.index(7) :]) == {7} for row in padded if 7 in row)
    steps = [one.tokens.shape[1] - n for one, plan in zip(found, plans, strict=True) if plan is plans[0]]
    assert list(found[0].fired.values()) == steps


def test_huggingfaces_treatment_of_logits_and_lengths():
    trace = recorded()
    plans = [Plan(), Plan(zero(Site("z", 1, 2, "suffix")))]
    n = len(trace.spans)
    free = trace.generate(plans, max_new_tokens=8, return_type="tokens", **ENDLESS)
    end = int(free[0][0, n])
    for options in (
        {"repetition_penalty": 1.7, **ENDLESS},
        {"no_repeat_ngram_size": 1, **ENDLESS},
        {"min_new_tokens": 5, "eos_token_id": end},
        {"suppress_tokens": [end], **ENDLESS},
    ):
        found = agree(trace, plans, n=8, **options)
        assert not torch.equal(found[0].tokens, free[0]), f"{options} change nothing, so that agreement proves nothing"


@cache
def organism():
    model = avl.load("av-tiny")
    clips = [avl.organism.clip(word, seed=i) for i, word in enumerate(("dog", "drum"))]
    return model.trace(avl.AVInputs.stack([model.encode(clip, "What do you hear?") for clip in clips]))


def test_an_organism_answers_alike():
    trace = organism()
    plans = [
        Plan(),
        Plan([zero(Site("z", layer, positions="suffix")) for layer in (1, 2)]),
        Plan(cut("generated", "audio")),
        Plan(zero(Site("z", 1))),
    ]
    agree(trace, plans, n=8)
    found = agree(trace, plans, n=12, **ENDLESS)
    assert len({one.text for one in found}) > 1


@pytest.mark.parametrize("n_own", [0, 12])
def test_the_prefix_is_neither_run_again_nor_copied(n_own, monkeypatch):
    trace = recorded()
    n = len(trace.spans)
    positions = range(n - n_own, n) if n_own else "generated"
    plans = [Plan(scale(Site("z", layer, 0, positions), 2.0)) for layer in (0, 1, 2)]
    rows = []

    model = trace.model
    projection, linear = model.bridge.blocks[3].attn.k.original_component, torch.nn.Linear.forward

    def count(module, stream):
        if module is projection:
            rows.append(stream.shape[:-1].numel())
        return linear(module, stream)

    def never(module, *args, **kwargs):
        raise AssertionError("a tower ran")

    with monkeypatch.context() as patched:  # the classes: hooks on the modules would be another model's
        patched.setattr(torch.nn.Linear, "forward", count)
        patched.setattr(TowerBridge, "forward", never)
        trace.generate(plans, max_new_tokens=4, **ENDLESS)
    assert rows == [3 * 2 * n_own] * bool(n_own) + [3 * 2] * 3
    compiled = [plan.compile(model.spec, trace.spans, batch=2) for plan in plans]
    with torch.no_grad():
        stack = continuation._Stack(trace, compiled, n - n_own)
        stack.step(torch.zeros(3, 2, dtype=torch.long))
    assert all(keys.data_ptr() == old.data_ptr() for (keys, _), old in zip(stack.past, trace.keys, strict=True))
    assert stack.past[0][0].shape[2] == n - n_own
    assert {tuple(keys.shape[:3]) for keys, _ in stack.own} == {(3, 2, n_own + 1)}


def test_every_plans_keys_and_values_are_kept_wherever_it_joins():
    trace = recorded()
    start = int(trace.spans.suffix.positions[0])
    edits = [scale(Site(name, layer, 0, "suffix"), 3.0) for name, layer in (("v", 1), ("rot_k", 1), ("z", 1), ("v", 3))]
    plans = [Plan(edit) for edit in edits]
    compiled = [plan.compile(trace.model.spec, trace.spans, batch=2) for plan in plans]
    with torch.no_grad():
        _, kept = restarted(trace, compiled, start, range(3), keep=True)
    assert len(kept) == 4
    for number, plan in enumerate(plans):
        cache = run(trace.model, trace.x, plan=plan, capture=["rot_k", "v"]).cache
        for layer, made in enumerate(kept):
            for name, part in zip(("rot_k", "v"), made, strict=True):
                wanted = heads_first(cache[hook_name(name, layer)].detach(), name).transpose(1, 2)[:, start:]
                torch.testing.assert_close(part[number], wanted, atol=1e-5, rtol=0)


def test_what_runs_together_changes_nothing():
    trace = recorded()
    plans = [*decoding_plans().values(), *list(plans_of(trace.x).values())[:8]]
    together = trace.generate(plans, max_new_tokens=6, **ENDLESS)
    apart = trace.generate(plans, max_new_tokens=6, budget_gb=1e-6, **ENDLESS)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a.tokens, b.tokens)
    single = trace.model.trace(trace.x[1]).generate(plans[0], max_new_tokens=6, **ENDLESS)
    assert torch.equal(single[0].tokens[0], together[0].tokens[1])


def test_sampling_draws_from_a_generator_of_each_plan():
    trace = recorded()
    plans = [Plan(), Plan(zero(Site("z", 1, 2, "suffix"))), Plan()]
    how = {"max_new_tokens": 10, "do_sample": True, "return_type": "tokens", **ENDLESS}
    before = torch.random.get_rng_state()
    one, again, other = (trace.generate(plans, seed=seed, **how) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[2]), "two plans must not share their draws"
    alone = trace.generate(plans[:1], seed=0, **how)
    assert torch.equal(alone[0], one[0])
    likeliest = trace.generate(plans, seed=0, top_k=1, **how)
    greedy = trace.generate(plans, max_new_tokens=10, return_type="tokens", **ENDLESS)
    assert all(torch.equal(a, b) for a, b in zip(likeliest, greedy, strict=True))


def test_draws_follow_the_models_probabilities():
    """Many plans that change nothing draw the first token as often as its probability says."""
    trace = small_model().trace(small_inputs(seeds=(0,)))
    found = trace.generate(
        [Plan()] * 600, max_new_tokens=1, do_sample=True, seed=3, temperature=0.5, top_k=0, **ENDLESS
    )
    first = torch.tensor([int(one.tokens[0, -1]) for one in found])
    chances = (trace.logits()[0, -1] / 0.5).softmax(-1)
    top = chances.topk(3)
    assert float(top.values[0]) > 0.02
    for token, chance in zip(top.indices, top.values, strict=True):
        spread = float((chance * (1 - chance) / 600).sqrt())
        assert abs(float((first == token).float().mean()) - float(chance)) < 4 * spread


def test_what_comes_back():
    trace = recorded()
    plan = Plan(zero(Site("z", 1, 2, "suffix")))
    (tokens,) = trace.generate(plan, max_new_tokens=3, return_type="tokens", **ENDLESS)
    (text,) = trace.generate(plan, max_new_tokens=3, return_type="text", **ENDLESS)
    assert torch.equal(tokens[:, :-3], trace.x.tensors["input_ids"])
    assert text == trace.model.generate(trace.x, plan=plan, max_new_tokens=3, return_type="text", **ENDLESS)
    assert trace.generate([], max_new_tokens=3) == ()


def test_what_cannot_go_on_is_generated_from_the_prompt():
    trace = recorded()
    plans = [Plan(zero(Site("ln1", 1))), Plan(zero(Site("z", 1, 2)))]
    agree(trace, plans, n=5, **ENDLESS)
    lost = changed(trace, tables=tuple(table * 0.5 for table in trace.tables))
    agree(lost, plans, n=5, **ENDLESS)
    model, x = small_model(), small_inputs()
    with model.hooks(fwd_hooks=[("blocks.2.hook_mlp_out", lambda activation, hook: activation * 0)]):
        agree(model.trace(x), plans, n=5, **ENDLESS)


def test_refusals():
    trace = recorded()
    with pytest.raises(InputError, match="unknown return_type 'texts'"):
        trace.generate(Plan(), return_type="texts")
    with pytest.raises(InputError, match="pass seed=0"):
        trace.generate(Plan(), do_sample=True)
    with pytest.raises(InputError, match=r"one sequence for each plan.*num_beams.*Use model.generate"):
        trace.generate(Plan(), num_beams=2)
    with pytest.raises(InputError, match=r"num_beens"):
        trace.generate(Plan(), num_beens=2)
    with pytest.raises(InterventionError, match="layer 9 is past the end"):
        trace.generate(Plan(zero(Site("z", 9))))


def test_an_edit_that_does_not_fire_while_decoding_raises(monkeypatch):
    trace = recorded()
    monkeypatch.setattr(continuation, "Taps", lambda plans, offset, decoding: _no_taps(offset))
    with pytest.raises(InterventionError, match=r"fired 1 times, expected 4 \(1 in the prompt, 3 decoding steps\)"):
        trace.generate(Plan(zero(Site("z", 1, 2))), max_new_tokens=4, **ENDLESS)


def _no_taps(offset):
    from av_lens.replay.rerun import Taps

    return Taps([Plan().compile(small_model().spec, recorded().spans)], offset, decoding=True)
