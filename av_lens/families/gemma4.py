"""Gemma 4: a decoder of two kinds of layers, with and without a window, that reads video, image and sound.

A frame is its second as text ("00:01"), a begin token, its tokens row by row (3 x 3 patches of 16 pixels each), an end
token. Sound comes as frames of 20 ms every 10 ms; two convolutions of stride 2 make a token of 40 ms: token k stands at
mel frame 4k. Positions are counted, so that ids say no time: on the model's clock frame i of a video lasts from i / fps
to (i + 1) / fps, an image one second, token k of a sound from 40 k ms on. A run cannot be restarted between its layers.

Gemma 3n is refused here, since it has no one residual stream (AltUp; Baykal et al., 2023): see `docs/families.md`.
"""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional
from transformers import Gemma4ForConditionalGeneration

from av_lens.errors import InputError
from av_lens.families.adapter import ReplayTraits
from av_lens.families.gemma4_blocks import PIXELS, Gemma4Adapter, Gemma4BlockBridge
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
    sampled_frames,
)
from av_lens.families.one_stream import from_zero
from av_lens.families.qwen_media import QwenMedia
from av_lens.families.registry import Family
from av_lens.media.clip import Clip


class Gemma4Features(Features):
    """Frames as patches of the processor's size, row by row, and sounds as its mel frames, without what it pads."""

    def _video(self, clip: Clip, fps: float | int) -> Picture:
        return self._patched("video", clip, sampled_frames(clip, fps), 1.0 / fps)

    def _image(self, clip: Clip) -> Picture:
        return self._patched("image", clip, np.array([middle_frame(clip)]), 1.0)

    def _patched(self, kind: str, clip: Clip, chosen: np.ndarray, step_s: float) -> Picture:
        part, frames = getattr(self.processor, f"{kind}_processor"), frames_of(clip)
        told: dict[str, Any] = self.video_options() if kind == "video" else {}
        names = PIXELS[kind], f"{kind}_position_ids"
        pixels, high, wide = list[torch.Tensor](), 0, 0
        for number in chosen:  # each by itself, as the processor takes them too
            shown = torch.from_numpy(np.array(frames[number])).permute(2, 0, 1)
            made = part(**{f"{kind}s": [shown[None] if kind == "video" else shown]}, return_tensors="pt", **told)
            patches, places = (made[name][0] for name in names)
            wide, high = (places.amax(0) + 1).tolist()
            pixels.append(patches[: high * wide])
        grid, edges = (len(chosen), high, wide), on_screen(clip, chosen[:, None])
        merge = int(part.pooling_kernel_size)
        return Picture(kind, torch.cat(pixels), grid, merge, step_s, *edges, frames=tuple(chosen.tolist()))

    def _sound(self, clip: Clip) -> Sound:
        waveform, rate, part = self.waveform(clip, self.most_seconds), self.rate, self.processor.feature_extractor
        if len(waveform) <= part.frame_length // 2:
            ms = 1000 * len(waveform) / rate
            raise InputError(f"the sound lasts {ms:.0f} ms: one token needs more than 10; give a longer clip")
        made = part([waveform], return_tensors="pt")
        mel = made["input_features"][:, : int(made["input_features_mask"].sum())]
        return Sound(mel.transpose(1, 2).contiguous(), len(waveform) / rate, int(part.hop_length) / rate)

    @property
    def most_seconds(self) -> float:
        """What the processor hears of a sound; it would drop the rest in silence."""
        return self.processor.audio_seq_length * self.processor.audio_ms_per_token / 1000


class Gemma4Media(QwenMedia):
    """Media in the prompts of Gemma 4."""

    axes = TensorAxes(
        patches=dict.fromkeys(("pixel_values_videos", "video_position_ids"), "num_frames_per_video"),
        frames=("input_features", "input_features_mask"),
        frame_axis=1,
        heard="input_features_mask",
        lengthened={"attention_mask": 1, "mm_token_type_ids": 0},
    )
    system_turn = re.compile(r"<\|turn>system\n(.*?)<turn\|>", flags=re.DOTALL)
    id_type = np.float64
    woven = False
    features_class = Gemma4Features

    def __init__(self, processor: Any, config: Any, *, cache_bytes: int = 512 << 20) -> None:
        super().__init__(processor, config, cache_bytes=cache_bytes)
        if config.audio_config is None:
            self.kinds = tuple(kind for kind in self.kinds if kind != "audio")

    @classmethod
    def clock_rate(cls, config: Any) -> float:
        """Tokens of sound in a second: position ids say no time."""
        return 25.0

    @classmethod
    def sound_borders(cls, config: Any) -> tuple[int, ...]:
        """As the configuration says."""
        return config.boa_token_id, config.eoa_token_index

    def sound_tokens(self, mel_frames: int) -> int:
        """Two convolutions of stride 2."""
        return -(-mel_frames // 4)

    require_frame_rate = MediaLayout.require_frame_rate

    def bare(self, kind: str) -> str:
        """The placeholder, which brings its borders."""
        return getattr(self.processor, f"{kind}_token")

    def expansions(self, media: Media) -> dict[str, str]:
        """As the processor writes them: a video is its frames, each with its second and its borders."""
        made: dict[str, str] = {}
        if (picture := media.picture) is not None:
            each = picture.n_tokens // picture.grid[0]
            seconds = [number * picture.step_s for number in range(picture.grid[0])]
            shown = SimpleNamespace(fps=1.0 / picture.step_s, timestamps=seconds)
            told = {f"num_soft_tokens_per_{picture.kind}": [each], "video_metadata": [shown]}
            token = getattr(self.processor, f"{picture.kind}_token")
            made[token] = getattr(self.processor, f"replace_{picture.kind}_token")(told, 0)
        if (sound := media.sound) is not None:
            told = {"input_features_mask": [np.ones(sound.n_frames, dtype=np.int64)]}
            made[self.processor.audio_token] = self.processor.replace_audio_token(told, 0)
        return made

    def tensors(self, ids: np.ndarray, media: Media) -> dict[str, Any]:
        """As one call of the processor names them; each frame's patches are padded to the most that it may have."""
        made = MediaLayout.tensors(self, ids, media)
        made["mm_token_type_ids"] = torch.zeros_like(made["input_ids"])
        for kind, number in {"image": 1, "video": 2, "audio": 3}.items():
            made["mm_token_type_ids"][made["input_ids"] == self.tokens[kind]] = number
        picture, sound = media.picture, media.sound
        if picture is not None:
            part, (n, high, wide) = getattr(self.processor, f"{picture.kind}_processor"), picture.grid
            more = int(part.max_soft_tokens) * picture.merge**2 - high * wide
            row, col = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
            places = torch.stack([col, row], dim=-1).view(1, -1, 2).repeat(n, 1, 1)
            pixels = picture.pixels.view(n, high * wide, -1)
            made[PIXELS[picture.kind]] = functional.pad(pixels, (0, 0, 0, more))
            made[f"{picture.kind}_position_ids"] = functional.pad(places, (0, 0, 0, more), value=-1)
            if picture.kind == "video":
                made["num_frames_per_video"] = torch.tensor([n])
        if sound is not None:
            made["input_features"] = sound.mel.transpose(1, 2)
            made["input_features_mask"] = torch.ones(1, sound.n_frames, dtype=torch.bool)
        return made

    def _clock(self, n: int, step_s: float) -> Float[np.ndarray, " patch_t"]:
        return np.arange(n) * step_s * self.ids_per_second

    def expected_positions(self, ids: np.ndarray, media: Media) -> None:
        """Positions are counted: there is nothing to derive."""


def replay_traits(config: Any) -> ReplayTraits:
    """A restart knows none of what these layers do."""
    text = config.get_text_config()
    return ReplayTraits(
        bidirectional=("video", "image") if text.use_bidirectional_attention == "vision" else (),
        sliding_window=text.sliding_window,
        per_layer_inputs=bool(text.hidden_size_per_layer_input),
        shared_keys=bool(text.num_kv_shared_layers),
        layers=Gemma4BlockBridge.own_layout,
    )


FAMILY = Family(
    model_class=Gemma4ForConditionalGeneration,
    adapter=Gemma4Adapter,
    media=Gemma4Media,
    position_ids=from_zero,
    replay_traits=replay_traits,
    checkpoints="google/gemma-4-E2B-it, google/gemma-4-E4B-it, google/gemma-4-31B-it, google/gemma-4-26B-A4B-it",
    model_types=("gemma4",),
)

CANNOT_OPEN = dict.fromkeys(
    ("Gemma3nForConditionalGeneration", "gemma3n"),
    "Gemma 3n cannot be opened: its layers carry four streams that are mixed anew before each (AltUp), so that there "
    "is no residual stream to hook, patch or decompose (docs/families.md). Gemma 4 has one, and opens.",
)
"""Why what is known by these names is no family."""
