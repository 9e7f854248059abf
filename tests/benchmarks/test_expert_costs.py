"""Experts at the 30B's true widths, what rounding does to a router, and what experts cost (printed, with -s)."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from small_av import small_clip
from tiny import letter, randomized
from tiny_families import TINY, omni3_config, omni3_processor

import av_lens as avl
from av_lens.core import run
from av_lens.families.decoder import COMPONENTS, hook_name
from av_lens.inputs import Conflict
from av_lens.interventions import Plan, Site, replace, scale
from av_lens.metrics import logit_diff
from av_lens.model.selfcheck import turned

EIGHT = ("resid_pre", "resid_mid", "resid_post", "z", "result", "pattern", "rot_q", "mlp_out")
WIDTH, EXPERTS, CHOSEN = 2048, 128, 8


def true_config() -> Any:
    """Two layers of Qwen3-Omni-30B-A3B's thinker: every width of its configuration, and its towers' two layers deep."""
    config = omni3_config()
    config.text_config.update(
        {"vocab_size": 152064, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 32}
        | {"num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "intermediate_size": 768}
        | {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "mlp_only_layers": [], "initializer_range": 0.02}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20]}}
        | {"max_position_embeddings": 65536}
    )
    config.text_config.rope_parameters["mrope_interleaved"] = True
    config.vision_config.update(
        {"depth": 2, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": WIDTH}
        | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1], "initializer_range": 0.02}
    )
    config.audio_config.update(
        {"encoder_layers": 2, "d_model": 1280, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
        | {"output_dim": WIDTH, "downsample_hidden_size": 480, "num_mel_bins": 128, "initializer_range": 0.02}
    )
    config.seconds_per_chunk = 2  # as the checkpoint says, and no one reads
    return config


def true_processor() -> Any:
    """The processor class's own sizes of pictures, 128 mel bins, over the small vocabulary."""
    from transformers import Qwen3OmniMoeProcessor, WhisperFeatureExtractor

    processor = omni3_processor()
    processor.videos_kwargs = {"size": dict(Qwen3OmniMoeProcessor.videos_kwargs["size"])}
    processor.feature_extractor = WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16000, hop_length=160, n_fft=400, chunk_length=300, return_attention_mask=True
    )
    return processor


@torch.no_grad()
def true_hf_model() -> Any:
    """Random weights in bfloat16, of a size at which attention and routers are not flat."""
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration
    from transformers.initialization import no_init_weights

    config, generator = true_config(), torch.Generator().manual_seed(0)
    config._attn_implementation = "eager"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
        else:
            parameter.normal_(0.0, 1.8 / WIDTH**0.5, generator=generator)
    return model.eval()


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@pytest.mark.slow
@torch.no_grad()
def test_thirty_billion_wide(real_clip_path, capsys):
    began = time.perf_counter()
    hf_model, processor = true_hf_model(), true_processor()
    from av_lens.families.registry import family_of
    from av_lens.inputs.encoder import Encoder

    family = family_of(type(hf_model))
    encoder = Encoder(
        processor, hf_model.config, lambda tensors: family.position_ids(hf_model, tensors), media=family.media
    )
    shown = avl.load_clip(real_clip_path).trimmed(0.0, 1.0)
    x = encoder.encode(shown, "What do you hear in this clip?", sound="in_video")
    n = len(x.spans)
    wanted = hf_model(**x.tensors).logits  # before it is wrapped: a copy would cost its weights again
    answer = hf_model.generate(**x.tensors, max_new_tokens=4, do_sample=False)
    model = avl.load(hf_model=hf_model, processor=processor)
    assert torch.equal(model(x), wanted)
    assert torch.equal(model.generate(x, max_new_tokens=4), answer)
    last = run(model, x).logits
    del wanted
    back = [(hook_name(name, 1), lambda value, hook: value.clone()) for name in EIGHT]
    same = model.run_with_hooks(x, fwd_hooks=[*back, LAST])
    assert torch.equal(same[:, -1], last[:, -1]), "writing all eight back moved the logits"
    for name in EIGHT:
        hook = (hook_name(name, 1), lambda value, hook, name=name: turned(value, COMPONENTS[name]))
        other = model.run_with_hooks(x, fwd_hooks=[hook, LAST])
        assert not torch.equal(other[:, -1], last[:, -1]), f"turning {hook[0]} moved nothing"
    trace, donor = model.trace(x), model.encode(shown, "What do you miss in this clip?", sound="in_video")
    assert not trace.hooked_because
    assert len(donor.spans) == n
    given = run(model, donor, capture=[Site("z", 0, 5)]).cache["z", 0]
    plans = {
        "a head as it was, at every position": Plan(scale(Site("z", 0, head=5), 1.0)),
        "a head patched at the last position": Plan(replace(Site("z", 0, head=5, positions=[n - 1]), given[:, -1:])),
        "a head patched everywhere": Plan(replace(Site("z", 0, head=5), given)),
    }
    lines = [f"{n} positions, bfloat16: logits bit-equal, {len(EIGHT)} hooks, 4 tokens"]
    for (what, plan), replayed, frozen, told in zip(
        plans.items(),
        trace.replay([*plans.values()]),
        trace.replay([*plans.values()], routing="frozen"),
        trace.rerouted([*plans.values()]),
        strict=True,
    ):
        hooked, held = (
            model.run_with_hooks(x, fwd_hooks=[*beside, *plan.compile(model.spec, x.spans).fwd_hooks, LAST])[:, -1:]
            for beside in ([], trace.routing_hooks())
        )
        gaps = [float((one - two).abs().max()) for one, two in ((replayed, hooked), (frozen, held))]
        moved, held_moved = (float((one - last).abs().max()) for one in (replayed, frozen))
        lines.append(
            f"{what}: {int(told.sum())} of {told.numel()} tokens re-routed, logits moved by {moved:.3f}, with frozen "
            f"experts by {held_moved:.3f}; replay and hooks differ by {gaps[0]:.4f}, frozen by {gaps[1]:.4f}"
        )
    lines.append(f"{time.perf_counter() - began:.0f} s in all, peak {megabytes():.1f} GB")
    with capsys.disabled():
        print("\nQwen3-Omni-30B's widths, 2 layers, " + "\n  ".join(lines))
    assert megabytes() <= 24


LAST = ("unembed.hook_in", lambda value, hook: value[:, -2:])


@pytest.mark.slow
@torch.no_grad()
def test_what_rounding_does_to_a_router(capsys):
    """The share of rows that go to other experts when they are multiplied in blocks, or moved by one rounding."""
    generator = torch.Generator().manual_seed(0)
    lines = [
        "| precision | 8th and 9th tie | alone | in blocks of 50 | of 400 | after one rounding |",
        "|---|---|---|---|---|---|",
    ]
    for dtype, rounding in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-9)):
        weight = (torch.randn(EXPERTS, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
        rows = torch.randn(4000, WIDTH, generator=generator).to(dtype)
        whole = chosen(rows, weight)
        ranked = torch.nn.functional.linear(rows, weight).sort(-1, descending=True).values
        ties = float((ranked[:, CHOSEN - 1] == ranked[:, CHOSEN]).float().mean())
        shares = [other(torch.cat([chosen(part, weight) for part in rows.split(size)]), whole) for size in (1, 50, 400)]
        noise = torch.randn(rows.shape, generator=generator)
        shares.append(other(chosen((rows.float() * (1 + rounding * noise)).to(dtype), weight), whole))
        named = str(dtype).removeprefix("torch.")
        lines.append(f"| {named} | {ties:.1%} | " + " | ".join(f"{share:.2%}" for share in shares) + " |")
        if dtype == torch.float32:
            assert max(shares[:3]) == 0
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def chosen(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As Qwen3's router does it: softmax in float32, the largest eight."""
    logits = torch.nn.functional.linear(rows, weight)
    return logits.softmax(-1, dtype=torch.float32).topk(CHOSEN, dim=-1).indices.sort(-1).values


def other(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one != two).any(-1).float().mean())


def of_like_size() -> dict[str, Any]:
    """A tiny Qwen2.5-Omni and a tiny Qwen3-Omni: 4 layers of 4 heads, as many units in a token's MLPs."""
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    config = omni3_config()
    config.text_config.update({"mlp_only_layers": [], "moe_intermediate_size": 64})
    experts = randomized(Qwen3OmniMoeThinkerForConditionalGeneration, config, 0)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if "experts" in name or name.endswith("mlp.gate.weight"):
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    built = {
        "Qwen2.5-Omni": (TINY["qwen2_5_omni"].hf_model(0), "qwen2_5_omni"),
        "Qwen3-Omni": (experts, "qwen3_omni_moe"),
    }
    return {what: avl.load(what, hf_model=one, processor=TINY[name].processor()) for what, (one, name) in built.items()}


def seconds(work: Callable[[], Any], rounds: int) -> float:
    taken: list[float] = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def conflicts(n: int) -> Sequence[Conflict]:
    answers = [letter(name) for name in "abcd"]
    return [
        Conflict(
            sound=small_clip(2 * i),
            picture=small_clip(2 * i + 1),
            question="What?",
            answers=(answers[i % 4], answers[(i + 1) % 4]),
            id=f"c{i}",
        )
        for i in range(n)
    ]


@pytest.mark.slow
def test_experts_cost_no_more_than_a_plain_mlp(capsys):
    models, metric = of_like_size(), logit_diff(letter("a"), letter("b"))
    listed = conflicts(40)
    works: dict[str, tuple[Callable[[Any], Any], int]] = {
        "find_circuit": (lambda model: avl.methods.find_circuit(model, pair_of(model), metric=metric), 3),
        "isolate": (lambda model: avl.isolate(model, listed, gate="report", quick=True), 1),
    }
    for what, (work, rounds) in works.items():
        work(models["Qwen3-Omni"]) if rounds > 1 else None
        taken = {name: seconds(lambda model=model, work=work: work(model), rounds) for name, model in models.items()}
        each = {name: one / models[name].spec.n_layers / models[name].spec.n_heads for name, one in taken.items()}
        ratio = each["Qwen3-Omni"] / each["Qwen2.5-Omni"]
        with capsys.disabled():
            told = ", ".join(f"{name} {one:.3f} s a layer and head" for name, one in each.items())
            print(f"\n{what}: {told}: {ratio:.2f} times")
        assert ratio <= 1.3


def pair_of(model: Any) -> avl.Pair:
    one, two = (model.encode(small_clip(seed), "What?") for seed in (0, 1))
    return avl.Pair(clean=one, corrupt=two)
