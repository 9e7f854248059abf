"""Where a module computes and what its weights are: beside it, fetched for each call, or packed into fewer bits.

Weights that do not fit wait in memory or on disk; on the module lies a mere shape (`meta`), and accelerate fetches the
numbers for each *call*. Whoever reads weights without a call asks here; quantised ones are refused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformer_lens.utilities.quantization import describe_quantization, unreadable_weight_reason

from av_lens.errors import ModelError

LOAD_PLAIN = (
    'Load it in bfloat16; where that does not fit, avl.load(name, dtype="bfloat16", device_map="auto") spreads it over '
    "all GPUs, memory and disk."
)


def fetched(module: Any, name: str) -> Any:
    """A module's weight by its name, or one of a part of it, where it computes, also where it waits elsewhere."""
    owner, _, last = name.rpartition(".")
    part = module.get_submodule(owner) if owner else module
    weight = getattr(part, last, None)
    if isinstance(weight, Tensor) and weight.device.type == "meta":
        from accelerate.utils import align_module_device

        with align_module_device(part):
            return getattr(part, last)
    return weight


def dense(module: Any, name: str) -> Tensor:
    """A module's weight as plain numbers where it computes; refused where it is packed."""
    weight = fetched(module, name)
    reason = unreadable_weight_reason(weight)
    if reason is not None:
        raise ModelError(
            f"the weights of this model are packed ({describe_quantization(module)}: {reason}), and what was asked "
            "reads their numbers, as direct attribution, path patching, edges, results of single heads and W_Q, W_K, "
            f"W_V, W_O do. Hooks, caches, patching, replays and generation work. {LOAD_PLAIN}"
        )
    return weight  # pyright: ignore[reportReturnType]  # a tensor, or there would have been a reason


def brought(value: Any, device: torch.device) -> Any:
    """Tensors, or tuples and dictionaries of them, on a device; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(brought(one, device) for one in value)
    if isinstance(value, Mapping):
        return {name: brought(one, device) for name, one in value.items()}
    return value
