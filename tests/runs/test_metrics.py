"""Metrics against numbers worked out by hand; refusals by their text."""

from __future__ import annotations

import math

import pytest
import torch

from av_lens.errors import InputError
from av_lens.inputs.answers import Answer
from av_lens.metrics.forms import each
from av_lens.metrics.metric import Metric, as_metric, kl, log_prob, logit_diff, prob, rank

# Two examples, two asked positions, four tokens; only the last position counts.
LOGITS = torch.tensor(
    [
        [[9.0, 9.0, 9.0, 9.0], [math.log(1.0), math.log(2.0), math.log(3.0), math.log(4.0)]],
        [[9.0, 9.0, 9.0, 9.0], [math.log(4.0), math.log(3.0), math.log(2.0), math.log(1.0)]],
    ]
)


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_one_token_metrics_by_hand():
    close(logit_diff(3, 0)(LOGITS), [math.log(4), -math.log(4)])
    close(log_prob(1)(LOGITS), [math.log(0.2), math.log(0.3)])
    close(prob(1)(LOGITS), [0.2, 0.3])
    close(rank(2)(LOGITS), [1.0, 2.0])
    close(rank(3)(LOGITS), [0.0, 3.0])


def test_synonyms_are_pooled_by_logsumexp():
    close(logit_diff([0, 1], [2, 3])(LOGITS), [math.log(3 / 7), math.log(7 / 3)])
    close(prob([1, 2])(LOGITS), [0.5, 0.5])
    close(rank([0, 2])(LOGITS), [1.0, 0.0])


def test_every_example_its_own_answers():
    close(logit_diff(each([3, 0]), each([0, 1]))(LOGITS), [math.log(4), math.log(4 / 3)])
    close(logit_diff(each([3, 0]), 1)(LOGITS), [math.log(2), math.log(4 / 3)])
    close(logit_diff(each([3, 0]), 1).bind(None).chosen([1])(LOGITS[1:]), [math.log(4 / 3)])
    with pytest.raises(InputError, match=r"gives 3 answers, but the run has 2 examples"):
        prob(each([1, 2, 3]))(LOGITS)
    with pytest.raises(InputError, match=r"3 and 2 answers: they differ"):
        logit_diff(each([1, 2, 3]), each([0, 0]))(LOGITS)


def test_kl_by_hand_and_zero_for_equal_runs():
    close(kl(LOGITS)(LOGITS), [0.0, 0.0])
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    wanted = float((p * (p / q).log()).sum())
    close(kl(LOGITS[:, -1])(LOGITS.flip(0)), [wanted, wanted])
    close(kl(LOGITS)(LOGITS.flip(0)), [wanted / 2, wanted / 2])
    with pytest.raises(InputError, match=r"batch and vocabulary must be equal"):
        kl(LOGITS[..., :3])(LOGITS)


DOG, CAT = Answer("dog", ((2, 0),)), Answer("cat", ((1, 3),))


def test_answers_of_several_tokens_are_summed_log_probabilities():
    metric = logit_diff(DOG, CAT).bind(None)
    assert metric.teacher_forced
    with pytest.raises(InputError, match=r"an answer has several tokens, which one set of logits cannot score"):
        metric(LOGITS)
    assert [tokens.tolist() for tokens in metric.continuations(2)] == [[[2, 0]] * 2, [[1, 3]] * 2]
    # Rows stand for the positions before the first and before the second token.
    first, second = LOGITS[:1, 1], LOGITS[1:, 1]
    steps = torch.stack([first, second], dim=1)  # P(2) = .3 then P(0) = .4; P(1) = .2 then P(3) = .1
    reduced = [metric.reduce(i, steps) for i in range(2)]
    close(reduced[0], [math.log(0.3 * 0.4)])
    close(metric.combine(reduced), [math.log(0.12 / 0.02)])
    assert "teacher-forced" in metric.notes[0]
    assert len(metric.notes) == 1


def test_unequal_numbers_of_tokens_are_means_per_token_and_flagged():
    metric = logit_diff(DOG, Answer("siren", ((1,),))).bind(None)
    steps = torch.stack([LOGITS[:1, 1], LOGITS[1:, 1]], dim=1)
    reduced = [metric.reduce(0, steps), metric.reduce(1, steps[:, :1])]
    close(metric.combine(reduced), [math.log(0.12) / 2 - math.log(0.2)])
    assert "'dog' and 'siren' have unequal numbers of tokens: scored by the mean" in metric.notes[1]
    assert metric.provenance()["notes"][1] == metric.notes[1]


def test_rank_and_probability_of_several_tokens():
    steps = torch.stack([LOGITS[:1, 1], LOGITS[1:, 1]], dim=1)
    metric = rank(DOG).bind(None)
    close(metric.combine([metric.reduce(0, steps)]), [1.0])
    metric = prob(DOG).bind(None)
    close(metric.combine([metric.reduce(0, steps)]), [0.12])


def test_examples_with_fewer_synonyms_or_tokens_are_not_scored_by_padding():
    metric = log_prob(each([DOG, Answer("cat or emu", ((1,), (3,)))])).bind(None)
    steps = torch.stack([LOGITS[:, 1], LOGITS[:, 1]], dim=1)
    reduced = [metric.reduce(i, steps[:, : tokens.shape[1]]) for i, tokens in enumerate(metric.continuations(2))]
    close(metric.combine(reduced), [math.log(0.3 * 0.1), math.log(0.3 + 0.1)])


def test_answers_that_cannot_be_told_apart_are_refused():
    with pytest.raises(InputError, match=r"the two answers are equal"):
        logit_diff(1, 1)(LOGITS)
    with pytest.raises(InputError, match=r"begin with the same token"):
        logit_diff(DOG, Answer("dot", ((2, 1),))).bind(None)
    with pytest.raises(InputError, match=r"1 synonyms and .* has 2"):
        logit_diff(1, [2, 3])(LOGITS)
    with pytest.raises(InputError, match=r"'dog' is text: bind the metric first"):
        logit_diff("dog", 1)(LOGITS)


def test_any_callable_is_a_metric_and_a_scalar_is_refused_with_the_mend():
    def margin(logits):
        return logits[:, -1, 3] - logits[:, -1, 0]

    metric = as_metric(margin, None)
    close(metric(LOGITS), [math.log(4), -math.log(4)])
    assert metric.name == "margin"
    with pytest.raises(InputError, match=r"returned one number for the whole batch; wanted .* Leave out the mean"):
        as_metric(lambda logits: logits.mean(), None)(LOGITS)
    with pytest.raises(InputError, match=r"returned shape \(2, 4\)"):
        as_metric(lambda logits: logits[:, -1], None)(LOGITS)


def test_names_and_units_are_what_one_would_write():
    assert logit_diff("siren", "dog").name == "logit_diff(siren, dog)"
    assert (prob(1).unit, rank(1).unit, kl(LOGITS).unit) == ("probability", "tokens", "nat")
    assert isinstance(as_metric(prob(1), None), Metric)
