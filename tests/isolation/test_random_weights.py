"""Models of random weights, searched past the gate: nothing is confirmed, and by words nothing would be (slow)."""

from __future__ import annotations

import pytest
import torch
from organism_conflicts import drawn_conflicts

from av_lens.isolation import isolate
from av_lens.model import load
from av_lens.results.record import RELEASING

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def conflicts():
    return drawn_conflicts(120, seed=1, first=3000)


def randomised(seed):
    """The balanced organism, every weight matrix of which is drawn anew with its own mean and deviation."""
    model, rng = load("av-tiny-balanced"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in {id(one): one for one in model.hf_model.parameters()}.values():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=rng) * weight.std() + weight.mean())
    return model


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_confirmed_and_by_words_nothing_would_be(conflicts, seed):
    found = isolate(randomised(seed), conflicts, gate="report", quick=True, named_only=True)
    assert "not interpretable" in found.stamps
    assert found.verdict.startswith(("Refused: ", "No suppression: ", "Suppression is not established: "))
    assert "confirmed" not in found.verdict
    for table in (found.heads, found.members, found.sets):
        assert not table["confirmed"].any()
    releasing = found.heads[found.heads["role"].isin(RELEASING)]
    print(f"\nseed {seed}: {found.verdict}\n{releasing[['layer', 'head', 'role', 'status', 'flags']].to_string()}")
    assert not releasing["would_confirm"].any()
