"""A tiny random thinker, its real processor, and clips made of noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from av_lens.inputs import Encoder
from av_lens.media import Clip


def model_positions(hf: Any) -> Callable[[Any], torch.Tensor]:
    """The model's own position ids, asked for as its forward does."""

    def ask(tensors: Any) -> torch.Tensor:
        mask = tensors.get("feature_attention_mask")
        positions, _ = hf.model.get_rope_index(
            tensors["input_ids"],
            tensors.get("image_grid_thw"),
            tensors.get("video_grid_thw"),
            tensors["attention_mask"],
            tensors.get("use_audio_in_video") or False,
            None if mask is None else mask.sum(dim=1),
            tensors.get("video_second_per_grid"),
        )
        return positions

    return ask


def noise_clip(
    seconds: float = 3.0, *, fps: float = 10.0, seed: int = 0, size: tuple[int, int] = (56, 84), sound: bool = True
) -> Clip:
    """Noise to see and to hear: `seconds` long, 2 x 3 tokens a frame pair by default."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (round(seconds * fps), *size, 3), dtype=np.uint8)
    waveform = rng.normal(0.0, 0.2, round(seconds * 16000)).clip(-1, 1).astype(np.float32)
    return Clip.from_arrays(frames=frames, fps=fps, waveform=waveform if sound else None)


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
