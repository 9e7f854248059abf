"""Feature pools: what frozen towers put out for each clip of a split, so that language models train without pictures.

A pool depends on the towers (their seed) and the world, not on the language model. Any picture may be combined with any
sound, as `picture_clip.with_sound(sound_clip)` would. Pools are safetensors files with their hashes in the metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from av_lens.errors import ModelError
from av_lens.organism.footage import nothing
from av_lens.organism.towers import Views, audio_hidden, patches, vision_features
from av_lens.whole_files import reading, whole_file

Progress = Callable[[str, int, int], None]
BLANK_KINDS = ("black", "dim", "scrambled")
MUTE_KINDS = ("silence", "noise", "louder noise")


@dataclass(frozen=True, eq=False)
class FeaturePool:
    """Tower outputs of one split's clips.

    Attributes:
        video: what is put at the video tokens.
        audio_hidden: the input of the audio tower's projector.
        audio: what is put at the audio tokens: the projector's output.
        label: class of the picture and of the sound.
        colour: colour of the picture.
        seed: `world.example(split, class, seed)` makes the clip again.
        blank_video: pictures that show nothing.
        blank_kind: which kind of nothing, an index into `BLANK_KINDS`.
        mute_audio_hidden: sounds that say nothing, before the projector.
        mute_audio: the same after it.
        mute_kind: which kind of nothing, an index into `MUTE_KINDS`.
        hashes: each clip's picture hash and sound hash, after mp4.
    """

    video: Float32[Tensor, "clip video_pos d_model"]
    audio_hidden: Float32[Tensor, "clip audio_pos d_tower"]
    audio: Float32[Tensor, "clip audio_pos d_model"]
    label: Int64[Tensor, " clip"]
    colour: Int64[Tensor, " clip"]
    seed: Int64[Tensor, " clip"]
    blank_video: Float32[Tensor, "blank video_pos d_model"]
    blank_kind: Int64[Tensor, " blank"]
    mute_audio_hidden: Float32[Tensor, "blank audio_pos d_tower"]
    mute_audio: Float32[Tensor, "blank audio_pos d_model"]
    mute_kind: Int64[Tensor, " blank"]
    hashes: tuple[tuple[str, str], ...]


@torch.no_grad()
def watch(model: Any, views: Views, *, batch: int = 120) -> tuple[Tensor, Tensor]:
    """Run both towers over clips.

    Args:
        model: a thinker, not wrapped.
        views: the clips.
        batch: clips at a time.

    Returns:
        What is put at the video tokens, and the input of the audio tower's projector.
    """
    seen = [vision_features(model, patches(frames[:, :: frames.shape[1] // 4])) for frames in views.frames.split(batch)]
    heard = [audio_hidden(model, mel) for mel in views.mel.split(batch)]
    return torch.cat(seen), torch.cat(heard)


@torch.no_grad()
def make_pool(
    model: Any, views: Views, hashes: list[list[str]] | None = None, *, blank_every: int = 8, seed: int = 0
) -> FeaturePool:
    """Run a model's towers over a split.

    Args:
        model: a thinker whose towers are trained.
        views: the split's clips, as many of each class, class after class.
        hashes: each clip's picture and sound hash.
        blank_every: one blank picture and one mute sound for each so many clips.
        seed: decides the blanks and mutes.

    Returns:
        The pool.
    """
    project = model.model.audio_tower.proj
    video, hidden = watch(model, views)
    empty = nothing(views, every=blank_every, seed=seed)
    blank, mute = watch(model, empty)
    per_class = int((views.picture == 0).sum())
    kind = torch.arange(len(blank)) % 3
    return FeaturePool(
        video=video,
        audio_hidden=hidden,
        audio=project(hidden),
        label=views.picture.clone(),
        colour=views.colour.clone(),
        seed=torch.arange(len(video)) % per_class,
        blank_video=blank,
        blank_kind=kind,
        mute_audio_hidden=mute,
        mute_audio=project(mute),
        mute_kind=kind.clone(),
        hashes=tuple((picture, sound) for picture, sound in hashes or ()),
    )


def save_pool(pool: FeaturePool, path: str | os.PathLike[str]) -> None:
    """Write a pool as one safetensors file.

    Args:
        pool: the pool.
        path: where to.
    """
    from safetensors.torch import save_file

    tensors = {field.name: getattr(pool, field.name) for field in fields(pool) if field.name != "hashes"}
    with whole_file(Path(path)) as beside:
        save_file(tensors, beside, metadata={"schema": "1", "hashes": json.dumps(pool.hashes)})


def load_pool(path: str | os.PathLike[str]) -> FeaturePool:
    """Read a pool.

    Args:
        path: a file that `save_pool` wrote.

    Returns:
        The pool.

    Raises:
        ModelError: if the file has another schema.
    """
    from safetensors import safe_open

    with reading(Path(path)), safe_open(os.fspath(path), "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("schema") != "1":
            raise ModelError(f"{os.fspath(path)} is no feature pool of schema 1 (found {metadata.get('schema')}).")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return FeaturePool(**tensors, hashes=tuple((a, b) for a, b in json.loads(metadata["hashes"])))
