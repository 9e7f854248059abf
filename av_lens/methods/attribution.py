"""Direct logit attribution: which parts of the model write the answer's preference into the last position?

The residual stream at the generation position is a sum: the embedding, what every head and every MLP wrote, and biases.
The final norm divides by a scale and the unembedding is linear, so with the norm *frozen at the run's own scale* the
logit difference is a sum of shares,

    logit(a) - logit(b) = sum over parts of [ (part / scale) * weight ] . (W_U[a] - W_U[b])  +  b_U[a] - b_U[b],

positive where a part writes towards a. The unembedding's bias is a part of its own. `grid.effects` are the shares,
`grid.baseline` the run's own logit difference, `grid.closure_error` what is missing (rounding only).

Done only for differences of one-token logits: log-probabilities and pooled synonyms are not linear. A share is what a
part writes *directly*; what later parts make of it counts as theirs.

Source: Elhage et al. (2021); nostalgebraist (2020) for the frozen norm.

    >>> grid = direct_attribution(model, x, metric=logit_diff("siren", "dog"), by="head")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.bridge.hook_names import hook_name
from av_lens.errors import InputError, unknown
from av_lens.interventions import Site
from av_lens.results.grid import Grid
from av_lens.results.provenance import linked, stamp
from av_lens.runs.execution import Run, run
from av_lens.runs.metrics import Metric, as_metric

BY = ("head", "layer", "component")
SIGN = "direct shares of the logit difference at the generation position; positive: towards the first answer"


def direct_attribution(model: Any, x: Any, *, metric: Metric, by: str = "head") -> Grid:
    """Share a logit difference out among the parts that write it.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, one example or a stack.
        metric: `logit_diff(a, b)` of one-token answers.
        by: "head" (every head, every MLP), "layer" (every layer's attention and MLP), or "component" (all attention,
            all MLPs).

    Returns:
        A grid of shares `[example, part]`, whose parts are named "embed", "L3H5", "L3 attn bias", "L3 mlp", "bias".

    Raises:
        InputError: a metric that is not linear in the logits, or an unknown `by`.
    """
    if by not in BY:
        raise InputError(unknown("way of sharing", by, BY))
    bound = as_metric(metric, model.tokenizer)
    first, second = linear_answers(bound, len(x))
    layers = range(model.spec.n_layers)
    sites = [Site("embed", positions="generation"), Site("final_scale", positions="generation")]
    sites += [Site(c, layer, positions="generation") for c in ("z", "attn_out", "mlp_out") for layer in layers]
    with torch.no_grad():
        out = run(model, x, capture=sites)
        parts = written_parts(model, out, by)
        scale = out.cache[hook_name("final_scale")][:, 0].double()
        weight = model.ln_final.original_component.weight.double()
        unembedding = model.W_U.double()
        direction = (unembedding[:, first] - unembedding[:, second]).T
        shares = {name: ((part / scale) * weight * direction).sum(-1) for name, part in parts.items()}
        bias = model.b_U.double()
        shares["bias"] = bias[first] - bias[second]
        total = bound(out.logits).double()
    values = torch.stack([share.expand(len(x)) for share in shares.values()], dim=1)
    return Grid.of(
        values.cpu().numpy(),
        axes={"part": list(shares)},
        baseline=total.cpu().numpy(),
        clusters=linked([_sources(clip) for clip in x.clips]),
        metric=bound.name,
        unit=bound.unit,
        direction=SIGN,
        shares=True,
        provenance=stamp(
            method="direct attribution", model=model.name, by=by, questions=list(x.questions), **bound.provenance()
        ),
    )


def linear_answers(metric: Metric, batch: int) -> tuple[Tensor, Tensor]:
    """Find the two tokens whose logits are compared.

    Args:
        metric: a bound metric.
        batch: examples in the input.

    Returns:
        Two token ids for each example.

    Raises:
        InputError: the metric is not a difference of two single logits.
    """
    if metric.kind != "logit_diff" or metric.ids is None or any(ids.shape[1:] != (1, 1) for ids in metric.ids):
        raise InputError(
            f"{metric.name} is not linear in the logits, so no shares sum to it. Use logit_diff(a, b) with two answers "
            "of one token each, without synonyms."
        )
    if metric.n_answers not in (1, batch):
        raise InputError(f"{metric.name} names {metric.n_answers} answers for {batch} examples.")
    first, second = (ids[:, 0, 0].expand(batch) for ids in metric.ids)
    return first, second


def written_parts(model: Any, out: Run, by: str) -> dict[str, Float[Tensor, "batch d_model"]]:
    """Decompose the stream at the generation position.

    Args:
        model: the model.
        out: a run that kept embed, z, attn_out and mlp_out at the generation position.
        by: "head", "layer" or "component".

    Returns:
        What each part wrote, in float64; they sum to the stream that enters the final norm.
    """
    parts = {"embed": out.cache[hook_name("embed")][:, 0].double()}
    weights = model.W_O
    for layer in range(model.spec.n_layers):
        attended = out.cache[hook_name("attn_out", layer)][:, 0].double()
        if by == "head":
            z = out.cache[hook_name("z", layer)][:, 0].double()
            heads = torch.einsum("bhd,hdm->bhm", z, weights[layer].double())
            parts |= {f"L{layer}H{head}": heads[:, head] for head in range(heads.shape[1])}
            parts[f"L{layer} attn bias"] = attended - heads.sum(1)
        else:
            parts[f"L{layer} attn"] = attended
        parts[f"L{layer} mlp"] = out.cache[hook_name("mlp_out", layer)][:, 0].double()
    if by != "component":
        return parts
    whole = {"embed": parts.pop("embed")}
    for kind in ("attn", "mlp"):
        whole[kind] = torch.stack([part for name, part in parts.items() if name.endswith(kind)]).sum(0)
    return whole


def _sources(clip: Any) -> list[str]:
    return [] if clip is None else [found for found in (clip.picture_hash, clip.sound_hash) if found is not None]
