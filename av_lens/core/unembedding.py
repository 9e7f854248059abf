"""From the stream that left the last layer to logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def unembedded(model: Any, stream: Tensor, tokens: Tensor | None = None) -> Float[Tensor, "... d_vocab"]:
    """Read logits from the stream that left the last layer."""
    bridge = model.bridge
    normed, head = bridge.ln_final.original_component(stream), bridge.unembed.original_component
    if normed.dtype != torch.float32:  # as the hooked run does it: all tokens, and never of one row alone
        rows = normed.flatten(0, -2)
        logits = head(rows if len(rows) > 1 else rows.expand(2, -1))[: len(rows)].unflatten(0, normed.shape[:-1])
        return logits if tokens is None else logits[..., tokens]
    if tokens is None:
        return head(normed)
    return functional.linear(normed, head.weight[tokens], None if head.bias is None else head.bias[tokens])
