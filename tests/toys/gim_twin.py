"""The backward rules of GIM by hooks on one full forward: another way to the gradients of `edge_attribution`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def shared(x: torch.Tensor, share: float) -> torch.Tensor:
    """The same numbers, with a share of their gradient."""
    return share * x + ((1 - share) * x).detach()


class Cooled(torch.autograd.Function):
    """A softmax with the Jacobian diag(p) - p p^T of p = softmax(scores / 2)."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scores)
        return torch.softmax(scores, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (scores,), (g,) = ctx.saved_tensors, gradients
        p = torch.softmax(scores / 2, dim=-1)
        return p * g - p * (p * g).sum(-1, keepdim=True)


@contextmanager
def gim(model: Any, *, softmax: bool = True, norms: bool = True, products: bool = True) -> Iterator[None]:
    """Let gradients of hooked runs go back by GIM's rules, or by some of them."""
    kept: dict[str, torch.Tensor] = {}

    def keep(scores: torch.Tensor, hook: Any) -> None:
        kept[hook.name.replace("hook_attn_scores", "hook_pattern")] = scores

    def cool(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        return Cooled.apply(kept[hook.name]).to(pattern.dtype)

    def constant(norm: Any, x: torch.Tensor) -> torch.Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True).detach()
        return norm.weight * x * torch.rsqrt(variance + norm.variance_epsilon)

    hooks: list[tuple[Any, Any]] = []
    for layer in range(model.spec.n_layers):
        if softmax:
            hooks += [(f"blocks.{layer}.attn.hook_attn_scores", keep), (f"blocks.{layer}.attn.hook_pattern", cool)]
        if products:
            parts = {"attn.hook_q": 0.25, "attn.hook_k": 0.25, "attn.hook_v": 0.5, "mlp.hook_post": 0.5}
            hooks += [
                (f"blocks.{layer}.{part}", lambda x, hook, share=share: shared(x, share))
                for part, share in parts.items()
            ]
    shells = [*(block.ln1 for block in model.bridge.blocks), model.bridge.ln_final]
    classes = {type(one) for shell in shells for one in (shell, shell.original_component)}  # forks pass the bare norm
    own = {one: one.forward for one in classes}
    try:
        for one in classes if norms else ():
            one.forward = constant
        with model.hooks(fwd_hooks=hooks):
            yield
    finally:
        for one, forward in own.items():
            one.forward = forward
