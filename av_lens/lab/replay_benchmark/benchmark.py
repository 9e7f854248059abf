"""Is an exact sweep cheaper than what one does today? Replay beside its peers: same model, prompt, patches and machine.

Every figure is the median of rounds in which the machine did nothing else; ways that are compared take turns within a
round. What the figures mean stands on the page that they fill (`docs/benchmarks.md`).
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from av_lens.core.budget import Progress, silent
from av_lens.errors import InputError
from av_lens.lab.replay_benchmark import peers
from av_lens.lab.replay_benchmark import shapes as shaping
from av_lens.lab.replay_benchmark.peers import Head, Loop, Patches, has_nnsight
from av_lens.lab.replay_benchmark.shapes import SHAPES, Case, Shape, Stopwatch
from av_lens.lab.replay_benchmark.tables import MODES, PEAKS
from av_lens.results.provenance import plain, stamp
from av_lens.spans import Span


def run_benchmark(
    shapes: Sequence[str] | None = None,
    *,
    recording: str | Path | None = None,
    threads: int = 2,
    samples: int = 8,
    rounds: int = 5,
    patience: float = 60.0,
    memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure replay beside its peers."""
    names = list(SHAPES) if shapes is None else list(shapes)
    chosen = [shaping.shape_named(name) for name in names]
    if samples < 1 or rounds < 1:
        raise InputError(f"samples={samples} and rounds={rounds}: both must be at least 1.")
    tell = progress or silent
    found: dict[str, Any] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in chosen:
            if shape.recording and (recording is None or not Path(recording).exists()):
                found[shape.name] = {"skipped": f"needs a recording; {recording} is not there"}
                continue
            watch = Stopwatch(rounds, patience)
            record = measure_shape(shape, watch, recording=recording, samples=samples, progress=tell)
            if memory:
                record["memory"] = _peaks(shape, recording, threads, rounds, tell)
            found[shape.name] = record
    finally:
        torch.set_num_threads(before)
    return plain(found)


def measure_shape(
    shape: Shape,
    watch: Stopwatch,
    *,
    recording: str | Path | None = None,
    samples: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one shape, in this process and with the threads that are set: "header", "whole" and "places"."""
    tell = progress or silent
    case = shaping.build_case(shape, recording=recording)
    places = case.places()
    tell(shape.name, 0, len(places) + 1)
    whole = measure_whole(case, Patches.at(case, places["generation"]), watch)
    trace = case.model.trace(case.x)
    records: list[dict[str, Any]] = []
    for number, (name, place) in enumerate(places.items()):
        tell(shape.name, number + 1, len(places) + 1)
        modes = MODES if shape.thorough or not records else ()
        stride = shape.stride if name.startswith("first") else 1
        found = measure_place(case, place, trace, watch, modes=modes, stride=stride, samples=samples)
        if not modes:
            found["peers"] = records[0]["peers"]
        records.append({"place": name, **found})
    tell(shape.name, len(places) + 1, len(places) + 1)
    return {"header": _header(case, samples, watch), "whole": whole, "places": records}


def measure_whole(case: Case, patches: Patches, watch: Stopwatch) -> dict[str, Any]:
    """Time a forward, attribution, our recorded run, and it with all heads after it; and the run's bare work."""
    works = peers.ways(patches)
    found: dict[str, Any] = {name: {} for name in works}
    for mode in MODES:
        with peers.towers_of(case, mode):
            for name, seconds in watch.in_turns(works).items():
                found[name][mode] = seconds
    spec, n = case.model.spec, len(case.x.spans)
    blocks = shaping.run_blocks(n_layers=spec.n_layers, n=n)
    found["run_gflop"] = shaping.flops(blocks, spec) / 1e9
    found["run_bare"] = shaping.bare_seconds(blocks, spec, case.model.dtype, watch.brief)
    return found


def measure_place(
    case: Case, place: Span, trace: Any, watch: Stopwatch, *, modes: Sequence[str], stride: int, samples: int
) -> dict[str, Any]:
    """Patch every `stride`th head at one place, `samples` of them by each peer, and compare results and times.

    Peers run their towers ("encoders") or get the outputs ("shared"); without `modes` none is timed.
    """
    patches = Patches.at(case, place)
    heads = patches.heads(stride=stride)
    chosen = peers.spread(heads, samples if modes else 2)
    sampled = [heads[number] for number in chosen]
    values = peers.by_replay(patches, heads, trace)
    seconds = watch.time(lambda: peers.by_replay(patches, heads, trace))
    loops = {"transformer_lens": peers.by_transformer_lens(patches)}
    if has_nnsight():
        loops["nnsight"] = peers.by_nnsight(patches)
    timed: dict[str, dict[str, float]] = {name: {} for name in loops}
    gaps: dict[str, float] = dict.fromkeys(loops, 0.0)
    for mode in modes or MODES[1:]:
        with peers.towers_of(case, mode):
            for name, loop in loops.items():
                theirs: dict[Head, torch.Tensor] = {}
                works = [partial(_keep, loop, head, theirs) for head in sampled]
                if modes:
                    timed[name][mode] = watch.each(works)
                else:
                    for work in works:
                        work()
                gap = float((values[chosen].double() - torch.stack([*theirs.values()]).double()).abs().max())
                gaps[name] = max(gap, gaps[name])
    spec, n = case.model.spec, len(case.x.spans)
    blocks = shaping.sweep_blocks(heads, patches.rows, n_layers=spec.n_layers, n=n)
    baseline = float(peers.by_forward(case))
    return {
        "positions": len(patches.rows),
        "rows": n - patches.rows[0],
        "plans": len(heads),
        "sampled": len(sampled),
        "seconds": seconds,
        "peers": timed,
        "gaps": gaps,
        "largest_effect": float((values.double() - baseline).abs().max()),
        "gflop": (shaping.flops(blocks, spec) + shaping.unembedding_flops(len(heads), spec)) / 1e9,
        "bare": shaping.bare_seconds(blocks, spec, case.model.dtype, watch.brief),
    }


def _keep(loop: Loop, head: Head, found: dict[Head, torch.Tensor]) -> None:
    found[head] = loop([head])[0]


def _peaks(shape: Shape, recording: str | Path | None, threads: int, rounds: int, tell: Progress) -> dict[str, Any]:
    """Peak memory of each thing: the median of several fresh processes."""
    found: dict[str, Any] = {}
    for done, kind in enumerate(PEAKS):
        tell(f"{shape.name}: memory", done, len(PEAKS))
        several = [
            peers.fresh_peak(shape.name, kind, recording=recording, threads=threads) for _ in range(min(rounds, 3))
        ]
        found[kind] = {name: median(one[name] for one in several) for name in ("resident", "peak")}
    tell(f"{shape.name}: memory", len(PEAKS), len(PEAKS))
    return found


def _header(case: Case, samples: int, watch: Stopwatch) -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    spec, config, spans = case.model.spec, case.hf_model.config, case.x.spans
    made = stamp(
        shape=case.shape.name,
        sizes=asdict(spec),
        dtype=str(case.model.dtype).removeprefix("torch."),
        towers={
            "audio": f"{config.audio_config.encoder_layers} layers of {config.audio_config.d_model}",
            "vision": f"{config.vision_config.depth} layers of {config.vision_config.hidden_size}",
        },
        positions=len(spans),
        roles={role: len(spans[role]) for role in ("audio", "video", "question")},
        threads=torch.get_num_threads(),
        layers_averaged=spec.n_layers,
        samples=samples,
        thorough=case.shape.thorough,
        rounds=watch.rounds,
        **watch.account(),
    )
    made["versions"]["nnsight"] = metadata.version("nnsight") if has_nnsight() else "not installed"
    return made
