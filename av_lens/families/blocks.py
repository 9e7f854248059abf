"""A decoder layer, its norms and the towers, each with hooks that are on the road and not beside it.

    resid_mid  = resid_pre + attn(ln1(resid_pre))         hook_resid_pre, hook_attn_out, hook_resid_mid
    resid_post = resid_mid + mlp(ln2(resid_mid))          hook_mlp_in, hook_mlp_out, hook_resid_post

In TransformerLens's own block `hook_resid_mid` is the norm's input: a write reaches the MLP but not the stream, because
the wrapped layer keeps the stream in a local variable. Here the layer's arithmetic is written out, in HuggingFace's
order, so the same hook carries the stream itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import BlockBridge, RMSNormalizationBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent


class FullBlockBridge(BlockBridge):
    """A pre-norm decoder layer with a real, writable `hook_resid_mid`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hook_aliases = {key: path for key, path in self.hook_aliases.items() if key != "hook_resid_mid"}
        self.hook_resid_mid = HookPoint()
        self._hook_embed: HookPoint | None = None

    def set_embed_hook(self, hook: HookPoint) -> None:
        """Let this block, the first, fire the hook of the stream that enters the fusion stack."""
        object.__setattr__(self, "_hook_embed", hook)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer."""
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        if self._hook_embed is not None:
            args = (self._hook_embed(args[0]), *args[1:])
        args, kwargs = self._maybe_inject_start_residual(args, kwargs)
        self._check_stop_at_layer(*args, **kwargs)
        stream = self.hook_in(args[0])
        attention: Any = self.attn
        attention.set_stream(stream, self.ln1.original_component)
        try:
            attended = attention(hidden_states=self.ln1(stream), **kwargs)[0]
        finally:
            attention.set_stream(None, None)
        stream = self.hook_resid_mid(stream + attended)
        entering = self.hook_mlp_in(stream.clone()) if self._read_use_hook_mlp_in() else stream
        return self.hook_out(stream + self.mlp(self.ln2(entering)))


class RealRMSNormBridge(RMSNormalizationBridge):
    """RMSNorm in HuggingFace's own order of operations, whose hooks are always on the road.

    Without an edit the result is HuggingFace's to the bit in every precision. `hook_scale` enters as the ratio of the
    true scale to the hooked one, exactly 1 where nothing was changed.
    """

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Norm the stream."""
        norm: Any = self.original_component
        stream = self.hook_in(hidden_states)
        wide = stream.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon
        if self.hook_scale.has_hooks():
            scale = variance.sqrt()
            fixed = scale.detach().clone()
            # rsqrt enters as a constant: the gradient of the scale flows through the hook alone.
            wide = wide * torch.rsqrt(variance.detach()) * (fixed / self.hook_scale(scale))
        else:
            wide = wide * torch.rsqrt(variance)
        normalized = self.hook_normalized(wide)
        return self.hook_out(norm.weight * normalized.to(stream.dtype))


class TowerBridge(GeneralizedComponent):
    """An encoder as one piece: `hook_in` on its features, `hook_out` on the embeddings that the fusion stack receives.

    TransformerLens hooks `last_hidden_state`; a vision tower's merged tokens are its `pooler_output`. Where a
    `memory` is set, it may answer in the encoder's place: `memory(encoder, args, kwargs)`.
    """

    def __init__(self, name: str, *, field: str) -> None:
        super().__init__(name)
        self.field = field
        self.memory: Callable[..., Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Encode."""
        tower: Any = self.original_component
        args = (self.hook_in(args[0]), *args[1:])
        output = tower(*args, **kwargs) if self.memory is None else self.memory(tower, args, kwargs)
        output[self.field] = self.hook_out(output[self.field])
        return output
