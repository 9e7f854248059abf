"""Linear layers whose weights are packed integers, as quantised ones are: who reads the numbers reads nonsense, loudly.

A stand-in for the modules of bitsandbytes: one byte a number, one scale a row; the module alone knows how to unpack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class PackedLinear(torch.nn.Linear):
    """A linear layer of one byte a weight."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (plain.weight.detach() / scale).round().to(torch.int16) + 128
        self.weight = torch.nn.Parameter(whole.to(torch.uint8).reshape(-1, 1), requires_grad=False)
        self.bias = plain.bias
        self.register_buffer("scale", scale)

    def dense(self) -> Tensor:
        """The numbers."""
        return (self.weight.reshape(self.out_features, -1).to(self.scale.dtype) - 128) * self.scale

    def forward(self, input: Tensor) -> Tensor:
        """Unpack and multiply."""
        return functional.linear(input, self.dense(), self.bias)


class Packing:
    """What a quantised HuggingFace model says of itself."""

    def __init__(self) -> None:
        self.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        self.is_compileable = False


def pack(hf_model: Any, *, dense: bool = False) -> Any:
    """Pack the decoder's projections; `dense`: the same rounded numbers, in plain layers."""
    for layer in hf_model.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, part in list(block.named_children()):
                if isinstance(part, torch.nn.Linear):
                    packed = PackedLinear(part)
                    if dense:
                        part.weight.data = packed.dense()
                    else:
                        setattr(block, name, packed)
    if not dense:
        hf_model.hf_quantizer = Packing()
    return hf_model
