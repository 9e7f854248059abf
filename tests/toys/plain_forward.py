"""A plain model for recomputing figures: HuggingFace's own class on a checkpoint, read and edited by PyTorch hooks.

Nothing here knows of replay, of the bridge, or of any method of the package. Every figure is one forward of one input.
A head's z is its slice of what `o_proj` is given. An edited run starts from the embeddings that HuggingFace's whole
forward made of text and media, which saves the towers; `whole=True` starts from the pixels and the samples instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class PlainRun:
    """One unedited forward: the last logits, every head's z, and what is needed to start it again.

    Attributes:
        logits: [d_vocab], at the last position.
        z: [layer, pos, head, d_head].
        scale: what the final norm divides by at the last position.
        inputs: keyword arguments of the text model.
        tensors: keyword arguments of the whole model.
    """

    logits: torch.Tensor
    z: torch.Tensor
    scale: float
    inputs: dict[str, Any]
    tensors: dict[str, Any]


@dataclass(frozen=True)
class PlainEdit:
    """New z of some heads at some positions; later heads left free or held.

    Attributes:
        heads: (layer, head) -> (positions, new z [pos, d_head]).
        hold_after: every head of every layer after this one keeps the unedited run's z, at all positions.
    """

    heads: dict[tuple[int, int], tuple[Sequence[int], torch.Tensor]] = field(default_factory=dict)
    hold_after: int | None = None


class PlainModel:
    """HuggingFace's thinker.

    Args:
        hf: the model, in evaluation mode, with eager attention.
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.text = hf.model.language_model
        self.n_heads = hf.config.text_config.num_attention_heads

    @classmethod
    def opened(cls, folder: str) -> PlainModel:
        """Open a checkpoint in float32, by HuggingFace alone."""
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration

        how = {"dtype": torch.float32, "attn_implementation": "eager"}
        return cls(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, **how).eval())

    @torch.no_grad()
    def run(self, tensors: dict[str, Any]) -> PlainRun:
        """One unedited forward through HuggingFace's front door."""
        z: list[torch.Tensor] = []
        given: dict[str, Any] = {}
        last: list[torch.Tensor] = []
        hooks = [
            self.text.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True),
            self.text.norm.register_forward_pre_hook(lambda _, args: last.append(args[0][0, -1])),
        ]
        inside = [layer.self_attn.o_proj for layer in self.text.layers]
        hooks += [o.register_forward_pre_hook(lambda _, args: z.append(args[0][0])) for o in inside]
        with removed(hooks):
            logits = self.hf(**tensors, use_cache=False).logits[0, -1]
        heads = torch.stack(z).unflatten(-1, (self.n_heads, -1))
        scale = math.sqrt(float(last[0].double().pow(2).mean()) + self.text.norm.variance_epsilon)
        inputs = {name: given[name] for name in ("inputs_embeds", "position_ids", "attention_mask")}
        return PlainRun(logits, heads, scale, inputs, tensors)

    @torch.no_grad()
    def edited(self, base: PlainRun, edit: PlainEdit, *, whole: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [d_vocab] at the last position of an input under an edit: with the final norm as it is, and frozen.

        Frozen, the norm divides by what it divided by in the unedited run.
        """
        last: list[torch.Tensor] = []
        inside = enumerate(layer.self_attn.o_proj for layer in self.text.layers)
        hooks = [o.register_forward_pre_hook(self._z_hook(layer, base, edit)) for layer, o in inside]
        hooks.append(self.text.norm.register_forward_pre_hook(lambda _, args: last.append(args[0][0, -1])))
        with removed(hooks):
            if whole:
                logits = self.hf(**base.tensors, use_cache=False).logits[0, -1]
            else:
                logits = self.hf.lm_head(self.text(**base.inputs, use_cache=False).last_hidden_state[0, -1])
        return logits, self.hf.lm_head(self.text.norm.weight * last[0] / base.scale)

    def _z_hook(self, layer: int, base: PlainRun, edit: PlainEdit) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            z = args[0].unflatten(-1, (self.n_heads, -1)).clone()
            if edit.hold_after is not None and layer > edit.hold_after:
                z[0] = base.z[layer]
            for (where, head), (positions, new) in edit.heads.items():
                if where == layer:
                    z[0, list(positions), head] = new
            return (z.flatten(-2),)

        return hook


@contextmanager
def removed(hooks: Sequence[Any]) -> Iterator[None]:
    """Take the hooks off again, whatever happens."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
