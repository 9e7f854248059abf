"""The fixed evaluation: its counts, its cuts, its controls, and that its quick road is the model's own."""

from __future__ import annotations

import json

import pandas as pd
import portraits
import prompted
import pytest
import torch

from av_lens.errors import InputError, ModelError
from av_lens.organism import anatomy, answering, dissection, evaluation, language
from av_lens.organism import footage as holding
from av_lens.organism.answering import Asked, blocked, each_head, logits, streams, tally
from av_lens.organism.evaluation import Evaluation


def same_counts(one: Evaluation, other: Evaluation) -> bool:
    """Whether two evaluations of the same clips counted the same."""
    assert one.about["clips"] == other.about["clips"]
    return one.counts.equals(other.counts) and one.captions.equals(other.captions)


@pytest.fixture(scope="module")
def model():
    return anatomy.build_model(anatomy.thinker_config(n_layers=2), seed=0).requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def clips(folder):
    return holding.held_out(per_class=2, folder=folder)


def random_asked(layout: str, n: int = 3) -> Asked:
    generator = torch.Generator().manual_seed(0)
    kinds = ("hear", "see")
    asked = [[anatomy.QUESTIONS[kind][at % 3] for kind in kinds] for at in range(n)]
    video = None if layout == "audio" else torch.randn(n, 18, 128, generator=generator)
    audio = None if layout == "video" else torch.randn(n, 50, 128, generator=generator)
    return Asked(layout, asked, video, audio)


def forward(model, asked: Asked, block: int, mask=None, **hooks) -> torch.Tensor:
    """The plain forward pass of HuggingFace for one of each clip's questions."""
    questions = [one[block] for one in asked.questions]
    stream, positions = prompted.embed(model, asked.layout, questions, video=asked.video, audio=asked.audio)
    mask = torch.ones(stream.shape[:2]) if mask is None else mask
    return model(inputs_embeds=stream, position_ids=positions, attention_mask=mask).logits


@pytest.mark.parametrize("layout", language.LAYOUTS)
def test_logits_are_those_of_the_plain_forward(model, layout):
    asked = random_asked(layout)
    ours = logits(model, asked)[:, :, 0]
    for block in range(2):
        assert torch.allclose(ours[:, block], forward(model, asked, block)[:, -1], atol=1e-5)


def test_silencing_is_zeroing_z_after_the_media(model):
    asked = random_asked("in_video")
    head, width, suffix = 5, 16, language.prompt("what do you hear?", "in_video").suffix

    def zero(_module, inputs):
        z = inputs[0].clone()
        z[:, suffix:, head * width : (head + 1) * width] = 0
        return (z,)

    handle = model.model.language_model.layers[1].self_attn.o_proj.register_forward_pre_hook(zero)
    expected = forward(model, asked, 0)[:, -1]
    handle.remove()
    ours = logits(model, asked, silenced=[(1, head)])[:, 0, 0]
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(ours, logits(model, asked)[:, 0, 0], atol=1e-4)
    alone = dict(each_head(model, asked))
    assert len(alone) == 16
    assert torch.allclose(alone[(1, head)][:, 0], ours, atol=1e-5)


def test_a_cut_is_the_forward_with_those_edges_masked(model):
    asked = random_asked("separate")
    made = language.prompt("what do you hear?", "separate")
    length = len(made.ids)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    query = torch.ones(length, dtype=torch.bool)
    query[made.video] = False
    key = ~query
    seen &= ~(query[:, None] & key[None])
    mask = torch.zeros(len(asked), 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    ours = logits(model, asked, cut=("text|audio", "video"))[:, 0, 0]
    assert torch.allclose(ours, forward(model, asked, 0, mask)[:, -1], atol=1e-5)


def test_cut_edges_by_hand():
    edges = blocked("video", query="text", key="video", blocks=1, width=10)
    made = language.prompt("what do you hear?", "video")
    assert edges.sum() == 18 * (len(made.ids) - 18)
    assert not edges[made.video].any()


def test_streams_end_in_the_logits(model):
    asked = random_asked("separate")
    last = streams(model, asked)[:, 0, -1]
    assert torch.allclose(
        model.lm_head(model.model.language_model.norm(last)), logits(model, asked)[:, 0, 0], atol=1e-5
    )


def test_questions_of_unequal_length_are_refused(model):
    asked = Asked("audio", [["what do you hear?"], ["hear"]], None, torch.zeros(2, 50, 128))
    with pytest.raises(InputError, match="the same number of tokens"):
        logits(model, asked)


def test_tally_by_hand():
    dog, cat, bird = (language.answer_ids(name)[0] for name in ("dog", "cat", "bird"))
    nothing, red = language.answer_ids("nothing")[0], language.answer_ids("red")[0]
    said = torch.tensor([dog, cat, bird, nothing, red])
    what = {"picture": torch.zeros(5).long(), "sound": torch.ones(5).long(), "colour": torch.zeros(5).long()}
    counts = tally(said, "hear", what)
    assert counts == {"sound": 1, "picture": 1, "colour": 1, "nothing": 1, "other": 1, "right": 1}
    assert tally(said, "colour", what)["right"] == 1
    unheard = what | {"sound": torch.full((5,), -1)}
    assert tally(said, "hear", unheard) == counts | {"sound": 0, "other": 2}


def test_conflicts_use_every_sound_once_and_never_agree(clips):
    assert sorted(clips.partner.tolist()) == list(range(24))
    assert (clips.views.sound[clips.partner] != clips.views.picture).all()
    assert len({pair for hashes in clips.hashes for pair in hashes}) == 48


def test_clips_come_back_by_their_hashes(clips):
    clip = clips.clip(5)
    assert (clip.picture_hash, clip.sound_hash) == clips.hashes[5]


def test_another_seed_shares_no_clip(clips, folder):
    other = holding.held_out(per_class=2, seed=1, folder=folder)
    assert not {pair for hashes in clips.hashes for pair in hashes} & {pair for one in other.hashes for pair in one}
    assert other.digest != clips.digest
    with pytest.raises(InputError, match="1 to 1000 clips of each class; asked for 1001"):
        holding.held_out(per_class=1001)


def test_fewer_clips_keep_their_conflicts(model, clips):
    outputs = holding.media(model, clips)
    smaller, fewer = dissection.few(clips, outputs, 1)
    assert smaller.views.picture.tolist() == list(range(12))
    assert (smaller.views.sound[smaller.partner] != smaller.views.picture).all()
    for at in range(12):
        assert torch.equal(fewer.audio[smaller.partner[at]], outputs.audio[clips.partner[2 * at]])


def test_controls_are_matched_by_layer_and_never_the_chosen():
    chosen = [(4, 2), (4, 3), (4, 6)]
    sets = dissection.controls(chosen, 7, 8, n_sets=6)
    assert len(set(sets)) == 6
    assert all(len(drawn) == 3 and not set(drawn) & set(chosen) for drawn in sets)
    assert [{layer for layer, _ in drawn} for drawn in sets[:3]] == [{4}] * 3
    assert all({layer for layer, _ in drawn} <= {3, 5} for drawn in sets[3:])


def test_evaluate_runs_whole_and_comes_back(folder, tmp_path):
    """A random model, through files: the roads agree, and a second run counts the same."""
    from av_lens.model import load
    from av_lens.organism import anatomy

    bare = anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=1)
    hooked = load(anatomy.save_checkpoint(bare, tmp_path / "tiny"))
    told = []
    found = evaluation.evaluate(hooked, n=24, folder=folder, progress=lambda *at: told.append(at))
    assert found.about["road_difference"] < 1e-4
    assert ("dissecting the model", 4, 4) in told
    assert set(found.counts["cell"]) == set(answering.CELLS)
    assert (found.counts["n"] == 24).all()
    assert len(found.heads) == 8
    assert {"chosen", "random"} == set(found.ablation["arm"])
    again = evaluation.evaluate(anatomy.open_checkpoint(tmp_path / "tiny"), n=24, folder=folder, dissect=False)
    assert same_counts(found, again)
    found.save(tmp_path / "evaluation.json")
    back = Evaluation.load(tmp_path / "evaluation.json")
    assert same_counts(found, back)
    pd.testing.assert_frame_equal(found.probes, back.probes)
    assert len(portraits.standing(back, "av-tiny-balanced")) == 10


def test_a_wrong_road_is_refused(folder, monkeypatch, tmp_path):
    from av_lens.model import load
    from av_lens.organism import anatomy

    hooked = load(
        anatomy.save_checkpoint(anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=1), tmp_path / "t")
    )
    other = anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=2)
    monkeypatch.setattr(evaluation, "plain", lambda _: other)
    with pytest.raises(ModelError, match="these counts would not be the model's"):
        evaluation.evaluate(hooked, n=24, folder=folder, dissect=False)


def test_plain_unwraps_a_bridge(tmp_path):
    from av_lens.model import load
    from av_lens.organism import anatomy

    bare = anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=1)
    folder = anatomy.save_checkpoint(bare, tmp_path / "t")
    unwrapped = answering.plain(load(folder)).state_dict()
    for name, weight in anatomy.open_checkpoint(folder).state_dict().items():
        assert torch.equal(unwrapped[name], weight)


def counted(cell: str, layout: str, kind: str, n: int, **counts: int) -> dict:
    return {"cell": cell, "layout": layout, "kind": kind, "n": n} | dict.fromkeys(answering.COUNTED, 0) | counts


def test_a_line_holds_where_its_interval_reaches_the_bound():
    counts = pd.DataFrame(
        [
            counted("audio_only", "audio", "hear", 720, right=675),  # .9375, high .954: reaches .95
            counted("conflict", "separate", "hear", 720, picture=500),  # .694, high .728: does not reach .75
            counted("conflict", "in_video", "hear", 720, picture=540),
        ]
    )
    heads = pd.DataFrame([{"layer": 3, "head": 1, "effect": 1.0, "share": 0.12, "sound": 0.2}])
    found = portraits.standing(Evaluation(counts, counts, heads=heads), "av-tiny-diffuse")
    held = {(row["line"], row["layout"]): row["holds"] for row in found.to_dict("records")}
    assert held == {
        ("heard, audio alone", "audio"): True,
        ("conflict heard: the picture", "separate"): False,
        ("conflict heard: the picture", "in_video"): True,
        ("best single head's share of the gap", "both"): False,
    }
    with pytest.raises(InputError, match=r"unknown model 'av-tny'. Did you mean 'av-tiny'\?"):
        portraits.standing(Evaluation(counts, counts), "av-tny")


def test_planted_heads_must_come_first():
    heads = pd.DataFrame([{"layer": 5, "head": at, "effect": 1.0 - at, "share": 0.5, "sound": 0.2} for at in range(3)])
    empty = pd.DataFrame([counted("audio_only", "audio", "hear", 10, right=10)])
    for planted, holds in ((((5, 0), (5, 1)), True), (((5, 0), (5, 2)), False)):
        found = portraits.standing(Evaluation(empty, empty, heads=heads), "av-tiny-planted", planted=planted)
        assert found.set_index("line").loc["planted heads ranked first", "holds"] == holds


@pytest.mark.slow
def test_shipped_weights_reproduce_their_table():
    """Equal counts from clips of equal hashes; where this machine's encoder makes other clips, say so."""
    from av_lens.model import load
    from av_lens.organism import anatomy

    index = anatomy.shipped() / "index.json"
    if not index.exists():
        pytest.skip("no checkpoints are shipped")
    for name, entry in json.loads(index.read_text()).items():
        path = anatomy.shipped() / entry["folder"] / "evaluation.json"
        if not path.exists():  # planted differences carry their own figures, in planted.json
            assert (path.with_name("planted.json")).exists(), name
            continue
        stored = Evaluation.load(path)
        about = stored.about
        again = evaluation.evaluate(load(name), seed=about["seed"], n=12 * about["per_class"], dissect=False)
        if again.about["clips"] != about["clips"]:
            pytest.skip("this build of the mp4 encoder makes other clips than the one that the tables were made with")
        assert same_counts(again, stored), name


def test_the_table_of_shares_by_hand():
    import portraits

    rows = [
        counted(cell, layout, kind, 4, right=4, sound=1, picture=3, colour=2)
        for cell, place in answering.CELLS.items()
        for layout in place.layouts
        for kind in answering.KINDS
    ]
    table = portraits.shares_table({"tiny": Evaluation(pd.DataFrame(rows), pd.DataFrame())})
    assert table["layout"].tolist() == ["in_video", "separate"]
    first = table.iloc[0]
    assert (first["heard, audio alone"], first["conflict heard: sound"], first["conflict colour"]) == (1.0, 0.25, 0.5)
    assert portraits.markdown(table[["model", "conflict seen"]]).splitlines() == [
        "| model | conflict seen |",
        "|---|---|",
        "| tiny | 0.750 |",
        "| tiny | 0.750 |",
    ]
