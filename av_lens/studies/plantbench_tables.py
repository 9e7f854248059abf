"""The bench as tables: what a page and a terminal show is computed here from the stored record.

`store` writes the record (`plantbench.json`: every model's judged figures), the figure (`plantbench.svg`) and fills
the page beside them (`plantbench.md`) between two comments, so that no figure on the page is typed by hand; a test
compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from av_lens.errors import InputError
from av_lens.plots.plant_bench import plant_bench_svg
from av_lens.results.whole_files import write_whole
from av_lens.studies.pages import fill, parts_of
from av_lens.studies.plantbench import Scored
from av_lens.studies.plantbench_donors import DONORS
from av_lens.studies.plantbench_methods import IN_LOGITS, METHODS
from av_lens.studies.plantbench_scores import DAMAGE_LAST
from av_lens.studies.plantbench_summary import GROUPS, Summary, chosen, mean_over, nulls, summary_of
from av_lens.studies.plantbench_truth import SUBJECT, PlantTruth
from av_lens.studies.replay_tables import Table, markdown

RECORD, PAGE, FIGURE = "plantbench.json", "plantbench.md", "plantbench.svg"
OPEN, CLOSE = "<!-- plantbench -->\n", "\n<!-- /plantbench -->"
ALL = ("isolate", DAMAGE_LAST, *METHODS)


def record_of(bench: Scored) -> dict[str, Any]:
    """Judge a bench's models and put its record together.

    Args:
        bench: from `run_plantbench`.

    Returns:
        Plain data.

    Raises:
        InputError: no model was scored.
    """
    if not bench.models:
        raise InputError(f"{bench.folder} holds no scored model yet: give limit= at least 1.")
    created = max(str(one["provenance"]["created"]) for one in bench.models)
    models = [summary_of(one) for one in bench.models]
    return {"schema": "av_lens.plantbench", "created": created, "criteria": dict(bench.criteria), "models": models}


def store(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the record and the figure, and fill the page beside them.

    Args:
        record: from `record_of`.
        folder: where `plantbench.md` stands, with its two comments.

    Returns:
        The page.

    Raises:
        InputError: the folder has no such page.
    """
    page = Path(folder) / PAGE
    parts_of(page, OPEN, CLOSE)  # before anything is written
    write_whole(Path(folder) / RECORD, json.dumps(record, indent=None, separators=(",", ":"), allow_nan=False) + "\n")
    write_whole(Path(folder) / FIGURE, figure(record))
    return fill(page, OPEN, CLOSE, page_tables(record))


def figure(record: Mapping[str, Any]) -> str:
    """Draw every method's AUROC by group of planted models.

    Args:
        record: the bench's record.

    Returns:
        An svg.
    """
    groups = [group for group in GROUPS if chosen(record["models"], group)]
    rows = {
        method: {group: mean_over(chosen(record["models"], group), method, "auroc") for group in groups}
        for method in ALL
    }
    return plant_bench_svg(rows, label="AUROC")


def page_tables(record: Mapping[str, Any]) -> str:
    """Write the whole record as markdown.

    Args:
        record: the bench's record.

    Returns:
        Headings, sentences and tables.
    """
    models = record["models"]
    parts = [header_line(record)]
    for title, table in tables(models):
        parts += [f"### {title}", markdown(table)]
    return "\n\n".join(parts)


def tables(models: Sequence[Summary]) -> list[tuple[str, Table]]:
    """Tabulate a bench, the parts that these models allow.

    Args:
        models: summaries.

    Returns:
        Title and table.
    """
    found: list[tuple[str, Table]] = []
    if chosen(models, "planted"):
        found += [
            ("Every method on the planted models", methods_table(models)),
            ("AUROC by what was planted", groups_table(models, "auroc")),
            ("Precision at k by what was planted", groups_table(models, "precision at k")),
            ("`isolate` by what was planted", isolate_table(models)),
        ]
    if nulls(models):
        found.append(("Where nothing is to be found", nulls_table(models)))
    found += [
        ("How far donors agree", donors_table(models)),
        ("What each donor finds", finds_table(models)),
        ("Named heads that not all three primary donors show", disagreements_table(models)),
        ("Model by model", models_table(models)),
    ]
    return [(title, table) for title, table in found if table[1]]


def header_line(record: Mapping[str, Any]) -> str:
    """Say what was measured.

    Args:
        record: the bench's record.

    Returns:
        A paragraph.
    """
    models, said = record["models"], record["criteria"]
    planted = chosen(models, "planted")
    counts = ", ".join(f"{len(chosen(models, group))} {_said(group)}" for group in GROUPS[1:])
    used = sorted({int(one["summary"]["n discovery"]) for one in models})
    n = f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}"
    return (
        f"{len(models)} models: {len(planted)} with planted suppressors ({counts}; a model may be of several), "
        f"{len(nulls(models))} with nothing to be found. {said['conflicts']} conflicts from the world's part "
        f"`{said['split']}`, which trained no model; scores are of discovery's competent ones ({n}). Criteria "
        f"`{said['hash'][:12]}`, written before the first model was scored; {record['created']}, av-lens "
        f"{said['av_lens']}."
    )


def methods_table(models: Sequence[Summary]) -> Table:
    """Tabulate every method over all planted models.

    Args:
        models: summaries.

    Returns:
        Headings and rows.
    """
    planted = chosen(models, "planted")
    columns = ("auroc", "average precision", "precision at k", "precision", "recall", "kind right")
    rows = [
        [method, *(_bounded(mean_over(planted, method, column)) for column in columns), _seconds(models, method)]
        for method in ALL
    ]
    names = ["AUROC", "average precision", "precision at k", "precision of the named", "recall", "kind right"]
    return ["method", *names, "s a model"], rows


def groups_table(models: Sequence[Summary], column: str) -> Table:
    """Tabulate one figure by group.

    Args:
        models: summaries.
        column: the figure.

    Returns:
        Headings and rows.
    """
    groups = {group: chosen(models, group) for group in GROUPS}
    groups = {group: members for group, members in groups.items() if members}
    rows = [[method, *(_bounded(mean_over(members, method, column)) for members in groups.values())] for method in ALL]
    return ["method", *(f"{_said(group)} ({len(members)})" for group, members in groups.items())], rows


def isolate_table(models: Sequence[Summary]) -> Table:
    """Tabulate what `isolate` gets right, by group.

    Args:
        models: summaries.

    Returns:
        Headings and rows.
    """
    columns = {
        "AUROC": "auroc", "precision at k": "precision at k", "kind right": "kind right",
        "kind right, of named": "kind right of named", "precision": "precision", "recall": "recall",
        "precision, confirmed": "confirmed precision", "recall, confirmed": "confirmed recall",
    }  # fmt: skip
    rows = [
        [f"{_said(group)} ({len(members)})", *(_bounded(mean_over(members, "isolate", c)) for c in columns.values())]
        for group in GROUPS
        if (members := chosen(models, group))
    ]
    return ["planted", *columns], rows


def nulls_table(models: Sequence[Summary]) -> Table:
    """Tabulate false naming where nothing is to be found, on decoys, and with exchanged labels.

    Args:
        models: summaries.

    Returns:
        Headings and rows.
    """
    empty, planted = nulls(models), chosen(models, "planted")
    decoyed = [one for one in models if one["truth"]["decoys"]]
    rows: list[list[str]] = []
    for method in ("isolate", *IN_LOGITS):
        by_null = [_number(one["methods"][method].get("false")) for one in empty]
        row = [method, f"{sum(n > 0 for n in by_null)} of {len(empty)}", _figure(float(np.mean(by_null)))]
        row.append(f"{sum(_number(one['methods'][method].get('false decoys')) for one in decoyed):.0f}")
        row.append(_figure(float(np.mean([_number(one["methods"][method].get("false")) for one in planted or empty]))))
        rows.append(row)
    held = [_number(one["methods"]["isolate"].get("confirmed false")) for one in empty]
    rows.insert(1, ["isolate, confirmed", f"{sum(n > 0 for n in held)} of {len(held)}", _figure(float(np.mean(held)))])
    rows[1] += ["–", _bounded(mean_over(planted, "isolate", "confirmed false"))] if planted else ["–", "–"]
    draws = [count for one in models for count in one["exchanged"]]
    label = f"isolate, labels exchanged ({len(draws)} draws, all models)"
    rows.append([label, f"{sum(n > 0 for n in draws)} of {len(draws)} draws", _figure(float(np.mean(draws))), "–", "–"])
    decoys = sum(len(one["truth"]["decoys"]) for one in decoyed)
    return [
        "named by", "models with a name", "false names a model", f"of {decoys} decoys",
        "false names a planted model",
    ], rows  # fmt: skip


def _families(models: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Models as the question of donors groups them."""
    subjects = {one["model"]: [one] for one in models if one["truth"]["plant"] == SUBJECT}
    return {name: found for name, found in {**subjects, "planted": chosen(models, "planted")}.items() if found}


def donors_table(models: Sequence[Summary]) -> Table:
    """Tabulate how far every pair of donors agrees, by family of models.

    Args:
        models: summaries.

    Returns:
        Headings and rows: rank correlation, equal signs, overlap, each a mean over models.
    """
    families = _families(models)
    pairs = list(models[0]["donors"])
    rows = [
        [
            pair.replace(", ", " and "),
            *(
                " / ".join(_figure(_mean(one["donors"][pair][name] for one in family)) for name in
                           ("rank correlation", "equal signs", "overlap"))
                for family in families.values()
            ),
        ]
        for pair in pairs
    ]  # fmt: skip
    heads = [f"{name}{f' ({len(found)})' if len(found) > 1 else ''}" for name, found in families.items()]
    return ["donors", *(f"{head}: rank correlation / equal signs / overlap" for head in heads)], rows


def finds_table(models: Sequence[Summary]) -> Table:
    """Tabulate each donor's AUROC by group.

    Args:
        models: summaries.

    Returns:
        Headings and rows; none without planted models.
    """
    groups = {group: chosen(models, group) for group in GROUPS}
    groups = {group: members for group, members in groups.items() if members}
    rows = [
        [donor, *(_bounded(mean_over(members, method, "auroc")) for members in groups.values())]
        for donor, method in DONORS.items()
        if groups
    ]
    return ["donor", *(f"AUROC, {_said(group)} ({len(members)})" for group, members in groups.items())], rows


def disagreements_table(models: Sequence[Summary]) -> Table:
    """List true or named heads whose release is above delta by some primary donors and not by others.

    Args:
        models: summaries.

    Returns:
        Headings and rows: shares of G by donor, and what `isolate` says of the head.
    """
    primary = ("blank_muted", "mean_other", "zero")
    rows: list[list[str]] = []
    for one in models:
        named = {(row["layer"], row["head"]): row for row in one["named"]}
        truth = PlantTruth.of_dict(one["truth"])
        for head in one["heads"]:
            place = head["layer"], head["head"]
            seen = [donor for donor in primary if donor in head["seen by"]]
            if len(seen) == len(primary):
                continue
            said = named.get(place)
            words = "not named" if said is None else said["role"] + ("" if said["single"] else ", as a member")
            words += f" ({said['flags']})" if said is not None and said["flags"] else ""
            shares = [_figure(_number(head["shares"][donor])) for donor in primary]
            rows.append([one["model"], f"L{place[0]}H{place[1]}", truth.kinds.get(place, "–"), *shares, words])
    return ["model", "head", "planted as", *(f"{donor}, of G" for donor in primary), "the report says"], rows


def models_table(models: Sequence[Summary]) -> Table:
    """List every model with what `isolate` says of it.

    Args:
        models: summaries.

    Returns:
        Headings and rows.
    """
    rows: list[list[str]] = []
    for one in models:
        truth, mine = PlantTruth.of_dict(one["truth"]), one["methods"]["isolate"]
        true = ", ".join(f"L{layer}H{head} {kind}" for (layer, head), kind in sorted(truth.kinds.items())) or "–"
        named = ", ".join(
            f"L{row['layer']}H{row['head']} {row['role']}{'' if row['confirmed'] else ' (not confirmed)'}"
            for row in one["named"]
        )
        figures = (_figure(_number(mine.get(name))) for name in ("auroc", "precision at k", "kind right"))
        share = _number(one["summary"]["C"]) / _number(one["summary"]["G"])
        rows.append([one["model"], truth.plant, _figure(share), true, named or "–", *figures])
    heads = ["model", "planted", "C of G", "true heads", "named", "AUROC", "precision at k", "kind right"]
    return heads, rows


def _said(group: str) -> str:
    words = {"planted": "all planted", "picture writer": "with a writer", "sound opponent": "with an opponent"}
    return words.get(group, {"gate": "with a gate"}.get(group, group))


def _seconds(models: Sequence[Summary], method: str) -> str:
    return _figure(float(np.median([_number(one["methods"][method]["seconds"]) for one in models])))


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _bounded(found: tuple[float, float, float]) -> str:
    value, low, high = found
    return _figure(value) if math.isnan(low) else f"{value:.3f} [{low:.2f}, {high:.2f}]"


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
