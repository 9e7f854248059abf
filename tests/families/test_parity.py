"""Every family, one suite: logits, hooks, decoding, replay and TransformerLens's tools on tiny checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from brute_edges import naive
from brute_paths import Brute, ends, of
from drawn_plans import drawn_plan, shown
from media_moves import by_sound, by_square
from small_av import small_clip
from tiny import letter
from tiny_families import TINY, family_model, folder, full_folder, reference, twin

import av_lens as avl
from av_lens.core import run
from av_lens.interventions import Plan, Site, zero
from av_lens.interventions.edges import senders
from av_lens.interventions.edits import UNITS
from av_lens.methods import edge_attribution, path_patch
from av_lens.metrics import logit_diff
from av_lens.model.binding import remembered_towers

PATHS = [((0, 1), (1, 2, "q")), ((0, 3), (2, 1, "k")), ((1, 2), "logits"), ((0, "mlp"), (3, 0, "v"))]
METRIC = logit_diff(letter("a"), letter("b"))
FAMILIES = tuple(TINY)


def asked_of(*names: str) -> list[Any]:
    """Every family; of those that are not named only the slow part asks."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


# The dear proofs are asked by default of the families that have most of their own, and by the slow part of all.
DEEP, DEEPEST = asked_of("qwen3_omni_moe", "phi4_multimodal"), asked_of("qwen3_omni_moe")
CASES = [(name, layout) for name, tiny in TINY.items() for layout in tiny.layouts]
FIRST = [(name, next(iter(tiny.layouts))) for name, tiny in TINY.items() if tiny.media]  # with the most media


def encoded(name: str, layout: str, seed: int = 0, **more: Any) -> Any:
    tiny = TINY[name]
    clip = small_clip(seed) if tiny.media else None
    return family_model(name).encode(clip, tiny.questions[seed], **(dict(tiny.layouts[layout]) | more))


def layers_of_its_own(name: str) -> str:
    """What a family's layers do beyond the known layout, as it declares: what reads their weights is refused then."""
    model = family_model(name)
    return model.family.replay_traits(model.config).layers


@contextmanager
def unless_refused(name: str) -> Iterator[bool]:
    """Whether a proof applies; where the family declares that it does not, what is inside must be refused."""
    own = layers_of_its_own(name)
    if not own:
        yield True
        return
    with pytest.raises(avl.errors.ModelError, match=own):
        yield False


@pytest.mark.parametrize(("name", "layout"), CASES)
@torch.no_grad()
def test_logits_are_huggingfaces_to_the_bit(name, layout):
    x = encoded(name, layout)
    wanted = reference(name)(**x.tensors).logits
    assert wanted.std() > 0.1
    assert torch.equal(family_model(name)(x), wanted)
    with remembered_towers(family_model(name)):  # what an isolation does: encoded once, then given from memory
        assert all(torch.equal(family_model(name)(x), wanted) for _ in range(2))
    batch = avl.AVInputs.stack([x, encoded(name, layout, seed=1)])
    assert torch.equal(family_model(name)(batch), reference(name)(**batch.tensors).logits)


@pytest.mark.parametrize(
    ("name", "layout"), [pytest.param(*one, marks=[] if one in FIRST else pytest.mark.slow) for one in CASES]
)
def test_greedy_decoding_is_huggingfaces(name, layout):
    x = encoded(name, layout)
    wanted = reference(name).generate(**x.tensors, max_new_tokens=16, do_sample=False)
    assert torch.equal(family_model(name).generate(x, max_new_tokens=16), wanted)
    trace = family_model(name).trace(x)
    assert torch.equal(trace.generate(Plan(), max_new_tokens=16)[0].tokens, wanted)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("n", [16, pytest.param(500, marks=pytest.mark.slow)])
@torch.no_grad()
def test_replay_is_the_hooked_run(name, n):
    x = encoded(name, next(iter(TINY[name].layouts)))
    trace, rng, moved = family_model(name).trace(x), np.random.default_rng(0), 0
    assert (layers_of_its_own(name) in trace.hooked_because) if layers_of_its_own(name) else not trace.hooked_because
    own = trace.logits("all")
    for _ in range(n // 8):
        plans = [drawn_plan(trace, rng) for _ in range(8)]
        for plan, found in zip(plans, trace.replay(plans, logits_at="all"), strict=True):
            wanted = run(family_model(name), x, plan=plan, logits_at="all").logits
            assert float((found - wanted).abs().max()) <= 1e-5, shown(plan)
            moved += bool((wanted - own).abs().max() > 1e-3)
    assert moved > n // 2


@pytest.mark.parametrize("name", DEEPEST)
def test_every_hook_is_on_the_road(name):
    layout = next(iter(TINY[name].layouts))
    assert not avl.model.check_model(family_model(name), encoded(name, layout)).failed


@cache
def pair(name: str) -> avl.Pair:
    layout = next(iter(TINY[name].layouts))
    return avl.Pair(clean=encoded(name, layout), corrupt=encoded(name, layout, seed=1))


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("mlps", ["frozen", "free"])
@pytest.mark.parametrize(
    ("sender", "receiver"),
    [((0, 1), (1, 2, "q")), ((0, 3), (2, 1, "k")), ((1, 2), "logits"), ((0, "mlp"), (3, 0, "v"))],
)
def test_path_patching_is_the_brute_force(name, mlps, sender, receiver):
    model, one = family_model(name), pair(name)
    with unless_refused(name) as applies:
        grid = path_patch(model, one, sender=sender, receiver=receiver, metric=METRIC, mlps=mlps)
    if not applies:
        return
    brute = Brute(twin(name), one.corrupt, one.clean, 2, mlps=mlps)
    sending = next(iter(senders(sender, model.spec, one.clean.spans.roles).values()))
    wanted = of(METRIC, model, brute.value(sending, ends(receiver, model.spec)))
    np.testing.assert_allclose(grid.values.values.reshape(1), wanted, atol=1e-5, rtol=0)
    assert float(np.abs(grid.effects.values).max()) > 1e-5


@pytest.mark.parametrize("name", DEEP)
def test_edges_are_the_gradients_of_the_definition(name):
    with unless_refused(name) as applies:
        found = edge_attribution(family_model(name), pair(name), metric=METRIC)
    if not applies:
        return
    wanted = naive(twin(name), pair(name).corrupt, pair(name).clean, METRIC)
    for (sender, receiver), score in wanted.items():
        got = found.values.sel(sender=sender, receiver=receiver).values
        np.testing.assert_allclose(got, score.numpy(), atol=1e-5, rtol=0, err_msg=f"{sender} to {receiver}")


@pytest.mark.parametrize("name", DEEP)
def test_shares_sum_to_the_logit_difference(name):
    x = encoded(name, next(iter(TINY[name].layouts)))
    with unless_refused(name) as applies:
        shares = avl.direct_attribution(family_model(name), x, metric=METRIC)
    if not applies:
        with unless_refused(name):
            family_model(name).run_with_cache(x)[1].decompose_resid()
        return
    np.testing.assert_allclose(shares.effects.sum("part"), shares.baseline, atol=1e-4)
    trace = family_model(name).trace(x)
    _, cached = family_model(name).run_with_cache(x)
    parts, _ = cached.decompose_resid(return_labels=True)
    total = parts.sum(0)
    for added in trace.added.values():
        total[:, : added.shape[1]] += added
    torch.testing.assert_close(total, cached["resid_post", -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", DEEPEST)
def test_a_circuit_is_found(name):
    circuit = avl.methods.find_circuit(family_model(name), pair(name), metric=METRIC)
    assert len(circuit.nodes)


@pytest.mark.parametrize("component", UNITS)
def test_experts_have_no_units(component):
    model, x = family_model("qwen3_omni_moe"), encoded("qwen3_omni_moe", "video")
    with pytest.raises(avl.errors.InterventionError, match=rf"layer 2 chooses among experts.* has no {component}"):
        model.trace(x).replay([Plan(zero(Site(component, 2)))])
    assert model.trace(x).replay([Plan(zero(Site(component, 1)))]) is not None  # layer 1 has a plain MLP
    with pytest.raises(avl.errors.InterventionError, match="unknown hook"):
        model.run_with_cache(x, ["blocks.2.mlp.hook_pre"])


def test_a_saved_trace_keeps_what_pictures_add(tmp_path):
    model, x = family_model("qwen3_omni_moe"), encoded("qwen3_omni_moe", "video")
    trace, plan = model.trace(x), Plan(zero(Site("z", 1, 0, "video")))
    opened = avl.Trace.load(trace.save(tmp_path / "t"), model, x)
    assert sorted(trace.added) == [0, 1]
    assert torch.equal(opened.replay([plan])[0], trace.replay([plan])[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_opens(name, tmp_path):
    model = avl.load(folder(name, tmp_path / "it"), dtype="float32")
    x = encoded(name, next(iter(TINY[name].layouts)))
    assert torch.equal(model(x), family_model(name)(x))


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_of_a_full_checkpoint_the_thinker_opens(name, tmp_path):
    model = avl.load(full_folder(name, tmp_path / "it"), dtype="float32")
    x = encoded(name, "in_video")
    assert torch.equal(model(x), family_model(name)(x))


def test_sound_is_refused_where_there_are_no_ears():
    model = family_model("qwen2_5_vl")
    assert not len(model.encode(small_clip(0), "What?").spans.audio)
    with pytest.raises(avl.errors.InputError, match=r"takes text and video and image: use sound=None"):
        model.encode(small_clip(0), "What?", sound="separate")


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_as_many_tokens_of_sound_as_the_tower_gives_rows(name):
    model, x = family_model(name), encoded(name, "audio")
    n, ids = len(x.spans.audio), x.tensors["input_ids"].clone()
    ids[0, x.spans.audio.positions[-1].item()] = 0
    with pytest.raises(avl.errors.InputError, match=rf"{n - 1} tokens of sound and the sound's tower gives {n} rows"):
        model.hf_model(**(dict(x.tensors) | {"input_ids": ids}))


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


@pytest.mark.parametrize(("name", "layout"), [case for case in CASES if case[1] in ("in_video", "separate", "audio")])
def test_a_second_of_sound_moves_just_its_tokens(name, layout):
    found, said, n = by_sound(family_model(name), dict(TINY[name].layouts[layout]), TINY[name].reach)
    assert found == said
    assert 0 < len(found) < n


@pytest.mark.parametrize(
    ("name", "layout"), [case for case in CASES if case[1] in ("in_video", "separate", "video", "image")]
)
def test_a_square_of_the_picture_moves_just_its_token(name, layout):
    for found, said in by_square(family_model(name), dict(TINY[name].layouts[layout])):
        assert found == said


def test_it_is_the_base_of_an_omni_model():
    model, base = family_model("qwen2_5_omni"), family_model("qwen2_5_vl")
    x = encoded("qwen2_5_omni", "in_video")
    found = avl.methods.base_shift(model, x, base=base)
    assert found.grid.values.sel(figure="kl(model||base)", word_class="all", prompt="own").item() > 0.1
