"""What the host waits for: on a GPU every number that is read, and every copy that blocks, empties its queue of work.

Counted on fake tensors of a device that is not there. They cannot hand a number to the host at all: a sweep that runs
on them reads none.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from elsewhere import ELSEWHERE, Waits, copied, held_at, move
from small_av import small_inputs, small_model
from tiny import letter, tiny_hf_model, tiny_processor
from torch._subclasses.fake_tensor import FakeTensorMode

import av_lens as avl
from av_lens.families import kernels
from av_lens.inputs import Answer
from av_lens.interventions import Plan, Site, cut, noise, replace, resample, zero
from av_lens.metrics import kl, log_prob, logit_diff, rank
from av_lens.metrics.metric import Metric

ANSWERS = logit_diff(letter("a"), letter("b"))


def sweep_of(n: int, kind: str) -> list[Plan]:
    """Plans of n heads, over again from the first, whose values lie in memory."""
    value = torch.ones(1, 1, 1, 16)
    made = {
        "zero": lambda site: zero(site),
        "replace": lambda site: replace(site, value),
        "resample": lambda site: resample(site, value.repeat(3, 1, 1, 1)),
        "noise": lambda site: noise(site),
    }
    heads = [(number // 4 % 4, number % 4) for number in range(n)]
    if kind == "cut":
        return [Plan(cut("generation", "video", layers=[layer], heads=head)) for layer, head in heads]
    return [Plan(made[kind](Site("z", layer, head, "generation"))) for layer, head in heads]


def waits(n: int, kind: str, metric: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    trace = small_model().trace(small_inputs())
    plans, model = sweep_of(n, kind), copied(trace.model)
    few = metric.bind(model, trace).few_tokens()
    monkeypatch.setattr(Metric, "few_tokens", lambda self: few)  # before anything runs: it sorts a few numbers
    for name in ("can_use_flash_attention", "can_use_efficient_attention"):
        monkeypatch.setattr(kernels, name, lambda asked: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        move(model, mode, ELSEWHERE)
        fake = held_at(trace, mode, ELSEWHERE, model, masked=False)
        with Waits() as counted:
            fake.score(plans, metric)
    return counted.count


@pytest.mark.parametrize("kind", ["zero", "replace", "resample", "noise", "cut"])
def test_a_sweep_waits_once_for_a_stack_whatever_the_number_of_plans(kind, monkeypatch):
    few, many = waits(12, kind, ANSWERS, monkeypatch), waits(96, kind, ANSWERS, monkeypatch)
    assert few["down"] == many["down"] == 1
    assert few["read"] == many["read"] == 0
    assert few["up"] == many["up"]
    assert many["kernels"] > few["kernels"] > 100  # it did run there


@pytest.mark.parametrize("metric", [log_prob(letter("a")), rank(letter("a")), kl(torch.zeros(1, 266))])
def test_no_metric_waits_for_each_plan(metric, monkeypatch):
    few, many = waits(12, "zero", metric, monkeypatch), waits(96, "zero", metric, monkeypatch)
    assert (few["down"], few["up"]) == (many["down"], many["up"])
    assert many["kernels"] - few["kernels"] < 84 * 16  # an edit takes 15 and a half; a metric would take 5 more


def either(*names):
    return Answer(" or ".join(names), tuple(option for name in names for option in letter(name).options))


def test_a_metric_of_many_plans_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 3, 266, generator=generator)
    own = torch.stack([one[:, -1, 7] for one in logits])
    two = logit_diff(either("a", "c"), either("b", "d"))
    references = [torch.randn(n, 266, generator=generator) for n in (1, 2)]
    for metric in (ANSWERS, two, log_prob(letter("a")), rank(letter("b")), *map(kl, references)):
        bound = metric.bind(small_model(), small_inputs())
        assert torch.equal(bound.of_plans(logits), torch.stack([bound(one) for one in logits]))
    assert torch.equal(Metric("custom", function=lambda one: one[:, -1, 7]).of_plans(logits), own)


def test_a_trace_in_half_precision_reads_few_numbers_and_stores_no_scores():
    hf_model, x = tiny_hf_model(dtype=torch.bfloat16), small_inputs((0,))
    model = avl.load("tiny", hf_model=hf_model, processor=tiny_processor())
    n, seen = len(x.spans), Counter[str]()

    class Scores(Waits):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(found, torch.Tensor) and found.shape[-2:] == (n, n) and found.numel() == 4 * n * n:
                seen[way] += 1
            return found

    counts: dict[str, Counter[str]] = {}
    for way in ("eager", "flash"):
        model.trace(x, attention=way)  # what is proved once for a model is proved
        with Scores("cpu") as counted:
            trace = model.trace(x, attention=way)
        assert trace.hooked_because == ""
        counts[way] = counted.count
    assert seen["eager"] >= 4 * 3
    assert seen["flash"] == 0
    assert counts["flash"]["kernels"] < counts["eager"]["kernels"]
    assert counts["flash"]["read"] <= counts["eager"]["read"]  # most are the towers'
