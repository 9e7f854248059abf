"""The arithmetic under the metrics: scores of answers from logits, without words or models.

Answers come as token ids `[example or 1, option, token]`, padded with -1. An option without tokens does not exist for
that example: it scores minus infinity (its rank: infinity), so that pooling passes over it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from av_lens.errors import InputError
from av_lens.inputs.answers import Answer


def padded(answers: Sequence[Answer]) -> Int64[Tensor, "example option token"]:
    """Bring answers to one tensor."""
    options = max(len(answer.options) for answer in answers)
    tokens = max(answer.n_tokens for answer in answers)
    ids = torch.full((len(answers), options, tokens), -1, dtype=torch.long)
    for row, answer in zip(ids, answers, strict=True):
        for place, option in zip(row, answer.options, strict=False):
            place[: len(option)] = torch.tensor(option)
    return ids


def filled(tokens: Int64[Tensor, "example token"]) -> Int64[Tensor, "example token"]:
    """Replace padding by the token before it, so that it can be run; what follows an answer does not change it."""
    found = tokens.clone()
    for i in range(found.shape[1]):
        missing = found[:, i] < 0
        found[missing, i] = found[missing, i - 1] if i else 0
    return found


def per_option(
    ids: Int64[Tensor, "example option token"], logits: Float[Tensor, "batch d_vocab"], kind: str
) -> Float[Tensor, "batch option"]:
    """Score one-token options at the generation position."""
    tokens = ids[..., 0].to(logits.device).expand(logits.shape[0], -1)
    if kind in ("log_prob", "prob"):
        logits = logits.log_softmax(-1)
    values = logits.gather(-1, tokens.clamp(min=0))
    if kind == "rank":
        ranks = (logits[:, None] > values[..., None]).sum(-1).to(logits.dtype)
        return ranks.masked_fill(tokens < 0, torch.inf)
    return values.masked_fill(tokens < 0, -torch.inf)


def summed_log_prob(
    tokens: Int64[Tensor, "batch token"], logits: Float[Tensor, "batch token d_vocab"]
) -> tuple[Float[Tensor, " batch"], Int64[Tensor, " batch"]]:
    """Score one option of several tokens by teacher forcing."""
    there = tokens >= 0
    each = logits.log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    total = each.masked_fill(~there, 0.0).sum(-1)
    return total.masked_fill(~there.any(-1), -torch.inf), there.sum(-1)


def worst_rank(
    tokens: Int64[Tensor, "batch token"], logits: Float[Tensor, "batch token d_vocab"]
) -> Float[Tensor, " batch"]:
    """Rank one option of several tokens: the worst rank along it."""
    there = tokens >= 0
    values = logits.gather(-1, tokens.clamp(min=0)[..., None])
    ranks = (logits > values).sum(-1).masked_fill(~there, -1).amax(-1).to(logits.dtype)
    return ranks.masked_fill(~there.any(-1), torch.inf)


def unequal_lengths(answers: Sequence[Int64[Tensor, "_ _ _"]]) -> Bool[Tensor, " _"]:
    """Say for which examples the answers' options have unequal numbers of tokens."""
    examples = max(ids.shape[0] for ids in answers)
    lengths = torch.cat([(ids >= 0).sum(-1).expand(examples, -1) for ids in answers], dim=1)
    longest, shortest = lengths.amax(1), lengths.masked_fill(lengths == 0, 2**31).amin(1)
    return longest != shortest


def combined(kind: str, sides: Sequence[Sequence[Float[Tensor, " batch"]]]) -> Float[Tensor, " batch"]:
    """Pool each answer's options, and take the difference of two answers."""
    if kind == "rank":
        return torch.stack(list(sides[0]), dim=-1).amin(-1)
    pooled = [torch.stack(list(side), dim=-1).logsumexp(-1) if len(side) > 1 else side[0] for side in sides]
    if kind == "logit_diff":
        return pooled[0] - pooled[1]
    return pooled[0].exp() if kind == "prob" else pooled[0]


def divergence(
    reference: Float[Tensor, "..."], logits: Float[Tensor, "batch asked_pos d_vocab"]
) -> Float[Tensor, " batch"]:
    """KL(reference || run) in nats, averaged over the asked positions that both have, from the last backwards."""
    reference = reference[:, None] if reference.ndim == 2 else reference
    shared = min(reference.shape[1], logits.shape[1])
    if reference.shape[0] not in (1, logits.shape[0]) or reference.shape[2] != logits.shape[2]:
        raise InputError(
            f"kl: the reference has shape {tuple(reference.shape)}, the run's logits {tuple(logits.shape)}; "
            "batch and vocabulary must be equal."
        )
    target = reference[:, -shared:].to(logits.device).double().log_softmax(-1)
    found = logits[:, -shared:].double().log_softmax(-1)
    return (target.exp() * (target - found)).sum(-1).mean(-1).to(logits.dtype)
