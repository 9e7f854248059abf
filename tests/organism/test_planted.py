"""The ruler for planted heads: reversions give back the base model; kinds follow from where an effect goes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from imagined import imagined_pool

from av_lens.organism import planted
from av_lens.organism.anatomy import build_model, thinker_config
from av_lens.organism.material import make_frame, make_words, material
from av_lens.organism.recipes import plants
from av_lens.organism.training import train_stage

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
HEADS = [(1, 2), (1, 3)]


def thinker() -> Any:
    model = build_model(thinker_config(n_layers=3), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    base, model = thinker(), thinker()
    stage = dataclasses.replace(plants(), layers=(1,), only_heads=((1, (2, 3)),), dropped_heads=tuple(HEADS), steps=3)
    train_stage(model, stage, material(imagined_pool()), seed=0)
    return base, model


def made(model: Any) -> planted.Bench:
    return planted.bench(model, imagined_pool(seed=1), make_words(), make_frame("separate"), n=6, seed=0)


@torch.no_grad()
def test_putting_all_planted_heads_back_gives_the_base_model(models: tuple[Any, Any]) -> None:
    base, model = models
    after, before = made(model), made(base)
    for cell in ("va", "av", "blank_a"):
        put_back = planted.reverted(after, base, HEADS, cell, frozen=False)
        torch.testing.assert_close(put_back, before.cells[cell].logits, atol=1e-4, rtol=1e-4)
        assert (after.cells[cell].logits - before.cells[cell].logits).abs().max() > 1e-2


@torch.no_grad()
def test_a_donor_that_is_the_run_itself_changes_nothing(models: tuple[Any, Any]) -> None:
    runs = made(models[1])
    same = planted.donated(runs, (1, 2), "va", "va")
    torch.testing.assert_close(same, runs.cells["va"].logits, atol=1e-4, rtol=1e-4)
    other = planted.donated(runs, (1, 2), "va", "blank_v")
    assert (other - runs.cells["va"].logits).abs().max() > 1e-3


def test_the_cells_hold_the_media_their_names_say(models: tuple[Any, Any]) -> None:
    runs = made(models[1])
    first = {name: cell.streams[0] for name, cell in runs.cells.items()}
    frame = make_frame("separate")
    assert torch.equal(first["va"][:, frame.video], first["vw"][:, frame.video])
    assert torch.equal(first["va"][:, frame.audio], first["blank_a"][:, frame.audio])
    assert torch.equal(first["av"][:, frame.audio], first["wv"][:, frame.audio])
    assert torch.equal(first["blank_a"][:, frame.video], first["blank_v"][:, frame.video])
    assert not torch.equal(first["va"][:, frame.video], first["wa"][:, frame.video])
    assert not torch.equal(first["va"][:, frame.audio], first["vw"][:, frame.audio])


def test_in_the_last_layer_all_of_an_effect_is_direct() -> None:
    base, model = thinker(), thinker()
    weight = model.model.language_model.layers[2].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, 16:32] += 0.5 * torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    runs = made(model)
    truth = planted.measure(runs, base, [(2, 1)])
    assert truth.heads[0].direct_share == pytest.approx(1.0)
    assert truth.heads[0].adds == pytest.approx(truth.heads[0].alone)
    untouched = made(base)
    c = untouched.half(untouched.cells["va"].logits, untouched.cells["av"].logits)
    assert truth.c_reverted == pytest.approx(c, abs=1e-4)


def test_a_head_that_changes_nothing_is_a_free_rider(models: tuple[Any, Any]) -> None:
    base, model = models
    truth = planted.measure(made(model), base, [(1, 2), (1, 7)])
    assert [head.kind for head in truth.heads][1] == "free rider"
    assert truth.as_dict()["layers"] == [1]
    assert truth.as_dict()["conflicts"] == 6
