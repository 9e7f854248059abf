"""The harness tells the truth: all ways give one result, the counted work is the hand's, the towers run when said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from av_lens.core.budget import ModelSpec
from av_lens.errors import InputError
from av_lens.lab.replay_benchmark import tables as replay_tables
from av_lens.lab.replay_benchmark.benchmark import MODES, measure_shape, run_benchmark
from av_lens.lab.replay_benchmark.peers import (
    Patches,
    by_attribution,
    by_forward,
    by_replay,
    has_nnsight,
    peak_of,
    shared_encoders,
    spread,
)
from av_lens.lab.replay_benchmark.shapes import (
    SHAPES,
    Shape,
    Stopwatch,
    bare_seconds,
    build_case,
    flops,
    run_blocks,
    sweep_blocks,
    unembedding_flops,
)
from av_lens.results.provenance import plain

MINI = Shape("mini", grid=(2, 2), question="123", n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, d_mlp=128)
HAND = ModelSpec(n_layers=2, n_heads=2, n_kv_heads=1, d_model=8, d_head=4, d_mlp=16, d_vocab=10)
ALL = [(0, 0), (0, 1), (1, 0), (1, 1)]


@cache
def mini_case():
    return build_case(MINI)


@cache
def mini_record():
    return measure_shape(MINI, Stopwatch(rounds=1, patience=0.0, shortest=0.0), samples=3)


def test_every_way_gives_the_same_numbers():
    places = mini_record()["places"]
    assert [place["place"] for place in places] == [*mini_case().places()]
    for place in places:
        assert place["plans"] == 12
        assert set(place["gaps"]) == ({"transformer_lens", "nnsight"} if has_nnsight() else {"transformer_lens"})
        assert max(place["gaps"].values()) < 2e-6, place["place"]
        assert all(set(times) == set(MODES) for times in place["peers"].values())
    effects = [place["largest_effect"] for place in places]
    assert min(effects) > 5e-5, "nothing was patched, so equal results prove nothing"


def test_large_shapes_are_timed_once_and_compared_everywhere():
    found = measure_shape(replace(MINI, thorough=False), Stopwatch(1, 0.0, 0.0), samples=3)
    first, *others = found["places"]
    assert first["sampled"] == 3
    for place in others:
        assert place["sampled"] == 2
        assert place["peers"] == first["peers"]
        assert max(place["gaps"].values()) < 2e-6
    assert "2 patches elsewhere" in replay_tables.header_line(plain(found))


def test_attribution_is_the_slope_of_the_exact_effect():
    case = mini_case()
    given = Patches.at(case, case.places()["question"])
    own = Patches.at(replace(case, x=case.donor, donor=case.x), case.places()["question"])
    step, trace, scores = 0.02, case.model.trace(case.x), []
    for sign in (step, -step):
        near = tuple(mine + sign * (theirs - mine) for mine, theirs in zip(own.given, given.given, strict=True))
        scores.append(by_replay(Patches(case, given.rows, near), given.heads(), trace))
    slope = by_attribution(given).flatten()
    assert torch.allclose((scores[0] - scores[1]) / (2 * step), slope, atol=5e-5, rtol=0.02)
    assert float(slope.abs().max()) > 1e-4


def test_within_shared_encoders_no_tower_runs():
    case, calls = mini_case(), []
    towers = (case.hf_model.model.audio_tower, case.hf_model.model.visual)
    handles = [tower.register_forward_pre_hook(lambda *_: calls.append(1)) for tower in towers]
    before = by_forward(case)
    assert len(calls) == 2
    with shared_encoders(case):
        calls.clear()
        assert torch.equal(by_forward(case), before)
        assert not calls
    by_forward(case)
    assert len(calls) == 2
    for handle in handles:
        handle.remove()


def test_weights_are_held_once():
    case = mini_case()
    own = {p.data_ptr() for p in case.hf_model.parameters()}
    assert {p.data_ptr() for p in case.model.hf_model.parameters()} == own


@pytest.mark.parametrize(
    ("rows", "by_hand"),
    [
        # layer 0: o 2 x 32, MLP 2 x 384; layer 1: k and v 4 x 64, q and o 2 x 128, attention 2 x 3 x 16, MLP 2 x 384.
        ([1], 2 * (64 + 768 + 256 + 256 + 96 + 768)),
        # the asked row itself: one row less of k and v; the last layer's own edits count too: o 2 x 32, MLP 2 x 384.
        ([2], 2 * (64 + 768 + 128 + 256 + 96 + 768 + 64 + 768)),
    ],
)
def test_counted_work_is_the_hands(rows, by_hand):
    assert flops(sweep_blocks(ALL, rows, n_layers=2, n=3), HAND) == by_hand


def test_work_of_the_recorded_run():
    # layer 0, 3 rows: q and o 3 x 128, k and v 3 x 64, attention (1 + 2 + 3) x 16, MLP 3 x 384; layer 1: keys, one row.
    by_hand = 2 * (384 + 192 + 96 + 1152 + 192 + 128 + 48 + 384)
    assert flops(run_blocks(n_layers=2, n=3), HAND) == by_hand
    assert unembedding_flops(4, HAND) == 2 * 4 * 2 * 8


def test_bare_seconds_are_those_of_the_blocks():
    blocks = sweep_blocks(ALL, [1], n_layers=2, n=3)
    watch = Stopwatch(rounds=1, patience=0.0, shortest=0.0)
    found = bare_seconds(blocks, HAND, torch.float32, watch)
    assert found["products"] > 0 < found["attention"]
    assert bare_seconds(blocks, HAND, torch.float32, watch) == found, "a size that is known is not timed again"
    assert bare_seconds([], HAND, torch.float32, watch) == {"products": 0.0, "attention": 0.0}


def test_slow_loops_are_sampled_over_layers_and_heads():
    heads = [(layer, head) for layer in range(12) for head in range(8)]
    chosen = [heads[i] for i in spread(heads, 8)]
    assert chosen[0] == (0, 0)
    assert chosen[-1] == (11, 7)
    assert len({layer for layer, _ in chosen}) == 8
    assert len({head for _, head in chosen}) >= 5
    assert spread(heads[:3], 8) == [0, 1, 2]


@pytest.mark.parametrize(("name", "audio", "video", "count"), [("wide", 100, 380, 510), ("long", 250, 2720, 3000)])
def test_shapes_are_of_the_positions_they_claim(name, audio, video, count):
    small = replace(SHAPES[name], n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_mlp=32)
    spans = build_case(small).x.spans
    assert (len(spans["audio"]), len(spans["video"]), len(spans["question"]), len(spans)) == (audio, video, 18, count)


def test_peak_memory_is_read():
    resident, peak = peak_of(lambda: torch.ones(30_000_000).sum())
    if not math.isnan(resident):
        assert 0.11e9 < peak - resident < 0.2e9


def test_what_cannot_run_is_refused_or_skipped_by_name():
    with pytest.raises(InputError, match="Did you mean 'wide'"):
        run_benchmark(["wyde"])
    with pytest.raises(InputError, match="samples=0"):
        run_benchmark(["wide"], samples=0)
    found = run_benchmark(["true"], recording="nowhere.mp4")
    assert found == {"true": {"skipped": "needs a recording; nowhere.mp4 is not there"}}


def test_the_page_is_filled_from_the_record_and_keeps_other_shapes(tmp_path):
    with pytest.raises(InputError, match="lacks the comments"):
        replay_tables.store({}, tmp_path)
    page = tmp_path / replay_tables.PAGE.name
    page.write_text("# Costs\n\n<!-- replay -->\n<!-- /replay -->\n\nThe end.\n")
    record = json.loads(json.dumps(plain(mini_record())))
    record["memory"] = {kind: {"resident": 1.0, "peak": 0.5} for kind in ("forward", "attribution", "trace", "sweep")}
    replay_tables.store({"mini": record}, tmp_path)
    for _ in range(2):
        replay_tables.store({"true": {"skipped": "no recording"}}, tmp_path)
    text = page.read_text()
    assert text.startswith("# Costs")
    assert text.endswith("The end.\n")
    assert text.count("### mini") == text.count("### true") == 1
    assert "Skipped: no recording." in text
    generation = record["places"][0]
    ours = generation["seconds"] / generation["plans"]
    times = generation["peers"]["transformer_lens"]["encoders"] / ours
    row = next(line for line in text.splitlines() if line.startswith("| generation (1)"))
    assert row.split(" | ")[5] == f"{times:.3g}x"
    assert "| recorded run and every head at the generation position | 0.5 | 1.00 |" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHAPES])
def test_on_real_shapes_every_way_gives_the_same_numbers(name, request, capsys):
    recording = request.getfixturevalue("real_clip_path") if SHAPES[name].recording else None
    found = measure_shape(SHAPES[name], Stopwatch(rounds=1), recording=recording, samples=8)
    rough = found["header"]["dtype"] == "bfloat16"
    with capsys.disabled():
        print(f"\n{replay_tables.page_tables({name: found})}")
    for place in found["places"]:
        gap, effect = max(place["gaps"].values()), place["largest_effect"]
        assert gap < (0.5 if rough else 1e-5) * max(effect, 1.0), place["place"]
