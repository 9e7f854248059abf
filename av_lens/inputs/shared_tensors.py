"""Large tensors of equal content, held once: a conflict's cells, and stacks of them, show the same few pictures.

The pixels of a second of video are some MB, and thirteen cells of four pictures would hold them thirteen times. A
tensor is known by a hash of its content for as long as somebody holds it (weak references): nothing is kept alive.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from av_lens.inputs.model_inputs import AVInputs

SMALLEST = 1 << 17
"""Bytes from which on a tensor is worth hashing."""
_KNOWN: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()


def shared(x: AVInputs) -> AVInputs:
    """Give the same inputs with large tensors that are held elsewhere already."""
    return replace(x, tensors={name: _shared(value) for name, value in x.tensors.items()})


def _shared(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.nbytes < SMALLEST or value.device.type != "cpu":
        return value
    return _KNOWN.setdefault(content_hash(value), value)


def content_hash(value: Tensor) -> bytes:
    """Hash a tensor's kind, shape and content."""
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.blake2b(flat.data, digest_size=16)
    digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
    return digest.digest()
