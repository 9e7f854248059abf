"""Replay against the hooked full forward, over plans drawn at random: every kind of edit at every place.

A case is a list of plans that are replayed together, so that they stack and join at their own layers. The wanted
logits come from `run(model, x, plan=plan)`, one plan at a time, which shares with replay only what an edit does to a
tensor. Values are drawn from seeds, so that a failing case shrinks to plans that can be read.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from drawn_plans import COMPONENTS, KINDS, POSITION_KINDS, cut_of, edit_of, positions_of, shown, site_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_av import small_inputs, small_model

from av_lens.core import run
from av_lens.interventions import Plan, Site, cut, zero

LAYOUTS = ("in_video", "separate")
ASKED = ("generation", "suffix", "all")
TOLERANCE = 1e-5


@cache
def recorded(sound: str, batch: int) -> Any:
    trace = small_model().trace(small_inputs(seeds=tuple(range(batch)), sound=sound))
    assert trace.hooked_because == ""
    return trace


@cache
def hooked(sound: str, batch: int) -> torch.Tensor:
    """The logits of the run without any plan."""
    return run(small_model(), recorded(sound, batch).x, logits_at="all").logits.detach()


def held(trace: Any) -> list[torch.Tensor]:
    """All that a replay could spoil: the record and the input."""
    tensors = [value for value in trace.x.tensors.values() if isinstance(value, torch.Tensor)]
    return [*trace.resid, *trace.keys, *trace.values, *trace.tables, *tensors]


def check(trace: Any, plans: list[Plan], logits_at: str, sound: str) -> float:
    """Replay all plans together and each alone in full; return the largest change that a plan made."""
    before = [(tensor, tensor.clone()) for tensor in held(trace)]
    compiled = [plan.compile(trace.model.spec, trace.spans, batch=trace.batch) for plan in plans]
    together = trace.replay(compiled, logits_at=logits_at)
    largest = 0.0
    for number, plan in enumerate(plans):
        whole = run(trace.model, trace.x, plan=plan, logits_at=logits_at)
        wanted = whole.logits.detach()
        gap = float((together[number] - wanted).abs().max())
        assert gap <= TOLERANCE, f"plan {number} of {len(plans)} is {gap:.1e} from its full forward: {shown(plan)}"
        assert compiled[number].fired == whole.fired
        largest = max(largest, float((wanted - hooked(sound, trace.batch)[:, list(whole.asked)]).abs().max()))
    assert all(torch.equal(now, copy) for now, copy in before), "a replay wrote into the recorded run"
    return largest


# Every kind at every component


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_kind_of_edit_at_this_component(component: str):
    """All kinds in one stack, at turns of the layers, heads and kinds of positions."""
    shift = COMPONENTS.index(component)
    sound = LAYOUTS[shift % 2]
    trace = recorded(sound, 2)
    plans = []
    for i, kind in enumerate(KINDS):
        positions = positions_of(POSITION_KINDS[(i + shift) % 7], i + shift, trace.spans)
        plans.append(Plan(edit_of(kind, site_of(component, trace, i % 4, i + shift, positions), trace, 7 * shift + i)))
    assert check(trace, plans, "all", sound) > 1e-3, "nothing changed, so that the agreement proves nothing"


def test_edits_that_act_while_decoding_only_change_nothing_in_the_prompt():
    """Their first position lies after the prompt: nothing is left to restart."""
    trace = recorded("in_video", 2)
    edits = [zero(Site("z", 1, positions="generated")), cut("generated", "video", include_generation=False)]
    plans = [*(Plan(edit) for edit in edits), Plan(edits), Plan(), Plan([edits[0], zero(Site("z", 2, 1, "question"))])]
    for logits_at in ASKED:
        assert check(trace, plans, logits_at, "in_video") > 1e-3
        alone = trace.replay(plans[:4], logits_at=logits_at)
        assert torch.equal(alone, trace.logits(logits_at).expand(4, -1, -1, -1))


# Plans at random

small_numbers = st.integers(0, 60)
drawn_edits = st.tuples(
    st.sampled_from((*COMPONENTS, "cut")), st.sampled_from(KINDS), st.integers(0, 3), small_numbers, small_numbers
)
drawn_places = st.lists(st.tuples(st.sampled_from(POSITION_KINDS), small_numbers), min_size=1, max_size=2)
drawn_plans = st.lists(st.lists(drawn_edits, min_size=1, max_size=4), min_size=1, max_size=6)


def built(trace: Any, places: list[Any], edits: list[Any]) -> Plan:
    """A plan of what was drawn. Its positions are one of a few, so that many plans start together and stack."""
    found = []
    for component, kind, layer, number, seed in edits:
        positions = positions_of(*places[seed % len(places)], trace.spans)
        if component == "cut":
            found.append(cut_of(trace, positions, layer, number, seed))
        else:
            found.append(edit_of(kind, site_of(component, trace, layer, number, positions), trace, seed))
    return Plan(found)


def check_drawn(sound: str, batch: int, logits_at: str, places: list[Any], plans: list[Any]) -> None:
    trace = recorded(sound, batch)
    check(trace, [built(trace, places, edits) for edits in plans], logits_at, sound)


drawn_cases = given(
    sound=st.sampled_from(LAYOUTS),
    batch=st.sampled_from((1, 2)),
    logits_at=st.sampled_from(ASKED),
    places=drawn_places,
    plans=drawn_plans,
)
repeatable = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, **repeatable)
@drawn_cases
def test_plans_at_random_replay_as_they_run(sound, batch, logits_at, places, plans):
    check_drawn(sound, batch, logits_at, places, plans)


@pytest.mark.slow
@settings(max_examples=1500, **repeatable)
@drawn_cases
def test_many_more_plans_at_random_replay_as_they_run(sound, batch, logits_at, places, plans):
    check_drawn(sound, batch, logits_at, places, plans)
