"""A plain model for recomputing figures: HuggingFace's own class on a checkpoint, read and edited by PyTorch hooks.

Nothing here knows of replay, of the bridge, or of any method of the package. Every figure is one forward of one input.
A head's z is its slice of what `o_proj` is given, an MLP's output what its module returns. An edited run starts from
the embeddings that HuggingFace's whole forward made of text and media, which saves the towers; `whole=True` starts from
the pixels and the samples instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

MLP = "mlp"
Node = tuple[int, int | str]
"""(layer, head), or (layer, MLP)."""


@dataclass(frozen=True)
class PlainRun:
    """One forward: the logits, every node's output, and what is needed to start it again.

    Attributes:
        rows: [asked, d_vocab], from the last position of the prompt on; a row more for every token after it.
        frozen: the same with the final norm dividing by what it divided by in the unedited run.
        z: [layer, pos, head, d_head].
        mlp: [layer, pos, d_model].
        scale: [asked, 1], what the unedited run's final norm divides by.
        inputs: keyword arguments of the text model.
        tensors: keyword arguments of the whole model.
    """

    rows: torch.Tensor
    frozen: torch.Tensor
    z: torch.Tensor
    mlp: torch.Tensor
    scale: torch.Tensor
    inputs: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def logits(self) -> torch.Tensor:
        """[d_vocab], at the prompt's last position."""
        return self.rows[0]

    def output(self, node: Node) -> torch.Tensor:
        """A node's output [pos, d]."""
        layer, which = node
        return self.mlp[layer] if which == MLP else self.z[layer, :, which]


@dataclass(frozen=True)
class PlainEdit:
    """New outputs of some nodes at some positions; others held at the unedited run's own, at all positions.

    Attributes:
        nodes: node -> (positions, new output [pos, d]).
        hold_after: every head of every layer after this one is held.
        hold_mlps: the layers whose MLPs are held.
    """

    nodes: dict[Node, tuple[Sequence[int], torch.Tensor]] = field(default_factory=dict)
    hold_after: int | None = None
    hold_mlps: frozenset[int] = frozenset()


class PlainModel:
    """HuggingFace's thinker.

    Args:
        hf: the model, in evaluation mode, with eager attention.
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.text = hf.model.language_model
        self.n_layers = len(self.text.layers)
        self.n_heads = hf.config.text_config.num_attention_heads

    @classmethod
    def opened(cls, folder: str) -> PlainModel:
        """Open a checkpoint in float32, by HuggingFace alone."""
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration

        how = {"dtype": torch.float32, "attn_implementation": "eager"}
        return cls(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, **how).eval())

    def run(self, tensors: dict[str, Any], after: Sequence[int] = ()) -> PlainRun:
        """One unedited forward through HuggingFace's front door; `after` are tokens that follow the prompt."""
        if after:
            extra = torch.tensor([list(after)], dtype=torch.long)
            new = {"input_ids": extra, "attention_mask": torch.ones_like(extra)}
            tensors = tensors | {name: torch.cat((tensors[name], added), 1) for name, added in new.items()}
        return self._forward(tensors, {}, 1 + len(after), None, PlainEdit(), whole=True)

    def edited(self, base: PlainRun, edit: PlainEdit, *, whole: bool = False) -> PlainRun:
        """An input under an edit."""
        return self._forward(base.tensors, base.inputs, len(base.rows), base, edit, whole=whole)

    @torch.no_grad()
    def _forward(
        self,
        tensors: dict[str, Any],
        inputs: dict[str, Any],
        asked: int,
        base: PlainRun | None,
        edit: PlainEdit,
        *,
        whole: bool,
    ) -> PlainRun:
        z: list[torch.Tensor] = []
        mlp: list[torch.Tensor] = []
        given: dict[str, Any] = {}
        last: list[torch.Tensor] = []
        hooks = [
            self.text.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True),
            self.text.norm.register_forward_pre_hook(lambda _, args: last.append(args[0][0, -asked:])),
        ]
        for number, layer in enumerate(self.text.layers):
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(self._z_hook(number, base, edit, z)))
            hooks.append(layer.mlp.register_forward_hook(self._mlp_hook(number, base, edit, mlp)))
        with removed(hooks):
            if whole:
                rows = self.hf(**tensors, use_cache=False).logits[0, -asked:]
            else:
                rows = self.hf.lm_head(self.text(**inputs, use_cache=False).last_hidden_state[0, -asked:])
        own = (last[0].double().pow(2).mean(-1, keepdim=True) + self.text.norm.variance_epsilon).sqrt()
        scale = own if base is None else base.scale
        frozen = self.hf.lm_head(self.text.norm.weight * last[0] / scale.float())
        inputs = {name: given[name] for name in ("inputs_embeds", "position_ids", "attention_mask")}
        return PlainRun(rows, frozen, torch.stack(z), torch.stack(mlp), scale, inputs, tensors)

    def _z_hook(self, layer: int, base: PlainRun | None, edit: PlainEdit, kept: list[torch.Tensor]) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            z = args[0].unflatten(-1, (self.n_heads, -1)).clone()
            if edit.hold_after is not None and layer > edit.hold_after:
                z[0] = base.z[layer]
            for (where, head), (positions, new) in edit.nodes.items():
                if where == layer and head != MLP:
                    z[0, list(positions), head] = new
            kept.append(z[0].clone())
            return (z.flatten(-2),)

        return hook

    def _mlp_hook(self, layer: int, base: PlainRun | None, edit: PlainEdit, kept: list[torch.Tensor]) -> Any:
        def hook(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            if layer in edit.hold_mlps:
                out[0] = base.mlp[layer]
            if (layer, MLP) in edit.nodes:
                positions, new = edit.nodes[layer, MLP]
                out[0, list(positions)] = new
            kept.append(out[0].clone())
            return out

        return hook


@contextmanager
def removed(hooks: Sequence[Any]) -> Iterator[None]:
    """Take the hooks off again, whatever happens."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
