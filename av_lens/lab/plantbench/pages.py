"""The bench as a page: its record (`plantbench.json`), its figure (`plantbench.svg`), its tables between two comments.

`store` writes the record (every model's judged figures) and the figure, and fills `plantbench.md` beside them, so that
no figure on the page is typed by hand; a test compares. What a terminal shows are the same `tables`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from av_lens.errors import InputError
from av_lens.lab.pages import FilledPage, Table, markdown
from av_lens.lab.plantbench.bench import Scored
from av_lens.lab.plantbench.methods import IN_LOGITS, METHODS
from av_lens.lab.plantbench.scores import DAMAGE_LAST
from av_lens.lab.plantbench.summary import DONORS, GROUPS, KINDS, Summary, chosen, mean_over, nulls, number, summary_of
from av_lens.lab.plantbench.truth import SUBJECT, PlantTruth
from av_lens.plots.plant_bench import plant_bench_svg

PAGE, FIGURE = FilledPage("plantbench.md", "plantbench.json", "plantbench"), "plantbench.svg"
ALL = {method: method for method in ("isolate", DAMAGE_LAST, *METHODS)}
SAID = {"planted": "all planted", **dict(zip(KINDS, ("with a writer", "with an opponent", "with a gate"), strict=True))}
RIGHT = {
    "AUROC": "auroc",
    "precision at k": "precision at k",
    "kind right": "kind right",
    "kind right, of named": "kind right of named",
    "precision": "precision",
    "recall": "recall",
    "precision, confirmed": "confirmed precision",
    "recall, confirmed": "confirmed recall",
}
"""What `isolate` gets right, as the page calls it, and the figure."""


def record_of(bench: Scored) -> dict[str, Any]:
    """Judge a bench's models and put its record together, as plain data."""
    if not bench.models:
        raise InputError(f"{bench.folder} holds no scored model yet: give limit= at least 1.")
    created = max(str(one["provenance"]["created"]) for one in bench.models)
    models = [summary_of(one) for one in bench.models]
    return {"schema": "av_lens.plantbench", "created": created, "criteria": dict(bench.criteria), "models": models}


def store(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the record and the figure, and fill the page beside them."""
    stored = json.dumps(record, indent=None, separators=(",", ":"), allow_nan=False) + "\n"
    return PAGE.store(folder, stored, page_tables(record), beside={FIGURE: figure(record)})


def figure(record: Mapping[str, Any]) -> str:
    """Draw every method's AUROC by group of planted models, as an svg."""
    groups = {group: models for group in GROUPS if (models := chosen(record["models"], group))}
    rows = {method: {group: mean_over(models, method, "auroc") for group, models in groups.items()} for method in ALL}
    return plant_bench_svg(rows, label="AUROC")


def page_tables(record: Mapping[str, Any]) -> str:
    """Write the whole record as markdown."""
    shown = tables(record["models"], record["criteria"]["must"])
    return "\n\n".join([header_line(record), *(f"### {title}\n\n{markdown(table)}" for title, table in shown)])


def header_line(record: Mapping[str, Any]) -> str:
    """Say what was measured."""
    models, said = record["models"], record["criteria"]
    planted = chosen(models, "planted")
    counts = ", ".join(f"{len(chosen(models, group))} {SAID.get(group, group)}" for group in GROUPS[1:])
    used = sorted({int(one["summary"]["n discovery"]) for one in models})
    n = f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}"
    return (
        f"{len(models)} models: {len(planted)} with planted suppressors ({counts}; a model may be of several), "
        f"{len(nulls(models))} with nothing to be found. {said['conflicts']} conflicts from the world's part "
        f"`{said['split']}`, which trained no model; scores are of discovery's competent ones ({n}). Criteria "
        f"`{said['hash'][:12]}`, written before the first model was scored; {record['created']}, av-lens "
        f"{said['av_lens']}."
    )


def tables(models: Sequence[Summary], must: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Tabulate a bench, the parts that these models allow, by title; `must` is what the criteria ask of `isolate`."""
    found: list[tuple[str, Table]] = []
    if chosen(models, "planted"):
        found += [
            ("What was asked for", asked_table(models, must)),
            ("Every method on the planted models", methods_table(models)),
            ("AUROC by what was planted", groups_table(models, "method", ALL, "auroc", "{}")),
            ("Precision at k by what was planted", groups_table(models, "method", ALL, "precision at k", "{}")),
            ("`isolate` by what was planted", isolate_table(models)),
        ]
    if nulls(models):
        found.append(("Where nothing is to be found", nulls_table(models)))
    found += [
        ("How far donors agree", donors_table(models)),
        ("What each donor finds", groups_table(models, "donor", DONORS, "auroc", "AUROC, {}")),
        ("Named heads that not all three primary donors show", disagreements_table(models)),
        ("Model by model", models_table(models)),
    ]
    return [(title, table) for title, table in found if table[1]]


def by_group(models: Sequence[Summary]) -> dict[str, list[Summary]]:
    """The groups that some model is of, as the page calls them, each with its number of models."""
    groups = {group: chosen(models, group) for group in GROUPS}
    return {f"{SAID.get(group, group)} ({len(members)})": members for group, members in groups.items() if members}


def asked_table(models: Sequence[Summary], must: Mapping[str, Any]) -> Table:
    """Hold what the criteria ask of `isolate` against what came out."""
    planted, empty = chosen(models, "planted"), nulls(models)
    rows: list[list[str]] = []
    for figure in ("auroc", "precision at k", "kind right"):
        found = mean_over(planted, "isolate", figure)
        held = "yes" if found[0] >= must[figure] else "no"
        rows.append([figure.replace("auroc", "AUROC"), f"at least {must[figure]}", _bounded(found), held])
    named = sum(number(one["methods"]["isolate"].get("false")) > 0 for one in empty)
    most, of = (int(word) for word in str(must["nulls with a name"]).split(" of "))
    held = "yes" if empty and named * of <= most * len(empty) else "no"
    held = held if len(empty) >= of else f"{held}, of fewer than {of}"
    said = "models with nothing to be found, and a name"
    return ["`isolate`", "asked", "found", "held"], [
        *rows,
        [said, f"at most {most} of {of}", f"{named} of {len(empty)}", held],
    ]


def methods_table(models: Sequence[Summary]) -> Table:
    """Tabulate every method over all planted models."""
    planted = chosen(models, "planted")
    columns = ("auroc", "average precision", "precision at k", "precision", "recall", "kind right")
    rows: list[list[str]] = []
    for method in ALL:
        seconds = float(np.median([number(one["methods"][method]["seconds"]) for one in models]))
        rows.append([method, *(_bounded(mean_over(planted, method, column)) for column in columns), _figure(seconds)])
    names = ["AUROC", "average precision", "precision at k", "precision of the named", "recall", "kind right"]
    return ["method", *names, "s a model"], rows


def groups_table(models: Sequence[Summary], first: str, methods: Mapping[str, str], column: str, head: str) -> Table:
    """Tabulate one figure of some methods, each under a name, by group; no rows without planted models."""
    groups = by_group(models)
    rows = [
        [name, *(_bounded(mean_over(members, method, column)) for members in groups.values())]
        for name, method in methods.items()
        if groups
    ]
    return [first, *(head.format(group) for group in groups)], rows


def isolate_table(models: Sequence[Summary]) -> Table:
    """Tabulate what `isolate` gets right, by group."""
    groups = by_group(models).items()
    rows = [[group, *(_bounded(mean_over(members, "isolate", c)) for c in RIGHT.values())] for group, members in groups]
    return ["planted", *RIGHT], rows


def nulls_table(models: Sequence[Summary]) -> Table:
    """Tabulate false naming where nothing is to be found, on decoys, and with exchanged labels."""
    empty, planted = nulls(models), chosen(models, "planted")
    decoyed = [one for one in models if one["truth"]["decoys"]]
    heads = sum(one["n heads"] for one in empty)

    def row(said: str, method: str, figure: str) -> list[str]:
        by_null = [number(one["methods"][method].get(figure)) for one in empty]
        on_decoys = sum(number(one["methods"][method].get("false decoys")) for one in decoyed)
        shown = [f"{sum(n > 0 for n in by_null)} of {len(empty)}", _figure(float(np.mean(by_null)))]
        shown += [f"{sum(by_null) / heads:.4f}", f"{on_decoys:.0f}" if figure == "false" else "–"]
        return [said, *shown, _bounded(mean_over(planted, method, figure)) if planted else "–"]

    rows = [row("isolate", "isolate", "false"), row("isolate, confirmed", "isolate", "confirmed false")]
    rows += [row(method, method, "false") for method in IN_LOGITS]
    draws = [count for one in models for count in one["exchanged"]]
    label = f"isolate, labels exchanged ({len(draws)} draws, all models)"
    drawn = sum(draws) / sum(one["n heads"] * len(one["exchanged"]) for one in models)
    shown = [f"{sum(n > 0 for n in draws)} of {len(draws)} draws", _figure(float(np.mean(draws))), f"{drawn:.4f}"]
    decoys = f"of {sum(len(one['truth']['decoys']) for one in decoyed)} decoys"
    names = ["named by", "models with a name", "false names a model", "false names a head", decoys]
    return [*names, "false names a planted model"], [*rows, [label, *shown, "–", "–"]]


def donors_table(models: Sequence[Summary]) -> Table:
    """Tabulate how far every pair of donors agrees, by family of models: means over models of three figures."""
    families = {one["model"]: [one] for one in models if one["truth"]["plant"] == SUBJECT}
    families |= {"planted": planted} if (planted := chosen(models, "planted")) else {}
    names = ("rank correlation", "equal signs", "overlap")

    def cell(pair: str, family: Sequence[Summary]) -> str:
        return " / ".join(_figure(_mean(one["donors"][pair][name] for one in family)) for name in names)

    rows = [
        [pair.replace(", ", " and "), *(cell(pair, family) for family in families.values())]
        for pair in models[0]["donors"]
    ]
    heads = [f"{name}{f' ({len(found)})' if len(found) > 1 else ''}" for name, found in families.items()]
    return ["donors", *(f"{head}: {' / '.join(names)}" for head in heads)], rows


def disagreements_table(models: Sequence[Summary]) -> Table:
    """List true or named heads whose release is above delta by some primary donors and not by others."""
    primary = ("blank_muted", "mean_other", "zero")
    rows: list[list[str]] = []
    for one in models:
        named = {(row["layer"], row["head"]): row for row in one["named"]}
        truth = PlantTruth.of_dict(one["truth"])
        for head in one["heads"]:
            place = head["layer"], head["head"]
            if set(primary) <= set(head["seen by"]):
                continue
            said = named.get(place)
            words = "not named" if said is None else said["role"] + ("" if said["single"] else ", as a member")
            words += f" ({said['flags']})" if said is not None and said["flags"] else ""
            shares = [_figure(number(head["shares"][donor])) for donor in primary]
            rows.append([one["model"], f"L{place[0]}H{place[1]}", truth.kinds.get(place, "–"), *shares, words])
    return ["model", "head", "planted as", *(f"{donor}, of G" for donor in primary), "the report says"], rows


def models_table(models: Sequence[Summary]) -> Table:
    """List every model with what `isolate` says of it."""
    rows: list[list[str]] = []
    for one in models:
        truth, mine = PlantTruth.of_dict(one["truth"]), one["methods"]["isolate"]
        true = ", ".join(f"L{layer}H{head} {kind}" for (layer, head), kind in sorted(truth.kinds.items()))
        named = ", ".join(
            f"L{row['layer']}H{row['head']} {row['role']}{'' if row['confirmed'] else ' (not confirmed)'}"
            for row in one["named"]
        )
        figures = (_figure(number(mine.get(name))) for name in ("auroc", "precision at k", "kind right"))
        share = number(one["summary"]["C"]) / number(one["summary"]["G"])
        rows.append([one["model"], truth.plant, _figure(share), true or "–", named or "–", *figures])
    return ["model", "planted", "C of G", "true heads", "named", "AUROC", "precision at k", "kind right"], rows


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _bounded(found: tuple[float, float, float]) -> str:
    value, low, high = found
    return _figure(value) if math.isnan(low) else f"{value:.3f} [{low:.2f}, {high:.2f}]"


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
