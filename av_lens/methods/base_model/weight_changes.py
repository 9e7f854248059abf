"""Weight change: which heads did training on sound move, and how far, from the model that they started as?

    relative[matrix, layer, head] = |W - W_base| / |W_base|        absolute: |W - W_base|

with |.| the Frobenius norm of one head's slice of Q, K, V (its rows, each with its bias where the model has one) or O
(its columns). Under grouped queries K and V belong to a key-value head: the query heads of a group share one slice and
show the same number. A slice that is zero in the base and not in the model has an infinite relative change; one that is
zero in both has changed by 0. Norms' weights, MLPs and towers are not compared.

Sign: none, a norm is never negative. Control: heads that training left alone show exactly 0; where every weight moved,
compare with the other heads of the layer. Large is not important: what a change does is asked by `graft`.

    >>> change = weight_change(model, base="av-tiny-base")                                   # doctest: +SKIP
    >>> change.values.sel(matrix="O", figure="relative")[0]                                  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.errors import ModelError
from av_lens.methods.base_model.related import opened, require_equal_sizes
from av_lens.model import HookedAVLLM
from av_lens.results import Grid
from av_lens.results.provenance import stamp

MATRICES = ("Q", "K", "V", "O")
FIGURES = ("relative", "absolute")
SIGN = "how far each head's weights moved from the base's; 0 where they did not"


def weight_change(model: HookedAVLLM, *, base: Any) -> Grid:
    """Measure how far every head's weights are from the base's.

    Args:
        model: a `HookedAVLLM`.
        base: the model that it was made from, or its name or folder.

    Returns:
        A grid over `[example, matrix, layer, head, figure]`, with a single example: weights see no input.

    Raises:
        ModelError: models of other sizes, or one with folded weights beside one without.
    """
    related = opened(base, model)
    mend = "no head of the one is a head of the other. Give the model that this one was made from."
    require_equal_sizes(model, related, mend)
    if bool(model.compatibility_mode) != bool(related.compatibility_mode):
        raise ModelError(
            "one of these models has folded weights and the other has not; compare both as they were loaded."
        )
    found = np.zeros((len(MATRICES), model.spec.n_layers, model.spec.n_heads, len(FIGURES)))
    with torch.no_grad():
        for number, matrix in enumerate(MATRICES):
            now, before = (head_slices(one, matrix) for one in (model, related))
            moved, size = (now - before).norm(dim=-1), before.norm(dim=-1)
            relative = torch.where(moved == 0, 0.0, moved / size)
            found[number] = torch.stack([relative, moved], dim=-1).cpu().numpy()
    layers, heads = np.arange(model.spec.n_layers), np.arange(model.spec.n_heads)
    return Grid.of(
        found[None],
        axes={"matrix": list(MATRICES), "layer": layers, "head": heads, "figure": list(FIGURES)},
        baseline=[0.0],
        metric="weight change",
        unit="Frobenius norm, or its share of the base's",
        direction=SIGN,
        provenance=stamp(
            method="weight change",
            model=model.name,
            base=related.name,
            grouped=f"{model.spec.n_kv_heads} key-value heads; the query heads of a group show its K and V",
        ),
    )


def head_slices(model: Any, matrix: str) -> Float[Tensor, "layer head size"]:
    """Cut a matrix into heads, each laid out flat with its bias, in float64."""
    weights = getattr(model, f"W_{matrix}").double().flatten(2)
    if matrix != "O":
        bias = getattr(model, f"b_{matrix}")
        weights = torch.cat([weights, bias.double().view(*weights.shape[:2], -1)], dim=-1)
    return weights.repeat_interleave(model.spec.n_heads // weights.shape[1], dim=1)
