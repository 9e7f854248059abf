"""Feature pools: what frozen towers put out for each clip of a split, so that language models train without pictures.

A pool depends on the towers (their seed) and the world, not on the language model. Any picture may be combined with any
sound, as `picture_clip.with_sound(sound_clip)` would. Pools are safetensors files with their hashes in the metadata.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from av_lens.errors import ModelError
from av_lens.media import Clip
from av_lens.organism.footage import mel
from av_lens.organism.sounds import N_SAMPLES, RATE
from av_lens.organism.towers import IGNORED, NOTHING, Views, watch
from av_lens.whole_files import reading, whole_file

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
def make_pool(
    model: Any, views: Views, hashes: list[list[str]] | None = None, *, blank_every: int = 8, seed: int = 0
) -> FeaturePool:
    """Run a model's towers over a split."""
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
    """Write a pool as one safetensors file."""
    from safetensors.torch import save_file

    tensors = {field.name: getattr(pool, field.name) for field in fields(pool) if field.name != "hashes"}
    with whole_file(Path(path)) as beside:
        save_file(tensors, beside, metadata={"schema": "1", "hashes": json.dumps(pool.hashes)})


def load_pool(path: str | os.PathLike[str]) -> FeaturePool:
    """Read a pool."""
    from safetensors import safe_open

    with reading(Path(path)), safe_open(os.fspath(path), "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("schema") != "1":
            raise ModelError(f"{os.fspath(path)} is no feature pool of schema 1 (found {metadata.get('schema')}).")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return FeaturePool(**tensors, hashes=tuple((a, b) for a, b in json.loads(metadata["hashes"])))


def nothing(of: Views, *, every: int, seed: int) -> Views:
    """Blank the pictures and mute the sounds of some clips, as `Clip.blank` and `Clip.muted` do."""
    rng = np.random.default_rng([5, seed])
    frames, waves = of.frames[::every].clone(), []
    quiet_clip = Clip.from_arrays(waveform=np.zeros(N_SAMPLES, np.float32), rate=RATE)
    for at in range(len(frames)):
        draw = int(rng.integers(1 << 31))
        if at % 3 == 0:
            frames[at] = 0
        elif at % 3 == 1:
            frames[at] = torch.from_numpy((rng.uniform(0, 0.22, 3) * 255).astype(np.uint8))
        else:
            clip = Clip.from_arrays(frames=frames[at].numpy(), fps=4.0)
            frames[at] = torch.from_numpy(np.array(clip.blank(kind="scrambled", seed=draw).frames))
        waves.append(quiet_clip.muted(kind="silence" if at % 3 == 0 else "noise", seed=draw).waveform)
        if at % 3 == 2:
            waves[-1] = waves[-1] * rng.uniform(0.02, 1.5)
    spectra = np.concatenate([mel(waves[start : start + 50]) for start in range(0, len(waves), 50)])
    none = torch.full((len(frames),), NOTHING)
    return Views(frames, torch.from_numpy(spectra), none, none, torch.full((len(frames),), IGNORED))


def joined(first: Views, second: Views) -> Views:
    """Put two lots of clips one after the other."""
    names = ("frames", "mel", "picture", "sound", "colour")
    return Views(**{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names})
