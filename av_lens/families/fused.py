"""Projections that a checkpoint stores as one (queries, keys and values; gate and up), each made one of its own.

The parts' weights are rows of the fused weight: nothing is copied. A part's product is the fused one's rows, to the bit
where a kernel sums in one order whatever the number of rows, else to a rounding.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from av_lens.errors import ModelError


def take_apart(layers: Iterable[Any], fused: Mapping[str, tuple[str, ...]], *, keys: int) -> None:
    """Put parts in the place of each layer's fused projections: keys and values have so many rows, queries the rest."""
    for layer in layers:
        for path, names in fused.items():
            owner_path, _, name = path.rpartition(".")
            owner, whole = layer.get_submodule(owner_path), layer.get_submodule(path)
            if type(whole) is not torch.nn.Linear or whole.weight.is_meta or len([*whole.parameters()]) > 1:
                raise ModelError(
                    f"{path} is stored as one, and this one is no plain projection without a bias "
                    f"({type(whole).__name__}), of which {', '.join(names)} could be taken apart: load the model in "
                    "bfloat16 or float32, on one device, with adapters merged."
                )
            rows = whole.out_features
            sizes = [rows - 2 * keys, keys, keys] if len(names) == 3 else [rows // len(names)] * len(names)
            for part, weight in zip(names, whole.weight.split(sizes), strict=True):
                setattr(owner, part, _linear(weight))
            setattr(owner, name, Joined(owner, names))
            if hasattr(owner, "activation_fn"):  # an MLP's, by the name that other decoders give it
                owner.act_fn = owner.activation_fn


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = torch.nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return made


class Joined(torch.nn.Module):
    """Stands where the fused projection stood: HuggingFace's own code goes on, through the parts."""

    def __init__(self, owner: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # no child: it holds this one
        self.names = names

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project by each part, and put what they make side by side."""
        return torch.cat([getattr(self.owner, name)(hidden_states) for name in self.names], dim=-1)
