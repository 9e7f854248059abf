"""Models that hear: each token's seconds, how many there are, what the door refuses, fused weights, long tables."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from drawn_plans import COMPONENTS, KINDS, edit_of, shown, site_of
from small_av import small_clip
from tiny import letter
from tiny_audio import SHORT, phi_hf_model, phi_processor
from tiny_families import TINY, family_model, reference

import av_lens as avl
from av_lens.core import run
from av_lens.families.decoder import rotated
from av_lens.families.fused import take_apart
from av_lens.interventions import Plan
from av_lens.media.encoding import resample
from av_lens.metrics import logit_diff
from av_lens.model.binding import remembered_towers

HEARING = ("qwen2_audio", "phi4_multimodal")
CASES = [(name, layout) for name in HEARING for layout in TINY[name].layouts]
# Samples to mel frames, and frames to tokens, worked out from kernels, strides and paddings alone.
FRAMES = {"qwen2_audio": lambda n: -(-n // 160), "phi4_multimodal": lambda n: (n - 400) // 160 + 1}


def convolved(n: int, kernel: int = 3, stride: int = 2, padding: int = 1) -> int:
    return (n + 2 * padding - kernel) // stride + 1


TOKENS = {
    "qwen2_audio": lambda n: convolved(convolved(n), kernel=2, padding=0),  # one convolution, then pairs are pooled
    "phi4_multimodal": lambda n: convolved(convolved(convolved(n))),
}
MS = {"qwen2_audio": 40, "phi4_multimodal": 80}
# Milliseconds of sound before and after its own that a token sees: convolutions, and windows of 25 ms.
REACH = {"qwen2_audio": (32.5, 12.5), "phi4_multimodal": (70 + 4 * 80, 15)}


def encoded(name: str, layout: str = "sound", seed: int = 0, **more: Any) -> Any:
    return family_model(name).encode(small_clip(seed), "What?", **(dict(TINY[name].layouts[layout]) | more))


def clip_of(waveform: np.ndarray, size: tuple[int, int] = (56, 84)) -> avl.Clip:
    frames = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    return avl.Clip.from_arrays(frames=frames, times=np.zeros(1), waveform=waveform.astype(np.float32), rate=16000)


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n).astype(np.float32)


# Seconds and numbers


@pytest.mark.parametrize("name", HEARING)
@pytest.mark.parametrize("n", [500, 1120, 4000, 16000, 16001, 33333, 51200])
def test_tokens_of_sound_and_their_seconds(name, n):
    x = family_model(name).encode(clip_of(noise(n)), "What?", **TINY[name].layouts["sound"])
    heard = x.table().query("role == 'audio'")
    assert len(heard) == TOKENS[name](FRAMES[name](n))
    starts = np.arange(len(heard)) * MS[name] / 1000
    np.testing.assert_allclose(heard["start_s"], starts)
    np.testing.assert_allclose(heard["source_start_s"], starts)
    np.testing.assert_allclose(heard["end_s"], starts + MS[name] / 1000)
    np.testing.assert_allclose(heard["source_end_s"], np.minimum(starts + MS[name] / 1000, n / 16000))


@pytest.mark.parametrize("name", HEARING)
def test_the_real_clips_tokens_and_their_seconds(name, real_clip_path):
    clip = avl.load_clip(real_clip_path)
    n = len(resample(clip.waveform, clip.rate, 16000))
    heard = family_model(name).encode(clip, "What?", **TINY[name].layouts["sound"]).table().query("role == 'audio'")
    assert len(heard) == TOKENS[name](FRAMES[name](n)) > 9000 // MS[name]
    np.testing.assert_allclose(heard["source_start_s"], np.arange(len(heard)) * MS[name] / 1000)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_inputs_are_the_processors(name, layout):
    x, clip, processor = encoded(name, layout), small_clip(0), TINY[name].processor()
    kinds = [kind for kind in ("image", "audio") if len(x.spans[kind])]
    content = [*({"type": kind, kind: "-"} for kind in kinds), {"type": "text", "text": "What?"}]
    given: dict[str, Any] = {
        "text": [processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)]
    }
    given |= {"audio": [np.array(clip.waveform)]} if "audio" in kinds else {}
    given |= {"images": [np.array(clip.frames[1])]} if "image" in kinds else {}
    made = dict(processor(**given, return_tensors="pt", audio_kwargs={"sampling_rate": 16000}))
    made.pop("num_img_tokens", None)
    assert set(made) == set(x.tensors)
    assert all(torch.equal(torch.as_tensor(made[key]), x.tensors[key]) for key in made)


@pytest.mark.parametrize(("name", "layout"), CASES)
@torch.no_grad()
def test_position_ids_are_the_models_own(name, layout):
    x, told = encoded(name, layout), []
    rotary = reference(name).get_decoder().rotary_emb
    handle = rotary.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    reference(name)(**x.tensors)
    handle.remove()
    assert torch.equal(x.position_ids, told[0].expand(1, 1, -1))
    assert torch.equal(family_model(name).position_ids(x.tensors), x.position_ids)


@pytest.mark.parametrize("name", HEARING)
@torch.no_grad()
def test_a_padded_prompt_gives_what_it_gives_alone(name):
    model, prompts = family_model(name), ["What?", "And who is there?"]
    together = model(prompts)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(together[row, -1], model(prompt)[0, -1], atol=1e-5, rtol=0)


def nothing(part: Any, inputs: Any, output: Any) -> Any:
    return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output


@torch.no_grad()
def entering(name: str, clip: avl.Clip, layout: str) -> tuple[Any, torch.Tensor]:
    """An input, and the stream that enters the layers, of towers in which no position attends to another."""
    model = family_model(name)
    x = model.encode(clip, "What?", **TINY[name].layouts[layout])
    parts = [part for tower in model.family.adapter.towers for part in getattr(model.bridge, tower).modules()]
    handles = [part.register_forward_hook(nothing) for part in parts if "Attention" in type(part).__name__]
    try:
        return x, model.run_with_cache(x, ["hook_embed"], stop_at_layer=1)[1]["hook_embed"][0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", HEARING)
def test_a_second_of_sound_moves_just_its_tokens(name):
    own = noise(40000)
    own[32000:] *= 2  # the loudest moment, which bounds every level, stays
    other = own.copy()
    other[8000:24000] *= 0.5
    (x, one), (_, two) = (entering(name, clip_of(each), "sound") for each in (own, other))
    table, (before, after) = x.table().query("role == 'audio'"), REACH[name]
    seen = (table["source_start_s"] - before / 1000 < 1.5) & (table["source_end_s"] + after / 1000 > 0.5)
    assert set((one != two).any(-1).nonzero()[:, 0].tolist()) == set(table.index[seen])
    told = x.spans.audio.between(0.5, 1.5, clock="source").positions
    assert 0 < len(told) < len(table)
    assert {*told} <= {*table.index[seen]}


def test_a_square_of_the_picture_moves_its_token_and_the_wholes():
    """700 x 1000 pixels become 896 x 1280 in 2 x 3 crops of 448, 64 columns of white: 32 x 46 tokens of 28 pixels."""
    clip = clip_of(noise(8000), (700, 1000))
    x, one = entering("phi4_multimodal", clip, "still")
    table = x.table().query("role == 'image'")
    assert len(table) == 32 * (46 + 1) + 1 + 16 * (16 + 1)
    places = table[["row", "col"]].to_numpy()
    own, whole = places[: 32 * 47].reshape(32, 47, 2), places[32 * 47 + 1 :].reshape(16, 17, 2)
    np.testing.assert_array_equal(own[:, :46], np.indices((32, 46)).transpose(1, 2, 0))
    np.testing.assert_array_equal(whole[:, :16], np.indices((16, 16)).transpose(1, 2, 0) * [2, 3])
    assert all((ends == -1).all() for ends in (own[:, 46], whole[:, 16], places[32 * 47]))
    for row, col in ((31, 45), (17, 14)):
        frames = np.array(clip.frames)
        top, left = round((row * 28 + 8) / 1.28), round((col * 28 + 8) / 1.28)
        frames[:, top : top + 9, left : left + 9] ^= 255
        other = avl.Clip.from_arrays(frames=frames, times=np.zeros(1))
        _, two = entering("phi4_multimodal", other, "still")
        moved = table.index[0] + np.array([row * 47 + col, 32 * 47 + 1 + row // 2 * 17 + col // 3])
        assert (one != two).any(-1).nonzero()[:, 0].tolist() == moved.tolist()
        assert {*x.spans.image.box(row=row, col=col).positions} <= {*moved}


@pytest.mark.parametrize("size", [(56, 84), (448, 448), (300, 900), (1300, 200)])
@torch.no_grad()
def test_rows_of_the_towers_are_the_tokens(size):
    """Counted where the model makes them, at the last projection."""
    hf_model, model, given = phi_hf_model(), family_model("phi4_multimodal"), {}
    x = model.encode(clip_of(noise(21000), size), "What?")
    ears, eyes = hf_model.model.embed_tokens_extend.audio_embed, hf_model.model.embed_tokens_extend.image_embed
    for kind, part in (("audio", ears.down_proj_for_vision_speech), ("image", eyes.img_projection_down)):
        part.register_forward_hook(lambda _, inputs, made, kind=kind: given.update({kind: made.shape[1]}))
    hf_model(**x.tensors)
    assert given == {kind: len(x.spans[kind]) for kind in ("audio", "image")}


# The door


@pytest.mark.parametrize(
    ("name", "layout", "kind"),
    [
        ("qwen2_audio", "sound", "audio"),
        ("phi4_multimodal", "sound", "audio"),
        ("phi4_multimodal", "still_sound", "image"),
    ],
)
def test_as_many_tokens_as_the_tower_gives_rows(name, layout, kind):
    model, x = family_model(name), encoded(name, layout)
    at, word = x.spans[kind].positions, {"audio": "sound", "image": "picture"}[kind]
    ids, n = x.tensors["input_ids"].clone(), len(at)
    ids[0, int(at[-1])] = 0
    with pytest.raises(avl.errors.InputError, match=rf"{n - 1} tokens of {word} and the {word}'s tower gives {n} rows"):
        model.hf_model(**(dict(x.tensors) | {"input_ids": ids}))
    bare = torch.tensor([[i for p, i in enumerate(x.tensors["input_ids"][0].tolist()) if p not in at[1:]]])
    with pytest.raises(avl.errors.InputError, match=rf"1 tokens of {word} and the {word}'s tower gives {n} rows"):
        model.hf_model(**(dict(x.tensors) | {"input_ids": bare, "attention_mask": torch.ones_like(bare)}))
    ids[0, at.tolist()] = 0
    with pytest.raises(
        avl.errors.InputError, match=rf"has 0 tokens of {word}.*they would not stand at their own places"
    ):
        model.hf_model(**(dict(x.tensors) | {"input_ids": ids}))
    tensor = model.family.adapter.media[kind]
    with pytest.raises(avl.errors.InputError, match=rf"placeholders of {kind}, but {tensor} did not come with them"):
        model.hf_model(**{name: value for name, value in x.tensors.items() if name != tensor})


@torch.no_grad()
def test_what_the_door_keeps_out():
    """HuggingFace's own classes make a longer prompt of bare ids, and spread one row over many tokens, in silence."""
    x, token = encoded("qwen2_audio"), family_model("qwen2_audio").placeholders[0]
    at = x.spans.audio.positions
    bare = torch.tensor([[i for p, i in enumerate(x.tensors["input_ids"][0].tolist()) if p not in at[1:]]])
    told = dict(x.tensors) | {"input_ids": bare, "attention_mask": torch.ones_like(bare)}
    assert int((bare == token).sum()) == 1
    assert reference("qwen2_audio")(**told).logits.shape[1] == len(x.spans)
    y = encoded("phi4_multimodal")
    told = dict(y.tensors) | {"audio_embed_sizes": torch.tensor([1])}
    assert torch.isfinite(reference("phi4_multimodal")(**told).logits).all()
    with pytest.raises(avl.errors.InputError, match=r"25 tokens of sound and the sound's tower gives 1 rows"):
        family_model("phi4_multimodal").hf_model(**told)


def test_each_sound_stands_in_its_own_example():
    short, long = (family_model("qwen2_audio").encode(clip_of(noise(n)), "What?") for n in (6400, 12800))
    model, n = family_model("qwen2_audio"), len(long.spans)
    rows = [torch.nn.functional.pad(one.ids, (n - len(one.spans), 0)) for one in (long, short)]
    told = {"input_ids": torch.cat(rows), "attention_mask": (torch.cat(rows) > 0).long()}
    told |= {
        key: torch.cat([short.tensors[key], long.tensors[key]]) for key in ("input_features", "feature_attention_mask")
    }
    with pytest.raises(avl.errors.InputError, match=r"20 and 10 tokens of sound and the sound's tower gives 10 and 20"):
        model.hf_model(**told)


@torch.no_grad()
def test_a_sound_of_one_token_takes_the_legacy_road_and_is_the_same():
    x = family_model("qwen2_audio").encode(clip_of(noise(800)), "What?")
    assert len(x.spans.audio) == 1
    assert torch.equal(family_model("qwen2_audio")(x), reference("qwen2_audio")(**x.tensors).logits)


REFUSALS = [
    (
        "qwen2_audio",
        {"picture": "video"},
        r"picture='video' is asked of a model that takes text and audio: use picture=None",
    ),
    ("qwen2_audio", {"sound": "in_video"}, r"sound='in_video' needs a video, and the picture is None: use sound='sep"),
    (
        "phi4_multimodal",
        {"picture": "video"},
        r"picture='video' is asked of a model that takes text and audio and image",
    ),
    (
        "phi4_multimodal",
        {"sound": "in_video"},
        r"sound='in_video' needs a video, and the picture is 'image': use sound",
    ),
]


@pytest.mark.parametrize(("name", "asked", "said"), REFUSALS)
def test_what_a_model_does_not_take_is_refused(name, asked, said):
    with pytest.raises(avl.errors.InputError, match=said):
        family_model(name).encode(small_clip(0), "What?", **asked)


@pytest.mark.parametrize(
    ("name", "n", "said"),
    [
        ("qwen2_audio", 31 * 16000, r"lasts 31.0 s and this processor hears at most 30 s: cut the clip first"),
        ("qwen2_audio", 300, r"lasts 19 ms: one token needs more than 20; give a longer clip"),
        ("phi4_multimodal", 300, r"lasts 19 ms, and one frame of this model's spectrogram 25: give a longer clip"),
    ],
)
def test_sounds_that_do_not_fit_are_refused(name, n, said):
    with pytest.raises(avl.errors.InputError, match=said):
        family_model(name).encode(clip_of(noise(n)), "What?", **TINY[name].layouts["sound"])


def test_sounds_of_unequal_frames_are_not_padded_together():
    model = family_model("phi4_multimodal")
    one, two = (model.encode(clip_of(noise(n)), "What?", picture=None) for n in (32000, 31800))
    assert len(one.spans) == len(two.spans)
    with pytest.raises(
        avl.errors.AlignmentError, match=r"audio_input_features is \[198, 80\] in one and \[197, 80\] in"
    ):
        avl.AVInputs.stack([one, two])


@pytest.mark.parametrize("name", ["audio_input_features", "image_sizes"])
def test_media_as_keywords_are_refused(name):
    model = family_model("phi4_multimodal")
    with pytest.raises(avl.errors.InputError, match=rf"{name}.*media go in by model.encode"):
        model(torch.zeros(1, 3, dtype=torch.long), **{name: torch.zeros(1)})


@pytest.mark.parametrize("name", HEARING)
@torch.no_grad()
def test_position_ids_as_keywords_are_heeded(name):
    model, ids = family_model(name), torch.arange(3, 9)[None]
    given = torch.tensor([[0, 1, 2, 10, 11, 12]])
    wanted = reference(name)(input_ids=ids, position_ids=given).logits
    assert torch.equal(model(ids, position_ids=given), wanted)
    assert not torch.allclose(model(ids), wanted)


# Fused weights, tables for part of a head, long prompts


def test_projections_stored_as_one_are_taken_apart_without_a_copy():
    hf_model = phi_hf_model()
    attention, mlp = hf_model.model.layers[1].self_attn, hf_model.model.layers[1].mlp
    fused, both = attention.qkv_proj.weight, mlp.gate_up_proj.weight
    model = avl.load("phi", hf_model=hf_model, processor=phi_processor())
    block = model.bridge.blocks[1]
    parts = [getattr(block.attn, kind).original_component.weight for kind in "qkv"]
    assert torch.equal(torch.cat(parts), fused)
    halves = [block.mlp._modules[kind].original_component.weight for kind in ("gate", "in")]
    assert torch.equal(torch.cat(halves), both)
    assert len({part.untyped_storage().data_ptr() for part in (*parts, fused)}) == 1
    assert not [
        name
        for name, _ in hf_model.named_parameters()
        if "layers" in name and ("qkv" in name or "gate_up" in name) and "embed" not in name
    ]
    assert torch.equal(model.W_Q[1].flatten(0, 1), fused[:64].T.reshape(64, 4, 16).transpose(0, 1).flatten(0, 1))


def test_projections_that_are_not_plain_are_not_taken_apart():
    class Packed(torch.nn.Linear):
        pass

    hf_model = phi_hf_model()
    layer = hf_model.model.layers[0]
    layer.mlp.gate_up_proj.__class__ = Packed
    with pytest.raises(avl.errors.ModelError, match=r"mlp.gate_up_proj is stored as one, .*Packed.*gate_proj, up_proj"):
        avl.load("phi", hf_model=hf_model, processor=phi_processor())
    biased = torch.nn.Linear(4, 8)  # its bias would be left behind
    with pytest.raises(avl.errors.ModelError, match=r"qkv is stored as one, .*without a bias \(Linear\), of which"):
        take_apart([torch.nn.ModuleDict({"qkv": biased})], {"qkv": ("q", "k", "v")}, keys=2)


@torch.no_grad()
def test_folded_weights_say_the_same():
    model, x = avl.load("phi", hf_model=phi_hf_model(), processor=phi_processor()), encoded("phi4_multimodal")
    torch.testing.assert_close(model.compatible()(x).log_softmax(-1), model(x).log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_part_of_a_head_is_turned_as_huggingface_turns_it(fused):
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import apply_rotary_pos_emb

    q, k = torch.randn(2, 1, 4, 7, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = torch.randn(2, 1, 7, 12, generator=torch.Generator().manual_seed(1))
    wanted = apply_rotary_pos_emb(q, k, cos, sin)
    for heads, right in zip((q, k), wanted, strict=True):
        found = rotated(heads, cos[:, None], sin[:, None], fused=fused)
        torch.testing.assert_close(found, right, atol=1e-6 if fused else 0, rtol=0)


def test_long_prompts_have_other_tables():
    model = family_model("phi4_multimodal")
    short, long = (model.trace(encoded("phi4_multimodal", layout)) for layout in ("sound", "still_sound"))
    assert len(short.spans) <= SHORT < len(long.spans)
    assert short.tables[0].shape[-1] == long.tables[0].shape[-1] == 12
    assert not torch.allclose(short.tables[0], long.tables[0][:, : len(short.spans)])


@pytest.mark.parametrize("n", [SHORT - 20, SHORT - 8, SHORT + 1])
def test_decoding_past_the_short_tables_is_huggingfaces(n):
    """There HuggingFace runs the whole sequence again; a trace leaves that to it, and goes on by itself elsewhere."""
    model = family_model("phi4_multimodal")
    x = model.encode(None, "w" * (n - 3))
    assert len(x.spans) == n
    wanted = reference("phi4_multimodal").generate(**x.tensors, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(x, max_new_tokens=16), wanted)
    assert torch.equal(model.trace(x).generate(Plan(), max_new_tokens=16)[0].tokens, wanted)


def drawn_plan(trace: Any, rng: np.random.Generator) -> Plan:
    """One to three edits of any kind at any component, layer, heads and positions."""
    edits = []
    for _ in range(rng.integers(1, 4)):
        scattered = sorted(rng.choice(len(trace.spans), rng.integers(1, 6), replace=False).tolist())
        positions = (None, "media", "question|generation", scattered)[rng.integers(4)]
        component, kind = COMPONENTS[rng.integers(len(COMPONENTS))], KINDS[rng.integers(len(KINDS))]
        layer, number = int(rng.integers(trace.model.spec.n_layers)), int(rng.integers(60))
        edits.append(edit_of(kind, site_of(component, trace, layer, number, positions), trace, number))
    return Plan(edits)


@cache
def in_float64() -> Any:
    model = avl.load(
        hf_model=copy.deepcopy(reference(name := "phi4_multimodal")).double(), processor=TINY[name].processor()
    )
    return model, model.trace(seeing())


def rounding(plan: Plan) -> bool:
    """Whether only roundings differ, blown up by the norm of a stream that an edit emptied: float64 tells."""
    model, trace = in_float64()
    wanted = run(model, seeing(), plan=plan, logits_at="all").logits
    assert wanted.dtype == torch.float64
    return float((trace.replay([plan], logits_at="all")[0] - wanted).abs().max()) <= 1e-12


@cache
def seeing() -> Any:
    return encoded("phi4_multimodal", "still_sound")


@pytest.mark.parametrize("n", [8, pytest.param(500, marks=pytest.mark.slow)])
@torch.no_grad()
def test_replay_is_the_hooked_run_beside_a_picture(n):
    model, x, rng, moved = family_model("phi4_multimodal"), seeing(), np.random.default_rng(1), 0
    with remembered_towers(model):
        trace = model.trace(x)
        assert not trace.hooked_because
        own = trace.logits("all")
        for _ in range(n // 8):
            plans = [drawn_plan(trace, rng) for _ in range(8)]
            for plan, found in zip(plans, trace.replay(plans, logits_at="all"), strict=True):
                wanted = run(model, x, plan=plan, logits_at="all").logits
                gap = float((found - wanted).abs().max())
                assert gap <= 1e-5 or (gap <= 1e-4 and rounding(plan)), shown(plan)
                moved += bool((wanted - own).abs().max() > 1e-3)
    assert moved > n // 2


@pytest.mark.slow
def test_every_hook_is_on_the_road_beside_a_picture():
    model = family_model("phi4_multimodal")
    with remembered_towers(model):
        assert not avl.model.check_model(model, seeing()).failed


@pytest.mark.parametrize("name", HEARING)
@torch.no_grad()
def test_a_saved_trace_opens(name, tmp_path):
    model, x = family_model(name), encoded(name)
    trace = model.trace(x)
    opened = avl.Trace.load(trace.save(tmp_path / "t"), model, x)
    assert torch.equal(opened.logits("all"), trace.logits("all"))


@pytest.mark.parametrize("name", HEARING)
@torch.no_grad()
def test_transformer_lens_restarts_at_a_layer(name):
    model, x = family_model(name), encoded(name)
    bound = model.bound(x)
    logits, cache = bound.run_with_cache(bound.ids)
    assert torch.equal(logits, model(x))
    again = bound(cache["blocks.2.hook_resid_pre"].repeat(2, 1, 1), start_at_layer=2)
    torch.testing.assert_close(again, logits.repeat(2, 1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", HEARING)
def test_towers_have_hooks_and_are_remembered_to_the_bit(name):
    model, x = family_model(name), encoded(name)
    seen: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any) -> torch.Tensor:
        seen[hook.name] = value
        return value

    names = ["audio_encoder.hook_in", "audio_encoder.hook_out"]
    with torch.no_grad():
        plain = model(x)
        with remembered_towers(model):
            assert torch.equal(model(x), plain)
            assert torch.equal(model.run_with_hooks(x, fwd_hooks=[(one, keep) for one in names]), plain)
        edited = model.run_with_hooks(x, fwd_hooks=[(names[1], lambda value, hook: value * 0.5)])
    assert [seen[one].shape[0] for one in names] == [1, 1]
    assert not torch.equal(edited, plain)


@torch.no_grad()
def test_the_eyes_have_hooks_and_are_remembered_to_the_bit():
    model, x = family_model("phi4_multimodal"), seeing()
    plain = model(x)
    with remembered_towers(model):
        assert all(torch.equal(model(x), plain) for _ in range(2))
    halved = [("vision_encoder.hook_out", lambda value, hook: value * 0.5)]
    assert not torch.equal(model.run_with_hooks(x, fwd_hooks=halved), plain)


def test_gradients_reach_mel_and_pixels():
    model, x = family_model("phi4_multimodal"), seeing()
    told = {name: x.tensors[name].clone().requires_grad_() for name in ("audio_input_features", "image_pixel_values")}
    logits = model.bridge(
        x.ids, **{key: value for key, value in (dict(x.tensors) | told).items() if key != "input_ids"}
    )
    logit_diff(letter("a"), letter("b")).bind()(logits[:, -1:]).sum().backward()
    assert all(value.grad is not None and bool(value.grad.abs().sum() > 0) for value in told.values())


def test_a_copy_takes_its_projections_along():
    model = avl.load("phi", hf_model=phi_hf_model(), processor=phi_processor())
    twin, x = copy.deepcopy(model.bridge), encoded("phi4_multimodal")
    with torch.no_grad():
        twin.blocks[0].attn.q.original_component.weight.zero_()
        given = {name: value for name, value in x.tensors.items() if name != "input_ids"}
        assert not torch.equal(twin(x.ids, **given), model(x))
        assert torch.equal(model(x), family_model("phi4_multimodal")(x))
