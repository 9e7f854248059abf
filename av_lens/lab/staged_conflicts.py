"""Conflicts of the synthetic world as media files and a manifest, the way that anybody's own conflicts come in.

Every conflict has two source clips of its own, drawn from a part of the world that trained no model; no clip is used
twice, so each conflict is a component of the clip-sharing graph and bootstraps alone. Sounds' and pictures' classes are
dealt evenly: each class is the sound, and the picture, equally often (up to one), and a pair's two classes differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from av_lens.core.progress import Progress, silent
from av_lens.errors import InputError
from av_lens.media import Clip
from av_lens.organism import world
from av_lens.whole_files import make_folder, write_whole

QUESTION = "What do you hear?"
FPS = 8.0


def stage(
    folder: str | Path, *, conflicts: int, seed: int, split: str = "discovery", progress: Progress | None = None
) -> Path:
    """Write the clips of some conflicts, and the manifest that names them."""
    if conflicts < 1:
        raise InputError(f"{conflicts} conflicts were asked for; at least 1 is needed, and 40 for an isolation.")
    folder, tell = make_folder(Path(folder)), progress or silent
    lines: list[dict[str, Any]] = []
    for index, (heard, seen) in enumerate(pairs(conflicts, seed=seed)):
        name = f"{index:04d}"
        sound, picture = _clip(split, heard, 2 * index, seed), _clip(split, seen, 2 * index + 1, seed)
        files = {"sound": f"{name}-{heard}.mp4", "picture": f"{name}-{seen}.mp4"}
        sound.save(folder / files["sound"])
        picture.save(folder / files["picture"])
        picture.with_sound(sound).save(folder / conflict_file(name))
        lines.append({"id": name, **files, "question": QUESTION, "answers": [heard, seen]})
        tell("writing conflict clips", index + 1, conflicts)
    return write_manifest(folder, lines)


def write_manifest(folder: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write a manifest of conflicts, a line each."""
    manifest = folder / "pairs.jsonl"
    write_whole(manifest, "\n".join(map(json.dumps, lines)) + "\n")
    return manifest


def conflict_file(name: str) -> str:
    """Name the file of a conflict, by its id, as it is played: its picture with its sound."""
    return f"{name}-conflict.mp4"


def pairs(n: int, *, seed: int) -> list[tuple[str, str]]:
    """Deal pairs of different classes evenly: the sound's, the picture's.

    Any run of twelve has each class once on either side, and the first 132 are all ordered pairs, each once.
    """
    rng = np.random.default_rng([seed, 0xC0])
    names = [str(name) for name in rng.permutation(world.classes())]
    size = len(names)
    shifts = 1 + rng.permutation(size - 1)
    return [(names[i % size], names[(i + int(shifts[i // size % (size - 1)])) % size]) for i in range(n)]


def _clip(split: str, name: str, index: int, seed: int) -> Clip:
    """Make one clip of the world; its seed belongs to this conflict alone."""
    made = world.example(split, name, 100_000 * (seed + 1) + index)
    rate = round(len(made.waveform) * FPS / len(made.frames))
    return Clip.from_arrays(frames=made.frames, fps=FPS, waveform=made.waveform, rate=rate)
