"""The clips that evaluation asks about: fixed by split and seed, written to mp4, decoded back, known by content hash.

Clip i shows and sounds like one thing. Its conflict takes the sound of clip `partner[i]`, another class; every picture
and every sound occurs once. The blank picture is black and the mute sounds are silence and faint noise, as
`Clip.blank()` and `Clip.muted()` make them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from av_lens.core.progress import Progress
from av_lens.errors import InputError
from av_lens.media import Clip
from av_lens.organism import footage, world
from av_lens.organism.grammar import CLASSES
from av_lens.organism.sounds import N_SAMPLES
from av_lens.organism.towers import Views, watch

SEED_STRIDE = 1000
"""Evaluation seed s takes the world's seeds from 1000 s on."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Clips to be asked about.

    Attributes:
        split: the part of the world.
        seed: which set of clips.
        per_class: how many of each class.
        views: frames and spectrograms, as decoded.
        partner: whose sound makes each clip's conflict.
        hashes: each clip's picture hash and sound hash.
    """

    split: str
    seed: int
    per_class: int
    views: Views
    partner: Int64[Tensor, "clip"]
    hashes: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """One hash of all the clips' hashes, in order."""
        return hashlib.sha256("\n".join(part for pair in self.hashes for part in pair).encode()).hexdigest()

    def clip(self, at: int) -> Clip:
        """Make one clip again, through mp4."""
        name, seed = CLASSES[at // self.per_class], SEED_STRIDE * self.seed + at % self.per_class
        return footage.through_mp4(footage.as_clip(world.example(self.split, name, seed)))


def held_out(
    *,
    split: str = "test",
    seed: int = 0,
    per_class: int = 60,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> HeldOut:
    """Film the clips of an evaluation set."""
    if not 1 <= per_class <= SEED_STRIDE:
        raise InputError(f"an evaluation set has 1 to {SEED_STRIDE} clips of each class; asked for {per_class}.")
    first = SEED_STRIDE * seed
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or scratch
        footage.film_all(place, per_class={split: per_class}, first=first, workers=1, progress=progress)
        views, hashes = footage.views(place, split, n=per_class, first=first)
    at = torch.arange(per_class)
    partner = [((label + 1 + at % (len(CLASSES) - 1)) % len(CLASSES)) * per_class + at for label in range(len(CLASSES))]
    return HeldOut(split, seed, per_class, views, torch.cat(partner), tuple((a, b) for a, b in hashes))


@dataclass(frozen=True, eq=False)
class Media:
    """What a model's towers put out for the held-out clips.

    Attributes:
        video: for each clip's picture.
        audio: for each clip's sound.
        blank: for a black picture.
        mute: for silence, and for faint noise.
    """

    video: Float32[Tensor, "clip video_pos d_model"]
    audio: Float32[Tensor, "clip audio_pos d_model"]
    blank: Float32[Tensor, "blank video_pos d_model"]
    mute: Float32[Tensor, "mute audio_pos d_model"]


@torch.no_grad()
def media(model: Any, clips: HeldOut) -> Media:
    """Run a model's towers over the held-out clips."""
    project = model.model.audio_tower.proj
    video, hidden = watch(model, clips.views)
    black = torch.zeros_like(clips.views.frames[:1])
    sound = Clip.from_arrays(waveform=np.zeros(N_SAMPLES, np.float32))
    quiet = [np.array(sound.muted(kind=kind).waveform) for kind in ("silence", "noise")]
    none = torch.zeros(2, dtype=torch.int64)
    empty = Views(black.repeat(2, 1, 1, 1, 1), torch.from_numpy(footage.mel(quiet)), none, none, none)
    blank, mute = watch(model, empty)
    return Media(video, project(hidden), blank[:1], project(mute))
