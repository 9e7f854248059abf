"""Features that no tower has seen: a fixed direction for every class, and noise; and a thinker that learned nothing.

For tests of training and planting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from av_lens.lab.training.pools import FeaturePool
from av_lens.organism.anatomy import build_model, thinker_config


def imagined_thinker() -> Any:
    """An untrained thinker of three layers, no two of whose weights are alike."""
    model = build_model(thinker_config(n_layers=3), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def imagined_pool(*, per_class: int = 8, seed: int = 0) -> FeaturePool:
    g = Generator().manual_seed(7)
    looks, sounds, shades = (torch.randn(n, 128, generator=g) for n in (12, 12, 6))
    g = Generator().manual_seed(seed)
    label = torch.arange(12).repeat_interleave(per_class)
    colour = torch.randint(0, 6, (len(label),), generator=g)
    n, empty = len(label), 12

    def noise(count: int, length: int) -> torch.Tensor:
        return 0.3 * torch.randn(count, length, 128, generator=g)

    return FeaturePool(
        video=noise(n, 18) + (looks[label] + shades[colour])[:, None],
        audio=noise(n, 50) + sounds[label][:, None],
        audio_hidden=torch.zeros(n, 50, 64),
        label=label,
        colour=colour,
        seed=torch.arange(n) % per_class,
        blank_video=noise(empty, 18),
        blank_kind=torch.zeros(empty, dtype=torch.long),
        mute_audio=noise(empty, 50),
        mute_audio_hidden=torch.zeros(empty, 50, 64),
        mute_kind=torch.zeros(empty, dtype=torch.long),
        hashes=(),
    )
