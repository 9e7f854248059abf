"""The organisms' verdicts: named on av-tiny, spread on av-tiny-diffuse, no suppression on av-tiny-balanced (slow)."""

from __future__ import annotations

import numpy as np
import pytest
from organism_conflicts import drawn_conflicts

from av_lens.isolation import isolate
from av_lens.model import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def conflicts():
    return drawn_conflicts(120)  # a verdict needs 60 in each half; with fewer, members are not confirmed


def test_av_tiny_has_a_small_set_that_restores_most_of_the_gap(conflicts):
    found = isolate(load("av-tiny"), conflicts, quick=True, named_only=True)
    assert found.verdict_kind == "named"
    (chosen,) = found.sets.query("chosen").itertuples()
    assert chosen.k <= 6
    assert chosen.confirmed
    assert chosen.release > 0.6 * found.summary["gap confirmation"]
    members = found.members.query("chosen")
    assert members["confirmed"].mean() >= 0.5
    # What the members lose is what the set loses without them, on held-out conflicts too.
    np.testing.assert_allclose(members["effect"], members["without"], rtol=0.35, atol=0.3)
    assert found.summary["heads for half of the gap"] <= chosen.k


def test_on_av_tiny_diffuse_the_verdict_is_spread_with_the_number_of_heads(conflicts):
    found = isolate(load("av-tiny-diffuse"), conflicts, quick=True, named_only=True)
    assert found.verdict_kind == "spread"
    number = found.summary["heads for half of the gap"]
    assert 12 < number < 40
    assert f"spread over many heads: by {found.ablation.query('k == @number')['donor'].iloc[0]}" in found.verdict
    assert f"the {number:.0f} heads of largest single release together restore half of the gap" in found.verdict
    chosen = found.sets.query("chosen")
    assert (chosen["release"] < 0.5 * found.summary["gap confirmation"]).all()


def test_on_av_tiny_balanced_nothing_is_suppressed_and_no_set_is_found(conflicts):
    found = isolate(load("av-tiny-balanced"), conflicts, quick=True, named_only=True, gate="report")
    assert found.verdict_kind == "no suppression"
    assert found.sets.empty
    assert found.members.empty
    assert not len(found.suppressors)
