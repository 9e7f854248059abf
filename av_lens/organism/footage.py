"""Clips of the world as the models get them: written to mp4, decoded back, frames sampled, mel spectrograms taken.

A shard is one class of one split on disk (`.npz`, no pickle); shards that exist are not made again, so filming resumes
where it stopped. Filming is the slow part of training (tens of milliseconds a clip), and the same for every model.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from av_lens.core.progress import Progress, silent
from av_lens.media import Clip, load_clip
from av_lens.organism import anatomy, world
from av_lens.organism.grammar import CLASSES, COLOURS
from av_lens.organism.layouts import MEL_FRAMES
from av_lens.organism.pictures import FRAME_RATE
from av_lens.organism.sounds import N_SAMPLES, RATE
from av_lens.organism.towers import Views
from av_lens.whole_files import make_folder, reading, whole_file

CRF_RANGE = (16, 27)
"""Training clips are compressed from nearly clean to visibly coarse; `Clip.save` itself uses 17."""
PER_CLASS = {"train": 400, "check": 40, "discovery": 60, "test": 60}


def through_mp4(clip: Clip, *, crf: float = 17.0) -> Clip:
    """Write a clip to an mp4 file and read it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clip.mp4")
        clip.save(path, crf=crf)
        return load_clip(path)


def as_clip(example: world.Example) -> Clip:
    """Wrap an example of the world as a clip."""
    return Clip.from_arrays(frames=example.frames, fps=FRAME_RATE, waveform=example.waveform, rate=RATE)


def mel(waveforms: list[Any]) -> Float32[np.ndarray, "clip mel frame"]:
    """Take log-mel spectrograms as the processor does, cut to the sound's two seconds."""
    extractor = anatomy.feature_extractor()
    # The processor pads with zeros to 300 s; one window of zeros gives the same 200 frames.
    padded = [np.pad(wave[:N_SAMPLES], (0, N_SAMPLES - len(wave[:N_SAMPLES]) + 2 * 160)) for wave in waveforms]
    made = extractor(padded, sampling_rate=RATE, padding="longest", return_tensors="np")
    return made["input_features"][:, :, :MEL_FRAMES].astype(np.float32)


def film(split: str, name: str, n: int, path: str, first: int = 0) -> str:
    """Make one shard: `n` clips of a class and split, through mp4."""
    frames, waveforms, hashes = [], [], []
    for seed in range(first, first + n):
        crf = np.random.default_rng([world.SPLITS[split], seed]).integers(*CRF_RANGE) if split == "train" else 17
        clip = through_mp4(as_clip(world.example(split, name, seed)), crf=float(crf))
        frames.append(np.asarray(clip.frames)[::2])
        waveforms.append(np.asarray(clip.waveform))
        hashes.append((clip.picture_hash or "", clip.sound_hash or ""))
    spectra = np.concatenate([mel(waveforms[start : start + 50]) for start in range(0, n, 50)])
    colours = [COLOURS.index(world.colour_of(split, name, seed)) for seed in range(first, first + n)]
    with whole_file(Path(path)) as beside, beside.open("wb") as file:
        np.savez(file, frames=np.stack(frames), mel=spectra, colour=np.array(colours), hashes=np.array(hashes))
    return path


def _shard(folder: str | os.PathLike[str], split: str, name: str, n: int, first: int) -> Path:
    """Where a shard is kept."""
    return Path(folder) / f"{split}_{name}_{n}{f'_from_{first}' if first else ''}.npz"


def film_all(
    folder: str | os.PathLike[str],
    *,
    per_class: dict[str, int] | None = None,
    first: int = 0,
    workers: int = 2,
    progress: Progress | None = None,
) -> None:
    """Make every shard that is not there yet."""
    wanted, tell = per_class or PER_CLASS, progress or silent
    make_folder(Path(folder))
    jobs = [(split, name, n, _shard(folder, split, name, n, first)) for split, n in wanted.items() for name in CLASSES]
    todo = [(split, name, n, str(path), first) for split, name, n, path in jobs if not path.exists()]
    for done, _ in enumerate(_filmed(todo, workers), len(jobs) - len(todo) + 1):
        tell("filming the world", done, len(jobs))


def _filmed(todo: list[tuple[str, str, int, str, int]], workers: int) -> Iterator[str]:
    """Shards as they are done, in whatever order."""
    if workers == 1 or len(todo) < 2:
        for job in todo:
            yield film(*job)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            for job in concurrent.futures.as_completed([pool.submit(film, *job) for job in todo]):
                yield job.result()
        except BaseException:  # stopped: those that have not begun never do
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def views(
    folder: str | os.PathLike[str], split: str, *, n: int | None = None, first: int = 0
) -> tuple[Views, list[list[str]]]:
    """Read a split's shards."""
    n = n or PER_CLASS[split]
    shards = [_opened(_shard(folder, split, name, n, first)) for name in CLASSES]
    label = torch.arange(len(CLASSES)).repeat_interleave(n)
    whole = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    frames, mels, colour = (torch.from_numpy(whole[name]) for name in ("frames", "mel", "colour"))
    return Views(frames, mels, label, label, colour), whole["hashes"].tolist()


def _opened(shard: Path) -> dict[str, np.ndarray]:
    with reading(shard), np.load(shard) as data:
        return {name: data[name] for name in ("frames", "mel", "colour", "hashes")}
