"""`suppressed="picture"`: asked what is seen, on a model whose picture and sound have changed places, all is equal."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fake_model import FakeModel, Shown, fake_conflicts, isolated
from small_av import small_clip, small_model
from tiny import letter

from av_lens.errors import ProtocolError
from av_lens.inputs import Conflict
from av_lens.isolation.measuring.behaviour import survey
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.cells import mirrored_conflict
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.reports import write_report
from av_lens.results.exchanged import exchanged
from av_lens.results.record import TABLES

N = 44
ROLES = {
    "picture writer": "sound writer", "sound opponent": "picture opponent", "gate": "gate",
    "silenced carrier": "silenced carrier", "sound carrier": "picture carrier",
}  # fmt: skip
CELLS = {  # the search's name -> what the protocol calls it: M' = -M, and a and v are told by which sense is asked for
    "va": "va", "av": "av", "aa": "vv", "vv": "aa", "wa": "vw", "wv": "aw", "vw": "wa", "aw": "wv",
    "blank_a": "v_muted", "blank_v": "a_muted", "v_muted": "blank_a", "a_muted": "blank_v",
    "blank_muted": "blank_muted",
}  # fmt: skip


class Mirrored(FakeModel):
    """The model on paper, which does to pictures what that does to sounds, and the other way round."""

    def _shown(self, x):
        asked = {"hear": "see", "see": "hear"}
        return [Shown(one.sound, one.picture, asked.get(one.question, one.question), one.noise) for one in Shown.of(x)]


@pytest.fixture(scope="module")
def both():
    conflicts = fake_conflicts(N)
    exchanged_ones = [replace(c, sound=c.picture, picture=c.sound, answers=c.answers[::-1]) for c in conflicts]
    options = {"s": 0.1, "quick": True, "named_only": True}
    sound = isolated(FakeModel(), conflicts, **options)
    return sound, isolated(Mirrored(), exchanged_ones, suppressed="picture", **options)


def test_it_finds_the_mirrored_heads(both):
    sound, picture = both
    found = [{(r.layer, r.head, r.role, r.confirmed) for r in one.heads.itertuples()} for one in both]
    assert {(layer, head, ROLES[role], sure) for layer, head, role, sure in found[0]} == found[1]
    listed = "sound writer L2H0; picture opponent L2H1; gate L0H1"
    assert f"at suffix: {listed} (p after" in picture.verdict
    assert "The sound dominates: seeing falls from G = 7.00" in picture.verdict
    assert "the picture is said in 1.00 of them, 0.00 before" in picture.verdict
    assert "as many heads that `hear` needs most" in picture.verdict
    assert set(picture.suppressors["role"]) == {"sound writer", "picture opponent", "gate"}
    assert picture.verdict == exchanged(sound.verdict)


def test_all_figures_are_equal_under_their_own_names(both):
    sound, picture = both
    writer = picture.heads.query("role == 'sound writer'").iloc[0]
    assert [writer.reads_sound, writer.reads_picture] == pytest.approx([6, 0], abs=0.02)
    assert picture.grid("silenced", "v_muted - blank_muted")[1, 0] == pytest.approx(3, abs=0.02)
    assert {"accuracy"} == set(picture.behaviour.query("cell == 'v_muted'")["quantity"]) - {"M"}
    assert set(picture.specificity["control"]) >= {"hear", "picture-only", "blank picture"}
    rows = picture.behaviour.query("half == 'discovery' and chosen == 'competent'").set_index("quantity")["value"]
    assert [rows["G"], rows["C"], rows["E_V"], rows["E_A"]] == pytest.approx([7, -4, 4, 12], abs=0.02)
    for name in ("evidence", "heads", "sets", "members", "ablation", "specificity", "behaviour", "steps", "conflicts"):
        one, two = getattr(sound, name), getattr(picture, name)
        for column in TABLES[name]:
            other = exchanged(column) if exchanged(column) in TABLES[name] else column
            if pd.api.types.is_numeric_dtype(one[column]):
                np.testing.assert_array_equal(one[column], two[other], err_msg=f"{name}: {column}")
    for key, values in sound.arrays.items():
        half, site, *rest = key.split("/", 2)
        np.testing.assert_array_equal(values, picture.arrays["/".join((half, site, *map(exchanged, rest)))], key)


def test_its_page_speaks_of_seeing(both, tmp_path):
    page = write_report(both[1], tmp_path / "report.html").read_text(encoding="utf-8")
    for said in ("from saying what it sees?", "Which heads keep the picture from being said", "sound writer",
                 "as many top heads for what is heard", "of G released by 3 heads"):  # fmt: skip
        assert said in page
    assert "keep the sound from being said" not in page


def test_names_change_places_both_ways_and_others_stay():
    for one, two in [*CELLS.items(), ("reads picture", "reads sound"), ("E_A", "E_V"), ("va (see)", "va (hear)")]:
        assert (exchanged(one), exchanged(two)) == (two, one)
    for name in ("blank_muted", "mean_other", "release_blank_muted", "question_share", "says neither", "zero"):
        assert exchanged(name) == name


def small_conflicts():
    answers = [("a", "b"), ("b", "c"), ("c", "a")]
    return [
        Conflict(id=f"c{i}", sound=small_clip(2 * i), picture=small_clip(2 * i + 1), third=small_clip(9 + i),
                 question="Heard?", see="Seen it?", answers=pair)
        for i, pair in enumerate(answers)
    ]  # fmt: skip


def same(one, two):
    """Equal tensors of an input."""
    equal = (torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*map(parts, (one, two)), strict=True))
    return set(one.tensors) == set(two.tensors) and all(equal)


def parts(x):
    return [x.tensors[key] for key in sorted(x.tensors)]


def test_each_cell_is_the_one_that_the_protocol_names_asked_what_is_seen():
    model, (one, *_) = small_model(), small_conflicts()
    engine = ModelEngine(model)
    engine.suppressed = "picture"
    cells, raw = engine.cells(mirrored_conflict(one), None), one.cells(model, question=one.see)
    heard, plain = engine.cells(mirrored_conflict(one), one.question), one.cells(model)
    for name, other in CELLS.items():
        for found, wanted in ((cells[name], raw[other]), (heard[name], plain[other])):
            assert found.questions == wanted.questions
            assert same(found, wanted), (name, other)
    alone, mirror = cells["audio_only"], cells["audio_only_v"]
    for x, clip in ((alone, one.picture), (mirror, one.sound)):
        wanted = model.encode(clip, one.see, sound=None)
        assert same(x, wanted)
        assert "audio" not in x.spans.roles
        assert "video" in x.spans.roles


def test_hearing_under_conflict_becomes_seeing_under_conflict():
    """C' = ½[M'(va) - M'(av)] and G' = ½[M'(v_muted) - M'(a_muted)], M' = score(v) - score(a), from plain forwards."""
    model, listed = small_model(), small_conflicts()
    engine = ModelEngine(model)
    engine.suppressed = "picture"
    ones = [replace(c, answers=tuple(map(letter, c.answers))) for c in listed]
    ones = list(map(mirrored_conflict, ones))
    found = survey(Bench(engine, ones, Candidates.of(ones, model.tokenizer)).chunks(range(3)), 3)
    for i, one in enumerate(listed):
        cells = one.cells(model, question=one.see)

        def margin(cell, cells=cells, one=one):
            heard, seen = (letter(word).options[0][0] for word in one.answers)
            logits = model(cells[cell])[0, -1].detach().double()
            return float(logits[seen] - logits[heard])

        assert found.C[i] == pytest.approx(0.5 * (margin("va") - margin("av")), abs=1e-4)
        assert found.G[i] == pytest.approx(0.5 * (margin("v_muted") - margin("a_muted")), abs=1e-4)


def test_what_is_not_mirrored_is_refused_or_left_out_in_words():
    conflicts = fake_conflicts(N)
    with pytest.raises(ProtocolError, match=r'captions tell what is heard: leave captions out with suppressed="pic'):
        isolated(Mirrored(), conflicts, suppressed="picture", captions=True)
    with pytest.raises(ProtocolError, match=r"unknown suppressed 'pictures'. Did you mean 'picture'"):
        isolated(Mirrored(), conflicts, suppressed="pictures")
    blind = Mirrored(writer=0.0, gate=0.0, opponent=0.0)
    ones = [dataclasses.replace(c, sound=c.picture, picture=c.sound, answers=c.answers[::-1]) for c in conflicts]
    found = isolated(blind, ones, s=0.1, suppressed="picture", quick=True)
    assert "No suppression: seeing falls from G = 7.00" in found.verdict
    assert "v_muted 44, a_muted 44, blank_a (hear) 44, blank_v (hear) 44" in found.verdict
