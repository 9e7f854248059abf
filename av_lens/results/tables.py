"""Which tables does an isolation's record hold, and which columns do they have?

`TABLES` is the whole schema: table -> column -> kind, a kind being "text", "int", "float" or "flag" (true or false).
`table` builds one, typed, with missing figures NaN (never 0) and missing words empty; `read_table` opens the csv that
pandas wrote. Signs and units are the record's (`av_lens.results.record`).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd

from av_lens.checks import foreign_file
from av_lens.errors import InputError, unknown

SUPPRESSORS = ("picture writer", "sound opponent", "gate")
# Heads whose release passes and is no mere damage; the mechanism of the last is undetermined.
RELEASING = (*SUPPRESSORS, "undetermined")
ROLE_NAMES = (*SUPPRESSORS, "breaks", "undetermined", "silenced carrier", "sound carrier")

TABLES: dict[str, dict[str, str]] = {
    # One row per named (head, site, role), largest effect first. `effect low high` are confirmation's.
    "heads": {
        "layer": "int",
        "head": "int",
        "site": "text",
        "role": "text",
        "member_of": "text",
        "estimand": "text",
        "donor": "text",
        "effect": "float",
        "low": "float",
        "high": "float",
        "direct_share": "float",
        "q": "float",
        "p_maxt": "float",
        "confirmed": "flag",
        "flags": "text",
        "share": "float",
        "share_low": "float",
        "share_high": "float",
        "p_holm": "float",
        "discovery_effect": "float",
        "discovery_low": "float",
        "discovery_high": "float",
        "discovery_share": "float",
        "discovery_direct_share": "float",
        "discovery_p": "float",
        "release_blank_muted": "float",
        "release_mean_other": "float",
        "release_zero": "float",
        "question_share": "float",
        "reads_picture": "float",
        "reads_sound": "float",
        "sufficiency": "float",
        "silenced": "float",
        "carries": "float",
        "repair": "float",
        "release_on_sound": "float",
        "release_on_picture": "float",
        "release_norm_frozen": "float",
        "dla": "float",
    },
    # Every head's every effect, named or not: what heat maps are drawn from.
    "evidence": {
        "half": "text",
        "site": "text",
        "layer": "int",
        "head": "int",
        "estimand": "text",
        "donor": "text",
        "mean": "float",
        "low": "float",
        "high": "float",
        "share": "float",
        "share_low": "float",
        "share_high": "float",
        "n": "int",
    },
    # The same for what is no query head: `unit` is "kv group", "mlp", "attention" or "layer", `index` the group or -1.
    "units": {
        "half": "text",
        "site": "text",
        "unit": "text",
        "layer": "int",
        "index": "int",
        "estimand": "text",
        "donor": "text",
        "mean": "float",
        "low": "float",
        "high": "float",
        "share": "float",
        "share_low": "float",
        "share_high": "float",
        "n": "int",
    },
    # One row per set that was built (one per primary donor; `chosen` marks the one that the verdict speaks of).
    "sets": {
        "name": "text",
        "site": "text",
        "members": "text",
        "k": "int",
        "donor": "text",
        "screen": "text",
        "chosen": "flag",
        "discovery_release": "float",
        "discovery_share": "float",
        "release": "float",
        "low": "float",
        "high": "float",
        "share": "float",
        "share_low": "float",
        "share_high": "float",
        "says_sound_before": "float",
        "says_sound": "float",
        "says_picture_before": "float",
        "says_picture": "float",
        "random_n": "int",
        "random_mean": "float",
        "random_high": "float",
        "random_max": "float",
        "p_random": "float",
        "p_floor": "float",
        "confirmed": "flag",
        "flags": "text",
    },
    # One row per member of a set, in the order in which the search took it in. `single` is its release alone, `gain`
    # what it added when it was taken in, `without` the set's release minus the set's without it, all on discovery;
    # `effect low high` is the last of these on confirmation; role, direct share and reads are measured with the others
    # edited.
    "members": {
        "name": "text",
        "site": "text",
        "donor": "text",
        "chosen": "flag",
        "order": "int",
        "layer": "int",
        "head": "int",
        "screen": "text",
        "single": "float",
        "single_low": "float",
        "gain": "float",
        "without": "float",
        "without_low": "float",
        "without_high": "float",
        "effect": "float",
        "low": "float",
        "high": "float",
        "role": "text",
        "direct_share": "float",
        "direct_share_low": "float",
        "direct_share_high": "float",
        "reads_picture": "float",
        "reads_sound": "float",
        "confirmed": "flag",
    },
    # The search's path: action is "start", "add", "drop" (gains below delta at the end) or "take out".
    "steps": {
        "site": "text",
        "donor": "text",
        "start": "text",
        "step": "int",
        "action": "text",
        "layer": "int",
        "head": "int",
        "release": "float",
        "gain": "float",
    },
    # release({h, k}) - max(0, release h) - max(0, release k), the largest pairs by donor.
    "synergies": {
        "site": "text",
        "donor": "text",
        "layer": "int",
        "head": "int",
        "layer2": "int",
        "head2": "int",
        "release": "float",
        "synergy": "float",
        "share": "float",
    },
    # Mechanism cards of the named heads: part is "attention", "ov", "pattern" (driven by Q or by K) or "path".
    "cards": {
        "layer": "int",
        "head": "int",
        "site": "text",
        "part": "text",
        "cell": "text",
        "what": "text",
        "value": "float",
        "low": "float",
        "high": "float",
        "unit": "text",
        "note": "text",
    },
    # Edges of the named heads cut: arm is "cut" or the control's name.
    "cuts": {
        "heads": "text",
        "site": "text",
        "edges": "text",
        "renormalised": "flag",
        "arm": "text",
        "release": "float",
        "low": "float",
        "high": "float",
        "share": "float",
        "mass": "float",
        "note": "text",
    },
    # Where the audio is known: the lens and probes by layer and span, with their nulls. `layer` counts the layers that
    # the stream has passed (0: before the first; -1: the maximum over layers).
    "knowledge": {
        "method": "text",
        "word": "text",
        "cell": "text",
        "span": "text",
        "layer": "int",
        "value": "float",
        "low": "float",
        "high": "float",
        "null": "float",
        "excess": "float",
        "excess_low": "float",
        "excess_high": "float",
        "chosen": "flag",
        "n": "int",
        "note": "text",
    },
    # By which road does the picture win? relay, generation, sink; arm is "cut" or the control's name.
    "routes": {
        "route": "text",
        "edges": "text",
        "arm": "text",
        "effect": "float",
        "low": "float",
        "high": "float",
        "share": "float",
        "says_sound": "float",
        "mass": "float",
        "note": "text",
    },
    # What the repair plan (`found.plan()`) changes on confirmation: C, what is said, and the controls of `specificity`.
    "repair": {
        "quantity": "text",
        "n": "int",
        "before": "float",
        "after": "float",
        "change": "float",
        "low": "float",
        "high": "float",
        "bound": "float",
        "verdict": "text",
    },
    # Does it hang on a choice? The search under each variant: who is named, and how that agrees with the main search.
    "robustness": {
        "variant": "text",
        "named": "text",
        "jaccard": "float",
        "low": "float",
        "high": "float",
        "rank_correlation": "float",
        "kept": "text",
        "lost": "text",
        "gained": "text",
        "turned": "text",
        "note": "text",
    },
    # The cumulative edit, held out: arm is "set", "random" (one row a draw, at full size) or "see heads".
    "ablation": {
        "arm": "text",
        "k": "int",
        "draw": "int",
        "members": "text",
        "donor": "text",
        "release": "float",
        "low": "float",
        "high": "float",
        "share": "float",
        "says_sound": "float",
        "says_picture": "float",
    },
    # What else the set's edit breaks: non-inferiority. Rates before and after, the bound of the fall, the verdict.
    "specificity": {
        "control": "text",
        "n": "int",
        "before": "float",
        "after": "float",
        "fall": "float",
        "bound": "float",
        "margin": "float",
        "verdict": "text",
    },
    # Quantities of protocol section 2 by half ("discovery", "confirmation"); `chosen` is "all" or "competent". Quantity
    # "accuracy" has a cell and a rule: right among the "two" answers, or in the whole "vocabulary"; "says sound" and
    # "says picture" are rates of each answer where the sound is muted.
    "behaviour": {
        "half": "text",
        "chosen": "text",
        "quantity": "text",
        "cell": "text",
        "rule": "text",
        "value": "float",
        "low": "float",
        "high": "float",
        "n": "int",
    },
    # One row per conflict: who it is, where it was dealt, what the unedited model does.
    "conflicts": {
        "id": "text",
        "half": "text",
        "component": "int",
        "competent": "flag",
        "analysed": "flag",
        "sound_answer": "text",
        "picture_answer": "text",
        "says": "text",
        "M_va": "float",
        "M_av": "float",
        "M_blank_a": "float",
        "M_blank_v": "float",
        "C": "float",
        "G": "float",
    },
}
_TO_DTYPE = {"text": "object", "int": "int64", "float": "float64", "flag": "bool"}
_MISSING: dict[str, Any] = {"text": "", "int": -1, "float": float("nan"), "flag": False}


def table(name: str, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Build one of the record's tables: columns in their order, missing figures NaN, missing words empty.

    Args:
        name: a table of `TABLES`.
        rows: one dictionary per row; keys that are no column are refused.

    Returns:
        The frame, typed.

    Raises:
        InputError: an unknown table or column.
    """
    if name not in TABLES:
        raise InputError(unknown("table", name, TABLES))
    columns = TABLES[name]
    for row in rows:
        for key in row:
            if key not in columns:
                raise InputError(f"table {name!r}: {unknown('column', key, columns)}")
    data = {
        column: pd.Series([row.get(column, _MISSING[kind]) for row in rows], dtype=cast(Any, _TO_DTYPE[kind]))
        for column, kind in columns.items()
    }
    return pd.DataFrame(data)


def read_table(path: Path, name: str) -> pd.DataFrame:
    """Open a table that was saved as csv.

    Args:
        path: the csv file.
        name: which table it is.

    Returns:
        The frame, equal to the saved one (floats are written with every digit).

    Raises:
        InputError: there is no such file, or it does not have this table's columns in every row.
    """
    columns = TABLES[name]
    with foreign_file(path, f"the table {name!r} of a saved isolation"):
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file, strict=True)
            found = next(lines, [])
            if found != list(columns):
                raise ValueError(f"its columns should be {','.join(columns)}")
            # A row has every column, so that memory is bounded by the file's size (some 30 times).
            cells: list[Any] = list(zip(*lines, strict=True)) or [()] * len(columns)
        if len(cells) != len(columns):
            raise ValueError(f"its rows have {len(cells)} columns, not {len(columns)}")
        return pd.DataFrame(
            {
                column: pd.Series([_parsed(cell, kind) for cell in made], dtype=cast(Any, _TO_DTYPE[kind]))
                for (column, kind), made in zip(columns.items(), cells, strict=True)
            }
        )


def _parsed(text: str, kind: str) -> Any:
    if kind == "text":
        return text
    if kind == "int":
        return int(text)
    if kind == "flag":
        return {"True": True, "False": False}[text]
    return float(text) if text else float("nan")
