"""The bench as a page: many models' figures with their intervals, its record, its figure, its tables.

Intervals resample models (5,000 draws, percentile, 95%; NaN below 5 models), because heads of one model are not
independent. A method without a figure for a model is averaged over the others. Donors are compared in pairs: rank
correlation of mean releases, equal signs among heads above 1% of G by either, and Jaccard of the heads above delta.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from av_lens.errors import InputError
from av_lens.isolation.explaining.robustness import rank_correlation
from av_lens.lab.calibration import SUBJECT, PlantTruth, mask_of
from av_lens.lab.pages import FilledPage, Table, markdown
from av_lens.lab.plantbench.bench import Scored, plain_figure
from av_lens.lab.plantbench.methods import IN_LOGITS, METHODS
from av_lens.lab.plantbench.scores import DAMAGE_LAST, HeadTable, kinds_right, naming, place_of, ranking
from av_lens.plots.plant_bench import plant_bench_svg
from av_lens.results.statistics import DRAWS

FEWEST_MODELS = 5
MATTERS = 0.01
Summary = dict[str, Any]
KINDS = ("picture writer", "sound opponent", "gate")
GROUPS = ("planted", *KINDS, "redundant", "beside a decoy")
DONORS: Mapping[str, str] = {
    "blank_muted": "release, blank_muted",
    "mean_other": "release, mean_other",
    "zero": "zero ablation",
    "mean_task": "mean ablation",
    "blank_a": "exact patching, blank picture",
    "audio_only": "exact patching, audio alone",
}
"""Donor to the bench's method that replaces z by it."""


def number(value: float | None) -> float:
    """A stored figure: NaN where none is."""
    return math.nan if value is None else float(value)


def _plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: plain_figure(value) for name, value in figures.items()}


def summary_of(entry: Mapping[str, Any]) -> Summary:
    """Judge one of `Scored.models`: its truth, each method's figures, who was named, how the donors agree."""
    truth = PlantTruth.of_dict(entry["truth"])
    scores = {name: np.array(rows, dtype=np.float64) for name, rows in entry["scores"].items()}
    g, delta = (number(entry["summary"][name]) for name in ("G", "delta"))
    shape, named = (int(entry["n_layers"]), int(entry["n_heads"])), list(entry["named"])
    methods: dict[str, dict[str, float | None]] = {}
    for method, table in scores.items():
        figures = ranking(table, truth)
        if method == "isolate":
            figures |= naming(mask_of([place_of(row) for row in named], shape), truth) | kinds_right(named, truth)
            held = naming(mask_of([place_of(row) for row in named if row["confirmed"]], shape), truth)
            figures |= {f"confirmed {name}": held[name] for name in ("named", "false", "precision", "recall")}
        elif method in IN_LOGITS:
            figures |= naming(np.nan_to_num(table, nan=-math.inf) > delta, truth)
        methods[method] = _plain(figures | {"seconds": float(entry["seconds"][method])})
    by_donor = {donor: scores[method] for donor, method in DONORS.items()}
    agree = agreement(by_donor, g=g, delta=delta)
    heads: list[dict[str, Any]] = []
    for head in sorted({*truth.kinds, *(place_of(row) for row in named)}):
        shares = _plain({donor: float(table[head]) / g for donor, table in by_donor.items()})
        seen = seen_by(by_donor, head, delta=delta)
        heads.append({"layer": head[0], "head": head[1], "shares": shares, "seen by": seen})
    kept = {name: entry[name] for name in ("truth", "summary", "verdict_kind", "stamps", "named", "exchanged")}
    about = {"model": entry["model"], "n heads": shape[0] * shape[1], **kept, "named": named}
    donors = {pair: _plain(figures) for pair, figures in agree.items()}
    return {**about, "methods": methods, "donors": donors, "heads": heads}


def agreement(tables: Mapping[str, HeadTable], *, g: float, delta: float) -> dict[str, dict[str, float]]:
    """Compare every pair of donors' mean releases: "one, other" to `rank correlation`, `equal signs`, `overlap`."""
    out: dict[str, dict[str, float]] = {}
    for one, other in itertools.combinations(tables, 2):
        first, second = tables[one].ravel(), tables[other].ravel()
        known = ~(np.isnan(first) | np.isnan(second))
        first, second = first[known], second[known]
        matters = np.maximum(abs(first), abs(second)) > MATTERS * g
        large, also = first > delta, second > delta
        either = int((large | also).sum())
        out[f"{one}, {other}"] = {
            "rank correlation": rank_correlation(first, second),
            "equal signs": float((np.sign(first) == np.sign(second))[matters].mean()) if matters.any() else math.nan,
            "overlap": float((large & also).sum() / either) if either else math.nan,
        }
    return out


def seen_by(tables: Mapping[str, HeadTable], head: tuple[int, int], *, delta: float) -> list[str]:
    """List the donors by which a head's mean release is above delta."""
    return [name for name, table in tables.items() if table[head] > delta]


def chosen(models: Sequence[Summary], group: str) -> list[Summary]:
    """Choose the planted models of one of `GROUPS`; a model may be of several."""
    truths = [PlantTruth.of_dict(one["truth"]) for one in models]
    asked = {"redundant": "redundant", "beside a decoy": "beside_a_decoy", "planted": "kinds"}.get(group)
    inside = [getattr(truth, asked) if asked else group in truth.kinds.values() for truth in truths]
    return [one for one, chosen in zip(models, inside, strict=True) if chosen]


def nulls(models: Sequence[Summary]) -> list[Summary]:
    """Choose the models in which nothing is to be found: balanced ones and those with decoys alone."""
    return [one for one in models if PlantTruth.of_dict(one["truth"]).null]


def mean_over(models: Sequence[Summary], method: str, figure: str, *, seed: int = 0) -> tuple[float, float, float]:
    """Average a method's figure over models: mean and 95% interval; NaN where there is none, or below 5 models."""
    values = np.array([number(one["methods"].get(method, {}).get(figure)) for one in models], dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) < FEWEST_MODELS:
        return float(values.mean()) if len(values) else math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


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
        right = [
            [group, *(_bounded(mean_over(members, "isolate", figure)) for figure in RIGHT.values())]
            for group, members in by_group(models).items()
        ]
        found += [
            ("What was asked for", asked_table(models, must)),
            ("Every method on the planted models", methods_table(models)),
            ("AUROC by what was planted", groups_table(models, "method", ALL, "auroc", "{}")),
            ("Precision at k by what was planted", groups_table(models, "method", ALL, "precision at k", "{}")),
            ("`isolate` by what was planted", (["planted", *RIGHT], right)),
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
    rows.append([said, f"at most {most} of {of}", f"{named} of {len(empty)}", held])
    return ["`isolate`", "asked", "found", "held"], rows


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
