"""How activations lie, and at which positions logits are asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from av_lens.families.hook_names import COMPONENTS, hook_name
from av_lens.interventions.sites import resolve_positions
from av_lens.spans import Span, SpanMap


def heads_first(activation: Tensor, component: str) -> Tensor:
    """Bring per-head activations to `[batch, head, pos, d_head]`."""
    turned = activation if COMPONENTS[component].head_axis == 1 else activation.transpose(1, 2)
    return turned.contiguous()


def watching(see: Callable[[Tensor], Any]) -> Callable[..., None]:
    """A hook that looks on: `see` is shown the activation, and nothing is changed."""
    return partial(_shown, see)


def _shown(see: Callable[[Tensor], Any], activation: Tensor, hook: Any = None) -> None:
    del hook
    see(activation)


def rows_of(rows: slice | Tensor) -> Callable[..., Tensor]:
    """A hook that lets some positions pass alone."""
    return partial(_rows, rows)


def _rows(rows: slice | Tensor, activation: Tensor, hook: Any = None) -> Tensor:
    del hook
    return activation[:, rows]


def stream_names(n_layers: int) -> list[str]:
    """The hooks of the stream that enters each layer, and of the one that leaves the last."""
    return [*(hook_name("resid_pre", layer) for layer in range(n_layers)), hook_name("resid_post", n_layers - 1)]


def asked_positions(spans: SpanMap, logits_at: str | Span) -> Tensor:
    """Resolve the positions at which logits are asked for."""
    asked = None if logits_at == "all" else logits_at
    return torch.tensor(resolve_positions(asked, spans, what="logits_at").index)
