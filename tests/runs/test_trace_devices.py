"""A record on the CPU beside a model on another device, without such a device: fake tensors that know where they lie.

PyTorch's fake tensors hold no numbers, but refuse to mix devices exactly as real ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawn_plans import COMPONENTS, KINDS, edit_of, site_of
from elsewhere import ELSEWHERE, copied, held_at, move, spread
from small_av import small_clip, small_inputs, small_model
from tiny_families import family_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from av_lens.interventions import Plan, Site, cut, noise, scale
from av_lens.replay import stacks


def plans(trace: Any) -> list[Plan]:
    """Every kind of edit at every component, at scattered positions and heads, and cuts; values on the CPU."""
    chosen: list[Plan] = []
    positions = trace.spans.suffix.positions[[0, 3, 4]].tolist()
    for i, component in enumerate(COMPONENTS):
        for j, kind in enumerate(KINDS):
            site = site_of(component, trace, (i + j) % 4, i + j, positions)
            chosen.append(Plan(edit_of(kind, site, trace, i + 2 * j)))
    chosen.append(Plan(scale(Site("z", 1, positions=positions), torch.ones(3, 1, 16))))
    chosen.append(Plan(noise(Site("z", 1, positions=positions), scale=torch.ones(16))))
    chosen += [Plan(cut(positions, "audio", renormalize=kept, heads=(3, 1))) for kept in (True, False)]
    return chosen


@pytest.mark.parametrize("place", [torch.device("cpu"), ELSEWHERE], ids=["record on cpu", "record beside the model"])
@pytest.mark.parametrize("rows", [(), (1, 3), range(15, 18)], ids=["none", "scattered", "the last"])
def test_replay_computes_where_the_model_is(monkeypatch: pytest.MonkeyPatch, place: torch.device, rows: Sequence[int]):
    trace = small_model().trace(small_inputs())
    listed, model = plans(trace), copied(trace.model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        move(model, mode, ELSEWHERE)
        assert model.device == ELSEWHERE
        for masked in (False, True):
            fake = held_at(trace, mode, place, model, masked=masked)
            compiled = [plan.compile(model.spec, trace.spans, batch=2) for plan in listed]
            compiled.sort(key=lambda plan: plan.first_layer)
            start = int(trace.spans.suffix.positions[0])
            if masked:  # the window asks whether the mask forbids anything
                monkeypatch.setattr("av_lens.replay.recording.bool", lambda tensor: True, raising=False)
            stream, kept = stacks.restarted(fake, compiled, start, rows, keep=True)
            logits = stacks.unembedded(model, stream, torch.zeros(2, dtype=torch.long, device=ELSEWHERE))
            for plan in compiled:
                plan.verify()
            found = [stream, logits, *(part for layer in kept for part in layer)]
            assert all(isinstance(tensor, FakeTensor) and tensor.device == ELSEWHERE for tensor in found)
            assert stream.shape[0] == len(listed)


SECOND = torch.device("cuda", 1)


def on_two(name: str) -> torch.device:
    """The last two of four layers and what comes after them on a second device."""
    later = any(f"layers.{number}" in name for number in (2, 3)) and "language_model" in name
    return SECOND if later or name.startswith(("lm_head", "model.language_model.norm")) else ELSEWHERE


def test_a_restart_follows_its_layers_over_two_devices():
    """Each part of the record lies beside its layer; fake tensors refuse to mix devices as real ones do."""
    trace = small_model().trace(small_inputs())
    listed, model = plans(trace), copied(trace.model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        spread(model, mode, on_two)
        assert (model.device, stacks.place_of(model, 1), stacks.place_of(model, 4)) == (ELSEWHERE, ELSEWHERE, SECOND)
        fake = held_at(trace, mode, ELSEWHERE, model, masked=False)
        compiled = [plan.compile(model.spec, trace.spans, batch=2) for plan in listed]
        compiled.sort(key=lambda plan: plan.first_layer)
        start = int(trace.spans.suffix.positions[0])
        stream, kept = stacks.restarted(fake, compiled, start, range(15, 18), keep=True)
        assert stream.device == SECOND
        assert [keys.device for keys, _ in kept] == [ELSEWHERE, ELSEWHERE, SECOND, SECOND]
        assert stacks.unembedded(model, stream, torch.zeros(2, dtype=torch.long)).device == ELSEWHERE
        for plan in compiled:
            plan.verify()


def test_held_experts_follow_their_layers_over_two_devices(monkeypatch: pytest.MonkeyPatch):
    """A split model's first trace is proved under frozen routing: on the first layer's device it would stay hooked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    whole = family_model("qwen3_omni_moe")
    trace = whole.trace(whole.encode(small_clip(0), "What?", picture=None))
    model, n = copied(whole), len(trace.spans)
    for module in model.hf_model.modules():
        if getattr(module, "config", None) is not None:  # what grouped products ask of a card is not faked
            module.config._experts_implementation = "batched_mm"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        spread(model, mode, on_two)
        experts = {layer: mode.from_tensor(one).to(ELSEWHERE) for layer, one in trace.experts.items()}
        fake = replace(held_at(trace, mode, ELSEWHERE, model, masked=False), experts=experts, routing="frozen")
        compiled = Plan(scale(Site("z", 0, 1), 2.0)).compile(model.spec, trace.spans)
        assert stacks.restarted(fake, [compiled], 0, range(n))[0].device == SECOND
        held = [hook.__self__.chosen.device for _, hook in fake.routing_hooks()]
        assert held == [ELSEWHERE] * 3 + [SECOND] * 6  # three hooks in each of the layers 0, 2 and 3
