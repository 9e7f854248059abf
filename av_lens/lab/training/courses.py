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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from av_lens.lab.planting.planted import changed_elsewhere, measure
from av_lens.lab.planting.runs import bench
from av_lens.lab.training.engine import train_stage
from av_lens.lab.training.material import Material, make_frame, make_words, material
from av_lens.lab.training.preparation import load_towers, prepare
from av_lens.lab.training.recipes import N_LAYERS, Recipe, recipe
from av_lens.lab.training.stages import is_fusion
from av_lens.organism.anatomy import build_model, thinker_config
from av_lens.organism.pools import FeaturePool, load_pool
from av_lens.organism.saving import save_checkpoint
from av_lens.whole_files import make_folder, reading, whole_file

Progress = Callable[[str, int, int], None]
"""Told what is being done, the steps done and the steps in all."""
TRUTH_CONFLICTS = 240


def fusion_state(model: Any) -> dict[str, Tensor]:
    """Collect the weights of the fusion layers.

    Args:
        model: The model.

    Returns:
        Name to weight, copied.
    """
    return {n: v.detach().clone().contiguous() for n, v in model.state_dict().items() if is_fusion(n)}


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write weights so that an interrupt leaves either the whole file or none.

    Args:
        state: Name to weight.
        path: Where.
    """
    make_folder(path.parent)
    with whole_file(path) as beside:
        save_file(dict(state), beside)


def load_state(model: Any, path: Path) -> None:
    """Read weights into a model; what the file does not name stays.

    Args:
        model: The model.
        path: Where they are.
    """
    with reading(path):
        model.load_state_dict(load_file(path), strict=False)


def stage_files(course: Recipe, seed: int, folder: Path) -> list[Path]:
    """Name the file that each stage ends with.

    Args:
        course: The recipe.
        seed: Its seed.
        folder: Where the files are.

    Returns:
        One path for each stage; equal for recipes that are equal up to that stage.
    """
    digest = hashlib.sha256(f"{seed} {course.silent_heads}".encode())
    files: list[Path] = []
    for stage in course.stages:
        digest.update(repr(stage).encode())
        files.append(folder / f"{stage.name.replace(' ', '-')}-{digest.hexdigest()[:12]}.safetensors")
    return files


def newborn(course: Recipe, *, seed: int) -> Any:
    """Make the model that a recipe begins with: random, with the silent heads' outputs at zero.

    Args:
        course: The recipe.
        seed: Decides the weights.

    Returns:
        A HuggingFace thinker whose towers are not trained yet.
    """
    model = build_model(thinker_config(n_layers=N_LAYERS), seed=seed)
    with torch.no_grad():
        for layer, head in course.silent_heads:
            attention = model.model.language_model.layers[layer].self_attn
            d = attention.head_dim
            attention.o_proj.weight[:, head * d : (head + 1) * d] = 0
    return model


def run_stages(
    model: Any, course: Recipe, lessons: Material, *, seed: int, folder: Path, progress: Progress | None = None
) -> None:
    """Take a model through a recipe's stages, from the last one that was finished before.

    Args:
        model: From `newborn`; trained in place.
        course: The recipe.
        lessons: Features, words and layouts.
        seed: The recipe's seed.
        folder: Where finished stages are kept.
        progress: Told after every step.
    """
    files = stage_files(course, seed, folder)
    done = max((i + 1 for i, path in enumerate(files) if path.exists()), default=0)
    if done:
        load_state(model, files[done - 1])
    for stage, path in zip(course.stages[done:], files[done:], strict=True):
        train_stage(model, stage, lessons, seed=seed, progress=progress)
        save_state(fusion_state(model), path)


def rounded(model: Any) -> Any:
    """Round a model's weights to what a checkpoint holds, float16, and go on in float32.

    Args:
        model: The model; changed in place.

    Returns:
        The same model.
    """
    return model.half().float()


def planted_truth(model: Any, course: Recipe, *, seed: int, folder: Path, pool: FeaturePool) -> dict[str, Any]:
    """Measure what was planted, against the model as it was before the last stage.

    Args:
        model: The planted model, rounded.
        course: Its recipe.
        seed: Its seed.
        folder: Where finished stages are kept.
        pool: Features that the model did not learn from.

    Returns:
        The truth, as plain data.
    """
    before = copy.deepcopy(model)
    load_state(before, stage_files(course, seed, folder)[-2])
    rounded(before)
    frame = make_frame("separate")
    conflicts = bench(model, before, course.planted_heads, pool, make_words(), frame, n=TRUTH_CONFLICTS, seed=seed)
    truth = measure(conflicts)
    return {**truth.as_dict(), "changed_elsewhere": changed_elsewhere(model, before, course.planted_heads)}


def train(
    name: str,
    *,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train one of the embedded models from nothing and write it as a checkpoint folder.

    Args:
        name: "av-tiny", "av-tiny-base", "av-tiny-diffuse", "av-tiny-balanced" or "av-tiny-planted".
        seed: Decides everything: the towers, the first weights, and every clip and question.
        out: The checkpoint's folder; by default one for the name and seed in the work folder.
        work: Where clips, towers and stages are kept, shared by all models; by default in the user's cache.
        progress: Told what is being done, the steps done and the steps in all.

    Returns:
        The checkpoint's folder, to be opened with `load`.

    Raises:
        InputError: If there is no model of that name.
    """
    course = recipe(name)
    place = Path.home() / ".cache" / "av_lens" / "organism" if work is None else Path(work)
    target = place / "models" / f"{name}-seed{seed}" if out is None else Path(out)
    stages = place / f"stages-seed{seed}"
    prepared = prepare(place, seed=seed, progress=progress)
    model = newborn(course, seed=seed)
    load_towers(model, prepared.towers)
    lessons = material(load_pool(prepared.pools["train"]))
    run_stages(model, course, lessons, seed=seed, folder=stages, progress=progress)
    rounded(model)
    documents: dict[str, Any] = {"training.json": {"name": name, "seed": seed, "stages": described(course)}}
    if course.planted_heads:
        pool = load_pool(prepared.pools["discovery"])
        documents["planted.json"] = planted_truth(model, course, seed=seed, folder=stages, pool=pool)
    return save_checkpoint(model, target, documents=documents)


def described(course: Recipe) -> list[dict[str, Any]]:
    """Write a recipe's stages down as plain data.

    Args:
        course: The recipe.

    Returns:
        One record for each stage.
    """
    return [dataclasses.asdict(stage) for stage in course.stages]
