"""How much faster the isolation's exact effects are on recorded runs than on whole hooked ones (printed, with -s)."""

from __future__ import annotations

import time

import numpy as np
import pytest

import av_lens as avl
from av_lens.isolation.measuring.behaviour import answered
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.measuring.effects import Request, measure_requests
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.lab.calibration import stage


@pytest.mark.slow
def test_exact_effects_by_trace_and_by_hooks(tmp_path):
    model = avl.load("av-tiny")
    conflicts = answered(ModelEngine(model), avl.conflicts(stage(tmp_path, conflicts=24, seed=0))).conflicts
    wanted = [Request("va", "blank_muted"), Request("va", "zero")]
    heads = [(layer, head) for layer in range(model.spec.n_layers) for head in range(model.spec.n_heads)]
    found, seconds = {}, {}
    for how in ("hooks", "trace"):
        bench = Bench(
            ModelEngine(model, how=how), list(conflicts), Candidates.of(conflicts, model.tokenizer), site="suffix"
        )
        chunks = bench.chunks(range(len(conflicts)))
        for chunk in chunks:
            chunk.means = Means.over(chunks)
            for cell in ("va", "av", "blank_muted"):
                chunk.reading(cell, "ask")  # encoded before the clock starts, for both alike
        start = time.perf_counter()
        found[how] = measure_requests(chunks, wanted, heads=heads, examples=np.arange(len(conflicts)))
        seconds[how] = time.perf_counter() - start
    for request in wanted:
        np.testing.assert_allclose(found["trace"][request].margin, found["hooks"][request].margin, atol=1e-4)
    ratio = seconds["hooks"] / seconds["trace"]
    sizes = f"{len(heads)} heads, {len(conflicts)} conflicts"
    print(f"\n{sizes}: hooks {seconds['hooks']:.1f} s, trace {seconds['trace']:.1f} s")
    print(f"isolation's exact effects: {ratio:.1f} times faster on recorded runs")
