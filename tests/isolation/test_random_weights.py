"""Models of random weights, searched past the gate: nothing is confirmed, and by words nothing would be (slow)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from av_lens import organism
from av_lens.inputs import Conflict
from av_lens.isolation import isolate
from av_lens.model import load
from av_lens.results.record import RELEASING

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def conflicts():
    classes = list(organism.classes())
    rng = np.random.default_rng(1)
    found = []
    for i in range(120):
        a, v = (classes[j] for j in rng.permutation(len(classes))[:2])
        sound, picture = organism.clip(a, seed=3000 + 2 * i), organism.clip(v, seed=3001 + 2 * i)
        found.append(Conflict(sound=sound, picture=picture, question="What do you hear?", answers=(a, v), id=f"c{i}"))
    return found


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
