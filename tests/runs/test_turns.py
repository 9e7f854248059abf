"""Threads that hook one model at the same time: each gets its own result, or a sentence."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_av import small_inputs, small_model

from av_lens.core import calls, run
from av_lens.core.calls import Turn, turn_of
from av_lens.errors import ModelError
from av_lens.interventions import Plan, Site, zero

Z = "blocks.1.attn.hook_z"


def ablation(head):
    return lambda z, hook: z.index_fill(2, torch.tensor([head]), 0.0)


def by_run_with_hooks(model, x, head):
    return model.run_with_hooks(x, fwd_hooks=[(Z, ablation(head))])


def by_context(model, x, head):
    with model.hooks(fwd_hooks=[(Z, ablation(head))]):
        return model(x)


def by_cache(model, x, head):
    with model.hooks(fwd_hooks=[(Z, ablation(head))]):
        return model.run_with_cache(x, ["blocks.2.hook_resid_pre"])[0]


def by_plan(model, x, head):
    return run(model, x, plan=Plan(zero(Site("z", 1, head))), logits_at="all").logits


def by_trace(model, x, head):
    return model.trace(x).replay(Plan(zero(Site("z", 1, head))), logits_at="all")[0]


def by_hooked_trace(model, x, head):
    with model.hooks(fwd_hooks=[(Z, ablation(head))]):
        return model.trace(x).replay(Plan(), logits_at="all")[0]


def by_bound(model, x, head):
    bound = model.bound(x)
    return bound.run_with_hooks(bound.ids, fwd_hooks=[(Z, ablation(head))])


def by_bound_context(model, x, head):
    bound = model.bound(x)
    with bound.hooks(fwd_hooks=[(Z, ablation(head))]):
        return bound(bound.ids)


WAYS = (by_run_with_hooks, by_context, by_cache, by_plan, by_trace, by_hooked_trace, by_bound, by_bound_context)


def test_each_of_four_threads_gets_its_own_result():
    model, x = small_model(), small_inputs((0,))
    with torch.no_grad():
        wanted = [by_run_with_hooks(model, x, head) for head in range(4)]

    def work(head):
        with torch.no_grad():
            return [way(model, x, head) for way in (*WAYS[head:], *WAYS[:head])]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for head, logits in enumerate(found):
        for one in logits:
            torch.testing.assert_close(one, wanted[head], atol=2e-5, rtol=0)
    assert min(float((wanted[0] - wanted[head]).abs().max()) for head in (1, 2, 3)) > 1e-3


def test_hooks_are_taken_off_only_when_the_others_are_done():
    model, x, entered, done = small_model(), small_inputs((0,)), threading.Event(), []

    def reset():
        entered.wait(10)
        model.reset_hooks()
        done.append("reset")

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        with model.hooks(fwd_hooks=[(Z, ablation(0))]):
            waiting = pool.submit(reset)
            entered.set()
            hooked = model(x)
            assert not done
        waiting.result(10)
    assert done == ["reset"]
    assert torch.equal(hooked, by_run_with_hooks(model, x, 0))


def test_a_hook_may_run_the_model_itself():
    model, x, inner = small_model(), small_inputs((0,)), []

    def ask(activation, hook):
        if not inner:
            inner.append(None)
            inner.append(model(x))

    with torch.no_grad():
        model.run_with_hooks(x, fwd_hooks=[(Z, ask)])
        assert torch.equal(inner[1], model(x))


def test_who_waits_too_long_is_told(monkeypatch):
    monkeypatch.setattr(calls, "WAIT_S", 0.05)
    model, x = small_model(), small_inputs((0,))
    with (
        ThreadPoolExecutor(1) as pool,
        model.hooks(),
        pytest.raises(ModelError, match=r"leave `with model.hooks\(...\)`"),
    ):
        pool.submit(model, x).result(10)


def test_a_copy_has_a_turn_of_its_own():
    model = small_model()
    assert turn_of(model.bound(small_inputs((0,)))) is turn_of(model.bridge)
    other = copy.deepcopy(model.bridge)
    assert turn_of(other) is not turn_of(model.bridge)
    with turn_of(other):
        assert isinstance(pickle.loads(pickle.dumps(turn_of(other))), Turn)
