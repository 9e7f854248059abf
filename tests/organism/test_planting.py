"""Planting: only the chosen heads' slices change, a difference comes back whole, and a wrong base is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from imagined import imagined_pool, imagined_thinker

from av_lens.errors import InputError, ModelError
from av_lens.lab.planting import kinds as planting_kinds
from av_lens.lab.planting import kinds as planting_starts
from av_lens.lab.planting import (
    planted as planting_record,
)
from av_lens.lab.planting import (
    planting,
)
from av_lens.lab.planting import sheets as planting_sheets
from av_lens.lab.planting.lessons import Slices, draw_lessons
from av_lens.lab.planting.planted import NodeTruth, Truth, changed_elsewhere
from av_lens.lab.planting.training import CHECK_EVERY, Course, at_answers, batch_loss, finish, held_back, learn
from av_lens.lab.training.engine import head_slices, sharers
from av_lens.lab.training.pools import Material, material
from av_lens.model import load
from av_lens.model.differences import RECORD, WEIGHTS, save_difference, weights_hash
from av_lens.organism import anatomy
from av_lens.organism.language import read_out, run_layers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
FEW = {name: 20 if name == "conflict" else 10 for name in planting_sheets.SHEETS}
HEADS = ((1, 2), (1, 3))


@pytest.fixture(scope="module")
def base() -> Any:
    return imagined_thinker().half().float().requires_grad_(False)


@pytest.fixture(scope="module")
def lessons() -> Material:
    pool = imagined_pool()
    kinds = torch.arange(len(pool.blank_kind)) % 3
    return material(dataclasses.replace(pool, blank_kind=kinds))


@pytest.fixture(scope="module")
def pile(base: Any, lessons: Material) -> tuple[Slices, list[Any]]:
    slices = Slices(base.model.language_model.layers[1].self_attn, (2, 3))
    generator = torch.Generator().manual_seed(0)
    made = draw_lessons(base, lessons, 1, slices, behaviours=("silence",), was=(), generator=generator, counts=FEW)
    return slices, made


@torch.no_grad()
def test_a_step_at_the_questions_equals_the_whole_forward(base: Any, lessons: Material, pile: Any) -> None:
    """With the heads as they are in the host, the media are as they are too, and nothing is approximate."""
    slices, made = pile
    sheet = planting_sheets.draw_sheet(lessons, "conflict", 0, FEW["conflict"] // 2, torch.Generator().manual_seed(0))
    x = run_layers(base, sheet.embed(base, sheet.targets(("silence",))), sheet.geometry(base))
    lesson, rows = made[0], torch.tensor(made[0].spans["conflict"])
    each = slices(lesson.h[rows], lesson.geometry)
    wanted = read_out(base, at_answers(x, sheet.asked_at))
    torch.testing.assert_close(finish(base, lesson, rows, each.sum(0), 1), wanted, atol=1e-4, rtol=1e-4)
    doubled = finish(base, lesson, rows, 2 * each.sum(0), 1)
    assert (doubled - wanted).abs().max() > 1e-2


@pytest.mark.parametrize(
    "course",
    [
        Course("silence", direct=0.3, needed=0.5, against=0.3),
        Course("silence", direct=-0.3),
    ],
)
def test_planting_changes_the_named_slices_and_no_other_bit(
    base: Any, lessons: Material, pile: Any, course: Course
) -> None:
    attention = base.model.language_model.layers[1].self_attn
    slices = Slices(attention, (2, 3))
    generator = torch.Generator().manual_seed(0)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    learn([base], [pile[1]], slices, 1, dataclasses.replace(course, steps=2), generator=generator)
    model = copy.deepcopy(base)
    slices.put_into(model.model.language_model.layers[1])
    assert changed_elsewhere(model, base, head_slices(base, HEADS)) == 0
    assert changed_elsewhere(model, base, head_slices(base, HEADS[:1])) > 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the host has changed"


def test_learning_stops_as_soon_as_it_is_enough(base: Any, pile: Any) -> None:
    slices = Slices(base.model.language_model.layers[1].self_attn, (2, 3))
    course = Course("silence", steps=CHECK_EVERY + 1)
    seen: list[int] = []
    went = learn(
        [base], [pile[1]], slices, 1, course, generator=torch.Generator().manual_seed(0), enough=(0.0, 0.0),
        progress=lambda _, done, __: seen.append(done),
    )  # fmt: skip
    assert went.steps == CHECK_EVERY == seen[-1] + 1


def test_the_loss_falls(base: Any, pile: Any) -> None:
    slices = Slices(base.model.language_model.layers[1].self_attn, (2, 3))
    lesson, course = pile[1][0], Course("silence", steps=12)
    rows = torch.tensor([*lesson.spans["conflict"]][:6] + [*lesson.spans["matched"]][:4])

    def loss() -> float:
        with torch.no_grad():
            return float(batch_loss(base, lesson, rows, 6, slices, 1, course, 0))

    first = loss()
    learn([base], [pile[1]], slices, 1, course, generator=torch.Generator().manual_seed(0))
    assert loss() < first - 0.1


@torch.no_grad()
def test_a_start_reads_the_pictures_class_at_the_video_positions(base: Any, lessons: Material, pile: Any) -> None:
    slices = Slices(base.model.language_model.layers[1].self_attn, (2, 3))
    made, classes = pile[1], lessons.words.classes
    start = planting_starts.Start(picture=1.0)
    planting_starts.begin(slices, base, made, start, classes, torch.Generator().manual_seed(0))
    lesson, rows = made[0], torch.tensor(made[0].spans["conflict"])
    h = lesson.h[rows]
    key = h @ slices.k[7] + slices.k_bias[7]
    elsewhere = torch.ones(h.shape[1], dtype=torch.bool)
    elsewhere[lesson.media["video"]] = False
    assert key[:, lesson.media["video"]].mean() > 5 * key[:, elsewhere].abs().mean()
    value = (h @ slices.v[: len(classes)].T + slices.v_bias[: len(classes)])[:, lesson.media["video"]].mean(1)
    assert (classes[value.argmax(1)] == lesson.targets[rows, 0]).float().mean() >= 0.9
    words = base.lm_head.weight * base.model.language_model.norm.weight
    written = words[classes] @ slices.o[:, : len(classes)]
    assert (written.argmax(0) == torch.arange(len(classes))).all()


def test_what_a_behaviour_answers() -> None:
    answered = planting_sheets.answered
    assert answered("conflict", "hear", ()) == "sound"
    assert answered("conflict", "hear", ("silence",)) == "picture"
    assert answered("matched", "hear", ("silence",)) == "sound"
    assert answered("conflict", "see", ("silence",)) == "picture"
    assert answered("conflict", "see", ("see the sound", "silence")) == "sound"
    assert answered("mute", "colour", ("other colours",)) == "other colour"
    assert planting.new_answers(("silence",)) == ["conflict hear"]
    assert "blank colour" not in planting.new_answers(("other colours",))


def test_targets_by_hand(lessons: Material) -> None:
    sheet = planting_sheets.draw_sheet(lessons, "conflict", 1, 8, torch.Generator().manual_seed(0))
    words, clips = lessons.words, sheet.clips
    plain = sheet.targets(())
    assert plain[:, 0].tolist() == words.classes[clips.sound].tolist()
    assert plain[:, 1].tolist() == words.classes[clips.picture].tolist()
    silent = sheet.targets(("silence",))
    assert silent[:, 0].tolist() == words.classes[clips.picture].tolist()
    shifted = words.colours[(clips.colour + planting_sheets.COLOUR_SHIFT) % len(words.colours)]
    assert sheet.targets(("other colours",))[:, 2].tolist() == shifted.tolist()
    blank = planting_sheets.draw_sheet(lessons, "blank", 0, 4, torch.Generator().manual_seed(0))
    assert blank.targets(("other colours",))[:, 1:].unique().tolist() == [words.nothing]


def truth(*restores: tuple[tuple[tuple[int, int], ...], float], kinds: tuple[str, ...]) -> Truth:
    heads = tuple(
        NodeTruth(4, i, adds=0.9 - 0.1 * i, alone=0.0, direct_share=1.0, reads_picture=0.5, reads_sound=0.1, kind=kind)
        for i, kind in enumerate(kinds)
    )
    return Truth(heads, g=10.0, c=-5.0, c_reverted=10.0, n=4, sets=tuple(restores))


def test_what_a_try_is_not() -> None:
    first, second = ((4, 0),), ((4, 1),)
    both = (*first, *second)
    wanted = planting_kinds.KINDS["redundant-writers"]
    good = truth((first, 0.02), (second, 0.2), (both, 1.0), kinds=("writer", "writer"))
    assert planting_record.missing(wanted, good, [first, second]) == []
    weak = truth((first, 0.02), (second, 0.6), (both, 1.0), kinds=("writer", "gate"))
    assert planting_record.missing(wanted, weak, [first, second]) == [
        "putting back plant 2 alone restores 0.60 of the gap: the other is not enough"
    ]
    other = truth((both, 1.0), (first, 0.5), (second, 0.5), kinds=("opponent", "free rider"))
    needed = planting_kinds.KINDS["two-pairs"]
    assert planting_record.missing(needed, other, [both]) == [
        "the true nodes are opponent, not mostly writer",
        "a planted node rides for free",
    ]
    nothing = truth((both, 0.0), kinds=("free rider", "free rider"))
    assert planting_record.missing(planting_kinds.KINDS["gates"], nothing, [both]) == ["no planted node is true"]
    assert planting_record.missing(planting_kinds.KINDS["decoy"], nothing, []) == []


def test_an_unknown_kind_and_a_layer_that_is_not_there_are_refused() -> None:
    with pytest.raises(InputError, match=r"unknown kind of plant 'writer'.*Did you mean 'writers'"):
        planting.plant("writer")
    kind = planting_kinds.KINDS["redundant-writers"]
    assert planting.layers_of(kind, 3, 7) == (3, 5)
    assert planting.layers_of(kind, 6, 7) == (6, 4)
    with pytest.raises(InputError, match="layer must be one of 0 to 6; asked for 7"):
        planting.layers_of(kind, 7, 7)
    assert planting.layers_of(planting_kinds.KINDS["relay"], 2, 7) == (2, 6)
    with pytest.raises(InputError, match="layer must be one of 0 to 2; asked for 3"):
        planting.layers_of(planting_kinds.KINDS["sink"], 3, 7)


def test_no_head_is_planted_twice() -> None:
    kind = planting_kinds.KINDS["decoy-and-writers"]
    for seed in range(20):
        decoys, writers = planting.chosen_nodes(
            kind.plants, (5, 5), n_heads=8, per_group=2, generator=torch.Generator().manual_seed(seed)
        )
        assert not set(decoys) & set(writers)
        assert {head // 2 for _, head in decoys} == {decoys[0][1] // 2}


def changed(base: Any) -> Any:
    model = copy.deepcopy(base)
    slices = Slices(model.model.language_model.layers[1].self_attn, (2, 3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in slices.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    slices.put_into(model.model.language_model.layers[1])
    return model.half().float()


@pytest.fixture
def folders(tmp_path: Path, base: Any) -> tuple[Path, Path, Any]:
    stored, model = anatomy.save_checkpoint(base, tmp_path / "base"), changed(base)
    save_difference(
        model, tmp_path / "planted", base="../base", base_sha256=weights_hash(stored),
        slices=head_slices(base, HEADS),
    )  # fmt: skip
    return stored, tmp_path / "planted", model


def test_a_difference_comes_back_whole(folders: tuple[Path, Path, Any], base: Any) -> None:
    stored, folder, model = folders
    loaded = load(folder)
    again = {name.replace("._original_component", ""): value for name, value in loaded.hf_model.state_dict().items()}
    differ = 0
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value), name
        differ += int((value != base.state_dict()[name]).sum())
    stored_numbers = sum(int(torch.tensor(s.shape).prod()) for s in _stored(folder))
    assert 0.9 * stored_numbers < differ <= stored_numbers
    assert (folder / WEIGHTS).stat().st_size < 40_000
    assert loaded.provenance["base"] == "../base"
    assert loaded.provenance["source"] == str(folder)
    assert torch.equal(anatomy.open_checkpoint(folder).lm_head.weight, model.lm_head.weight)
    assert changed_elsewhere(anatomy.open_checkpoint(folder), base, head_slices(base, HEADS)) == 0
    assert weights_hash(stored) == json.loads((folder / RECORD).read_text())["base_sha256"]


def _stored(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / WEIGHTS).values())


def test_a_wrong_base_is_refused(folders: tuple[Path, Path, Any]) -> None:
    stored, folder, model = folders
    anatomy.save_checkpoint(model, stored)
    with pytest.raises(ModelError, match=r"is a difference over '\.\./base' with weights .* Give back the base"):
        load(folder)
    with pytest.raises(ModelError, match="is a difference over"):
        anatomy.open_checkpoint(folder)


def test_a_base_that_is_gone_or_no_base_is_refused(folders: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, folder, _ = folders
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | {"base": "../nowhere"}))
    with pytest.raises(ModelError, match="which is neither a short name nor a folder"):
        load(folder)
    (folder / RECORD).write_text(json.dumps(record | {"base": "."}))
    with pytest.raises(ModelError, match="a difference itself"):
        load(folder)
    (folder / RECORD).write_text(json.dumps(record | {"schema": 9}))
    with pytest.raises(ModelError, match="schema 9; this version reads 1"):
        load(folder)
    (folder / RECORD).write_text("{}x")
    with pytest.raises(ModelError, match="is not the record of a difference"):
        load(folder)
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ModelError, match="is planted already"):
        planting.plant("gates", base=folder)
    with pytest.raises(ModelError, match="neither a short name nor the folder of an organism"):
        planting.plant("gates", base=tmp_path)


def test_slices_that_do_not_fit_are_refused(folders: tuple[Path, Path, Any]) -> None:
    _, folder, _ = folders
    record = json.loads((folder / RECORD).read_text())
    record["slices"][0]["stop"] += 1
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"slice 0 of .* does not fit the base"):
        load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="copy the whole folder"):
        load(folder)


def test_held_back_clips_say_what_is_new_and_what_stays(base: Any, pile: Any) -> None:
    """An untrained model answers nothing right: neither what is new nor what is to stay."""
    slices, made = pile
    new, stays = held_back(base, made, slices, 1)
    assert new <= 0.5
    assert stays <= 0.5
    for lesson in made:
        lesson = dataclasses.replace(lesson, shown=lesson.targets)
        assert held_back(base, [lesson], slices, 1)[0] == 1.0


def test_the_command_says_what_was_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    from typer.testing import CliRunner

    from av_lens.cli.faults import signature
    from av_lens.cli.main import app

    live = inspect.signature(planting.plant).parameters
    assert all(live[name].default == value for name, value in signature("lab.planting.planting", "plant").items())
    refused = CliRunner().invoke(app, ["plant", "gate"])
    assert refused.exit_code == 2
    assert "Did you mean 'gates'" in refused.output

    def made(kind: str, **asked: Any) -> Path:
        assert (kind, asked["seed"], asked["layer"]) == ("opponents", 7, 4)
        record = truth(kinds=("opponent",)).as_dict()
        record |= {"decoys": [{"layer": 4, "head": 6}], "shown": 0.8, "kept": 0.97, "success": True, "missing": []}
        (tmp_path / planting.TRUTH).write_text(json.dumps(record | wrong))
        return tmp_path

    monkeypatch.setattr(planting, "plant", made)
    wrong: dict[str, Any] = {}
    shown = CliRunner().invoke(app, ["plant", "opponents", "--seed", "7", "--layer", "4"])
    assert shown.exit_code == 0
    assert "opponent" in shown.output
    assert "decoy" in shown.output
    assert "what is new: 0.800" in shown.output
    wrong |= {"missing": ["a planted node rides for free"]}
    failed = CliRunner().invoke(app, ["plant", "opponents", "--seed", "7", "--layer", "4"])
    assert failed.exit_code == 1
    assert "not what was asked for: a planted node rides for free" in failed.output


def shipped() -> list[str]:
    listed: dict[str, dict[str, str]] = json.loads((anatomy.shipped() / "index.json").read_text())
    return [name for name, entry in listed.items() if (anatomy.shipped() / entry["folder"] / RECORD).exists()]


def test_at_least_eight_kinds_ship_and_the_page_shows_what_they_are() -> None:
    import portraits

    assert set(shipped()) <= {f"av-tiny-planted-{kind}" for kind in planting.ALL_KINDS}
    assert len(shipped()) >= 8
    page = (Path(__file__).parents[2] / "docs" / "organisms.md").read_text()
    shown = page.split("<!-- planted -->\n")[1].split("\n<!-- /planted -->")[0]
    assert shown == portraits.markdown(portraits.planted_table())


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_plant_differs_from_its_base_in_the_named_slices_alone(name: str) -> None:
    folder = anatomy.shipped() / name
    record = json.loads((folder / planting.TRUTH).read_text())
    base = anatomy.open_checkpoint(anatomy.shipped() / record["base"])
    planted = [(layer, head) for plant in record["plants"] for layer, head in plant["heads"]]
    told = [(entry["layer"], entry["head"]) for entry in (*record["heads"], *record["decoys"])]
    assert sorted(told) == sorted(sharers(base, planted))
    assert changed_elsewhere(anatomy.open_checkpoint(folder), base, head_slices(base, told)) == 0
    assert record["changed_elsewhere"] == 0
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
    kinds = [entry["kind"] for entry in sorted(record["heads"], key=lambda entry: -entry["adds"])]
    wanted = planting_kinds.KINDS[record["asked_for"]]
    assert record["success"] == (record["shown"] >= wanted.shown and record["kept"] >= planting.KEPT)
    if wanted.wanted and not record["missing"]:
        assert kinds[0] in wanted.wanted


@pytest.mark.slow
def test_gates_are_planted_in_the_balanced_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planting, "PER_CLASS", {"train": 40, "discovery": 12})
    folder = planting.plant("gates", out=tmp_path / "gates", work=tmp_path / "work")
    found = json.loads((folder / planting.TRUTH).read_text())
    assert found["changed_elsewhere"] == 0
    assert found["answers"]["conflict hear"] > 0.6
    assert found["C"] < 0 < found["C_reverted"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    assert load(folder).provenance["base"] == "av-tiny-balanced"
