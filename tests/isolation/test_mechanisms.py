"""Mechanism cards and cuts on the micro model, whose figures stand in `micro`'s tables; paths against `path_patch`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from micro import BYSTANDER, CARRIER, GATE_HEAD, MIXER, PAINTER, micro_conflict, micro_model
from tiny import letter, tiny_hf_model, tiny_media, tiny_processor

import av_lens as avl
from av_lens.inputs import Conflict
from av_lens.isolation.explaining import mechanisms as card
from av_lens.isolation.explaining.knowledge import path_columns, paths
from av_lens.isolation.explaining.mechanisms import drive_in_words
from av_lens.isolation.explaining.routes import (
    ARMS,
    CUT,
    DIFFERENCE,
    LOST,
    ROUTES,
    arms_of,
    cut_effects,
    route_effects,
    windows,
)
from av_lens.isolation.explaining.routes import ROUTE_ARMS as ROUTE_ARMS
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.effects import Request, measure_requests
from av_lens.isolation.measuring.engine import LATER, MLP, ModelEngine
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.media import Clip
from av_lens.methods.shared.matched_cuts import EQUAL_COUNT, EQUAL_MASS, EdgeCut
from av_lens.metrics import logit_diff
from av_lens.metrics.forms import each
from av_lens.model import load
from av_lens.replay.stacks import HeadRead


def chunk_of(model, conflicts):
    bench = Bench(ModelEngine(model), list(conflicts), Candidates.of(conflicts, model.tokenizer))
    (chunk,) = bench.chunks(range(len(conflicts)), "suffix")
    return chunk


@pytest.fixture(scope="module")
def micro():
    return chunk_of(micro_model(), [micro_conflict()])


def near(found, wanted):
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), wanted, atol=1e-4)


def test_heads_attend_to_what_they_were_made_to_read(micro):
    found = card.attention(micro)
    key = {name: i for i, name in enumerate(card.KEYS)}
    va, blank = found["va ask"][0], found["blank_a ask"][0]
    near(va[GATE_HEAD][:, key["video"]], [1, 1])  # from the generation position, and over the site
    near(va[MIXER][0, [key["video"], key["audio"]]], [0.5, 0.5])
    near(va[BYSTANDER][0, [key["video"], key["audio"], key["header"]]], np.array([25, 25, 12]) / 74)
    near(va[CARRIER][0, key["boundary"]], 1)  # shut by the gate, it reads the sink
    near(blank[CARRIER][0, key["question"]], 1)
    near(found["va see"][0][CARRIER][0, key["boundary"]], 1)
    near(sum(va[MIXER][0]), 1)


def test_writes_are_parted_by_what_is_read(micro):
    painter, mixer = card.writes(micro, [PAINTER, MIXER])["writes"][0]
    # In va the painter writes OUT += p = -1: "a" falls by 1, "v" rises by 1; centred over the two answers.
    near(painter, [[-1, 1, -2], [0, 0, 0], [0, 0, 0], [-1, 1, -2], [0, 0, 0], [-1, 1, -2]])  # last: all of it
    # The mixer's half from the picture cancels its half from the sound; a whole unit of either is twice as much.
    near(mixer, [[-1, 1, -2], [1, -1, 2], [0, 0, 0], [-2, 2, -4], [2, -2, 4], [0, 0, 0]])


def test_what_a_gate_shuts_is_driven_by_its_queries(micro):
    # The carrier with its query from the run without a picture reads the sound again: OUT += 2 s, M += 4.
    found = card.drives(micro, [CARRIER], "blank_a")
    near(found["effect"][0, 0], [4, 0, 4, 0, 4])  # Q, K, Q and K, V, z
    # The painter reads the picture whatever is shown: what moves is its value there, 6 with the MLP behind it.
    found = card.drives(micro, [PAINTER], "blank_muted")
    near(found["effect"][0, 0], [0, 0, 0, 6, 6])
    near(found["looks"][0, 0, :, 0], [1, 1, 1, 1, 1])


def test_another_picture_is_mirrored(micro):
    # wa shows green (p = 0) and wv likewise, so the painter's value goes to 0 in both.
    near(card.drives(micro, [PAINTER], "wa")["effect"][0, 0], [0, 0, 0, 6, 6])


def test_a_pattern_moves_with_the_keys_that_are_taken():
    mask, one = torch.zeros(1, 1, 2), torch.ones(1, 1, 1)
    own = HeadRead(one, torch.zeros(1, 2, 1), torch.tensor([[[0.0], [4.0]]]), mask, 1.0)
    other = HeadRead(-one, torch.tensor([[[0.0], [3.0]]]).log().clamp(min=0), torch.full((1, 2, 1), 9.0), mask, 1.0)
    near(own.pattern[0, 0], [0.5, 0.5])
    near(own.taking(other, q=True).pattern[0, 0], [0.5, 0.5])  # equal keys: no query can tell them apart
    near(own.taking(other, k=[1]).pattern[0, 0], [0.25, 0.75])  # e^0 : e^log 3
    near(own.taking(other, q=True, k=[1]).pattern[0, 0], [0.75, 0.25])
    near(own.taking(other, k=[1]).z[0, 0], [3])
    near(own.taking(other, v=[0]).z[0, 0], [0.5 * 9 + 0.5 * 4])
    near(own.z[0, 0], [2])  # nothing was written into the run's own


def test_drives_in_words():
    assert drive_in_words(np.array([0.9, 0.7, 1.0]), np.array([0.5, 0.4, 0.6])) == "queries"
    assert drive_in_words(np.array([0.1, 0.0, 0.3]), np.array([-0.5, -0.6, -0.4])) == "keys"
    assert drive_in_words(np.array([0.5, 0.2, 0.8]), np.array([0.5, 0.4, 0.6])) == "undetermined"
    assert drive_in_words(np.array([9.0, 8.0, 9.9]), np.array([0.0, -0.1, 0.1])).endswith("does not move")


def test_a_gate_is_mediated_by_the_carriers_queries_and_a_painter_is_direct(micro):
    senders = [(GATE_HEAD, "blank_muted"), (PAINTER, "zero")]
    names = path_columns([CARRIER, MIXER])
    gate, painter = paths(micro, "va", senders, [CARRIER, MIXER])["effect"][0]
    at = dict(zip(names, gate, strict=True))
    assert names == ["total", "direct", *(f"{h}.{i}" for h in ("L1H0", "L2H1") for i in "qkv"), "queries", "joint"]
    near([at["total"], at["direct"]], [4, 0])
    near([at["L1H0.q"], at["queries"], at["joint"]], [4, 4, 4])
    near([at[name] for name in ("L1H0.k", "L1H0.v", "L2H1.q", "L2H1.k", "L2H1.v")], [0] * 5)
    near(painter[:2], [6, 6])
    assert np.isnan(painter[2:]).all()  # no receiver is after it


def test_what_carries_is_measured_on_hearing_alone(micro):
    # In blank_a the carrier gives M 4 of its 8, straight to the logits; without it G falls by 4.
    near(paths(micro, "blank_a", [(CARRIER, "blank_muted")], [])["effect"][0, 0], [-4, -4])


def test_cuts_of_a_head_that_reads_both(micro):
    found = cut_effects(micro, [(MIXER,), (PAINTER, GATE_HEAD)], ["video|image", "audio"], 0)
    at = {name: i for i, name in enumerate(ARMS)}
    effect, mass = found["effect"][0], found["mass"][0]
    # The mixer without the picture reads the sound alone, 2 s for p + s: M 4 s for 0. With the weight lost, half of it.
    near(effect[0, :, at[CUT]], [4, -4])
    near(effect[0, :, at[LOST]], [2, -2])
    near(mass[0, :, at[CUT]], [0.5, 0.5])
    near(effect[1, :, at[CUT]], [6 + 4, 0])  # both: the painter's 6, and the carrier's 4 that the gate shut
    # 8 of the picture's 25 keys cut: 17 pictures and 25 sounds are left, a mean of (25 s + 17 p) / 42.
    near(effect[0, 0, at["30% of keys"]], 2 * 2 * (25 - 17) / 42)
    assert np.isnan(effect[0, 0, at[EQUAL_COUNT]]) == (74 - 25 < 3 * 25)


def test_controls_take_no_head_that_releases_and_say_when_there_is_none():
    mass = np.ones((3, 4, 10))

    def make(options):
        return EdgeCut((9,), (9,), (0, 1), {1: (2,)}, 4, options)

    arms = arms_of(make, mass, 10, (0, 0))
    assert list(arms) == list(ARMS)
    assert arms[EQUAL_MASS].mass == pytest.approx(1)
    cut_heads = {(e.layers[0], e.heads) for plan in arms[EQUAL_MASS].plans for e in plan.edits}
    assert (1, (2,)) not in cut_heads
    alone = np.zeros_like(mass)
    alone[1, 2] = 1.0  # nobody else moves anything
    assert arms_of(make, alone, 10, (0, 0))[EQUAL_MASS].plans == ()
    backwards = arms_of(lambda options: EdgeCut((1,), (1,), (5,), {1: (2,)}, 4, options), mass, 10, (0, 0))
    assert not any(arm.plans for arm in backwards.values())
    assert DIFFERENCE not in ARMS


def test_routes_by_hand(micro):
    found = route_effects(micro, 0)
    route = {name: i for i, name in enumerate(ROUTES)}
    window = {w.name: i for i, w in enumerate(windows(3))}
    cut = found["effect"][0, :, window["all layers"], ROUTE_ARMS.index("cut")]
    # Nothing of the picture: M = 2 (2 s + s + 2 s) = 10 s for 4 s + 14 p.
    near([cut[route[name]] for name in ("whole", "generation", "relay", "encoding")], [20, 20, 0, 0])
    assert np.isnan([cut[route["sink"]], cut[route["without sinks"]]][:1]).all()
    assert found["before"].tolist() == [0.0]
    says = found["says"][0, :, window["all layers"], 0]
    assert says[route["whole"]] == 1.0
    assert says[route["relay"]] == 0.0


def test_windows_are_shares_of_the_depth():
    found = {w.name: w.layers for w in windows(36)}
    assert found["relay's"] == tuple(range(10, 20))
    assert found["deep fusion"] == tuple(range(15, 30))
    assert found["late"] == tuple(range(26, 36))
    assert found["early"] == tuple(range(10))
    assert found["around 20"] == tuple(range(17, 24))
    assert found["around 0"] == tuple(range(4))


def clip(seed):
    frames, waveform = tiny_media(2.0, seed=seed)
    return Clip.from_arrays(frames=frames, times=np.arange(len(frames)) / 2.0, waveform=waveform, rate=16000)


@pytest.fixture(scope="module")
def tiny():
    model = load(hf_model=tiny_hf_model(seed=1), processor=tiny_processor())
    conflicts = [
        Conflict(sound=clip(2 * i), picture=clip(2 * i + 1), question="What?", answers=pair, id=f"c{i}")
        for i, pair in enumerate(((letter("a"), letter("b")), (letter("c"), letter("d"))))
    ]
    return chunk_of(model, conflicts)


def test_queries_keys_and_values_are_taken_one_at_a_time(tiny):
    own, made = card._mixtures(tiny, "va", (1, 2), "blank_muted")
    spans = tiny.inputs("va").spans
    media, text = spans.media.positions.tolist(), spans.suffix.positions.tolist()
    theirs = HeadRead.of(tiny.bench.engine.model.trace(tiny.inputs("blank_muted")), 1, 2, text)
    assert not torch.allclose(own.k[:, media], theirs.k[:, media])
    for name, read in made.items():
        torch.testing.assert_close(read.q, theirs.q if "Q" in name else own.q)
        torch.testing.assert_close(read.k[:, media], (theirs if "K" in name else own).k[:, media])
        torch.testing.assert_close(read.v[:, media], (theirs if "V" in name else own).v[:, media])
        torch.testing.assert_close(read.k[:, text], own.k[:, text])
        torch.testing.assert_close(read.v[:, text], own.v[:, text])
    torch.testing.assert_close(own.z, tiny.run("va").at_site("z")[1, :, :, 2])


def test_paths_equal_path_patch_in_both_cells(tiny):
    model, sender, heads = tiny.bench.engine.model, (0, 1), [(2, 1), (2, 3), (3, 0)]
    found = paths(tiny, "va", [(sender, "blank_muted")], heads)["effect"][:, 0]
    sides = []
    for cell in ("va", "av"):
        pair = avl.Pair(clean=tiny.inputs("blank_muted"), corrupt=tiny.inputs(cell))
        metric = logit_diff(each([letter("a"), letter("c")]), each([letter("b"), letter("d")]))
        inputs = [(layer, head, name) for layer, head in heads for name in "qkv"]
        receiver = {f"L{layer}H{head}.{name}": [(layer, head, name)] for layer, head, name in inputs}
        grid = avl.path_patch(
            model, pair, sender=sender, receiver=receiver, metric=metric, at="suffix", mlps="free", decompose=True
        )
        sides.append(grid.effects)
    wanted = 0.5 * (sides[0] - sides[1])
    names = [name for name in path_columns(heads) if name != "queries"]
    for name in names:
        got = found[:, path_columns(heads).index(name)]
        np.testing.assert_allclose(got, wanted.sel(receiver=name).values.squeeze(), atol=2e-5, err_msg=name)
    assert np.abs(found[:, path_columns(heads).index("joint")]).max() > 1e-3


@pytest.mark.parametrize(("node", "sender", "first"), [((0, 1), (0, 1), 0), ((1, MLP), (1, "mlp"), 2)])
def test_paths_through_mlps_equal_path_patch_with_all_others_held(tiny, node, sender, first):
    found = paths(tiny, "va", [(node, "blank_muted")], [(3, 0)], range(4))["effect"][:, 0]
    column = {name: found[:, number] for number, name in enumerate(path_columns([(3, 0)], range(4)))}
    metric = logit_diff(each([letter("a"), letter("c")]), each([letter("b"), letter("d")]))
    sides = []
    for cell in ("va", "av"):
        pair = avl.Pair(clean=tiny.inputs("blank_muted"), corrupt=tiny.inputs(cell))
        receiver = {f"MLP {layer}": [(layer, "mlp")] for layer in range(first, 4)}
        made = avl.path_patch(
            tiny.bench.engine.model, pair, sender=sender, receiver=receiver, metric=metric, at="suffix", mlps="frozen"
        )
        sides.append(made.effects)
    wanted = 0.5 * (sides[0] - sides[1])
    for layer in range(4):
        if layer < first:
            assert np.isnan(column[f"MLP {layer}"]).all()
        else:
            values = wanted.sel(receiver=f"MLP {layer}").values.squeeze()
            np.testing.assert_allclose(column[f"MLP {layer}"], values, atol=2e-5, err_msg=str(layer))
            assert np.abs(values).max() > 1e-4
    write = Request("va", "blank_muted", freeze=True, mlps=LATER)
    alone = measure_requests([tiny], [write], heads=[node], examples=np.arange(2))[write].margin[:, *node]
    np.testing.assert_allclose(column["write"], alone, atol=2e-5)


def test_direct_paths_are_the_frozen_releases(tiny):
    heads = [(0, 1), (2, 3), (3, 0)]
    found = paths(tiny, "va", [(head, "zero") for head in heads], [])["effect"]
    for place, freeze in enumerate((False, True)):
        request = Request("va", "zero", freeze=freeze)
        wanted = measure_requests([tiny], [request], heads=heads, examples=np.arange(2))[request].margin
        for number, head in enumerate(heads):
            np.testing.assert_allclose(found[:, number, place], wanted[:, head[0], head[1]], atol=2e-5)
