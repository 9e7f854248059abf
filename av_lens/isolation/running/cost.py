"""What will a run cost? Time and memory, said before the long work, from a short probe of this model on its conflicts.

The probe prices a *cell* (encode, run, read) and an *edit* (one head, replayed from the site on), per conflict; a
*figure* is the bootstrap interval of one column. How many a part takes is in `PARTS`; where that depends on what is
found (sets, cards) it is what av-tiny took, on which a slow test holds the estimate to 30%.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from av_lens.core.modes import other_precision, weights_bytes
from av_lens.errors import UnfinishedError
from av_lens.isolation.measuring.behaviour import RIGHT
from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.effects import OF_ALL, Request, edited_scores, requests
from av_lens.isolation.measuring.engine import PRIMARY_DONORS
from av_lens.isolation.measuring.store import GO_ON, Measured
from av_lens.isolation.naming.roles import ALL_NODES
from av_lens.isolation.sets.confirmation import RANDOM_SETS
from av_lens.isolation.sets.search import n_candidates
from av_lens.isolation.sets.sets import HELD_BYTES
from av_lens.results.statistics import Bootstrap
from av_lens.whole_files import stored, write_whole

ESTIMATE = "estimate.json"
MOST_PROBED = 64
# What depends on what is found, and what is no edit or cell of its own, in the prices of these: as av-tiny took it.
GRADIENT = 6
"""A backward pass through all layers, in edits (which start half way up)."""
NAMED, LARGE = 6, 0.25
"""Heads that are measured on confirmation; the share of nodes that may be large, and are measured whole."""
AGAIN, VARIED_CELLS = 12, 8
"""Cells that a half is run in again for its effects; in a variant of robustness."""
PAIR, STEPS, CLIMBS = 0.7, 6, 2
"""A pair's price in edits; steps of a climb; climbs a donor where there are pairs, less what they share."""
UNITS, EXPLAINED = 60, 74
"""Edits a layer for the larger units; cells a conflict for cards, cuts, routes, what is known, and the repair."""
VARIANTS, VARIED, BOOTSTRAPS = 6, 0.38, 1600
"""Robustness: variants that are searched again, the share of the effects that they need, figures a head of 50 draws."""
TESTS, COLUMNS = 1000, 160
"""Figures a head for its intervals and tests; for behaviour."""
HELD = 24
"""Cells of a conflict whose stacks are held at the same time."""


@dataclass(frozen=True)
class Size:
    """How much there is to do; `heads` counts MLPs too."""

    conflicts: int
    discovery: int
    confirmation: int
    heads: int
    layers: int
    sites: int = 1
    quick: bool = False
    named_only: bool = False


@dataclass(frozen=True)
class Prices:
    """Seconds for one cell and for one edit of one conflict, and for the interval of one column."""

    cell: float
    edit: float
    figure: float


@dataclass(frozen=True)
class Work:
    """What a part takes: cells and edits, each times conflicts, and figures."""

    cells: float = 0.0
    edits: float = 0.0
    figures: float = 0.0

    def seconds(self, prices: Prices) -> float:
        """Price the work."""
        return self.cells * prices.cell + self.edits * prices.edit + self.figures * prices.figure


def works(size: Size) -> dict[str, Work]:
    """List what every part takes, in the protocol's order; without what a run leaves out as asked."""
    asked, both, candidates = 2 * len(requests()), size.discovery + size.confirmation, n_candidates(size.heads)
    measured, of_all = min(size.heads, ALL_NODES), 2 * len(OF_ALL)
    every = (of_all + LARGE * (asked - of_all)) * measured * size.discovery
    named = asked * min(NAMED, size.heads) * size.confirmation
    pairs = 0 if size.quick else PAIR * candidates * (candidates - 1) / 2
    climbs = STEPS * measured * (1 if size.quick else CLIMBS)
    out = {
        "behaviour": Work(cells=len(RIGHT) * size.conflicts, figures=COLUMNS),
        "effects": Work(AGAIN * both, size.sites * (every + named), size.sites * TESTS * size.heads),
        "sets": Work(edits=len(PRIMARY_DONORS) * 2 * size.discovery * (pairs + climbs)),
        "confirmation": Work(cells=AGAIN * size.confirmation, edits=2 * RANDOM_SETS * size.confirmation),
    }
    if size.heads > ALL_NODES:
        out["screen"] = Work(edits=2 * GRADIENT * size.sites * (size.layers + 2) * size.discovery)
    if not size.named_only:
        out["units"] = Work(edits=2 * UNITS * size.layers * size.discovery)
        out["mechanisms"] = Work(cells=EXPLAINED * size.confirmation)
    if not (size.named_only or size.quick):
        out["robustness"] = Work(
            cells=VARIANTS * VARIED_CELLS * size.discovery,
            edits=VARIANTS * asked * VARIED * measured * size.discovery,
            figures=BOOTSTRAPS * size.heads,
        )
    return out


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to cost: seconds by part, and gigabytes of memory."""

    parts: dict[str, float]
    gigabytes: float

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.parts.items())
        memory = "" if np.isnan(self.gigabytes) else f", and {self.gigabytes:.1f} GB of memory"
        return f"Estimate: about {duration(self.seconds)} ({shares}){memory}, if there is something to search for."


def expected(prices: Prices, size: Size, *, gigabytes: float = float("nan")) -> Estimate:
    """Price a run."""
    return Estimate({name: work.seconds(prices) for name, work in works(size).items()}, gigabytes)


def probe(chunk: Chunk) -> Prices:
    """Time the cells of one stack, and edits of some heads."""
    n = len(chunk.examples)
    heard: list[Measured] = []
    store = chunk.bench.store
    store.told.append(heard.append)
    for cell, question in RIGHT:
        chunk.reading(cell, question)
    store.told.remove(heard.append)
    heads = chunk.bench.nodes
    chosen = [heads[i] for i in np.unique(np.linspace(0, len(heads) - 1, MOST_PROBED).round().astype(int))]
    request = Request("va", "zero")
    edited_scores(chunk, "va", [request], chosen[-1:], lambda _: None)  # records the run that edits start from
    begun = time.monotonic()
    edited_scores(chunk, "va", [request], chosen, lambda _: None)
    edit = (time.monotonic() - begun) / (len(chosen) * n)
    return Prices(sum(one.seconds for one in heard) / (len(RIGHT) * n), edit, _figure(n))


def _figure(n: int) -> float:
    columns = 64
    clips = [str(i) for i in range(n)]
    boot = Bootstrap.draw(list(range(n)), clips, clips, seed=0)
    values = np.random.default_rng(0).normal(size=(n, columns))
    begun = time.monotonic()
    boot.mean(values)
    return (time.monotonic() - begun) / columns


def memory(chunk: Chunk, size: Size) -> float:
    """Estimate the peak of memory: what has been used, and what is kept (cells, outputs, traces, other precision)."""
    n, run = len(chunk.examples), chunk.run("va")
    model, tensors = chunk.bench.engine.model, torch.Tensor
    stacked = sum(one.nbytes for one in run.inputs.tensors.values() if isinstance(one, tensors))
    held: dict[int, int] = {}
    for key, example in product(RIGHT, map(int, chunk.examples)):
        given = chunk.bench.inputs(example, *key).tensors.values()
        held |= {value.data_ptr(): value.nbytes for value in given if isinstance(value, tensors)}
    searches = 1 if size.quick or size.named_only else 1 + VARIANTS
    inputs = sum(held.values()) * (searches * size.conflicts / n - 1)
    kept = HELD * (sum(part.nbytes for part in run.parts.values()) + stacked) * (size.discovery + size.confirmation) / n
    traces = 2 * run.trace_bytes * size.discovery / n
    weights = 0 if searches == 1 else weights_bytes(model, other_precision(model.dtype))
    return peak_memory() + (inputs + kept + (traces if traces <= HELD_BYTES else run.trace_bytes) + weights) / 1e9


def peak_memory() -> float:
    """Ask for the most memory that was held: the GPU's where one was used, else the process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def estimated(chunks: Sequence[Chunk], size: Size, *, folder: Path | None, key: str) -> Estimate:
    """Estimate a run, or give the estimate that was made when its folder was begun."""
    place = None if folder is None else folder / ESTIMATE
    kept = None if place is None else stored(place, lambda found: _estimate(found, key))
    if kept is not None:
        return kept
    prices = probe(chunks[0])
    made = expected(prices, size, gigabytes=memory(chunks[0], size))
    if place is not None:
        gigabytes = None if np.isnan(made.gigabytes) else made.gigabytes
        text: dict[str, Any] = {"key": key, "prices": asdict(prices), "size": asdict(size), "seconds": made.seconds}
        text |= {"parts": made.parts, "gigabytes": gigabytes}
        write_whole(place, json.dumps(text, indent=1), error=UnfinishedError, mend=GO_ON)
    return made


def _estimate(found: dict[str, Any], key: str) -> Estimate | None:
    if found["key"] != key:
        return None
    gigabytes = float("nan") if found["gigabytes"] is None else float(found["gigabytes"])
    return Estimate({str(part): float(seconds) for part, seconds in found["parts"].items()}, gigabytes)


def duration(seconds: float) -> str:
    """Say how long something takes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
