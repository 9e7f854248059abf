"""The stage engine: several questions in one pass equal one each; what is frozen stays; what is random is seeded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import prompted
import pytest
import torch
from imagined import imagined_pool

from av_lens.lab.planting.planted import changed_elsewhere
from av_lens.lab.training.courses import Recipe, fusion_state, run_stages, stage_files
from av_lens.lab.training.engine import Stage, head_masks, head_slices, train_stage
from av_lens.lab.training.pools import Ask, Items, Material, draw_clips, draw_questions, material
from av_lens.organism import language
from av_lens.organism.anatomy import build_model, thinker_config
from av_lens.organism.language import read_out, run_layers, tree

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ASKS = ("what do you hear?", "what object is shown?", "which colour is it?")


@pytest.fixture(scope="module")
def lessons() -> Material:
    return material(imagined_pool())


def thinker(seed: int = 0, n_layers: int = 3):
    model = build_model(thinker_config(n_layers=n_layers), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # large weights, so that every path matters
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def plain(model, lessons: Material, layout: str, question: str, clips) -> torch.Tensor:
    embeddings, positions = prompted.embed(
        model, layout, [question] * len(clips.picture), video=clips.video, audio=clips.audio
    )
    out = model.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
    return model.lm_head(out.last_hidden_state[:, -1])


def in_one_pass(model, lessons: Material, frame, clips, **kwargs) -> torch.Tensor:
    blocks = [lessons.words.questions[kind][i] for kind, i in (("hear", 0), ("see", 2), ("colour", 1))]
    width = len(blocks[0]) + 2  # two positions more than needed: what fills up must not matter
    ids = torch.tensor([[*block, 5, 5] for block in blocks]).flatten().expand(len(clips.picture), -1)
    geometry = tree(model, frame.positions, blocks=3, width=width)
    x = run_layers(model, frame.embed(model, clips.video, clips.audio, ids), geometry, **kwargs)
    return read_out(model, x[:, [width - 3, 2 * width - 3, 3 * width - 3]])


@pytest.mark.parametrize(
    ("media", "which", "layout"), [("both", 0, "separate"), ("both", 1, "in_video"), ("audio", 0, "audio")]
)
@torch.no_grad()
def test_three_questions_in_one_pass_equal_three_plain_passes(
    lessons: Material, media: str, which: int, layout: str
) -> None:
    model = thinker()
    clips = draw_clips(lessons.pool, "conflict", 3, torch.Generator().manual_seed(1))
    together = in_one_pass(model, lessons, lessons.frames[media][which], clips)
    for i, question in enumerate(ASKS):
        torch.testing.assert_close(together[:, i], plain(model, lessons, layout, question, clips), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_dropped_head_is_a_head_whose_z_is_zero_at_the_question(lessons: Material) -> None:
    model = thinker()
    clips = draw_clips(lessons.pool, "matched", 3, torch.Generator().manual_seed(1))
    width = len(lessons.words.questions["hear"][0])
    keep = torch.ones(3, 8, 3 * (width + 2))
    keep[:, 5] = 0
    dropped = in_one_pass(model, lessons, lessons.frames["both"][0], clips, keep={1: keep})

    def silence(module, args):
        z = args[0].clone()
        z[:, -width:, 5 * 16 : 6 * 16] = 0
        return (z,)

    hook = model.model.language_model.layers[1].self_attn.o_proj.register_forward_pre_hook(silence)
    expected = plain(model, lessons, "separate", ASKS[0], clips)
    hook.remove()
    torch.testing.assert_close(dropped[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain(model, lessons, "separate", ASKS[0], clips)).abs().max() > 1e-2


def stage(**changes) -> Stage:
    items = (
        Items("both", "matched", 3.0, (Ask("hear", "sound"), Ask("see", "picture", drop=0.5))),
        Items("audio", "matched", 1.5, (Ask("hear", "sound"),)),
        Items("both", "conflict", 1.0, (Ask("caption", "caption"),)),
        Items("both", "matched", 1.0, (Ask("see", "nothing"),), deaf_to="video"),
    )
    plain_stage = Stage(
        name="test", items=items, steps=3, rate=1e-2, layers=(0, 1), text=True, dropped_heads=((1, 2),), warmup=1
    )
    return dataclasses.replace(plain_stage, **changes)


def test_only_what_a_stage_names_changes(lessons: Material) -> None:
    model, before = thinker(), thinker()
    train_stage(model, stage(layers=(1,), text=False), lessons, seed=0)
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before.state_dict()[n])}
    assert changed
    assert all("language_model.layers.1." in name for name in changed)


def test_planting_changes_the_named_heads_and_no_other_bit(lessons: Material) -> None:
    model, before = thinker(), thinker()
    only = stage(layers=(1,), text=False, attention_only=True, only_heads=((1, (2, 3)),))
    train_stage(model, only, lessons, seed=0)
    assert changed_elsewhere(model, before, head_slices(before, [(1, 2), (1, 3)])) == 0
    assert changed_elsewhere(model, before, head_slices(before, [(1, 2)])) > 0
    masks = head_masks(model, [(1, 2), (1, 3)])
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "model.language_model.layers.1.self_attn.q_proj.weight": 32 * 128,
        "model.language_model.layers.1.self_attn.q_proj.bias": 32,
        "model.language_model.layers.1.self_attn.k_proj.weight": 16 * 128,
        "model.language_model.layers.1.self_attn.k_proj.bias": 16,
        "model.language_model.layers.1.self_attn.v_proj.weight": 16 * 128,
        "model.language_model.layers.1.self_attn.v_proj.bias": 16,
        "model.language_model.layers.1.self_attn.o_proj.weight": 128 * 32,
    }


def test_the_loss_falls_and_a_seed_gives_one_result(lessons: Material) -> None:
    first, again, other = thinker(), thinker(), thinker()
    longer = stage(steps=12, rate=5e-3, warmup=3)
    losses = train_stage(first, longer, lessons, seed=0)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert train_stage(again, longer, lessons, seed=0) == losses
    assert train_stage(other, stage(), lessons, seed=1) != train_stage(thinker(), stage(), lessons, seed=0)


def test_an_interrupt_changes_nothing(lessons: Material, tmp_path: Path) -> None:
    course = Recipe("test", "two stages", (stage(name="one"), stage(name="two")))
    model = thinker()
    run_stages(model, course, lessons, seed=3, folder=tmp_path / "whole")

    stopped = thinker()

    def stop(name: str, step: int, steps: int) -> None:
        if name == "two" and step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(stopped, course, lessons, seed=3, folder=tmp_path / "parts", progress=stop)
    assert len(list((tmp_path / "parts").iterdir())) == 1
    seen: list[str] = []
    resumed = thinker(seed=9)
    run_stages(resumed, course, lessons, seed=3, folder=tmp_path / "parts", progress=lambda name, *_: seen.append(name))
    assert set(seen) == {"two"}
    for name, weight in fusion_state(model).items():
        assert torch.equal(weight, fusion_state(resumed)[name]), name


def test_a_stage_file_names_all_that_went_before(tmp_path: Path) -> None:
    course = Recipe("test", "two stages", (stage(name="one"), stage(name="two")))
    files = stage_files(course, 3, tmp_path)
    changed = stage_files(
        dataclasses.replace(course, stages=(stage(name="one", steps=4), stage(name="two"))), 3, tmp_path
    )
    longer = stage_files(dataclasses.replace(course, stages=(stage(name="one"), stage(name="else"))), 3, tmp_path)
    assert files[0] != changed[0]
    assert files[1] != changed[1]
    assert files[0] == longer[0]
    assert files != stage_files(course, 4, tmp_path)


def test_targets_are_the_right_words(lessons: Material) -> None:
    words = lessons.words
    generator = torch.Generator().manual_seed(0)
    clips = draw_clips(lessons.pool, "conflict", 5, generator)
    assert (clips.picture != clips.sound).all()
    asked = draw_questions(words, [Ask("hear", "sound")], clips, blocks=2, width=11, generator=generator)
    assert asked.targets[:, 9].tolist() == words.classes[clips.sound].tolist()
    assert asked.targets[:, 20].tolist() == words.classes[clips.sound].tolist()
    assert asked.targets[:, 10].tolist() == [words.stop] * 5
    assert asked.ids[:, 10].tolist() == words.classes[clips.sound].tolist()
    told = draw_questions(words, [Ask("caption", "caption")], clips, blocks=1, width=19, generator=generator)
    said = [language.answer_ids(text)[0] for text in ("i", "see", "a")]
    assert told.targets[0, 9:13].tolist() == [*said, int(words.classes[clips.picture[0]])]
    assert told.weights[0, 12] == 1
    assert told.weights[0, 9] == pytest.approx(0.1)
    empty = draw_clips(lessons.pool, "empty", 2, generator)
    silent = draw_questions(words, [Ask("hear", "sound")], empty, blocks=1, width=11, generator=generator)
    assert silent.targets[:, 9].tolist() == [words.nothing] * 2


def test_deaf_clips_do_not_see_the_picture(lessons: Material) -> None:
    frame = lessons.frames["both"][1]
    cut = frame.blocked("video", 90)
    assert cut[frame.audio][:, frame.video].all()
    assert cut[75:][:, frame.video].all()
    assert not cut[frame.video].any()
    assert int(cut.sum()) == (50 + 15) * 18
