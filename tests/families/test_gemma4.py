"""Gemma 4: what only some layers have, what is refused, its prompts against the processor's, members of the family."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from small_av import small_clip
from tiny import letter
from tiny_families import family_model, reference
from tiny_gemma import GEMMA_LAYOUTS, TEMPLATE, gemma_hf_model, gemma_processor

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError, InterventionError, ModelError
from av_lens.interventions import Plan, Site, add, zero
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.methods import attribution_patch, weight_change
from av_lens.metrics import logit_diff

METRIC = logit_diff(letter("a"), letter("b"))
PLAIN: dict[str, Any] = {"enable_moe_block": False, "use_double_wide_mlp": False}
SMALL = PLAIN | {"attention_k_eq_v": False, "use_bidirectional_attention": None, "final_logit_softcapping": None}
LARGE = PLAIN | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
IN_WORDS = "its layers norm what they write and scale the stream"


def model() -> Any:
    return family_model("gemma4")


def encoded(layout: str = "audio", seed: int = 0) -> Any:
    return model().encode(small_clip(seed), "What?", **GEMMA_LAYOUTS[layout])


# What a layer has


def test_a_component_that_a_layer_does_not_have_is_refused_in_words():
    trace = model().trace(encoded())
    assert IN_WORDS in trace.hooked_because
    assert all(part in trace.hooked_because for part in ("per-layer inputs", "shared keys", "sliding window of 24"))
    for component, layer, having in (("k", 2, "0, 1"), ("rot_k", 3, "0, 1"), ("v", 3, "0"), ("v", 1, "0")):
        words = rf"layer {layer} has no {component} of its own: .* Layers that have it: {having}\."
        with pytest.raises(InterventionError, match=words):
            trace.replay([Plan(zero(Site(component, layer)))])
    with pytest.raises(InterventionError, match="unknown hook"):
        model().run_with_cache(trace.x, ["blocks.2.attn.hook_rot_k"])
    with pytest.raises(InterventionError, match=r"head 1 of k is out of range: .* kept for 1 key-value"):
        trace.replay([Plan(zero(Site("k", 1, 1)))])


def test_sizes_are_each_layers_own():
    spec = model().spec
    assert [spec.at(layer).d_head for layer in range(4)] == [16, 32, 16, 32]
    assert [spec.at(layer).n_kv_heads for layer in range(4)] == [2, 1, 2, 1]
    assert [spec.at(layer).d_mlp for layer in range(4)] == [128, 128, 256, 256]


def test_a_key_that_is_edited_reaches_the_layers_that_read_it():
    own, x = "blocks.2.attn.hook_pattern", encoded()
    edit = Plan(add(Site("k", 0, 1), torch.linspace(-2.0, 2.0, 16)))
    with torch.no_grad():
        before, after = (run(model(), x, plan=plan, capture=[Site("pattern", 2)]).cache[own] for plan in (None, edit))
    assert float((after - before).abs().max()) > 1e-3


@torch.no_grad()
def test_edits_of_a_prompt_are_made_in_layers_whose_other_positions_huggingface_drops():
    x = encoded()
    plan = Plan([zero(Site("z", 3, positions="suffix")), zero(Site("mlp_in", 2, positions="audio"))])
    wanted = run(model(), x, plan=plan).logits
    found = model().generate(x, max_new_tokens=1, plan=plan, return_type="result").logits
    torch.testing.assert_close(found.reshape(-1), wanted.reshape(-1), atol=1e-5, rtol=0)
    assert float((wanted - run(model(), x).logits).abs().max()) > 1e-3


def test_read_off_the_stream_logits_are_capped_as_the_models_are():
    x = encoded()
    trace = model().trace(x)
    torch.testing.assert_close(trace.logits("all"), model()(x).detach(), atol=1e-5, rtol=0)
    _, cache = model().run_with_cache(x, ["unembed.hook_out"])
    raw = cache["unembed.hook_out"]
    torch.testing.assert_close(30 * torch.tanh(raw / 30), model()(x).detach(), atol=1e-5, rtol=0)


# What reads weights


def test_what_reads_the_weights_of_layers_is_refused_before_anything_runs(monkeypatch):
    x, y = encoded(), encoded(seed=1)
    pair = avl.Pair(clean=x, corrupt=y)
    _, cache = model().run_with_cache(x, ["blocks.0.hook_resid_pre"])
    monkeypatch.setattr(type(model().bridge), "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    for ask in (
        partial(avl.direct_attribution, model(), x, metric=METRIC),
        partial(avl.attention_flow, model(), x, queries="suffix", weight="value"),
        partial(attribution_patch, model(), pair, metric=METRIC, component="k"),
        partial(weight_change, model(), base=model()),
        partial(ModelEngine, model()),
        model().compatible,
        cache.decompose_resid,
        cache.stack_head_results,
        cache.get_full_resid_decomposition,
    ):
        with pytest.raises(ModelError, match=rf"reads the weights of layers, and would be wrong here: {IN_WORDS}"):
            ask()


# Media


def asked_of_the_processor(layout: str) -> dict[str, Any]:
    """One call of the processor on the frames that are shown, and the sound."""
    processor, clip = gemma_processor(), small_clip(0)
    keywords = GEMMA_LAYOUTS[layout]
    content, told = [], {}
    if layout in ("separate", "video"):
        fps = keywords["fps"]
        shown = np.array(clip.frames[:: round(2 / fps)])
        content.append({"type": "video"})
        meta = [{"fps": fps, "frames_indices": list(range(len(shown))), "total_num_frames": len(shown)}]
        told |= {"videos": [shown], "videos_kwargs": {"do_sample_frames": False, "video_metadata": meta}}
    if layout == "image":
        content.append({"type": "image"})
        told["images"] = [np.array(clip.frames[1])]
    if layout in ("separate", "image", "audio"):
        content.append({"type": "audio"})
        told["audio"] = [clip.waveform]
    conversation = [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    return dict(processor(text=[text], return_tensors="pt", **told))


@pytest.mark.parametrize("layout", ["separate", "video", "image", "audio", "text"])
def test_an_input_is_what_one_call_of_the_processor_makes(layout):
    x, wanted = encoded(layout), asked_of_the_processor(layout)
    n = x.tensors["input_features"].shape[1] if "input_features" in x.tensors else None
    assert set(x.tensors) == set(wanted)
    for name, tensor in wanted.items():
        tensor = torch.as_tensor(tensor)
        trimmed = tensor[:, :n] if name.startswith("input_features") else tensor
        assert torch.equal(x.tensors[name].to(trimmed.dtype), trimmed), name
    if n is not None:
        assert not wanted["input_features"][:, n:].any()  # what is left out is the processor's padding
        with torch.no_grad():
            whole = reference("gemma4")(**wanted).logits
        torch.testing.assert_close(model()(x).detach(), whole, atol=1e-5, rtol=0)


def test_times_rows_and_columns_at_the_true_settings(real_clip_path):
    from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

    processor = gemma_processor()
    processor.video_processor, processor.image_processor = Gemma4VideoProcessor(), Gemma4ImageProcessor()
    clip = avl.load_clip(real_clip_path)
    encoder = avl.inputs.Encoder(processor, model().config, model().position_ids)
    table = encoder.encode(clip, "What?", fps=2.0).table()
    high, wide = clip.frames.shape[1:3]
    scale = (70 * 48**2 / (high * wide)) ** 0.5
    rows, cols = int(scale * high // 48), int(scale * wide // 48)
    seen = table.query("role == 'video'")
    at = np.arange(len(seen))
    assert len(seen) == 20 * rows * cols
    np.testing.assert_array_equal(seen["row"], at % (rows * cols) // cols)
    np.testing.assert_array_equal(seen["col"], at % cols)
    np.testing.assert_allclose(seen["start_s"], at // (rows * cols) / 2)
    nearest = [clip.times[np.abs(clip.times - k / 2).round(9).argmin()] for k in range(20)]
    np.testing.assert_allclose(seen["source_start_s"], np.repeat(nearest, rows * cols))
    heard = table.query("role == 'audio'")
    np.testing.assert_allclose(heard["start_s"], np.arange(len(heard)) * 0.04)
    assert len(heard) == -(-((len(clip.waveform) * 16000 // clip.rate + 160 - 321) // 160 + 1) // 4)


def test_what_its_prompts_cannot_hold_is_refused_in_words():
    with pytest.raises(InputError, match=r"takes sound beside a video: use sound='separate'"):
        model().encode(small_clip(0), "What?", sound="in_video")
    with pytest.raises(InputError, match=r"lasts 31\.0 s and this processor hears at most 30 s: cut the clip"):
        model().encode(small_clip(0, 31.0), "What?", picture=None)
    x = encoded("image")
    told = {name: value for name, value in x.tensors.items() if name != "mm_token_type_ids"}
    with pytest.raises(InputError, match=r"mm_token_type_ids, which say where they stand, did not come with them"):
        model().hf_model(**told)
    told = {name: value for name, value in x.tensors.items() if name != "pixel_values"}
    with pytest.raises(InputError, match=r"placeholders of image, but pixel_values did not come with them"):
        model().hf_model(**told)


def test_as_many_tokens_as_the_towers_give_rows():
    for layout, kind in (("audio", "audio"), ("image", "image"), ("video", "video")):
        x = encoded(layout)
        ids = x.tensors["input_ids"].clone()
        ids[0, x.spans[kind].positions[-1].item()] = 0
        with pytest.raises(ValueError, match=r"features and .* tokens do not match"):
            model().hf_model(**(dict(x.tensors) | {"input_ids": ids}))


def test_the_template_says_the_first_token_once():
    assert TEMPLATE.startswith("{{ bos_token }}")
    processor = gemma_processor()
    processor.tokenizer.add_bos_token = True
    ids = avl.inputs.Encoder(processor, model().config, model().position_ids).encode(None, "What?").ids[0]
    assert (ids == processor.tokenizer.bos_token_id).nonzero()[:, 0].tolist() == [0]


# Other members of the family


@pytest.mark.parametrize("text", [SMALL, LARGE], ids=["small", "large"])
def test_smaller_and_larger_members_are_huggingfaces_to_the_bit(text):
    made = gemma_hf_model(**text)
    plain = gemma_hf_model(**text)
    plain.set_attn_implementation("eager")
    wrapped = avl.load(hf_model=made, processor=gemma_processor())
    x = wrapped.encode(small_clip(0), "What?", **GEMMA_LAYOUTS["separate"])
    with torch.no_grad():
        assert torch.equal(wrapped(x), plain(**x.tensors).logits)
    wanted = plain.generate(**x.tensors, max_new_tokens=4, do_sample=False)
    assert torch.equal(wrapped.generate(x, max_new_tokens=4), wanted)
    assert IN_WORDS in wrapped.trace(x).hooked_because


def test_a_member_without_ears_takes_no_sound():
    made = gemma_hf_model(**LARGE)
    made.config.audio_config, made.model.audio_tower, made.model.embed_audio = None, None, None
    deaf = avl.load(hf_model=made, processor=gemma_processor())
    assert not len(deaf.encode(small_clip(0), "What?", fps=0.5).spans.audio)
    with pytest.raises(InputError, match=r"takes text and video and image: use sound=None"):
        deaf.encode(small_clip(0), "What?", sound="separate")


def test_gemma_3n_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3n"}')
    with pytest.raises(ModelError, match=r"Gemma 3n cannot be opened: its layers carry four streams.*families\.md"):
        avl.load(tmp_path)
