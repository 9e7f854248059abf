"""The ruler for planted heads: reversions give back the base model; kinds follow from where an effect goes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from imagined import imagined_pool, imagined_thinker

from av_lens.lab.planting import planted
from av_lens.lab.planting import sheets as planted_runs
from av_lens.lab.training.courses import recipe
from av_lens.lab.training.engine import train_stage
from av_lens.lab.training.pools import make_frame, make_words, material
from av_lens.organism.language import read_out, run_layers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
HEADS = ((1, 2), (1, 3))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    base, model = imagined_thinker(), imagined_thinker()
    stage = dataclasses.replace(
        recipe("av-tiny-planted").stages[-1], layers=(1,), only_heads=((1, (2, 3)),), dropped_heads=HEADS, steps=3
    )
    train_stage(model, stage, material(imagined_pool()), seed=0)
    return base, model


def made(model: Any, base: Any, heads: Any = HEADS) -> planted_runs.Bench:
    return planted_runs.bench(
        model, base, heads, imagined_pool(seed=1), make_words(), make_frame("separate"), n=6, seed=0
    )


def plain(bench: planted_runs.Bench, model: Any, cell: str) -> torch.Tensor:
    """The logits by the forward of `language`, which knows nothing of reversions."""
    x = run_layers(model, bench.first[cell], bench.geometry, start=bench.layers[0])
    return read_out(model, x[:, -1])


@torch.no_grad()
def test_putting_all_planted_heads_back_gives_the_base_model(models: tuple[Any, Any]) -> None:
    base, model = models
    bench = made(model, base)
    for cell in ("va", "av", "blank_a"):
        before, after = plain(bench, base, cell), planted_runs.whole(bench, cell).logits
        torch.testing.assert_close(after, plain(bench, model, cell), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(planted_runs.whole(bench, cell, HEADS).logits, before, atol=1e-4, rtol=1e-4)
        assert (after - before).abs().max() > 1e-2


@torch.no_grad()
def test_a_head_is_put_back_alone_though_its_neighbour_shares_its_keys(models: tuple[Any, Any]) -> None:
    """Its keys and values become the base's; its neighbour keeps the planted ones."""
    base, model = models
    bench = made(model, base)
    one = planted_runs.whole(bench, "va", [(1, 2)])
    then = base.model.language_model.layers[1].self_attn
    norm = model.model.language_model.layers[1].input_layernorm
    h = torch.nn.functional.rms_norm(bench.first["va"], (128,), norm.weight, norm.variance_epsilon)
    z_then = planted_runs.all_z(then, h, bench.geometry)
    z_now = planted_runs.all_z(model.model.language_model.layers[1].self_attn, h, bench.geometry)
    torch.testing.assert_close(one.z[1][:, 2], z_then[:, 2])
    torch.testing.assert_close(one.z[1][:, 3], z_now[:, 3])


@torch.no_grad()
def test_a_donor_that_is_the_run_itself_changes_nothing(models: tuple[Any, Any]) -> None:
    bench = made(models[1], models[0])
    for back in ((), ((1, 3),)):
        va, blank = planted_runs.whole(bench, "va", back), planted_runs.whole(bench, "blank_v", back)
        same = planted_runs.donated(bench, va, va, (1, 2), back)
        torch.testing.assert_close(same, va.logits, atol=1e-4, rtol=1e-4)
        other = planted_runs.donated(bench, va, blank, (1, 2), back)
        assert (other - va.logits).abs().max() > 1e-3


def test_the_cells_hold_the_media_their_names_say(models: tuple[Any, Any]) -> None:
    base, model = models
    first = made(model, base, [(0, 2), (0, 3)]).first
    frame = make_frame("separate")
    assert torch.equal(first["va"][:, frame.video], first["vw"][:, frame.video])
    assert torch.equal(first["va"][:, frame.audio], first["blank_a"][:, frame.audio])
    assert torch.equal(first["av"][:, frame.audio], first["wv"][:, frame.audio])
    assert torch.equal(first["blank_a"][:, frame.video], first["blank_v"][:, frame.video])
    assert not torch.equal(first["va"][:, frame.video], first["wa"][:, frame.video])
    assert not torch.equal(first["va"][:, frame.audio], first["vw"][:, frame.audio])


@torch.no_grad()
def test_in_the_last_layer_all_of_an_effect_is_direct() -> None:
    base, model = imagined_thinker(), imagined_thinker()
    weight = model.model.language_model.layers[2].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, 16:32] += 0.5 * torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    bench = made(model, base, [(2, 1)])
    truth = planted.measure(bench)
    assert truth.nodes[0].direct_share == pytest.approx(1.0, abs=1e-4)
    assert truth.nodes[0].adds == pytest.approx(truth.nodes[0].alone)
    c = bench.half(plain(bench, base, "va"), plain(bench, base, "av"))
    assert truth.c_reverted == pytest.approx(c, abs=1e-4)
    assert truth.restored([(2, 1)]) == pytest.approx((c - truth.c) / (truth.g - truth.c), abs=1e-4)


def test_heads_of_two_layers_are_put_back_together(models: tuple[Any, Any]) -> None:
    base = models[0]
    model = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (0, 2):
            weight = model.model.language_model.layers[layer].self_attn.o_proj.weight
            weight[:, 16:32] += 0.5 * torch.randn(128, 16, generator=torch.Generator().manual_seed(layer))
    bench = made(model, base, [(0, 1), (2, 1)])
    both = planted_runs.whole(bench, "va", [(0, 1), (2, 1)]).logits
    torch.testing.assert_close(both, plain(bench, base, "va"), atol=1e-4, rtol=1e-4)
    half = copy.deepcopy(model)
    half.model.language_model.layers[0].load_state_dict(base.model.language_model.layers[0].state_dict())
    one = planted_runs.whole(bench, "va", [(0, 1)]).logits
    torch.testing.assert_close(one, plain(bench, half, "va"), atol=1e-4, rtol=1e-4)


def test_a_head_that_changes_nothing_is_a_free_rider(models: tuple[Any, Any]) -> None:
    base, model = models
    truth = planted.measure(made(model, base, [(1, 2), (1, 7)]))
    assert truth.nodes[1].kind == "free rider"
    assert truth.as_dict()["heads"][1]["free_rider"]
    assert truth.as_dict()["layers"] == [1]
    assert truth.as_dict()["conflicts"] == 6


A, B, C, D = (4, 0), (4, 1), (6, 2), (6, 3)


def rises(*enough: set[planted.Node]) -> dict[frozenset[planted.Head], float]:
    """What putting heads back restores where the sound is silenced as long as any of some groups is whole."""
    heads = (A, B, C, D)
    sets = [frozenset(head for i, head in enumerate(heads) if bits >> i & 1) for bits in range(16)]
    return {back: float(all(group & back for group in enough)) for back in sets}


def test_or_alone_is_nothing_and_together_everything() -> None:
    either = rises({A, B}, {C, D})
    for head, partners in ((A, {C, D}), (C, {A, B})):
        adds, context = planted.best_context(either, head)
        assert either[frozenset({head})] == 0
        assert adds == 1
        assert context <= partners
        assert context


def test_and_is_all_alone() -> None:
    adds, context = planted.best_context(rises({A, B, C, D}), B)
    assert (adds, context) == (1, frozenset())


def test_a_head_that_adds_half_alone_is_measured_alone() -> None:
    added = {frozenset(): 0.0, frozenset({A}): 0.3, frozenset({C}): 0.1, frozenset({A, C}): 0.7}
    assert planted.best_context(added, A) == (pytest.approx(0.6), frozenset())
    added[frozenset({A})] = 0.2
    assert planted.best_context(added, A) == (pytest.approx(0.6), frozenset({C}))


def test_kinds_by_hand() -> None:
    def kind(adds: float, direct: float, picture: float, sound: float) -> str:
        return planted.kind_of(adds=adds, direct_share=direct, reads_picture=picture, reads_sound=sound)

    assert kind(0.049, 1.0, 0.5, 0.1) == "free rider"
    assert kind(0.05, 0.5, 0.5, 0.1) == "writer"
    assert kind(0.05, 0.5, 0.1, 0.5) == "opponent"
    assert kind(0.9, 0.49, 0.5, 0.1) == "gate"
