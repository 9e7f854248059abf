"""Clips of noise, and the model's own position ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

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
