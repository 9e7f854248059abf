"""Answers of several tokens: `isolate`'s figures against teacher-forced HuggingFace forwards with hooks by hand.

The second implementation (`plain_protocol`) runs HuggingFace's own class on the prompt with an answer's tokens after
it, one answer, one edit and one conflict at a time; edits are made at the prompt's positions alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from pieces import LABELS, ONE, pieces_model
from plain_cases import case
from plain_forward import PlainModel
from plain_protocol import DIRECT, RELEASES, Plain
from tiny import tiny_clip, tiny_hf_model, tiny_processor, untouched

from av_lens.inputs import Answer, Conflict
from av_lens.inputs.answers import forms_of
from av_lens.isolation import isolate
from av_lens.isolation.explaining.knowledge import paths
from av_lens.isolation.explaining.units import Asked, Unit, _chunk_units
from av_lens.isolation.measuring.behaviour import answered
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.measuring.effects import ESTIMANDS, FIRST_RELEASE, Request, figures, measure_requests, requests
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.naming.roles import Cuts, Evidence, _parts
from av_lens.isolation.sets.sets import SetReleases, release_of_sets
from av_lens.model import load
from av_lens.results.statistics import Bootstrap

ATOL = 1e-4
HEADS = [(0, 1), (2, 0)]
# Of several tokens on both sides, on one, of unequal numbers, with synonyms; and a conflict of one token each.
ANSWERS = [
    (["dog"], ["lion"]),
    (["owl"], ["b"]),
    (["cat", "kitty"], ["hen", "rooster"]),
    (["x"], ["y"]),
    (["mouse"], ["frog"]),
]


def literal(tokenizer, words):
    options = tuple(tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words)
    return Answer(" / ".join(words), options)


@pytest.fixture(scope="module")
def both():
    hf, processor = tiny_hf_model(seed=1), tiny_processor()
    plain_model = PlainModel(untouched(hf))
    model = load(hf_model=hf, processor=processor)
    listed = [
        Conflict(
            sound=tiny_clip(seed=2 * i),
            picture=tiny_clip(seed=2 * i + 1),
            third=tiny_clip(seed=50 + i),
            question="What?",
            see="See?",
            answers=tuple(literal(model.tokenizer, words) for words in pair),
            id=f"c{i}",
        )
        for i, pair in enumerate(ANSWERS)
    ]
    cases = [case(model, one) for one in listed]
    options = {answer.text: answer.options for one in listed for answer in one.answers}
    plain = Plain(plain_model, cases, options)
    return SimpleNamespace(model=model, listed=listed, cases=cases, plain=plain, rows=np.arange(len(listed)))


def effect(both, one, donor, heads, of="M", **how):
    return both.plain.effect(one, donor, heads, "suffix", both.cases, **how)[of]


def bench_of(both, how="trace"):
    candidates = Candidates.of(both.listed, both.model.tokenizer)
    return Bench(ModelEngine(both.model, how=how), list(both.listed), candidates)


def chunks_of(both, how="trace"):
    chunks = bench_of(both, how).chunks(both.rows.tolist())
    means = Means.over(chunks)
    for chunk in chunks:
        chunk.means = means
    return chunks


@pytest.fixture(scope="module")
def chunks(both):
    return chunks_of(both)


def equal(ours, theirs, what=""):
    assert np.abs(ours).max() > 5 * ATOL, what
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=ATOL, err_msg=what)


def test_conflicts_of_one_token_run_apart(chunks):
    assert [chunk.examples.tolist() for chunk in chunks] == [[0, 1, 2, 4], [3]]
    assert [chunk.spoken is None for chunk in chunks] == [False, True]


@pytest.mark.parametrize(
    ("cell", "question"), [("va", "ask"), ("av", "ask"), ("audio_only", "ask"), ("v_muted", "see")]
)
def test_behaviour_is_read_from_summed_log_probabilities(both, chunks, cell, question):
    asked = "hear" if question == "ask" else question
    for chunk in chunks:
        read, rows = chunk.reading(cell, question), [both.cases[i] for i in chunk.examples]
        equal([both.plain.m(one, cell, asked) for one in rows], chunk.margin(cell, question), cell)
        for one, top, mass in zip(rows, read.top, read.mass, strict=True):
            np.testing.assert_allclose(mass, both.plain.mass(one, cell, asked), rtol=1e-4)
            token = both.plain.best_of_all(one, cell, asked)
            assert top == next((n for n, ids in enumerate(chunk.bench.candidates.ids) if token in ids), -1)


def test_effects_of_heads(both, chunks):
    effects = measure_requests(chunks, requests(chunks), heads=HEADS, examples=both.rows)
    found = figures(effects)
    for layer, head in HEADS:
        ours = [both.plain.node_effects(one, (layer, head), "suffix", both.cases) for one in both.cases]
        for key in ours[0].keys() & {"/".join(key) for key in found}:
            values = np.array([one[key] for one in ours])
            np.testing.assert_allclose(found[*key.split("/")][:, layer, head], values, atol=ATOL, err_msg=key)
            assert np.abs(values).max() > ATOL, key
    for donor in RELEASES:
        layer, head = HEADS[0]
        less = found["direct", donor] - found[FIRST_RELEASE, donor]
        np.testing.assert_array_equal(found["repair", donor][:, layer, head], less[:, layer, head])
        parts = [found[f"release on {side}", donor][:, layer, head] for side in ("sound", "picture")]
        np.testing.assert_allclose(parts[0] - parts[1], found["release", donor][:, layer, head], atol=1e-9)


def test_with_the_answer_held_too_the_sum_moves_as_its_first_token_does(both):
    """Why direct shares lose nothing by being read at the first token."""
    cases = [both.cases[0], both.cases[1], both.cases[4]]
    whole, first = ([effect(both, one, "zero", [(1, 2)], of=of, held=DIRECT) for one in cases] for of in ("M", "first"))
    equal(whole, first)


def test_direct_shares_and_their_p_are_of_the_release_at_the_first_token():
    rng, n = np.random.default_rng(0), 12
    names = {(one.name, one.donor) for one in ESTIMANDS if "norm frozen" not in one.name}
    values = {key: rng.normal(1.0, 0.2, (n, 2, 2)) for key in sorted(names)}
    boot = Bootstrap.draw(range(n), [f"s{i}" for i in range(n)], [f"p{i}" for i in range(n)], seed=0, draws=50)
    found = Evidence(values, Half("discovery", np.arange(n), list(range(n)), boot, np.ones(n), np.zeros(n)))
    direct, first = values["direct", "zero"], values[FIRST_RELEASE, "zero"]
    cuts = Cuts.of(found, np.full((2, 2), "zero", dtype=object), s=0.1)
    np.testing.assert_allclose(cuts.share.value, direct.mean(0) / first.mean(0))
    np.testing.assert_allclose(cuts.release.value, values["release", "zero"].mean(0))
    np.testing.assert_array_equal(_parts(found, 0.1, False)["direct zero"], direct - 0.5 * first)
    alone = Evidence({key: one for key, one in values.items() if key[0] != FIRST_RELEASE}, found.half)
    np.testing.assert_array_equal(_parts(alone, 0.1, False)["direct zero"], direct - 0.5 * values["release", "zero"])


def test_sets_and_further_edits_on_top_of_edited_runs(both, chunks):
    members = [(0, 1), (1, 2)]
    for donor in RELEASES:
        ours = [effect(both, one, donor, members) for one in both.cases]
        equal(ours, release_of_sets(chunks, [members], [donor], both.rows).release[0])
        releases = SetReleases(chunks, both.rows, donor)
        releases.added([(0, 1)], [(1, 2)])
        equal(ours, releases.each([(0, 1), (1, 2)]))


def test_units_and_paths(both, chunks):
    heads = [(1, head) for head in range(4)]
    unit = Unit("attention", 1, -1, tuple(heads))
    found = {}
    for chunk in chunks:
        made = _chunk_units(chunk, [unit], [Asked("release", "va", "zero")])["margin"]
        found |= zip(chunk.examples.tolist(), made, strict=True)
    ours = [effect(both, one, "zero", heads) for one in both.cases]
    equal(ours, np.array([found[i][0, 0] for i in range(len(ours))]))
    found = paths(chunks[0], "va", [((1, 2), "zero")], [])["effect"]
    rows = [both.cases[i] for i in chunks[0].examples]
    equal([effect(both, one, "zero", [(1, 2)]) for one in rows], found[:, 0, 0])
    equal([effect(both, one, "zero", [(1, 2)], of="first", held=DIRECT) for one in rows], found[:, 0, 1])


def test_restarts_equal_hooked_runs(both, chunks):
    stacks, rows = (chunks[:1], chunks_of(both, "hooks")[:1]), chunks[0].examples
    wanted, (layer, head) = [Request("va", "blank_muted"), Request("va", "zero", freeze=True)], HEADS[0]
    quick, hooked = (measure_requests(of, wanted, heads=HEADS[:1], examples=rows) for of in stacks)
    for request in wanted:
        for name in ("first", "rise") if request.freeze else ("margin", "first", "margin_frozen", "on_sound"):
            one, two = (getattr(found[request], name)[:, layer, head] for found in (quick, hooked))
            np.testing.assert_allclose(one, two, atol=1e-5, rtol=0, err_msg=name)
    members = [(0, 1), (1, 2)]
    made = [SetReleases(of, rows, "blank_muted") for of in stacks]
    for one in made:
        one.added(members[:1], members[1:])
    np.testing.assert_allclose(made[0].each(members), made[1].each(members), atol=1e-5)


def labelled(pairs):
    """Conflicts between ESC-50's labels, with a tokenizer that breaks most of them."""
    clips = [tiny_clip(1.0, seed=i) for i in range(2 * len(pairs))]
    return [
        Conflict(sound=clips[2 * i], picture=clips[2 * i + 1], question="What?", answers=pair, id=f"c{i:02}")
        for i, pair in enumerate(pairs)
    ]


def test_all_labels_of_esc50_are_usable():
    model, listed = pieces_model(), labelled(list(zip(LABELS[:25], LABELS[25:], strict=True)))
    lengths = {label: len(forms_of(model.tokenizer, label)[" word"]) for label in LABELS}
    assert {label for label, n in lengths.items() if n == 1} == set(ONE)
    assert sorted(set(lengths.values())) == [1, 2, 3, 4]
    read = answered(ModelEngine(model), listed)
    assert not read.left_out
    assert read.forms.chosen == " word"
    candidates = Candidates.of(read.conflicts, model.tokenizer)
    assert sorted(candidates.names) == sorted(LABELS)
    for chunk in Bench(ModelEngine(model), list(read.conflicts), candidates).chunks([20, 21]):
        assert chunk.spoken is not None
        assert np.isfinite(chunk.reading("va").scores).all()


@pytest.mark.slow
def test_isolate_goes_through_with_all_labels_of_esc50():
    pairs = [(label, LABELS[(i + 21) % len(LABELS)]) for i, label in enumerate(LABELS)]
    found = isolate(pieces_model(), labelled(pairs), gate="report", s=0.03, quick=True, named_only=True)
    assert not found.provenance["answers"]["left_out"]
    assert len(found.conflicts) == len(LABELS)
    assert np.isfinite(found.arrays["discovery/G"]).all()
    assert "discovery/suffix/release at the first token/zero" in found.arrays
