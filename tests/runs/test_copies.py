"""Copies of a model: weights of their own, nothing of what the first remembers, and a word where memory is short."""

from __future__ import annotations

import pytest
import torch
from small_av import small_clip, small_model

from av_lens.core import modes
from av_lens.core.modes import in_precision, weights_bytes
from av_lens.errors import ModelError
from av_lens.model.binding import remembered_towers


def last(model):
    with torch.no_grad():
        return model(model.encode(small_clip(0), "What?"))[:, -1].float()


def test_another_precision_is_another_model():
    model = small_model()
    other = in_precision(model, torch.bfloat16)
    x = model.encode(small_clip(0), "What?")
    y = other.encode(small_clip(0), "What?")
    assert (model.dtype, other.dtype) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        exact, rounded = model(x)[:, -1], other(y)[:, -1]
    assert rounded.dtype == torch.bfloat16
    assert 0 < float((exact - rounded.float()).abs().max()) < 0.1 * float(exact.abs().max())


def test_a_copy_takes_nothing_from_what_the_first_models_encoders_remember():
    model = small_model()
    alone = last(in_precision(model, torch.bfloat16))
    with remembered_towers(model):
        last(model)
        assert torch.equal(last(in_precision(model, torch.bfloat16)), alone)


def test_a_copy_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    model = small_model()
    needed = sum(p.numel() for p in model.hf_model.parameters()) * 4
    assert weights_bytes(model, torch.bfloat16) == weights_bytes(model, torch.float32) == needed
    assert weights_bytes(model, torch.float64) == 2 * needed
    monkeypatch.setattr(modes, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ModelError, match=r"in bfloat16 take 0\.0 GB and 0\.0 GB of cpu memory are free: use a machine"):
        in_precision(model, torch.bfloat16)
    monkeypatch.setattr(modes, "free_bytes", lambda device: needed)
    assert in_precision(model, torch.bfloat16).dtype == torch.bfloat16
