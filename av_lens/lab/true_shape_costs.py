"""What would an isolation cost at full depth on a GPU? Worked out from a run at true shapes, not measured.

A stage's operations grow with conflicts, with a layer's weights and with what it does (`GROWTH`); an edited run costs
as many layers as come after its first edit on average. Operations are divided by the card's dense bfloat16 peak times
the share of this machine's own peak (one large product) that the stage reached here. Memory is that of the weights and
of one conflict's recorded run. The processor's work on the CPU is left out; towers are taken to grow as layers do.

Sources of the peaks: the vendors' data sheets (dense, without sparsity).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from av_lens.isolation.sets.search import n_candidates
from av_lens.lab.pages import markdown
from av_lens.lab.true_shapes import RECORD, SIZES, Sizes
from av_lens.whole_files import write_whole

RUNS, SETS = "layers", "layers after"
HEADS, CANDIDATES, UNITS = "heads x layers after", "candidates x layers after", "layers x layers after"
GROWTH = {
    "reading every cell": RUNS,
    "the same edits under the control question": HEADS,
    "exact effects": HEADS,
    "robustness": HEADS,
    "sets of heads": CANDIDATES,
    "groups, MLPs": UNITS,
    "attention by role": RUNS,
    "what heads write": RUNS,
    "routes": RUNS,
    "logit lens": RUNS,
    "probes": RUNS,
}
"""What a stage's operations grow with, by its name's beginning (the first that fits); a stage of another name edits
a bounded number of sets and grows with the layers after them alone. Pairs of candidates grow with their number's square
and are counted by the number: fewer are tried at full depth (40) than in a shallow model (all), so this errs upwards.
"""
OTHER_PRECISION = "robustness: precision float32"
PAGE = "true_shapes.md"
FIGURES = {
    "pflop": ("PFLOP", 0),
    "minutes": ("minutes", 0),
    "minutes_of_robustness": ("of them robustness", 0),
    "weights_gb": ("weights (GB)", 1),
    "left_gb": ("left beside them (GB)", 1),
    "copy_gb": ("their copy in float32 (GB)", 1),
    "trace_gb": ("one recorded run (GB)", 2),
}
"""What `worked_out` gives, as the page calls it, with its decimal places."""


class Card(NamedTuple):
    """A GPU: its name, its memory in GB, and its dense bfloat16 peak in TFLOP/s as its vendor states it."""

    name: str
    memory_gb: float
    peak_tflops: float


CARDS = (Card("24 GB (RTX 4090)", 24, 165.2), Card("80 GB (A100)", 80, 312.0))


def worked_out(record: Mapping[str, Any], card: Card, sizes: Sizes, *, conflicts: int = 120) -> dict[str, float]:
    """Work out `FIGURES` at full depth; where a second copy in float32 does not fit, that precision is not counted."""
    measured = SIZES[record["size"]]
    few, all_layers = record["layers"]["fusion"], sizes.n_layers
    width = sizes.layer_weights / measured.layer_weights
    layers, later = all_layers / few, (all_layers + 1) / (few + 1)
    heads, heads_here = all_layers * sizes.n_heads, few * measured.n_heads
    growth = {
        RUNS: layers,
        SETS: later,
        UNITS: later * layers,
        HEADS: later * heads / heads_here,
        CANDIDATES: later * n_candidates(heads) / n_candidates(heads_here),
    }
    share_of_conflicts = conflicts / record["conflicts"]
    weights_gb = 2 * sizes.weights / 1e9
    left_gb = card.memory_gb - weights_gb
    seconds = robustness = pflop = 0.0
    for stage, row in record["stages"].items():
        if stage == OTHER_PRECISION and 2 * weights_gb > left_gb:
            continue
        gflop = row["gflop"] * width * growth[grows_with(stage, heads_here)] * share_of_conflicts
        pflop += gflop / 1e6
        if (share := reached(row, record)) > 0:
            here = gflop / (card.peak_tflops * 1e3 * min(1.0, share))
            seconds += here
            robustness += here * stage.startswith("robustness")
    positions = sum(record["roles"].values())
    per_position = sizes.n_layers * (sizes.d_model + 2 * sizes.n_kv_heads * (sizes.d_model // sizes.n_heads)) * 2
    return {
        "minutes": seconds / 60,
        "minutes_of_robustness": robustness / 60,
        "pflop": pflop,
        "weights_gb": weights_gb,
        "trace_gb": positions * per_position / 1e9,
        "left_gb": left_gb,
        "copy_gb": 2 * weights_gb,
    }


def reached(row: Mapping[str, float], record: Mapping[str, Any]) -> float:
    """The share of this machine's own peak that a stage reached."""
    return row["gflop"] / row["seconds"] / record["product_gflops"] if row["seconds"] > 0 else 0.0


def grows_with(stage: str, heads: int) -> str:
    """Say what a stage's operations grow with; on confirmation only the heads named on discovery are measured."""
    asked = re.match(r"exact effects of (\d+) (?:nodes|heads)", stage)
    if asked and int(asked[1]) < heads:
        return SETS
    return next((kind for begins, kind in GROWTH.items() if stage.startswith(begins)), SETS)


def page(record: Mapping[str, Any]) -> str:
    """Write the docs page of a run, from `run_at_true_shapes`."""
    layers, seconds = record["layers"], record["seconds"]
    searched = "without robustness and pairs" if record["quick"] else "the whole protocol"
    sizes = SIZES[record["size"]]
    heads, deep = layers["fusion"] * sizes.n_heads, sizes.n_layers * sizes.n_heads
    said = [
        "# At true shapes",
        "`av-lens true-shapes CLIP --out DIR --docs docs` writes this page and `true_shapes.json` beside it.",
        f"A thinker of the {record['size']}'s true widths with random weights, {layers['fusion']} fusion layers and "
        f"{layers['towers']} layers of each tower, bfloat16, {record['threads']} threads, was searched "
        f'(`gate="report"`, {searched}) on {record["conflicts"]} conflicts cut from disjoint windows of a recording, '
        f"with synthesised sounds; prompts of {sum(record['roles'].values())} positions "
        f"({record['roles'].get('video', 0)} video, {record['roles'].get('audio', 0)} audio). Random weights do not "
        f"hear; the record is stamped {', '.join(record['stamps'])}.",
        f"Search: {seconds['search']:.0f} s, peak memory {record['peak_gb']:.1f} GB. Towers at full depth, one clip: "
        f"audio {seconds['towers']['audio']:.2f} s, vision {seconds['towers']['vision']:.2f} s.",
        "*Grows with*: what a stage's operations are multiplied by for a whole checkpoint. *Layers after* are those "
        "that come after an edit, on average; *candidates* the heads that the search for sets tries, "
        f"{n_candidates(heads)} here and {n_candidates(deep)} at full depth.",
    ]
    head = ["stage", "seconds", "TFLOP", "share of this machine's peak", "grows with"]
    rows: list[list[str]] = []
    for stage, row in record["stages"].items():
        share = reached(row, record)
        grows = grows_with(stage, heads) if round(share, 2) else "no operations to speak of"
        rows.append([stage, f"{row['seconds']:.0f}", f"{row['gflop'] / 1e3:.1f}", f"{share:.2f}", grows])
    said += [
        markdown((head, rows), left=(0, 4)),
        f"## Worked out for whole checkpoints, 120 conflicts, {searched}",
        "Not measured: every stage's operations, grown to full depth, at the share of the peak that it reached here. "
        "Where a second copy of the weights does not fit, the other precision is not tried, and is not counted.",
    ]
    both = [(sizes, card) for sizes in SIZES.values() for card in CARDS]
    costs = [worked_out(record, card, sizes) for sizes, card in both]
    head = ["", *(f"{sizes.name}, {card.name}" for sizes, card in both)]
    rows = [[words, *(f"{cost[name]:.{digits}f}" for cost in costs)] for name, (words, digits) in FIGURES.items()]
    return "\n\n".join([*said, markdown((head, rows))]) + "\n"


def fits(n_pos: int = 3258) -> str:
    """Write the table of what weights and one recorded run take, in GB, by precision; layers alone are quantised."""
    rows: list[list[str]] = []
    for sizes in SIZES.values():
        layers = sizes.n_layers * sizes.layer_weights
        rest = 2 * (sizes.weights - layers)  # in bfloat16
        d_head = sizes.d_model // sizes.n_heads
        kept = (sizes.n_layers + 1) * sizes.d_model + 2 * (sizes.n_layers * sizes.n_kv_heads + 1) * d_head
        # 4 bits: half a byte, and a float32 scale for 64 of them
        taken = (4 * sizes.weights, 2 * sizes.weights, layers + rest, layers * (0.5 + 4 / 64) + rest)
        traces = [n_pos * kept * itemsize for itemsize in (4, 2)]
        rows.append([sizes.name, *(f"{one / 1e9:.1f}" for one in taken), *(f"{one / 1e9:.2f}" for one in traces)])
    head = ["", "float32", "bfloat16", "8 bits", "4 bits", "a run in float32", "a run in bfloat16"]
    return markdown((head, rows))


def store(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the page and its record."""
    write_whole(Path(folder) / RECORD, json.dumps(record, indent=1) + "\n")
    write_whole(Path(folder) / PAGE, page(record))
    return Path(folder) / PAGE
