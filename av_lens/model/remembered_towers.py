"""Encoders' outputs, kept while many prompts show the same clips: cells of a conflict share pictures and sounds.

At a real checkpoint's sizes the encoders cost as much as the fusion layers, and an isolation reads each clip in a dozen
cells. What an encoder was given decides what it gives, so its output is kept under a hash of all its inputs, and is the
same to the bit. Hooks on the encoders fire as ever: `hook_in` before the memory is asked, `hook_out` on a copy of what
it gives. Hooks inside an encoder are part of the key: what was kept under others is not given. With gradients on,
nothing is kept and nothing is taken from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from av_lens.core.standing_hooks import hook_numbers
from av_lens.families.blocks import TowerBridge
from av_lens.inputs.shared_tensors import content_hash
from av_lens.memory import Memory

_PLAIN = (bool, int, float, str, type(None))


class TowerMemory:
    """One encoder's outputs (of them what the fusion stack receives) by what it was given, up to so many bytes."""

    def __init__(self, field: str, most: float) -> None:
        self._field, self._most = field, most
        self._kept: Memory[tuple[type, Tensor]] = Memory(int(most), lambda made: made[1].nbytes)

    def __call__(self, tower: Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Encode, or give what the same input gave before: without gradients only the embeddings of it."""
        key = None if torch.is_grad_enabled() else key_of(args, kwargs)
        if key is None:
            return tower(*args, **kwargs)
        kind, embeddings = self._kept.once((key, hook_numbers(tower)), lambda: self._made(tower(*args, **kwargs)))
        return kind(**{self._field: embeddings.clone()})  # a hook may write into it

    def __deepcopy__(self, memo: dict[int, Any]) -> TowerMemory:
        """A copied encoder begins with an empty memory: its weights may be changed (`copies.in_precision`)."""
        return TowerMemory(self._field, self._most)

    def _made(self, output: Any) -> tuple[type, Tensor]:
        return type(output), output[self._field].detach()


def key_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
    """Hash an encoder's inputs; None where one is neither a tensor nor a plain value."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.device};".encode() + content_hash(value))
        elif isinstance(value, _PLAIN):
            digest.update(f"{name} {value!r};".encode())
        else:
            return None
    return digest.digest()


@contextmanager
def remembered_towers(model: Any, *, gb: float = 1.0) -> Generator[None, None, None]:
    """Let a model's encoders, whose weights must not change meanwhile, remember so many GB each, then forget.

    Where there is no model (or no bridge in it), nothing is done.
    """
    modules = model.bridge.modules() if hasattr(model, "bridge") else ()
    towers = [module for module in modules if isinstance(module, TowerBridge) and module.memory is None]
    for tower in towers:
        tower.memory = TowerMemory(tower.field, gb * 1e9)
    try:
        yield
    finally:
        for tower in towers:
            tower.memory = None
