"""The stream averaged over spans while the model runs: `[example, layer, span, d_model]`, never the stream itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.passing import read_layers
from av_lens.interventions.sites import resolve_positions


@torch.no_grad()
def pooled_streams(model: Any, x: Any, at: Sequence[Any]) -> Float[Tensor, "batch layer span d_model"]:
    """Average the residual stream over the positions of each span, before the first layer and after every one."""
    places = [resolve_positions(span, x.spans, what="probe") for span in at]
    n_layers = model.spec.n_layers
    found = torch.zeros(len(x), n_layers + 1, len(places), model.spec.d_model)

    def pool(level: int, stream: Tensor) -> None:
        for number, place in enumerate(places):
            index = torch.tensor(place.index, device=stream.device)
            found[:, level, number] = stream.index_select(1, index).float().mean(1).cpu()

    def last(layer: int, stream: Tensor) -> None:
        if layer == n_layers - 1:
            pool(n_layers, stream)

    read_layers(model, x, {"resid_pre": pool, "resid_post": last}, [len(x.spans) - 1])
    return found
