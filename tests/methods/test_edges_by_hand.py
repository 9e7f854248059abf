"""Edges of the micro model, worked out by hand: what `micro.py` writes is `M = 2 OUT` at the generation position.

With the conflict va (p = -1, s = 1, shown) as base, every scale 1 and every pattern hard, so that gradients run through
values and MLPs alone:

    dM/dOUT = 2;  dM/dAUX = 2 x 2 through the booster (|AUX| < 2);  dM/dSEEN = 0 through the OR, which is saturated at
    SEEN = -2;  dM/dHEARD at the question = 2, through the echo, which reads there; the carrier beside it (the same key
    and value head) reads the sink, and what it would have read at the question moves nothing.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from micro import margin, micro_input, micro_model
from tiny import letter

import av_lens as avl

CLOSE = 2e-3


@cache
def scores(colour, tone, variant="eap", steps=4):
    pair = avl.Pair(clean=micro_input("blue", "low"), corrupt=micro_input(colour, tone))
    return avl.edge_attribution(
        micro_model(), pair, metric=avl.logit_diff(letter("a"), letter("v")), variant=variant, steps=steps
    )


def check(found, edges, total):
    """The named edges have their values, every other edge of these and all other senders is 0, and the sum closes."""
    left = found.values[0].copy()
    for (sender, receiver), value in edges.items():
        assert float(left.sel(sender=sender, receiver=receiver)) == pytest.approx(value, abs=CLOSE), (sender, receiver)
        left.loc[{"sender": sender, "receiver": receiver}] = 0.0
    rest = left.to_series().dropna()
    assert float(rest.abs().max()) < CLOSE, rest[rest.abs() > CLOSE].to_dict()
    embed = sum(value for (sender, _), value in edges.items() if sender == "embed")
    np.testing.assert_allclose(found.closure_error.values, [total - embed], atol=CLOSE)


def test_another_sound_flows_through_relay_echo_and_mixer_and_not_through_the_carrier_that_shares_their_value():
    """s from 1 to -1: HEARD by -2 at the question (through the echo: -4), the mixer's s by -2 (-4)."""
    edges = {
        ("embed", "L0H2.v"): -4.0,
        ("L0H2", "L1H1.v"): -4.0,
        ("L0H2", "L1H0.v"): 0.0,
        ("L1H1", "logits"): -4.0,
        ("embed", "L2H1.v"): -4.0,
        ("L2H1", "logits"): -4.0,
    }
    check(scores("blue", "high"), edges, margin("blue", "high") - margin("blue", "low"))


PAINTED = {
    ("embed", "L2H0.v"): 12.0,  # p by 2: OUT by 2 (4), AUX by 2 and OUT through the booster by 4 (8)
    ("L2H0", "logits"): 4.0,
    ("L2H0", "L2 mlp"): 8.0,
    ("L2 mlp", "logits"): 8.0,
    ("embed", "L2H1.v"): 4.0,  # the mixer's p by 2
    ("L2H1", "logits"): 4.0,
    ("L1 mlp", "logits"): 12.0,  # what the OR writes changes by 6, whatever its own gradient says
}


def test_another_picture_passes_a_saturated_or_unseen():
    """p from -1 to 1: the whole is 28; the two writers' 12 stand behind a clip of slope 0, and closure says so."""
    found = scores("red", "low")
    check(found, PAINTED, margin("red", "low") - margin("blue", "low"))
    assert float(found.closure_error[0]) == pytest.approx(12.0, abs=CLOSE)


def test_the_integral_over_inputs_sees_both_writers():
    """SEEN runs from -2 to 2, and the OR's slope is 3 on the middle half of the way: 2 x 3 / 2 = 3 for each unit."""
    writers = {
        ("embed", "L0H1.v"): 6.0,
        ("L0H1", "L1 mlp"): 6.0,
        ("embed", "L1H2.v"): 6.0,
        ("L1H2", "L1 mlp"): 6.0,
    }
    found = scores("red", "low", "ig_inputs")
    check(found, PAINTED | writers, margin("red", "low") - margin("blue", "low"))
    assert float(found.closure_error[0]) == pytest.approx(0.0, abs=CLOSE)


def test_the_integral_over_activations_gives_each_writer_its_own_patching():
    """One writer alone brings SEEN from -2 to 0, whose second half has slope 3: 2 x 3 = 6, its exact effect."""
    found = scores("red", "low", "ig_activations").values[0]
    for writer in ("L0H1", "L1H2"):
        assert float(found.sel(sender=writer, receiver="L1 mlp")) == pytest.approx(6.0, abs=CLOSE)
    pair = avl.Pair(clean=micro_input("blue", "low"), corrupt=micro_input("red", "low"))
    options = {"metric": avl.logit_diff(letter("a"), letter("v")), "direction": "noise", "at": micro_input().spans.all}
    exact = avl.patch(micro_model(), pair, over="head", **options).effects[0]
    for (layer, head), by_hand in {(0, 1): 6.0, (1, 2): 6.0, (2, 0): 12.0, (2, 1): 4.0}.items():
        wanted = float(exact.sel(layer=layer, head=head))
        got = float(found.sel(sender=f"L{layer}H{head}").sum())
        assert got == pytest.approx(wanted, abs=CLOSE)
        assert wanted == pytest.approx(by_hand, abs=CLOSE)


def test_a_hard_gate_is_seen_by_no_gradient():
    """Black for blue: p by 1 (painter 6, mixer 2), the OR's 6 is saturated, the gate's 4 hides in a hard softmax."""
    found = scores("black", "low")
    edges = {
        ("embed", "L2H0.v"): 6.0,
        ("L2H0", "logits"): 2.0,
        ("L2H0", "L2 mlp"): 4.0,
        ("L2 mlp", "logits"): 4.0,
        ("embed", "L2H1.v"): 2.0,
        ("L2H1", "logits"): 2.0,
        ("L1 mlp", "logits"): 6.0,
        ("L1H0", "logits"): 4.0,  # the carrier speaks in the donor run
    }
    check(found, edges, margin("black", "low") - margin("blue", "low"))
    assert float(found.closure_error[0]) == pytest.approx(6.0 + 4.0, abs=CLOSE)
    pair = avl.Pair(clean=micro_input("blue", "low"), corrupt=micro_input("black", "low"))
    options = {"metric": avl.logit_diff(letter("a"), letter("v")), "direction": "noise", "at": micro_input().spans.all}
    guess = avl.attribution_patch(micro_model(), pair, over="head", top=3, **options).effects[0].sel(layer=0, head=0)
    assert [float(guess.sel(figure=figure)) for figure in ("atp", "atp_star")] == pytest.approx([0, 0], abs=CLOSE)
    exact = avl.patch(micro_model(), pair, over="head", **options).effects[0].sel(layer=0, head=0)
    assert float(exact) == pytest.approx(4.0, abs=CLOSE)


def test_the_softmax_fix_sees_the_gated_query():
    """The carrier's query of black's run, in which the gate is silent, makes it read the question: 4; atp sees 0."""
    pair = avl.Pair(clean=micro_input("blue", "low"), corrupt=micro_input("black", "low"))
    found = avl.attribution_patch(
        micro_model(), pair, metric=avl.logit_diff(letter("a"), letter("v")), direction="noise", component="q", top=1
    )
    carrier = found.effects[0].sel(layer=1, head=0)
    assert float(carrier.sel(figure="atp")) == pytest.approx(0.0, abs=CLOSE)
    assert float(carrier.sel(figure="atp_fixed")) == pytest.approx(4.0, abs=CLOSE)
    assert float(carrier.sel(figure="exact")) == pytest.approx(4.0, abs=CLOSE)
