"""At the true width of the 7B text model: bit for bit, on a prompt of 1,000 positions made from a real clip."""

from __future__ import annotations

import resource
import time

import pytest
import torch
from tiny import tiny_config, tiny_processor

from av_lens.families.decoder import COMPONENTS, hook_name
from av_lens.model import load
from av_lens.model.selfcheck import turned
from av_lens.organism.anatomy import build_model

EIGHT = ("resid_pre", "resid_mid", "resid_post", "z", "result", "pattern", "rot_q", "mlp_post")


def wide_model():
    """Two layers of the 7B text model, random, in bfloat16; small towers."""
    config = tiny_config(
        n_layers=2, d_model=3584, n_heads=28, n_kv_heads=4, intermediate_size=18944, vocab_size=152064,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    return build_model(config, seed=0, dtype=torch.bfloat16)


@pytest.mark.slow
@torch.no_grad()
def test_seven_billion_wide(real_clip_path, capsys):
    from av_lens.families.registry import family_of
    from av_lens.inputs.encoder import Encoder
    from av_lens.media import load_clip

    began = time.perf_counter()
    hf_model, processor = wide_model(), tiny_processor()
    processor.videos_kwargs = {"size": {"shortest_edge": 32 * 28 * 28, "longest_edge": 64 * 28 * 28}}
    family = family_of(type(hf_model))
    encoder = Encoder(processor, hf_model.config, lambda tensors: family.position_ids(hf_model, tensors))
    x = encoder.encode(load_clip(real_clip_path), "What do you hear in this clip? " * 3, sound="in_video")
    n = len(x.spans)
    assert 900 <= n <= 1100
    wanted = hf_model(**x.tensors).logits  # the reference runs before it is wrapped: a copy would not fit
    answer = hf_model.generate(**x.tensors, max_new_tokens=4, do_sample=False)
    forward_s = time.perf_counter()
    model = load(hf_model=hf_model, processor=processor)
    logits = model(x)
    forward_s = time.perf_counter() - forward_s
    assert torch.equal(logits, wanted)
    assert torch.equal(model.generate(x, max_new_tokens=4), answer)
    last = logits[:, -1]
    del wanted, logits
    same = model.run_with_hooks(
        x, fwd_hooks=[(hook_name(name, 1), lambda value, hook: value.clone()) for name in EIGHT]
    )
    assert torch.equal(same[:, -1], last), "writing all eight back moved the logits"
    for name in EIGHT:
        hook = hook_name(name, 1)
        other = model.run_with_hooks(x, fwd_hooks=[(hook, lambda v, hook, name=name: turned(v, COMPONENTS[name]))])
        assert not torch.equal(other[:, -1], last), f"turning {hook} moved nothing"
    seconds, gigabytes = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with capsys.disabled():
        print(
            f"\n7B width, 2 layers, bfloat16, {n} positions: logits bit-equal, {len(EIGHT)} hooks, 4 tokens; "
            f"{seconds:.0f} s in all, load and forward {forward_s:.1f} s, peak {gigabytes:.1f} GB"
        )
    assert seconds <= 240
    assert gigabytes <= 10
