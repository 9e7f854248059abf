"""Attention flow: the same sums as stored patterns give, none of which is kept; sinks by the protocol's rule."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from small_av import small_clip, small_inputs, small_model

from av_lens.core.readings import attention_mass, incoming_mass, sink_positions
from av_lens.errors import InputError
from av_lens.families.decoder import hook_name
from av_lens.methods import attention_flow
from av_lens.spans import SpanMap


def weighted_pattern(model, cache, layer, weight):
    """The stored pattern, times the norm of what each key moves where asked: `[batch, head, query, key]`."""
    pattern = cache["pattern", layer].detach()
    if weight == "attention":
        return pattern
    values = cache["v", layer].detach().repeat_interleave(2, dim=2)  # two query heads share a key-value head
    moved = torch.einsum("bkhd,hdm->bhkm", values, model.W_O[layer].detach())
    return pattern * moved.norm(dim=-1)[:, :, None]


@pytest.mark.parametrize("weight", ["attention", "value"])
@pytest.mark.parametrize("sound", ["in_video", "separate"])
def test_masses_equal_those_of_stored_patterns(weight, sound):
    model, x = small_model(), small_inputs(sound=sound)
    _, cache = model.run_with_cache(x)
    flow = attention_flow(model, x, queries=("question|header", "audio"), by="head", weight=weight)
    roles = flow.values.coords["key"].values.tolist()
    assert set(roles) == set(x.spans.roles)
    for layer in range(4):
        full = weighted_pattern(model, cache, layer, weight)
        for query in ("question|header", "audio"):
            for key in roles:
                wanted = full[:, :, x.spans[query].positions.copy()][..., x.spans[key].positions.copy()]
                found = flow.values.sel(query=query, key=key, layer=layer).values
                np.testing.assert_allclose(found, wanted.sum(-1).mean(-1).numpy(), atol=2e-6)
    layers = attention_flow(model, x, queries=("question|header", "audio"), weight=weight)
    np.testing.assert_allclose(layers.values.values, flow.values.mean("head").values, atol=1e-9)
    if weight == "attention":
        np.testing.assert_allclose(flow.values.sum("key").values, 1.0, atol=1e-5)


def test_never_more_than_one_layers_pattern_is_alive(monkeypatch):
    """Count attention-shaped tensors while the last layer attends: with a cache there are four, streaming has one."""
    model, x = small_model(), small_inputs()
    n = len(x.spans)
    seen = []

    def count(scores, hook=None):
        del scores, hook
        alive = {
            o.data_ptr() for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.shape == (2, 4, n, n)
        }
        seen.append(len(alive))

    names = [hook_name("scores", layer) for layer in (0, 3)]
    with model.hooks(fwd_hooks=[(name, count) for name in names]):
        attention_mass(model, x, {"suffix": x.spans.suffix.positions.tolist()}, weight="value")
        streamed, seen = seen, []
        kept = {}

        def keep(pattern, hook):
            kept[hook.name] = pattern

        with torch.no_grad():
            model.run_with_hooks(x, fwd_hooks=[(hook_name("pattern", layer), keep) for layer in range(4)])
    assert streamed[-1] == streamed[0]
    assert seen[-1] == seen[0] + 3


def test_sinks_stand_apart_and_the_rest_still_sums_to_one():
    model, x = small_model(), small_inputs()
    span = x.spans.span([int(x.spans.video.positions[0]), int(x.spans.audio.positions[3])])
    flow = attention_flow(model, x, sinks=span)
    plain = attention_flow(model, x)
    assert flow.values.coords["key"].values.tolist()[-1] == "sinks"
    np.testing.assert_allclose(flow.values.sum("key").values, 1.0, atol=1e-5)
    moved = (plain.values - flow.values.sel(key=plain.values.coords["key"])).sel(key=["video", "audio"]).sum("key")
    np.testing.assert_allclose(moved.values, flow.values.sel(key="sinks").values, atol=1e-6)
    assert float(moved.min()) > 0
    found = attention_flow(model, x, sinks=True)
    assert set(found.provenance["sinks"]) == {f"in_video, {len(x.spans)} positions"}


def test_the_sink_rule_by_hand():
    spans = SpanMap.of_roles(["boundary", *["audio"] * 20, "question", "generation"])
    incoming = np.ones((2, 23))
    incoming[:, 0] = 1000.0  # no medium: never a sink, and not in the mean
    incoming[0, 4], incoming[1, 4] = 40.0, 22.0  # mean 31 of (19 + 31) / 20 = 2.5: 12.4 times
    incoming[0, 5], incoming[1, 5] = 30.0, 12.0
    assert sink_positions(incoming, spans).tolist() == []  # two sinks: mean 70/20 = 3.5, so 31 is 8.9 times
    incoming[:, 5] = 1.0
    assert sink_positions(incoming, spans).tolist() == [4]
    assert sink_positions(incoming, spans, times=12.5).tolist() == []


def test_incoming_attention_counts_the_suffix_alone():
    model, x = small_model(), small_inputs()
    _, cache = model.run_with_cache(x)
    rows = x.spans.suffix.positions.copy()
    wanted = sum(weighted_pattern(model, cache, layer, "value")[:, :, rows].sum((1, 2)) for layer in range(4))
    torch.testing.assert_close(incoming_mass(model, x), wanted, atol=1e-4, rtol=1e-5)


def test_layouts_are_mixed_and_roles_that_are_missing_are_nan():
    model, x = small_model(), small_inputs()
    silent = model.encode(small_clip(0), "What?", sound=None)
    flow = attention_flow(model, [silent, x], queries=("generation", "audio"))
    assert flow.values.sizes["example"] == 3
    assert np.isnan(flow.values[0].sel(query="audio").values).all()
    assert np.isnan(flow.values[0].sel(query="generation", key="audio").values).all()
    np.testing.assert_allclose(flow.values[1:].values, attention_flow(model, x, queries=("generation", "audio")).values)
    seen = flow.values[0].sel(query="generation").sum("key", skipna=True)
    np.testing.assert_allclose(seen.values, 1.0, atol=1e-5)


def test_generated_tokens_attend_from_where_they_were_produced():
    model, x = small_model(), small_inputs((0,))
    flow = attention_flow(model, x, queries="generation|generated", max_new_tokens=3)
    tokens = model.generate(x, max_new_tokens=3)[:, len(x.spans) :]
    ends = [i for i, token in enumerate(tokens[0].tolist()) if token == model.hf_model.generation_config.eos_token_id]
    longer = x.continued(tokens[:, : (ends[0] if ends else tokens.shape[1] - 1)])
    _, cache = model.run_with_cache(longer)
    rows = slice(len(x.spans) - 1, None)
    wanted = cache["pattern", 2][:, :, rows][..., x.spans.video.positions.copy()].sum(-1).mean((1, 2))
    found = flow.values.sel(query="generation|generated", key="video", layer=2).values
    np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"queries": "vidoe"}, "unknown role 'vidoe'"),
        ({"queries": ()}, "queries names nothing"),
        ({"queries": "generated"}, "Give max_new_tokens"),
        ({"weight": "values"}, "Did you mean 'value'"),
        ({"by": "heads"}, "Did you mean 'head'"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, text):
    with pytest.raises(InputError, match=text):
        attention_flow(small_model(), small_inputs(), **options)


def test_nothing_is_refused():
    with pytest.raises(InputError, match="no inputs were given"):
        attention_flow(small_model(), [])
    with pytest.raises(InputError, match="not str"):
        attention_flow(small_model(), ["a clip"])
