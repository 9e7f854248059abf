"""GradDrop: plans under which one layer passes no gradient on, and nothing else changes.

Source: AtP*, Kramár et al. (2024, 2403.00745).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from av_lens.core import run
from av_lens.families.hook_names import hook_name
from av_lens.inputs import AVInputs
from av_lens.interventions import Plan, Site, replace

_PARTS = ("attn_out", "mlp_out")


def held_layers(model: Any, x: AVInputs, positions: Sequence[int]) -> list[Plan]:
    """Hold each layer's writes at the run's own, in turn.

    Args:
        model: a `HookedAVLLM`.
        x: the inputs.
        positions: where.

    Returns:
        One plan for each layer; under it the run is the same, and gradients do not pass through that layer.
    """
    layers = range(model.spec.n_layers)
    sites = {(part, layer): Site(part, layer, positions=list(positions)) for layer in layers for part in _PARTS}
    with torch.no_grad():
        cache = run(model, x, capture=list(sites.values())).cache
    return [Plan([replace(sites[part, layer], cache[hook_name(part, layer)]) for part in _PARTS]) for layer in layers]
