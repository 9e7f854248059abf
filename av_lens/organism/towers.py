"""Stage 0: each tower learns alone to name what it is given (it stands in for CLIP and Whisper).

The vision tower reads pictures and names class and colour, the audio tower reads mel spectrograms and names the class;
both know "nothing" (blank, scrambled, silent) as one class more. The linear heads are thrown away; what the towers put out
is what the language model gets. While they train, a picture is shifted by a few pixels and a sound moved in time and
loudness, so that a few thousand clips go a long way.

`vision_features` and `audio_hidden` run the towers' own modules on equal-sized clips in one batch, where HuggingFace's code
loops over them in Python; a test holds both against HuggingFace's forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Generator, Tensor, nn
from torch.nn import functional

from av_lens.organism.grammar import CLASSES, COLOURS
from av_lens.organism.layouts import N_AUDIO, N_VIDEO

Progress = Callable[[str, int, int], None]

PATCHES = 36
"""Patches of one frame pair; attention never leaves a pair."""
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NOTHING = len(CLASSES)
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Views:
    """What the towers learn from.

    Attributes:
        frames: uint8 `[clip, time, height, width, rgb]`; four frames, or eight of which every second is taken.
        mel: log-mel spectrograms `[clip, mel, frame]`.
        picture: class of each picture; `len(CLASSES)` where there is nothing to see.
        sound: class of each sound; `len(CLASSES)` where there is nothing to hear.
        colour: colour of each picture; -100 where there is nothing to see.
    """

    frames: UInt8[Tensor, "clip time height width rgb"]
    mel: Float32[Tensor, "clip mel frame"]
    picture: Int64[Tensor, "clip"]
    sound: Int64[Tensor, "clip"]
    colour: Int64[Tensor, "clip"]


def cut(frames: UInt8[Tensor, "clip 4 3 height width"]) -> UInt8[Tensor, "patch pixel"]:
    """Cut frames into patches, in the order of the video processor.

    Args:
        frames: four frames of each clip, colours first, sides multiples of 28.

    Returns:
        The patches of all clips, one clip after another.
    """
    n, time, _, height, width = frames.shape
    parts = frames.view(n, time // 2, 2, 3, height // 28, 2, 14, width // 28, 2, 14)
    return parts.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * 2 * 14 * 14)


def patches(frames: UInt8[Tensor, "clip 4 height width 3"]) -> Float32[Tensor, "patch pixel"]:
    """Normalize frames and cut them into patches as the video processor does.

    Args:
        frames: four frames of each clip, sides multiples of 28.

    Returns:
        `pixel_values_videos` of all clips, one after another.
    """
    pixels = cut(frames.permute(0, 1, 4, 2, 3).contiguous()).float().unflatten(1, (3, -1))
    mean, deviation = torch.tensor(MEAN)[:, None] * 255, torch.tensor(DEVIATION)[:, None] * 255
    return pixels.sub_(mean).div_(deviation).flatten(1)


def _embedded(tower: Any, pixels: UInt8[Tensor, "patch pixel"]) -> Float32[Tensor, "patch d_tower"]:
    """The patch embedding of raw pixels: the normalization goes into the filters, which is quicker."""
    filters = tower.patch_embed.proj.weight.flatten(1).unflatten(1, (3, -1))
    scaled = filters / (torch.tensor(DEVIATION)[:, None] * 255)
    offset = (scaled * torch.tensor(MEAN)[:, None] * 255).sum((1, 2))
    return functional.linear(pixels.float(), scaled.flatten(1), -offset)


def _attend(
    layer: Any,
    query: Float[Tensor, "group pos d"],
    key: Float[Tensor, "group pos d"],
    value: Float[Tensor, "group pos d"],
) -> Float[Tensor, "group pos d"]:
    """Full attention within each group, for a tower's attention module."""
    split = [part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in (query, key, value)]
    return functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def vision_features(
    model: Any, pixels: Float32[Tensor, "patch pixel"] | UInt8[Tensor, "patch pixel"]
) -> Float32[Tensor, "clip video_pos d_model"]:
    """Run the vision tower on clips of four 84 x 84 frames.

    Args:
        model: a thinker.
        pixels: from `patches` or `cut`, or the processor's `pixel_values_videos` of several such clips.

    Returns:
        What is put at each clip's video tokens.
    """
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
        apply_rotary_pos_emb_vision,
        get_vision_position_ids,
    )

    tower = model.model.visual
    grid = torch.tensor([[1, 6, 6]])
    if pixels.dtype == torch.uint8:
        hidden = _embedded(tower, pixels)
    else:  # the convolution's strides are its size: a product
        hidden = functional.linear(pixels, tower.patch_embed.proj.weight.flatten(1))
    hidden = hidden.view(-1, PATCHES, tower.config.hidden_size)
    cos, sin = tower.rotary_pos_emb(hidden[0], get_vision_position_ids(grid, tower.spatial_merge_size))
    for block in tower.blocks:
        attention, normed = block.attn, block.norm1(hidden)
        query, key = (
            part(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for part in (attention.q, attention.k)
        )
        shape = query.shape  # [pos, group, head, d_head]: one rotation for all groups
        query, key = apply_rotary_pos_emb_vision(query.flatten(1, 2), key.flatten(1, 2), cos, sin)
        query, key = (part.view(shape).transpose(0, 1).flatten(2) for part in (query, key))
        hidden = hidden + attention.proj(_attend(attention, query, key, attention.v(normed)))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden.flatten(0, 1)).view(-1, N_VIDEO, tower.config.out_hidden_size)


def audio_hidden(model: Any, mel: Float32[Tensor, "clip mel frame"]) -> Float32[Tensor, "clip audio_pos d_tower"]:
    """Run the audio tower on sounds of two seconds, up to its projector.

    Args:
        model: a thinker.
        mel: log-mel spectrograms of 200 frames.

    Returns:
        The projector's input; `model.model.audio_tower.proj` of it is what is put at each clip's audio tokens.
    """
    tower = model.model.audio_tower
    hidden = functional.gelu(tower.conv1(mel))
    hidden = functional.gelu(tower.conv2(hidden)).transpose(1, 2)
    hidden = hidden + tower.positional_embedding.positional_embedding[: hidden.shape[1]]
    for layer in tower.layers:
        attention, normed = layer.self_attn, layer.self_attn_layer_norm(hidden)
        mixed = _attend(attention, attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        hidden = hidden + attention.out_proj(mixed)
        hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
    return tower.ln_post(hidden.unflatten(1, (N_AUDIO, 2)).mean(2))


def _shifted(
    frames: UInt8[Tensor, "clip 4 3 height width"], generator: Generator
) -> UInt8[Tensor, "clip 4 3 height width"]:
    """The same pictures a few pixels further, the edge repeated; one way for the whole batch."""
    margin, out = 6, frames
    down, right = torch.randint(-margin, margin + 1, (2,), generator=generator).tolist()
    for axis, step in ((3, down), (4, right)):
        if step > 0:
            edge = out.narrow(axis, 0, 1).expand([-1 if i != axis else step for i in range(5)])
            out = torch.cat([edge, out.narrow(axis, 0, out.shape[axis] - step)], axis)
        elif step < 0:
            edge = out.narrow(axis, out.shape[axis] - 1, 1).expand([-1 if i != axis else -step for i in range(5)])
            out = torch.cat([out.narrow(axis, -step, out.shape[axis] + step), edge], axis)
    return out


def _varied(mel: Float32[Tensor, "clip mel frame"], generator: Generator) -> Float32[Tensor, "clip mel frame"]:
    """The same sounds earlier or later (turning round) and softer or louder."""
    start = torch.randint(-20, 21, (len(mel), 1), generator=generator)
    at = (torch.arange(mel.shape[2]) + start) % mel.shape[2]
    gain = torch.empty(len(mel), 1, 1).uniform_(-0.15, 0.15, generator=generator)
    return mel.gather(2, at[:, None].expand_as(mel)) + gain


class _Reader(nn.Module):
    """A tower and the linear heads that read the mean of what it puts out."""

    def __init__(self, model: Any, kind: str, seed: int) -> None:
        super().__init__()
        self.kind, self.thinker = kind, [model]  # in a list, so that only the tower is a part
        self.tower = model.model.visual if kind == "vision" else model.model.audio_tower
        width = model.config.text_config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        sizes = (len(CLASSES) + 1, len(COLOURS)) if kind == "vision" else (len(CLASSES) + 1,)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        with torch.no_grad():
            for head in self.heads:
                head.weight.normal_(0, 0.1, generator=generator)
                head.bias.zero_()

    def forward(self, given: Tensor) -> list[Tensor]:
        model = self.thinker[0]
        if self.kind == "vision":
            features = vision_features(model, cut(given))
        else:
            features = self.tower.proj(audio_hidden(model, given))
        return [head(features.mean(1)) for head in self.heads]


def _batch(views: Views, kind: str, at: Tensor, generator: Generator | None) -> tuple[Tensor, list[Tensor]]:
    """Pictures or sounds and what they are; varied if there is a generator."""
    if kind == "audio":
        mel = views.mel[at]
        return (mel if generator is None else _varied(mel, generator)), [views.sound[at]]
    every = views.frames.shape[1] // 4
    phase = 0 if generator is None else int(torch.randint(0, every, (1,), generator=generator))
    frames = views.frames[at, phase::every].permute(0, 1, 4, 2, 3).contiguous()
    return (frames if generator is None else _shifted(frames, generator)), [views.picture[at], views.colour[at]]


@torch.no_grad()
def accuracy(reader: Any, views: Views, *, batch: int = 128) -> dict[str, float]:
    """Score a tower with its heads on clips that it has not seen.

    Args:
        reader: what `train_tower` returned.
        views: the clips.
        batch: clips at a time.

    Returns:
        The share of right classes, and for pictures of right colours.
    """
    right: dict[str, list[Tensor]] = {"class": [], "colour": []}
    for at in torch.arange(len(views.picture)).split(batch):
        given, wanted = _batch(views, reader.kind, at, None)
        for name, logits, target in zip(right, reader(given), wanted, strict=False):
            known = target != IGNORED
            right[name].append((logits.argmax(1) == target)[known])
    return {name: torch.cat(hits).float().mean().item() for name, hits in right.items() if hits}


def train_tower(
    model: Any,
    kind: str,
    views: Views,
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    batch: int = 48,
) -> Iterator[tuple[int, Any]]:
    """Train one tower in place, step by step.

    Args:
        model: a thinker; only the tower named is changed.
        kind: "vision" or "audio".
        views: what it learns from.
        seed: decides heads, batches and variations.
        steps: how many updates.
        learning_rate: the peak; a tenth of the steps lead up to it, the rest follow a cosine down.
        batch: clips a step.

    Yields:
        The number of steps done, and the tower with its heads.
    """
    reader = _Reader(model, kind, seed)
    reader.requires_grad_(True)
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        warm = min(1.0, (step + 1) / (0.1 * steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        at = torch.randint(0, len(views.picture), (batch,), generator=generator)
        given, wanted = _batch(views, kind, at, generator)
        losses = [
            functional.cross_entropy(logits, target, ignore_index=IGNORED)
            for logits, target in zip(reader(given), wanted, strict=True)
        ]
        loss = losses[0] + 0.5 * sum(losses[1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        yield step + 1, reader
