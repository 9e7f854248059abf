"""Every family, one suite: logits, hooks, decoding, replay and TransformerLens's tools on tiny checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drawn_plans import COMPONENTS, KINDS, edit_of, shown, site_of
from small_av import small_clip
from tiny_families import TINY, family_model, folder, reference

import av_lens as avl
from av_lens.core import run
from av_lens.interventions import Plan

FAMILIES = tuple(TINY)
CASES = [(name, layout) for name, tiny in TINY.items() for layout in tiny.layouts]


def encoded(name: str, layout: str, seed: int = 0, **more: Any) -> Any:
    clip = small_clip(seed)
    return family_model(name).encode(clip, "What?", **(dict(TINY[name].layouts[layout]) | more))


@pytest.mark.parametrize(("name", "layout"), CASES)
@torch.no_grad()
def test_logits_are_huggingfaces_to_the_bit(name, layout):
    x = encoded(name, layout)
    wanted = reference(name)(**x.tensors).logits
    assert wanted.std() > 0.1
    assert torch.equal(family_model(name)(x), wanted)
    batch = avl.AVInputs.stack([x, encoded(name, layout, seed=1)])
    assert torch.equal(family_model(name)(batch), reference(name)(**batch.tensors).logits)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_greedy_decoding_is_huggingfaces(name, layout):
    x = encoded(name, layout)
    wanted = reference(name).generate(**x.tensors, max_new_tokens=16, do_sample=False)
    assert torch.equal(family_model(name).generate(x, max_new_tokens=16), wanted)
    trace = family_model(name).trace(x)
    assert torch.equal(trace.generate(Plan(), max_new_tokens=16)[0].tokens, wanted)


def drawn_plan(trace: Any, rng: np.random.Generator) -> Plan:
    """One to three edits of any kind at any component, layer, heads and positions."""
    edits = []
    for _ in range(rng.integers(1, 4)):
        n = len(trace.spans)
        positions = (None, "media", "question|generation", sorted(rng.choice(n, rng.integers(1, 6), False).tolist()))
        component, kind = COMPONENTS[rng.integers(len(COMPONENTS))], KINDS[rng.integers(len(KINDS))]
        layer, number = int(rng.integers(trace.model.spec.n_layers)), int(rng.integers(60))
        site = site_of(component, trace, layer, number, positions[rng.integers(4)])
        edits.append(edit_of(kind, site, trace, number))
    return Plan(edits)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("n", [24, pytest.param(500, marks=pytest.mark.slow)])
@torch.no_grad()
def test_replay_is_the_hooked_run(name, n):
    x = encoded(name, next(iter(TINY[name].layouts)))
    trace, rng, moved = family_model(name).trace(x), np.random.default_rng(0), 0
    assert not trace.hooked_because
    own = trace.logits("all")
    for _ in range(n // 8):
        plans = [drawn_plan(trace, rng) for _ in range(8)]
        for plan, found in zip(plans, trace.replay(plans, logits_at="all"), strict=True):
            wanted = run(family_model(name), x, plan=plan, logits_at="all").logits
            assert float((found - wanted).abs().max()) <= 1e-5, shown(plan)
            moved += bool((wanted - own).abs().max() > 1e-3)
    assert moved > n // 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_opens(name, tmp_path):
    model = avl.load(folder(name, tmp_path / "it"), dtype="float32")
    x = encoded(name, next(iter(TINY[name].layouts)))
    assert torch.equal(model(x), family_model(name)(x))


def test_sound_is_refused_where_there_are_no_ears():
    model = family_model("qwen2_5_vl")
    assert not len(model.encode(small_clip(0), "What?").spans.audio)
    with pytest.raises(avl.errors.InputError, match=r"takes text and video and image: use sound=None"):
        model.encode(small_clip(0), "What?", sound="separate")


def test_a_video_that_outlasts_its_picture_shares_ids_with_the_text_that_follows():
    """Qwen2.5-VL's own rule: text resumes after rows and columns, whatever the time."""
    x = family_model("qwen2_5_vl").encode(small_clip(0, seconds=6.0), "What?")
    own = reference("qwen2_5_vl").model.get_rope_index(
        x.tensors["input_ids"],
        x.tensors["mm_token_type_ids"],
        video_grid_thw=x.tensors["video_grid_thw"],
        second_per_grid_ts=x.tensors["second_per_grid_ts"],
        attention_mask=x.tensors["attention_mask"],
    )[0]
    assert torch.equal(x.position_ids, own)
    video = x.spans.video.positions.tolist()
    assert int(own[0, 0, video[-1] + 1]) <= int(own[0, 0, video].max())
    table = x.table()
    np.testing.assert_allclose(table.loc[video, "start_s"].unique(), np.arange(0, 6.0, 1.0))


def test_it_is_the_base_of_an_omni_model():
    model, base = family_model("qwen2_5_omni"), family_model("qwen2_5_vl")
    x = encoded("qwen2_5_omni", "in_video")
    found = avl.methods.base_shift(model, x, base=base)
    assert found.grid.values.sel(figure="kl(model||base)", word_class="all", prompt="own").item() > 0.1
