"""Edge scores: the gradient definition computed naively, sums that must agree, and completeness of the integrals."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from brute_edges import naive, naive_integral
from gim_twin import gim
from small_av import small_clip, small_inputs, small_model, ungrouped_model
from tiny import letter, tiny_hf_model, tiny_processor

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError, InterventionError, ModelError
from av_lens.families.decoder import hook_name
from av_lens.inputs.answers import Answer
from av_lens.interventions import Plan, Site, replace
from av_lens.methods import edge_attribution
from av_lens.metrics import each, logit_diff, measure, rank
from av_lens.results import EdgeScores
from av_lens.spans import Span

METRIC = logit_diff(letter("a"), letter("b"))


@cache
def pair(clean=(0, 1), corrupt=(2, 3)):
    return avl.Pair(clean=small_inputs(clean), corrupt=small_inputs(corrupt))


@cache
def scores(**options):
    return edge_attribution(small_model(), pair(), metric=METRIC, **options)


def test_edges_equal_the_definition_computed_naively_under_grouped_keys_and_values():
    model, found = small_model(), scores()
    wanted = naive(model, pair().corrupt, pair().clean, METRIC)
    values, group = found.values, model.spec.n_heads // model.spec.n_kv_heads
    seen = 0
    for (sender, receiver), score in wanted.items():
        if receiver[-2:] in (".k", ".v"):  # the shared copy's gradient is the sum over the heads that share it
            layer, rest = receiver[1:].split("H")
            first = int(rest[:-2]) * group
            names = [f"L{layer}H{first + i}{rest[-2:]}" for i in range(group)]
            got = values.sel(sender=sender, receiver=names).sum("receiver", skipna=False)
        else:
            names, got = [receiver], values.sel(sender=sender, receiver=receiver)
        np.testing.assert_allclose(got.values, score.numpy(), atol=1e-5, err_msg=f"{sender} to {receiver}")
        seen += len(names)
    assert int(values[0].notnull().sum()) == seen  # every other edge does not exist
    assert float(abs(values).max()) > 0.01


def test_keys_and_values_are_ungrouped_as_in_a_model_that_has_them_once_for_each_query_head():
    model = ungrouped_model()
    assert model.spec.n_kv_heads == 4
    torch.testing.assert_close(model(pair().clean), small_model()(pair().clean), atol=1e-5, rtol=0)
    wanted = naive(model, pair().corrupt, pair().clean, METRIC)
    for (sender, receiver), score in wanted.items():
        got = scores().values.sel(sender=sender, receiver=receiver)
        np.testing.assert_allclose(got.values, score.numpy(), atol=1e-5, err_msg=f"{sender} to {receiver}")


def test_the_rules_of_gim_equal_hooks_that_change_one_full_backward_pass():
    model, found = ungrouped_model(), edge_attribution(ungrouped_model(), pair(), metric=METRIC, variant="gim").values
    with gim(model):
        wanted = naive(model, pair().corrupt, pair().clean, METRIC)
    for (sender, receiver), score in wanted.items():
        got = found.sel(sender=sender, receiver=receiver)
        np.testing.assert_allclose(got.values, score.numpy(), atol=1e-5, err_msg=f"{sender} to {receiver}")
    assert abs(found).max() > 0.01
    for rule in ("softmax", "norms", "products"):  # each of them is seen
        with gim(model, **{rule: False}):
            others = naive(model, pair().corrupt, pair().clean, METRIC)
        assert max(float((others[edge] - wanted[edge]).abs().max()) for edge in wanted) > 1e-3, rule


def test_edges_that_leave_a_sender_sum_to_its_gradient():
    """Edges of a node equal attribution patching of that node: the change times the gradient at the node itself."""
    model = small_model()
    trace = model.trace(pair().clean)
    sums = scores().nodes().effects
    sites = [Site("embed"), *(Site(part, layer) for layer in range(4) for part in ("z", "mlp_out"))]
    found = trace.gradients(sites, METRIC)
    with torch.no_grad():
        cache = run(model, pair().corrupt, capture=["embed", "z", "mlp_out"]).cache
    for site, gradient, value in zip(sites, found.gradient, found.value, strict=True):
        product = (cache[hook_name(site.component, site.layer)] - value) * gradient
        node = product.sum((1, -1))
        name = "embed" if site.component == "embed" else f"L{site.layer} mlp"
        names = [f"L{site.layer}H{head}" for head in range(4)] if site.component == "z" else [name]
        got = sums.sel(sender=names).values
        np.testing.assert_allclose(got, node.reshape(2, -1).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "site", "sender", "receiver"),
    [
        ("ig_inputs", Site("embed"), "embed", "L1 mlp"),
        ("ig_inputs", Site("embed"), "L0H2", "L0 mlp"),
        ("ig_inputs", Site("embed"), "L1 mlp", "logits"),
        ("ig_activations", Site("z", 1), "L1H3", "L1 mlp"),
        ("ig_activations", Site("z", 3), "L3H0", "logits"),
        ("ig_activations", Site("mlp_out", 0), "L0 mlp", "L2 mlp"),
        ("ig_activations", Site("mlp_out", 3), "L3 mlp", "logits"),
    ],
)
def test_integrated_edges_equal_the_definition_computed_naively(variant, site, sender, receiver):
    found = scores(variant=variant, steps=2).values.sel(sender=sender, receiver=receiver)
    ends = pair().clean, pair().corrupt
    wanted = naive_integral(small_model(), ends, METRIC, 2, site, sender, receiver)
    np.testing.assert_allclose(found.values, wanted, atol=1e-5)
    assert float(abs(scores().values.sel(sender=sender, receiver=receiver) - found).max()) > 1e-6


def test_integrated_edges_are_complete_and_say_what_they_miss():
    model = small_model()
    metrics = [measure(model, x, METRIC).numpy() for x in (pair().clean, pair().corrupt)]
    plain, few, many = scores(), scores(variant="ig_inputs", steps=2), scores(variant="ig_inputs", steps=16)
    for found in (plain, few, many):
        np.testing.assert_allclose(found.baseline.values, metrics[0], atol=1e-5)
        np.testing.assert_allclose(found.donor.values, metrics[1], atol=1e-5)
        whole = found.nodes().effects.sel(sender="embed").values
        np.testing.assert_allclose(found.closure_error.values, metrics[1] - metrics[0] - whole, atol=1e-5)
    gaps = [float(abs(found.closure_error).max()) for found in (plain, few, many)]
    assert gaps[0] > 3 * gaps[1] > 100 * gaps[2], gaps  # midpoint sums: an eighth of the step, a 64th of the error
    assert gaps[2] < 1e-4


def test_each_groups_activation_integrals_sum_to_its_exact_patching():
    model, found = small_model(), scores(variant="ig_activations", steps=8).nodes().effects
    with torch.no_grad():
        cache = run(model, pair().corrupt, capture=["z", "mlp_out"]).cache
    for layer in (0, 2):
        for part, names in (("z", [f"L{layer}H{head}" for head in range(4)]), ("mlp_out", [f"L{layer} mlp"])):
            name = hook_name(part, layer)
            plan = Plan(replace(Site(part, layer), cache[name]))
            exact = measure(model, pair().clean, METRIC, plan=plan) - measure(model, pair().clean, METRIC)
            np.testing.assert_allclose(found.sel(sender=names).sum("sender").values, exact.numpy(), atol=1e-4)
            assert float(exact.abs().max()) > 1e-3


def test_both_directions_and_spans_that_share_an_edge_out():
    turned = edge_attribution(
        small_model(), avl.Pair(clean=pair().corrupt, corrupt=pair().clean), metric=METRIC, direction="denoise"
    )
    np.testing.assert_allclose(turned.values.values, scores().values.values, atol=1e-6)
    assert "positive: the edge raises the metric when restored" in turned.direction
    spans = scores(over="edge span")
    assert spans.values.dims == ("example", "span", "sender", "receiver")
    np.testing.assert_allclose(spans.values.sum("span", skipna=False).values, scores().values.values, atol=1e-5)
    suffix = scores(at="suffix")
    parts = spans.values.sel(span=["question", "header", "generation"]).sum("span", skipna=False)
    np.testing.assert_allclose(suffix.values.values, parts.values, atol=1e-5)
    late = scores(at="generation", variant="ig_inputs", steps=2).values
    wanted = scores(over="edge span", variant="ig_inputs", steps=2).values.sel(span="generation")
    np.testing.assert_allclose(late.values, wanted.values, atol=1e-5)


def test_several_pairs_of_several_layouts_keep_their_order_their_answers_and_a_small_budget():
    model = small_model()
    separate = avl.Pair(clean=small_inputs((0,), sound="separate"), corrupt=small_inputs((1,), sound="separate"))
    pairs = [pair((0,), (2,)), separate, pair((3,), (4,))]
    done = []
    found = edge_attribution(
        model,
        pairs,
        metric=logit_diff(each([letter("a"), letter("c"), letter("e")]), letter("b")),
        budget_gb=1e-6,
        stack=1,
        progress=lambda stage, number, total: done.append((number, total)),
    )
    assert done[-1] == (3, 3)
    assert found.clusters == (0, 0, 1)
    for i, word in enumerate("ace"):
        alone = edge_attribution(model, pairs[i], metric=logit_diff(letter(word), letter("b")))
        np.testing.assert_allclose(found.values[i].values, alone.values[0].values, atol=1e-6)


def test_a_run_against_itself_has_no_edges():
    same = avl.Pair(clean=small_inputs(), corrupt=small_inputs())
    for variant in ("eap", "ig_activations"):
        found = edge_attribution(small_model(), same, metric=METRIC, variant=variant, steps=1)
        assert float(abs(found.values).max()) == 0.0
        assert int(found.values.notnull().sum()) == int(scores().values.notnull().sum())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"variant": "ig"}, InputError, "unknown variant 'ig'. Known: eap, ig_inputs"),
        ({"direction": "noize"}, InputError, "Did you mean 'noise'"),
        ({"over": "edges"}, InputError, "Did you mean 'edge'"),
        ({"steps": 0, "variant": "ig_inputs"}, InputError, "at least one run; 5 is usual"),
        ({"at": "vidoe"}, InputError, "unknown role 'vidoe'"),
        ({"at": Span(np.array([500]))}, InterventionError, "names position 500, but the input has"),
        ({"metric": rank(letter("a"))}, InputError, "a rank has no gradient"),
        ({"metric": lambda logits: logits.mean()}, InputError, "Leave out the mean"),
        (
            {"metric": lambda logits: logits[:, -1, 0] * torch.nan},
            InputError,
            "is NaN or infinite on the run without edits",
        ),
        (
            {"metric": logit_diff(each([letter("a"), letter("c"), letter("d")]), letter("b"))},
            InputError,
            "names 3 answers",
        ),
        (
            {"metric": logit_diff(Answer("dog", ((70, 71),)), Answer("cat", ((75, 76),)))},
            InputError,
            "several tokens, and what is written at the answer's own positions would be edges too.*Use answers of one",
        ),
    ],
)
def test_what_cannot_be_attributed_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        edge_attribution(small_model(), pair((0,), (2,)), **({"metric": METRIC} | options))


def test_no_pair_and_a_model_that_cannot_be_computed_by_layers_are_refused(monkeypatch):
    with pytest.raises(InputError, match="compares two aligned inputs, and got nothing"):
        edge_attribution(small_model(), [], metric=METRIC)
    model = avl.load("tiny", hf_model=tiny_hf_model(), processor=tiny_processor())
    x = avl.Pair(clean=model.encode(small_clip(0), "What?"), corrupt=model.encode(small_clip(1), "What?"))
    model.add_hook(hook_name("z", 1), lambda activation, hook: activation * 2)
    with pytest.raises(ModelError, match=r"edge attribution computes layers by themselves, and cannot here"):
        edge_attribution(model, x, metric=METRIC)


def test_scores_are_saved_and_read_back(tmp_path):
    found = scores(over="edge span")
    again = EdgeScores.load(found.save(tmp_path / "edges"))
    np.testing.assert_array_equal(again.values.values, found.values.values)
    assert again.values.coords["receiver"].values.tolist() == found.receivers
    assert (again.direction, again.clusters, again.metric) == (found.direction, found.clusters, found.metric)
    assert again.provenance["variant"] == "eap"
    assert again.provenance["answer_ids"] == found.provenance["answer_ids"]
