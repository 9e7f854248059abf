"""Direct logit attribution: which parts of the model write the answer's preference into the last position?

With the final norm *frozen at the run's own scale* the logit difference is a sum of shares of what every part wrote,

    logit(a) - logit(b) = sum over parts of [ (part / scale) * weight ] . (W_U[a] - W_U[b])  +  b_U[a] - b_U[b],

positive where a part writes towards a; `closure_error` is what is missing. By "head span" z = sum over source positions
of attention x value is split by the role of the source. Log-probabilities and pooled synonyms are not linear, and so
refused. What later parts make of a write counts as theirs.

Source: Elhage et al. (2021); nostalgebraist (2020) for the frozen norm.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core import Run, run
from av_lens.core.calls import heads_first, require_known_layers
from av_lens.errors import InputError
from av_lens.families.decoder import hook_name, weight_of
from av_lens.inputs import AVInputs
from av_lens.interventions import Site
from av_lens.methods.shared.frame import Examples, Frame, numbers
from av_lens.metrics import Metric
from av_lens.model import HookedAVLLM
from av_lens.replay.recording import entering
from av_lens.replay.rerun import layer_of
from av_lens.results import Grid
from av_lens.spans import ROLES

ELSEWHERE = "no source"
SIGN = "direct shares of the logit difference at the generation position; positive: towards the first answer"


def direct_attribution(model: HookedAVLLM, x: Any, *, metric: Metric, by: str = "head", stack: int = 16) -> Grid:
    """Share a logit difference out among the parts that write it.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, several of one layout or different ones, or conflicts (their cell `va`).
        metric: `logit_diff(a, b)` of one-token answers.
        by: "head" (every head, every MLP), "layer" (every layer's attention and MLP), "component" (all attention,
            all MLPs), "head span" (every head's write by the role of the positions it read) or "neuron" (every MLP's
            units).
        stack: examples that run together.

    Returns:
        A grid of shares `[example, part]`, whose parts are named "embed", "L3H5", "L3N17", "L3 attn bias", "L3 mlp",
        "L0 added" (what the model adds to the stream after a layer, in families that do so), "bias". By "head span" it
        has an axis `source` as well: a role for heads, "no source" for all else.

    Raises:
        InputError: a metric that is not linear in the logits, or an unknown `by`.
        ModelError: layers that norm what they write or scale the stream.
    """
    require_choice("way of sharing", by, ("head", "layer", "component", "head span", "neuron"))
    require_known_layers(model, "direct attribution")
    examples = Examples.of(model, x)
    frame = Frame.of(model, examples, metric)
    assert frame.metric is not None
    linear_answers(frame.metric, len(examples))
    roles = [role for role in ROLES if any(len(spans[role]) for spans in examples.spans)]
    found: dict[str, np.ndarray] = {}
    for one in examples.stacks(stack):
        shares, frame.lines[0, one.rows] = _shares(model, one.x, frame.own(one), by, roles)
        for name, share in shares.items():
            nothing = 0.0 if name.endswith("added") else np.nan  # inputs without pictures are told of none
            found.setdefault(name, np.full((len(examples), *share.shape[1:]), nothing))[one.rows] = share
    frame.values, frame.shares = np.stack(list(found.values()), axis=1), True
    axes: dict[str, Any] = {"part": list(found)} | ({"source": [*roles, ELSEWHERE]} if by == "head span" else {})
    return frame.grid(axes, direction=SIGN, method="direct attribution", by=by)


def _shares(
    model: Any, x: AVInputs, metric: Metric, by: str, roles: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every part's share in one stack, `[example]` or `[example, source]`, and the metric."""
    first, second = linear_answers(metric, len(x))
    with torch.no_grad():
        with entering(model) as entered:
            out = run(model, x, capture=_sites(model, by))
        added = {layer: part[:, x.spans.generation_position] for layer, part in entered.get("added", {}).items()}
        parts = written_parts(model, out, by.split()[0], added)
        scale = out.cache[hook_name("final_scale")][:, 0].double()
        # Columns are picked before they are widened: whole, the unembedding is 4 GB in float64 (7B).
        unembedding, norm = (weight_of(one.original_component) for one in (model.unembed, model.ln_final))
        direction = (unembedding[first].double() - unembedding[second].double()).to(scale)
        reader = norm.to(scale) * direction / scale
        shares = {name: (part * reader).sum(-1) for name, part in parts.items()}
        shares["bias"] = (model.b_U.double()[first] - model.b_U.double()[second]).expand(len(x))
        if by == "neuron":
            shares = _by_neuron(model, out, shares, reader)
        if by == "head span":
            shares = _by_source(model, x, out, shares, reader, roles)
    return {name: share.cpu().numpy() for name, share in shares.items()}, numbers(metric(out.logits))


def _sites(model: Any, by: str) -> list[Site]:
    layers, more = range(model.spec.n_layers), {"neuron": ["mlp_post"], "head span": ["pattern"]}.get(by, [])
    sites = [Site("embed", positions="generation"), Site("final_scale", positions="generation")]
    parts = ["z", "attn_out", "mlp_out", *more]
    sites += [Site(part, layer, positions="generation") for part in parts for layer in layers]
    return sites + [Site("v", layer) for layer in layers if by == "head span"]


def _by_neuron(model: Any, out: Run, shares: dict[str, Tensor], reader: Tensor) -> dict[str, Tensor]:
    """Split every MLP's share into its units'; what is left (a bias, rounding) is a part of its own."""
    found: dict[str, Tensor] = {}
    for name, share in shares.items():
        if not name.endswith(" mlp"):
            found[name] = share
            continue
        layer = int(name.removesuffix(" mlp")[1:])
        columns = weight_of(layer_of(model, layer).down).to(reader)
        units = out.cache[hook_name("mlp_post", layer)][:, 0].double() * (reader @ columns)
        found |= {f"L{layer}N{unit}": units[:, unit] for unit in range(units.shape[1])}
        found[f"{name} bias"] = share - units.sum(1)
    return found


def _by_source(
    model: Any, x: AVInputs, out: Run, shares: dict[str, Tensor], reader: Tensor, roles: list[str]
) -> dict[str, Float[Tensor, "example source"]]:
    """Split every head's share by the role of the positions that it read; NaN where a part has no such source."""
    found, moved, group = dict[str, Tensor](), list[Tensor](), model.spec.n_heads // model.spec.n_kv_heads
    for layer in range(model.spec.n_layers):
        pattern = out.cache["pattern", layer][:, :, 0].double()
        v = heads_first(out.cache["v", layer], "v").double().repeat_interleave(group, dim=1)
        read = torch.einsum("hdm,bm->bhd", layer_of(model, layer).outputs().to(reader), reader)
        moved.append(pattern * torch.einsum("bhkd,bhd->bhk", v, read))
    places = [torch.from_numpy(x.spans[role].positions.copy()).to(reader.device) for role in roles]
    for name, share in shares.items():
        values = found[name] = reader.new_full((len(x), len(roles) + 1), torch.nan)
        if "H" not in name:
            values[:, -1] = share
            continue
        layer, head = map(int, name[1:].split("H"))
        for number, there in enumerate(places):
            values[:, number] = moved[layer][:, head, there].sum(-1) if len(there) else torch.nan
    return found


def linear_answers(metric: Metric, batch: int) -> tuple[Tensor, Tensor]:
    """Find the two tokens whose logits are compared."""
    if metric.kind != "logit_diff" or metric.ids is None or any(ids.shape[1:] != (1, 1) for ids in metric.ids):
        raise InputError(
            f"{metric.name} is not linear in the logits, so no shares sum to it. Use logit_diff(a, b) with two answers "
            "of one token each, without synonyms."
        )
    first, second = (ids[:, 0, 0].expand(batch) for ids in metric.ids)
    return first, second


def written_parts(
    model: Any, out: Run, by: str, added: Mapping[int, Float[Tensor, "batch d_model"]]
) -> dict[str, Float[Tensor, "batch d_model"]]:
    """Decompose the stream at the generation position; `added` is what the model adds to it after each layer."""
    parts = {"embed": out.cache[hook_name("embed")][:, 0].double()}
    for layer in range(model.spec.n_layers):
        attended = out.cache["attn_out", layer][:, 0].double()
        if by == "head":
            z = out.cache["z", layer][:, 0].double()
            heads = torch.einsum("bhd,hdm->bhm", z, layer_of(model, layer).outputs().to(z))
            parts |= {f"L{layer}H{head}": heads[:, head] for head in range(heads.shape[1])}
            parts[f"L{layer} attn bias"] = attended - heads.sum(1)
        else:
            parts[f"L{layer} attn"] = attended
        parts[f"L{layer} mlp"] = out.cache[hook_name("mlp_out", layer)][:, 0].double()
        parts |= {f"L{layer} added": added[layer].double()} if layer in added else {}
    if by != "component":
        return parts
    ends = ("embed", "attn", "mlp", "added")
    kinds = {kind: [part for name, part in parts.items() if name.endswith(kind)] for kind in ends}
    return {kind: torch.stack(some).sum(0) for kind, some in kinds.items() if some}
