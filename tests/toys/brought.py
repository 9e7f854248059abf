"""Three models with code of their own, from their public descriptions, with tiny random encoders of the right shapes.

| model | decoder | prompt |
|---|---|---|
| VideoLLaMA2.1-AV | Qwen2 | frames of a grid, pooled over time and space; then the sound, padded to its window |
| MiniCPM-o 2.6 | Qwen2 | units of a second: a picture in bounds (queries, no grid), the second's sound in bounds |
| video-SALMONN 2+ | Qwen2.5-VL's | each second's picture and sound interleaved, rotary ids of its own (three streams) |

Each function makes what a user would write, an `embed`; a test counts its lines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from small_av import small_clip
from tiny_families import vl_hf_model
from tiny_text import text_hf_model, text_tokenizer

from av_lens import bring

NAN, OFF = float("nan"), (float("nan"), float("nan"), -1, -1)
RATE = 16000


class Encoders(torch.nn.Module):
    """An eye `[frame, row, col, rgb]` -> `[frame, row, col, d]`, an ear `[window, sample]` -> `[window, d]`."""

    def __init__(self, d: int = 64, grid: int = 4, window: int = 3200) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.grid, self.window = grid, window
        self.seeing = torch.randn(3, d, generator=generator)
        self.hearing = torch.randn(8, d, generator=generator) * 2

    def eye(self, frames: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(frames)).float().permute(0, 3, 1, 2) / 255 - 0.5
        patches = torch.nn.functional.adaptive_avg_pool2d(pixels, self.grid).permute(0, 2, 3, 1)
        return patches @ self.seeing * 4

    def ear(self, waveform: np.ndarray, windows: int | None = None) -> torch.Tensor:
        n = -(-len(waveform) // self.window) if windows is None else windows
        padded = torch.zeros(n * self.window)
        padded[: len(waveform)] = torch.from_numpy(np.array(waveform))[: len(padded)]
        return padded.view(n, 8, -1).norm(dim=-1) @ self.hearing / 20


def videollama2(words: Any, tokenizer: Any, encoders: Encoders) -> Callable[..., bring.Given]:
    def embed(clip: Any, question: str, *, system: str | None = None) -> bring.Given:
        found: list[Any] = []  # of each position: embedding, role, id, start, end, row, col

        def text(said: str, role: str) -> None:
            ids = tokenizer(said, add_special_tokens=False)["input_ids"]
            found.extend((word, role, i, *OFF) for word, i in zip(words(torch.tensor(ids)), ids, strict=True))

        text(f"<|im_start|>system\n{system or 'Help.'}<|im_end|>\n<|im_start|>user\n", "boundary")
        if clip is not None and clip.has_picture:
            chosen = np.linspace(0, len(clip.frames) - 1, 4).round().astype(int)  # always so many frames
            seen = encoders.eye(clip.frames[chosen]).unflatten(0, (2, 2)).unflatten(2, (2, 2)).unflatten(4, (2, 2))
            for t, row, col in np.ndindex(2, 2, 2):  # pooled by two in time, height and width
                when = clip.picture_end * t / 2, clip.picture_end * (t + 1) / 2
                found.append((seen.mean((1, 3, 5))[t, row, col], "video", 0, *when, row, col))
        if clip is not None and clip.has_sound:
            for k, heard in enumerate(encoders.ear(clip.waveform, windows=15)):  # padded to 3 s
                when = (k * 0.2, (k + 1) * 0.2) if k * 0.2 < clip.sound_end else (NAN, NAN)
                found.append((heard, "audio", 0, *when, -1, -1))
        text("\n" + question, "question")
        text("<|im_end|>\n<|im_start|>assistant\n", "header")
        embeds, roles, ids, start, end, row, col = zip(*found, strict=True)
        times = np.stack([start, end], axis=1)
        return bring.Given(torch.stack(embeds), [*roles[:-1], "generation"], ids, times=times, row=row, col=col)

    return embed


def minicpm_o(words: Any, tokenizer: Any, encoders: Encoders) -> Callable[..., bring.Given]:
    def embed(clip: Any, question: str) -> bring.Given:
        found: list[Any] = []  # of each position: embedding, role, id, start, end

        def text(said: str, role: str) -> None:
            ids = tokenizer(said, add_special_tokens=False)["input_ids"]
            found.extend((word, role, i, NAN, NAN) for word, i in zip(words(torch.tensor(ids)), ids, strict=True))

        def media(embeds: torch.Tensor, role: str, start: float, lasts: float) -> None:
            steps = start + np.arange(len(embeds)) * (lasts if role == "audio" else 0.0)
            found.extend((one, role, 0, step, step + lasts) for one, step in zip(embeds, steps, strict=True))

        text("<|im_start|>user\n", "boundary")
        for second in range(0 if clip is None else int(np.ceil(max(clip.picture_end, clip.sound_end)))):
            if clip.has_picture:
                frame = clip.frames[np.searchsorted(clip.times, second + 0.5, side="right") - 1]
                text("<|vision_bos|>", "boundary")
                media(encoders.eye(frame[None]).mean(2)[0], "video", second, 1.0)  # queries: they have no place
                text("<|vision_eos|>", "boundary")
            if clip.has_sound:
                text("<|audio_bos|>", "boundary")
                media(encoders.ear(clip.waveform[second * RATE : (second + 1) * RATE]), "audio", second, 0.2)
                text("<|audio_eos|>", "boundary")
        text(question, "question")
        text("<|im_end|>\n<|im_start|>assistant\n", "header")
        embeds, roles, ids, start, end = zip(*found, strict=True)
        times = np.stack([start, end], axis=1)
        return bring.Given(torch.stack(embeds), [*roles[:-1], "generation"], ids, times=times)

    return embed


def video_salmonn(words: Any, tokenizer: Any, encoders: Encoders) -> Callable[..., bring.Given]:
    def embed(clip: Any, question: str, *, fps: float = 2.0) -> bring.Given:
        found: list[Any] = []  # of each position: embedding, role, id, start, end, row, col, and its rotary ids

        def text(said: str, role: str) -> None:
            ids, at = (
                tokenizer(said, add_special_tokens=False)["input_ids"],
                1 + max((max(f[7]) for f in found), default=-1),
            )
            for k, (word, i) in enumerate(zip(words(torch.tensor(ids)), ids, strict=True)):
                found.append((word, role, i, *OFF, (at + k,) * 3))

        text("<|im_start|>user\n<|vision_bos|>", "boundary")
        origin = found[-1][7][0] + 1
        for second in range(0 if clip is None else int(np.ceil(max(clip.picture_end, clip.sound_end)))):
            if clip.has_picture:
                shown = clip.frames[(clip.times >= second) & (clip.times < second + 1)][: int(fps)]
                seen = encoders.eye(shown).mean(0).unflatten(0, (2, 2)).unflatten(2, (2, 2)).mean((1, 3))
                for row, col in np.ndindex(2, 2):
                    turn = (origin + 2 * second, origin + row, origin + col)
                    found.append((seen[row, col], "video", 0, second, second + 1, row, col, turn))
            if clip.has_sound:
                for k, heard in enumerate(encoders.ear(clip.waveform[second * RATE : (second + 1) * RATE])):
                    when = second + k / 5, second + (k + 1) / 5
                    found.append((heard, "audio", 0, *when, -1, -1, (origin + 2 * second + k // 3,) * 3))
        text("<|vision_eos|>" + question, "question")
        text("<|im_end|>\n<|im_start|>assistant\n", "header")
        embeds, roles, ids, start, end, row, col, turn = zip(*found, strict=True)
        roles, times, turn = [*roles[:-1], "generation"], np.stack([start, end], axis=1), np.array(turn).T
        return bring.Given(torch.stack(embeds), roles, ids, None, times, row, col, position_ids=turn)

    return embed


OWN: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "videollama2": (partial(text_hf_model, "qwen2"), videollama2, "separate"),
    "minicpm_o": (partial(text_hf_model, "qwen2"), minicpm_o, "in_video"),
    "video_salmonn": (vl_hf_model, video_salmonn, "in_video"),
}
"""The decoder (of a seed), the user's code, and how it lays sound and picture."""


def decoder(name: str, seed: int = 0) -> Any:
    """The HuggingFace decoder, never wrapped, with eager attention."""
    model = OWN[name][0](seed)
    model.set_attn_implementation("eager")
    return model.eval()


def embed_of(name: str, seed: int = 0) -> Callable[..., bring.Given]:
    """The user's code on that decoder's words."""
    return OWN[name][1](decoder(name, seed).get_input_embeddings(), text_tokenizer(), Encoders())


@cache
def brought(name: str, seed: int = 0) -> bring.BroughtModel:
    """The model, wrapped."""
    return bring.wrap(OWN[name][0](seed), embed_of(name, seed), tokenizer=text_tokenizer(), name=name)


def input_of(name: str, seed: int = 0, question: str = "What?", **more: Any) -> Any:
    """An input of a clip of noise."""
    return brought(name).encode(small_clip(seed), question, **more)
