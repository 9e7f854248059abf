"""Methods on one planted model: what is read from the record is what the method's own function finds."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import av_lens as avl
from av_lens.errors import InputError
from av_lens.families.adapter import ReplayTraits
from av_lens.isolation import isolate
from av_lens.isolation.measuring.engine import MIRROR
from av_lens.lab.calibration import read_plant
from av_lens.lab.plantbench import methods as plantbench_methods
from av_lens.lab.plantbench.methods import AT, METHODS, SharedEngine, Subject, all_scores
from av_lens.lab.plantbench.scores import isolate_score, ranking
from av_lens.methods import patch


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
    assert all(np.isfinite(table).all() and seconds >= 0 for table, seconds in scores.values())
    assert engine.plans > 1000

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
        np.testing.assert_allclose(scores[name][0], own, atol=2e-4)
    # A first guess of the same patch must agree with it in order, though not in size.
    exact, guess = scores["release, blank_muted"][0].ravel(), scores["AtP"][0].ravel()
    assert np.argmax(guess) in np.argsort(exact)[-2:]
