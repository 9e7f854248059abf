"""What most tests of runs use: a tiny random model, and its input of a tiny clip; one of each for a file."""

from __future__ import annotations

import pytest
from tiny import tiny_clip, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def x(model):
    return model.encode(tiny_clip(), "What?")
