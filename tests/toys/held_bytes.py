"""How much memory tensors take: every storage, from the operation that makes it until it is freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class HeldBytes(TorchDispatchMode):
    """Count the bytes of storages that operations make.

    Attributes:
        now: those that are held.
        peak: the most that were held at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        old = {one.untyped_storage().data_ptr() for one in given}
        found = func(*args, **kwargs or {})
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor) and (storage := one.untyped_storage()) not in self._known:
                if storage.data_ptr() in old:
                    continue
                self._known[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return found

    def _freed(self, n: int) -> None:
        self.now -= n
