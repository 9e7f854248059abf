"""The benchmark of replay as tables: what a page and a terminal show is computed here from the stored record.

`store` writes the record (`benchmarks.json`) and fills the page beside it (`benchmarks.md`) between two comments, so
that no figure on the page is typed by hand; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from av_lens.lab.pages import fill
from av_lens.results.provenance import plain
from av_lens.whole_files import read_object

RECORD, PAGE = "benchmarks.json", "benchmarks.md"
OPEN, CLOSE = "<!-- replay -->\n", "\n<!-- /replay -->"
PEERS = {"transformer_lens": "TransformerLens", "nnsight": "nnsight"}
Table = tuple[list[str], list[list[str]]]


def store(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the record and fill the page beside it; shapes that were not measured now keep what was stored.

    Args:
        record: from `run_benchmark`.
        folder: where `benchmarks.md` stands, with its two comments.

    Returns:
        The page.

    Raises:
        InputError: the folder has no such page.
    """
    page, kept = Path(folder) / PAGE, Path(folder) / RECORD
    before = read_object(kept) if kept.exists() else {}
    both = {**before, **{name: plain(found) for name, found in record.items()}}
    return fill(page, OPEN, CLOSE, page_tables(both), beside={RECORD: json.dumps(both, indent=1) + "\n"})


def page_tables(record: Mapping[str, Any]) -> str:
    """Write the whole record as markdown.

    Args:
        record: shape to its record.

    Returns:
        For each shape a heading, what was measured, and its tables.
    """
    parts: list[str] = []
    for name, found in record.items():
        if "skipped" in found:
            parts += [f"### {name}", f"Skipped: {found['skipped']}."]
            continue
        parts += [f"### {name}", header_line(found), *(markdown(table) for table in tables(found))]
    return "\n\n".join(parts)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Tabulate one shape's record.

    Args:
        found: one shape's record.

    Returns:
        The places, what is paid once, and memory where it was measured.
    """
    made = [places_table(found), whole_table(found)]
    return [*made, memory_table(found)] if "memory" in found else made


def header_line(found: Mapping[str, Any]) -> str:
    """Say what was measured, on what, how.

    Args:
        found: one shape's record.

    Returns:
        A paragraph.
    """
    head = found["header"]
    sizes, roles, towers = head["sizes"], head["roles"], head["towers"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    disturbed, figures = head["disturbed"], head["figures"]
    quiet = "nobody else used the machine"
    if disturbed:
        quiet = f"others used the machine during {disturbed} of {figures} figures, which are the least seen"
    where = "" if head["thorough"] else ", timed at the generation position (2 patches elsewhere, for their results)"
    return (
        f"{head['positions']} positions ({roles['audio']} audio, {roles['video']} video, {roles['question']} "
        f"question); {sizes['n_layers']} layers, d_model {sizes['d_model']}, {sizes['n_heads']} heads on "
        f"{sizes['n_kv_heads']} key-value heads of {sizes['d_head']}, MLP {sizes['d_mlp']}, vocabulary "
        f"{sizes['d_vocab']}, {head['dtype']}. Towers: audio {towers['audio']}, vision {towers['vision']}. CPU, "
        f"{head['threads']} threads; figures average over all {head['layers_averaged']} layers; medians of "
        f"{head['rounds']} rounds; {head['samples']} patches of each slow loop{where}; {quiet}. "
        f"Python {head['python']}, {versions}."
    )


def places_table(found: Mapping[str, Any]) -> Table:
    """Tabulate the sweeps of single heads, one row for each place.

    Args:
        found: one shape's record.

    Returns:
        Headings and rows.
    """
    head = ["patched", "rows", "plans", "ours, ms a patch"]
    for peer in PEERS.values():
        head += [f"{peer}, ms", "times", "shared, ms", "times"]
    head += ["largest gap", "largest effect", "GFLOP", "share of the bound"]
    rows: list[list[str]] = []
    for place in found["places"]:
        ours = place["seconds"] / place["plans"]
        row = [f"{place['place']} ({place['positions']})", str(place["rows"]), str(place["plans"]), _figure(ours * 1e3)]
        for peer in PEERS:
            times = place["peers"].get(peer, {})
            for mode in ("encoders", "shared"):
                row += [_figure(times[mode] * 1e3), f"{_figure(times[mode] / ours)}x"] if mode in times else ["–", "–"]
        gap = max(place["gaps"].values())
        row += [f"{gap:.1e}", f"{place['largest_effect']:.1e}", _figure(place["gflop"])]
        rows.append([*row, f"{sum(place['bare'].values()) / place['seconds']:.0%}"])
    return head, rows


def whole_table(found: Mapping[str, Any]) -> Table:
    """Tabulate what is paid once, and all heads at the generation position, against one forward.

    Args:
        found: one shape's record.

    Returns:
        Headings and rows.
    """
    whole, last = found["whole"], found["places"][0]
    names = {
        "forward": "one HuggingFace eager forward",
        "attribution": "attribution patching (approximate)",
        "first_trace": "recorded run alone, a model's first",
        "trace": "recorded run alone",
        "sweep": "recorded run and every head, exactly",
    }
    rows = [
        [
            name,
            *(
                cell
                for mode in ("encoders", "shared")
                for cell in (_figure(whole[way][mode]), f"{whole[way][mode] / whole['forward'][mode]:.2f}")
            ),
        ]
        for way, name in names.items()
        if way in whole
    ]
    cells = [
        cell
        for mode in ("encoders", "shared")
        for cell in (_figure(last["seconds"]), f"{last['seconds'] / whole['forward'][mode]:.2f}")
    ]
    rows.append([f"every head, exactly ({last['plans']} replays alone)", *cells])
    return ["at the generation position", "s", "forwards", "shared, s", "forwards"], rows


def memory_table(found: Mapping[str, Any]) -> Table:
    """Tabulate peak memory above what is resident after load.

    Args:
        found: one shape's record.

    Returns:
        Headings and rows.
    """
    names = {
        "forward": "one HuggingFace eager forward",
        "attribution": "attribution patching",
        "trace": "recorded run",
        "sweep": "recorded run and every head at the generation position",
    }
    peaks = found["memory"]
    rows = [
        [name, _figure(peaks[kind]["peak"]), f"{peaks[kind]['peak'] / peaks['forward']['peak']:.2f}"]
        for kind, name in names.items()
    ]
    return ["peak memory, each in a fresh process", "GB above load", "of a forward's"], rows


def markdown(table: Table) -> str:
    """Write a table as markdown.

    Args:
        table: headings and rows.

    Returns:
        The lines of a pipe table.
    """
    head, rows = table
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
