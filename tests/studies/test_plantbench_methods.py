"""Methods on one planted model: what is read from the record is what the method's own function finds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from micro import micro_conflict, micro_model
from small_av import small_inputs, small_model
from tiny import letter

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError
from av_lens.families.adapter import ReplayTraits
from av_lens.interventions import Plan, Site, replace
from av_lens.isolation import isolate
from av_lens.isolation.measuring.engine import MIRROR, ModelEngine
from av_lens.lab.calibration import read_plant
from av_lens.lab.plantbench import methods as plantbench_methods
from av_lens.lab.plantbench.methods import AT, METHODS, ROUTES, SharedEngine, Subject, all_scores, areas, route_effects
from av_lens.lab.plantbench.pages import AREAS
from av_lens.lab.plantbench.scores import isolate_score, ranking
from av_lens.methods import patch
from av_lens.methods.circuits.runs import CircuitRuns, Measured, Nodes
from av_lens.metrics import as_metric, logit_diff, measure


def fake_cells(ids: list[int]) -> Mapping[str, Any]:
    return {"va": SimpleNamespace(tensors={"input_ids": torch.tensor(ids)})}


def fake_model(name: str, ids: list[int]) -> Any:
    family = SimpleNamespace(replay_traits=lambda config: ReplayTraits())
    told: dict[str, Any] = {"family": family, "config": None, "hf_model": torch.nn.Linear(1, 1)}
    return SimpleNamespace(name=name, ids=ids, spec=SimpleNamespace(n_layers=2, n_heads=2), **told)


def test_models_of_one_processor_share_their_inputs_and_others_are_refused(monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []

    def cells(self: Any, conflict: Any, question: str | None) -> Mapping[str, Any]:
        made.append(self.model.name)
        return fake_cells(self.model.ids)

    monkeypatch.setattr(plantbench_methods.ModelEngine, "cells", cells)
    encoded: dict[Any, Any] = {}
    first = SharedEngine(fake_model("one", [1, 2]), encoded)
    conflicts = [SimpleNamespace(id=f"c{i}", third=None) for i in range(3)]
    given = [first.cells(one, None) for one in conflicts]
    second = SharedEngine(fake_model("two", [1, 2]), encoded)
    assert [second.cells(one, None) for one in conflicts] == given
    assert made == ["one", "one", "one", "two"]  # one cell is compared, none is kept twice
    with pytest.raises(InputError, match="other reads clips otherwise"):
        SharedEngine(fake_model("other", [1, 3]), encoded).cells(conflicts[0], None)


def test_a_swap_that_was_run_is_not_run_again(monkeypatch: pytest.MonkeyPatch):
    model, x = small_model(), small_inputs((0, 1))
    plain, shared, ran = ModelEngine(model), SharedEngine(model, {}), list[int]()
    positions = np.array(x.spans["suffix"].positions)
    changed = ModelEngine.changed

    def counted(self: Any, recording: Any, plans: Any, answers: Any = ()) -> Any:
        ran.append(len(plans))
        return changed(self, recording, plans, answers)

    base = plain.record(x, positions)
    zeros, ones = (torch.full((1, 1, 16), value) for value in (0.0, 1.0))
    plans = [base.plan({(1, head): value}) for head in (0, 1) for value in (zeros, ones)]
    plans.append(base.plan({(2, -1): torch.zeros(1, 1, 64)}))
    wanted = [one.logits for one in plain.changed(base, plans)]
    monkeypatch.setattr(ModelEngine, "changed", counted)
    for some in ([0, 1], [1, 2, 3, 4], [4, 0]):
        again = shared.record(x, positions)  # another recording of the same run
        for number, found in zip(some, shared.changed(again, [plans[i] for i in some]), strict=True):
            torch.testing.assert_close(found.logits, wanted[number], atol=1e-6, rtol=0)
    assert ran == [2, 3, 0]
    (found,) = shared.changed(shared.record(small_inputs((2, 3)), positions), [plans[0]])
    assert float((found.logits - wanted[0]).abs().max()) > 1e-3  # the same swap of another run is another


@pytest.mark.parametrize("layer", [0, 3])
def test_routes_are_first_order_effects_of_what_a_head_reads_at_the_picture_and_elsewhere(layer: int):
    """Scale one part of z, written out from pattern and values, by a little less than 1, and look at the metric."""
    model, x, step = small_model(), small_inputs((0, 1)), 0.02
    metric = logit_diff(letter("a"), letter("b"))
    bound = as_metric(metric, model, [x])
    effects = {picture: route_effects(model, x, bound, picture=picture) for picture in (True, False)}
    with torch.no_grad():
        cache = run(model, x, capture=["pattern", "v", "z"]).cache
    at, video = list(x.spans["suffix"].positions), torch.zeros(len(x.spans), dtype=torch.bool)
    video[list(x.spans["video"].positions)] = True
    pattern, values = cache["pattern", layer][:, :, at], cache["v", layer].repeat_interleave(2, dim=2)
    for head in range(4):
        parts = {on: pattern[:, head][..., video == on] @ values[:, video == on, head] for on in (True, False)}
        own = cache["z", layer][:, at, head]
        torch.testing.assert_close(parts[True] + parts[False], own, atol=1e-5, rtol=1e-4)
        for on, part in parts.items():
            less, more = (
                measure(model, x, metric, plan=Plan(replace(Site("z", layer, head, at), own + way * step * part)))
                for way in (-1, 1)
            )
            wanted = ((more - less) / (2 * step)).numpy()
            np.testing.assert_allclose(effects[on][:, layer, head], wanted, atol=2e-4, err_msg=f"{head} {on}")
    assert np.abs(effects[True][:, layer]).max() > 3e-3
    assert np.abs(effects[True] - effects[False]).max() > 3e-3


def test_cpr_and_cmd_of_an_order_are_those_of_find_circuit_and_what_is_not_scored_comes_last():
    measured = Measured.of(micro_model(), micro_conflict(), metric=None, of="C", layout="in_video")
    nodes = Nodes.of(micro_model().spec, "head mlp")
    runs = CircuitRuns.of(micro_model(), measured, nodes, at="suffix", stack=4, budget_gb=1.0, keep_gb=1.0)
    guilt = np.random.default_rng(4).normal(size=(3, 5))
    found = areas(runs, guilt)
    options: dict[str, Any] = {"over": "head mlp", "random": 0, "subsets": 0, "size": 2}
    circuit = avl.find_circuit(micro_model(), micro_conflict(), scores=-guilt.ravel(), **options)
    wanted = {
        f"{name}, {empty}": circuit.figure(name, empty)[0]
        for name, empty in product(("CPR", "CMD"), runs.measured.empties)
    }
    assert found == pytest.approx(wanted, abs=1e-6)
    missing = guilt.copy()
    missing[:, 4] = np.nan
    last = np.where(np.isnan(missing), 1e-6 * np.sign(guilt), guilt)
    assert areas(runs, missing)["CMD, zero"] == pytest.approx(areas(runs, last)["CMD, zero"], abs=1e-6)


@pytest.mark.slow
def test_every_method_on_a_planted_model():
    names = list(avl.organism.classes())
    pairs = [(names[i % 12], names[(i + 1 + i // 12) % 12]) for i in range(44)]
    conflicts = [
        avl.Conflict(
            sound=avl.organism.clip(heard, seed=100 + i),
            picture=avl.organism.clip(seen, seed=200 + i),
            question="What do you hear?",
            answers=(heard, seen),
            id=f"c{i}",
        )
        for i, (heard, seen) in enumerate(pairs)
    ]
    model = avl.load("av-tiny-planted")
    engine = SharedEngine(model, {})
    found = isolate(model, conflicts, gate="report", quick=True, named_only=True, engine=engine)
    subject = Subject(model, engine, found)
    scores = all_scores(subject)
    assert tuple(scores) == METHODS
    heads = [*ROUTES, "attention to video", "edge cuts"]
    for name, (table, seconds) in scores.items():
        assert table.shape == (engine.n_layers, engine.n_heads + 1)
        assert seconds >= 0
        assert np.isfinite(table[:, : engine.n_heads]).all(), name
        assert np.isfinite(table[:, -1]).all() == (name not in heads), name
    assert engine.rows > 1000
    assert all(set(areas(subject.circuits, table)) == set(AREAS) for table, _ in list(scores.values())[:2])

    truth = read_plant("av-tiny-planted")
    assert ranking(isolate_score(found), truth)["precision at k"] == 1.0
    assert ranking(scores["zero ablation"][0], truth)["auroc"] == 1.0
    assert ranking(scores["attention to video"][0], truth)["auroc"] < 0.9

    for name, donor in (("exact patching, blank picture", "blank_a"), ("release, blank_muted", "blank_muted")):
        effects = [
            patch(model, subject.pairs(base, by), over="head", at=AT, metric=subject.metric, stack=64).effects.mean(
                "example"
            )
            for base, by in (("va", donor), ("av", MIRROR[donor]))
        ]
        own = 0.5 * (effects[0] - effects[1]).values
        np.testing.assert_allclose(scores[name][0][:, : engine.n_heads], own, atol=2e-4)
    # A first guess of the same patch must agree with it in order, though not in size.
    exact, guess = scores["release, blank_muted"][0].ravel(), scores["AtP"][0].ravel()
    assert np.argmax(guess) in np.argsort(exact)[-2:]
