"""An MLP suppresses and heads feed it: who is named, on a model on paper and on one of weights."""

from __future__ import annotations

import numpy as np
import pytest
from fake_model import FedModel, fake_conflicts, isolated
from mlp_plant import LAYER, plant_mlp

import av_lens as avl
from av_lens.inputs import conflicts as read_conflicts
from av_lens.isolation.measuring.engine import MLP
from av_lens.lab.calibration import stage
from av_lens.lab.planting import planting
from av_lens.lab.planting.planted import LEAST_GAP
from av_lens.results.record import RELEASING, Isolation
from av_lens.whole_files import read_object

N = 44
FEEDERS = {(0, 2), (0, 3)}


@pytest.fixture(scope="module")
def fed():
    return isolated(FedModel(), fake_conflicts(N, n_classes=6), s=0.1, quick=True)


def test_the_mlp_is_named_and_heads_feed_it(fed):
    assert "picture writer MLP 1" in fed.verdict
    assert "Feeders, which tell an MLP what is seen and suppress nothing themselves: L0H2 L0H3 (of MLP 1; hold" in (
        fed.verdict
    )
    (row,) = fed.mlps.to_dict("records")
    assert (row["layer"], row["role"], row["confirmed"]) == (1, "picture writer", True)
    assert row["effect"] == pytest.approx(8, abs=0.1)
    assert (row["direct_share"], row["write_share"]) == pytest.approx((1, 1), abs=0.01)
    assert not set(fed.heads["role"]) & {*RELEASING, "breaks"}
    feeders = fed.heads[fed.heads["role"] == "feeder"]
    assert {*zip(feeders["layer"], feeders["head"], strict=True)} == FEEDERS
    assert feeders["effect"].to_numpy() == pytest.approx([3.75, 3.75], abs=0.1)
    assert feeders["write_share"].to_numpy() == pytest.approx([0.25 / 3.75] * 2, abs=0.02)
    assert feeders["direct_share"].to_numpy() == pytest.approx([1, 1], abs=0.02)  # which MLPs make of it
    assert feeders["mlp_share"].to_numpy() == pytest.approx([3.5 / 3.75] * 2, abs=0.02)
    assert all("through MLP 1" in flags for flags in feeders["flags"])
    assert fed.suppressors[["layer", "head"]].to_numpy().tolist() == [[1, -1]]


def test_the_tables_hold_mlps_as_nodes_and_grids_heads_alone(fed):
    release = fed.evidence.query("estimand == 'release' and donor == 'zero' and half == 'discovery'")
    assert len(release) == 3 * 5
    assert release.query("head == -1 and layer == 1")["mean"].item() == pytest.approx(8, abs=0.1)
    assert fed.grid("release", "zero").shape == (3, 4)
    assert fed.arrays["discovery/suffix/release/zero"].shape[1:] == (3, 5)
    held = fed.evidence[fed.evidence["estimand"] == "release with the named MLPs held"]
    assert set(held["head"]) == {2, 3}  # no MLP, and no head whose release does not pass
    assert held["mean"].to_numpy() == pytest.approx(0.25, abs=0.05)


def test_the_set_is_the_mlp_and_is_compared_with_mlps_and_subsets_of_heads(fed):
    (chosen,) = fed.sets[fed.sets["chosen"]].to_dict("records")
    assert chosen["members"] == "MLP 1"
    assert "the pool was widened to an MLP's subsets of one layer's heads" in chosen["flags"]
    # Two other MLPs and all four heads of each of three layers, which write most: 5 sets.
    assert (chosen["random_n"], chosen["p_random"]) == (5, pytest.approx(1 / 6))
    assert "larger than all 5 sets there are: too few to test" in chosen["flags"]
    assert not chosen["confirmed"]
    assert {edit.site.component for edit in fed.plan()} == {"mlp_out"}
    assert fed.repair.query("quantity == 'C'")["after"].item() == pytest.approx(6.5, abs=0.2)


def test_the_record_is_saved_and_opened_and_drawn(fed, tmp_path):
    again = Isolation.load(fed.save(tmp_path))
    assert again.mlps.equals(fed.mlps)
    assert "MLP 1" in avl.plots.release(again).layout.yaxis.ticktext[0]
    assert "MLP 1" in fed.report(tmp_path / "page.html").read_text("utf-8")


def test_the_first_edition_has_heads_alone():
    found = isolated(FedModel(), fake_conflicts(N, n_classes=6), s=0.1, quick=True, named_only=True, protocol="1")
    assert not len(found.mlps)
    assert found.arrays["discovery/suffix/release/zero"].shape[1:] == (3, 4)
    assert found.protocol["family"] == 12 * 11
    assert "write" not in set(found.evidence["estimand"])
    writers = found.heads[found.heads["role"] == "picture writer"]
    assert {*zip(writers["layer"], writers["head"], strict=True)} == FEEDERS  # what the second edition is for


def require_the_mlp_and_no_head(found):
    print("", found.verdict, found.nodes[["layer", "head", "role", "status", "effect"]].to_string(), sep="\n")
    planted = found.mlps[found.mlps["layer"] == LAYER]
    assert planted["role"].isin(RELEASING).all()
    assert len(planted)  # an early MLP that tells it what is seen may stand beside it, as a gate
    assert f"MLP {LAYER}" in found.verdict
    guilty = found.heads[found.heads["role"].isin(RELEASING)]
    assert (guilty["status"] == "not replicated").all()  # two heads of seed 2 are undetermined on discovery alone


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_mlp_is_named_and_no_head_is(seed, tmp_path):
    staged = list(read_conflicts(stage(tmp_path / "staged", conflicts=132, seed=seed, split="test")))
    model = avl.load("av-tiny-balanced")
    plant_mlp(model, staged[120:], strength=8.0)
    found = avl.isolate(model, staged[:120], quick=True, named_only=True)
    require_the_mlp_and_no_head(found)
    assert np.nanmax(found.grid("release", "zero", column="share")) > 0.1  # by release alone heads were guilty


@pytest.mark.slow
def test_an_mlp_that_was_planted_and_trained_is_named_and_no_head_is(tmp_path, monkeypatch):
    monkeypatch.setattr(planting, "PER_CLASS", {"train": 60, "discovery": 20})
    made = planting.plant("mlp", layer=LAYER, seed=1, out=tmp_path / "mlp", work=tmp_path / "work")
    truth = read_object(made / planting.TRUTH)
    (node,) = truth["heads"]
    assert (node["layer"], node["head"]) == (LAYER, MLP)
    assert truth["C_reverted"] > 0.9 * truth["G"]  # put back alone, it gives the whole gap back
    assert 1 - truth["C"] / truth["G"] >= LEAST_GAP
    assert truth["changed_elsewhere"] == 0
    staged = list(read_conflicts(stage(tmp_path / "staged", conflicts=120, seed=1, split="test")))
    found = avl.isolate(avl.load(made), staged, quick=True, named_only=True)
    require_the_mlp_and_no_head(found)
