"""Question: what does the processor make of a picture and a sound? Computed once per content, then shared.

Sampling: at `fps`, the targets are 0, 1/fps, 2/fps, ... before the picture's end, and for each the frame whose true
time is nearest is taken (of two equally near, the earlier). A target in the last half frame before the picture's end
is left out. A still picture read as a video is shown for its whole duration.
The processor gets the sampled frames, with its own sampling switched off, and repeats the last one where their number
is not a multiple of the temporal patch (2). Many or large frames go to it some at a time, at the size that it chooses
for all of them together: the same pixels to the bit, without copies of the whole video.

The mel is computed on the sound padded by a few zero frames and trimmed to the sound, instead of padded to the
processor's 300 s: the same values to the bit, since a mel frame sees 25 ms and the normalisation the loudest frame.

`cap_pixels_per_frame` is set (True): the reference implementation's share of the total pixel budget, which begins to
act on long videos only.

Not done: the towers' outputs; they are kept by the model's traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from av_lens.errors import InputError
from av_lens.media.clip import Clip
from av_lens.media.resampling import resample
from av_lens.memory import Memory

_TIE = 1e-6  # s: two frames whose distances differ by less are equally near
_TOGETHER = 64 << 20  # bytes of frames that the processor gets at once


@dataclass(frozen=True, eq=False)
class Picture:
    """What the processor made of a video or an image.

    Attributes:
        kind: "video" or "image".
        pixels: flattened patches, `[patch, patch_width]`, in the order of the tokens.
        grid: patches in time, height and width.
        merge: patches per token along height and width.
        step_s: how long a temporal patch lasts at the asked rate; an image, one second.
        frame_start_s: true time of each frame behind the temporal patches, after repeating, `[patch_t, frame]`.
        frame_end_s: when each of them leaves the screen, `[patch_t, frame]`.
        frames: the indices of the sampled frames in the clip.
    """

    kind: str
    pixels: Float[Tensor, "patch patch_width"]
    grid: tuple[int, int, int]
    merge: int
    step_s: float
    frame_start_s: np.ndarray
    frame_end_s: np.ndarray
    frames: tuple[int, ...]

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        return self.grid[0], self.grid[1] // self.merge, self.grid[2] // self.merge

    @property
    def n_tokens(self) -> int:
        """How many tokens the picture takes."""
        return int(np.prod(self.token_grid))

    @property
    def nbytes(self) -> int:
        """Memory of the patches."""
        return self.pixels.nbytes


@dataclass(frozen=True, eq=False)
class Sound:
    """What the processor made of a sound.

    Attributes:
        mel: log-mel spectrogram trimmed to the sound, `[1, mel_bin, mel_frame]`.
        duration_s: length of the sound.
        frame_s: seconds from one mel frame to the next.
    """

    mel: Float[Tensor, "1 mel_bin mel_frame"]
    duration_s: float
    frame_s: float

    @property
    def n_frames(self) -> int:
        """Mel frames of the sound."""
        return self.mel.shape[-1]

    @property
    def nbytes(self) -> int:
        """Memory of the mel."""
        return self.mel.nbytes


def sampled_frames(clip: Clip, fps: float | int) -> Int64[np.ndarray, " frame"]:
    """Choose the frames of a clip at a rate, by their true times; one may come twice where there are too few."""
    times = np.asarray(clip.times, dtype=np.float64)
    if len(times) > 1:
        count = int(np.floor((clip.picture_end - clip.frame_duration / 2) * fps + _TIE)) + 1
    else:
        count = int(np.ceil(clip.picture_end * fps - _TIE))
    targets = np.arange(max(1, count)) / fps
    after = np.clip(np.searchsorted(times, targets), 1, max(1, len(times) - 1))
    before = after - 1
    after = np.minimum(after, len(times) - 1)
    nearer = np.abs(times[after] - targets) < np.abs(times[before] - targets) - _TIE
    return np.where(nearer, after, before).astype(np.int64)


class Features:
    """Runs a processor's parts (of Qwen2-VL's and Whisper's kind) and remembers what they made, up to a budget."""

    def __init__(self, processor: Any, *, cache_bytes: int = 512 << 20) -> None:
        self.processor = processor
        self.memory: Memory[Any] = Memory(cache_bytes, lambda made: made.nbytes)

    def video(self, clip: Clip, fps: float | int) -> Picture:
        """Sample a clip's frames and cut them into patches."""
        key = ("video", clip.picture_hash, clip.picture_end, fps)
        return self.memory.once(key, lambda: self._video(clip, fps))

    def image(self, clip: Clip) -> Picture:
        """Cut one frame into patches: an image's only one, a video's nearest to its middle."""
        return self.memory.once(("image", clip.picture_hash, clip.picture_end), lambda: self._image(clip))

    def sound(self, clip: Clip) -> Sound:
        """Compute the mel of a clip's sound, resampled to the processor's rate; one too long for it is refused."""
        return self.memory.once(("sound", clip.sound_hash), lambda: self._sound(clip))

    def video_options(self) -> dict[str, Any]:
        """Collect what the video processor is told beside the frames: its sizes, no sampling, the pixel cap."""
        options = dict(getattr(self.processor, "videos_kwargs", {}) or {}) | {"do_sample_frames": False}
        if "cap_pixels_per_frame" in getattr(self.processor.video_processor.valid_kwargs, "__annotations__", {}):
            options["cap_pixels_per_frame"] = True
        return options

    def _video(self, clip: Clip, fps: float | int) -> Picture:
        part, chosen = self.processor.video_processor, sampled_frames(clip, fps)
        deep = int(part.temporal_patch_size)
        pixels, grid = self._patches(_frames(clip), chosen)
        shown = chosen[np.minimum(np.arange(grid[0] * deep), len(chosen) - 1)].reshape(grid[0], deep)
        edges = _on_screen(clip, shown)
        return Picture("video", pixels, grid, int(part.merge_size), deep / fps, *edges, frames=tuple(chosen.tolist()))

    def _image(self, clip: Clip) -> Picture:
        times = np.asarray(clip.times, dtype=np.float64)
        chosen = int(np.argmin(np.abs(times - (times[0] + times[-1]) / 2).round(6)))
        frame = torch.from_numpy(np.array(_frames(clip)[chosen])).permute(2, 0, 1)
        part = self.processor.image_processor
        made = part(images=[frame], return_tensors="pt")
        grid, edges = _grid(made["image_grid_thw"]), _on_screen(clip, np.array([[chosen]]))
        return Picture("image", made["pixel_values"], grid, int(part.merge_size), 1.0, *edges, frames=(chosen,))

    def _patches(self, frames: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, tuple[int, int, int]]:
        """The processor's patches of the chosen frames, and their grid; a part of the frames at a time."""
        from transformers.image_utils import SizeDict
        from transformers.video_processing_utils import BaseVideoProcessor

        part, options = self.processor.video_processor, self.video_options()
        step = int(part.temporal_patch_size)
        step *= max(1, _TOGETHER // (frames[0].nbytes * step))

        def taken(some: np.ndarray, **more: Any) -> tuple[Tensor, tuple[int, int, int]]:
            shown = torch.from_numpy(frames[some]).permute(0, 3, 1, 2)
            if size is not None:
                shown = BaseVideoProcessor.resize(part, shown, SizeDict(height=size[0], width=size[1]), part.resample)
            made = part(videos=[shown], return_tensors="pt", **options, **more)
            return made["pixel_values_videos"], _grid(made["video_grid_thw"])

        size: tuple[int, int] | None = None
        if len(chosen) <= step:
            return taken(chosen)
        # Without memory: what grid the processor makes of all frames.
        every = torch.empty((len(chosen), 3, *frames.shape[1:3]), dtype=torch.uint8, device="meta")
        grid = _grid(part(videos=[every], return_tensors="pt", **options)["video_grid_thw"])
        size = (grid[1] * int(part.patch_size), grid[2] * int(part.patch_size))
        pixels: Tensor | None = None
        for start in range(0, len(chosen), step):
            some, (deep, *_) = taken(chosen[start : start + step], do_resize=False)
            pixels = some.new_empty(int(np.prod(grid)), some.shape[1]) if pixels is None else pixels
            first = start // int(part.temporal_patch_size) * grid[1] * grid[2]
            pixels[first : first + deep * grid[1] * grid[2]] = some
        assert pixels is not None
        return pixels, grid

    def _sound(self, clip: Clip) -> Sound:
        if clip.waveform is None:
            raise InputError("this clip has no audio stream: use sound=None, or clip.with_sound(other)")
        part = self.processor.feature_extractor
        rate, hop, most = int(part.sampling_rate), int(part.hop_length), int(part.n_samples)
        waveform = resample(clip.waveform, clip.rate, rate) if clip.rate != rate else clip.waveform
        seconds = len(waveform) / rate
        if len(waveform) > most:
            raise InputError(
                f"the sound lasts {seconds:.1f} s and this processor hears at most {most / rate:.0f} s: cut the clip "
                f"first, e.g. clip.trimmed(0, {most / rate:.0f})"
            )
        padded = -(-len(waveform) // hop) * hop + -(-int(part.n_fft) // hop) * hop
        made = part(
            [waveform],
            sampling_rate=rate,
            padding="max_length",
            max_length=min(padded, most),
            return_attention_mask=True,
            return_tensors="pt",
        )
        mel = made["input_features"][..., : int(made["attention_mask"].sum())].contiguous()
        return Sound(mel, seconds, hop / rate)


def _grid(stated: Tensor) -> tuple[int, int, int]:
    deep, high, wide = (int(n) for n in stated[0])
    return deep, high, wide


def _on_screen(clip: Clip, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When the frames of these numbers come and go."""
    times = np.asarray(clip.times, dtype=np.float64)
    return times[shown], np.append(times[1:], max(clip.picture_end, times[-1]))[shown]


def _frames(clip: Clip) -> np.ndarray:
    if clip.frames is None:
        raise InputError("this clip has no picture: use picture=None, or load a file with a video stream")
    return clip.frames
