"""What a stage of a recipe is: which weights learn what from which clips, for how many steps."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from av_lens.lab.training.batches import Items


def is_fusion(name: str) -> bool:
    """Say whether a parameter belongs to the fusion layers (embeddings, norms and the unembedding included)."""
    return "language_model" in name or "lm_head" in name


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: What the stage is for; part of its seed.
        items: What a step is made of.
        steps: How many steps.
        rate: The highest learning rate.
        layers: The fusion layers that learn.
        text: Whether the embeddings, the final norm and the unembedding learn too.
        attention_only: Whether only the attention of these layers learns (not the norms and the MLPs).
        blocks: Questions per clip.
        dropped_heads: Heads that are dropped at questions whose `Ask.drop` says so.
        keep: The chance that such a head is kept there.
        skipped_layers: Layers that are left out in a random half of the steps.
        only_heads: Layers of which only some heads' attention weights learn, with these heads.
        warmup: Steps until the learning rate is reached; it then falls as a cosine to `floor`.
        floor: The last step's share of the learning rate.
        decay: Weight decay.
    """

    name: str
    items: tuple[Items, ...]
    steps: int
    rate: float
    layers: tuple[int, ...]
    text: bool = False
    attention_only: bool = False
    blocks: int = 3
    dropped_heads: tuple[tuple[int, int], ...] = ()
    keep: float = 0.3
    skipped_layers: tuple[int, ...] = ()
    only_heads: tuple[tuple[int, tuple[int, ...]], ...] = ()
    warmup: int = 20
    floor: float = 0.05
    decay: float = 0.01

    def trains(self, name: str) -> bool:
        """Say whether a parameter learns in this stage; the towers' never do."""
        _, inside, rest = name.partition("language_model.layers.")
        if not inside:
            return self.text and is_fusion(name)
        return int(rest.split(".")[0]) in self.layers and (not self.attention_only or "self_attn" in name)


def warmed(rate: float, step: int, steps: int, *, warmup: float, floor: float) -> float:
    """The learning rate of a step: `warmup` steps up to the highest, then a cosine down to `floor` of it."""
    wave = 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * wave)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all that an optimizer trains one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def stage_seed(seed: int, name: str) -> int:
    """Derive a stage's seed, which differs between stages and between recipes' seeds."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:6], "big")
