"""The stream averaged over spans while the model runs: `[example, layer, span, d_model]`, never the stream itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.activations import stream_names, watching
from av_lens.core.execution import logits_of
from av_lens.interventions.sites import resolve_positions


@torch.no_grad()
def pooled_streams(model: Any, x: Any, at: Sequence[Any]) -> Float[Tensor, "batch layer span d_model"]:
    """Average the residual stream over the positions of each span, before the first layer and after every one.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, one example or a stack.
        at: the spans: role names joined by `|`, `Span`s or integers.

    Returns:
        The means in float32 on the CPU; layer 0 is the stream before the first layer, layer l after the l-th.

    Raises:
        InterventionError: a span names no position of this input.
    """
    places = [resolve_positions(span, x.spans, what="probe") for span in at]
    spec = model.spec
    found = torch.zeros(len(x), spec.n_layers + 1, len(places), spec.d_model)

    def pool(level: int, stream: Tensor) -> None:
        for number, place in enumerate(places):
            index = torch.tensor(place.index, device=stream.device)
            found[:, level, number] = stream.index_select(1, index).float().mean(1).cpu()

    hooks = [(name, watching(partial(pool, level))) for level, name in enumerate(stream_names(spec.n_layers))]
    logits_of(model, x, hooks, torch.tensor([len(x.spans) - 1]))
    return found
