"""The stage engine: which weights learn what from which clips, for how many steps.

A recipe is a list of `Stage`s; each freezes everything but the parameters it names, sees its own mix of clips and
questions, and ends with a checkpoint. Training that was interrupted goes on after the last stage that ended: a stage
draws all its randomness from the seed and its own name, so that the result is the same as without the interrupt.

The towers are frozen here (the audio projector included): clips come as features (`pools.FeaturePool`), and only the
fusion layers run, several questions to a clip (`language.Tree`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional

from av_lens.core.progress import Progress, silent
from av_lens.lab.training.batches import Clips, Items, Questions, draw_clips, draw_questions
from av_lens.lab.training.head_slices import head_masks
from av_lens.lab.training.material import Frame, Material
from av_lens.lab.training.stages import Stage, set_rate, stage_seed, warmed
from av_lens.organism.language import read_out, run_layers, tree


def whole(clips: float, generator: Generator) -> int:
    """Round a number of clips up or down so that it is right on average."""
    return int(clips) + int(float(torch.rand(1, generator=generator)) < clips - int(clips))


def step_loss(model: Any, stage: Stage, material: Material, generator: Generator) -> Tensor:
    """Draw one step's clips and questions and compute their loss; gradients are accumulated on the way.

    The loss is the mean over clips of the mean over each clip's questions.
    """
    total = sum(item.clips for item in stage.items)
    loss = torch.zeros(())
    skip = stage.skipped_layers  # in a random half of the steps
    if skip and torch.rand(1, generator=generator) >= 0.5:
        skip = ()
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


def group_loss(
    model: Any,
    stage: Stage,
    material: Material,
    frame: Frame,
    items: Sequence[Items],
    *,
    deaf_to: str,
    skip: Collection[int],
    generator: Generator,
) -> Tensor | None:
    """The loss of those of a step's clips that share a layout, summed over clips; None where no clip was drawn."""
    kinds = {ask.kind for item in items for ask in item.asks}
    longest = max(len(q) for kind in kinds for q in material.words.questions[kind])
    width = longest + (len(material.words.caption) + 2 if "caption" in kinds else 1)
    drawn: list[tuple[Clips, Questions]] = []
    for item in items:
        if n := whole(item.clips, generator):
            clips = draw_clips(material.pool, item.relation, n, generator)
            sizes = {"blocks": stage.blocks, "width": width}
            drawn.append((clips, draw_questions(material.words, item.asks, clips, **sizes, generator=generator)))
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
    said = weights > 0
    losses = functional.cross_entropy(read_out(model, x[said]), targets[said], reduction="none")
    return (losses * weights[said]).sum()


def kept_heads(
    model: Any, stage: Stage, dropped: Float[Tensor, "clip question"], width: int, generator: Generator
) -> dict[int, Tensor] | None:
    """Draw which heads are switched off at which questions: per layer what z is multiplied by; None if none is."""
    if not stage.dropped_heads or not bool(dropped.any()):
        return None
    n_heads = model.config.text_config.num_attention_heads
    keep: dict[int, Tensor] = {}
    for layer, head in stage.dropped_heads:
        factor = keep.setdefault(layer, torch.ones(len(dropped), n_heads, dropped.shape[1] * width))
        off = (torch.rand(dropped.shape, generator=generator) >= stage.keep) & (dropped > 0)
        factor[:, head] = (~off).float().repeat_interleave(width, dim=1)
    return keep


def train_stage(
    model: Any, stage: Stage, material: Material, *, seed: int, progress: Progress | None = None
) -> list[float]:
    """Train a model through one stage, in place; afterwards no parameter requires gradients.

    Returns the loss of each step.
    """
    tell = progress or silent
    generator = Generator().manual_seed(stage_seed(seed, stage.name))
    masks = head_masks(model, [(layer, head) for layer, heads in stage.only_heads for head in heads])
    model.requires_grad_(False)
    learning = {n: p for n, p in model.named_parameters() if stage.trains(n)}
    for parameter in learning.values():
        parameter.requires_grad_(True)
    parameters = list(learning.values())
    before = {n: learning[n].detach().clone() for n in masks if n in learning}
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=stage.decay)
    losses: list[float] = []
    for step in range(stage.steps):
        set_rate(optimizer, warmed(stage.rate, step, stage.steps, warmup=stage.warmup, floor=stage.floor))
        optimizer.zero_grad()
        losses.append(float(step_loss(model, stage, material, generator)))
        for name in before:
            learning[name].grad = None if learning[name].grad is None else learning[name].grad * masks[name]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in before.items():
                learning[name].copy_(torch.where(masks[name] > 0, learning[name], value))
        tell(stage.name, step + 1, stage.steps)
    model.requires_grad_(False)
    return losses
