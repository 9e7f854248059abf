"""What pictures add after layers (deepstack): wherever a run is begun again, it is added again."""

from __future__ import annotations

import numpy as np
import pytest
from brute_edges import naive_integral
from small_av import small_clip
from tiny import letter
from tiny_families import TINY, family_model

import av_lens as avl
from av_lens.interventions import Site
from av_lens.methods import edge_attribution
from av_lens.metrics import logit_diff
from av_lens.replay import traces

METRIC = logit_diff(letter("a"), letter("b"))


@pytest.mark.parametrize(("sender", "receiver"), [("L0H1", "L2 mlp"), ("L1H3", "logits")])
def test_runs_that_are_begun_inside_a_layer_have_it(sender, receiver):
    model = family_model("qwen3_vl")
    ends = tuple(model.encode(small_clip(seed), "What?", sound=None) for seed in (0, 1))
    pair = avl.Pair(clean=ends[0], corrupt=ends[1])
    found = edge_attribution(model, pair, metric=METRIC, variant="ig_activations", steps=2)
    wanted = naive_integral(model, ends, METRIC, 2, Site("z", int(sender[1])), sender, receiver)
    np.testing.assert_allclose(found.values.sel(sender=sender, receiver=receiver), wanted, atol=1e-5, rtol=1e-4)


def test_a_trace_that_is_proved_block_by_block_has_it(monkeypatch):
    monkeypatch.setattr(traces, "PROOF_ROWS", 16)
    tiny = TINY["qwen3_vl"]  # a fresh model: it is proved once
    model = avl.load("fresh", hf_model=tiny.hf_model(0), processor=tiny.processor())
    trace = model.trace(model.encode(small_clip(2), "What?", sound=None))
    assert len(trace.spans) > 32
    assert not trace.hooked_because
    assert sorted(trace.added) == [0, 1]
