"""The benchmark of replay as tables for a page and a terminal, computed from the stored record; no figure is typed."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from av_lens.lab.pages import FilledPage, Table, markdown
from av_lens.results.provenance import plain
from av_lens.whole_files import read_object

PAGE = FilledPage("benchmarks.md", "benchmarks.json", "replay")
PEERS = {"transformer_lens": "TransformerLens", "nnsight": "nnsight"}
MODES = ("encoders", "shared")
PAID_ONCE = {
    "forward": "one HuggingFace eager forward",
    "attribution": "attribution patching (approximate)",
    "first_trace": "recorded run alone, a model's first",
    "trace": "recorded run alone",
    "sweep": "recorded run and every head, exactly",
}
PEAKS = {
    "forward": "one HuggingFace eager forward",
    "attribution": "attribution patching",
    "trace": "recorded run",
    "sweep": "recorded run and every head at the generation position",
}


def store(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the record and fill the page beside it; shapes that were not measured now keep what was stored."""
    kept = Path(folder) / PAGE.record
    before = read_object(kept) if kept.exists() else {}
    both = {**before, **{name: plain(found) for name, found in record.items()}}
    return PAGE.store(folder, json.dumps(both, indent=1) + "\n", page_tables(both))


def page_tables(record: Mapping[str, Any]) -> str:
    """Write the whole record as markdown: for each shape a heading, what was measured, and its tables."""
    parts: list[str] = []
    for name, found in record.items():
        said = [f"Skipped: {found['skipped']}."] if "skipped" in found else [header_line(found)]
        parts += [f"### {name}", *said, *(markdown(table) for table in tables(found))]
    return "\n\n".join(parts)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Tabulate one shape's record: the places, what is paid once, and memory where it was measured."""
    made = {"places": places_table, "whole": whole_table, "memory": memory_table}
    return [table(found) for part, table in made.items() if part in found]


def header_line(found: Mapping[str, Any]) -> str:
    """Say what was measured, on what, how."""
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
    """Tabulate the sweeps of single heads, one row for each place."""
    head = ["patched", "rows", "plans", "ours, ms a patch"]
    for peer in PEERS.values():
        head += [f"{peer}, ms", "times", "shared, ms", "times"]
    head += ["largest gap", "largest effect", "GFLOP", "share of the bound"]
    rows: list[list[str]] = []
    for place in found["places"]:
        ours = place["seconds"] / place["plans"]
        row = [f"{place['place']} ({place['positions']})", str(place["rows"]), str(place["plans"]), _figure(ours * 1e3)]
        for times in (place["peers"].get(peer, {}) for peer in PEERS):
            for mode in MODES:
                row += [_figure(times[mode] * 1e3), f"{_figure(times[mode] / ours)}x"] if mode in times else ["–", "–"]
        row += [f"{max(place['gaps'].values()):.1e}", f"{place['largest_effect']:.1e}", _figure(place["gflop"])]
        rows.append([*row, f"{sum(place['bare'].values()) / place['seconds']:.0%}"])
    return head, rows


def whole_table(found: Mapping[str, Any]) -> Table:
    """Tabulate what is paid once, and all heads at the generation position, against one forward."""
    whole, last = found["whole"], found["places"][0]

    def row(said: str, seconds: Iterable[float]) -> list[str]:
        both = zip(seconds, MODES, strict=True)
        return [said, *(cell for s, mode in both for cell in (_figure(s), f"{s / whole['forward'][mode]:.2f}"))]

    rows = [row(said, (whole[way][mode] for mode in MODES)) for way, said in PAID_ONCE.items() if way in whole]
    rows.append(row(f"every head, exactly ({last['plans']} replays alone)", [last["seconds"]] * 2))
    return ["at the generation position", "s", "forwards", "shared, s", "forwards"], rows


def memory_table(found: Mapping[str, Any]) -> Table:
    """Tabulate peak memory above what is resident after load."""
    peaks = {kind: found["memory"][kind]["peak"] for kind in PEAKS}
    rows = [[said, _figure(peaks[kind]), f"{peaks[kind] / peaks['forward']:.2f}"] for kind, said in PEAKS.items()]
    return ["peak memory, each in a fresh process", "GB above load", "of a forward's"], rows


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
