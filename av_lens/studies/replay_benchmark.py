"""Is an exact sweep cheaper than what one does today? Replay beside its peers: same model, prompt, patches and machine.

For each shape (`replay_shapes`) and each place (generation position, question, late and early media) the z of every
head is replaced in turn by its value in a run with another sound, by each way of patching (`replay_peers`). The results
of all ways are compared. What is measured:

    seconds per patch   ours: the whole sweep's replays over their number, the recorded run not included (it is named
                        beside them); a peer: its loop over at least eight patches, spread over layers and heads
    whole               recorded run and all heads at the generation position, against one forward and attribution
    share of the bound  `replay_work`: bare products of the same row counts, over our sweep's replays
    memory              `replay_memory`: peak above what is resident after load, each in a fresh process

Every figure is the median of several rounds; ways that are compared take turns within a round. "shared" means that
everyone is given the towers' outputs. Times are this machine's; the ratios are what is claimed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from av_lens.errors import InputError
from av_lens.results.provenance import plain, stamp
from av_lens.spans import Span
from av_lens.studies.replay_memory import KINDS, fresh_peak
from av_lens.studies.replay_peers import (
    Patches,
    by_attribution,
    by_forward,
    by_nnsight,
    by_replay,
    by_transformer_lens,
    has_nnsight,
    shared_encoders,
    spread,
)
from av_lens.studies.replay_shapes import SHAPES, Case, Shape, build_case, shape_named
from av_lens.studies.replay_work import bare_seconds, flops, run_blocks, sweep_blocks, unembedding_flops

Progress = Callable[[str, int, int], None]
MODES = ("encoders", "shared")
LONG = 4.0  # seconds: what takes longer is timed once


def run_benchmark(
    shapes: Sequence[str] | None = None,
    *,
    recording: str | Path | None = None,
    threads: int = 2,
    samples: int = 8,
    repeats: int = 5,
    memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure replay beside its peers.

    Args:
        shapes: names of shapes; all of them by default.
        recording: a video with sound for the shape that needs one; without it, that shape is skipped and says so.
        threads: threads of PyTorch, set for the duration.
        samples: patches of a slow loop.
        repeats: rounds of which the median is taken.
        memory: whether to measure memory too, in fresh processes.
        progress: called with (stage, done, total).

    Returns:
        Shape to its record, plain data: "header", "whole", "places", "memory"; or "skipped" with the reason.

    Raises:
        InputError: an unknown shape, or fewer than one sample.
    """
    names = list(SHAPES) if shapes is None else list(shapes)
    chosen = [shape_named(name) for name in names]
    if samples < 1 or repeats < 1:
        raise InputError(f"samples={samples} and repeats={repeats}: both must be at least 1.")
    tell = progress or (lambda stage, done, total: None)
    found: dict[str, Any] = {}
    with _threads(threads):
        for shape in chosen:
            if shape.recording and (recording is None or not Path(recording).exists()):
                found[shape.name] = {"skipped": f"needs a recording; {recording} is not there"}
                continue
            record = measure_shape(shape, recording=recording, samples=samples, repeats=repeats, progress=tell)
            if memory:
                peaks: dict[str, Any] = {}
                for done, kind in enumerate(KINDS):
                    tell(f"{shape.name}: memory", done, len(KINDS))
                    peaks[kind] = fresh_peak(shape.name, kind, recording=recording, threads=threads)
                tell(f"{shape.name}: memory", len(KINDS), len(KINDS))
                record["memory"] = peaks
            found[shape.name] = record
    return plain(found)


def measure_shape(
    shape: Shape,
    *,
    recording: str | Path | None = None,
    samples: int = 8,
    repeats: int = 5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one shape, in this process and with the threads that are set.

    Args:
        shape: the shape.
        recording: the file that a shape with a recording takes its prompt from.
        samples: patches of a slow loop.
        repeats: rounds of which the median is taken.
        progress: called with (stage, done, total).

    Returns:
        "header", "whole" and "places".
    """
    tell = progress or (lambda stage, done, total: None)
    case = build_case(shape, recording=recording)
    places = case.places()
    tell(shape.name, 0, len(places) + 1)
    whole = measure_whole(case, Patches.at(case, places["generation"]), repeats)
    trace = case.model.trace(case.x)
    records: list[dict[str, Any]] = []
    for number, (name, place) in enumerate(places.items()):
        tell(shape.name, number + 1, len(places) + 1)
        modes = MODES if shape.thorough or name == "generation" else MODES[1:]
        stride = shape.stride if name.startswith("first") else 1
        found = measure_place(case, place, trace, modes=modes, stride=stride, samples=samples, repeats=repeats)
        records.append({"place": name, **found})
    tell(shape.name, len(places) + 1, len(places) + 1)
    return {"header": _header(case, samples, repeats), "whole": whole, "places": records}


def measure_whole(case: Case, patches: Patches, repeats: int) -> dict[str, Any]:
    """Time what is paid once: a forward, attribution, our recorded run, and it with all heads after it.

    Args:
        case: the model and its prompts.
        patches: of the generation position.
        repeats: rounds.

    Returns:
        For each way seconds with "encoders" and "shared", and the work and bare seconds of the recorded run.
    """
    heads = patches.heads()
    ways: dict[str, Callable[[], Any]] = {
        "forward": lambda: by_forward(case),
        "attribution": lambda: by_attribution(patches),
        "trace": lambda: case.model.trace(case.x),
        "sweep": lambda: by_replay(patches, heads, case.model.trace(case.x)),
    }
    found: dict[str, Any] = {name: {} for name in ways}
    for mode in MODES:
        with _mode(case, mode):
            for name, seconds in in_turns(ways, repeats).items():
                found[name][mode] = seconds
    spec, n = case.model.spec, len(case.x.spans)
    blocks = run_blocks(n_layers=spec.n_layers, n=n)
    found["run_gflop"] = flops(blocks, spec) / 1e9
    found["run_bare"] = bare_seconds(blocks, spec, case.model.dtype, repeats=repeats)
    return found


def measure_place(
    case: Case, place: Span, trace: Any, *, modes: Sequence[str], stride: int, samples: int, repeats: int
) -> dict[str, Any]:
    """Patch every head at one place, by us and by the peers, and compare results and times.

    Args:
        case: the model and its prompts.
        place: the positions that are patched together.
        trace: the recorded run of the prompt.
        modes: whether the peers run their towers ("encoders"), are given their outputs ("shared"), or both.
        stride: every so manyth head is patched by us.
        samples: patches of the peers.
        repeats: rounds of ours.

    Returns:
        Counts, seconds per patch, the largest differences, work and bare seconds.
    """
    patches = Patches.at(case, place)
    heads = patches.heads(stride=stride)
    chosen = spread(heads, samples)
    sampled = [heads[number] for number in chosen]
    seconds, values = repeated(lambda: by_replay(patches, heads, trace), repeats)
    loops: dict[str, Callable[..., torch.Tensor]] = {"transformer_lens": by_transformer_lens}
    if has_nnsight():
        loops["nnsight"] = by_nnsight
    peers: dict[str, dict[str, float]] = {name: {} for name in loops}
    gaps: dict[str, float] = {}
    for mode in modes:
        with _mode(case, mode):
            for name, loop in loops.items():
                loop(patches, sampled[:1])
                begun = time.perf_counter()
                theirs = loop(patches, sampled)
                peers[name][mode] = (time.perf_counter() - begun) / len(sampled)
                gap = float((values[chosen].double() - theirs.double()).abs().max())
                gaps[name] = max(gap, gaps.get(name, 0.0))
    spec, n = case.model.spec, len(case.x.spans)
    blocks = sweep_blocks(heads, patches.rows, n_layers=spec.n_layers, n=n)
    baseline = float(by_forward(case))
    return {
        "positions": len(patches.rows),
        "rows": n - patches.rows[0],
        "plans": len(heads),
        "sampled": len(sampled),
        "seconds": seconds,
        "peers": peers,
        "gaps": gaps,
        "largest_effect": float((values.double() - baseline).abs().max()),
        "gflop": (flops(blocks, spec) + unembedding_flops(len(heads), spec)) / 1e9,
        "bare": bare_seconds(blocks, spec, case.model.dtype, repeats=repeats),
    }


def in_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Time several ways, one after another in each round, after one round that is not counted.

    Args:
        ways: name to what is done.
        repeats: rounds.

    Returns:
        Name to the median of its seconds.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, work in ways.items():
            begun = time.perf_counter()
            work()
            if number:
                found[name].append(time.perf_counter() - begun)
    return {name: median(seconds) for name, seconds in found.items()}


def repeated(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Time one thing several times; what takes long, once.

    Args:
        work: what is done.
        repeats: how often, after one time that is not counted.

    Returns:
        The median of the seconds, and what the work returned.
    """
    begun = time.perf_counter()
    value = work()
    first = time.perf_counter() - begun
    if first > LONG:
        return first, value
    return in_turns({"work": work}, repeats)["work"], value


@contextmanager
def _threads(count: int) -> Generator[None, None, None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mode(case: Case, mode: str) -> Any:
    return shared_encoders(case) if mode == "shared" else nullcontext()


def _header(case: Case, samples: int, repeats: int) -> dict[str, Any]:
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
        rounds=repeats,
    )
    made["versions"]["nnsight"] = metadata.version("nnsight") if has_nnsight() else "not installed"
    return made
