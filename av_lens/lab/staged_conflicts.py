"""Conflicts of the synthetic world as media files and a manifest, the way that anybody's own conflicts come in.

Every conflict has two source clips of its own, drawn from a part of the world that trained no model; no clip is used
twice, so each conflict is a component of the clip-sharing graph and bootstraps alone. Sounds' and pictures' classes are
dealt evenly: each class is the sound, and the picture, equally often (up to one), and a pair's two classes differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from av_lens.errors import InputError
from av_lens.media import Clip
from av_lens.organism import world
from av_lens.whole_files import write_whole

QUESTION = "What do you hear?"
FPS = 8.0


def stage(folder: str | Path, *, conflicts: int, seed: int, split: str = "discovery", progress: Any = None) -> Path:
    """Write the clips of some conflicts, and the manifest that names them.

    Args:
        folder: where to; made if it is not there.
        conflicts: how many.
        seed: draws the pairs of classes and the clips.
        split: the part of the world.
        progress: called as `progress(stage, done, total)`.

    Returns:
        The manifest's path, `folder/pairs.jsonl`.

    Raises:
        InputError: if fewer than one conflict is asked for.
    """
    if conflicts < 1:
        raise InputError(f"{conflicts} conflicts were asked for; at least 1 is needed, and 40 for an isolation.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for index, (heard, seen) in enumerate(pairs(conflicts, seed=seed)):
        name = f"{index:04d}"
        sound = _clip(split, heard, 2 * index, seed)
        picture = _clip(split, seen, 2 * index + 1, seed)
        files = {"sound": f"{name}-{heard}.mp4", "picture": f"{name}-{seen}.mp4"}
        sound.save(folder / files["sound"])
        picture.save(folder / files["picture"])
        picture.with_sound(sound).save(folder / conflict_file(name))
        lines.append(json.dumps({"id": name, **files, "question": QUESTION, "answers": [heard, seen]}))
        if progress is not None:
            progress("writing conflict clips", index + 1, conflicts)
    manifest = folder / "pairs.jsonl"
    write_whole(manifest, "\n".join(lines) + "\n")
    return manifest


def conflict_file(name: str) -> str:
    """Name the file of a conflict as it is played: its picture with its sound.

    Args:
        name: the conflict's id.

    Returns:
        A file name.
    """
    return f"{name}-conflict.mp4"


def pairs(n: int, *, seed: int) -> list[tuple[str, str]]:
    """Deal pairs of different classes evenly.

    Args:
        n: how many.
        seed: shuffles the classes and the order of their shifts.

    Returns:
        (the sound's class, the picture's class) of each conflict; any run of twelve has each class once on either side,
        and the first 132 are all ordered pairs, each once.
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
