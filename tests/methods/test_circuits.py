"""Circuits of the micro model, worked out by hand from the table in `micro`; M = 2 OUT, m = C = (M(va) - M(av)) / 2.

In va (p = -1, s = 1, shown) the painter and its booster give -6, the writers' OR -6, the echo +2, the gate keeps the
carrier's +4 away, and the mixer's p + s is 0: M = -10. In av all is turned: C = -10. With everything at the suffix from
blank_muted (or zero) nothing is painted, written or heard: 0. So the span is -10, and a score is positive where the
node lowers C:

    alone removed     C        score
    painter          -4        6
    gate             -6        4     the carrier speaks
    relay           -12       -2     the echo has nothing to say
    echo            -12       -2
    a writer        -10        0     the other suffices

    (zero)  asker   -12       -2     the echo reads the sink; from blank_muted, asked the same, the asker is itself
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from micro import (
    ASKER,
    CARRIER,
    ECHO,
    GATE_HEAD,
    MIXER,
    PAINTER,
    RELAY,
    WRITERS,
    micro_conflict,
    micro_input,
    micro_model,
)
from small_av import small_clip, small_model
from tiny import letter

import av_lens as avl
from av_lens.errors import InputError
from av_lens.families.decoder import hook_name
from av_lens.methods.circuits.runs import CircuitRuns, Measured, Nodes
from av_lens.methods.circuits.scores import eliminated, shuffled_orders, stability
from av_lens.results.circuit import Scale, sizes
from av_lens.results.statistics import Bootstrap

CLOSE = 1e-4
QUICK = {"random": 0, "subsets": 2}
SCORES = {PAINTER: 6, GATE_HEAD: 4, RELAY: -2, ECHO: -2}


def name(head):
    return f"L{head[0]}H{head[1]}"


@cache
def found(scores="exact", **options):
    return avl.find_circuit(micro_model(), micro_conflict(), scores=scores, **QUICK | options)


@cache
def runs(over="head"):
    measured = Measured.of(micro_model(), micro_conflict(), metric=None, of="C", layout="in_video")
    nodes = Nodes.of(micro_model().spec, over)
    return CircuitRuns.of(micro_model(), measured, nodes, at="suffix", stack=4, budget_gb=1.0, keep_gb=1.0)


def m_of(*heads, empty="blank_muted"):
    kept = frozenset(runs().nodes.names.index(name(head)) for head in heads)
    return float(runs().measure(empty, [kept])[0, 0])


def test_circuits_by_hand():
    """Each says what its own heads say; the MLPs are always there."""
    assert m_of() == pytest.approx(0, abs=CLOSE)
    assert m_of(PAINTER) == pytest.approx(-6, abs=CLOSE)
    assert m_of(WRITERS[0]) == m_of(WRITERS[1]) == pytest.approx(-6, abs=CLOSE)
    assert m_of(*WRITERS, PAINTER) == pytest.approx(-12, abs=CLOSE)
    assert m_of(RELAY, ECHO) == pytest.approx(2, abs=CLOSE)
    assert m_of(RELAY) == m_of(ECHO) == pytest.approx(0, abs=CLOSE)
    assert m_of(RELAY, CARRIER) == pytest.approx(4, abs=CLOSE)
    assert m_of(RELAY, CARRIER, GATE_HEAD) == pytest.approx(0, abs=CLOSE)
    assert m_of(RELAY, ECHO, empty="zero") == pytest.approx(0, abs=CLOSE)
    assert m_of(RELAY, ECHO, ASKER, empty="zero") == pytest.approx(2, abs=CLOSE)


@pytest.mark.parametrize(("empty", "more"), [("blank_muted", {}), ("zero", {ASKER: -2})])
def test_exact_scores_and_both_curves_by_hand(empty, more):
    circuit = found()
    wanted = {name(head): score for head, score in (SCORES | more).items()}
    scores = circuit.values["scores"].sel(empty=empty)[0].to_series()
    assert scores.to_dict() == pytest.approx({node: wanted.get(node, 0) for node in scores.index}, abs=CLOSE)
    # k = 1 2 6 12. Signed: painter .6, and the gate .6, and L0H1 with three that add nothing (all heads at 0 stand in
    # their own order, and a writer is among the first four) 1.2, all 1. In size: .6 .6, then the circuit is whole: 1.
    curve = circuit.curve[circuit.curve["empty"] == empty].set_index(["order", "k"])["f"]
    assert [curve["signed", k] for k in (1, 2, 6, 12)] == pytest.approx([0.6, 0.6, 1.2, 1], abs=CLOSE)
    assert [curve["magnitude", k] for k in (1, 2, 6, 12)] == pytest.approx([0.6, 0.6, 1, 1], abs=CLOSE)
    # CPR = (.6 + 4 x .9 + 6 x 1.1) / 12; CMD = (.4 + 4 x .2) / 12
    assert circuit.figure("CPR", empty)[0] == pytest.approx(10.8 / 12, abs=CLOSE)
    assert circuit.figure("CMD", empty)[0] == pytest.approx(1.2 / 12, abs=CLOSE)
    assert circuit.figure("span", empty)[0] == pytest.approx(-10, abs=CLOSE)


def test_the_smallest_faithful_circuit_and_its_checks_by_hand():
    circuit = found()
    assert circuit.members == [name(head) for head in (PAINTER, GATE_HEAD, RELAY, ECHO, WRITERS[0])]
    assert circuit.faithfulness()[0] == pytest.approx(1, abs=CLOSE)
    # The circuit lacks the second writer and the carrier: the model without the circuit has them, and the mixer.
    rows = circuit.completeness.set_index("removed")
    assert rows.loc["none", "difference"] == pytest.approx(0, abs=CLOSE)
    assert rows.loc["all", "model"] == pytest.approx(0.6, abs=CLOSE)
    assert rows.loc["all", "difference"] == pytest.approx(-0.6, abs=CLOSE)
    adds = circuit.minimality.set_index("node")["adds"]
    wanted = {PAINTER: 0.6, GATE_HEAD: 0, RELAY: -0.2, ECHO: -0.2, WRITERS[0]: 0.6}
    assert adds.to_dict() == pytest.approx({name(head): value for head, value in wanted.items()}, abs=CLOSE)
    # Relay and echo are one path; nothing else acts through anything.
    links = circuit.links[circuit.links["interaction"].abs() > CLOSE]
    assert links[["first", "second", "how"]].values.tolist() == [[name(RELAY), name(ECHO), "need each other"]]
    assert links["interaction"].item() == pytest.approx(-0.2, abs=CLOSE)


def test_writers_stand_in_for_each_other():
    weights = np.zeros(12)
    for place, head in enumerate((PAINTER, *WRITERS)):
        weights[runs().nodes.names.index(name(head))] = 3 - place
    circuit = avl.find_circuit(micro_model(), micro_conflict(), scores=weights, size=3, **QUICK)
    links = circuit.links[circuit.links["interaction"].abs() > CLOSE]
    both = [name(head) for head in WRITERS]
    assert links[["first", "second", "how"]].values.tolist() == [[*both, "stand in for each other"]]
    assert links["interaction"].item() == pytest.approx(-0.6, abs=CLOSE)  # 1.2 - 1.2 - 1.2 + .6


def test_a_search_keeps_one_of_two_redundant_writers():
    """Exact scores leave both writers at 0; taken away in turn, the second is worth its 6."""
    circuit = found("greedy")
    assert len(circuit.members) == 4
    assert {name(PAINTER), name(RELAY), name(ECHO)} < set(circuit.members)
    assert len({name(writer) for writer in WRITERS} & set(circuit.members)) == 1
    assert circuit.faithfulness()[0] == pytest.approx(1, abs=CLOSE)
    gone = circuit.values["scores"].sel(empty="blank_muted").sum("node")
    assert float(gone[0]) == pytest.approx(10, abs=CLOSE)  # contributions sum to the whole span


def test_redundant_nodes_do_not_go_in_one_round():
    """Ten may go at once: L0H1 goes, the other writer would then cost 6, more than the cheapest that stays (4)."""
    search = eliminated(runs(), "blank_muted", signed=False, drop=0.9)
    assert {runs().nodes.names[node] for node in search.order[:2]} == {name(PAINTER), name(WRITERS[1])}
    assert search.scores.sum() == pytest.approx(-10, abs=CLOSE)


def test_gradients_miss_the_gate_and_the_integral_finds_the_writers():
    scores = {kind: found(kind).nodes.set_index("node")["score"] for kind in ("atp", "atp_star", "eap_ig")}
    for kind in ("atp", "atp_star"):
        assert scores[kind][name(PAINTER)] == pytest.approx(6, abs=CLOSE)
        assert scores[kind][name(GATE_HEAD)] == pytest.approx(0, abs=CLOSE)
    assert scores["atp"][name(RELAY)] == pytest.approx(-2, abs=CLOSE)
    # The relay works through layer 1 alone, and layer 1 is one of the two layers that are dropped in turn.
    assert scores["atp_star"][name(RELAY)] == pytest.approx(-1, abs=CLOSE)
    # From p = 1 to 0 the OR's slope is 3 on the last half of the way (2 of 5 middles, and the kink's half): 6 x 1/2.
    assert [scores["eap_ig"][name(writer)] for writer in WRITERS] == pytest.approx([3, 3], abs=0.01)


def test_mlps_are_nodes_too():
    """Without the booster's 4 and the OR's 6 the painter's own 2, less the echo's 2, is left: C = 0; M(va) = -2 + 2."""
    circuit = avl.find_circuit(micro_model(), micro_conflict(), over="head mlp", **QUICK)
    scores = circuit.values["scores"].sel(empty="zero")[0].to_series()
    assert scores["L1 mlp"] == pytest.approx(6, abs=CLOSE)
    assert scores["L2 mlp"] == pytest.approx(4, abs=CLOSE)
    assert scores[name(MIXER)] == pytest.approx(0, abs=CLOSE)
    mlps = frozenset(i for i, node in enumerate(runs("head mlp").nodes.names) if "mlp" in node)
    kept = runs("head mlp").nodes.all - mlps
    m = runs("head mlp").measure("zero", [kept])
    assert float(m[0, 0]) == pytest.approx(0, abs=CLOSE)


def test_hearing_with_nothing_to_see():
    """G = 8 hangs on the relay, the carrier (4), the echo (2) and the mixer (2)."""
    circuit = found(of="G")
    scores = circuit.nodes.set_index("node")["score"]
    wanted = {RELAY: 6, CARRIER: 4, ECHO: 2, MIXER: 2}
    by_name = {name(head): value for head, value in wanted.items()}
    assert scores.to_dict() == pytest.approx({node: by_name.get(node, 0) for node in scores.index}, abs=CLOSE)
    assert circuit.members == [name(head) for head in wanted]
    assert circuit.faithfulness()[0] == pytest.approx(1, abs=CLOSE)


def test_pairs_take_the_corrupt_run_as_empty_and_given_scores_their_own_sign():
    pair = avl.Pair(clean=micro_input("blue", "low"), corrupt=micro_input("black", "silence"))
    metric = avl.logit_diff(letter("a"), letter("v"))
    circuit = avl.find_circuit(micro_model(), pair, metric=metric, **QUICK)
    assert circuit.figure("span")[0] == pytest.approx(-10, abs=CLOSE)
    own = circuit.values["scores"].sel(empty="corrupt")[0].values
    at = {"over": "head", "at": "suffix", "metric": metric}
    grid = avl.patch(micro_model(), pair, direction="noise", **at)
    given = avl.find_circuit(micro_model(), pair, metric=metric, scores=grid, size=1, **QUICK)
    np.testing.assert_allclose(given.values["scores"].sel(empty="corrupt")[0].values, own, atol=CLOSE)
    # "denoise" edits the corrupt run: what restores moves towards the whole model too.
    restored = avl.find_circuit(
        micro_model(), pair, metric=metric, scores=avl.patch(micro_model(), pair, **at), size=1, **QUICK
    )
    assert restored.nodes.set_index("node")["score"][name(PAINTER)] == pytest.approx(6, abs=CLOSE)
    edges = avl.edge_attribution(micro_model(), pair, metric=metric, at="suffix")
    summed = avl.find_circuit(micro_model(), pair, metric=metric, scores=edges, size=1, **QUICK)
    atp = avl.find_circuit(micro_model(), pair, metric=metric, scores="atp", size=1, **QUICK)
    first = [one.values["scores"].sel(empty="corrupt")[0].values for one in (summed, atp)]
    np.testing.assert_allclose(*first, atol=CLOSE)


def brute_force(model, inputs, donor, nodes, kept, metric):
    """One circuit's run by a full hooked forward: every other node is overwritten at the suffix."""
    at = inputs.spans["suffix"].positions.tolist()
    _, cache = model.run_with_cache(donor)

    def put(part, layer, heads):
        def fn(activation, hook=None):
            value = cache[hook_name(part, layer)]
            for position in at:
                if part == "mlp_out":
                    activation[:, position] = value[:, position]
                for head in heads:
                    activation[:, position, head] = value[:, position, head]
            return activation

        return hook_name(part, layer), fn

    hooks = []
    for layer in range(model.spec.n_layers):
        gone = [h for i, h in enumerate(nodes.heads) if nodes.layers[i] == layer and i not in kept]
        hooks.append(put("z", layer, [h for h in gone if h is not None]))
        hooks += [put("mlp_out", layer, [])] if None in gone else []
    return metric(model.run_with_hooks(inputs, fwd_hooks=hooks)[:, -1:]).detach().numpy()


@pytest.mark.parametrize("over", ["head", "head mlp"])
def test_replay_equals_full_hooked_forwards_on_grouped_heads(over):
    model = small_model()
    assert model.spec.n_kv_heads < model.spec.n_heads
    clean, corrupt = ([model.encode(small_clip(seed), "What?") for seed in seeds] for seeds in ((0, 1), (2, 3)))
    pairs = [avl.Pair(clean=one, corrupt=two) for one, two in zip(clean, corrupt, strict=True)]
    metric = avl.logit_diff(5, 9)
    nodes = Nodes.of(model.spec, over)
    measured = Measured.of(model, pairs, metric=metric, of="C", layout="in_video")
    replayed = CircuitRuns.of(model, measured, nodes, at="suffix", stack=2, budget_gb=1.0, keep_gb=0.0)
    rng = np.random.default_rng(0)
    circuits = [frozenset(np.flatnonzero(rng.random(len(nodes)) < 0.5).tolist()) for _ in range(4)]
    m = replayed.measure("corrupt", [*circuits, frozenset()])
    bound = metric.bind()
    for kept, row in zip([*circuits, frozenset()], m, strict=True):
        slow = [brute_force(model, one, two, nodes, kept, bound)[0] for one, two in zip(clean, corrupt, strict=True)]
        np.testing.assert_allclose(row, slow, atol=1e-5)


def test_a_batch_of_layouts_is_each_by_itself():
    """Conflicts of two layouts, in one call, give what each gives alone."""
    model, metric = small_model(), avl.logit_diff(5, 9)
    pairs = [
        avl.Pair(
            clean=model.encode(small_clip(seed, s), "What?"), corrupt=model.encode(small_clip(seed + 5, s), "What?")
        )
        for seed, s in ((0, 2.0), (1, 1.0), (2, 2.0))
    ]
    options = {"metric": metric, "size": 2} | QUICK
    together = avl.find_circuit(model, pairs, **options).values["scores"].values
    alone = [avl.find_circuit(model, pair, **options) for pair in pairs]
    for i, one in enumerate(alone):  # scores of one pair are turned by that pair's own span
        turn = np.sign(one.values["whole"].values[0] - one.values["bare"].values[:, 0])
        np.testing.assert_allclose(np.abs(together[:, i]), np.abs(one.values["scores"].values[:, 0]), atol=1e-5)
        assert set(np.unique(turn)) <= {-1.0, 1.0}


def scale(span):
    n = len(span)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=400).astype(float)
    return Scale(Bootstrap(weights, "component", 2 * n), np.asarray(span, dtype=float), np.zeros(n))


def test_nothing_to_share_is_nan():
    spread = np.tile([1.0, -1.0], 10)
    assert not scale(spread).usable
    assert np.isnan(scale(spread).share(np.ones((1, 20))).value).all()
    assert np.isnan(scale(spread).area(np.ones((2, 20)), [1, 4], 4, distance=False)).all()
    firm = scale(spread + 3)
    f = firm.share(np.stack([0.5 * (spread + 3)]))
    assert f.value[0] == pytest.approx(0.5)
    assert f.low[0] == pytest.approx(0.5)
    # f = .5 at k = 1, 1 at k = 4 of 4 nodes: .75 x 3 / 4; its distance from 1 .25 x 3 / 4
    curve = np.stack([0.5 * (spread + 3), spread + 3])
    assert firm.area(curve, [1, 4], 4, distance=False) == pytest.approx((0.5625,) * 3)
    assert firm.area(curve, [1, 4], 4, distance=True) == pytest.approx((0.1875,) * 3)


def test_stability_is_the_overlap_with_resampled_orders():
    """The first node is the second one's of all examples; a draw of the first example twice puts the other first."""
    boot = Bootstrap(np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), "component", 4)
    table, kept = stability(np.array([[1.0, 0.0], [0.0, 2.0]]), boot, "signed", [1, 2])
    assert table["jaccard"].tolist() == pytest.approx([2 / 3, 1])
    np.testing.assert_allclose(kept, [[1 / 3, 2 / 3], [1, 1]])
    unknown, _ = stability(np.array([[1.0, 2.0]]), boot, "signed", [1])
    assert np.isnan(unknown["jaccard"]).all()


def test_sizes():
    assert sizes(64) == [1, 3, 6, 13, 32, 64]
    assert sizes(1152) == [1, 2, 6, 12, 23, 58, 115, 230, 576, 1152]


def test_random_orders_take_as_many_nodes_of_every_layer():
    nodes = Nodes.of(micro_model().spec, "head mlp")
    order = np.random.default_rng(1).permutation(len(nodes)).tolist()
    for other in shuffled_orders(nodes, order, 5, seed=0):
        assert sorted(other) == list(range(len(nodes)))
        kinds = [[(nodes.layers[i], nodes.heads[i] is None) for i in listed] for listed in (order, other)]
        assert kinds[0] == kinds[1]
    assert shuffled_orders(nodes, order, 5, seed=0) == shuffled_orders(nodes, order, 5, seed=0)


def test_what_is_tested_elsewhere_is_chosen_here():
    """Scores and size come from the conflict asked H; circuits are measured on it asked S, where the echo is silent."""
    circuit = avl.find_circuit(micro_model(), micro_conflict(), test=micro_conflict("S"), **QUICK)
    assert circuit.members == found().members
    np.testing.assert_allclose(circuit.values["scores"], found().values["scores"], atol=CLOSE)
    assert circuit.figure("span")[0] == pytest.approx(-12, abs=CLOSE)
    assert circuit.faithfulness()[0] == pytest.approx(1, abs=CLOSE)  # painter and booster 6, a writer 6
    assert circuit.provenance["examples"] == {"scored": 1, "tested": 1, "held_out": True}


def test_saved_and_opened_it_is_the_same(tmp_path):
    circuit = found()
    again = avl.results.Circuit.load(circuit.save(tmp_path / "circuit"))
    assert again.members == circuit.members
    assert repr(again) == repr(circuit)
    for table in ("nodes", "curve", "areas", "completeness", "minimality", "links", "stability", "random"):
        ours, theirs = (getattr(one, table) for one in (circuit, again))
        assert ours.to_csv() == theirs.to_csv()
    assert again.values.equals(circuit.values)
    with pytest.raises(InputError, match="reads av_lens"):
        avl.Grid.load(tmp_path / "circuit.nc")


def test_refusals():
    model, conflict = micro_model(), micro_conflict()
    for options, words in (
        ({"scores": "exat"}, "Did you mean 'exact'"),
        ({"over": "neuron"}, "kind of node"),
        ({"order": "size"}, "Known: magnitude, signed"),
        ({"of": "E_A"}, "Known: C, G"),
        ({"size": 13}, "the model has 12 nodes"),
        ({"scores": np.zeros(5)}, "do not fit 12 nodes"),
        ({"scores": np.full(12, np.nan)}, "are not all numbers"),
    ):
        with pytest.raises(InputError, match=words):
            avl.find_circuit(model, conflict, **options)
    with pytest.raises(InputError, match="needs a metric"):
        avl.find_circuit(model, avl.Pair(clean=micro_input(), corrupt=micro_input("black")))
    with pytest.raises(InputError, match="not on nothing"):
        avl.find_circuit(model, [])
