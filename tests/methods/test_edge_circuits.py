"""Circuits of edges: by hand on the micro model, and against hooks that edit one full forward."""

from __future__ import annotations

import sys
from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr
from brute_edges import circuit_logits
from micro import CARRIER, ECHO, GATE_HEAD, PAINTER, RELAY, micro_conflict, micro_model
from organism_conflicts import drawn_conflicts
from small_av import small_inputs, ungrouped_model
from tiny import letter

import av_lens as avl
from av_lens.errors import InputError
from av_lens.lab.calibration import planted_truth
from av_lens.methods.circuits.edge_runs import EdgeRuns, Edges
from av_lens.methods.circuits.runs import Measured
from av_lens.metrics import each, logit_diff

CLOSE = 1e-4
METRIC = logit_diff(letter("a"), letter("b"))


def name(head):
    return f"L{head[0]}H{head[1]}"


SCORES = {
    "L1 mlp -> logits": 6,
    f"{name(GATE_HEAD)} -> {name(CARRIER)}.q": 4,
    f"{name(PAINTER)} -> L2 mlp": 4,
    "L2 mlp -> logits": 4,
    f"{name(PAINTER)} -> logits": 2,
    f"{name(RELAY)} -> {name(ECHO)}.v": -2,
    f"{name(ECHO)} -> logits": -2,
}
"""By the table of `micro`: either writer suffices for the OR, so that no edge into it is missed alone."""


@cache
def runs():
    measured = Measured.of(micro_model(), micro_conflict(), metric=None, of="C", layout="in_video")
    edges = Edges.of(micro_model().spec)
    return EdgeRuns.of(micro_model(), measured, edges, at="suffix", stack=4, budget_gb=1.0, keep_gb=1.0)


def m_of(*names):
    listed = list(runs().nodes.names)
    return float(runs().measure("blank_muted", [frozenset(listed.index(one) for one in names)])[0, 0])


def test_circuits_of_edges_by_hand():
    """Both writers feed the OR; the painter's booster and its own word are two edges."""
    assert m_of() == pytest.approx(0, abs=CLOSE)
    assert m_of(*runs().nodes.names) == pytest.approx(-10, abs=CLOSE)
    assert m_of("L2H0 -> logits") == pytest.approx(-2, abs=CLOSE)  # its keys are the media's; asked is the same
    assert m_of("L2H0 -> L2 mlp", "L2 mlp -> logits") == pytest.approx(-4, abs=CLOSE)
    assert m_of("L2H0 -> L2 mlp") == pytest.approx(0, abs=CLOSE)
    assert m_of("L2 mlp -> logits") == pytest.approx(0, abs=CLOSE)
    for writer in ("L0H1", "L1H2"):
        assert m_of(f"{writer} -> L1 mlp", "L1 mlp -> logits") == pytest.approx(-6, abs=CLOSE)


def test_scores_of_edges_by_hand_and_the_circuit_they_give():
    given = np.zeros(len(runs().nodes))
    for edge, score in SCORES.items():
        given[list(runs().nodes.names).index(edge)] = -score
    exact = runs().measure("blank_muted", [runs().nodes.all, *(runs().nodes.all - {i} for i in given.nonzero()[0])])
    np.testing.assert_allclose(exact[0, 0] - exact[1:, 0], given[given != 0], atol=CLOSE)
    circuit = avl.find_circuit(micro_model(), micro_conflict(), over="edge", scores=given, size=7, random=2, subsets=2)
    assert set(circuit.members) == set(SCORES)
    table = xr.DataArray(
        np.full((16, 40), np.nan),
        coords={"sender": list(runs().nodes.senders), "receiver": list(runs().nodes.receivers)},
    )
    for (sender, receiver), score in zip(runs().nodes.ends, given, strict=True):
        table[sender, receiver] = score
    again = avl.find_circuit(micro_model(), micro_conflict(), over="edge", scores=table, size=7, random=2, subsets=2)
    assert again.nodes["node"].tolist() == circuit.nodes["node"].tolist()
    with pytest.raises(InputError, match=r"unknown scores 'atp'.*Known: exact"):
        avl.find_circuit(micro_model(), micro_conflict(), over="edge", scores="atp")


def test_groups_are_the_edges_in_order():
    edges = runs().nodes
    assert [edge for group in edges.within_layers() for edge in group] == list(range(len(edges)))
    first = edges.within_layers()[1]
    assert {edges.names[i].split("H")[0] for i in first} == {"embed -> L0"}
    assert {edges.names[i][-2:] for i in first} == {".k"}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_any_circuit_equals_hooks_that_edit_one_full_forward(share):
    model = ungrouped_model()
    pair = avl.Pair(clean=small_inputs((0, 1)), corrupt=small_inputs((2, 3)))
    measured = Measured.of(model, pair, metric=METRIC, of="C", layout="in_video")
    edges = Edges.of(model.spec)
    made = EdgeRuns.of(model, measured, edges, at="suffix", stack=4, budget_gb=0.01, keep_gb=1.0)
    rng = np.random.default_rng(3)
    circuits = [frozenset(np.flatnonzero(rng.random(len(edges)) < share).tolist()) for _ in range(2)]
    found = made.measure("corrupt", circuits)
    positions = list(made.runs[0].positions)
    for circuit, scores in zip(circuits, found, strict=True):
        kept = {tuple(edges.names[edge].split(" -> ")) for edge in circuit}
        logits = circuit_logits(model, pair.clean, pair.corrupt, kept, positions)
        np.testing.assert_allclose(scores, METRIC.bind()(logits).numpy(), atol=2e-5)
    ends = [METRIC.bind()(model(one)[:, -1:]).detach().numpy() for one in (pair.clean, pair.corrupt)]
    if share in (0.0, 1.0):
        np.testing.assert_allclose(found[0], ends[0 if share else 1], atol=2e-5)
    else:
        assert float(np.abs(found[0] - ends[0]).max()) > 1e-3


def test_scores_of_edge_attribution_order_the_edges_of_a_pair():
    model = ungrouped_model()
    pair = avl.Pair(clean=small_inputs((0, 1)), corrupt=small_inputs((2, 3)))
    scores = avl.edge_attribution(model, pair, metric=METRIC, variant="gim")
    circuit = avl.find_circuit(model, pair, metric=METRIC, over="edge", scores=scores, size=9, random=0, subsets=0)
    top = scores.top(9)
    assert set(circuit.members) == {f"{s} -> {r}" for s, r in zip(top["sender"], top["receiver"], strict=True)}
    assert torch.isfinite(torch.tensor(circuit.figure("CPR")[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["av-tiny-planted-single", "av-tiny-planted"])
def test_the_first_edges_of_a_planted_model_are_the_planted_heads(name):
    """Prints CPR and CMD of edges by EAP and by GIM's rules: pytest -m slow -s tests/methods/test_edge_circuits.py."""
    model, listed = avl.load(name), drawn_conflicts(16)
    cells = [one.cells(model) for one in listed]
    metric = logit_diff(*(each([one.answers[side] for one in listed]) for side in (0, 1)))
    planted = {f"L{layer}H{head}" for layer, head in planted_truth(name)}
    for variant in ("eap", "gim"):
        effects = []
        for base in ("va", "av"):
            pairs = [avl.Pair(clean=one["blank_muted"], corrupt=one[base]) for one in cells]
            options = {"metric": metric, "at": "suffix", "direction": "denoise", "variant": variant}
            effects.append(avl.edge_attribution(model, pairs, **options).mean())
        scores = -0.5 * (effects[0] - effects[1])
        circuit = avl.find_circuit(model, listed, over="edge", scores=scores, size=40, random=2, subsets=0)
        random = circuit.areas.set_index(["empty", "figure"])["random"]["blank_muted"]
        shown = [f"{figure} {circuit.figure(figure)[0]:.2f} [{random[figure]:.2f}]" for figure in ("CPR", "CMD")]
        f = circuit.faithfulness()[0]
        sys.stdout.write(f"\n{name}, {variant}: {'  '.join(shown)}  f of 40 edges {f:.2f}: {circuit.members[:8]}\n")
        ends = {end.split(".")[0] for edge in circuit.members[:10] for end in edge.split(" -> ")}
        assert ends & planted
        assert circuit.figure("CMD")[0] < random["CMD"]
