"""From a name and a seed to a model: clips, towers, stages, checkpoint; each kept, so that nothing is done twice.

`train("av-tiny", seed=1)` films the world's clips, trains both towers, runs the recipe's stages and writes a checkpoint
folder that `load` reads. What is already there is not done again: an interrupted run goes on after the last part that
was finished, and models that begin alike (the base and `av-tiny`, the balanced model and the planted one) share their
beginnings. A stage's file carries a hash of all that went before it, so that a changed recipe is never continued from
old weights. Every part draws its randomness from the seed and its own name: the result is the same with and without an
interrupt, on the same kind of machine.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from av_lens.core.progress import Progress
from av_lens.lab.planting.planted import changed_elsewhere, measure
from av_lens.lab.planting.runs import bench
from av_lens.lab.training.engine import train_stage
from av_lens.lab.training.head_slices import head_slices
from av_lens.lab.training.material import Material, make_frame, make_words, material
from av_lens.lab.training.pools import FeaturePool, load_pool
from av_lens.lab.training.preparation import load_towers, prepare
from av_lens.lab.training.recipes import N_LAYERS, Recipe, recipe
from av_lens.lab.training.stages import is_fusion
from av_lens.organism.anatomy import build_model, thinker_config
from av_lens.organism.saving import save_checkpoint
from av_lens.whole_files import make_folder, reading, whole_file

TRUTH_CONFLICTS = 240


def fusion_state(model: Any) -> dict[str, Tensor]:
    """Copy the weights of the fusion layers."""
    return {n: v.detach().clone().contiguous() for n, v in model.state_dict().items() if is_fusion(n)}


def load_state(model: Any, path: Path) -> None:
    """Read weights into a model; what the file does not name stays."""
    with reading(path):
        model.load_state_dict(load_file(path), strict=False)


def stage_files(course: Recipe, seed: int, folder: Path) -> list[Path]:
    """Name the file that each stage ends with; equal for recipes that are equal up to that stage."""
    digest = hashlib.sha256(f"{seed} {course.silent_heads}".encode())
    files: list[Path] = []
    for stage in course.stages:
        digest.update(repr(stage).encode())
        files.append(folder / f"{stage.name.replace(' ', '-')}-{digest.hexdigest()[:12]}.safetensors")
    return files


def newborn(course: Recipe, *, seed: int) -> Any:
    """Make the model that a recipe begins with: random, its towers too, with the silent heads' outputs at zero."""
    model = build_model(thinker_config(n_layers=N_LAYERS), seed=seed)
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
        with whole_file(path) as beside:
            save_file(fusion_state(model), beside)


def planted_truth(model: Any, course: Recipe, *, seed: int, folder: Path, pool: FeaturePool) -> dict[str, Any]:
    """Measure what was planted, against the model as it was before the last stage, as plain data."""
    before = copy.deepcopy(model)
    load_state(before, stage_files(course, seed, folder)[-2])
    before.half().float()
    heads, frame = course.planted_heads, make_frame("separate")
    truth = measure(bench(model, before, heads, pool, make_words(), frame, n=TRUTH_CONFLICTS, seed=seed))
    return {**truth.as_dict(), "changed_elsewhere": changed_elsewhere(model, before, heads)}


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
    prepared = prepare(place, seed=seed, progress=progress)
    model = newborn(course, seed=seed)
    load_towers(model, prepared.towers)
    lessons = material(load_pool(prepared.pools["train"]))
    run_stages(model, course, lessons, seed=seed, folder=stages, progress=progress)
    model.half().float()  # what a checkpoint holds
    described = [dataclasses.asdict(stage) for stage in course.stages]
    documents: dict[str, Any] = {"training.json": {"name": name, "seed": seed, "stages": described}}
    if course.planted_heads:
        pool = load_pool(prepared.pools["discovery"])
        documents["planted.json"] = planted_truth(model, course, seed=seed, folder=stages, pool=pool)
    return save_checkpoint(model, target, documents=documents)
