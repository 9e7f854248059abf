"""A second model with the same weights, beside the first: a plain copy, or one in another precision."""

from __future__ import annotations

import copy
from typing import Any

import psutil
import torch

from av_lens.errors import ModelError

OF_WEIGHTS = ("_names", "_restart_proved")
"""What a model derives from its bridge and weights, anew where they were rewritten."""
DERIVED = ("encoder", *OF_WEIGHTS)
"""What a copy must derive anew."""


def copied(model: Any, note: str) -> Any:
    """Copy a model."""
    other = copy.copy(model)
    for derived in DERIVED:
        other.__dict__.pop(derived, None)
    other.bridge = copy.deepcopy(model.bridge)
    other.name = f"{model.name} ({note})"
    return other


def other_precision(dtype: torch.dtype) -> torch.dtype:
    """Choose the precision that a model is compared with."""
    return torch.bfloat16 if dtype == torch.float32 else torch.float32


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """Make a second model with the same weights in another precision."""
    precision = str(dtype).removeprefix("torch.")
    device = next(model.hf_model.parameters()).device
    taken, free = weights_bytes(model, dtype), free_bytes(device)
    if taken > free:
        raise ModelError(
            f"the weights of {model.name} in {precision} take {taken / 1e9:.1f} GB and {free / 1e9:.1f} GB of "
            f"{device.type} memory are free: use a machine with more."
        )
    other = copied(model, precision)
    cast(other.hf_model, dtype)  # not the bridge's own `to`, which prints
    other.bridge.cfg.dtype = dtype
    return other


def cast(hf_model: Any, dtype: torch.dtype) -> None:
    """Change the precision of a model's weights, in place.

    Rotary tables and other constants that no checkpoint holds keep theirs, as when the checkpoint is loaded in that
    precision: in bfloat16 a rotary table alone moves logits by a tenth.
    """
    tables = [
        (module, name, module._buffers[name])
        for module in hf_model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers[name] is not None
    ]
    hf_model.to(dtype)
    for module, name, table in tables:
        module._buffers[name] = table


def weights_bytes(model: Any, dtype: torch.dtype) -> int:
    """Say how much memory a model's weights take in a precision."""
    return sum(p.numel() * max(dtype.itemsize, p.dtype.itemsize) for p in model.hf_model.parameters())


def free_bytes(device: torch.device) -> int:
    """Ask for the memory that is free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
