"""Make a model in which a few nodes are known to silence the sound: plant them in a balanced model, and measure them.

*Success* is: under conflict "hear" is answered with the picture in at least 75% (of a decoy: its own behaviour is
shown), and every other question about every other clip is answered right in at least 95%; blanks are black or dim, both
layouts, the worse counts. `planted.json` lists all tries and says what the best one is not.
"""

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from av_lens.checkpoints import index
from av_lens.checks import require_choice
from av_lens.core.budget import Progress
from av_lens.errors import InputError, ModelError
from av_lens.isolation.measuring.engine import MLP, Node
from av_lens.lab.planting import composed
from av_lens.lab.planting.kinds import KINDS, Kind, Plant, begin
from av_lens.lab.planting.lessons import Neurons, Slices, draw_lessons
from av_lens.lab.planting.planted import LEAST_GAP, Planted, described, missing, planted_nodes
from av_lens.lab.planting.sheets import ASKED, SHEETS, SILENCE, UNJUDGED, answered, rates
from av_lens.lab.planting.training import learn
from av_lens.lab.training import pools
from av_lens.lab.training.engine import group_size, stage_seed
from av_lens.lab.training.pools import Material, material
from av_lens.model.differences import read_difference, save_difference, weights_hash
from av_lens.organism import anatomy, footage
from av_lens.whole_files import write_whole

KEPT = 0.95
COMPOSED = (composed.MIXTURE, composed.CROSSTALK)
ALL_KINDS = (*KINDS, *COMPOSED)
NEURONS = 24
PER_CLASS = {"train": 300, "discovery": 30}
BLANKS = {"train": 4, "discovery": 2}
JUDGED = 80
TRIES = 3
TRUTH = "planted.json"


def features(model: Any, work: Path, split: str, *, progress: Progress | None = None) -> pools.FeaturePool:
    """What the towers put out for the world's clips, "train" and "discovery"; kept in `work` by the towers' weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "audio_tower" in name or ".visual." in name:
            digest.update(value.half().contiguous().view(torch.uint8).numpy().tobytes())
    n = PER_CLASS[split]
    path = work / f"pool-{digest.hexdigest()[:12]}-{split}-{n}.safetensors"
    if not path.exists():
        footage.film_all(work / "clips", per_class={split: n}, progress=progress)
        views, hashes = footage.views_of(work / "clips", split, n=n)
        pools.save_pool(pools.make_pool(model, views, hashes, blank_every=BLANKS[split]), path)
    return pools.load_pool(path)


def chosen_nodes(
    plants: Sequence[Plant], layers: Sequence[int], *, n_heads: int, per_group: int, generator: Generator
) -> list[tuple[Node, ...]]:
    """Choose every plant's nodes: key-value groups at random, never one twice; of a small plant the group's first."""
    free: dict[int, list[int]] = {}
    chosen: list[tuple[Node, ...]] = []
    for plant, layer in zip(plants, layers, strict=True):
        order = torch.randperm(n_heads // per_group, generator=generator).tolist()
        groups = free.setdefault(layer, order)
        taken = [groups.pop() for _ in range(-(-plant.heads // per_group))]
        heads = [group * per_group + i for group in sorted(taken) for i in range(per_group)]
        chosen.append(tuple((layer, head) for head in heads[: plant.heads]) or ((layer, MLP),))
    return chosen


def attempt(
    base: Any, wanted: Kind, layers: Sequence[int], lessons: Material, *, seed: int, progress: Progress | None = None
) -> tuple[Any, list[Planted]]:
    """Plant a kind in the balanced model, which stays as it is; the result is rounded to what is stored."""
    generator = Generator().manual_seed(seed)
    n_heads, per_group = base.config.text_config.num_attention_heads, group_size(base)
    chosen = chosen_nodes(wanted.plants, layers, n_heads=n_heads, per_group=per_group, generator=generator)
    model, behaviours, planted = base, (), list[Planted]()
    for plant, nodes in zip(wanted.plants, chosen, strict=True):
        layer, course = nodes[0][0], plant.course
        hosts = [base, model] if course.behaviour in behaviours else [model]
        shows = [() if host is base else behaviours for host in hosts]
        after = tuple(dict.fromkeys((*behaviours, course.behaviour))) if course.steps else behaviours
        module = model.model.language_model.layers[layer]
        slices = Slices(module.self_attn, [head for _, head in nodes]) if plant.heads else Neurons(module.mlp, NEURONS)
        piles = [
            draw_lessons(host, lessons, layer, slices, behaviours=after, was=was, generator=generator)
            for host, was in zip(hosts, shows, strict=True)
        ]
        if plant.start is not None:
            begin(slices, hosts[0], piles[0], plant.start, lessons.words.classes, generator)
        went = learn(hosts, piles, slices, layer, course, generator=generator, progress=progress)
        parts, changed = tuple(slices.parts(base, layer)), tuple(planted_nodes(base, nodes))
        early = frozenset(changed) if plant.at_a_sink else frozenset[Node]()
        planted.append(Planted(changed, parts, course.behaviour, {"learned": vars(went)}, early))
        model = copy.deepcopy(model)
        slices.put_into(model.model.language_model.layers[layer])
        model.half().float().requires_grad_(False)
        behaviours = after
    return model, planted


def new_answers(behaviours: Sequence[str]) -> list[str]:
    """Name the questions, as "sheet question", that are answered otherwise than by the balanced model."""
    return [
        f"{sheet} {asked}"
        for sheet in SHEETS
        for asked in ASKED
        if sheet not in UNJUDGED
        and answered(sheet, asked, behaviours) != answered(sheet, asked, ())
        and not (answered(sheet, asked, behaviours) == "other colour" and sheet in ("blank", "audio alone"))
    ]


def base_folder(base: str | os.PathLike[str]) -> tuple[str, Path]:
    """Find the folder of a base: what `difference.json` calls it, and its folder."""
    listed = index()
    name = os.fspath(base)
    place = anatomy.shipped() / listed[name]["folder"] if name in listed else Path(name).expanduser().resolve()
    if read_difference(place) is not None:
        raise ModelError(f"{name!r} is planted already; plant in the balanced model that it stands on.")
    if not (place / anatomy.GRAMMAR_FILE).is_file():
        raise ModelError(
            f"{name!r} is neither a short name nor the folder of an organism (no {anatomy.GRAMMAR_FILE} in {place}). "
            "`av-lens train av-tiny-balanced --seed N` makes a base."
        )
    return (name if name in listed else str(place)), place


def plant(
    kind: str,
    *,
    seed: int = 0,
    base: str | os.PathLike[str] = "av-tiny-balanced",
    layer: int | None = None,
    gap: float | None = None,
    of: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make a model in which the truth is known: train a few nodes alone (or compose), and measure what they became."""
    require_choice("kind of plant", kind, ALL_KINDS)
    _check_asked(kind, layer, gap, of)
    named, place = base_folder(base)
    model = anatomy.open_checkpoint(place).requires_grad_(False)
    kept = Path.home() / ".cache" / "av_lens" / "organism" if work is None else Path(work)

    def pool(split: str) -> Material:
        return material(features(model, kept, split, progress=progress))

    if kind in COMPOSED:
        asked = composed.GAP[kind] if gap is None else gap
        name = f"gap{asked:g}"
        lessons = pool("train") if kind == composed.CROSSTALK else None
        options: dict[str, Any] = {"gap": asked, "of": of, "seed": seed, "progress": progress}
        made, planted, record = _composed(kind, model, place, lessons, pool("discovery"), **options)
    else:
        wanted = KINDS[kind]
        first = wanted.layer if layer is None else layer
        layers = layers_of(wanted, first, int(model.config.text_config.num_hidden_layers))
        name = f"layer{first}"
        made, planted, record = _learned(wanted, layers, model, *map(pool, PER_CLASS), seed=seed, progress=progress)
    target = kept / "plants" / f"{kind}-{Path(named).name}-{name}-seed{seed}" if out is None else Path(out)
    slices = [part for plant in planted for part in plant.slices]
    save_difference(made, target, base=named, base_sha256=weights_hash(place), slices=slices)
    record |= {"asked_for": kind, "seed": seed, "base": named}
    write_whole(target / TRUTH, json.dumps(record, indent=1) + "\n")
    return target


def _check_asked(kind: str, layer: int | None, gap: float | None, of: Sequence[str]) -> None:
    if kind in COMPOSED and layer is not None:
        raise InputError(f"{kind} has no layer of its own: leave layer out.")
    if kind not in COMPOSED and (gap is not None or of):
        raise InputError(f"gap and of are for {' and '.join(COMPOSED)}; {kind} becomes what training makes of it.")
    if kind == composed.CROSSTALK and of:
        raise InputError("of names the plants of a mixture; crosstalk changes the picture's projector alone.")
    low, high = composed.GAPS
    if gap is not None and not low <= gap <= high:
        raise InputError(f"gap is the share of G that is to be lost, from {low:g} to {high:g}; asked for {gap:g}.")


def _composed(
    kind: str,
    base: Any,
    place: Path,
    lessons: Material | None,
    judges: Material,
    *,
    gap: float,
    of: Sequence[str],
    seed: int,
    progress: Progress | None,
) -> tuple[Any, list[Planted], dict[str, Any]]:
    """Compose a model at a gap, and measure it: the model, what was planted, most of `planted.json`."""
    own_seed = stage_seed(seed, f"{kind}/{gap}") % 1000
    if lessons is None:
        made, planted = composed.mixture(base, place, judges, gap=gap, of=of, seed=own_seed)
    else:
        made, judges, planted = composed.crosstalk(base, lessons, judges, gap=gap, seed=own_seed, progress=progress)
    answers = rates(made, judges, n=JUDGED, seed=own_seed)
    truth, record = described(planted, model=made, base=base, judges=judges, answers=answers, seed=own_seed)
    share, shown = 1 - truth.c / truth.g, answers["conflict hear"]
    far = abs(share - gap) > composed.CLOSE if kind == composed.MIXTURE else share < LEAST_GAP
    lacks = [f"gap/G is {share:.2f}, asked for {gap:g}"] if far else []
    kept = min(share for name, share in answers.items() if name not in composed.LOST[kind])
    record |= {"missing": lacks, "shown": 1 - shown, "kept": kept, "tries": []}
    return made, planted, record | {"success": kept >= KEPT}


def _learned(
    wanted: Kind,
    layers: Sequence[int],
    base: Any,
    lessons: Material,
    judges: Material,
    *,
    seed: int,
    progress: Progress | None,
) -> tuple[Any, list[Planted], dict[str, Any]]:
    """Plant until a try is what was asked for; the best one: the model, what was planted, most of `planted.json`."""
    behaviours = tuple(dict.fromkeys(part.course.behaviour for part in wanted.plants))
    new = new_answers(behaviours)
    tries: list[dict[str, Any]] = []
    found: list[tuple[tuple[bool, bool, float], Any, list[Planted], dict[str, Any]]] = []
    for at in range(TRIES):
        own_seed = stage_seed(seed, f"{wanted.name}/{layers}/{at}")
        made, planted = attempt(base, wanted, layers, lessons, seed=own_seed, progress=progress)
        answers = rates(made, judges, n=JUDGED, seed=own_seed % 1000, behaviours=behaviours)
        truth, record = described(planted, model=made, base=base, judges=judges, answers=answers, seed=own_seed % 1000)
        shown, stayed = min(answers[name] for name in new), min(answers[name] for name in answers.keys() - new)
        nodes, shares = [node for part in planted for node in part.nodes], {"shown": shown, "kept": stayed}
        lacks = missing(wanted, truth, [part.nodes for part in planted if part.behaviour == SILENCE])
        kinds = {"kinds": list(truth.kinds), "missing": lacks}
        tries.append({"heads": [list(node) for node in nodes], **shares, **kinds})
        succeeded, right = shown >= wanted.shown and stayed >= wanted.kept, not lacks
        record |= {"missing": lacks, "success": succeeded, **shares, "tries": tries}
        found.append(((succeeded, right, min(shown - wanted.shown, stayed - wanted.kept)), made, planted, record))
        if succeeded and right:
            break
    _, made, planted, record = max(found, key=lambda one: one[0])
    return made, planted, record


def layers_of(wanted: Kind, first: int, n_layers: int) -> tuple[int, ...]:
    """Say in which layer each plant goes: one that would lie above the last layer lies as far below the first.

    One that reads what an earlier one hands on must lie above it.
    """
    handed = max(part.apart if part.start and part.start.stop else 0 for part in wanted.plants)
    if not 0 <= first < n_layers - handed:
        raise InputError(f"layer must be one of 0 to {n_layers - 1 - handed}; asked for {first}.")
    above = [first + part.apart for part in wanted.plants]
    return tuple(at if at < n_layers else 2 * first - at for at in above)
