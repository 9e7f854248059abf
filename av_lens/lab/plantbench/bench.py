"""Every method on every planted model: who finds the heads that were planted, and who names heads where none are?

Models are isolated with `gate="report"`, so that those with nothing to find are searched too. What is counted stands in
`plantbench.json` before the first model is scored; a folder that holds other criteria is refused.
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

import numpy as np

from av_lens import __version__
from av_lens.checkpoints import index
from av_lens.core.budget import Progress, named, silent
from av_lens.errors import InputError
from av_lens.inputs import conflicts as read_conflicts
from av_lens.isolation import isolate
from av_lens.isolation.measuring.engine import PRIMARY_DONORS
from av_lens.lab.calibration import TRUTH, read_plant, stage, weights_key
from av_lens.lab.pages import Parts
from av_lens.lab.plantbench.methods import IN_LOGITS, METHODS, SITE, SharedEngine, Subject, all_scores
from av_lens.lab.plantbench.scores import DAMAGE_LAST, damage_last, exchanged, isolate_score, named_heads
from av_lens.model import load
from av_lens.organism.anatomy import shipped
from av_lens.results.provenance import source_hash, stamp
from av_lens.whole_files import make_folder, read_object, stored, write_whole

SPLIT = "test"
EXCHANGES = 20
CRITERIA, MODELS, FRESHLY = "plantbench.json", "models", "planted"
FRESH = 100_000  # seeds of freshly planted models begin here: none of these was used in developing


@dataclass(frozen=True, eq=False)
class Scored:
    """A bench's folder and what it holds."""

    folder: Path  # where it is
    criteria: dict[str, Any]  # what was written down before the first model was scored
    models: list[dict[str, Any]]  # one entry for each model that was scored, in the order asked for
    missing: list[str]  # models that were left for later (`limit`)


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
    """Score every head of every model by every method."""
    out, tell = Path(out), progress or silent
    written = _written_down(out, conflicts=conflicts, seed=seed)
    names = list(benched() if models is None else models) + _made(out, make, seed, progress)
    if not names:
        raise InputError("no model was given: name folders or short names of planted models.")
    twice = sorted(label for label, count in Counter(map(_label, names)).items() if count > 1)
    if twice:
        raise InputError(f"two models are called {twice[0]!r}: give folders of different names.")
    keys = {name: weights_key(name) for name in names}
    staging = partial(stage, conflicts=conflicts, seed=seed, split=SPLIT, progress=progress)
    clips = Parts(out, {"conflicts": conflicts, "seed": seed, "split": SPLIT}).ensure("clips", staging)
    make_folder(out / MODELS)
    encoded: dict[Any, Any] = {}
    found: list[dict[str, Any]] = []
    missing: list[str] = []
    listed: list[Any] = []
    left = len(names) if limit is None else limit
    for number, name in enumerate(names):
        place = out / MODELS / f"{_label(name)}.json"
        key = hashlib.sha256(json.dumps([written["hash"], source_hash(), keys[name]]).encode()).hexdigest()
        entry = stored(place, lambda kept, key=key: kept if kept["key"] == key else None)
        if entry is None and not left:
            missing.append(name)
            continue
        if entry is None:
            listed = listed or read_conflicts(clips / "pairs.jsonl")
            entry = {"key": key, **_scored(name, listed, encoded, seed, named(progress, _label(name)))}
            write_whole(place, json.dumps(entry, allow_nan=False) + "\n")
            left -= 1
        found.append(entry)
        tell("models", number + 1, len(names))
    return Scored(out, written, found, missing)


def benched() -> list[str]:
    """List the short names of the shipped models with a truth file, and of the balanced one."""
    return [
        *sorted(name for name, entry in index().items() if (shipped() / str(entry["folder"]) / TRUTH).is_file()),
        "av-tiny-balanced",
    ]


def criteria(*, conflicts: int, seed: int) -> dict[str, Any]:
    """Say what is counted, before anything is: plain data with its own hash."""
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
    said, place = criteria(conflicts=conflicts, seed=seed), out / CRITERIA
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


def _made(out: Path, n: int, seed: int, progress: Progress | None) -> list[str]:
    """Plant fresh models, kind after kind; those that are there are kept."""
    from av_lens.lab.planting import planting
    from av_lens.lab.planting.kinds import KINDS

    made: list[str] = []
    for number in range(n):
        kind, own = [*KINDS][number % len(KINDS)], FRESH + 1000 * seed + number
        folder = out / FRESHLY / f"{kind}-{own}"
        if not (folder / TRUTH).is_file():
            planting.plant(kind, seed=own, out=folder, progress=named(progress, folder.name))
        made.append(str(folder))
    return made


def _label(name: str) -> str:
    return Path(name).name


def _scored(name: str, listed: Sequence[Any], encoded: dict[Any, Any], seed: int, progress: Progress) -> dict[str, Any]:
    """Isolate a model, score its heads by every method, and write all down as plain data."""
    model = load(name)
    engine = SharedEngine(model, encoded)
    begun = time.monotonic()
    found = isolate(model, listed, gate="report", named_only=True, seed=seed, progress=progress, engine=engine)
    took = time.monotonic() - begun
    seconds = {"isolate": took, DAMAGE_LAST: took}
    scores = {"isolate": isolate_score(found), DAMAGE_LAST: damage_last(found)}
    for method, score in all_scores(Subject(model, engine, found)).items():
        scores[method], seconds[method] = score
    return {
        "model": _label(name),
        "truth": read_plant(name).as_dict(),
        "n_layers": found.n_layers,
        "n_heads": found.n_heads,
        "summary": {key: plain_figure(found.summary[key]) for key in ("G", "C", "gap", "delta", "n discovery")},
        "verdict_kind": found.verdict_kind,
        "verdict": found.verdict,
        "stamps": list(found.stamps),
        "named": named_heads(found),
        "exchanged": exchanged(found, draws=EXCHANGES, seed=seed),
        "scores": {method: plain_table(table) for method, table in scores.items()},
        "seconds": {method: round(took, 3) for method, took in seconds.items()},
        "provenance": stamp(protocol_hash=found.protocol.get("hash", "")),
    }


def plain_figure(value: float) -> float | None:
    """A figure to be stored: six digits, None where not measured."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def plain_table(table: np.ndarray) -> list[list[float | None]]:
    """Write a table `[layer, head]` as plain data."""
    return [[plain_figure(value) for value in row] for row in table.tolist()]
