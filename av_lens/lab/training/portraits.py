"""The behaviour of the models that ship, as tables: read from the evaluations stored beside their weights.

Documentation shows what `markdown(shares_table())` gives, so that the table cannot drift from the weights.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from av_lens.checkpoints import index
from av_lens.lab import pages
from av_lens.lab.plantbench.truth import FREE_RIDER, TRUTH
from av_lens.lab.training.expectations import standing
from av_lens.organism import saving
from av_lens.organism.evaluation import Evaluation
from av_lens.whole_files import read_object

COLUMNS: dict[str, tuple[str, str, str]] = {
    "heard, audio alone": ("audio_only", "hear", "right"),
    "seen, video alone": ("video_only", "see", "right"),
    "heard": ("factual", "hear", "right"),
    "seen": ("factual", "see", "right"),
    "conflict heard: sound": ("conflict", "hear", "sound"),
    "conflict heard: picture": ("conflict", "hear", "picture"),
    "conflict seen": ("conflict", "see", "picture"),
    "conflict colour": ("conflict", "colour", "colour"),
    "heard, blank picture": ("blank_picture", "hear", "sound"),
}
MEASURED = ("adds", "alone", "direct_share", "reads_picture", "reads_sound")
WORDS = {">=": "at least", "<=": "at most"}


def shipped_evaluations() -> dict[str, Evaluation]:
    """Read the evaluations of the listed models that have one, by short name."""
    paths = {name: saving.shipped() / entry["folder"] / "evaluation.json" for name, entry in index().items()}
    return {name: Evaluation.load(path) for name, path in paths.items() if path.exists()}


def standing_table() -> pd.DataFrame:
    """Say for every model and training seed which of its written lines hold, and what those that do not came to."""
    found = {(name, 0): result for name, result in shipped_evaluations().items()}
    for path in saving.shipped().glob("*/evaluation-seed*.json"):
        found[path.parent.name, int(path.stem.removeprefix("evaluation-seed"))] = Evaluation.load(path)
    rows: list[dict[str, object]] = []
    for (name, seed), result in sorted(found.items()):
        truth = saving.shipped() / name / TRUTH
        planted = read_object(truth)["heads"] if truth.exists() else []
        lines = standing(result, name, planted=tuple((head["layer"], head["head"]) for head in planted))
        short = [
            f"{row['line']} ({row['layout']}) {row['share']:.3f} [{row['low']:.3f}, {row['high']:.3f}], wanted "
            f"{WORDS[row['sign']]} {row['bound']:.2f}"
            for row in lines.to_dict("records")
            if not row["holds"]
        ]
        counts = {"lines": len(lines), "hold": len(lines) - len(short), "does not hold": "; ".join(short) or "-"}
        rows.append({"model": name, "seed": seed, **counts})
    return pd.DataFrame(rows)


def shares_table(evaluations: dict[str, Evaluation] | None = None) -> pd.DataFrame:
    """Put the main shares of every model (those that ship by default) into one table.

    One row for each model and layout, a column for each of `COLUMNS`; cells of one layout stand in both rows.
    """
    rows: list[dict[str, object]] = []
    for name, result in (shipped_evaluations() if evaluations is None else evaluations).items():
        counted = {(row["cell"], row["layout"], row["kind"]): row for row in result.counts.to_dict("records")}
        for layout in ("in_video", "separate"):
            row: dict[str, object] = {"model": name, "layout": layout}
            for column, (cell, kind, answer) in COLUMNS.items():
                at = next(key for key in ((cell, layout, kind), (cell, cell.split("_")[0], kind)) if key in counted)
                row[column] = counted[at][answer] / counted[at]["n"]
            rows.append(row)
    return pd.DataFrame(rows)


def planted_table() -> pd.DataFrame:
    """Say of every planted model that ships what its heads were measured to be; NaN where there is no figure."""
    rows: list[dict[str, Any]] = []
    for path in sorted(saving.shipped().glob(f"*/{TRUTH}")):
        found, name = read_object(path), path.parent.name
        for head in found["heads"]:
            figures = {
                key: float(head[key]) for key in ("adds", "alone", "direct_share", "reads_picture", "reads_sound")
            }
            if head["kind"] == FREE_RIDER:  # shares of next to nothing say nothing
                figures["direct_share"] = math.nan
            row = {"model": name, "head": _place(head), "kind": head["kind"]}
            rows.append(row | {key.replace("_", " "): value for key, value in figures.items()})
        rows += [{"model": name, "head": _place(decoy), "kind": "decoy"} for decoy in found.get("decoys", [])]
    return pd.DataFrame(rows)


def _place(head: dict[str, Any]) -> str:
    return f"L{head['layer']}H{head['head']}"


def markdown(table: pd.DataFrame) -> str:
    """Write a table as markdown: shares with three decimals, a dash for NaN."""
    rows = [[_cell(value) for value in row.values()] for row in table.to_dict("records")]
    return pages.markdown(([str(column) for column in table.columns], rows), left=range(len(table.columns)))


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"
