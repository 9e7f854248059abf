"""Which tables does an isolation's record hold, and which columns do they have?

`TABLES` is the whole schema: table -> column -> kind, a kind being "text", "int", "float" or "flag" (true or false).
`table` builds one, typed, with missing figures NaN (never 0) and missing words empty; `read_table` opens the csv that
pandas wrote. Signs and units are the record's (`av_lens.results.record`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from av_lens.checks import foreign_file
from av_lens.errors import InputError, unknown

SUPPRESSORS = ("picture writer", "sound opponent", "gate")
# Heads whose release passes and is no mere damage; the mechanism of the last is undetermined.
RELEASING = (*SUPPRESSORS, "undetermined")
ROLE_NAMES = (*SUPPRESSORS, "breaks", "undetermined", "silenced carrier", "sound carrier")


def _columns(*runs: str) -> dict[str, str]:
    """Column -> kind, of runs such as "float: low high", in the order of the table."""
    parts = [run.split(": ") for run in runs]
    return {name: kind for kind, names in parts for name in names.split()}


TABLES: dict[str, dict[str, str]] = {
    # One row per named (head, site, role), largest effect first. `effect low high` are confirmation's.
    "heads": _columns(
        "int: layer head",
        "text: site role member_of estimand donor",
        "float: effect low high direct_share q p_maxt",
        "flag: confirmed",
        "text: flags",
        "float: share share_low share_high p_holm discovery_effect discovery_low discovery_high",
        "float: discovery_share discovery_direct_share discovery_p release_blank_muted release_mean_other",
        "float: release_zero question_share reads_picture reads_sound sufficiency silenced carries repair",
        "float: release_on_sound release_on_picture release_norm_frozen dla",
    ),
    # Every head's every effect, named or not: what heat maps are drawn from.
    "evidence": _columns(
        "text: half site",
        "int: layer head",
        "text: estimand donor",
        "float: mean low high share share_low share_high",
        "int: n",
    ),
    # The same for what is no query head: `unit` is "kv group", "mlp", "attention" or "layer", `index` the group or -1.
    "units": _columns(
        "text: half site unit",
        "int: layer index",
        "text: estimand donor",
        "float: mean low high share share_low share_high",
        "int: n",
    ),
    # One row per set that was built (one per primary donor; `chosen` marks the one that the verdict speaks of).
    "sets": _columns(
        "text: name site members",
        "int: k",
        "text: donor screen",
        "flag: chosen",
        "float: discovery_release discovery_share release low high share share_low share_high",
        "float: says_sound_before says_sound says_picture_before says_picture",
        "int: random_n",
        "float: random_mean random_high random_max p_random p_floor",
        "flag: confirmed",
        "text: flags",
    ),
    # One row per member of a set, in the order in which the search took it in. `single` is its release alone, `gain`
    # what it added when it was taken in, `without` the set's release minus the set's without it, all on discovery;
    # `effect low high` is the last of these on confirmation; role, direct share and reads are measured with the others
    # edited.
    "members": _columns(
        "text: name site donor",
        "flag: chosen",
        "int: order layer head",
        "text: screen",
        "float: single single_low gain without without_low without_high effect low high",
        "text: role",
        "float: direct_share direct_share_low direct_share_high reads_picture reads_sound",
        "flag: confirmed",
    ),
    # The search's path: action is "start", "add", "drop" (gains below delta at the end) or "take out".
    "steps": _columns("text: site donor start", "int: step", "text: action", "int: layer head", "float: release gain"),
    # release({h, k}) - max(0, release h) - max(0, release k), the largest pairs by donor.
    "synergies": _columns("text: site donor", "int: layer head layer2 head2", "float: release synergy share"),
    # Mechanism cards of the named heads: part is "attention", "ov", "pattern" (driven by Q or by K) or "path".
    "cards": _columns("int: layer head", "text: site part cell what", "float: value low high", "text: unit note"),
    # Edges of the named heads cut: arm is "cut" or the control's name.
    "cuts": _columns(
        "text: heads site edges", "flag: renormalised", "text: arm", "float: release low high share mass", "text: note"
    ),
    # Where the audio is known: the lens and probes by layer and span, with their nulls. `layer` counts the layers that
    # the stream has passed (0: before the first; -1: the maximum over layers).
    "knowledge": _columns(
        "text: method word cell span",
        "int: layer",
        "float: value low high null excess excess_low excess_high",
        "flag: chosen",
        "int: n",
        "text: note",
    ),
    # By which road does the picture win? relay, generation, sink; arm is "cut" or the control's name.
    "routes": _columns("text: route edges arm", "float: effect low high share says_sound mass", "text: note"),
    # What the repair plan (`found.plan()`) changes on confirmation: C, what is said, and the controls of `specificity`.
    "repair": _columns("text: quantity", "int: n", "float: before after change low high bound", "text: verdict"),
    # Does it hang on a choice? The search under each variant: who is named, and how that agrees with the main search.
    "robustness": _columns(
        "text: variant named", "float: jaccard low high rank_correlation", "text: kept lost gained turned note"
    ),
    # The cumulative edit, held out: arm is "set", "random" (one row a draw, at full size) or "see heads".
    "ablation": _columns(
        "text: arm", "int: k draw", "text: members donor", "float: release low high share says_sound says_picture"
    ),
    # What else the set's edit breaks: non-inferiority. Rates before and after, the bound of the fall, the verdict.
    "specificity": _columns("text: control", "int: n", "float: before after fall bound margin", "text: verdict"),
    # Quantities of protocol section 2 by half ("discovery", "confirmation"); `chosen` is "all" or "competent". Quantity
    # "accuracy" has a cell and a rule: right among the "two" answers, or in the whole "vocabulary"; "says sound" and
    # "says picture" are rates of each answer where the sound is muted.
    "behaviour": _columns("text: half chosen quantity cell rule", "float: value low high", "int: n"),
    # One row per conflict: who it is, where it was dealt, what the unedited model does.
    "conflicts": _columns(
        "text: id half",
        "int: component",
        "flag: competent analysed",
        "text: sound_answer picture_answer says",
        "float: M_va M_av M_blank_a M_blank_v C G",
    ),
}

_KINDS: dict[str, tuple[Any, Any, Callable[[str], Any]]] = {
    "text": ("object", "", str),
    "int": ("int64", -1, int),
    "float": ("float64", float("nan"), lambda text: float(text or "nan")),
    "flag": ("bool", False, {"True": True, "False": False}.__getitem__),
}
"""Of each kind the type in the frame, what is missing, and how a cell of a csv is read."""


def table(name: str, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Build one of the record's tables: columns in their order, missing figures NaN, missing words empty."""
    if name not in TABLES:
        raise InputError(unknown("table", name, TABLES))
    columns = TABLES[name]
    for row in rows:
        for key in row:
            if key not in columns:
                raise InputError(f"table {name!r}: {unknown('column', key, columns)}")
    return _frame(
        {column: [row.get(column, _KINDS[kind][1]) for row in rows] for column, kind in columns.items()}, name
    )


def _frame(cells: dict[str, list[Any]], name: str) -> pd.DataFrame:
    kinds = TABLES[name]
    return pd.DataFrame({column: pd.Series(held, dtype=_KINDS[kinds[column]][0]) for column, held in cells.items()})


def read_table(path: Path, name: str) -> pd.DataFrame:
    """Open a table that was saved as csv."""
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
        read = [[_KINDS[kind][2](cell) for cell in made] for kind, made in zip(columns.values(), cells, strict=True)]
        return _frame(dict(zip(columns, read, strict=True)), name)
