"""The bench as a page: many models' figures with their intervals, its record, its figure, its tables.

Intervals resample models (5,000 draws, percentile, 95%; NaN below 5 models), because nodes of one model are not
independent. A method without a figure for a model is averaged over the others. The scores that figures are made of are
kept beside the page, a file for each model, by node.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from av_lens.errors import InputError
from av_lens.lab.calibration import SUBJECT, PlantTruth, mask_of
from av_lens.lab.pages import FilledPage, Table, markdown
from av_lens.lab.plantbench.bench import RULES, Scored, node_name, plain_figure
from av_lens.lab.plantbench.methods import IN_LOGITS, METHODS
from av_lens.lab.plantbench.scores import DAMAGE_LAST, kinds_right, naming, place_of, ranking
from av_lens.plots.plant_bench import plant_bench_svg
from av_lens.results.statistics import DRAWS
from av_lens.whole_files import make_folder, read_object

FEWEST_MODELS = 5
GAP = 0.3  # of G: a null that has at least this gap is one with a gap
WIDE = 144  # heads of a wide base
Summary = dict[str, Any]


def number(value: float | None) -> float:
    """A stored figure: NaN where none is."""
    return math.nan if value is None else float(value)


def summary_of(entry: Mapping[str, Any]) -> Summary:
    """Judge one of `Scored.models`: its truth and each method's figures, at the s of the isolation behind them."""
    truth, runs = PlantTruth.of_dict(entry["truth"]), entry["runs"]
    shape, methods = (int(entry["n_layers"]), int(entry["n_heads"]) + 1), dict[str, dict[str, float | None]]()
    for method, by_name in entry["scores"].items():
        run = runs.get(method, runs["isolate"])
        table, true = np.array(list(by_name.values()), dtype=np.float64).reshape(shape), truth.at(run["s"])
        figures = ranking(table, true) | {name: number(value) for name, value in entry["areas"][method].items()}
        if method in RULES:
            figures |= _of_named(run["named"], true, shape) | kinds_right(run["named"], true)
            figures["screened"] = float(np.mean([not np.isnan(table[at]) for at in true.kinds] or math.nan))
        elif method in IN_LOGITS:
            figures |= naming(np.nan_to_num(table, nan=-math.inf) > run["delta"], true)
        methods[method] = {name: plain_figure(value) for name, value in figures.items()}
        methods[method]["seconds"] = float(entry["seconds"][method])
    return {**{name: entry[name] for name in ("model", "truth", "n_heads", "n_layers", "summary", "runs")}} | {
        "methods": methods
    }


def _of_named(rows: Sequence[Mapping[str, Any]], truth: PlantTruth, shape: tuple[int, int]) -> dict[str, float]:
    """Figures of who is named, of who is confirmed, and of who would be, were it not for one donor alone."""
    parts = {"": rows, "confirmed ": [r for r in rows if r["confirmed"]], "struck ": [r for r in rows if r["struck"]]}
    judged = {part: naming(mask_of([place_of(row) for row in some], shape), truth) for part, some in parts.items()}
    out = {f"{part}{name}": value for part, figures in judged.items() for name, value in figures.items()}
    out["struck true"] = float(sum(place_of(row) in truth.kinds for row in parts["struck "]))
    mlps = {at for at in truth.kinds if at[1] < 0} <= {place_of(row) for row in rows}
    return out | {"mlp alone": float(mlps and not any(row["head"] >= 0 for row in parts["confirmed "]))}


def _gapped(one: Summary) -> bool:
    return number(one["summary"]["gap"]) >= GAP * number(one["summary"]["G"])


GROUPS: Mapping[str, tuple[str, Callable[[Summary, PlantTruth], Any]]] = {
    "planted": ("all planted", lambda one, truth: True),
    "mixture": ("mixtures", lambda one, truth: "mixture" in truth.plant),
    "mlp": ("an MLP", lambda one, truth: "mlp" in truth.plant),
    "sink": ("a sink", lambda one, truth: "sink" in truth.plant),
    "wide": ("144 heads or more", lambda one, truth: one["n_layers"] * one["n_heads"] >= WIDE),
    "picture writer": ("with a writer", lambda one, truth: "picture writer" in truth.kinds.values()),
    "sound opponent": ("with an opponent", lambda one, truth: "sound opponent" in truth.kinds.values()),
    "gate": ("with a gate", lambda one, truth: "gate" in truth.kinds.values()),
    "redundant": ("redundant", lambda one, truth: truth.redundant),
    "beside a decoy": ("beside a decoy", lambda one, truth: truth.beside_a_decoy),
}
"""Groups of planted models, as the page calls them, and who is of one; a model may be of several."""
NULLS = {"null": lambda one: True, "null without a gap": lambda one: not _gapped(one), "null with a gap": _gapped}


def chosen(models: Sequence[Summary], group: str) -> list[Summary]:
    """Choose the models of one of `GROUPS` or of `NULLS`; or "short", which stand in no other group."""
    out: list[Summary] = []
    for one in models:
        truth = PlantTruth.of_dict(one["truth"])
        if truth.missing or group == "short":
            inside = bool(truth.missing) and group == "short"
        elif group in NULLS:
            inside = truth.null and NULLS[group](one)
        else:
            inside = bool(truth.at(number(one["runs"]["isolate"]["s"])).kinds) and GROUPS[group][1](one, truth)
        out += [one] if inside else []
    return out


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


PAGE, FIGURE, SCORES = FilledPage("plantbench.md", "plantbench.json", "plantbench"), "plantbench.svg", "plantbench"
ALL = (*RULES, DAMAGE_LAST, *METHODS)
COLUMNS = {
    "AUROC": "auroc",
    "average precision": "average precision",
    "precision at k": "precision at k",
    "precision of the named": "precision",
    "recall": "recall",
    "kind right": "kind right",
}
RIGHT = {
    **COLUMNS,
    "kind right, of named": "kind right of named",
    "precision, confirmed": "confirmed precision",
    "recall, confirmed": "confirmed recall",
    "screened": "screened",
}
AREAS = ("CPR, blank_muted", "CMD, blank_muted", "CPR, zero", "CMD, zero")
LINES = """import json, pathlib
models = [json.loads(file.read_text()) for file in sorted(pathlib.Path("docs/plantbench").glob("*.json"))]
planted = [(m["scores"]["AtP*"], m["true"], m["innocent"]) for m in models if m["true"] and not m["truth"]["missing"]]
wins = [[(s[a] > s[b]) + (s[a] == s[b]) / 2 for a in true for b in innocent] for s, true, innocent in planted]
print(f"{sum(sum(one) / len(one) for one in wins) / len(wins):.3f}")"""
"""A row's AUROC from the stored scores."""


def record_of(bench: Scored) -> dict[str, Any]:
    """Put a bench's record together, as plain data: `models` are its entries."""
    if not bench.models:
        raise InputError(f"{bench.folder} holds no scored model yet: give more minutes.")
    created = max(str(one["provenance"]["created"]) for one in bench.models)
    kept = {"criteria": bench.criteria, "missing": bench.missing, "models": bench.models}
    return {"schema": "av_lens.plantbench", "created": created, **kept}


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read what `store` wrote."""
    record = read_object(Path(folder) / PAGE.record)
    return record | {"models": [read_object(Path(folder) / SCORES / f"{name}.json") for name in record["models"]]}


def store(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the record, each model's scores and the figure, and fill the page beside them."""
    make_folder(Path(folder) / SCORES)
    models = {f"{SCORES}/{one['model']}.json": json.dumps(one, allow_nan=False) + "\n" for one in record["models"]}
    listed = dict(record) | {"models": [one["model"] for one in record["models"]]}
    kept = json.dumps(listed, indent=1, allow_nan=False) + "\n"
    return PAGE.store(folder, kept, page_tables(record), beside={**models, FIGURE: figure(record)})


def figure(record: Mapping[str, Any]) -> str:
    """Draw every method's AUROC by group of planted models, as an svg."""
    models = [summary_of(one) for one in record["models"]]
    groups = {group: some for group in GROUPS if (some := chosen(models, group))}
    rows = {method: {group: mean_over(some, method, "auroc") for group, some in groups.items()} for method in ALL}
    return plant_bench_svg(rows, label="AUROC")


def page_tables(record: Mapping[str, Any]) -> str:
    """Write the whole record as markdown."""
    shown = [f"### {title}\n\n{markdown(table)}" for title, table in tables(record)]
    anew = f"### Recomputed\n\nThe AUROC of AtP\\* over all planted, from the scores alone:\n\n```python\n{LINES}\n```"
    return "\n\n".join([header_line(record), *shown, anew])


def header_line(record: Mapping[str, Any]) -> str:
    """Say what was measured."""
    models, said = [summary_of(one) for one in record["models"]], record["criteria"]
    counts = ", ".join(f"{len(chosen(models, group))} {words[0]}" for group, words in [*GROUPS.items()][1:])
    used = sorted({int(one["summary"]["n discovery"]) for one in models})
    n = f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}"
    empty, gapped = (len(chosen(models, group)) for group in ("null", "null with a gap"))
    return (
        f"{len(models)} models: {len(chosen(models, 'planted'))} with planted suppressors ({counts}; a model may be of "
        f"several), {empty} with nothing to be found, {gapped} of them with a gap; {len(chosen(models, 'short'))} fell "
        f"short of what planting asks and stand apart. {said['conflicts']} conflicts from the world's part "
        f"`{said['split']}`, which trained no model; scores are of discovery's competent ones ({n}). Criteria "
        f"`{said['hash'][:12]}`, written before the first model was scored; {record['created']}, av-lens "
        f"{said['av_lens']}. Not scored: {'; '.join(record['missing']) or 'none'}."
    )


def tables(record: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Tabulate a bench, the parts that its models allow, by title."""
    models = [summary_of(one) for one in record["models"]]
    planted = chosen(models, "planted")
    methods, circuits = list[list[str]](), list[list[str]]()
    for method in ALL:
        seconds = float(np.median([number(one["methods"][method]["seconds"]) for one in models]))
        figures = [_bounded(mean_over(planted, method, column)) for column in COLUMNS.values()]
        methods.append([method, *figures, _figure(seconds)])
        circuits.append([method, *(_bounded(mean_over(planted, method, column)) for column in AREAS)])
    by_rule = [
        [rule, words, *(_bounded(mean_over(some, rule, column)) for column in RIGHT.values())]
        for group, (words, _) in GROUPS.items()
        for rule in RULES
        if (some := chosen(models, group))
    ]
    found = [
        ("What was asked for", asked_table(models, record["criteria"]["must"])),
        ("Every method on the planted models", (["method", *COLUMNS, "CPU s a model"], methods if planted else [])),
        ("CPR and CMD of every method's order of nodes", (["method", *AREAS], circuits if planted else [])),
        ("AUROC by what was planted", groups_table(models, "auroc")),
        ("Precision at k by what was planted", groups_table(models, "precision at k")),
        ("`isolate` by what was planted", (["row", "planted", *RIGHT], by_rule)),
        ("Where nothing is to be found", nulls_table(models)),
        ("What one donor alone and the question alone strike", donors_table(models)),
        ("Fell short of what planting asks", models_table(chosen(models, "short"))),
        ("Model by model", models_table([one for one in models if one not in chosen(models, "short")])),
    ]
    return [(title, table) for title, table in found if table[1]]


def asked_table(models: Sequence[Summary], must: Mapping[str, Any]) -> Table:
    """Hold what the criteria ask of `isolate` against what came out."""
    rows: list[list[str]] = []
    for asked, bar in must.items():
        method, group, column = asked.split(" | ")
        some = chosen(models, group)
        said = [method, group, column]
        if isinstance(bar, float):
            found = mean_over(some, method, column)
            rows.append([*said, f"at least {bar}", _bounded(found), "yes" if found[0] >= bar else "no"])
            continue
        most, (n, of) = bar.startswith("at most"), (int(word) for word in bar.split()[2::2])
        count = sum(number(one["methods"][method].get(column)) > 0 for one in some)
        holds = bool(some) and (count * of <= n * len(some) if most else count * of >= n * len(some))
        held = ("yes" if holds else "no") + ("" if len(some) >= of else f", of fewer than {of}")
        rows.append([*said, bar, f"{count} of {len(some)}", held])
    return ["row", "models", "figure", "asked", "found", "held"], rows


def groups_table(models: Sequence[Summary], column: str) -> Table:
    """Tabulate one figure of every method by group; no rows without planted models."""
    groups = {f"{words[0]} ({len(some)})": some for name, words in GROUPS.items() if (some := chosen(models, name))}
    rows = [[method, *(_bounded(mean_over(some, method, column)) for some in groups.values())] for method in ALL]
    return ["method", *groups], rows if groups else []


def nulls_table(models: Sequence[Summary]) -> Table:
    """Tabulate false naming where nothing is to be found, without a gap and with one, and on decoys."""
    decoyed = [one for one in models if one["truth"]["decoys"]]

    def row(said: str, method: str, part: str) -> list[str]:
        shown: list[str] = []
        for group in ("null without a gap", "null with a gap"):
            by_null = [number(one["methods"][method].get(f"{part}false")) for one in chosen(models, group)]
            mean = _figure(float(np.mean(by_null or math.nan)))
            shown += [f"{sum(n > 0 for n in by_null)} of {len(by_null)}", mean]
        on_decoys = sum(number(one["methods"][method].get(f"{part}false decoys")) for one in decoyed)
        return [
            said,
            *shown,
            f"{on_decoys:.0f}",
            _bounded(mean_over(chosen(models, "planted"), method, f"{part}false")),
        ]

    rows = [
        row(f"{rule}{said}", rule, part) for rule in RULES for said, part in (("", ""), (", confirmed", "confirmed "))
    ]
    rows += [row(method, method, "") for method in IN_LOGITS]
    decoys = f"of {sum(len(one['truth']['decoys']) for one in decoyed)} decoys"
    names = ["without a gap: named in", "false names a model", "with a gap: named in", "false names a model"]
    return ["named by", *names, decoys, "false names a planted model"], rows if chosen(models, "null") else []


def donors_table(models: Sequence[Summary]) -> Table:
    """Tabulate what the rules of one donor and of the question strike: false names, and true ones."""
    rows: list[list[str]] = []
    for rule, group in ((rule, group) for rule in RULES for group in ("planted", "null") if chosen(models, group)):
        columns = ("struck false", "confirmed false", "struck true", "confirmed named")
        some = [one["methods"][rule] for one in chosen(models, group)]
        struck, left, lost, named = (sum(number(one.get(column)) for one in some) for column in columns)
        kept = named - left
        rows.append([rule, group, *(f"{count:.0f}" for count in (struck, left, lost, kept))])
    return ["row", "models", "false names struck", "false names left", "true names lost", "other names kept"], rows


def models_table(models: Sequence[Summary]) -> Table:
    """List every model with what `isolate` says of it."""
    rows: list[list[str]] = []
    for one in models:
        truth, mine, run = PlantTruth.of_dict(one["truth"]), one["methods"]["isolate"], one["runs"]["isolate"]
        true = ", ".join(f"{node_name(at)} {kind}" for at, kind in sorted(truth.kinds.items()))
        named = ", ".join(
            f"{node_name(place_of(row))} {row['role']}{'' if row['confirmed'] else ' (not confirmed)'}"
            for row in run["named"]
        )
        figures = (_figure(number(mine.get(name))) for name in ("auroc", "precision at k", "kind right"))
        share = number(one["summary"]["C"]) / number(one["summary"]["G"])
        lacks = "; ".join(truth.missing) or ("subject" if truth.plant == SUBJECT else "–")
        rows.append([one["model"], truth.plant, _figure(share), true or "–", named or "–", *figures, lacks])
    names = ["model", "planted", "C of G", "true nodes", "named", "AUROC", "precision at k", "kind right", "lacks"]
    return names, rows


def _bounded(found: tuple[float, float, float]) -> str:
    value, low, high = found
    return _figure(value) if math.isnan(low) else f"{value:.3f} [{low:.2f}, {high:.2f}]"


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
