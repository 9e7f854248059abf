"""What a stage of a recipe is: which weights learn what from which clips, for how many steps."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from av_lens.lab.training.batches import Items


def is_fusion(name: str) -> bool:
    """Say whether a parameter belongs to the fusion layers (embeddings, norms and the unembedding included).

    Args:
        name: The parameter's HuggingFace name.

    Returns:
        Whether it does; False for the towers.
    """
    return "language_model" in name or "lm_head" in name


def layer_of(name: str) -> int | None:
    """Find the fusion layer that a parameter belongs to.

    Args:
        name: The parameter's HuggingFace name.

    Returns:
        The layer, or None for embeddings, the final norm, the unembedding and the towers.
    """
    _, found, rest = name.partition("language_model.layers.")
    return int(rest.split(".")[0]) if found else None


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
        """Say whether a parameter learns in this stage.

        Args:
            name: Its HuggingFace name.

        Returns:
            Whether it does; never for the towers.
        """
        layer = layer_of(name)
        if layer is None:
            return self.text and is_fusion(name)
        return layer in self.layers and (not self.attention_only or "self_attn" in name)


def rate_at(stage: Stage, step: int) -> float:
    """The learning rate of a step.

    Args:
        stage: The stage.
        step: The step, from 0.

    Returns:
        Warm-up, then a cosine down to the floor.
    """
    wave = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return stage.rate * min(1.0, (step + 1) / stage.warmup) * (stage.floor + (1 - stage.floor) * wave)


def stage_seed(seed: int, name: str) -> int:
    """Derive a stage's seed.

    Args:
        seed: The recipe's seed.
        name: The stage's name.

    Returns:
        A seed that differs between stages and between recipes' seeds.
    """
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:6], "big")
