"""Attention whose every stage is a real hook, and equal to HuggingFace's eager attention to the bit.

    scores  = rot_q @ rot_k^T * scaling + mask        hook_rot_q, hook_rot_k, hook_attn_scores
    pattern = softmax(scores)  in float32             hook_pattern
    z       = pattern @ v                             hook_v, hook_z
    out     = z @ W_O                                 hook_result, hook_out

TransformerLens's own reimplementation recomputes the output as a sum over heads once `hook_result` is asked for, and
q, k, v head by head once their input forks are: in bfloat16 at true width that moves logits by up to 0.08. Here both
are *differences*: the exact output, plus what an edit changed. Nothing edited means nothing moved, in any precision.
"""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import PositionEmbeddingsAttentionBridge

from av_lens.errors import ModelError


def hooked_change(hook: HookPoint, value: torch.Tensor, again: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Fire a hook, and say what it changed.

    Args:
        hook: the hook point.
        value: the tensor it shows, computed beside the exact path.
        again: a function that computes `value` anew, for hooks that write into it in place.

    Returns:
        The hooked and the original value, or None where nothing was changed and no gradient is wanted.
    """
    version = None if value.is_inference() else value._version
    wanted = torch.is_grad_enabled() and value.requires_grad
    # Where gradients are wanted the hook sees a node of its own, or the difference would cancel its gradient.
    shown = value.view_as(value) if wanted else value
    hooked = hook(shown)
    in_place = version is None or value._version != version
    if hooked is shown and not in_place and not wanted:
        return None
    return hooked, again() if in_place else value


class RealAttentionBridge(PositionEmbeddingsAttentionBridge):
    """Grouped-query rotary attention, stage by stage; the layer's own projections and cache are used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stream: torch.Tensor | None = None
        self._norm: Any = None
        # The base class keeps one hook for layers that are left to HuggingFace; here it would never fire.
        del self._modules["hook_hidden_states"]
        self._hook_registry.pop("hook_hidden_states", None)

    def set_stream(self, stream: torch.Tensor | None, norm: Any) -> None:
        """Remember the residual stream before its norm, for the input forks.

        Args:
            stream: `[batch, pos, d_model]`, or None to let go of it.
            norm: the layer's own norm module.
        """
        object.__setattr__(self, "_stream", stream)
        object.__setattr__(self, "_norm", norm)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            *args: the normed stream `[batch, pos, d_model]`, unless it comes by the name `hidden_states`.
            **kwargs: what the decoder layer passes on: `position_embeddings`, `attention_mask`, `past_key_values`.

        Returns:
            What attention writes to the stream `[batch, pos, d_model]`, and the pattern.

        Raises:
            ModelError: the layer passed no rotary tables.
        """
        attention: Any = self.original_component
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        tables = kwargs.pop("position_embeddings", None)
        if tables is None:
            raise ModelError(f"{self.name}: the layer passed no position_embeddings; rotary attention needs them.")
        mask = kwargs.pop("attention_mask", None)
        query, key, value = self._projected(self.hook_in(hidden))
        cos, sin = self._apply_position_embedding_hooks(tables)
        query, key = self.hook_rot_q(_rotated(query, cos, sin)), self.hook_rot_k(_rotated(key, cos, sin))
        key, value = self._update_kv_cache(key, value, **kwargs)
        groups = attention.num_key_value_groups
        scores = torch.matmul(query, _repeated(key, groups).transpose(2, 3)) * attention.scaling
        scores = self._apply_reconstruct_attention_mask(
            attn_scores=scores, attention_mask=mask, seq_len=key.shape[2], q_seq_len=query.shape[2]
        )
        scores = self.hook_attn_scores(scores)
        pattern = self._masked_softmax(scores, dtype=torch.float32).to(query.dtype)
        pattern = self._scrub_compatibility_pattern_nans(pattern)
        dropout = attention.attention_dropout if self.training else 0.0
        pattern = self.hook_pattern(torch.nn.functional.dropout(pattern, p=dropout, training=self.training))
        z = torch.matmul(pattern, _repeated(value, groups)).transpose(1, 2).contiguous()
        return self.hook_out(self._written(z.flatten(-2))), pattern

    def _projected(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values `[batch, head, pos, d_head]`, each with what its input fork changed."""
        changes = self._fork_changes()
        projected: list[torch.Tensor] = []
        for name in ("q", "k", "v"):
            linear: Any = getattr(self, name)
            if changes is None:
                flat = linear(hidden)
            else:
                flat = linear.original_component(linear.hook_in(hidden))
                change = changes[name]
                if change is not None:
                    flat = flat + self._per_head(linear, change).to(flat.dtype)
                flat = linear.hook_out(flat)
            heads = flat.view(*flat.shape[:2], -1, self.original_component.head_dim)  # pyright: ignore[reportOptionalMemberAccess]
            projected.append(heads.transpose(1, 2))
        return tuple(projected)

    def _fork_changes(self) -> dict[str, torch.Tensor | None] | None:
        """What the hooks on the forked inputs changed, after the norm `[batch, pos, head, d_model]`; None: no forks."""
        config: Any = self.config
        if not (config.use_split_qkv_input or config.use_attn_in):
            return None
        n_heads, n_kv = config.n_heads, config.n_key_value_heads or config.n_heads
        if config.use_split_qkv_input:
            return {
                "q": self._fork_change(self.hook_q_input, n_heads),
                "k": self._fork_change(self.hook_k_input, n_kv),
                "v": self._fork_change(self.hook_v_input, n_kv),
            }
        change = self._fork_change(self.hook_attn_in, n_heads)
        # One copy per query head: a key-value head reads the copy of the first query head that it serves.
        shared = None if change is None else change[:, :, :: n_heads // n_kv]
        return {"q": change, "k": shared, "v": shared}

    def _fork_change(self, hook: HookPoint, n_heads: int) -> torch.Tensor | None:
        stream, norm = self._stream, self._norm
        if stream is None:
            raise ModelError(f"{self.name}: its block must call set_stream before input forks can fire.")

        def forked() -> torch.Tensor:
            return stream.unsqueeze(2).repeat(1, 1, n_heads, 1)

        change = hooked_change(hook, forked(), forked)
        return None if change is None else norm(change[0]) - norm(change[1])

    def _per_head(self, linear: Any, change: torch.Tensor) -> torch.Tensor:
        """Each head's own rows of the projection on that head's change; flat `[batch, pos, head * d_head]`."""
        weight = linear.original_component.weight
        rows = weight.view(change.shape[2], -1, weight.shape[-1])
        return torch.einsum("bphm,hdm->bphd", change, rows).flatten(-2)

    def _written(self, z: torch.Tensor) -> torch.Tensor:
        """The output projection of `z` `[batch, pos, head * d_head]`, with what `hook_result` changed."""
        config: Any = self.config
        if not config.use_attn_result:
            return self.o(z)
        output: Any = self.o.original_component
        z = self.o.hook_in(z)
        heads = z.view(*z.shape[:2], config.n_heads, -1)
        columns = output.weight.view(output.weight.shape[0], config.n_heads, -1)

        def per_head() -> torch.Tensor:
            return torch.einsum("bphd,mhd->bphm", heads, columns)

        written = output(z)
        change = hooked_change(self.hook_result, per_head(), per_head)
        if change is not None:
            written = written + (change[0] - change[1]).sum(2, dtype=torch.float32).to(written.dtype)
        return self.o.hook_out(written)


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position on `[batch, head, pos, d_head]`, in HuggingFace's order of operations."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (heads * cos.unsqueeze(1)) + (turned * sin.unsqueeze(1))


def _repeated(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """Key-value heads repeated for the query heads that share them."""
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)
