"""`Pair`: clean and corrupt inputs, proved aligned position by position; and an input as it is without its sound.

A pair exists only if both inputs have the same roles, model times and patches at every position, and the same kinds of
tensors; text tokens may differ (`pair.differing`). *Taken out* means that the prompt is made anew of the clip's picture
alone, all else as asked: woven chunks close up into one run and keep their model time, and the text after the media has
smaller position ids. *Shared positions* are each token of one prompt, but for sound and its two border tokens, that has
its counterpart in the other, in order and with equal ids; else the two are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from av_lens.errors import AlignmentError, InputError
from av_lens.families.registry import family_of
from av_lens.inputs.model_inputs import AVInputs, difference
from av_lens.spans import Span


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """Two aligned inputs.

    Attributes:
        clean: the run that activations are usually taken from.
        corrupt: the run that is usually edited.
    """

    clean: AVInputs
    corrupt: AVInputs

    def __post_init__(self) -> None:
        fault = difference(self.clean, self.corrupt, names=("clean", "corrupt"))
        if fault is None and len(self.clean) != len(self.corrupt):
            fault = f"clean holds {len(self.clean)} examples, corrupt {len(self.corrupt)}"
        if fault:
            raise AlignmentError(
                f"clean and corrupt are not aligned: {fault}. Cut both clips to one length (clip.trimmed) and size, "
                "and ask questions of equally many tokens."
            )

    @property
    def differing(self) -> Span:
        """The positions whose text token differs in some example; media placeholders are equal by construction."""
        unequal = (self.clean.ids != self.corrupt.ids.to(self.clean.ids.device)).any(dim=0)
        return Span(np.flatnonzero(unequal.cpu().numpy()).astype(np.int64), self.clean.spans)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, item: int | slice) -> Pair:
        return Pair(clean=self.clean[item], corrupt=self.corrupt[item])


_PICTURE = {"in_video": "video", "separate": "video", "video_only": "video", "image_audio": "image", "image": "image"}


def without_sound(model: Any, x: AVInputs) -> AVInputs:
    """Encode the same clips and questions for a model, without their sound; of sound alone becomes text alone."""
    if len(x.spans["generated"]):
        raise InputError("these inputs hold an answer; take the sound out of the prompt that x.continued() was given.")
    silent: list[AVInputs] = []
    for one in x:
        made = one.provenance
        if "asked" not in made:
            raise InputError("these inputs do not say how they were made; make them with model.encode.")
        options = {"system": None, "prefix": ""} | {k: made[k] for k in ("system", "prefix", "fps") if k in made}
        picture = _PICTURE.get(one.layout)
        clip = one.clips[0] if picture else None
        silent.append(model.encode(clip, made["asked"], sound=None, picture=picture, **options))
    return AVInputs.stack(silent)


def shared_positions(
    x: AVInputs, other: AVInputs, config: Any
) -> tuple[Int64[np.ndarray, " shared"], Int64[np.ndarray, " shared"]]:
    """Match the positions of two prompts that differ in sound alone, as they count in each; refuse others."""
    borders = family_of(config.model_type).media.sound_borders(config)
    kept = [_unheard(one, borders) for one in (x, other)]
    ids = [one.ids[:, where].cpu().numpy() for one, where in zip((x, other), kept, strict=True)]
    n = min(part.shape[1] for part in ids)
    if len(x) != len(other):
        raise AlignmentError(f"{len(x)} examples against {len(other)}: give the same clips on both sides.")
    unequal = np.flatnonzero((ids[0][:, :n] != ids[1][:, :n]).any(axis=0))
    if len(unequal) or ids[0].shape != ids[1].shape:
        at = int(unequal[0]) if len(unequal) else n
        shown = [_shown(one, where, at) for one, where in zip((x, other), kept, strict=True)]
        raise AlignmentError(
            f"these prompts differ in more than the sound: their token {at}, sound left out, is {shown[0]} and "
            f"{shown[1]}. Ask the same question about the same clip, by models of one vocabulary."
        )
    return kept[0], kept[1]


def _unheard(x: AVInputs, borders: tuple[int, ...]) -> np.ndarray:
    heard = np.array([role == "audio" for role in x.spans.roles])
    border = np.isin(x.ids[0].cpu().numpy(), borders)
    return np.flatnonzero(~heard & ~border).astype(np.int64)


def _shown(x: AVInputs, where: np.ndarray, at: int) -> str:
    if at >= len(where):
        return "missing"
    position = int(where[at])
    return f"{x.spans.tokens[position]!r} (position {position}, {x.spans.roles[position]})"
