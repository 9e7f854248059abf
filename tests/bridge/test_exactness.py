"""Every hook is real: nothing moves when nothing is edited, everything moves when something is."""

from __future__ import annotations

import pytest
import torch
from tiny import Tensors, tiny_clip, tiny_hf_model, tiny_model, tiny_processor, tiny_tensors, trimmed, untouched
from transformer_lens.model_bridge import TransformerBridge

from av_lens.families.decoder import COMPONENTS, hook_name
from av_lens.model import load
from av_lens.model.selfcheck import turned

LAYOUTS = ("in_video", "separate")
TOWERS = ("audio_encoder.hook_in", "audio_encoder.hook_out", "vision_encoder.hook_in", "vision_encoder.hook_out")
FIRST, LAST = 0, 3


def places(layer: int) -> list[str]:
    return [hook_name(name, layer if c.layered else None) for name, c in COMPONENTS.items()]


def component_of(name: str):
    path = name.partition(".")[2].partition(".")[2] if name.startswith("blocks.") else name
    return next((c for c in COMPONENTS.values() if c.path == path), COMPONENTS["resid_pre"])


@pytest.fixture(scope="module")
def pairs():
    """By dtype: a wrapped model and an untouched one with the same weights."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        hf_model = tiny_hf_model(dtype=dtype)
        reference = untouched(hf_model)
        made[dtype] = (load(hf_model=hf_model, processor=tiny_processor()), reference)
    return made


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_huggingfaces_to_the_bit(pairs, layout, dtype):
    model, reference = pairs[dtype]
    own_padding = tiny_tensors(layout, processor=model.processor)
    assert own_padding["input_features"].shape[-1] == 30000
    wanted = reference(**own_padding).logits
    assert wanted.std() > 0.1
    assert torch.equal(model(Tensors(own_padding)), wanted)
    assert torch.equal(model(Tensors(trimmed(own_padding))), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_encoded_clips_run_as_huggingface_would_run_them(pairs, layout, dtype):
    model, reference = pairs[dtype]
    x = model.encode(tiny_clip(), "What?", sound=layout)
    assert x.layout == layout
    assert torch.equal(model(x), reference(**x.tensors).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [FIRST, LAST])
@torch.no_grad()
def test_writing_back_changes_nothing_and_turning_changes_the_logits(pairs, dtype, layer):
    """To the bit at every hook of COMPONENTS, `hook_scale` too: it enters as a ratio that is exactly one."""
    model, _ = pairs[dtype]
    x = Tensors(trimmed(tiny_tensors("in_video", processor=model.processor)))
    logits = model(x)
    for name in [*places(layer), *(TOWERS if layer == FIRST else ())]:
        same = model.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: value.clone())])
        assert torch.equal(same, logits), f"writing {name} back moved the logits"
        component = component_of(name)
        other = model.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook, c=component: turned(value, c))])
        assert not torch.equal(other, logits), f"turning {name} moved nothing"


@torch.no_grad()
def test_writing_in_place_counts_as_a_write(pairs):
    """A hook may write into the tensor it is shown and return nothing, or the tensor itself."""
    model, _ = pairs[torch.float32]
    x = Tensors(trimmed(tiny_tensors("in_video", processor=model.processor)))

    def in_place(value, hook):
        value[:, -1] = value[:, -1].flip(-1)

    def returned(value, hook):
        in_place(value, hook)
        return value

    def fresh(value, hook):
        new = value.clone()
        in_place(new, hook)
        return new

    for component in ("resid_mid", "z", "result", "q_input", "attn_in", "mlp_in", "mlp_post", "resid_post", "embed"):
        name = hook_name(component, LAST if COMPONENTS[component].layered else None)
        wanted = model.run_with_hooks(x, fwd_hooks=[(name, fresh)])
        assert not torch.equal(wanted, model(x)), name
        for edit in (in_place, returned):
            torch.testing.assert_close(model.run_with_hooks(x, fwd_hooks=[(name, edit)]), wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def test_resid_mid_is_the_stream_and_not_only_the_mlps_input(pairs):
    """Zero it in the last layer: what is left of the stream is the MLP's write alone."""
    model, _ = pairs[torch.float32]
    x = Tensors(trimmed(tiny_tensors("in_video", processor=model.processor)))
    kept = {}
    hooks = [
        (hook_name("resid_mid", LAST), lambda value, hook: torch.zeros_like(value)),
        (hook_name("mlp_out", LAST), lambda value, hook: kept.update(mlp_out=value.clone())),
        (hook_name("resid_post", LAST), lambda value, hook: kept.update(resid_post=value.clone())),
    ]
    model.run_with_hooks(x, fwd_hooks=hooks)
    assert torch.equal(kept["mlp_out"], kept["resid_post"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_results_sum_to_attentions_write_and_asking_for_them_costs_no_accuracy(pairs, dtype):
    model, _ = pairs[dtype]
    x = Tensors(trimmed(tiny_tensors("in_video", processor=model.processor)))
    logits, cache = model.run_with_cache(x, lambda name: name.endswith(("hook_result", "hook_attn_out")))
    assert torch.equal(logits, model(x))
    for layer in (FIRST, LAST):
        total = cache[hook_name("result", layer)].float().sum(2)
        allowed = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(total, cache[hook_name("attn_out", layer)].float(), rtol=0, atol=allowed)


@torch.no_grad()
def test_one_head_zeroed_at_result_is_that_head_zeroed_at_z(pairs):
    model, _ = pairs[torch.float32]
    x = Tensors(trimmed(tiny_tensors("in_video", processor=model.processor)))

    def silence(value, hook):
        value = value.clone()
        value[:, :, 2] = 0.0
        return value

    by_result = model.run_with_hooks(x, fwd_hooks=[(hook_name("result", 1), silence)])
    by_z = model.run_with_hooks(x, fwd_hooks=[(hook_name("z", 1), silence)])
    torch.testing.assert_close(by_result, by_z, rtol=0, atol=1e-5)
    assert (by_z - model(x)).abs().max() > 1e-3


@torch.no_grad()
def test_forked_inputs_feed_their_own_head_alone(pairs):
    """A stream zeroed for one query head of layer 1 is the query that this head makes of a zero stream: its bias."""
    model, _ = pairs[torch.float32]
    x = Tensors(trimmed(tiny_tensors("in_video", processor=model.processor)))
    seen = {}

    def blank(value, hook):
        value = value.clone()
        value[:, :, 3] = 0.0
        return value

    keep = ("q", "k", "v")
    reads = [
        (hook_name(part, 1), lambda value, hook, part=part: seen.__setitem__(part, value.clone())) for part in keep
    ]
    model.run_with_hooks(x, fwd_hooks=[(hook_name("q_input", 1), blank), *reads])
    _, cache = model.run_with_cache(x, [hook_name(part, 1) for part in keep])
    bias = model.b_Q[1, 3].expand_as(seen["q"][:, :, 3])
    torch.testing.assert_close(seen["q"][:, :, 3], bias, rtol=0, atol=1e-5)
    assert torch.equal(seen["q"][:, :, :3], cache[hook_name("q", 1)][:, :, :3])
    assert torch.equal(seen["k"], cache[hook_name("k", 1)])
    assert torch.equal(seen["v"], cache[hook_name("v", 1)])


@torch.no_grad()
def test_embed_holds_the_media_and_text_alone_stays_at_the_embedding(pairs, layout):
    model, _ = pairs[torch.float32]
    x = Tensors(trimmed(tiny_tensors(layout, processor=model.processor)))
    names = [hook_name("embed"), hook_name("embed_text"), "audio_encoder.hook_out", "vision_encoder.hook_out"]
    _, cache = model.run_with_cache(x, names)
    ids = x.tensors["input_ids"][0]
    stream, text = cache[names[0]][0], cache[names[1]][0]
    heard, seen = ids == model.config.audio_token_id, ids == model.config.video_token_id
    assert torch.equal(stream[heard], cache[names[2]])
    assert torch.equal(stream[seen], cache[names[3]])
    assert torch.equal(stream[~(heard | seen)], text[~(heard | seen)])
    assert not torch.equal(text[heard], cache[names[2]])


@torch.no_grad()
def test_the_decomposed_stream_closes_at_every_position(pairs, layout):
    model, _ = pairs[torch.float32]
    x = Tensors(trimmed(tiny_tensors(layout, processor=model.processor)))
    _, cache = model.run_with_cache(x)
    for layer in range(model.spec.n_layers):
        stack, labels = cache.decompose_resid(layer=layer + 1, mode="full", return_labels=True)
        assert labels[0] == "embed"
        assert len(labels) == 1 + 2 * (layer + 1)
        error = (stack.sum(0) - cache[hook_name("resid_post", layer)]).abs().max()
        assert error < 1e-4, f"layer {layer}: {error}"


def test_gradients_reach_every_hook_the_mel_and_the_pixels(pairs):
    model, _ = pairs[torch.float32]
    tensors = trimmed(tiny_tensors("in_video", processor=model.processor))
    inputs = {name: tensors[name].clone().requires_grad_() for name in ("input_features", "pixel_values_videos")}
    forks = {name for name, c in COMPONENTS.items() if c.gate == "use_attn_in"}
    shown: dict[str, torch.Tensor] = {}

    def keep(value, hook, name):
        value.retain_grad()
        shown[name] = value
        return value

    for components in (set(COMPONENTS) - forks, forks):
        names = [
            hook_name(c, layer if COMPONENTS[c].layered else None)
            for c in sorted(components)
            for layer in ((FIRST, LAST) if COMPONENTS[c].layered else (None,))
        ]
        hooks = [(n, lambda value, hook, n=n: keep(value, hook, n)) for n in [*names, *TOWERS]]
        logits = model.run_with_hooks(Tensors({**tensors, **inputs}), fwd_hooks=hooks)
        (logits[0, -1, 5] - logits[0, -1, 7]).backward()
        for name in [*names, *TOWERS]:
            assert shown[name].grad is not None, f"no gradient at {name}"
            assert shown[name].grad.abs().max() > 0, f"a zero gradient at {name}"
    for name, value in inputs.items():
        assert value.grad.abs().max() > 0, name
    model.hf_model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "component",
    ["resid_pre", "resid_mid", "resid_post", "z", "result", "scores", "pattern", "rot_k", "ln1_scale", "v_input"],
)
def test_a_gradient_is_the_slope_that_a_small_step_finds(component):
    model = tiny_model(dtype=torch.float64)
    x = Tensors(trimmed(tiny_tensors("in_video", processor=model.processor)))
    name, generator, kept = hook_name(component, 1), torch.Generator().manual_seed(0), {}

    def metric(step):
        def edit(value, hook):
            if not kept:
                kept["way"] = torch.randn(value.shape, generator=generator, dtype=value.dtype) * value.std()
                if component == "scores":
                    kept["way"] = kept["way"].clamp(-1, 1) * (value > -1e30)
            if step is None:
                value.retain_grad()
                kept["value"] = value
                return value
            return value + step * kept["way"]

        logits = model.run_with_hooks(x, fwd_hooks=[(name, edit)])
        return logits[0, -1, 5] - logits[0, -1, 7]

    metric(None).backward()
    slope = (kept["value"].grad * kept["way"]).sum()
    with torch.no_grad():
        # Norms and softmaxes stay in float32: a smaller step shows their rounding, a larger one the curvature.
        found = (metric(3e-3) - metric(-3e-3)) / 6e-3
    assert abs(slope) > 1e-3
    torch.testing.assert_close(slope.double(), found, rtol=2e-3, atol=1e-4)


@torch.no_grad()
def test_reading_in_a_batch_is_reading_alone(pairs):
    model, _ = pairs[torch.float32]
    x = model.encode([tiny_clip(seed=0), tiny_clip(seed=1)], "What?")
    together = model(x)
    for i in range(2):
        torch.testing.assert_close(together[i], model(x[i])[0], rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_the_bridge_is_a_real_transformer_bridge(pairs):
    model, _ = pairs[torch.float32]
    assert type(model.bridge) is TransformerBridge
    assert not model.bridge.training
    assert not any(module.training for module in model.hf_model.modules())
