"""A word is read in the form that the model says: without a leading space, with one, a capital or none."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from small_av import small_clip
from tiny import tiny_hf_model, tiny_processor

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError
from av_lens.inputs import Answer
from av_lens.inputs.answers import FORMS, in_form
from av_lens.interventions import Plan, Site, zero
from av_lens.isolation.measuring.behaviour import answered
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.methods.base_model.grafting import graft
from av_lens.metrics import each, log_prob, logit_diff, measure, prob
from av_lens.replay import sweep

WORDS = ("siren", "dog")


def wordy_model(n_layers=2):
    """A random model whose tokenizer has every form of the words as one token."""
    processor = tiny_processor()
    processor.tokenizer.add_tokens([in_form(word, form) for word in WORDS for form in FORMS])
    hf_model = tiny_hf_model(n_layers=n_layers, vocab_size=len(processor.tokenizer))
    return avl.load("wordy", hf_model=hf_model, processor=processor)


def ids(model, word, form):
    return tuple(model.tokenizer(in_form(word, form), add_special_tokens=False)["input_ids"])


@torch.no_grad()
def taught_to_say(model, forms):
    """Plant the unembedding: at the prompts' ends each word has a high logit in its own form alone."""
    ends = [run(model, encoded(model, seed), capture=Site("final", positions="generation")) for seed in (0, 1)]
    mean = torch.stack([out.cache["ln_final.hook_normalized"][0, 0] for out in ends]).mean(0)
    for logit, (word, form) in zip((9.0, 8.0), forms.items(), strict=True):
        model.hf_model.lm_head.weight[ids(model, word, form)[0]] = logit * mean / mean.dot(mean)
    return model


def encoded(model, seed, **options):
    return model.encode(small_clip(seed), "What?", **options)


@cache
def speaking(form):
    return taught_to_say(wordy_model(), dict.fromkeys(WORDS, form))


def conflict(seed, answers=WORDS, **options):
    return avl.Conflict(
        sound=small_clip(seed), picture=small_clip(seed + 5), question="What?", answers=answers, **options
    )


def token_ids(provenance):
    return [side[0][0][0] for side in provenance["answer_ids"]]


METRIC = logit_diff(*WORDS)
VERBS = {
    "patch": lambda m, p: avl.patch(m, p, over="head", metric=METRIC).provenance,
    "patch groups": lambda m, p: avl.patch(m, [p], over="layer", at="question", metric=METRIC).provenance,
    "path_patch": lambda m, p: avl.path_patch(m, p, sender=(0, 1), receiver="logits", metric=METRIC).provenance,
    "attribution_patch": lambda m, p: avl.attribution_patch(m, p, metric=METRIC, top=0).provenance,
    "edge_attribution": lambda m, p: avl.edge_attribution(m, p, metric=METRIC, at="generation").provenance,
    "direct_attribution": lambda m, p: avl.direct_attribution(m, p.corrupt, metric=METRIC).provenance,
    "knockout": lambda m, p: avl.knockout(m, p.corrupt, edges="video -> question", metric=METRIC, draws=1).provenance,
    "causal_trace": lambda m, p: avl.causal_trace(m, p, metric=METRIC, seeds=1).provenance,
    "steer": lambda m, p: (
        avl.steer(
            m, p.corrupt, plan=Plan(zero(Site("z", 0, 1, "suffix"))), metric=METRIC, strengths=(1.0,), n_random=0
        ).provenance
    ),
    "graft": lambda m, p: graft(m, p.corrupt, base=m, audio="kept", metric=METRIC, over="layer").provenance,
    "sweep": lambda m, p: sweep(m.trace(p.corrupt), [Plan(zero(Site("z", 0, 1, "suffix")))], METRIC).provenance,
    "find_circuit": lambda m, p: avl.find_circuit(m, p, metric=METRIC, random=0, subsets=0, size=2).provenance,
}


@pytest.mark.parametrize("form", ["word", pytest.param(" word", marks=pytest.mark.slow)])
def test_every_metric_reads_the_form_that_is_said(form):
    model = speaking(form)
    x, y = encoded(model, 0), encoded(model, 1)
    wanted = [ids(model, word, form)[0] for word in WORDS]
    bound = METRIC.bind(model, x)
    assert token_ids(bound.provenance()) == wanted
    assert bound.forms is not None
    assert bound.forms.chosen == form
    chances = model(x)[0, -1].softmax(-1).detach()
    for one in FORMS:
        median = np.median([float(chances[ids(model, word, one)[0]]) for word in WORDS])
        np.testing.assert_allclose(bound.forms.median[one], median, rtol=1e-4)
    assert not bound.forms.at_most
    assert max(bound.forms.median.values()) > 100 * sorted(bound.forms.median.values())[-2]
    expected = logit_diff(*wanted)
    trace = model.trace(x)
    plan = Plan(zero(Site("z", 1, 0, "suffix")))
    torch.testing.assert_close(measure(model, x, METRIC, plan=plan), measure(model, x, expected, plan=plan))
    torch.testing.assert_close(trace.score(plan, METRIC), trace.score(plan, expected))
    site = Site("z", 0, positions="suffix")
    assert torch.equal(trace.gradients(site, METRIC).gradient[0], trace.gradients(site, expected).gradient[0])
    both = avl.AVInputs.stack([x, y])
    swapped = logit_diff(each(WORDS), each(WORDS[::-1])).bind(model, both)
    assert swapped.ids is not None
    assert [side[:, 0, 0].tolist() for side in swapped.ids] == [wanted, wanted[::-1]]
    np.testing.assert_allclose(
        avl.logit_lens(model, x, at="generation", words=["dog"]).probabilities.values.values[0, 0, -1, 0],
        float(chances[wanted[1]]),
        rtol=1e-4,
    )
    assert encoded(model, 0, answer="dog").ids[0, -1] == wanted[1]
    shift = avl.methods.base_shift(model, x, base=model, answer="dog", audio="kept")
    assert shift.rows["token_id"].tolist() == [wanted[1]]
    assert shift.grid.provenance["answer_form"] == form


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_reads_the_form_that_is_said(verb):
    model = speaking("word")
    pair = avl.Pair(clean=encoded(model, 0), corrupt=encoded(model, 1))
    provenance = VERBS[verb](model, pair)
    if "answer_ids" in provenance:
        assert token_ids(provenance) == [ids(model, word, "word")[0] for word in WORDS]
    assert provenance["answer_form"] == "word"
    assert set(provenance["form_probabilities"]) == set(FORMS)


def test_a_manifest_is_read_in_one_form_by_what_is_heard_and_seen_alone():
    model = speaking("word")
    read = answered(ModelEngine(model), [conflict(0, id="one"), conflict(1, WORDS[::-1], id="two")])
    wanted = [ids(model, word, "word") for word in WORDS]
    assert [[a.options[0] for a in one.answers] for one in read.conflicts] == [wanted, wanted[::-1]]
    assert read.forms is not None
    cells = [conflict(seed).cells(model) for seed in (0, 1)]
    said = [
        float(model(cell[name])[0, -1].softmax(-1)[token].detach())
        for cell, pair in zip(cells, (wanted, wanted[::-1]), strict=True)
        for name, (token,) in zip(("aa", "vv"), pair, strict=True)
    ]
    np.testing.assert_allclose(read.forms.median["word"], np.median(said), rtol=1e-4)
    assert read.provenance()["left_out"] == {}


def test_a_word_that_is_said_in_another_form_is_refused_or_left_out_by_name():
    model = taught_to_say(wordy_model(), {"siren": "word", "dog": " word"})
    x = encoded(model, 0)
    dog = {form: ids(model, "dog", form)[0] for form in FORMS}
    text = (
        r"the word 'dog' is read as 'dog', the form .* but it says ' dog' at [\d.e-]+ against [\d.e-]+: .*"
        rf"Give the token ids .*' dog' \({dog[' word']}\); 'dog' \({dog['word']}\).*or a prefix"
    )
    with pytest.raises(InputError, match=text):
        measure(model, x, METRIC)
    literal = logit_diff("siren", dog[" word"]).bind(model, x)
    assert token_ids(literal.provenance()) == [ids(model, "siren", "word")[0], dog[" word"]]
    read = answered(ModelEngine(model), [conflict(0, id="both"), conflict(1, ("siren", dog["Word"]), id="ids")])
    assert [one.id for one in read.conflicts] == ["ids"]
    assert read.left_out["both"].startswith("in vv, the word 'dog' is read as 'dog'")
    assert read.sentence().startswith("1 of 2 conflicts are left out for their answers: both (in vv, the word 'dog'")


def test_a_long_word_is_as_likely_as_all_its_tokens():
    model = speaking("word")
    x = encoded(model, 0)
    bound = log_prob("ab").bind(model, x)  # two bytes, or three with a space
    assert bound.forms is not None
    by_hand = {}
    for form in FORMS:
        tokens = torch.tensor([ids(model, "ab", form)])
        logits = model(x.continued(tokens[:, :-1]))[0, x.spans.generation_position :].log_softmax(-1)
        by_hand[form] = float(logits.gather(-1, tokens[0][:, None]).sum().exp().detach())
    assert bound.forms.chosen == max(by_hand, key=by_hand.__getitem__)
    for form, chance in by_hand.items():
        if form in bound.forms.at_most:
            assert chance < bound.forms.median[form] < by_hand[bound.forms.chosen]
        else:
            np.testing.assert_allclose(bound.forms.median[form], chance, rtol=1e-4)
    assert any(f"'ab' is {n} tokens: " in bound.notes[1] for n in (2, 3))
    assert f"({ids(model, 'b', 'word')[0]})" in bound.notes[1]


def test_the_choice_stands_in_the_description_of_the_input():
    model = speaking(" word")
    x = encoded(model, 0)
    last = x.describe(METRIC.bind(model, x)).splitlines()[-1]
    assert f"'siren': ids [[{ids(model, 'siren', ' word')[0]}]]" in last
    assert "words are read as ' word'; median probability here: ' word' 0." in last
    assert "; median" not in x.describe(prob(5).bind(model, x)).splitlines()[-1]


def test_ids_and_answers_are_taken_literally_and_cost_no_run(monkeypatch):
    model = speaking("word")
    x = encoded(model, 0)
    monkeypatch.setattr(type(model), "run_with_hooks", None)
    bound = logit_diff(ids(model, "dog", "Word")[0], Answer("it", (ids(model, "siren", " word"),))).bind(model, x)
    assert token_ids(bound.provenance()) == [ids(model, "dog", "Word")[0], ids(model, "siren", " word")[0]]
    assert bound.forms is None


def test_a_recorded_run_is_read_without_another(monkeypatch):
    model = speaking("word")
    trace = model.trace(encoded(model, 0))
    expected = METRIC.bind(model, trace.x)
    monkeypatch.setattr(type(model), "run_with_hooks", None)
    found = METRIC.bind(model, trace)
    assert (found.texts, found.forms.chosen) == (expected.texts, "word")
    for form in FORMS:
        np.testing.assert_allclose(found.forms.median[form], expected.forms.median[form], rtol=1e-4)


def test_what_words_cannot_be_read_by_is_told():
    model = speaking("word")
    x = encoded(model, 0)
    for other in (None, "x", [x, 5]):
        with pytest.raises(InputError, match=r"read by what the model says on AVInputs.*write metric.bind\(model, x\)"):
            METRIC.bind(model, other)
    with pytest.raises(InputError, match=r"describe takes a bound metric, .* not 'siren'"):
        x.describe("siren")


def test_a_run_recorded_under_hooks_is_read_as_it_spoke():
    model = speaking("word")
    capitals = [ids(model, word, "Word")[0] for word in WORDS]

    def louder(logits, hook):
        return logits.index_fill(-1, torch.tensor(capitals), 30.0)

    with model.hooks(fwd_hooks=[("unembed.hook_out", louder)]):
        trace = model.trace(encoded(model, 0))
    assert trace.hooked_because
    assert METRIC.bind(model, trace).forms.chosen == "Word"


def test_a_word_that_an_organism_was_never_taught_is_refused():
    model = avl.load("av-tiny")
    x = model.encode(avl.organism.clip("siren", seed=0), "What do you hear?")
    with pytest.raises(
        InputError, match=r"'sirenx': its tokenizer breaks it into ' siren' \(\d+\), 'x' .*mean 'siren'\?"
    ):
        measure(model, x, logit_diff("sirenx", "dog"))
    with pytest.raises(InputError, match=r"never taught the word 'zebra': its .*Known: dog, "):
        avl.logit_lens(model, x, words=["a dog and a zebra"])
    with pytest.raises(InputError, match="never taught"):
        model.encode(None, "What do you hear?", answer="zebra")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["word", " word"])
def test_a_model_trained_to_answer_in_a_form_is_read_in_it(form):
    """Everything is trained for some steps to say the first word of one sound and the second of another."""
    model = wordy_model()
    inputs = [encoded(model, seed) for seed in range(4)]
    targets = torch.tensor([ids(model, WORDS[seed % 2], form)[0] for seed in range(4)])
    parameters = list(model.hf_model.parameters())
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    for parameter in parameters:
        parameter.requires_grad_(True)
    for _ in range(60):
        optimiser.zero_grad()
        logits = torch.cat([model(x)[:, -1] for x in inputs])
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimiser.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    assert float(loss.detach()) < 0.1
    pair = avl.Pair(clean=inputs[0], corrupt=inputs[1])
    for verb in VERBS.values():
        provenance = verb(model, pair)
        if "answer_ids" in provenance:
            assert token_ids(provenance) == [ids(model, word, form)[0] for word in WORDS]
        assert provenance["answer_form"] == form
        assert provenance["form_probabilities"][form] > 0.4
    assert float(measure(model, inputs[0], METRIC)) > 2
    assert float(measure(model, inputs[1], METRIC)) < -2
