"""Plans as files: what is saved does what the plan did, and what does not fit is refused with its reason."""

from __future__ import annotations

import json

import pytest
import torch
from small_av import small_inputs, small_model
from tiny import tiny_model

from av_lens.core import run
from av_lens.errors import InterventionError
from av_lens.interventions import Plan, Site, add, cut, noise, replace, resample, scale, zero


def every_kind() -> Plan:
    draw = torch.Generator().manual_seed(0)
    return Plan([
        scale(Site("z", 1, (0, 2), "suffix"), 0.5),
        scale(Site("mlp_out", 0, positions="audio"), torch.rand(64, generator=draw)),
        zero(Site("z", 2, 3, "generation")),
        add(Site("resid_pre", 2, positions="question|generation"), torch.randn(1, 1, 64, generator=draw)),
        replace(Site("z", 3, 1, "generation"), torch.randn(16, generator=draw)),
        resample(Site("resid_mid", 1, positions="generation"), torch.randn(3, 1, 64, generator=draw), seed=4),
        noise(Site("embed", positions="video"), scale=0.1, seed=7),
        cut("generated", "audio", layers=range(1, 3), heads=2),
        cut("question", "video", renormalize=False, include_generation=False),
    ])  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    return Plan([scale(Site("z", 1, 0, "suffix"), 0.5)]).save(tmp_path / "plan", model=small_model())


def test_a_loaded_plan_does_what_the_plan_did(tmp_path):
    model, x, plan = small_model(), small_inputs(), every_kind()
    path = plan.save(tmp_path / "plan", model=model, note="all of them")
    assert (path.name, json.loads(path.read_text())["note"]) == ("plan.json", "all of them")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
    again = Plan.load(path, model=model)
    with torch.no_grad():
        before, after = (run(model, x, plan=one).logits for one in (plan, again))
        assert torch.equal(before, after)
        assert not torch.allclose(after, run(model, x).logits, atol=1e-3)
    assert again.edits[7].layers == (1, 2)
    assert again.edits[8].include_generation is False
    assert again.edits[0].site == plan.edits[0].site


def test_a_plan_without_tensors_is_one_file(saved):
    assert [p.name for p in saved.parent.iterdir()] == ["plan.json"]
    assert Plan.load(saved).edits[0].amount == 0.5


def test_a_model_of_other_sizes_is_refused(saved):
    with pytest.raises(InterventionError, match=r"plan\.json was made for tiny with n_layers = 4; external has 2"):
        Plan.load(saved, model=tiny_model(n_layers=2))
    with pytest.raises(InterventionError, match="layer 9 is past the end"):
        Plan([zero(Site("z", 9))]).save(saved, model=small_model())


def test_positions_by_number_are_refused(tmp_path):
    with pytest.raises(InterventionError, match=r"edit 0 names positions by number.*Name roles"):
        Plan(zero(Site("z", 1, positions=[3, 4]))).save(tmp_path / "p.json", model=small_model())
    with pytest.raises(InterventionError, match="edit 0 names positions by number"):
        Plan(cut(small_inputs().spans.audio, "video")).save(tmp_path / "p.json", model=small_model())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"schema": "something"}, "its schema is 'something'"),
        ({"version": 2}, "a plan of version 2; this av_lens reads version 1"),
        ({"exec": "x"}, "unknown key 'exec'"),
        ({"model": {"n_layers": 4}}, "model must name n_layers, n_heads"),
        ({"edits": {}}, "edits must be a list"),
        ({"tensors": {"file": "../x", "sha256": ""}}, "a file's bare name"),
        ({"tensors": {"file": "gone.safetensors", "sha256": ""}}, "Keep both files together"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(saved, changes, text):
    saved.write_text(json.dumps(json.loads(saved.read_text()) | changes))
    with pytest.raises(InterventionError, match=text):
        Plan.load(saved)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        ({"kind": "scal"}, "edit 0: unknown kind of edit 'scal'. Did you mean 'scale'"),
        ({"kind": "scale", "component": "z", "layer": 1, "positions": None}, "'amount' is missing"),
        ({"kind": "zero", "component": "zz", "layer": 1, "positions": None}, "edit 0: unknown component 'zz'"),
        ({"kind": "zero", "component": "z", "layer": "1", "positions": None}, "layer is '1'; wanted a whole number"),
        ({"kind": "zero", "component": "z", "layer": 1, "positions": "sufix"}, "unknown role 'sufix'"),
        ({"kind": "zero", "component": "z", "layer": 1, "positions": [1]}, r"unknown role '\[1\]'"),
        ({"kind": "zero", "component": "z", "layer": 1, "head": [0.5], "positions": None}, "a list of whole numbers"),
        ({"kind": "add", "component": "z", "layer": 1, "positions": None, "value": "t"}, "unknown tensor 't'"),
        ({"kind": "scale", "component": "z", "layer": 1, "positions": None, "amount": 1e999}, "not finite"),
        ({"kind": "cut", "query": "question", "key": "video", "layers": []}, "no layer is named"),
        ({"kind": "cut", "query": "question", "key": "video", "renormalize": 1}, "wanted true or false"),
        ("zero", "must be an object"),
    ],
)
def test_an_edit_that_is_none_is_refused(saved, edit, text):
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"edits": [edit]}))
    with pytest.raises(InterventionError, match=text):
        Plan.load(saved)


def test_other_tensors_are_refused(tmp_path):
    one, two = (Plan(add(Site("resid_pre", 1), torch.full((1, 1, 64), v))) for v in (1.0, 2.0))
    path = one.save(tmp_path / "one", model=small_model())
    other = two.save(tmp_path / "two", model=small_model())
    other.with_suffix(".safetensors").replace(path.with_suffix(".safetensors"))
    with pytest.raises(InterventionError, match=r"does not hold the tensors of one\.json"):
        Plan.load(path)
    path = Plan(add(Site("resid_pre", 1), torch.full((1, 1, 64), torch.nan))).save(path, model=small_model())
    with pytest.raises(InterventionError, match="tensor0 holds numbers that are not finite"):
        Plan.load(path)


def test_files_that_cannot_be_read_or_written_are_refused(tmp_path):
    with pytest.raises(InterventionError, match="cannot read the plan"):
        Plan.load(tmp_path / "nothing.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(InterventionError, match="is not a plan: it is no json"):
        Plan.load(tmp_path / "text.json")
    with pytest.raises(InterventionError, match="ends otherwise"):
        Plan().save(tmp_path / "plan.pt", model=small_model())
    with pytest.raises(InterventionError, match="does not exist; make it first"):
        Plan().save(tmp_path / "no" / "plan.json", model=small_model())
