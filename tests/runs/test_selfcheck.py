"""The self-check at the door finds a hook that is off the road."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_clip, tiny_hf_model, tiny_model, tiny_processor
from transformer_lens.model_bridge.generalized_components import BlockBridge

from av_lens.errors import ModelError
from av_lens.families.decoder import COMPONENTS, hook_name
from av_lens.model import check_model, load


def test_a_sound_model_passes_in_full_with_media():
    model = tiny_model(n_layers=2)
    report = check_model(model, model.encode(tiny_clip(), "What?"))
    assert report.ok
    assert "the spans cover the input" in report.passed
    layered = [c for c in COMPONENTS.values() if c.layered]
    for layer in range(2):
        for component in layered:
            assert f"writing {hook_name(component.name, layer)} back changes nothing" in report.passed
            assert f"turning {hook_name(component.name, layer)} changes the logits" in report.passed


def test_a_hook_off_the_road_is_found(monkeypatch):
    """TransformerLens's own block: `hook_resid_mid` is the norm's input, and a write misses the stream."""

    def off_the_road(self, hidden_states, **kwargs):
        return BlockBridge.forward(self, hidden_states, **kwargs)

    monkeypatch.setattr("av_lens.families.blocks.FullBlockBridge.forward", off_the_road)
    with pytest.raises(ModelError, match=r"FAILED turning blocks\.3\.hook_resid_mid changes the logits"):
        load(hf_model=tiny_hf_model(), processor=tiny_processor())


def test_a_pattern_that_is_read_but_not_used_is_found(monkeypatch):
    from av_lens.families import blocks

    real = blocks.RealAttentionBridge.forward

    def deaf(self, *args, **kwargs):
        hook = self.hook_pattern

        class Deaf(torch.nn.Module):
            def forward(self, value):
                hook(value.clone())
                return value

        self._modules["hook_pattern"] = Deaf()
        try:
            return real(self, *args, **kwargs)
        finally:
            self._modules["hook_pattern"] = hook

    monkeypatch.setattr(blocks.RealAttentionBridge, "forward", deaf)
    with pytest.raises(ModelError, match=r"(?s)failed its self-check.*turning blocks\.3\.attn\.hook_pattern changes"):
        load(hf_model=tiny_hf_model(), processor=tiny_processor())


def test_weights_that_are_not_numbers_are_found():
    hf_model = tiny_hf_model()
    with torch.no_grad():
        hf_model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"lm_head.weight of .* holds 1 numbers of \d+ that are NaN or infinite"):
        load(hf_model=hf_model, processor=tiny_processor())
