"""Question: which second and which patch does each position stand for, in the prompts of Qwen's omni models?

For video token j of a block that starts at id s, on a grid of t x h x w tokens: patch t = j // (h w), row = (j % (h w))
// w, col = j % w; its ids are s + int(t x seconds_per_grid x ids_per_second) in float32 as the model does it, s + row,
s + col. Audio token k has s + k in all three streams. So on the model's clock, patch t lasts from its own id to the
next later one, and audio token k lasts one id (40 ms). An image is a patch of one second. Text resumes after the
largest id of the block's last run. Interleaved blocks share one clock; separate ones do not.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped

from av_lens.errors import InputError, ModelError
from av_lens.families.media_layout import Features, Media, MediaLayout, TensorAxes
from av_lens.media.clip import Clip
from av_lens.spans import SpanMap

_PIXELS = {"video": ("pixel_values_videos", "video_grid_thw"), "image": ("pixel_values", "image_grid_thw")}


def _thinker(config: Any) -> Any:
    return getattr(config, "thinker_config", config)


class QwenMedia(MediaLayout):
    """Media in the prompts of Qwen2.5-Omni's thinker; its successors say what differs."""

    parts = ("tokenizer", "feature_extractor", "image_processor", "video_processor")
    axes = TensorAxes(
        patches=dict(_PIXELS.values()),
        frames=("input_features", "feature_attention_mask"),
        heard="feature_attention_mask",
    )
    system_turn = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", flags=re.DOTALL)
    disagreement = (
        " With sound in the video this happens at frame rates whose chunk borders the processor and the model round "
        "differently (fps={fps}): use fps=1, 2, 4 or 5, or sound='separate'."
    )
    features_class = Features
    chunk_s = 2.0  # seconds of a chunk of the weave, where the configuration does not say them
    frames_per_token = 4  # mel frames behind one token of sound
    id_type: Any = np.int64  # of position ids
    whole_mel = False  # the tower wants the processor's padding too
    shared_borders = True  # woven into a video, the borders of sound and video share one position id

    def __init__(self, processor: Any, config: Any, *, cache_bytes: int = 512 << 20) -> None:
        self.processor = processor
        self.features = self.features_class(processor, cache_bytes=cache_bytes, whole_mel=self.whole_mel)
        self.tokens = self.placeholders(config)
        self.openings = tuple(getattr(_thinker(config), f"{kind}_start_token_id", -1) for kind in ("vision", "audio"))
        self.ids_per_second = self.clock_rate(config)
        self.chunk_s = float(getattr(_thinker(config), "seconds_per_chunk", self.chunk_s))
        if "video" in self.kinds:
            self.frames_per_patch = int(getattr(processor.video_processor, "temporal_patch_size", 1))
        for kind in self.kinds:
            wanted = int(getattr(processor, f"{kind}_token_id"))
            if wanted != self.tokens[kind]:
                raise ModelError(
                    f"the processor writes {kind} as token {wanted} and the model reads token {self.tokens[kind]}: "
                    "they belong to different checkpoints; load the processor from the model's own folder"
                )

    @classmethod
    def placeholders(cls, config: Any) -> dict[str, int]:
        """As the configuration says."""
        return {kind: int(getattr(_thinker(config), f"{kind}_token_id")) for kind in sorted(cls.kinds)}

    @classmethod
    def clock_rate(cls, config: Any) -> float:
        """Position ids in a second."""
        return float(_thinker(config).position_id_per_seconds)

    @classmethod
    def sound_borders(cls, config: Any) -> tuple[int, ...]:
        """As the thinker's configuration says; -1 where it says nothing."""
        return tuple(int(getattr(_thinker(config), f"audio_{end}_token_id", -1)) for end in ("start", "end"))

    def sound_tokens(self, mel_frames: int) -> int:
        """Count the tokens of a sound: a convolution of stride 2, then pairs are pooled; 40 ms each."""
        return max(0, ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1)

    def require_frame_rate(self, fps: float | int, *, interleaved: bool) -> None:
        """A temporal patch must not last longer than a chunk of the weave."""
        deep, chunk_s = self.frames_per_patch, self.chunk_s
        if not np.isfinite(fps) or fps < 1:
            raise InputError(
                f"fps={fps:g} is below 1: a patch of {deep} frames would last longer than the model's chunks, whose "
                "order then breaks. Use fps=1 or more; for a long video, load a part of it with start= and end="
            )
        if interleaved and deep / fps > chunk_s:
            raise InputError(
                f"fps={fps:g} makes a patch of {deep / fps:g} s, longer than this model's chunks of {chunk_s:g} s: use "
                f"fps={deep / chunk_s:g} or more, or sound='separate'"
            )

    def media(self, clip: Clip, *, picture: str | None, sound: str | None, fps: float | int) -> Media:
        """By the processor's parts; a sound that is too short for one token is refused."""
        seen = heard = None
        if picture is not None:
            seen = self.features.video(clip, fps) if picture == "video" else self.features.image(clip)
        if sound is not None:
            heard = self.features.sound(clip)
            if self.sound_tokens(heard.n_frames) < 1:
                raise InputError(
                    f"the sound lasts {heard.duration_s * 1000:.0f} ms: one token needs more than 20; give a longer "
                    "clip"
                )
        return Media(seen, heard, interleaved=sound == "in_video")

    def bare(self, kind: str) -> str:
        """Begin token, placeholder, end token."""
        border = "audio" if kind == "audio" else "vision"
        opened, token, closed = (f"{border}_bos_token", f"{kind}_token", f"{border}_eos_token")
        return "".join(getattr(self.processor, name) for name in (opened, token, closed))

    def expansions(self, media: Media) -> dict[str, str]:
        """A woven video holds the sound's tokens too, in the processor's own order."""
        counts = self._counts(media)
        if media.interleaved and media.picture is not None:
            woven = self.processor.replace_video_with_audio_token(
                {"video_grid_thw": [np.array(media.picture.grid)], "video_second_per_grid": [media.picture.step_s]},
                0,
                {"num_audio_tokens": [counts["audio"]]},
                0,
                position_id_per_seconds=self.ids_per_second,
                seconds_per_chunk=self.chunk_s,
            )
            return {self.processor.video_token: woven}
        tokens = {kind: getattr(self.processor, f"{kind}_token") for kind in self.kinds[::-1]}
        return {token: token * counts[kind] for kind, token in tokens.items() if counts[kind]}

    def tensors(self, ids: np.ndarray, media: Media) -> dict[str, Any]:
        """As one call of the processor names them."""
        made = super().tensors(ids, media)
        made["use_audio_in_video"] = media.interleaved
        if media.picture is not None:
            pixels, grids = _PIXELS[media.picture.kind]
            made |= {pixels: media.picture.pixels, grids: torch.tensor([media.picture.grid])}
            if media.picture.kind == "video":
                made["video_second_per_grid"] = torch.tensor([media.picture.step_s])
        if media.sound is not None:
            made["input_features"] = media.sound.mel
            frames = torch.arange(media.sound.mel.shape[-1])
            made["feature_attention_mask"] = (frames < media.sound.n_frames).long()[None]
        return made

    def _counts(self, media: Media) -> dict[str, int]:
        """How many tokens of each kind the features are."""
        counts = dict.fromkeys(self.kinds, 0)
        if media.picture is not None:
            counts[media.picture.kind] = media.picture.n_tokens
        if media.sound is not None:
            counts["audio"] = self.sound_tokens(media.sound.n_frames)
        return counts

    def sound_frames(self, n_tokens: int) -> Int64[np.ndarray, "2 token"]:
        """First and last (excluded) mel frame behind each token of a sound."""
        return (np.arange(n_tokens) + np.array([[0], [1]])) * self.frames_per_token

    def _clock(self, n: int, step_s: float) -> Shaped[np.ndarray, " patch_t"]:
        steps = np.arange(n).astype(np.float32) * np.float32(step_s) * np.float32(self.ids_per_second)
        return steps.astype(np.int64)

    def _placed(self, ids: np.ndarray, media: Media) -> tuple[np.ndarray, Shaped[np.ndarray, "4 pos"]]:
        """Each position's kind; and for media clock id, row, column and the clock id of its end, counted from 0."""
        placed = np.zeros((4, len(ids)), dtype=self.id_type)
        kinds = np.select([ids == self.tokens[kind] for kind in self.kinds], self.kinds, default="")
        if media.picture is not None:
            at = np.flatnonzero(kinds == media.picture.kind)
            patch, row, col = np.unravel_index(np.arange(len(at)), media.picture.token_grid)
            clock = self._clock(media.picture.grid[0] + 1, media.picture.step_s)
            # Patches that share an id, which whole ids at a high rate make them, last together until the next.
            following = np.append(clock, clock[-1] + 1)[np.searchsorted(clock, clock[:-1], side="right")]
            placed[:, at] = clock[patch], row, col, following[patch]
        at = np.flatnonzero(kinds == "audio")
        placed[:, at] = np.arange(len(at)) + np.array([[0], [0], [0], [1]])
        return kinds, placed

    def _seconds(self, kinds: np.ndarray, placed: np.ndarray, media: Media) -> Shaped[np.ndarray, "2 media"]:
        """Start and end of each media position on the model's clock."""
        return placed[[0, 3]][:, kinds != ""] / self.ids_per_second

    def _resumed(self, block: Shaped[np.ndarray, "3 _"]) -> Any:
        """The position id of the text that follows the last run of a block of media."""
        return block.max() + 1

    def span_map(self, ids: np.ndarray, roles: Sequence[str], tokens: Sequence[str], media: Media) -> SpanMap:
        """By the clocks at the top of this module."""
        for kind, expected in self._counts(media).items():
            found = int((ids == self.tokens[kind]).sum())
            if found != expected:
                raise InputError(
                    f"the prompt has {found} media tokens of id {self.tokens[kind]} and the features are {expected}"
                )
        kinds, placed = self._placed(ids, media)
        seen = (kinds == "video") | (kinds == "image")
        row, col = np.where(seen, placed[1:3], -1).astype(np.int64)
        times = {name: np.full(len(ids), np.nan) for name in ("start_s", "end_s", "source_start_s", "source_end_s")}
        if (kinds != "").any():
            times["start_s"][kinds != ""], times["end_s"][kinds != ""] = self._seconds(kinds, placed, media)
        if media.picture is not None:
            patch = np.unravel_index(np.arange(int(seen.sum())), media.picture.token_grid)[0]
            times["source_start_s"][seen] = media.picture.frame_start_s.min(axis=1)[patch]
            times["source_end_s"][seen] = media.picture.frame_end_s.max(axis=1)[patch]
        if media.sound is not None:
            heard = kinds == "audio"
            start, end = self.sound_frames(int(heard.sum())) * media.sound.frame_s
            times["source_start_s"][heard] = start
            times["source_end_s"][heard] = np.minimum(end, media.sound.duration_s)
        named = tuple(str(kind) or role for kind, role in zip(kinds, roles, strict=True))
        return SpanMap(roles=named, tokens=tuple(tokens), row=row, col=col, **times)

    def expected_positions(self, ids: np.ndarray, media: Media) -> Shaped[np.ndarray, "3 pos"] | None:
        """Time, row and column, by the rule at the top of this module."""
        kinds, placed = self._placed(ids, media)
        streams = np.zeros((3, len(ids)), dtype=self.id_type)
        following, i = self.id_type(0), 0
        while i < len(ids):
            if kinds[i]:
                stop = i + int(np.argmin(np.append(kinds[i:], "") != ""))
                streams[:, i:stop] = following + placed[:3, i:stop]
                last = i + int(np.flatnonzero(kinds[i:stop] != kinds[stop - 1]).max(initial=-1)) + 1
                following, i = self._resumed(streams[:, last:stop]), stop
            else:
                opens = tuple(ids[i : i + 2]) == self.openings
                closes = i > 0 and kinds[i - 1] != ""
                shared = 2 if media.interleaved and self.shared_borders and (opens or closes) else 1
                streams[:, i : i + shared] = following
                following, i = following + 1, i + shared
        return streams

    def provenance(self, clip: Clip, media: Media, fps: float | int) -> dict[str, Any]:
        """Frames and how they were chosen; the mel and whether the sound was resampled."""
        made: dict[str, Any] = {}
        if media.picture is not None and media.picture.kind == "video":
            shown = len(media.picture.frames)
            made |= {
                "fps": fps,
                "frames": shown,
                "frame_rule": "nearest true time to i/fps",
                "repeated_last_frame": media.picture.frame_start_s.size - shown,
                "grid": list(media.picture.token_grid),
                "video_options": self.features.video_options(),
            }
        if media.sound is not None:
            wanted = self.features.rate
            made |= {"mel_frames": media.sound.n_frames}
            made |= {"mel": "padded with silence" if self.whole_mel else "trimmed to the sound"}
            made |= {"resampled": [clip.rate, wanted]} if clip.rate != wanted else {}
        return made
