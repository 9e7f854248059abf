"""The behaviour of the models that ship, as one table: read from the evaluations stored beside their weights.

Documentation shows what `markdown(shares_table())` gives, so that the table cannot drift from the weights.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from av_lens.lab.planting.planted import FREE_RIDER
from av_lens.lab.training.expectations import AT_LEAST, standing
from av_lens.organism import saving
from av_lens.organism.evaluation import Evaluation

EVALUATION = "evaluation.json"
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


def shipped_evaluations() -> dict[str, Evaluation]:
    """Read the evaluations that ship with the models.

    Returns:
        Short name to evaluation, for every listed model that has one.
    """
    index = saving.shipped() / saving.INDEX
    if not index.exists():
        return {}
    found: dict[str, Evaluation] = {}
    for name, entry in json.loads(index.read_text("utf-8")).items():
        path = saving.shipped() / entry["folder"] / EVALUATION
        if path.exists():
            found[name] = Evaluation.load(path)
    return found


def every_seed() -> dict[tuple[str, int], Evaluation]:
    """Read the evaluations of every training seed: of the shipped weights (seed 0) and of those trained beside them.

    Returns:
        (Short name, training seed) to evaluation, for those that are stored.
    """
    found = {(name, 0): result for name, result in shipped_evaluations().items()}
    for path in sorted(saving.shipped().glob("*/evaluation-seed*.json")):
        found[path.parent.name, int(path.stem.removeprefix("evaluation-seed"))] = Evaluation.load(path)
    return dict(sorted(found.items()))


def standing_table() -> pd.DataFrame:
    """Say for every model and training seed which of its written lines hold.

    Returns:
        `model seed lines hold "does not hold"`, the last with the figure and its interval.
    """
    rows: list[dict[str, object]] = []
    for (name, seed), result in every_seed().items():
        lines = standing(result, name, planted=_planted(name))
        short = [
            f"{row['line']} ({row['layout']}) {row['share']:.3f} [{row['low']:.3f}, {row['high']:.3f}], wanted "
            f"{'at least' if row['sign'] == AT_LEAST else 'at most'} {row['bound']:.2f}"
            for row in lines.to_dict("records")
            if not row["holds"]
        ]
        rows.append(
            {
                "model": name,
                "seed": seed,
                "lines": len(lines),
                "hold": len(lines) - len(short),
                "does not hold": "; ".join(short) or "-",
            }
        )
    return pd.DataFrame(rows)


def _planted(name: str) -> tuple[tuple[int, int], ...]:
    path = saving.shipped() / name / "planted.json"
    if not path.exists():
        return ()
    return tuple((head["layer"], head["head"]) for head in json.loads(path.read_text("utf-8"))["heads"])


def shares_table(evaluations: dict[str, Evaluation] | None = None) -> pd.DataFrame:
    """Put the main shares of every model into one table.

    Args:
        evaluations: by name; those that ship by default.

    Returns:
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
    """Say of every planted model that ships what its heads were measured to be.

    Returns:
        `model head kind adds alone "direct share" "reads picture" "reads sound"`, a row for each planted head or decoy;
        NaN where there is no figure.
    """
    rows: list[dict[str, object]] = []
    for path in sorted(saving.shipped().glob("*/planted.json")):
        found = json.loads(path.read_text("utf-8"))
        for head in found["heads"]:
            figures = {name: float(head[name]) for name in ("adds", "alone", "direct_share")}
            figures |= {name: float(head[name]) for name in ("reads_picture", "reads_sound")}
            named = {name.replace("_", " "): value for name, value in figures.items()}
            if head["kind"] == FREE_RIDER:  # shares of next to nothing say nothing
                named["direct share"] = float("nan")
            rows.append({"model": path.parent.name, "head": _place(head), "kind": head["kind"], **named})
        name, decoys = path.parent.name, found.get("decoys", [])
        rows.extend({"model": name, "head": _place(decoy), "kind": "decoy"} for decoy in decoys)
    return pd.DataFrame(rows)


def _place(head: dict[str, Any]) -> str:
    return f"L{head['layer']}H{head['head']}"


def markdown(table: pd.DataFrame) -> str:
    """Write a table of shares as markdown.

    Args:
        table: from `shares_table`.

    Returns:
        The lines of a pipe table; shares with three decimals, a dash for NaN.
    """
    head = [str(column) for column in table.columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in table.to_dict("records")]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"
