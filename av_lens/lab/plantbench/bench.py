"""Every method on every planted model: who finds the nodes that were planted, and who names nodes where none are?

Models are isolated with `gate="report"`, so that those with nothing to find are searched too: at s = .10 as organisms
are, and by the rule of other models (s = .03, or what the control question shows). What is counted, and the fresh
models that will be planted, stand in `plantbench.json` before the first is scored; a folder that holds other criteria
is refused. Each model's scores are kept by node, under a key of criteria, weights and the code that measures.
"""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from av_lens import __version__
from av_lens.checkpoints import index
from av_lens.checks import require_choice
from av_lens.core.budget import Progress, named, silent
from av_lens.errors import InputError
from av_lens.inputs import conflicts as read_conflicts
from av_lens.isolation import isolate
from av_lens.isolation.measuring.engine import PRIMARY_DONORS
from av_lens.isolation.measuring.store import measuring_hash
from av_lens.lab.calibration import BALANCED, TRUTH, read_plant, stage, weights_key
from av_lens.lab.pages import Parts
from av_lens.lab.plantbench.methods import IN_LOGITS, METHODS, SITE, SharedEngine, Subject, Table, all_scores, areas
from av_lens.lab.plantbench.scores import DAMAGE_LAST, damage_last, isolate_score, named_nodes
from av_lens.model import load
from av_lens.organism.anatomy import shipped
from av_lens.results.provenance import stamp
from av_lens.whole_files import make_folder, read_object, stored, write_whole

SPLIT = "test"
CRITERIA, MODELS, FRESHLY = "plantbench.json", "models", "planted"
FRESH_SEED = 300_000  # of the first fresh model: no such seed was used in developing (200,000 and on were)
UNLEARNED = (BALANCED, "mixture", "crosstalk")  # kinds that no training makes; balanced is the base itself
CODE = ("results/", "lab/calibration.py", "lab/plantbench/methods.py", "lab/plantbench/scores.py")
PLANTING = ("lab/planting/", "lab/training/")
"""What measures here and what plants, beside the rooms that measure everywhere."""
RULES: dict[str, float | str | None] = {"isolate": None, "isolate, s = .03": "control"}
"""How `isolate` is asked for s, by the name of its row."""
MUST = {
    "isolate | planted | auroc": 0.97,
    "isolate | planted | precision at k": 0.90,
    "isolate | mixture | auroc": 0.93,
    "isolate | mixture | precision at k": 0.70,
    "isolate | planted | kind right": 0.85,
    "isolate | planted | confirmed false": "at most 2 of 40",
    "isolate | null | confirmed false": "at most 1 of 24",
    "isolate | mlp | mlp alone": "at least 5 of 6",
    "isolate | wide | screened": 0.97,
    "isolate, s = .03 | mixture | precision at k": 0.80,
    "isolate, s = .03 | planted | confirmed false": "at most 8 of 40",
}
"""Row, group of models and figure: a mean, or in how many models the figure is above 0."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A bench's folder and what it holds."""

    folder: Path  # where it is
    criteria: dict[str, Any]  # what was written down before the first model was scored
    models: list[dict[str, Any]]  # one entry for each model that was scored, in the order asked for
    missing: list[str]  # models that were left for later (`minutes`), and those that cannot be made, with why


@dataclass(frozen=True)
class Recipe:
    """A model, as it is called and as it is made."""

    name: str  # what it is called
    place: str  # its folder, or a short name
    kind: str = ""  # what is planted; "" for a model that is there already
    base: str = ""  # the balanced model that it is planted in, a folder or a short name
    options: tuple[tuple[str, Any], ...] = ()  # further arguments of `plant`


def run_plantbench(
    models: Sequence[str] | None = None,
    *,
    out: str | Path = "av-lens-plantbench",
    fresh: str | Path | None = None,
    bases: Sequence[str] = ("av-tiny-balanced",),
    conflicts: int = 72,
    seed: int = 7,
    minutes: float | int | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Score every head and MLP of every model by every method."""
    out, tell, begun = Path(out), progress or silent, time.monotonic()
    recipes = [Recipe(Path(name).name, name) for name in models or ([] if fresh else benched())]
    recipes += [] if fresh is None else fresh_recipes(fresh, bases, out / FRESHLY)
    twice = sorted(label for label, count in Counter(one.name for one in recipes).items() if count > 1)
    if twice or not recipes:
        why = f"two models are called {twice[0]!r}: give folders of different names." if twice else ""
        raise InputError(why or "no model was given: name folders or short names of planted models, or give --fresh.")
    listed_fresh = [] if fresh is None else Path(fresh).read_text("utf-8").splitlines()
    listed_fresh += [] if fresh is None else [f"base {base_key(base)[:16]}" for base in bases]
    written = _written_down(out, criteria(conflicts=conflicts, seed=seed, fresh=listed_fresh))
    staging = partial(stage, conflicts=conflicts, seed=seed, split=SPLIT, progress=progress)
    clips = Parts(out, {"conflicts": conflicts, "seed": seed, "split": SPLIT}).ensure("clips", staging)
    make_folder(out / MODELS)
    encoded: dict[Any, Any] = {}
    found: list[dict[str, Any]] = []
    missing: list[str] = []
    listed: list[Any] = []
    longest = 0.0
    for number, one in enumerate(recipes):
        place, start = out / MODELS / f"{one.name}.json", time.monotonic()
        key = _key(one, written["hash"])
        entry = stored(place, lambda kept, key=key: kept if kept["key"] == key else None)
        if entry is None and minutes is not None and start - begun + longest > 60 * minutes:
            missing.append(one.name)
            continue
        if entry is None:
            try:
                _make(one, recipes, progress)
            except InputError as error:  # of a list that is fixed: told, and the others are scored
                missing.append(f"{one.name} (cannot be made: {error})")
                continue
            listed = listed or read_conflicts(clips / "pairs.jsonl")
            entry = {"key": key, **_scored(one, listed, encoded, seed, named(progress, one.name))}
            write_whole(place, json.dumps(entry, allow_nan=False) + "\n")
            longest = max(longest, time.monotonic() - start)
        found.append(entry)
        tell("models", number + 1, len(recipes))
    return Scored(out, written, found, missing)


def benched() -> list[str]:
    """List the short names of the shipped models with a truth file, and of the balanced one."""
    return [
        *sorted(name for name, entry in index().items() if (shipped() / str(entry["folder"]) / TRUTH).is_file()),
        "av-tiny-balanced",
    ]


def fresh_recipes(listed: str | Path, bases: Sequence[str], folder: Path) -> list[Recipe]:
    """Read a list of fresh models, a line each: kind, which of the bases, layer ("-": the kind's own), gap= and of=.

    `of` are the numbers of earlier lines, from 0 on, whose plants are mixed. Seeds follow the lines.
    """
    from av_lens.lab.planting.kinds import KINDS

    out: list[Recipe] = []
    for number, line in enumerate(Path(listed).read_text("utf-8").splitlines()):
        kind, which, layer, *more = line.split()
        require_choice("kind of fresh model", kind, (*KINDS, *UNLEARNED))
        if not int(which) < len(bases):
            why = f"line {number + 1} of {listed} asks for base {which} and {len(bases)} were given, from 0 on"
            raise InputError(f"{why}: give a --base for each.")
        base, options = bases[int(which)], dict[str, Any]({"seed": FRESH_SEED + number})
        options |= {} if layer == "-" else {"layer": int(layer)}
        for word, value in (one.split("=") for one in more):
            options[word] = [out[int(i)].place for i in value.split("+")] if word == "of" else float(value)
        name = "-".join([kind, f"b{which}", *([] if layer == "-" else [f"L{layer}"]), f"s{options['seed']}"])
        if kind == BALANCED:
            out.append(Recipe(Path(base).name, base))
        else:
            out.append(Recipe(name, str(folder / name), kind, base, tuple(options.items())))
    return out


def _key(one: Recipe, hashed: str) -> str:
    """Say what a stored entry is of: criteria, code, and weights, or what makes a model that need not be there."""
    said: list[Any] = [hashed, measuring_hash(also=CODE), base_key(one.base or one.place)]
    if one.base:
        options = {word: [Path(part).name for part in value] if word == "of" else value for word, value in one.options}
        said += [one.kind, options, measuring_hash(also=PLANTING)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def base_key(name: str) -> str:
    """Hash what a model is: of a trained one the recipe (on another machine the last bits differ), else the files."""
    recipe = Path(name) / "training.json"
    return hashlib.sha256(recipe.read_bytes()).hexdigest() if recipe.is_file() else weights_key(name)


def _make(one: Recipe, recipes: Sequence[Recipe], progress: Progress | None) -> None:
    """Plant a fresh model, and those that it mixes, unless they are there."""
    from av_lens.lab.planting import planting

    if one.kind and not (Path(one.place) / TRUTH).is_file():
        for other in recipes:
            if other.place in dict(one.options).get("of", ()):
                _make(other, recipes, progress)
        watch = named(progress, one.name)
        planting.plant(one.kind, base=one.base, out=one.place, progress=watch, **dict(one.options))


def criteria(*, conflicts: int, seed: int, fresh: Sequence[str] = ()) -> dict[str, Any]:
    """Say what is counted, before anything is: plain data with its own hash."""
    said: dict[str, Any] = {
        "edition": 2,
        "av_lens": __version__,
        "conflicts": conflicts,
        "split": SPLIT,
        "seed": seed,
        "site": f"{SITE}; of a planted sink also the sinks",
        "gate": "report",
        "quick": "pairs of nodes where half of the gap stays unexplained without them; no robustness",
        "score": "isolate: lower 95% bound of the release (primary donor of largest mean on discovery), or of the "
        "chosen set's release minus the set's without the node if larger, over delta; beside it the same with nodes "
        "whose role is 'breaks' last; others: the mean",
        "primary_donors": list(PRIMARY_DONORS),
        "s": "isolate: .10; isolate, s = .03: .03, or the 99th percentile under the control question if larger",
        "methods": list(METHODS),
        "named": "isolate: nodes of a releasing role and members of the chosen set that do not break, on discovery; "
        f"other methods in logits ({'; '.join(IN_LOGITS)}): mean above delta",
        "truth": "true: reversion adds the larger of 5% of the gap and s G to some set of the others' reversions; "
        "minor ones and free riders count neither way; decoys are innocent; a node's kind is its own, or where that is "
        "undetermined its kind as a member; kinds are counted over all true nodes, undetermined and unnamed are wrong",
        "short": "models that lack what planting asks are scored, and stand in no other group",
        "fresh": list(fresh),
        "must": MUST,
    }
    said["hash"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return said


def _written_down(out: Path, said: dict[str, Any]) -> dict[str, Any]:
    place = out / CRITERIA
    if not place.is_file():
        make_folder(out)
        write_whole(place, json.dumps(said, indent=1) + "\n")
    there = read_object(place)
    if there != said:
        differing = sorted(key for key in {*said, *there} - {"hash"} if said.get(key) != there.get(key))
        raise InputError(
            f"{out} holds a bench with other criteria ({', '.join(differing)}). Give another folder, or the same "
            "options as before."
        )
    return said


def _scored(
    one: Recipe, listed: Sequence[Any], encoded: dict[Any, Any], seed: int, progress: Progress
) -> dict[str, Any]:
    """Isolate a model, score its nodes by every method, and write all down as plain data."""
    model, truth = load(one.place), read_plant(one.place)
    engine = SharedEngine(model, encoded)
    options: dict[str, Any] = {"gate": "report", "named_only": True, "quick": True, "seed": seed, "progress": progress}
    found, seconds, scores = {}, dict[str, float](), dict[str, Table]()
    for row, s in RULES.items():
        begun = time.process_time()
        found[row] = isolate(model, listed, sites=truth.sites, s=s, engine=engine, **options)
        seconds[row], scores[row] = time.process_time() - begun, isolate_score(found[row])
    first = found["isolate"]
    seconds[DAMAGE_LAST], scores[DAMAGE_LAST] = seconds["isolate"], damage_last(first)
    subject = Subject(model, engine, first)
    for method, (table, took) in all_scores(subject).items():
        scores[method], seconds[method] = table, took
    names, true = subject.circuits.nodes.names, truth.at(first.summary["s"])
    counted = {at: [node_name(one) for one in some] for at, some in (("true", true.kinds), ("off", true.free_riders))}
    return {
        "model": one.name,
        "truth": truth.as_dict(),
        "n_layers": first.n_layers,
        "n_heads": first.n_heads,
        "true": counted["true"],
        "innocent": [name for name in names if name not in {*counted["true"], *counted["off"]}],
        "summary": {key: plain_figure(first.summary[key]) for key in ("G", "C", "gap", "n discovery")},
        "runs": {
            row: {
                **{key: plain_figure(run.summary[key]) for key in ("s", "delta")},
                "verdict_kind": run.verdict_kind,
                "verdict": run.verdict,
                "stamps": list(run.stamps),
                "reasons": list(run.reasons),
                "named": named_nodes(run),
            }
            for row, run in found.items()
        },
        "scores": {method: by_node(table, names) for method, table in scores.items()},
        "areas": {
            method: {figure: plain_figure(value) for figure, value in areas(subject.circuits, table).items()}
            for method, table in scores.items()
        },
        "seconds": {method: round(took, 3) for method, took in seconds.items()},
        "provenance": stamp(protocol_hash=first.protocol.get("hash", "")),
    }


def plain_figure(value: float) -> float | None:
    """A figure to be stored: six digits, None where not measured."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def node_name(at: tuple[int, int]) -> str:
    """A node as scores are stored: "L3H5", "L3 mlp"."""
    return f"L{at[0]}H{at[1]}" if at[1] >= 0 else f"L{at[0]} mlp"


def by_node(table: Table, names: Sequence[str]) -> dict[str, float | None]:
    """Write a table `[layer, node]` as plain data, by the nodes' names."""
    return dict(zip(names, map(plain_figure, table.ravel().tolist()), strict=True))
