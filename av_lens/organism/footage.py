"""The synthetic world: clips remade from (split, class, seed), as the models get them, and those evaluation asks about.

Clips of different splits never share a seed's random stream; `public` ones are those that `clip` gives to users. A
shard is one class of one split on disk (`.npz`, no pickle), not made again. Of the held-out clips, clip i's conflict
takes the sound of clip `partner[i]`, another class; every picture and every sound occurs once.
"""

import concurrent.futures
import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core.budget import Progress, silent
from av_lens.errors import InputError
from av_lens.media import Clip, load_clip
from av_lens.organism import anatomy, pictures, sounds
from av_lens.organism.anatomy import CLASSES, COLOURS
from av_lens.organism.language import MEL_FRAMES, Views, watch
from av_lens.organism.pictures import FRAME_RATE
from av_lens.organism.sounds import N_SAMPLES, RATE
from av_lens.whole_files import make_folder, reading, whole_file

SPLITS: dict[str, int] = {"public": 0, "train": 1, "check": 2, "discovery": 3, "test": 4}
_PICTURE, _SOUND, _COLOUR = 0, 1, 2


def classes() -> tuple[str, ...]:
    """List the things of the world: their names, which are also the models' answers."""
    return CLASSES


def colours() -> tuple[str, ...]:
    """List the colours that pictures come in: their names, which are also the models' answers."""
    return COLOURS


def _stream(split: str, name: str, seed: int, stream: int) -> np.random.Generator:
    """The generator of one aspect of one example."""
    require_choice("split", split, SPLITS)
    require_choice("class", name, CLASSES)
    if seed < 0:
        raise InputError(f"a seed is a whole number from 0; found {seed}.")
    return np.random.default_rng([SPLITS[split], CLASSES.index(name), seed, stream])


def colour_of(split: str, name: str, seed: int) -> str:
    """Say which colour an example's picture has."""
    return COLOURS[int(_stream(split, name, seed, _COLOUR).integers(len(COLOURS)))]


def example(split: str, seen: str, seed: int, *, heard: str | None = None, colour: str | None = None) -> Clip:
    """Make one thing of a part of the world, seen (in its own or another colour) and heard; not compressed."""
    rng, name = _stream(split, seen, seed, _PICTURE), heard or seen
    return Clip.from_arrays(
        frames=pictures.draw(seen, colour=colour or colour_of(split, seen, seed), rng=rng),
        fps=FRAME_RATE,
        waveform=sounds.play(name, rng=_stream(split, name, seed, _SOUND)),
        rate=RATE,
    )


def clip(
    name: str, *, seed: int = 0, picture: str | None = None, sound: str | None = None, colour: str | None = None
) -> Clip:
    """Make a clip of a thing, seen and heard, that no model was trained or evaluated on.

    Args:
        name: one of `classes()`.
        seed: which one.
        picture: show another class instead, or "blank" for nothing to see.
        sound: let another class sound instead, or "mute" for nothing to hear.
        colour: one of `colours()` instead of the seed's.

    Returns:
        Two seconds: 16 frames of 84 x 84 at 8 frames a second, and 16 kHz sound; not compressed.

    Raises:
        InputError: if a class, a colour or the seed is not one.
    """
    shown = name if picture in (None, "blank") else picture
    heard = name if sound in (None, "mute") else sound
    require_choice("class", name, CLASSES)
    made = example("public", shown, seed, heard=heard, colour=colour)
    made = made.blank() if picture == "blank" else made
    return made.muted() if sound == "mute" else made


CRF_RANGE = (16, 27)  # training clips are compressed from nearly clean to visibly coarse; `Clip.save` itself uses 17
PER_CLASS = {"train": 400, "check": 40, "discovery": 60, "test": 60}


def through_mp4(clip: Clip, *, crf: float = 17.0) -> Clip:
    """Write a clip to an mp4 file and read it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clip.mp4")
        clip.save(path, crf=crf)
        return load_clip(path)


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
        crf = np.random.default_rng([SPLITS[split], seed]).integers(*CRF_RANGE) if split == "train" else 17
        clip = through_mp4(example(split, name, seed), crf=float(crf))
        frames.append(np.asarray(clip.frames)[::2])
        waveforms.append(np.asarray(clip.waveform))
        hashes.append((clip.picture_hash or "", clip.sound_hash or ""))
    spectra = np.concatenate([mel(waveforms[start : start + 50]) for start in range(0, n, 50)])
    colours = [COLOURS.index(colour_of(split, name, seed)) for seed in range(first, first + n)]
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


def views_of(
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


SEED_STRIDE = 1000  # evaluation seed s takes the world's seeds from 1000 s on


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Clips to be asked about."""

    split: str  # the part of the world
    seed: int  # which set of clips
    per_class: int  # how many of each class
    views: Views  # frames and spectrograms, as decoded
    partner: Int64[Tensor, "clip"]  # whose sound makes each clip's conflict
    hashes: tuple[tuple[str, str], ...]  # each clip's picture hash and sound hash

    @property
    def digest(self) -> str:
        """One hash of all the clips' hashes, in order."""
        return hashlib.sha256("\n".join(part for pair in self.hashes for part in pair).encode()).hexdigest()

    def clip(self, at: int) -> Clip:
        """Make one clip again, through mp4."""
        name, seed = CLASSES[at // self.per_class], SEED_STRIDE * self.seed + at % self.per_class
        return through_mp4(example(self.split, name, seed))


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
        film_all(place, per_class={split: per_class}, first=first, workers=1, progress=progress)
        views, hashes = views_of(place, split, n=per_class, first=first)
    at = torch.arange(per_class)
    partner = [((label + 1 + at % (len(CLASSES) - 1)) % len(CLASSES)) * per_class + at for label in range(len(CLASSES))]
    return HeldOut(split, seed, per_class, views, torch.cat(partner), tuple((a, b) for a, b in hashes))


@dataclass(frozen=True, eq=False)
class Media:
    """What a model's towers put out for the held-out clips."""

    video: Float32[Tensor, "clip video_pos d_model"]  # for each clip's picture
    audio: Float32[Tensor, "clip audio_pos d_model"]  # for each clip's sound
    blank: Float32[Tensor, "blank video_pos d_model"]  # for a black picture
    mute: Float32[Tensor, "mute audio_pos d_model"]  # for silence, and for faint noise


@torch.no_grad()
def media(model: Any, clips: HeldOut) -> Media:
    """Run a model's towers over the held-out clips."""
    project = model.model.audio_tower.proj
    video, hidden = watch(model, clips.views)
    black = torch.zeros_like(clips.views.frames[:1])
    sound = Clip.from_arrays(waveform=np.zeros(N_SAMPLES, np.float32))
    quiet = [np.array(sound.muted(kind=kind).waveform) for kind in ("silence", "noise")]
    none = torch.zeros(2, dtype=torch.int64)
    empty = Views(black.repeat(2, 1, 1, 1, 1), torch.from_numpy(mel(quiet)), none, none, none)
    blank, mute = watch(model, empty)
    return Media(video, project(hidden), blank[:1], project(mute))
