"""What one family makes of media: features, computed once per content, and `MediaLayout`, which places them.

Sampling: at `fps`, the targets are 0, 1/fps, 2/fps, ... before the picture's end, and for each the frame whose true
time is nearest is taken (of two equally near, the earlier). A target in the last half frame before the picture's end is
left out. A still picture read as a video is shown for its whole duration. The processor's own sampling is off; the last
frame is repeated to a multiple of the temporal patch (2).

The mel is computed on the sound padded by a few zero frames and trimmed to the sound, instead of padded to 300 s: the
same values to the bit, since a mel frame sees 25 ms and the normalisation the loudest frame. A family whose tower takes
nothing but the padded mel says so (`whole_mel`). `cap_pixels_per_frame` is set: the reference implementation's share of
the total pixel budget, which acts on long videos only.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from av_lens.errors import AlignmentError, InputError
from av_lens.media.clip import Clip
from av_lens.media.encoding import resample
from av_lens.memory import Memory
from av_lens.spans import SpanMap

_TIE = 1e-6  # s: two frames whose distances differ by less are equally near
_TOGETHER = 64 << 20  # bytes of frames that the processor gets at once


@dataclass(frozen=True, eq=False)
class Picture:
    """What the processor made of a video or an image."""

    kind: str  # "video" or "image"
    pixels: Float[Tensor, "patch patch_width"]  # flattened patches, `[patch, patch_width]`, in the order of the tokens
    grid: tuple[int, int, int]  # patches in time, height and width
    merge: int  # patches per token along height and width
    step_s: float  # how long a temporal patch lasts at the asked rate; an image, one second
    # true time of each frame behind the temporal patches, after repeating, `[patch_t, frame]`
    frame_start_s: np.ndarray
    frame_end_s: np.ndarray  # when each of them leaves the screen, `[patch_t, frame]`
    frames: tuple[int, ...]  # the indices of the sampled frames in the clip

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
    """What the processor made of a sound."""

    # log-mel spectrogram, `[1, mel_bin, mel_frame]`: trimmed to the sound, or with the silence that pads it
    mel: Float[Tensor, "1 mel_bin mel_frame"]
    duration_s: float  # length of the sound
    frame_s: float  # seconds from one mel frame to the next
    padding: int = 0  # mel frames of silence after the sound

    @property
    def n_frames(self) -> int:
        """Mel frames of the sound."""
        return self.mel.shape[-1] - self.padding

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

    ears = "feature_extractor"  # the processor's part for sounds

    def __init__(self, processor: Any, *, cache_bytes: int = 512 << 20, whole_mel: bool = False) -> None:
        self.processor, self.whole_mel = processor, whole_mel
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
        options.pop("return_metadata", None)
        if "cap_pixels_per_frame" in getattr(self.processor.video_processor.valid_kwargs, "__annotations__", {}):
            options["cap_pixels_per_frame"] = True
        return options

    def _video(self, clip: Clip, fps: float | int) -> Picture:
        part, chosen = self.processor.video_processor, sampled_frames(clip, fps)
        deep = int(part.temporal_patch_size)
        pixels, grid = self._patches(frames_of(clip), chosen)
        shown = chosen[np.minimum(np.arange(grid[0] * deep), len(chosen) - 1)].reshape(grid[0], deep)
        edges = on_screen(clip, shown)
        return Picture("video", pixels, grid, int(part.merge_size), deep / fps, *edges, frames=tuple(chosen.tolist()))

    def _image(self, clip: Clip) -> Picture:
        chosen = middle_frame(clip)
        frame = torch.from_numpy(np.array(frames_of(clip)[chosen])).permute(2, 0, 1)
        part = self.processor.image_processor
        made = part(images=[frame], return_tensors="pt")
        grid, edges = _grid(made["image_grid_thw"]), on_screen(clip, np.array([[chosen]]))
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
        part = self.processor.feature_extractor
        rate, hop, most = self.rate, int(part.hop_length), int(part.n_samples)
        as_it_is = (getattr(self.processor, "audio_kwargs", None) or {}).get("padding") is True
        waveform, least = self.waveform(clip, math.inf if as_it_is else most / rate), int(part.n_fft) // 2
        if as_it_is and len(waveform) <= least:
            raise InputError(
                f"the sound lasts {len(waveform) / rate * 1000:.0f} ms and this processor hears more than "
                f"{least / rate * 1000:g}: give a longer clip"
            )
        padded = -(-len(waveform) // hop) * hop + -(-int(part.n_fft) // hop) * hop
        how: dict[str, Any] = {"padding": "max_length", "max_length": most if self.whole_mel else min(padded, most)}
        if as_it_is:
            how = {"padding": True, "truncation": False}
        made = part([waveform], sampling_rate=rate, return_attention_mask=True, return_tensors="pt", **how)
        mel, heard = made["input_features"], int(made["attention_mask"].sum())
        if self.whole_mel:
            return Sound(mel, len(waveform) / rate, hop / rate, mel.shape[-1] - heard)
        return Sound(mel[..., :heard].contiguous(), len(waveform) / rate, hop / rate)

    @property
    def rate(self) -> int:
        """Samples a second that the processor hears."""
        return int(getattr(self.processor, self.ears).sampling_rate)

    def waveform(self, clip: Clip, most_s: float) -> Float32[np.ndarray, " sample"]:
        """A clip's sound at that rate; refused where there is none, or more than so many seconds."""
        if clip.waveform is None:
            raise InputError("this clip has no audio stream: use sound=None, or clip.with_sound(other)")
        waveform = resample(clip.waveform, clip.rate, self.rate) if clip.rate != self.rate else clip.waveform
        if len(waveform) > most_s * self.rate:
            raise InputError(
                f"the sound lasts {len(waveform) / self.rate:.1f} s and this processor hears at most {most_s:.0f} s: "
                f"cut the clip first, e.g. clip.trimmed(0, {most_s:.0f})"
            )
        return waveform


def _grid(stated: Tensor) -> tuple[int, int, int]:
    deep, high, wide = (int(n) for n in stated[0])
    return deep, high, wide


def middle_frame(clip: Clip) -> int:
    """The frame nearest to the middle of a picture: an image's only one."""
    times = np.asarray(clip.times, dtype=np.float64)
    return int(np.argmin(np.abs(times - (times[0] + times[-1]) / 2).round(6)))


def on_screen(clip: Clip, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When the frames of these numbers come and go."""
    times = np.asarray(clip.times, dtype=np.float64)
    return times[shown], np.append(times[1:], max(clip.picture_end, times[-1]))[shown]


def frames_of(clip: Clip) -> np.ndarray:
    """A clip's frames; one without a picture is refused."""
    if clip.frames is None:
        raise InputError("this clip has no picture: use picture=None, or load a file with a video stream")
    return clip.frames


@dataclass(frozen=True)
class TensorAxes:
    """How the tensors of several examples lie in one batch; of those not named here each row is an example."""

    # tensors of patches, one example's after another's, each with the tensor of their grids
    patches: Mapping[str, str] = field(default_factory=dict[str, str])
    frames: tuple[str, ...] = ()  # tensors of which an axis runs through a sound; padded to the longest
    frame_axis: int = -1  # that axis
    heard: str = ""  # the one of `frames` that is 1 where there is sound
    # beside `input_ids`, what has a number for each position, and its number for a decoded one
    lengthened: Mapping[str, int] = field(default_factory=lambda: {"attention_mask": 1})

    @property
    def apart(self) -> frozenset[str]:
        """Tensors of which rows are no examples."""
        return frozenset(self.patches)

    def example(self, tensors: Mapping[str, Any], i: int) -> dict[str, Any]:
        """Cut one example out of a batch; its sound is cut to what is heard, where the batch was padded to that."""
        found = {name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in tensors.items()}
        for name, grids in self.patches.items():
            if name in tensors:
                counts: list[int] = tensors[grids].reshape(len(tensors[grids]), -1).prod(dim=-1).tolist()
                found[name] = tensors[name][sum(counts[:i]) : sum(counts[: i + 1])]
        mask = tensors.get(self.heard)
        if mask is not None and bool(mask[..., -1].any()):
            found |= {name: found[name].narrow(self.frame_axis, 0, int(mask[i].sum())) for name in self.frames}
        return found

    def joined(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Put examples into one batch; flags that differ are refused."""
        return {name: self._joined(name, [one[name] for one in examples]) for name in examples[0]}

    def _joined(self, name: str, values: list[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            if any(value != values[0] for value in values):
                raise AlignmentError(
                    f"these examples cannot be stacked: {name} is {values[0]} in one and not in another"
                )
            return values[0]
        if name in self.frames:
            longest, axis = max(value.shape[self.frame_axis] for value in values), self.frame_axis % values[0].ndim
            inner = (0, 0) * (values[0].ndim - 1 - axis)
            values = [torch.nn.functional.pad(value, (*inner, 0, longest - value.shape[axis])) for value in values]
        shapes = list(dict.fromkeys(tuple(value.shape[1:]) for value in values))
        if len(shapes) > 1:
            raise AlignmentError(
                f"these examples cannot be stacked: {name} is {list(shapes[0])} in one and {list(shapes[1])} in "
                "another, and this model takes none padded. Cut sounds to one length, and frames to one size."
            )
        return torch.cat(values, dim=0)

    def longer(self, tensors: Mapping[str, Any], new: Tensor) -> dict[str, Any]:
        """Append decoded ids `[batch, new]` to a batch."""
        added = {"input_ids": new}
        added |= {name: tensors[name].new_full(new.shape, value) for name, value in self.lengthened.items()}
        return dict(tensors) | {name: torch.cat([tensors[name], value], dim=1) for name, value in added.items()}


@dataclass(frozen=True)
class Media:
    """What stands behind the media positions of one prompt."""

    picture: Picture | None = None
    sound: Sound | None = None
    interleaved: bool = False

    @property
    def shape(self) -> tuple[object, ...]:
        """All that position ids depend on, beside the token ids."""
        seen = None if self.picture is None else (self.picture.kind, self.picture.grid, self.picture.step_s)
        return seen, None if self.sound is None else self.sound.n_frames, self.interleaved


class MediaLayout(ABC):
    """One family's media in a prompt, for one checkpoint; `config` may be a larger one that holds the model's."""

    parts: ClassVar[tuple[str, ...]] = ()  # what the processor must have
    kinds: tuple[str, ...] = ("audio", "video", "image")  # what the model takes beside text
    woven: ClassVar[bool] = True  # whether a sound can be woven into a video
    axes: ClassVar[TensorAxes] = TensorAxes()  # how its tensors lie in a batch
    system_turn: ClassVar[re.Pattern[str] | None] = None
    """Finds the system message that a chat template puts in by itself, as group 1."""
    disagreement: ClassVar[str] = ""
    """When the model gives other position ids than expected, and what to do; `{fps}` is the asked rate."""
    processor: Any

    @abstractmethod
    def __init__(self, processor: Any, config: Any, *, cache_bytes: int = 512 << 20) -> None: ...

    @classmethod
    def opened(cls, processor: Any) -> Any:
        """What stands for the processor that a checkpoint has."""
        return processor

    @classmethod
    @abstractmethod
    def placeholders(cls, config: Any) -> dict[str, int]:
        """The token id that stands for a piece of each of its kinds."""

    @classmethod
    @abstractmethod
    def sound_borders(cls, config: Any) -> tuple[int, ...]:
        """The token ids that open and close a sound, which a prompt without it does not have."""

    def require_frame_rate(self, fps: float | int, *, interleaved: bool) -> None:
        """Refuse a frame rate that the model cannot take, before anything is computed; here any above 0 is taken."""
        if "video" in self.kinds and (not np.isfinite(fps) or fps <= 0):
            raise InputError(f"fps={fps:g}: frames are sampled at a rate above 0.")

    @abstractmethod
    def media(self, clip: Clip, *, picture: str | None, sound: str | None, fps: float | int) -> Media:
        """Compute the features of a clip: picture "video", "image" or None; sound "in_video", "separate" or None."""

    @abstractmethod
    def bare(self, kind: str) -> str:
        """A medium in a prompt without a chat template: its placeholder between its borders."""

    @abstractmethod
    def expansions(self, media: Media) -> dict[str, str]:
        """What each placeholder of the template stands for, token by token."""

    def tensors(self, ids: np.ndarray, media: Media) -> dict[str, Any]:
        """The keyword arguments of the HuggingFace forward for token ids `[pos]`; here the ids and their mask."""
        given = torch.from_numpy(ids)[None]
        return {"input_ids": given, "attention_mask": torch.ones_like(given)}

    @abstractmethod
    def span_map(self, ids: np.ndarray, roles: Sequence[str], tokens: Sequence[str], media: Media) -> SpanMap:
        """Give media positions their role, their interval on both clocks and their patch; refuse a wrong number."""

    def expected_positions(self, ids: np.ndarray, media: Media) -> np.ndarray | None:
        """The position ids `[stream, pos]` that the model should give, here counted; None where none are derived."""
        return np.arange(len(ids), dtype=np.int64)[None]

    def check_positions(
        self, ids: np.ndarray, media: Media, spans: SpanMap, found: np.ndarray, *, fps: float | int
    ) -> None:
        """Compare the expected position ids with the model's own `[stream, pos]`; refuse the first that differ."""
        expected = self.expected_positions(ids, media)
        if expected is None or (expected.shape == found.shape and (expected == found).all()):
            return
        at = int(np.flatnonzero((expected != found).any(axis=0))[0]) if expected.shape == found.shape else 0
        raise InputError(
            f"the model and this map disagree about which second and patch the positions stand for: position {at} "
            f"(token {spans.tokens[at]!r}, role {spans.roles[at]}) should have ids {expected[:, at].tolist()}, and the "
            f"model gives {found[:, at].tolist()}.{self.disagreement.format(fps=f'{fps:g}')}"
        )

    @abstractmethod
    def provenance(self, clip: Clip, media: Media, fps: float | int) -> dict[str, Any]:
        """How the features were made."""
