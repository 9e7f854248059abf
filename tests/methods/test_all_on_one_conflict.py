"""Every per-example method on one conflict of av-tiny: `pytest -m slow -s` prints how long each takes."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

import av_lens as avl
from av_lens.lab.calibration import stage


@pytest.mark.slow
def test_every_method_on_one_conflict(tmp_path):
    conflict = avl.conflicts(stage(tmp_path, conflicts=1, seed=5))[0]
    model, base = avl.load("av-tiny"), avl.load("av-tiny-base")
    cells = conflict.cells(model)
    x = cells["va"]
    pair = avl.Pair(clean=cells["blank_a"], corrupt=x)
    metric = avl.logit_diff(*conflict.answers)
    plan = avl.Plan(avl.scale(avl.Site("z", 4, 7, "suffix"), 0.0))
    calls = {
        "patch, heads": lambda: avl.patch(model, pair, at="suffix", metric=metric),
        "patch, layer span": lambda: avl.patch(model, pair, over="layer span", metric=metric),
        "patch, layer pos": lambda: avl.patch(model, pair, over="layer pos", metric=metric),
        "patch, pairs": lambda: avl.patch(model, pair, over="pair", at="suffix", metric=metric),
        "patch, coalition of 8 orders": lambda: avl.patch(model, pair, over="coalition:8", at="suffix", metric=metric),
        "path_patch, heads to logits": lambda: avl.path_patch(model, pair, metric=metric),
        "path_patch, heads to queries": lambda: avl.path_patch(
            model, pair, receiver="heads.q", at="suffix", metric=metric
        ),
        "direct_attribution, head span": lambda: avl.direct_attribution(model, x, metric=metric, by="head span"),
        "direct_attribution, neuron": lambda: avl.direct_attribution(model, x, metric=metric, by="neuron"),
        "logit_lens": lambda: avl.logit_lens(model, [conflict]),
        "attention_flow": lambda: avl.attention_flow(model, x),
        "find_sinks": lambda: avl.find_sinks(model, x),
        "knockout, layers": lambda: avl.knockout(model, [conflict], over="layer"),
        "causal_trace, 10 seeds": lambda: avl.causal_trace(model, [conflict]),
        "attribution_patch": lambda: avl.attribution_patch(model, pair, metric=metric),
        "edge_attribution, eap": lambda: avl.edge_attribution(model, pair, metric=metric),
        "edge_attribution, eap-ig": lambda: avl.edge_attribution(model, pair, metric=metric, variant="ig_inputs"),
        "base_shift": lambda: avl.methods.base_shift(model, conflict, base=base),
        "graft": lambda: avl.methods.graft(model, conflict, base=base, metric=metric),
        "caption": lambda: avl.caption(model, conflict, plans=plan, lexicon=avl.organism.classes()),
        "steer": lambda: avl.steer(model, x, plan=plan, metric=metric),
    }
    total = 0.0
    for name, call in calls.items():
        start = time.perf_counter()
        found = call()
        seconds = time.perf_counter() - start
        total += seconds
        sys.stdout.write(f"\n{name:32} {seconds:6.2f} s")
        values = getattr(found, "values", None)
        assert values is None or not bool(np.isnan(np.asarray(values)).all()), f"{name} measured nothing"
    sys.stdout.write(f"\n{'all together':32} {total:6.2f} s\n")
