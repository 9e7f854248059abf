"""A tiny random thinker, its real processor, and clips made of noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
from noise import model_positions, noise_clip

from av_lens.inputs import Encoder
from av_lens.media import Clip


@pytest.fixture(scope="session")
def hf() -> Any:
    return tiny.tiny_hf_model()


@pytest.fixture(scope="session")
def processor() -> Any:
    return tiny.tiny_processor()


@pytest.fixture(scope="session")
def encoder(hf: Any, processor: Any) -> Encoder:
    return Encoder(processor, hf.config, model_positions(hf))


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Clip]:
    return noise_clip
