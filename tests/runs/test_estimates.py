"""Estimates of memory against what is really held, storage by storage, on the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from held_bytes import HeldBytes
from small_av import small_clip, small_inputs, small_model
from tiny import tiny_hf_model, tiny_processor
from tiny_families import TINY, family_model

import av_lens as avl
from av_lens.errors import BudgetError
from av_lens.interventions import Plan, Site, cut, zero
from av_lens.replay import stacks
from av_lens.replay.recording import record_bytes


@cache
def case(name: str) -> tuple[Any, Any]:
    """A model and an input of it, of experts and of what is added after layers too."""
    if name == "bfloat16":
        model = avl.load("tiny", hf_model=tiny_hf_model(dtype=torch.bfloat16), processor=tiny_processor())
        return model, small_inputs()
    if name == "float32":
        return small_model(), small_inputs()
    layout = next(iter(TINY[name].layouts.values()))
    return family_model(name), family_model(name).encode(small_clip(0), "What?", **layout)


def bytes_of(trace: Any) -> int:
    parts = (*trace.resid, *trace.keys, *trace.values, *trace.tables, *trace.added.values())
    return sum(part.nbytes for part in parts)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "qwen3_omni_moe", "qwen3_vl"])
def test_a_record_is_as_large_as_was_said(name):
    model, x = case(name)
    trace = model.trace(x, attention="flash")
    assert bool(trace.added) == (name in ("qwen3_omni_moe", "qwen3_vl"))
    assert record_bytes(model, x) == bytes_of(trace)
    said = record_bytes(model, x) / 1e9
    model.trace(x, budget_gb=1.01 * said)
    with pytest.raises(BudgetError, match=r"Trace fewer examples at a time, or raise budget_gb\."):
        model.trace(x, budget_gb=0.99 * said)


KINDS = {
    "z, suffix": lambda number: zero(Site("z", 0, number % 4, "suffix")),
    "z, media": lambda number: zero(Site("z", 0, number % 4, "media")),
    "mlp, suffix": lambda number: zero(Site("mlp_out", 0, positions="suffix")),
    "edges": lambda number: cut("suffix", "video", layers=[0], heads=number % 4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "attention"),
    [("float32", None), ("bfloat16", "flash"), ("bfloat16", "eager"), ("qwen3_omni_moe", None), ("qwen3_vl", None)],
)
@torch.no_grad()
def test_a_stack_takes_what_was_said(name, attention, kind):
    """Within a quarter above and a half below: of what is held at the worst moment, not all is of every plan."""
    model, x = case(name)
    trace = model.trace(x, attention=attention)
    plans = [Plan(KINDS[kind](number)) for number in range(24)]
    schedule = trace.schedule(plans)
    with HeldBytes() as held:
        trace.replay(plans)
    assert 0.5 <= held.peak / 1e9 / schedule.gigabytes <= 1.25


def test_stacks_are_larger_where_more_rows_are_needed(monkeypatch):
    trace = small_model().trace(small_inputs())
    plans = [Plan(zero(Site("z", 0, number % 4, "media"))) for number in range(96)]
    on_cpu = len(trace.schedule(plans).stacks)
    monkeypatch.setattr(type(trace.model), "device", torch.device("cuda"))
    assert len(stacks.scheduled(trace, plans, n_asked=1, budget_gb=1.0).stacks) < on_cpu / 4
