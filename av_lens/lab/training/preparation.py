"""All that comes before a language model trains: the world is filmed, the towers are trained, their outputs are pooled.

Everything lands in one folder, and what is there already is not made again: `clips/` (the same for every seed),
`towers-seed0.safetensors`, `pool-seed0-train.safetensors` and so on. A tower that was interrupted goes on from its last
snapshot.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from av_lens.core.progress import Progress, silent
from av_lens.errors import ModelError
from av_lens.lab.training import pools
from av_lens.lab.training.tower_training import TowerTraining
from av_lens.organism import anatomy, footage
from av_lens.organism.towers import Views
from av_lens.whole_files import reading, whole_file

STEPS = {"audio": 300, "vision": 1600}
RATES = {"audio": 1.5e-3, "vision": 2e-3}
SPLITS = ("train", "discovery", "test")
_SNAPSHOT_EVERY = 200
_BLANKS = {"train": 8, "discovery": 2, "test": 2}


@dataclass(frozen=True)
class Prepared:
    """Where stage 0 left its results.

    Attributes:
        towers: the towers' weights, named as in the thinker's state dict.
        pools: feature pools by split, for `pools.load_pool`.
    """

    towers: Path
    pools: dict[str, Path]


def is_tower(name: str) -> bool:
    """Say whether a weight of a thinker's state dict belongs to a tower."""
    return name.startswith(("model.visual.", "model.audio_tower."))


def load_towers(model: Any, path: str | os.PathLike[str]) -> None:
    """Put trained towers into a thinker; its other weights stay."""
    with reading(Path(path)):
        weights = load_file(os.fspath(path))
    wanted = {name for name in model.state_dict() if is_tower(name)}
    if wanted != set(weights):
        raise ModelError(f"{os.fspath(path)} does not hold this anatomy's towers; differing: {wanted ^ set(weights)}.")
    model.load_state_dict(weights, strict=False)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with whole_file(path) as beside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, beside)


def _train_tower(model: Any, kind: str, views: Views, snapshot: Path, seed: int, tell: Progress) -> None:
    """Train one tower in place, with snapshots."""
    training = TowerTraining(model, kind, views, seed=seed, steps=STEPS[kind], rate=RATES[kind])
    if snapshot.exists():
        with reading(snapshot):
            training.restore(load_file(snapshot))
    while training.done < training.steps:
        training.advance()
        if training.done % _SNAPSHOT_EVERY == 0 or training.done == training.steps:
            _save(training.state(), snapshot)
        tell(f"{kind} tower", training.done, training.steps)


def prepare(
    folder: str | os.PathLike[str], *, seed: int, workers: int = 2, progress: Progress | None = None
) -> Prepared:
    """Film the world, train both towers and pool what they put out, as far as that is not done yet.

    `folder` may be shared by seeds; `workers` processes film.
    """
    tell = progress or silent
    place = Path(folder)
    towers = place / f"towers-seed{seed}.safetensors"
    made = Prepared(towers, {split: place / f"pool-seed{seed}-{split}.safetensors" for split in SPLITS})
    if towers.exists() and all(path.exists() for path in made.pools.values()):
        return made
    wanted = {split: footage.PER_CLASS[split] for split in SPLITS}
    footage.film_all(place / "clips", per_class=wanted, workers=workers, progress=progress)
    model = anatomy.build_model(seed=seed)
    if towers.exists():
        load_towers(model, towers)
    else:
        clips, _ = footage.views(place / "clips", "train")
        clips = pools.joined(clips, pools.nothing(clips, every=10, seed=seed))
        snapshots = {kind: place / f"{kind}-seed{seed}.snapshot" for kind in STEPS}
        for kind, snapshot in snapshots.items():
            _train_tower(model, kind, clips, snapshot, seed, tell)
        _save({name: value for name, value in model.state_dict().items() if is_tower(name)}, towers)
        for snapshot in snapshots.values():
            snapshot.unlink(missing_ok=True)
    model.requires_grad_(False)
    for done, (split, path) in enumerate(made.pools.items(), 1):
        if not path.exists():
            clips, hashes = footage.views(place / "clips", split)
            pool = pools.make_pool(model, clips, hashes, blank_every=_BLANKS[split], seed=SPLITS.index(split))
            pools.save_pool(pool, path)
        tell("pooling features", done, len(made.pools))
    return made
