"""How much memory does a sweep take, beside one plain forward? Each measured in a fresh process.

A process builds the case, gives freed memory back to the system, notes what is resident, resets the kernel's record of
the peak, does one thing, and reads the peak: `peak - resident after load`. Linux only (`/proc/self`).

The things: "forward" (HuggingFace, eager), "attribution" (one forward and one backward), "trace" (our recorded run)
and "sweep" (the recorded run, then every head at the generation position). What patches write is drawn at random, so
that no other run warms the process up.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from av_lens.errors import AvLensError
from av_lens.lab.replay_benchmark.peers import Patches, ways
from av_lens.lab.replay_benchmark.shapes import Case, build_case, shape_named
from av_lens.lab.replay_benchmark.tables import PEAKS

KINDS = tuple(PEAKS)
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def fresh_peak(shape: str, kind: str, *, recording: str | Path | None = None, threads: int = 2) -> dict[str, float]:
    """Measure one of `KINDS` in a process of its own: "resident" after load and "peak" above it, in GB (1e9 bytes).

    NaN where the system has no such record.
    """
    if not _RESET.exists():
        return {"resident": float("nan"), "peak": float("nan")}
    code = "import sys; from av_lens.lab.replay_benchmark.memory import report; report(*sys.argv[1:])"
    words = [shape, kind, str(recording or ""), str(threads)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AvLensError(f"measuring the memory of {kind} on shape {shape!r} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(shape: str, kind: str, recording: str, threads: str) -> None:
    """Measure in this process and write the result to standard output: what `fresh_peak` starts."""
    torch.set_num_threads(int(threads))
    case = build_case(shape_named(shape), recording=recording or None)
    resident, peak = peak_of(_work(case, kind))
    sys.stdout.write(json.dumps({"resident": resident / 1e9, "peak": (peak - resident) / 1e9}) + "\n")


def peak_of(work: Callable[[], Any]) -> tuple[int, int]:
    """Do something and read the bytes resident before, and at the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    resident = _status("VmRSS")
    _RESET.write_text("5")
    work()
    return resident, _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _work(case: Case, kind: str) -> Callable[[], Any]:
    spec, rows = case.model.spec, [case.x.spans.generation_position]
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(rows), spec.n_heads, spec.d_head)
    given = tuple(torch.randn(shape, generator=generator).to(case.model.dtype) for _ in range(spec.n_layers))
    return ways(Patches(case, rows, given))[kind]
