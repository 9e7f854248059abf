"""Is the same found again: in models trained from other seeds, and on other clips?

Every model is isolated twice, up to named and confirmed heads and sets, on two sets of conflicts that share no clip;
compared are the named heads (Jaccard) and all heads' largest primary release (rank correlation) on both discoveries.
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from av_lens.core.budget import Progress
from av_lens.errors import InputError
from av_lens.inputs import conflicts as read_conflicts
from av_lens.isolation import isolate
from av_lens.isolation.explaining.robustness import jaccard, rank_correlation
from av_lens.isolation.measuring.engine import PRIMARY_DONORS
from av_lens.lab.calibration import stage
from av_lens.lab.pages import FilledPage, Parts, Table, markdown
from av_lens.lab.plantbench.methods import SITE
from av_lens.lab.plantbench.scores import named_nodes
from av_lens.model import load
from av_lens.results.provenance import plain, stamp
from av_lens.results.record import Isolation
from av_lens.whole_files import write_whole

PAGE = FilledPage("isolation.md", "seeds.json", "seeds")


def run_seeds(
    models: Sequence[str] = ("av-tiny",),
    *,
    out: str | Path = "av-lens-seeds",
    conflicts: int = 132,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Isolate every model on two sets of conflicts that share no clip."""
    labels = [Path(name).name for name in models]
    if not labels or len(set(labels)) < len(labels):
        raise InputError(f"models are {', '.join(labels) or 'none'}: name at least one, and none twice.")
    out = Path(out)
    listed: list[list[Any]] = []
    for number in (seed, seed + 1):
        parts = Parts(out / f"clips-{number}", {"conflicts": conflicts, "seed": number})
        made = parts.ensure("staged", partial(stage, conflicts=conflicts, seed=number, progress=progress))
        listed.append(read_conflicts(made / "pairs.jsonl"))
    entries: list[dict[str, Any]] = []
    for name, label in zip(models, labels, strict=True):
        model, place = load(name), out / label
        found, again = (
            isolate(model, one, gate="report", seed=number, named_only=True, progress=progress, out=place / f"{number}")
            for number, one in zip((seed, seed + 1), listed, strict=True)
        )
        entries.append({"model": label, **entry_of(found, again)})
    record = stamp(conflicts=conflicts, seed=seed, models=entries)
    write_whole(out / PAGE.record, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def entry_of(found: Isolation, again: Isolation) -> dict[str, Any]:
    """Put the figures of one model's two findings together, as plain data."""
    tables: Any = found
    chosen = tables.sets[tables.sets["chosen"]].to_dict("records")
    first, second = _named(found), _named(again)
    return {
        "verdict_kind": found.verdict_kind,
        "verdict": found.verdict,
        "stamps": list(found.stamps),
        "summary": {name: _plain(found.summary[name]) for name in ("G", "C", "gap", "gap confirmation")},
        "set": {name: _plain(value) for name, value in chosen[0].items()} if chosen else None,
        "half of the gap": _plain(found.summary.get("heads for half of the gap", math.nan)),
        "specificity": [
            {"control": str(row["control"]), "verdict": str(row["verdict"]), "fall": _plain(row["fall"])}
            for row in tables.specificity.to_dict("records")
        ],
        "named": first,
        "named again": second,
        "jaccard": _plain(jaccard(first, second)),
        "rank correlation": _plain(rank_correlation(_releases(found), _releases(again))),
    }


def _releases(found: Isolation) -> np.ndarray:
    each_donor = [found.arrays[f"discovery/{SITE}/release/{donor}"].mean(0) for donor in PRIMARY_DONORS]
    return np.max(each_donor, axis=0).ravel()


def _named(found: Isolation) -> dict[str, str]:
    """Head to role, of those named on discovery."""
    return {f"L{row['layer']}H{row['head']}": str(row["role"]) for row in named_nodes(found) if row["head"] >= 0}


def _plain(value: Any) -> Any:
    made = plain(value)
    return None if isinstance(made, float) and math.isnan(made) else made


def tables(record: dict[str, Any]) -> list[Table]:
    """Tabulate the study: the sets with their controls, a column for each model; what was named on the two halves."""
    columns = [_set_figures(entry) for entry in record["models"]]
    names, *sets = ([figure, *(column[figure] for column in columns)] for figure in columns[0])
    halves = ["model", "named", "named on other clips", "Jaccard", "rank correlation"]
    rows: list[list[str]] = []
    for entry in record["models"]:
        named = [", ".join(map(" ".join, entry[half].items())) or "none" for half in ("named", "named again")]
        rows.append([entry["model"], *named, _figure(entry["jaccard"]), _figure(entry["rank correlation"])])
    return [(names, sets), (halves, rows)]


def _set_figures(entry: dict[str, Any]) -> dict[str, str]:
    summary, found = entry["summary"], entry["set"]
    words = {"not specific": "", "untested": " (untested)"}
    failed = [f"{row['control']}{words[row['verdict']]}" for row in entry["specificity"] if row["verdict"] in words]
    shown = {"model": entry["model"], "verdict": entry["verdict_kind"]}
    shown |= {"G": _figure(summary["G"]), "C": _figure(summary["C"])}
    shown |= dict.fromkeys(("heads", "release, held out", "of the gap", "sound said", "random sets", "p (floor)"), "–")
    shown |= {"heads for half": _figure(entry["half of the gap"], 0), "not held to 5 points": "–"}
    if found is None:
        return shown
    return shown | {
        "heads": f"{int(found['k'])}: {found['members']}",
        "release, held out": f"{_figure(found['release'])} [{_figure(found['low'])}, {_figure(found['high'])}]",
        "of the gap": _figure(found["release"] / summary["gap confirmation"]),
        "sound said": f"{_figure(found['says_sound_before'])} → {_figure(found['says_sound'])}",
        "random sets": f"{int(found['random_n'])}: {_figure(found['random_mean'])}",
        "p (floor)": f"{_figure(found['p_random'], 3)} ({_figure(found['p_floor'], 3)})",
        "not held to 5 points": ", ".join(failed) or "none",
    }


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def page_tables(record: dict[str, Any]) -> str:
    """Write the tables as markdown."""
    return "\n\n".join(map(markdown, tables(record)))


def store(record: dict[str, Any], folder: str | Path) -> Path:
    """Write the record, and fill the page beside it."""
    return PAGE.store(folder, json.dumps(record, indent=1, allow_nan=False) + "\n", page_tables(record))
