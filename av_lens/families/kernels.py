"""Torch's attention kernels for CUDA that hand back the log-sum-exp of the scores.

Source: Dao, "FlashAttention-2" (2023); Rabe and Staats, "Self-attention does not need O(n^2) memory" (2021).
"""

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn import functional


def on_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """What queries read, and the log-sum-exp; None where no kernel takes these."""
    asked = SDPAParams(q, k, v, mask, 0.0, causal, False)
    if mask is None and q.shape[-1] % 8 == 0 and can_use_flash_attention(asked):
        return _by_flash_attention(q, k, v, causal, scaling)
    return _memory_efficiently(q, k, v, mask, causal, scaling) if can_use_efficient_attention(asked) else None


def _by_flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    found, weight, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)
    return found, weight


def _memory_efficiently(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """By rows in tiles: the log-sum-exps are padded to whole tiles."""
    added = None if mask is None else aligned(mask, q)
    found, weight, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, added, True, 0.0, causal, scale=scaling
    )
    return found, weight[:, :, : q.shape[2]]


def aligned(mask: Tensor, q: Tensor) -> Tensor:
    """A mask for every head and row, whose rows begin at multiples of 16 numbers, as that kernel wants them."""
    n = mask.shape[-1]
    return functional.pad(mask.to(q.dtype), (0, -n % 16))[..., :n].expand(*q.shape[:3], n)
