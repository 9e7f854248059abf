"""Phi-4-multimodal: a Phi-3 decoder that reads an image and a sound in its stream.

A token of sound is 8 mel frames, 80 ms: three convolutions of stride 2. An image is cut into crops, and comes twice:
first its own tokens, row by row, without the white that fills the last crops; then one token that parts the two; then
the whole with that white, 16 x 16, as one crop. Every row ends with a token of its own. Rows and columns here are those
of the first; a token of the whole stands at the first of the patches that it covers; those between stand at none. There
is no video: of a clip the frame nearest to its middle is shown.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from transformers import Phi4MultimodalForCausalLM

from av_lens.errors import InputError
from av_lens.families.adapter import causal_decoder, decoder_adapter
from av_lens.families.media_layout import (
    Features,
    Media,
    MediaLayout,
    Picture,
    Sound,
    TensorAxes,
    frames_of,
    middle_frame,
    on_screen,
)
from av_lens.families.one_stream import Counted, position_ids
from av_lens.families.qwen_media import QwenMedia
from av_lens.families.registry import Family
from av_lens.media.clip import Clip

FRAMES_PER_TOKEN = 8


@dataclass(frozen=True, eq=False)
class Crops(Picture):
    """An image as crops, the whole first."""

    pixels: Float[Tensor, "1 crop 3 height width"]  # `[1, crop, rgb, height, width]`
    told: Mapping[str, Tensor]  # what the model is told beside them
    places: Int64[np.ndarray, "2 token"]  # row and column of each token, -1 where it has none, `[2, token]`


def shown(size: Tensor, mask: Tensor, crop: int) -> tuple[int, int, int, int]:
    """Rows and columns of an image's own tokens, and of its crops; the mask `[crop, patch, patch]` leaves white out."""
    down, across = (int(one) // crop for one in size)
    inside = mask[1 : down * across + 1, ::2, ::2]
    rows = inside[::across, :, 0].sum()
    return int(rows), int(inside[:across, 0].sum()), down, across


def places(size: Tensor, mask: Tensor, crop: int) -> Int64[np.ndarray, "2 token"]:
    """Row and column of each token of an image, in their order."""
    rows, cols, down, across = shown(size, mask, crop)
    side = -(-mask.shape[-1] // 2)
    own, whole = np.indices((rows, cols)), np.indices((side, side)) * np.array([down, across])[:, None, None]
    ended = [np.pad(grid, ((0, 0), (0, 0), (0, 1)), constant_values=-1).reshape(2, -1) for grid in (own, whole)]
    return np.concatenate((ended[0], np.full((2, 1), -1), ended[1]), axis=1)


class Phi4Features(Features):
    """What this processor's parts make of a sound and an image."""

    ears = "audio_processor"

    def _image(self, clip: Clip) -> Picture:
        part = self.processor.image_processor
        chosen = middle_frame(clip)
        frame = torch.from_numpy(np.array(frames_of(clip)[chosen])).permute(2, 0, 1)
        made = part(images=[frame], return_tensors="pt")
        told = {name: made[name] for name in ("image_sizes", "image_attention_mask")}
        at = places(made["image_sizes"][0], made["image_attention_mask"][0], int(part.size["height"]))
        edges, grid = on_screen(clip, np.array([[chosen]])), (1, at.shape[1], 1)
        pixels = made["image_pixel_values"]
        return Crops("image", pixels, grid, 1, 1.0, *edges, frames=(chosen,), told=told, places=at)

    def _sound(self, clip: Clip) -> Sound:
        part = self.processor.audio_processor
        waveform, rate = self.waveform(clip, math.inf), self.rate
        if len(waveform) < part.win_length:
            raise InputError(
                f"the sound lasts {len(waveform) / rate * 1000:.0f} ms, and one frame of this model's spectrogram "
                f"{part.win_length / rate * 1000:.0f}: give a longer clip"
            )
        made = part([waveform], sampling_rate=rate, return_tensors="pt")
        mel = made["audio_input_features"].transpose(1, 2)
        return Sound(mel, len(waveform) / rate, int(part.hop_length) / rate)


class Phi4Media(QwenMedia):
    """Media in the prompts of Phi-4-multimodal."""

    parts = ("tokenizer", "image_processor", "audio_processor")
    kinds = ("audio", "image")
    axes = TensorAxes()
    system_turn = None
    disagreement = ""
    features_class = Phi4Features
    frames_per_token = FRAMES_PER_TOKEN

    @classmethod
    def placeholders(cls, config: Any) -> dict[str, int]:
        """As the towers' configurations say."""
        return {"audio": int(config.audio_config.audio_token_id), "image": int(config.vision_config.image_token_id)}

    @classmethod
    def clock_rate(cls, config: Any) -> float:
        """One id for each token, of 80 ms."""
        return 12.5

    def sound_tokens(self, mel_frames: int) -> int:
        """Count the tokens of a sound."""
        return -(-mel_frames // FRAMES_PER_TOKEN)

    require_frame_rate = MediaLayout.require_frame_rate
    expected_positions = MediaLayout.expected_positions

    def bare(self, kind: str) -> str:
        """The placeholder alone."""
        return getattr(self.processor, f"{kind}_token")

    def tensors(self, ids: np.ndarray, media: Media) -> dict[str, Any]:
        """As one call of the processor names them."""
        made = MediaLayout.tensors(self, ids, media)
        if isinstance(media.picture, Crops):
            made |= {"image_pixel_values": media.picture.pixels, **media.picture.told}
        if media.sound is not None:
            made["audio_input_features"] = media.sound.mel.transpose(1, 2)
            made["audio_embed_sizes"] = torch.tensor([self.sound_tokens(media.sound.n_frames)])
        return made

    def _placed(self, ids: np.ndarray, media: Media) -> tuple[np.ndarray, Shaped[np.ndarray, "4 pos"]]:
        kinds, placed = super()._placed(ids, replace(media, picture=None))
        if isinstance(media.picture, Crops):
            placed[1:3, kinds == "image"] = media.picture.places
        return kinds, placed

    def _seconds(self, kinds: np.ndarray, placed: np.ndarray, media: Media) -> Shaped[np.ndarray, "2 media"]:
        times = super()._seconds(kinds, placed, media)
        return np.where(kinds[kinds != ""] == "audio", times, np.nan)


class Seeing(Counted):
    """Mixed into the inner model."""

    def rows(self, told: Mapping[str, Any]) -> dict[str, Int64[Tensor, " item"]]:
        """Of a sound as many as asked, up to what its frames come to; of an image its places."""
        found: dict[str, Tensor] = {}
        if told.get("audio_input_features") is not None:
            most = -(-told["audio_input_features"].shape[1] // FRAMES_PER_TOKEN)
            found["audio"] = torch.as_tensor(told["audio_embed_sizes"]).clamp(max=most)
        if told.get("image_pixel_values") is not None:
            images = zip(told["image_sizes"], told["image_attention_mask"], strict=True)
            crop = self.config.vision_config.crop_size
            found["image"] = torch.tensor([places(*one, crop).shape[1] for one in images])
        return found


_TOWERS = "model.embed_tokens_extend"
Phi4MultimodalAdapter = decoder_adapter(
    "Phi4Multimodal",
    decoder="model",
    towers={
        "audio_encoder": (f"{_TOWERS}.audio_embed.encoder", None),
        "vision_encoder": (f"{_TOWERS}.image_embed.img_processor", "hidden_states", -2),
    },
    media={"audio": "audio_input_features", "image": "image_pixel_values"},
    inner=Seeing,
    fused={"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")},
)

FAMILY = Family(
    model_class=Phi4MultimodalForCausalLM,
    adapter=Phi4MultimodalAdapter,
    media=Phi4Media,
    position_ids=position_ids,
    replay_traits=causal_decoder,
    checkpoints="microsoft/Phi-4-multimodal-instruct in transformers' own form (revision refs/pr/70), adapters merged",
    model_types=("phi4_multimodal",),
)
