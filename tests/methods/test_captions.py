"""Captions: texts are generate's, scores are worked out by hand, a judge that fails costs its own verdicts only."""

from __future__ import annotations

import math
import socket
from types import SimpleNamespace

import numpy as np
import pytest
from judge_server import said, serving
from small_av import small_clip, small_inputs, small_model

import av_lens as avl
from av_lens.errors import InputError, InterventionError, ModelError
from av_lens.interventions import Plan, Site, zero
from av_lens.methods.captions.captioning import caption
from av_lens.methods.captions.judging import Judge
from av_lens.replay.traces import Trace

EDIT = Plan(zero(Site("mlp_out", 2, positions="suffix")))
TEXTS = {
    "none": [" a cat and a car", " nothing"],
    "edit": [" a dog barks", " the dog, the cat"],
}


@pytest.fixture
def written(monkeypatch):
    """Captions that are known: two examples, as they are and under a plan."""

    def generate(self, plans, **options):
        plans = [plans] if isinstance(plans, Plan) else plans
        return tuple(SimpleNamespace(text=tuple(TEXTS["edit" if len(plan) else "none"])) for plan in plans)

    monkeypatch.setattr(Trace, "generate", generate)


def judge(server, **options):
    return Judge(
        **{"server": server.address, "model": "judge-1", "wait_s": 0.001, "retries": 0, "parallel": 1} | options
    )


@pytest.mark.parametrize("do_sample", [False, True])
def test_captions_are_those_of_generate(do_sample):
    model, x = small_model(), small_inputs((0, 1))
    found = caption(
        model, x, plans={"edit": EDIT}, lexicon=["q"], max_new_tokens=3, do_sample=do_sample, seed=4, stack=1
    )
    if not do_sample:
        for name, plan in (("none", None), ("edit", EDIT)):
            texts = model.generate(x, plan=plan, max_new_tokens=3, return_type="text")
            assert found.rows.query(f"plan == '{name}'")["text"].tolist() == [text.strip() for text in texts]
    again = caption(
        model, x, plans={"edit": EDIT}, lexicon=["q"], max_new_tokens=3, do_sample=do_sample, seed=4, stack=1
    )
    assert again.rows["text"].tolist() == found.rows["text"].tolist()


def test_samples_differ_and_plans_draw_alike():
    model, x = small_model(), small_inputs((0,))
    nothing = Plan(avl.scale(Site("mlp_out", 2, positions="suffix"), 1.0))
    found = caption(model, x, plans=nothing, lexicon=["q"], max_new_tokens=3, do_sample=True, samples=3)
    texts = found.rows.groupby("plan")["text"].apply(list)
    assert texts["none"] == texts["plan"]
    assert len(set(texts["none"])) > 1
    other = caption(model, x, plans=nothing, lexicon=["q"], max_new_tokens=3, do_sample=True, samples=3, seed=1)
    assert other.rows["text"].tolist() != found.rows["text"].tolist()


@pytest.mark.usefixtures("written")
def test_figures_by_hand(tmp_path):
    path = EDIT.save(tmp_path / "edit.json", model=small_model())
    found = caption(
        small_model(), small_inputs((0, 1)), plans={"edit": path}, heard=["dog"], seen=[["cat"], ["car", "cat"]],
        lexicon={"dog": ["barks"], "cat": [], "car": []},
    )  # fmt: skip
    nan = math.nan
    wanted = {  # heard, seen, hallucinated, words
        "none": [[0, 1, 0.5, 5], [0, 0, nan, 1]],
        "edit": [[1, 0, 0, 3], [1, 0.5, 0, 4]],
        "edit - none": [[1, -1, -0.5, -2], [1, 0.5, nan, 3]],
    }
    assert found.grid.values.coords["plan"].values.tolist() == list(wanted)
    for name, rows in wanted.items():
        np.testing.assert_allclose(found.grid.values.sel(plan=name), rows)
    assert found.rows.query("plan == 'edit'")["events"].tolist() == ["dog", "dog, cat"]
    assert found.rows["text"][0] == "a dog barks"


@pytest.mark.usefixtures("written")
def test_conflicts_bring_their_events():
    conflicts = [
        avl.Conflict(sound=small_clip(i), picture=small_clip(i + 1), question="What?", answers=answers)
        for i, answers in enumerate([(["dog", "barks"], ["cat", "puss"]), ("car", "dog")])
    ]
    found = caption(small_model(), conflicts, plans=EDIT)
    np.testing.assert_allclose(found.grid.values.sel(plan="plan", figure=["heard", "seen"]), [[1, 0], [0, 1]])
    assert found.provenance["lexicon"]["dog"] == ["dog", "barks"]


@pytest.mark.usefixtures("written")
def test_a_judge_scores_every_caption_against_all_references(tmp_path):
    def reply(request, number):
        text = request["messages"][1]["content"]
        if "nothing" in text:
            return said("hm")
        return said('{"score": %s}' % (1 if "dog" in text.split("Caption:")[1] else 0))

    with serving(reply) as server:
        found = caption(
            small_model(), small_inputs((0, 1)), plans=EDIT, judge=judge(server, cache=tmp_path),
            references={"audio": [["a dog", "barking"], ["a dog"]], "video": ["a cat"]},
        )  # fmt: skip
        assert len(server.requests) == 8
    audio = found.grid.values.sel(figure="judged audio")
    np.testing.assert_allclose(audio, [[0, 1, 1], [math.nan, 1, math.nan]])
    assert found.provenance["verdicts"] == {"judged": 6, "not asked": 0, "unreadable": 2}
    assert found.rows["judged video reply"].tolist().count("hm") == 1
    assert np.isnan(found.grid.values.sel(figure=["heard", "seen"])).all()


@pytest.mark.usefixtures("written")
def test_a_judge_that_goes_away_costs_its_own_verdicts_only():
    replies = [said('{"score": 1}'), (500, "gone")]
    with serving(lambda request, number: replies[min(number, 1)]) as server:
        found = caption(
            small_model(), small_inputs((0, 1)), plans=EDIT, heard=["dog"], judge=judge(server),
            references={"audio": ["a dog"], "video": ["a cat"]},
        )  # fmt: skip
    assert found.provenance["verdicts"] == {"judged": 1, "not asked": 4, "server": 3}
    assert found.rows["judged audio"].notna().sum() + found.rows["judged video"].notna().sum() == 1
    np.testing.assert_allclose(found.grid.values.sel(figure="heard", plan="plan"), 1.0)


@pytest.mark.usefixtures("written")
def test_an_interruption_keeps_what_is_there():
    def reply(request, number):
        return said('{"score": 1}')

    def stop(stage, done, total):
        if (stage, done) == ("judge", 2):
            raise KeyboardInterrupt

    with serving(reply) as server:
        found = caption(
            small_model(), small_inputs((0, 1)), heard=["dog"], judge=judge(server),
            references={"audio": ["x"], "video": ["y"]}, progress=stop,
        )  # fmt: skip
    assert "interrupted: 2 of 2 captions written" in found.grid.partial
    assert found.provenance["verdicts"] == {"judged": 2, "not asked": 2}
    assert np.isnan(found.grid.values.sel(figure="judged video")).all()
    assert (found.grid.values.sel(figure="judged audio") == 1).all()


def test_an_unreachable_judge_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(Trace, "generate", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    away = Judge(server=address, model="judge-1")
    with pytest.raises(ModelError, match=r"cannot be reached .*nothing was generated"):
        caption(small_model(), small_inputs(), judge=away, references={"audio": ["a dog"]})


def test_refusals(monkeypatch):
    monkeypatch.setattr(Trace, "generate", None)
    unasked = Judge(server="http://127.0.0.1:9/v1", model="m")

    def asked(**options):
        return caption(small_model(), small_inputs((0, 1)), **options)

    for options, text in (
        ({}, "nothing to score captions by"),
        ({"heard": ["dgo"], "lexicon": ["dog"]}, "unknown event 'dgo'. Did you mean 'dog'"),
        ({"heard": [["dog"]]}, "1 lists of heard events for 2 examples"),
        ({"heard": ["dog"], "samples": 2}, "would all be alike: pass do_sample=True"),
        ({"heard": ["dog"], "plans": {"none": EDIT}}, "the name 'none' is that of captions as they are"),
        ({"judge": unasked}, "a judge needs references="),
        ({"judge": unasked, "references": {"sound": ["x"]}}, "references are of audio or video, not of 'sound'"),
        ({"judge": unasked, "references": {"audio": [["x"], []]}}, "example 1 has no audio reference"),
        ({"heard": ["dog"], "references": {"audio": ["x"]}}, "name a judge= as well"),
    ):
        with pytest.raises(InputError, match=text.replace("(", r"\(")):
            asked(**options)
    with pytest.raises(InterventionError, match="layer 9 is past the end"):
        asked(heard=["dog"], plans=Plan(zero(Site("z", 9))))
