"""Every method on every planted model: who finds the heads that were planted, and who names heads where none are?

One set of conflicts, from a part of the world that trained no model, is staged once; every model is isolated on it
(`gate="report"`, so that models with nothing to find are searched too) and every other method scores the same
conflicts. What is counted stands in `plantbench.json` before the first model is scored; a folder that holds other
criteria is refused. Each model's scores are a file of their own, written whole: a run that was stopped goes on where
it was.

`plantbench_methods` says what a method's score is, `plantbench_scores` how scores are judged, `plantbench_truth` what
is known of a model.

Example:
    ```python
    from av_lens.lab import run_plantbench

    bench = run_plantbench(["av-tiny-planted", "av-tiny-balanced"], out="bench")
    ```
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from av_lens import __version__
from av_lens.errors import InputError
from av_lens.inputs import conflicts as read_conflicts
from av_lens.isolation import isolate
from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.lab.parts import Parts
from av_lens.lab.plantbench.methods import IN_LOGITS, METHODS, SITE, SharedEngine, Subject, all_scores
from av_lens.lab.plantbench.scores import DAMAGE_LAST, damage_last, exchanged, isolate_score, named_heads
from av_lens.lab.plantbench.truth import TRUTH, read_plant, weights_key
from av_lens.lab.staged_conflicts import stage
from av_lens.model import load
from av_lens.results.provenance import source_hash, stamp
from av_lens.whole_files import make_folder, read_object, stored, write_whole

Progress = Callable[[str, int, int], None]
SPLIT = "test"
EXCHANGES = 20
CRITERIA, MODELS, FRESHLY = "plantbench.json", "models", "planted"
FRESH = 100_000
"""Seeds of freshly planted models begin here: none of these was used in developing."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A bench's folder and what it holds.

    Attributes:
        folder: where it is.
        criteria: what was written down before the first model was scored.
        models: one entry for each model that was scored, in the order asked for.
        missing: models that were left for later (`limit`).
    """

    folder: Path
    criteria: dict[str, Any]
    models: list[dict[str, Any]]
    missing: list[str]


def run_plantbench(
    models: Sequence[str] | None = None,
    *,
    out: str | Path = "av-lens-plantbench",
    make: int = 0,
    conflicts: int = 120,
    seed: int = 7,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Score every head of every model by every method.

    Args:
        models: folders or short names; None for every shipped planted model and the balanced one.
        out: the folder to write; models that it holds, scored by the same program, are not scored again.
        make: plant so many fresh models first, kind after kind, each with a seed of its own.
        conflicts: how many conflicts; an isolation needs 40, its verdict 120.
        seed: draws the clips, deals the halves, draws flips and bootstraps.
        limit: score at most so many models now.
        progress: called as `progress(stage, done, total)`.

    Returns:
        What the folder holds of these models.

    Raises:
        InputError: a model that is not there, two of one name, or a folder with other criteria.
    """
    out = Path(out)
    written = _written_down(out, conflicts=conflicts, seed=seed)
    names = list(shipped() if models is None else models) + _made(out, make, seed, progress)
    keys = _keys(names)
    clips = Parts(out, {"conflicts": conflicts, "seed": seed, "split": SPLIT}).ensure(
        "clips", lambda folder: _staged(folder, conflicts, seed, progress)
    )
    make_folder(out / MODELS)
    encoded: dict[Any, Any] = {}
    found: list[dict[str, Any]] = []
    missing: list[str] = []
    listed: list[Any] = []
    left = len(names) if limit is None else limit
    for number, name in enumerate(names):
        place = out / MODELS / f"{_label(name)}.json"
        key = hashlib.sha256(json.dumps([written["hash"], source_hash(), keys[name]]).encode()).hexdigest()
        entry = _stored(place, key)
        if entry is None and not left:
            missing.append(name)
            continue
        if entry is None:
            listed = listed or read_conflicts(clips / "pairs.jsonl")
            entry = {"key": key, **_scored(name, listed, encoded, seed, _named(progress, name))}
            write_whole(place, json.dumps(entry, allow_nan=False) + "\n")
            left -= 1
        found.append(entry)
        if progress is not None:
            progress("models", number + 1, len(names))
    return Scored(out, written, found, missing)


def shipped() -> list[str]:
    """List the shipped models with a truth file, and the balanced one.

    Returns:
        Short names.
    """
    place = Path(str(files("av_lens") / "organism" / "checkpoints"))
    index = json.loads((place / "index.json").read_text(encoding="utf-8"))
    known = [name for name, entry in index.items() if (place / str(entry["folder"]) / TRUTH).is_file()]
    return [*sorted(known), "av-tiny-balanced"]


def criteria(*, conflicts: int, seed: int) -> dict[str, Any]:
    """Say what is counted, before anything is.

    Args:
        conflicts: how many.
        seed: of the clips and draws.

    Returns:
        Plain data with its own hash.
    """
    said: dict[str, Any] = {
        "av_lens": __version__,
        "conflicts": conflicts,
        "split": SPLIT,
        "seed": seed,
        "site": SITE,
        "gate": "report",
        "score": "isolate: lower 95% bound of the release (primary donor of largest mean on discovery), or of the "
        "chosen set's release minus the set's without the head if larger, over delta; beside it the same with heads "
        "whose role is 'breaks' last; others: the mean",
        "primary_donors": list(PRIMARY_DONORS),
        "methods": list(METHODS),
        "named": "isolate: heads of a releasing role and members of the chosen set that do not break, on discovery; "
        f"other methods in logits ({'; '.join(IN_LOGITS)}): mean above delta",
        "truth": "true: reversion adds 5% of the gap to some set of the others' reversions; free riders count neither "
        "way; decoys are innocent; a head's kind is its own, or where that is undetermined its kind as a member; "
        "kinds are counted over all true heads, undetermined and unnamed are wrong",
        "exchanges": EXCHANGES,
        "must": {"auroc": 0.98, "precision at k": 0.95, "kind right": 0.9, "nulls with a name": "1 of 20"},
    }
    said["hash"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return said


def _written_down(out: Path, *, conflicts: int, seed: int) -> dict[str, Any]:
    said = criteria(conflicts=conflicts, seed=seed)
    place = out / CRITERIA
    if place.is_file():
        there = read_object(place)
        if there != said:
            differing = sorted(key for key in {*said, *there} - {"hash"} if said.get(key) != there.get(key))
            raise InputError(
                f"{out} holds a bench with other criteria ({', '.join(differing)}). Give another folder, or the same "
                "options as before."
            )
        return said
    make_folder(out)
    write_whole(place, json.dumps(said, indent=1) + "\n")
    return said


def _made(out: Path, n: int, seed: int, progress: Progress | None) -> list[str]:
    """Plant fresh models, kind after kind; those that are there are kept."""
    if not n:
        return []
    from av_lens.lab.planting import kinds as planting_kinds
    from av_lens.lab.planting import planting

    names = list(planting_kinds.kinds())
    made: list[str] = []
    for number in range(n):
        kind, own = names[number % len(names)], FRESH + 1000 * seed + number
        folder = out / FRESHLY / f"{kind}-{own}"
        if not (folder / TRUTH).is_file():
            planting.plant(kind, seed=own, out=folder, progress=_named(progress, str(folder)))
        made.append(str(folder))
    return made


def _keys(names: Sequence[str]) -> dict[str, str]:
    if not names:
        raise InputError("no model was given: name folders or short names of planted models.")
    labels = [_label(name) for name in names]
    double = sorted({label for label in labels if labels.count(label) > 1})
    if double:
        raise InputError(f"two models are called {double[0]!r}: give folders of different names.")
    return {name: weights_key(name) for name in names}


def _label(name: str) -> str:
    return Path(name).name


def _staged(folder: Path, conflicts: int, seed: int, progress: Progress | None) -> None:
    stage(folder, conflicts=conflicts, seed=seed, split=SPLIT, progress=progress)


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{_label(name)}: {stage}", done, total)


def _stored(place: Path, key: str) -> dict[str, Any] | None:
    return stored(place, lambda entry: entry if entry["key"] == key else None)


def _scored(
    name: str, listed: Sequence[Any], encoded: dict[Any, Any], seed: int, progress: Progress | None
) -> dict[str, Any]:
    """Isolate a model, score its heads by every method, and write all down as plain data."""
    model = load(name)
    engine = SharedEngine(model, encoded)
    begun = time.monotonic()
    found = isolate(model, listed, gate="report", named_only=True, seed=seed, progress=progress, engine=engine)
    seconds = {"isolate": time.monotonic() - begun}
    scores = {"isolate": isolate_score(found), DAMAGE_LAST: damage_last(found)}
    seconds[DAMAGE_LAST] = seconds["isolate"]
    for method, score in all_scores(Subject(model, engine, found)).items():
        scores[method], seconds[method] = score.table, score.seconds
    return {
        "model": _label(name),
        "truth": read_plant(name).as_dict(),
        "n_layers": found.n_layers,
        "n_heads": found.n_heads,
        "summary": {key: _figure(found.summary[key]) for key in ("G", "C", "gap", "delta", "n discovery")},
        "verdict_kind": found.verdict_kind,
        "verdict": found.verdict,
        "stamps": list(found.stamps),
        "named": named_heads(found),
        "exchanged": exchanged(found, draws=EXCHANGES, seed=seed),
        "scores": {method: plain_table(table) for method, table in scores.items()},
        "seconds": {method: round(took, 3) for method, took in seconds.items()},
        "provenance": stamp(protocol_hash=found.protocol.get("hash", "")),
    }


def plain_table(table: np.ndarray) -> list[list[float | None]]:
    """Write a table of heads as plain data, six figures each.

    Args:
        table: `[layer, head]`.

    Returns:
        Rows, None where not measured.
    """
    return [[_figure(value) for value in row] for row in table.tolist()]


def table_of(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Read what `plain_table` wrote.

    Args:
        rows: the rows.

    Returns:
        `[layer, head]`, NaN where not measured.
    """
    return np.array([[math.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def scores_of(entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read a model's scores.

    Args:
        entry: one of `Scored.models`.

    Returns:
        Method to `[layer, head]`.
    """
    return {str(name): table_of(rows) for name, rows in entry["scores"].items()}


def _figure(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
