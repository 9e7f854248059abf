"""What one family says about media in a prompt: a `MediaLayout`, whose methods return a SpanMap and tensors.

`inputs` asks these questions and knows no answer itself: which token stands for a sound, how many of them, which second
and patch each is, which position ids the model should give them, what the tensors are called and how those of several
examples lie in one batch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from av_lens.errors import AlignmentError, InputError
from av_lens.families.features import Picture, Sound
from av_lens.media.clip import Clip
from av_lens.spans import SpanMap


@dataclass(frozen=True)
class TensorAxes:
    """How the tensors of several examples lie in one batch; of those not named here each row is an example.

    Attributes:
        patches: tensors of patches, one example's after another's, each with the tensor of their grids.
        frames: tensors whose last axis runs through a sound; padded to the longest.
        heard: the one of `frames` that is 1 where there is sound.
        lengthened: beside `input_ids`, what has a number for each position, and its number for a decoded one.
    """

    patches: Mapping[str, str] = field(default_factory=dict[str, str])
    frames: tuple[str, ...] = ()
    heard: str = ""
    lengthened: Mapping[str, int] = field(default_factory=lambda: {"attention_mask": 1})

    def example(self, tensors: Mapping[str, Any], i: int) -> dict[str, Any]:
        """Cut one example out of a batch; its sound is cut to what is heard, where the batch was padded to that."""
        found = {name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in tensors.items()}
        for name, grids in self.patches.items():
            if name in tensors:
                counts: list[int] = tensors[grids].prod(dim=-1).tolist()
                found[name] = tensors[name][sum(counts[:i]) : sum(counts[: i + 1])]
        mask = tensors.get(self.heard)
        if mask is not None and bool(mask[..., -1].any()):
            found |= {name: found[name][..., : int(mask[i].sum())] for name in self.frames}
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
            longest = max(value.shape[-1] for value in values)
            values = [torch.nn.functional.pad(value, (0, longest - value.shape[-1])) for value in values]
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
    """One family's media in a prompt, for one checkpoint.

    Args:
        processor: the checkpoint's processor.
        config: the model's HuggingFace configuration, or a larger one that holds it.
        cache_bytes: memory for features that are computed once and shared.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    """What the processor must have."""
    axes: ClassVar[TensorAxes] = TensorAxes()
    """How its tensors lie in a batch."""
    system_turn: ClassVar[re.Pattern[str] | None] = None
    """Finds the system message that a chat template puts in by itself, as group 1."""
    disagreement: ClassVar[str] = ""
    """When the model gives other position ids than expected, and what to do; `{fps}` is the asked rate."""
    processor: Any

    @abstractmethod
    def __init__(self, processor: Any, config: Any, *, cache_bytes: int = 512 << 20) -> None: ...

    @classmethod
    @abstractmethod
    def placeholders(cls, config: Any) -> dict[str, int]:
        """The token id that stands for a piece of "audio", "image" and "video"."""

    @classmethod
    @abstractmethod
    def sound_borders(cls, config: Any) -> tuple[int, ...]:
        """The token ids that open and close a sound, which a prompt without it does not have."""

    @abstractmethod
    def require_frame_rate(self, fps: float | int, *, interleaved: bool) -> None:
        """Refuse a frame rate that the model cannot take, before anything is computed."""

    @abstractmethod
    def media(self, clip: Clip, *, picture: str | None, sound: str | None, fps: float | int) -> Media:
        """Compute the features of a clip: picture "video", "image" or None; sound "in_video", "separate" or None."""

    @abstractmethod
    def bare(self, kind: str) -> str:
        """A medium in a prompt without a chat template: its placeholder between its borders."""

    @abstractmethod
    def expansions(self, media: Media) -> dict[str, str]:
        """What each placeholder of the template stands for, token by token."""

    @abstractmethod
    def tensors(self, ids: np.ndarray, media: Media) -> dict[str, Any]:
        """The keyword arguments of the HuggingFace forward for token ids `[pos]`."""

    @abstractmethod
    def span_map(self, ids: np.ndarray, roles: Sequence[str], tokens: Sequence[str], media: Media) -> SpanMap:
        """Give media positions their role, their interval on both clocks and their patch; refuse a wrong number."""

    @abstractmethod
    def expected_positions(self, ids: np.ndarray, media: Media) -> np.ndarray | None:
        """The position ids `[stream, pos]` that the model should give; None where the family derives none."""

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
