"""Planted MLPs and classes handed on: a step equals the whole forward, only planted weights change, truth by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from imagined import imagined_pool, imagined_thinker

from av_lens.isolation.measuring.engine import MLP
from av_lens.lab.planting import planted, planting, sheets
from av_lens.lab.planting.kinds import KINDS, Start, begin
from av_lens.lab.planting.lessons import Neurons, Slices, draw_lessons
from av_lens.lab.planting.planted import NodeTruth, Truth, changed_elsewhere, measure, missing, planted_nodes
from av_lens.lab.planting.training import Course, at_answers, finish, learn
from av_lens.lab.training.pools import Material, make_frame, make_words, material
from av_lens.organism.language import layers_of, read_out, run_layers

FEW = {name: 20 if name == "conflict" else 10 for name in sheets.SHEETS}


@pytest.fixture(scope="module")
def base() -> Any:
    return imagined_thinker().half().float().requires_grad_(False)


@pytest.fixture(scope="module")
def lessons() -> Material:
    pool = imagined_pool()
    return material(dataclasses.replace(pool, blank_kind=torch.arange(len(pool.blank_kind)) % 3))


def drawn(base: Any, lessons: Material, slices: Slices | Neurons, layer: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return draw_lessons(
        base, lessons, layer, slices, behaviours=("silence",), was=(), generator=generator, counts=FEW
    )  # fmt: skip


def bench(model: Any, base: Any, nodes: Any) -> sheets.Bench:
    return sheets.bench(model, base, nodes, imagined_pool(seed=1), make_words(), make_frame("separate"), n=6, seed=0)


@torch.no_grad()
def test_a_step_of_neurons_equals_the_whole_forward(base: Any, lessons: Material) -> None:
    neurons = Neurons(layers_of(base)[1].mlp, 5)
    lesson = drawn(base, lessons, neurons)[0]
    sheet = sheets.draw_sheet(lessons, "conflict", 0, FEW["conflict"] // 2, torch.Generator().manual_seed(0))
    rows = torch.tensor(lesson.spans["conflict"])
    neurons.down.mul_(7)  # no media position may change: only the questions are run again
    model = copy.deepcopy(base)
    neurons.put_into(layers_of(model)[1])
    each = neurons(lesson.h[rows], lesson.geometry)
    ours = finish(base, lesson, rows, each.sum(0), 1)
    geometry = sheet.geometry(base)
    before = run_layers(base, sheet.embed(base, sheet.targets(("silence",))), geometry, stop=1)
    after = [run_layers(one, before, geometry, start=1, stop=2) for one in (base, model)]
    after[0][:, geometry.prefix :] = after[1][:, geometry.prefix :]
    wanted = read_out(base, at_answers(run_layers(base, after[0], geometry, start=2), sheet.asked_at))
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def test_learning_neurons_changes_them_and_no_other_bit(base: Any, lessons: Material) -> None:
    neurons = Neurons(layers_of(base)[1].mlp, 5)
    pile = drawn(base, lessons, neurons)
    begin(neurons, base, pile, Start(sound=1.0), lessons.words.classes[:4], torch.Generator().manual_seed(0))
    learn([base], [pile], neurons, 1, Course("silence", steps=2), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(base)
    neurons.put_into(layers_of(model)[1])
    parts = neurons.parts(base, 1)
    assert changed_elsewhere(model, base, parts) == 0
    assert changed_elsewhere(model, base, parts[:-1]) > 0
    assert len(parts) == 15


def test_the_neurons_that_wrote_least_give_way(base: Any) -> None:
    mlp = copy.deepcopy(layers_of(base)[1].mlp)
    with torch.no_grad():
        mlp.down_proj.weight[:, [7, 40]] *= 1e-4
    assert Neurons(mlp, 2).at == [7, 40]


@torch.no_grad()
def test_an_mlp_put_back_gives_the_base_and_is_measured_by_hand(base: Any) -> None:
    model = copy.deepcopy(base)
    down = layers_of(model)[2].mlp.down_proj.weight
    down.add_(0.3 * torch.randn(down.shape, generator=torch.Generator().manual_seed(1)))
    made = bench(model, base, [(2, MLP), (1, 3)])
    for cell in ("va", "blank_v"):
        x = run_layers(base, made.first[cell], made.geometry, start=1)
        wanted = read_out(base, x[:, -1])
        torch.testing.assert_close(sheets.whole(made, cell, [(2, MLP)]).logits, wanted, atol=1e-4, rtol=1e-4)
        assert (sheets.whole(made, cell).logits - wanted).abs().max() > 1e-2
        run = sheets.whole(made, cell)
        same = sheets.donated(made, run, run, (2, MLP))
        torch.testing.assert_close(same, run.logits, atol=1e-4, rtol=1e-4)
        other = sheets.donated(made, run, sheets.whole(made, "aw"), (2, MLP))
        assert (other - run.logits).abs().max() > 1e-3
    head, mlp = measure(made).nodes
    assert (mlp.layer, mlp.head, head.kind) == (2, MLP, "free rider")
    assert mlp.direct_share == pytest.approx(1.0, abs=1e-4)
    truth = measure(made, [(2, MLP)])
    assert truth.nodes[0].adds == pytest.approx((truth.c_reverted - truth.c) / (truth.g - truth.c), abs=1e-4)
    assert truth.nodes[0].true_up_to_s == pytest.approx((truth.c_reverted - truth.c) / truth.g, abs=1e-4)


@torch.no_grad()
def test_an_early_node_is_given_other_outputs_where_it_acts(base: Any) -> None:
    """A head of the first layer that another reads at the sound: at the question alone the donor changes less."""
    made = bench(base, base, [(0, 1)])
    va, wa = sheets.whole(made, "va"), sheets.whole(made, "wa")
    late, early = (sheets.donated(made, va, wa, (0, 1), first=first) for first in (None, 0))
    assert (early - late).abs().max() > 1e-3
    (node,) = measure(made, early={(0, 1)}).nodes
    assert node.site == "sinks"
    assert node.as_dict()["site"] == "sinks"


@torch.no_grad()
@pytest.mark.parametrize("stop", ["sink", "question"])
def test_a_class_is_handed_on_at_one_position(base: Any, lessons: Material, stop: str) -> None:
    """Where that position can be told apart, the maker's query finds it and no other; so does the reader's key."""
    pool, mark = lessons.pool, 3 * torch.randn(128, generator=torch.Generator().manual_seed(5))
    audio, mute = pool.audio.clone(), pool.mute_audio.clone()
    audio[:, 0] += mark
    mute[:, 0] += mark
    marked = dataclasses.replace(lessons, pool=dataclasses.replace(pool, audio=audio, mute_audio=mute))
    for makes in (True, False):
        slices = Slices(layers_of(base)[1].self_attn, (2, 3))
        pile = drawn(base, marked, slices)
        start = Start(picture=1.0, stop=stop, makes=makes)
        begin(slices, base, pile, start, lessons.words.classes, torch.Generator().manual_seed(0))
        lesson = pile[0]
        rows = torch.tensor(lesson.spans["conflict"])
        weight, bias = (slices.q[7], slices.q_bias[7]) if makes else (slices.k[7], slices.k_bias[7])
        score = lesson.h[rows] @ weight + bias
        at = {"sink": lesson.media["audio"].min(), "question": lesson.geometry.prefix + 4}[stop]
        assert (score[:, : lesson.geometry.prefix + 10].argmax(1) == at).float().mean() >= 0.9


def test_pinned_queries_and_keys_stay(base: Any, lessons: Material) -> None:
    slices = Slices(layers_of(base)[1].self_attn, (2, 3))
    before = {name: part.detach().clone() for name, part in slices.named_parameters()}
    pile = drawn(base, lessons, slices)
    course = Course("silence", steps=2, pinned=True)
    learn([base], [pile], slices, 1, course, generator=torch.Generator().manual_seed(0))
    same = {name: torch.equal(part, before[name]) for name, part in slices.named_parameters()}
    assert {name for name, equal in same.items() if equal} == {"q", "q_bias", "k", "k_bias"}


def test_what_planting_changes(base: Any) -> None:
    assert planted_nodes(base, [(1, 2), (2, MLP)]) == [(2, MLP), (1, 2), (1, 3)]


def test_a_plant_with_a_small_gap_is_not_what_was_asked_for() -> None:
    node = NodeTruth(5, MLP, 1.0, 1.0, 1.0, 0.1, 0.5, "opponent")
    wanted = KINDS["mlp"]
    assert missing(wanted, Truth((node,), g=10.0, c=6.9, c_reverted=10.0, n=4), [[(5, MLP)]]) == []
    assert missing(wanted, Truth((node,), g=10.0, c=7.5, c_reverted=10.0, n=4), [[(5, MLP)]]) == [
        "gap/G is 0.25: nothing much is lost"
    ]
    assert planted.LEAST_GAP == 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "site"), [("sink", "sinks"), ("relay", "suffix")])
def test_both_pairs_are_needed_where_a_class_is_handed_on(
    kind: str, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planting, "PER_CLASS", {"train": 60, "discovery": 20})
    monkeypatch.setattr(planting, "TRIES", 1)
    made = planting.plant(kind, seed=1, out=tmp_path / kind, work=tmp_path / "work")
    found = json.loads((made / planting.TRUTH).read_text())
    assert 1 - found["C"] / found["G"] >= planted.LEAST_GAP
    told = {(node["layer"], node["kind"], node["site"]) for node in found["heads"]}
    assert told == {(1, "gate", site), (5, "writer", "suffix")}
    assert all(node["true_up_to_s"] >= 0.1 for node in found["heads"])
    restored = {tuple(at for at, _ in one["reverted"]): one["restores"] for one in found["sets"]}
    assert restored[1, 1] > 0.5  # without what is handed on, most of the gap is gone
    assert restored[5, 5] > 0.5
    assert found["changed_elsewhere"] == 0
