"""How an embedded model is trained: recipes, their preparation, one course after the other.

What each model is for, and what it proves, stands in `docs/organisms.md`. Heads are dropped at random while the circuit
forms, at questions that should not depend on it; else taking them out would leave neither answer.

Everything lands in one folder; what is there is not made again, and models that begin alike share their beginnings. A
stage's file carries a hash of all that went before it, so that a changed recipe is never continued from old weights.
Every part draws from the seed and its own name: an interrupt changes nothing, on the same kind of machine.
"""

import copy
import dataclasses
import hashlib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core.budget import Progress, silent
from av_lens.errors import ModelError
from av_lens.lab.planting.planted import changed_elsewhere, measure
from av_lens.lab.planting.sheets import bench
from av_lens.lab.training import pools
from av_lens.lab.training.engine import Stage, TowerTraining, head_slices, is_fusion, train_stage
from av_lens.lab.training.pools import Ask, FeaturePool, Items, Material, load_pool, make_frame, make_words, material
from av_lens.organism import anatomy, footage
from av_lens.organism.anatomy import build_model, save_checkpoint, thinker_config
from av_lens.organism.language import Views
from av_lens.whole_files import make_folder, reading, whole_file


@dataclass(frozen=True)
class Recipe:
    """How one model is made."""

    name: str  # the model's short name
    summary: str  # what it is, in a line
    stages: tuple[Stage, ...]  # its stages in order; models whose first stages are equal share them
    silent_heads: tuple[tuple[int, int], ...] = ()  # heads whose output weights are zero until a stage trains them
    # heads that were planted, for the truth that is saved beside the weights
    planted_heads: tuple[tuple[int, int], ...] = ()
    caveat: str = ""  # what a finding about it does not show
    shape: tuple[tuple[str, int], ...] = ()  # of `thinker_config`, where it is not the usual one


@cache
def recipes() -> dict[str, Recipe]:
    """Read the recipes, by short name."""
    told = tomllib.loads((Path(__file__).parent / "recipes.toml").read_text(encoding="utf-8"))
    stages = {
        key: Stage(items=tuple(map(_items, said.pop("items"))), **_frozen(said)) for key, said in told["stage"].items()
    }
    return {
        name: Recipe(
            name,
            stages=tuple(stages[key] for key in said.pop("stages")),
            shape=tuple(said.pop("shape", {}).items()),
            **_frozen(said),
        )
        for name, said in told["recipe"].items()
    }


def recipe(name: str) -> Recipe:
    """Look up a recipe by its model's short name."""
    require_choice("organism", name, recipes())
    return recipes()[name]


def _frozen(said: Any) -> Any:
    """The same with tuples for lists, all the way down."""
    if isinstance(said, dict):
        return {key: _frozen(value) for key, value in said.items()}
    return tuple(map(_frozen, said)) if isinstance(said, list) else said


def _items(line: str) -> Items:
    """Read "media relation clips [deaf video]: question, question"."""
    what, asked = line.split(":")
    media, relation, clips, *deaf = what.split()
    asks = tuple(_ask(*words.split()) for words in asked.split(","))
    return Items(media, relation, float(clips) if "." in clips else int(clips), asks, *deaf[1:])


def _ask(kind: str, right: str, weight: str = "1", _: str = "drop", drop: str = "0") -> Ask:
    """Read "kind right [weight [drop share]]"."""
    return Ask(kind, right, float(weight), float(drop))


STEPS = {"audio": 300, "vision": 1600}
RATES = {"audio": 1.5e-3, "vision": 2e-3}
SPLITS = ("train", "discovery", "test")
_SNAPSHOT_EVERY = 200
_BLANKS = {"train": 8, "discovery": 2, "test": 2}


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
    folder: str | os.PathLike[str],
    *,
    seed: int,
    shape: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> tuple[Path, dict[str, Path]]:
    """Film the world, train both towers and pool what they put out, where not done yet; seeds may share `folder`."""
    tell, place = progress or silent, Path(folder)
    config = anatomy.thinker_config(**(shape or {}))
    told = f"seed{seed}" + (f"-width{config.text_config.hidden_size}" if shape else "")
    towers = place / f"towers-{told}.safetensors"
    pooled = {split: place / f"pool-{told}-{split}.safetensors" for split in SPLITS}
    if towers.exists() and all(path.exists() for path in pooled.values()):
        return towers, pooled
    wanted = {split: footage.PER_CLASS[split] for split in SPLITS}
    footage.film_all(place / "clips", per_class=wanted, progress=progress)
    model = build_model(config, seed=seed)
    if towers.exists():
        load_towers(model, towers)
    else:
        clips, _ = footage.views_of(place / "clips", "train")
        clips = pools.joined(clips, pools.nothing(clips, every=10, seed=seed))
        snapshots = {kind: place / f"{kind}-{told}.snapshot" for kind in STEPS}
        for kind, snapshot in snapshots.items():
            _train_tower(model, kind, clips, snapshot, seed, tell)
        _save({name: value for name, value in model.state_dict().items() if is_tower(name)}, towers)
        for snapshot in snapshots.values():
            snapshot.unlink(missing_ok=True)
    model.requires_grad_(False)
    for done, (split, path) in enumerate(pooled.items(), 1):
        if not path.exists():
            clips, hashes = footage.views_of(place / "clips", split)
            pool = pools.make_pool(model, clips, hashes, blank_every=_BLANKS[split], seed=SPLITS.index(split))
            pools.save_pool(pool, path)
        tell("pooling features", done, len(pooled))
    return towers, pooled


TRUTH_CONFLICTS = 240


def fusion_state(model: Any) -> dict[str, Tensor]:
    """Copy the weights of the fusion layers."""
    return {n: v.detach().clone() for n, v in model.state_dict().items() if is_fusion(n)}


def load_state(model: Any, path: Path) -> None:
    """Read weights into a model; what the file does not name stays."""
    with reading(path):
        model.load_state_dict(load_file(path), strict=False)


def stage_files(course: Recipe, seed: int, folder: Path) -> list[Path]:
    """Name the file that each stage ends with; equal for recipes that are equal up to that stage."""
    digest = hashlib.sha256(f"{seed} {course.silent_heads} {course.shape or ''}".rstrip().encode())
    files: list[Path] = []
    for stage in course.stages:
        digest.update(repr(stage).encode())
        files.append(folder / f"{stage.name.replace(' ', '-')}-{digest.hexdigest()[:12]}.safetensors")
    return files


def newborn(course: Recipe, *, seed: int) -> Any:
    """Make the model that a recipe begins with: random, its towers too, with the silent heads' outputs at zero."""
    model = build_model(thinker_config(**dict(course.shape)), seed=seed)
    held = dict(model.named_parameters())
    with torch.no_grad():
        for part in head_slices(model, course.silent_heads):
            if part.name.endswith("o_proj.weight"):
                part.of(held[part.name]).zero_()
    return model


def run_stages(
    model: Any, course: Recipe, lessons: Material, *, seed: int, folder: Path, progress: Progress | None = None
) -> None:
    """Take a model through a recipe's stages, in place, from the last one that was finished before."""
    files = stage_files(course, seed, folder)
    done = max((i + 1 for i, path in enumerate(files) if path.exists()), default=0)
    if done:
        load_state(model, files[done - 1])
    for stage, path in zip(course.stages[done:], files[done:], strict=True):
        train_stage(model, stage, lessons, seed=seed, progress=progress)
        make_folder(folder)
        _save(fusion_state(model), path)


def planted_truth(model: Any, course: Recipe, *, seed: int, folder: Path, pool: FeaturePool) -> dict[str, Any]:
    """Measure what was planted, against the model as it was before the last stage, as plain data."""
    before = copy.deepcopy(model)
    load_state(before, stage_files(course, seed, folder)[-2])
    before.half().float()
    heads, frame = course.planted_heads, make_frame("separate")
    truth = measure(bench(model, before, heads, pool, make_words(), frame, n=TRUTH_CONFLICTS, seed=seed))
    return {**truth.as_dict(), "changed_elsewhere": changed_elsewhere(model, before, head_slices(model, heads))}


def train(
    name: str,
    *,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train one of the embedded models from nothing and write it as a checkpoint folder."""
    course = recipe(name)
    place = Path.home() / ".cache" / "av_lens" / "organism" if work is None else Path(work)
    target = place / "models" / f"{name}-seed{seed}" if out is None else Path(out)
    stages = place / f"stages-seed{seed}"
    towers, pooled = prepare(place, seed=seed, shape=dict(course.shape), progress=progress)
    model = newborn(course, seed=seed)
    load_towers(model, towers)
    run_stages(model, course, material(load_pool(pooled["train"])), seed=seed, folder=stages, progress=progress)
    model.half().float()  # what a checkpoint holds
    described = [dataclasses.asdict(stage) for stage in course.stages]
    documents: dict[str, Any] = {"training.json": {"name": name, "seed": seed, "stages": described}}
    if course.planted_heads:
        pool = load_pool(pooled["discovery"])
        documents["planted.json"] = planted_truth(model, course, seed=seed, folder=stages, pool=pool)
    return save_checkpoint(model, target, documents=documents)
