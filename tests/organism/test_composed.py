"""Mixtures and cross-talk: weights scaled as said, a projector that gives the features said, the gap asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from imagined import imagined_pool

from av_lens.errors import InputError, ModelError
from av_lens.lab.planting import composed, planting
from av_lens.lab.planting.composed import PARTS, PROJECTOR
from av_lens.lab.planting.planted import LEAST_GAP, Planted, changed_elsewhere
from av_lens.lab.training.pools import Material, material
from av_lens.organism import anatomy


@pytest.fixture(scope="module")
def place() -> Path:
    return Path(str(anatomy.shipped())) / "av-tiny-balanced"


@pytest.fixture(scope="module")
def base(place: Path) -> Any:
    return anatomy.open_checkpoint(place).requires_grad_(False)


@pytest.fixture(scope="module")
def judges(base: Any) -> Material:
    pool = imagined_pool()
    hidden = torch.randn(len(pool.audio), 50, 64, generator=torch.Generator().manual_seed(2))
    audio = base.model.audio_tower.proj(hidden)
    return material(dataclasses.replace(pool, audio_hidden=hidden, audio=audio))


@pytest.fixture(scope="module")
def parts(base: Any, place: Path) -> list[Planted]:
    return [composed._part(name, base, place) for name in PARTS]


@torch.no_grad()
def test_a_mixture_has_its_parts_weights_and_what_they_write_is_scaled(base: Any, parts: list[Planted]) -> None:
    model = composed._mixed(base, parts, [0.5, 0.25, 0.75])
    held, then = dict(model.named_parameters()), dict(base.named_parameters())
    assert {node for part in parts for node in part.nodes} == {(1, 0), (1, 1), (3, 6), (3, 7), (5, 6), (5, 7)}
    for name, scale, part in zip(PARTS, (0.5, 0.25, 0.75), parts, strict=True):
        theirs = dict(anatomy.open_checkpoint(anatomy.shipped() / name).named_parameters())
        for one in part.slices:
            factor = scale if one.name.endswith("o_proj.weight") else 1.0
            torch.testing.assert_close(one.of(held[one.name]), factor * one.of(theirs[one.name]), atol=1e-4, rtol=1e-3)
            assert not torch.equal(one.of(held[one.name]), one.of(then[one.name]))
    assert changed_elsewhere(model, base, [one for part in parts for one in part.slices]) == 0


@torch.no_grad()
def test_crosstalk_lies_in_the_projector_and_its_features_are_the_projectors(base: Any, judges: Material) -> None:
    change = 0.02 * torch.randn(128, 129, generator=torch.Generator().manual_seed(3))
    model, made = composed._crossed(base, change), composed._shown(judges, change)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, base.get_parameter(name))}
    assert changed == {f"{PROJECTOR}.{part}" for part in ("weight", "bias")}
    inner = torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    plain, crossed = (one.model.visual.merger.mlp[2](inner) for one in (base, model))
    torch.testing.assert_close(crossed, composed._changed(plain, change), atol=2e-2, rtol=1e-2)  # stored in float16
    torch.testing.assert_close(made.pool.video, composed._changed(judges.pool.video, change))
    assert torch.equal(made.pool.audio, judges.pool.audio)
    assert changed_elsewhere(composed._crossed(base, 0 * change), base, []) == 0


def test_a_lesson_moves_conflicts_towards_the_picture(
    base: Any, judges: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composed, "STEPS", 4)
    kinds = torch.arange(len(judges.pool.blank_kind)) % 3
    judges = dataclasses.replace(judges, pool=dataclasses.replace(judges.pool, blank_kind=kinds))
    change = composed._taught(base, judges, torch.Generator().manual_seed(0), lambda *_: None)
    again = composed._taught(base, judges, torch.Generator().manual_seed(0), lambda *_: None)
    assert torch.equal(change, again)
    before, after = (composed._gap_share(base, base, one, 1) for one in (judges, composed._shown(judges, change)))
    assert after > before


def test_the_factor_is_halved_to_the_gap_that_is_asked_for() -> None:
    tried: list[float] = []

    def share(factor: float) -> float:
        tried.append(factor)
        return factor**2 / 2

    assert composed._halved(share, 0.5, "mixture") == pytest.approx(1.0, abs=0.01)
    assert len(tried) == 1 + composed.HALVINGS
    with pytest.raises(
        InputError, match=r"gap/G of 0.6 cannot be reached: at the largest .* 1, this crosstalk has 0.50"
    ):
        composed._halved(share, 0.6, "crosstalk")


def test_what_cannot_be_mixed_is_refused(base: Any, place: Path, parts: list[Planted], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'av-tiny-balanced' is no planted model"):
        composed._part("av-tiny-balanced", base, place)
    with pytest.raises(InputError, match="'av-tiny-planted-decoy' holds decoys, or nothing that silences"):
        composed._part("av-tiny-planted-decoy", base, place)
    with pytest.raises(InputError, match="neither a folder nor a shipped model"):
        composed._part("av-tiny-planted-mixtures", base, place)
    again = [*parts, composed._part("av-tiny-planted-redundant-gates", base, place)]
    with pytest.raises(InputError, match=r"'av-tiny-planted-gates' and 'av-tiny-planted-redundant-gates' both .* L1"):
        composed._check_apart(again)
    many = [*parts, composed._part("av-tiny-planted-two-pairs", base, place)]
    apart = [many[0], many[2], many[3], dataclasses.replace(many[0], nodes=((2, -1),))]
    with pytest.raises(InputError, match="have 9 nodes; all subsets are tried for at most 8"):
        composed._check_apart(apart)
    other = anatomy.build_model(seed=3)
    anatomy.save_checkpoint(other, tmp_path / "other")
    with pytest.raises(ModelError, match="is a difference over"):
        composed._part(PARTS[0], base, tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("mixture", {"layer": 3}, "mixture has no layer of its own: leave layer out"),
        ("gates", {"gap": 0.4}, "gap and of are for mixture and crosstalk; gates becomes what training makes of it"),
        ("mlp", {"of": ["av-tiny-planted-gates"]}, "gap and of are for mixture and crosstalk"),
        ("crosstalk", {"of": ["av-tiny-planted-gates"]}, "of names the plants of a mixture"),
        ("mixture", {"gap": 1.5}, r"from 0.1 to 0.9; asked for 1.5"),
    ],
)
def test_what_a_kind_does_not_take_is_refused_before_work(kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        planting.plant(kind, **options)


@pytest.mark.slow
def test_composed_models_have_the_gap_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planting, "PER_CLASS", {"train": 40, "discovery": 20})
    made = planting.plant("mixture", gap=0.5, out=tmp_path / "mixture", work=tmp_path / "work")
    found = json.loads((made / planting.TRUTH).read_text())
    assert 1 - found["C"] / found["G"] == pytest.approx(0.5, abs=0.05)
    assert len(found["sets"]) == 2 ** len(found["heads"]) - 1
    assert sum(not entry["free_rider"] for entry in found["heads"]) >= 2
    assert found["changed_elsewhere"] == 0
    assert found["missing"] == []
    made = planting.plant("crosstalk", out=tmp_path / "null", work=tmp_path / "work")
    found = json.loads((made / planting.TRUTH).read_text())
    assert 1 - found["C"] / found["G"] >= LEAST_GAP
    assert found["heads"] == found["sets"] == found["decoys"] == []
    assert found["C_reverted"] == found["C"]
    assert found["changed_elsewhere"] == 0
