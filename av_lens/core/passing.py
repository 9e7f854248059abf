"""Activations read layer by layer while the model runs, and let go of: nothing is kept but what a reader keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from av_lens.core.activations import watching
from av_lens.core.execution import logits_of
from av_lens.families.hook_names import hook_name

Reader = Callable[[int, Tensor], None]
"""Called with a layer and its activation."""


def read_layers(model: Any, x: Any, readers: Mapping[str, Reader], asked: Sequence[int] = (0,)) -> Tensor:
    """Run once, handing these components of every layer to their readers; gives the logits at the asked positions."""
    layers = range(model.spec.n_layers)
    hooks = [(hook_name(name, i), watching(partial(reader, i))) for name, reader in readers.items() for i in layers]
    return logits_of(model, x, hooks, torch.tensor(list(asked)))
