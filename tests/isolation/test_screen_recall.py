"""Does the screen choose the guilty among 144 heads and 12 MLPs? Planted organisms, widened (slow; -s prints)."""

from __future__ import annotations

import numpy as np
import pytest
from widened import moved, widened

from av_lens.inputs import conflicts as read_conflicts
from av_lens.isolation.measuring.behaviour import answered
from av_lens.isolation.measuring.bench import Bench, in_order
from av_lens.isolation.measuring.effects import Request, measure_requests, mirrored
from av_lens.isolation.measuring.engine import PRIMARY_DONORS, ModelEngine
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.naming import screen
from av_lens.isolation.naming.evidence import with_means
from av_lens.isolation.naming.roles import head_means
from av_lens.lab.calibration import read_plant, stage

pytestmark = pytest.mark.slow
N, NOISE = 8, 0.3
REDUNDANT = "av-tiny-planted-redundant-gates"
PLANTS = (
    "av-tiny-planted",
    "av-tiny-planted-gates",
    REDUNDANT,
    "av-tiny-planted-writers",
    "av-tiny-planted-redundant-writers",
    "av-tiny-planted-opponents",
)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return list(read_conflicts(stage(tmp_path_factory.mktemp("staged"), conflicts=N, seed=0, split="test")))


def benched(name, staged):
    engine = ModelEngine(widened(name, noise=NOISE))
    read = list(answered(engine, staged).conflicts)
    bench = Bench(engine, read, Candidates.of(read, engine.model.tokenizer))
    chunks, examples = bench.chunks(range(len(read))), np.arange(len(read))
    with_means(chunks)
    assert len(bench.nodes) == 156
    G, C = (
        in_order(chunks, examples, lambda one, base=base: mirrored(base, one.margin)).mean()
        for base in ("blank_a", "va")
    )
    assert C < 0.5 * G  # the larger body hears and is suppressed as the organism is
    return bench, chunks, examples, G


@pytest.mark.parametrize("name", PLANTS)
def test_every_true_head_is_among_the_64_and_the_sign_alone_would_miss_redundant_gates(name, staged):
    bench, chunks, examples, _ = benched(name, staged)
    true = {moved(head): kind for head, kind in read_plant(name).kinds.items()}
    found = screen.guesses(chunks, examples)
    chosen = screen.screen(found, bench.nodes)
    signed = np.fmax.reduce([head_means(found[donor]) for donor in PRIMARY_DONORS])
    by_sign = list(screen.best_ranked({"sign": signed}, bench.nodes))
    told = {head: f"{true[head]}, {chosen.get(head)}, by sign {by_sign.index(head) + 1}" for head in true}
    missed = [head for head in true if by_sign.index(head) >= screen.BY_ATP]
    recall = sum(head in chosen for head in true) / len(true)
    share = 1 - len(missed) / len(true)
    print(f"\n{name}: recall {recall:.2f} of {len(true)} true heads, by the sign alone {share:.2f}: {told}")
    assert recall == 1
    assert bool(missed) == (name == REDUNDANT)


def test_every_node_whose_exact_release_is_large_is_among_the_64(staged):
    bench, chunks, examples, g = benched(REDUNDANT, staged)
    chosen = screen.screen(screen.guesses(chunks, examples), bench.nodes)
    wanted = [Request("va", donor) for donor in PRIMARY_DONORS]
    exact = measure_requests(chunks, wanted, heads=bench.nodes, examples=examples)
    largest = np.fmax.reduce([head_means(exact[one].margin) for one in wanted])
    for s in (0.10, 0.03):
        large = [node for node in bench.nodes if largest[node] > s * g]
        missed = [(node, round(float(largest[node] / g), 3)) for node in large if node not in chosen]
        print(f"\nabove {s:.2f} of G: {len(large)} nodes, not chosen: {missed}")
        assert len(missed) <= (0 if s == 0.10 else 1)
