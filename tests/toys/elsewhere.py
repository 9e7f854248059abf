"""A model and its records on devices that are not there: fake tensors, and a count of what the host waits for.

PyTorch's fake tensors hold no numbers, but refuse to mix devices, or to hand a number to the host, exactly where real
ones would mix or wait.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from av_lens.replay import Trace

ELSEWHERE = torch.device("cuda", 0)


def copied(model: Any) -> Any:
    other = copy.copy(model)
    other.bridge = copy.deepcopy(model.bridge)
    return other


def move(model: Any, mode: FakeTensorMode, device: torch.device) -> None:
    """Put fake weights that lie elsewhere in the place of a model's own."""
    for module in model.hf_model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(mode.from_tensor(weight.detach()).to(device), False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer).to(device)


def held_at(trace: Any, mode: FakeTensorMode, device: torch.device, model: Any, *, masked: bool) -> Any:
    """The same trace with fake tensors that lie on a device."""

    def there(tensors: Any) -> Any:
        return tuple(mode.from_tensor(tensor).to(device) for tensor in tensors)

    n = len(trace.spans)
    mask = torch.empty(1, 1, n, n, device=device) if masked else None
    parts = {name: there(getattr(trace, name)) for name in ("resid", "keys", "values", "tables")}
    return Trace(model=model, x=trace.x, **parts, mask=mask)


def spread(model: Any, mode: FakeTensorMode, place: Callable[[str], torch.device]) -> None:
    """The same on several devices, each module's weights on the one of its name."""
    for name, module in model.hf_model.named_modules():
        for key, weight in list(module._parameters.items()):
            if weight is not None:
                fake = mode.from_tensor(weight.detach()).to(place(name))
                module._parameters[key] = torch.nn.Parameter(fake, False)
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = mode.from_tensor(buffer).to(place(name))


class Waits(TorchDispatchMode):
    """Count operations on a device, and those for which the host must wait until the device is done.

    Attributes:
        count: "kernels" (operations with a tensor there), "read" (a number for the host, or a shape that depends on
            numbers), "down" (copies to memory) and "up" (copies from memory that block, indices among them).
    """

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device, self.count = device, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        there = [one.device.type == self.device for one in given]
        if any(there) and name in self.READS:
            self.count["read"] += 1
        found = func(*args, **kwargs)
        made = [one.device.type == self.device for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
        self.count["kernels"] += any(there) or any(made)
        if name in ("_to_copy", "copy_"):
            source, target = (there[-1], there[0]) if name == "copy_" else (there[0], made[0])
            blocks = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            self.count["down"] += source and not target
            self.count["up"] += target and not source and blocks
        elif any(there) and not all(there):
            self.count["up"] += sum(one.ndim > 0 and not on for one, on in zip(given, there, strict=True))
        return found
