"""The bench as a page: its record (`plantbench.json`), its figure (`plantbench.svg`), its tables between two comments.

`store` writes the record (every model's judged figures) and the figure, and fills `plantbench.md` beside them, so that
no figure on the page is typed by hand; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from av_lens.errors import InputError
from av_lens.lab.pages import fill
from av_lens.lab.plantbench.bench import Scored
from av_lens.lab.plantbench.summary import GROUPS, chosen, mean_over, nulls, summary_of
from av_lens.lab.plantbench.tables import ALL, said_of, tables
from av_lens.lab.replay_benchmark.tables import markdown
from av_lens.plots.plant_bench import plant_bench_svg

RECORD, PAGE, FIGURE = "plantbench.json", "plantbench.md", "plantbench.svg"
OPEN, CLOSE = "<!-- plantbench -->\n", "\n<!-- /plantbench -->"


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
    stored = json.dumps(record, indent=None, separators=(",", ":"), allow_nan=False) + "\n"
    beside = {RECORD: stored, FIGURE: figure(record)}
    return fill(Path(folder) / PAGE, OPEN, CLOSE, page_tables(record), beside=beside)


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
    for title, table in tables(models, record["criteria"]["must"]):
        parts += [f"### {title}", markdown(table)]
    return "\n\n".join(parts)


def header_line(record: Mapping[str, Any]) -> str:
    """Say what was measured.

    Args:
        record: the bench's record.

    Returns:
        A paragraph.
    """
    models, said = record["models"], record["criteria"]
    planted = chosen(models, "planted")
    counts = ", ".join(f"{len(chosen(models, group))} {said_of(group)}" for group in GROUPS[1:])
    used = sorted({int(one["summary"]["n discovery"]) for one in models})
    n = f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}"
    return (
        f"{len(models)} models: {len(planted)} with planted suppressors ({counts}; a model may be of several), "
        f"{len(nulls(models))} with nothing to be found. {said['conflicts']} conflicts from the world's part "
        f"`{said['split']}`, which trained no model; scores are of discovery's competent ones ({n}). Criteria "
        f"`{said['hash'][:12]}`, written before the first model was scored; {record['created']}, av-lens "
        f"{said['av_lens']}."
    )
