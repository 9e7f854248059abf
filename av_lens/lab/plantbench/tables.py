"""The bench as tables: what a page and a terminal show is computed here from the judged models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from av_lens.lab.plantbench.donors import DONORS
from av_lens.lab.plantbench.methods import IN_LOGITS, METHODS
from av_lens.lab.plantbench.scores import DAMAGE_LAST
from av_lens.lab.plantbench.summary import GROUPS, KINDS, Summary, chosen, mean_over, nulls
from av_lens.lab.plantbench.truth import SUBJECT, PlantTruth
from av_lens.lab.replay_benchmark.tables import Table

ALL = ("isolate", DAMAGE_LAST, *METHODS)


def tables(models: Sequence[Summary], must: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Tabulate a bench, the parts that these models allow.

    Args:
        models: summaries.
        must: what the criteria ask of `isolate`.

    Returns:
        Title and table.
    """
    found: list[tuple[str, Table]] = []
    if chosen(models, "planted"):
        found += [
            ("What was asked for", asked_table(models, must)),
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


def asked_table(models: Sequence[Summary], must: Mapping[str, Any]) -> Table:
    """Hold what the criteria ask of `isolate` against what came out.

    Args:
        models: summaries.
        must: from the criteria.

    Returns:
        Headings and rows.
    """
    planted, empty = chosen(models, "planted"), nulls(models)
    rows: list[list[str]] = []
    for figure in ("auroc", "precision at k", "kind right"):
        found = mean_over(planted, "isolate", figure)
        rows.append([figure.replace("auroc", "AUROC"), f"at least {must[figure]}", _bounded(found)])
        rows[-1].append("yes" if found[0] >= must[figure] else "no")
    named = sum(_number(one["methods"]["isolate"].get("false")) > 0 for one in empty)
    most, of = (int(number) for number in str(must["nulls with a name"]).split(" of "))
    held = "yes" if empty and named * of <= most * len(empty) else "no"
    rows.append(["models with nothing to be found, and a name", f"at most {most} of {of}", f"{named} of {len(empty)}"])
    rows[-1].append(held if len(empty) >= of else f"{held}, of fewer than {of}")
    return ["`isolate`", "asked", "found", "held"], rows


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
    return ["method", *(f"{said_of(group)} ({len(members)})" for group, members in groups.items())], rows


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
        [f"{said_of(group)} ({len(members)})", *(_bounded(mean_over(members, "isolate", c)) for c in columns.values())]
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
    heads = sum(one["n heads"] for one in empty)

    def row(said: str, method: str, figure: str) -> list[str]:
        by_null = [_number(one["methods"][method].get(figure)) for one in empty]
        on_decoys = sum(_number(one["methods"][method].get("false decoys")) for one in decoyed)
        return [
            said,
            f"{sum(n > 0 for n in by_null)} of {len(empty)}",
            _figure(float(np.mean(by_null))),
            f"{sum(by_null) / heads:.4f}",
            f"{on_decoys:.0f}" if figure == "false" else "–",
            _bounded(mean_over(planted, method, figure)) if planted else "–",
        ]

    rows = [row("isolate", "isolate", "false"), row("isolate, confirmed", "isolate", "confirmed false")]
    rows += [row(method, method, "false") for method in IN_LOGITS]
    draws = [count for one in models for count in one["exchanged"]]
    label = f"isolate, labels exchanged ({len(draws)} draws, all models)"
    drawn = sum(draws) / sum(one["n heads"] * len(one["exchanged"]) for one in models)
    shown = [f"{sum(n > 0 for n in draws)} of {len(draws)} draws", _figure(float(np.mean(draws))), f"{drawn:.4f}"]
    rows.append([label, *shown, "–", "–"])
    decoys = sum(len(one["truth"]["decoys"]) for one in decoyed)
    return [
        "named by", "models with a name", "false names a model", "false names a head", f"of {decoys} decoys",
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
    return ["donor", *(f"AUROC, {said_of(group)} ({len(members)})" for group, members in groups.items())], rows


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


def said_of(group: str) -> str:
    """Say a group in words.

    Args:
        group: one of `GROUPS`.

    Returns:
        The words.
    """
    words = {"planted": "all planted"} | dict(
        zip(KINDS, ("with a writer", "with an opponent", "with a gate"), strict=True)
    )
    return words.get(group, group)


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
