"""The towers on many clips at once: what they put out for clips of two seconds, quickly and with gradients.

`vision_features` and `audio_hidden` run the towers' own modules on equal-sized clips in one batch, where HuggingFace's
code loops over them in Python; a test holds both against HuggingFace's forward. Nothing else is assumed: a frame pair
is 36 patches that attend to one another, a sound is one window of 200 mel frames.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from av_lens.organism.grammar import CLASSES
from av_lens.organism.layouts import N_AUDIO, N_VIDEO

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
    picture: Int64[Tensor, " clip"]
    sound: Int64[Tensor, " clip"]
    colour: Int64[Tensor, " clip"]

    def taken(self, at: Int64[Tensor, "taken"]) -> Views:
        """Take some of the clips."""
        return Views(*(getattr(self, field.name)[at] for field in fields(self)))


def cut(frames: UInt8[Tensor, "clip 4 3 height width"]) -> UInt8[Tensor, "patch pixel"]:
    """Cut frames into patches, in the order of the video processor."""
    n, time, _, height, width = frames.shape
    parts = frames.view(n, time // 2, 2, 3, height // 28, 2, 14, width // 28, 2, 14)
    return parts.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * 2 * 14 * 14)


def patches(frames: UInt8[Tensor, "clip 4 height width 3"]) -> Float32[Tensor, "patch pixel"]:
    """Normalize frames and cut them into patches as the video processor does."""
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
    q, k, v = (part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def vision_features(
    model: Any, pixels: Float32[Tensor, "patch pixel"] | UInt8[Tensor, "patch pixel"]
) -> Float32[Tensor, "clip video_pos d_model"]:
    """Run the vision tower on clips of four 84 x 84 frames."""
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb_vision
    from transformers.vision_utils import get_vision_position_ids

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
    """Run the audio tower on sounds of two seconds, up to its projector."""
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


@torch.no_grad()
def watch(model: Any, views: Views, *, batch: int = 120) -> tuple[Tensor, Tensor]:
    """Run both towers over clips."""
    seen = [vision_features(model, patches(frames[:, :: frames.shape[1] // 4])) for frames in views.frames.split(batch)]
    heard = [audio_hidden(model, mel) for mel in views.mel.split(batch)]
    return torch.cat(seen), torch.cat(heard)
