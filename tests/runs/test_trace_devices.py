"""A record on the CPU beside a model on another device, without such a device: fake tensors that know where they lie.

PyTorch's fake tensors hold no numbers, but refuse to mix devices exactly as real ones do.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drawn_plans import COMPONENTS, KINDS, edit_of, site_of
from small_av import small_inputs, small_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from av_lens.interventions import Plan, Site, cut, noise, scale
from av_lens.replay import Trace, stacks

ELSEWHERE = torch.device("cuda", 0)


def copied(model: Any) -> Any:
    other = copy.copy(model)
    other.bridge = copy.deepcopy(model.bridge)
    return other


def move(model: Any, mode: FakeTensorMode, device: torch.device) -> None:
    """Put fake weights that lie elsewhere in the place of a model's own."""
    for module in model.hf_model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(mode.from_tensor(weight.detach()).to(device), False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer).to(device)


def held_at(trace: Any, mode: FakeTensorMode, device: torch.device, model: Any, *, masked: bool) -> Any:
    """The same trace with fake tensors that lie on a device."""

    def there(tensors: Any) -> Any:
        return tuple(mode.from_tensor(tensor).to(device) for tensor in tensors)

    n = len(trace.spans)
    mask = torch.empty(1, 1, n, n, device=device) if masked else None
    parts = {name: there(getattr(trace, name)) for name in ("resid", "keys", "values", "tables")}
    return Trace(model=model, x=trace.x, **parts, mask=mask)


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
@pytest.mark.parametrize("rows", [None, slice(15, 18)], ids=["all rows", "the last rows"])
def test_replay_computes_where_the_model_is(monkeypatch: pytest.MonkeyPatch, place: torch.device, rows: slice | None):
    trace = small_model().trace(small_inputs())
    listed, model = plans(trace), copied(trace.model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        move(model, mode, ELSEWHERE)
        assert model.device == ELSEWHERE
        monkeypatch.setattr(stacks, "_run_of", lambda asked: rows)  # it reads numbers, and fake tensors have none
        for masked in (False, True):
            fake = held_at(trace, mode, place, model, masked=masked)
            compiled = [plan.compile(model.spec, trace.spans, batch=2) for plan in listed]
            compiled.sort(key=lambda plan: plan.first_layer)
            start = int(trace.spans.suffix.positions[0])
            if masked:  # the window asks whether the mask forbids anything
                monkeypatch.setattr("av_lens.replay.recording.bool", lambda tensor: True, raising=False)
            stream, kept = stacks.restarted(fake, compiled, start, torch.zeros(0, dtype=torch.long), keep=True)
            logits = stacks.unembedded(model, stream, torch.zeros(2, dtype=torch.long, device=ELSEWHERE))
            for plan in compiled:
                plan.verify()
            found = [stream, logits, *(part for layer in kept for part in layer)]
            assert all(isinstance(tensor, FakeTensor) and tensor.device == ELSEWHERE for tensor in found)
            assert stream.shape[0] == len(listed)
