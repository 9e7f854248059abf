"""`s="control"`: an organism is held to the rule of other models."""

from __future__ import annotations

from typing import Any

import pytest
from fake_model import FakeModel, PaperEngine, fake_conflicts

from av_lens.errors import ProtocolError
from av_lens.isolation.running.preparing import MEASURED, Options, prepared


def rule(model: FakeModel, s: Any) -> tuple[float, str]:
    options = Options(("suffix",), s, "stop", 0, "in_video", True)
    run = prepared(model, fake_conflicts(), options, engine=PaperEngine(model), progress=None)
    assert run.s == run.protocol["s"]
    return run.s, run.protocol["s_rule"]


def test_an_organism_is_held_to_the_rule_of_other_models_where_that_is_asked_for():
    other, organism = FakeModel(), FakeModel()
    organism.grammar = object()
    assert rule(other, None) == rule(other, "control") == rule(organism, "control") == (0.03, MEASURED)
    assert rule(organism, None) == (0.1, "organism")
    assert rule(organism, 0.05) == (0.05, "given")
    with pytest.raises(ProtocolError, match="s='small': give a share of G, 'control' for the rule of other models"):
        rule(organism, "small")
