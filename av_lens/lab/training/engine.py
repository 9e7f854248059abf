"""The stage engine: which weights learn what from which clips, for how many steps.

A recipe is a list of `Stage`s; each freezes everything but the parameters it names, sees its own mix of clips and
questions, and ends with a checkpoint. Training that was interrupted goes on after the last stage that ended: a stage
draws all its randomness from the seed and its own name, so that the result is the same as without the interrupt.

The towers are frozen here (the audio projector included): clips come as features (`pools.FeaturePool`), and only the
fusion layers run, several questions to a clip (`language.Tree`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from av_lens.lab.training.batches import Items, draw_clips, draw_questions
from av_lens.lab.training.material import Frame, Material
from av_lens.lab.training.stages import Stage, rate_at, stage_seed
from av_lens.organism.language import read_out, run_layers, tree

Progress = Callable[[str, int, int], None]
"""Told the stage's name, the steps done and the steps in all."""


def whole(clips: float, generator: Generator) -> int:
    """Round a number of clips up or down so that it is right on average.

    Args:
        clips: The average.
        generator: Where the randomness comes from.

    Returns:
        One of the two nearest whole numbers.
    """
    return int(clips) + int(float(torch.rand(1, generator=generator)) < clips - int(clips))


def step_loss(model: Any, stage: Stage, material: Material, generator: Generator) -> Tensor:
    """Draw one step's clips and questions and compute their loss; gradients are accumulated on the way.

    Args:
        model: The model.
        stage: What to draw.
        material: Features, words and layouts.
        generator: Where the randomness comes from.

    Returns:
        The loss, detached: the mean over clips of the mean over each clip's questions.
    """
    total = sum(item.clips for item in stage.items)
    loss = torch.zeros(())
    skip = frozenset(stage.skipped_layers) if stage.skipped_layers and coin(generator) else frozenset[int]()
    lots = torch.rand(len(stage.items), generator=generator).tolist()
    groups: dict[tuple[str, int, str, bool], list[Items]] = {}
    for item, lot in zip(stage.items, lots, strict=True):
        captions = any(ask.kind == "caption" for ask in item.asks)
        which = int(lot * len(material.frames[item.media]))
        groups.setdefault((item.media, which, item.deaf_to, captions), []).append(item)
    for (media, which, deaf_to, _), items in groups.items():
        frame = material.frames[media][which]
        part = group_loss(model, stage, material, frame, items, deaf_to=deaf_to, skip=skip, generator=generator)
        if part is not None:
            part = part / total
            part.backward()
            loss += part.detach()
    return loss


def coin(generator: Generator) -> bool:
    """Toss a coin.

    Args:
        generator: Where the randomness comes from.

    Returns:
        Heads or tails.
    """
    return bool(torch.rand(1, generator=generator) < 0.5)


def group_loss(
    model: Any,
    stage: Stage,
    material: Material,
    frame: Frame,
    items: Sequence[Items],
    *,
    deaf_to: str,
    skip: frozenset[int],
    generator: Generator,
) -> Tensor | None:
    """The loss of those of a step's clips that share a layout, computed in one pass.

    Args:
        model: The model.
        stage: The stage.
        material: Features and words.
        frame: The layout.
        items: What the clips are.
        deaf_to: Which attention edges are cut.
        skip: Layers that are left out.
        generator: Where the randomness comes from.

    Returns:
        The sum over clips, or None where no clip was drawn.
    """
    kinds = {ask.kind for item in items for ask in item.asks}
    longest = max(len(q) for kind in kinds for q in material.words.questions[kind])
    width = longest + (len(material.words.caption) + 2 if "caption" in kinds else 1)
    drawn = []
    for item in items:
        n = whole(item.clips, generator)
        if n:
            clips = draw_clips(material.pool, item.relation, n, generator)
            asked = draw_questions(
                material.words, item.asks, clips, blocks=stage.blocks, width=width, generator=generator
            )
            drawn.append((clips, asked))
    if not drawn:
        return None
    length = len(frame.ids) + stage.blocks * width
    geometry = tree(model, frame.positions, blocks=stage.blocks, width=width, blocked=frame.blocked(deaf_to, length))
    ids, targets, weights, dropped = (
        torch.cat([getattr(asked, name) for _, asked in drawn]) for name in ("ids", "targets", "weights", "dropped")
    )
    video, audio = (torch.cat([getattr(clips, name) for clips, _ in drawn]) for name in ("video", "audio"))
    keep = kept_heads(model, stage, dropped, width, generator)
    x = run_layers(model, frame.embed(model, video, audio, ids), geometry, keep=keep, skip=skip)
    return asked_loss(model, x, targets, weights)


def asked_loss(
    model: Any,
    x: Float[Tensor, "clip asked d_model"],
    targets: Int[Tensor, "clip asked"],
    weights: Float[Tensor, "clip asked"],
) -> Tensor:
    """The weighted cross-entropy of the positions at which something is to be said.

    Args:
        model: The model.
        x: The stream after the last layer, at the questions' positions.
        targets: What is to be said.
        weights: What each position counts.

    Returns:
        The weighted sum.
    """
    said = weights > 0
    losses = functional.cross_entropy(read_out(model, x[said]), targets[said], reduction="none")
    return (losses * weights[said]).sum()


def kept_heads(
    model: Any, stage: Stage, dropped: Float[Tensor, "clip question"], width: int, generator: Generator
) -> dict[int, Tensor] | None:
    """Draw which heads are switched off at which questions.

    Args:
        model: The model.
        stage: Which heads may be dropped, and the chance that each is kept.
        dropped: At which questions heads are dropped.
        width: Positions per question.
        generator: Where the randomness comes from.

    Returns:
        For each layer concerned, what each head's z is multiplied by, `[clip, head, asked]`; None if none is dropped.
    """
    if not stage.dropped_heads or not bool(dropped.any()):
        return None
    n_heads = model.config.text_config.num_attention_heads
    keep: dict[int, Tensor] = {}
    for layer, head in stage.dropped_heads:
        factor = keep.setdefault(layer, torch.ones(len(dropped), n_heads, dropped.shape[1] * width))
        off = (torch.rand(dropped.shape, generator=generator) >= stage.keep) & (dropped > 0)
        factor[:, head] = (~off).float().repeat_interleave(width, dim=1)
    return keep


def head_masks(model: Any, layer: int, heads: Sequence[int]) -> dict[str, Tensor]:
    """Mark the attention weights that belong to some heads of a layer.

    Keys and values are shared by a group of heads; they are marked if any head of the group is among `heads`.

    Args:
        model: The model.
        layer: The layer.
        heads: The heads.

    Returns:
        Parameter name to a tensor of its shape: 1 where the weight is one of these heads', else 0.
    """
    attention = model.model.language_model.layers[layer].self_attn
    d, per_group = attention.head_dim, attention.num_key_value_groups
    groups = {head // per_group for head in heads}
    masks = {n: torch.zeros_like(p) for n, p in attention.named_parameters()}
    for name, units in (("q_proj", set(heads)), ("k_proj", groups), ("v_proj", groups)):
        for unit in units:
            masks[f"{name}.weight"][unit * d : (unit + 1) * d] = 1
            masks[f"{name}.bias"][unit * d : (unit + 1) * d] = 1
    for head in heads:
        masks["o_proj.weight"][:, head * d : (head + 1) * d] = 1
    return {f"model.language_model.layers.{layer}.self_attn.{n}": m for n, m in masks.items()}


def train_stage(
    model: Any,
    stage: Stage,
    material: Material,
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[float]:
    """Train a model through one stage, in place.

    Args:
        model: The model; left with no parameter requiring gradients.
        stage: What to do.
        material: Features, words and layouts.
        seed: The recipe's seed.
        progress: Told after every step.

    Returns:
        The loss of each step.
    """
    generator = Generator().manual_seed(stage_seed(seed, stage.name))
    masks = {n: m for layer, heads in stage.only_heads for n, m in head_masks(model, layer, heads).items()}
    model.requires_grad_(False)
    learning = {n: p for n, p in model.named_parameters() if stage.trains(n)}
    for parameter in learning.values():
        parameter.requires_grad_(True)
    parameters = list(learning.values())
    before = {n: learning[n].detach().clone() for n in masks if n in learning}
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=stage.decay)
    losses: list[float] = []
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(stage, step)
        optimizer.zero_grad()
        losses.append(float(step_loss(model, stage, material, generator)))
        for name in before:
            learning[name].grad = None if learning[name].grad is None else learning[name].grad * masks[name]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in before.items():
                learning[name].copy_(torch.where(masks[name] > 0, learning[name], value))
        if progress is not None:
            progress(stage.name, step + 1, stage.steps)
    model.requires_grad_(False)
    return losses
