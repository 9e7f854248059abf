"""Every number here was worked out by hand from the table in `micro`; the comments say how. M is in logits.

The conflict `va` is the blue picture (p = -1, shown) with the low tone (s = +1), asked H:
M = 4 s (1 - m) + 4 s + 14 p = 0 + 4 - 14 = -10, of which the echo gives 2, the OR of the writers -6, the painter -2 and
its booster -4, the mixer 2 (p + s) = 0, and the carrier, shut by the gate, nothing.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from micro import (
    ASKER,
    BYSTANDER,
    CARRIER,
    COLOURS,
    ECHO,
    GATE_HEAD,
    IDLE,
    MIXER,
    PAINTER,
    RELAY,
    TONES,
    WRITERS,
    margin,
    micro_conflict,
    micro_input,
    micro_model,
)
from tiny import letter

import av_lens as avl
from av_lens.interventions import KV, Plan, Site, add, cut, zero
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.effects import Request, measure_requests
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.sets.sets import release_of_sets
from av_lens.metrics import logit_diff, measure

M = logit_diff(letter("a"), letter("v"))
HEADS = [(layer, head) for layer in range(3) for head in range(4)]
ONE, TWO = WRITERS


def by_head(values):
    """A `[layer, head]` array that is 0 but at the named heads."""
    found = np.zeros((3, 4))
    for place, value in values.items():
        found[place] = value
    return found


def near(found, wanted):
    np.testing.assert_allclose(np.asarray(found, dtype=float), wanted, atol=1e-4)


@cache
def pair(clean=("black", "low", "H"), corrupt=("blue", "low", "H")):
    return avl.Pair(clean=micro_input(*clean), corrupt=micro_input(*corrupt))


# The model itself


@pytest.mark.parametrize("question", ["H", "S"])
@pytest.mark.parametrize("layout", ["in_video", "separate"])
def test_the_model_says_what_the_table_says(question, layout):
    stack = [micro_input(colour, tone, question, layout) for colour in COLOURS for tone in TONES]
    wanted = [margin(colour, tone, question) for colour in COLOURS for tone in TONES]
    near(measure(micro_model(), avl.AVInputs.stack(stack), M), wanted)
    assert margin("blue", "low") == -10
    assert margin("black", "low") == 8


def test_cells_of_the_conflict():
    cells = micro_conflict().cells(micro_model())
    wanted = {"va": -10, "vv": -18, "aa": 18, "av": 10, "wa": 4, "wv": -4, "vw": -14, "aw": 14}
    wanted |= {"blank_a": 8, "blank_v": -8, "blank_muted": 0, "v_muted": -14, "a_muted": 14}
    near([float(measure(micro_model(), cells[name], M)[0]) for name in wanted], list(wanted.values()))


# Patching: the black picture's run (p = 0, m = 0) into va


def test_patching_head_by_head():
    # Gate: it no longer sees a picture, the carrier opens: 4 s. Carrier: 4 s by itself. Painter: its own 2 and the
    # booster's 4. Mixer: (0 + 1) for (-1 + 1): 2. Either writer alone: the other still holds the OR at -1.
    grid = avl.patch(micro_model(), pair(), over="head", metric=M)
    near(grid.effects[0], by_head({GATE_HEAD: 4, CARRIER: 4, PAINTER: 6, MIXER: 2}))
    near([grid.baseline[0], grid.donor[0]], [-10, 8])
    near(grid.normalized()[0], by_head({GATE_HEAD: 4 / 18, CARRIER: 4 / 18, PAINTER: 6 / 18, MIXER: 2 / 18}))


def test_patching_the_other_way():
    # va's values into the black picture's run: the gate shuts the carrier (-4), each writer suffices (-6), the painter
    # gives -2 - 4, the mixer 2 (-1 + 1) for 2 (0 + 1).
    grid = avl.patch(micro_model(), pair(), over="head", metric=M, direction="noise")
    near(grid.effects[0], by_head({GATE_HEAD: -4, CARRIER: -4, ONE: -6, TWO: -6, PAINTER: -6, MIXER: -2}))


def test_patching_the_stream_layer_by_layer():
    # Entering layer 0 the generation position is the same token. Entering layer 1, GATE is 0 (the carrier opens: 4) and
    # SEEN is 0, but writer 2 writes -1 again. Entering layer 2, OUT is the black run's 3 s = 3 for 1 - 3 = -2: 10.
    grid = avl.patch(micro_model(), pair(), over="layer", metric=M)
    near(grid.effects[0], [0, 4, 10])


def test_patching_values_of_the_picture_for_a_group():
    # The value of key-value head 0 at the picture: gate and writer 1 share it in layer 0 (4 + 0), painter and mixer in
    # layer 2 (6 + 2); writer 2 alone reads key-value head 1 in layer 1 (0). The sound is the same: nothing moves.
    grid = avl.patch(micro_model(), pair(), over="head", component="v", at="video", metric=M)
    near(grid.effects[0], [[4, 0], [0, 0], [8, 0]])
    near(
        avl.patch(micro_model(), pair(), over="head", component="v", at="audio", metric=M).effects[0], np.zeros((3, 2))
    )


def test_patching_groups_and_pairs():
    grid = avl.patch(micro_model(), pair(), over="group", metric=M)
    near(grid.effects[0], [[4, 0], [4, 0], [8, 0]])
    heads = [GATE_HEAD, *WRITERS, CARRIER, PAINTER]
    pairs = avl.patch(micro_model(), pair(), over="pair", heads=heads, metric=M).effects[0]
    # The writers together 6, each alone 0. Gate and carrier: the carrier's z is the donor's either way.
    for name, wanted in {"L0H1+L1H2": 6, "L0H0+L1H0": 4, "L0H0+L0H1": 4, "L0H0+L2H0": 10, "L0H1+L2H0": 6}.items():
        near(pairs.sel(pair=name), wanted)


# Direct attribution


def test_direct_attribution():
    grid = avl.direct_attribution(micro_model(), micro_input(), metric=M)
    shares = dict(zip(grid.values.coords["part"].values.tolist(), grid.effects[0].values, strict=True))
    wanted = {"L1H1": 2, "L1 mlp": -6, "L2H0": -2, "L2 mlp": -4}
    near(list(shares.values()), [wanted.get(name, 0) for name in shares])
    near(grid.baseline, [-10])


def test_direct_attribution_by_where_heads_read():
    # The mixer reads 25 positions of each: 2 x mean(p) = -1 -> M -2 from the picture, +2 from the sound.
    grid = avl.direct_attribution(micro_model(), micro_input(), metric=M, by="head span").effects[0]
    near([grid.sel(part="L2H1", source=role) for role in ("video", "audio")], [-2, 2])
    near([grid.sel(part="L2H0", source="video"), grid.sel(part="L1H1", source="question")], [-2, 2])


# Cuts

CUTS = [
    # Gate 0: carrier opens, 4. Writers 0: 6. Painter and booster 0: 6. The mixer reads the sound alone: 4 s for 0.
    (("generation", "video"), {}, 20),
    # The same, but half of the mixer's weight is lost: s for 0 -> 2.
    (("generation", "video"), {"renormalize": False}, 18),
    (("generation", "video"), {"layers": [0], "heads": 0}, 4),
    (("generation", "video"), {"layers": [0], "heads": 1}, 0),
    (("generation", "video"), {"layers": [0, 1], "heads": [1, 2]}, 6),
    # The mixer reads the picture alone: 2 OUT = 4 p for 0; unnormalised 2 p.
    (("generation", "audio"), {}, -4),
    (("generation", "audio"), {"renormalize": False}, -2),
    # The relay's HEARD is 0 at the question: the echo loses 2 s.
    (("question", "audio"), {}, -2),
    (("question", "video"), {}, 0),
    # The echo reads the sink.
    (("generation", "question"), {}, -2),
]


@pytest.mark.parametrize(("edge", "options", "effect"), CUTS)
def test_cutting_edges(edge, options, effect):
    near(measure(micro_model(), micro_input(), M, plan=Plan(cut(*edge, **options))), [-10 + effect])


@pytest.mark.parametrize("renormalize", [True, False])
def test_knockout(renormalize):
    edges = ["video -> generation", "audio -> generation", "audio -> question", "question -> generation"]
    grid = avl.knockout(
        micro_model(), micro_input(), edges=edges, metric=M, renormalize=renormalize, controls=False
    ).effects[0]
    near(np.ravel(grid.values), [20, -4, -2, -2] if renormalize else [18, -2, -2, -2])


def test_knockout_layer_by_layer():
    # Layer 0: the gate (4; writer 1 is covered by writer 2). Layer 1: writer 2, covered. Layer 2: painter 6, mixer 4.
    grid = avl.knockout(
        micro_model(), micro_input(), edges="video -> generation", metric=M, over="layer", controls=False
    ).effects[0]
    near(np.ravel(grid.values), [4, 0, 10])


# Path patching


def path(sender, receiver="logits", among=None, **options):
    found = avl.path_patch(micro_model(), among or pair(), sender=sender, receiver=receiver, metric=M, **options)
    return float(found.effects.values.ravel()[0])


def test_direct_paths_of_all_heads():
    # Held heads and MLPs: the carrier's 4 and the mixer's 2 are their own; the painter's own part is 2 of 6.
    grid = avl.path_patch(micro_model(), pair(), metric=M)
    near(grid.effects[0], by_head({CARRIER: 4, PAINTER: 2, MIXER: 2}))
    grid = avl.path_patch(micro_model(), pair(), metric=M, mlps="free")
    near(grid.effects[0], by_head({CARRIER: 4, PAINTER: 6, MIXER: 2}))
    together = avl.path_patch(micro_model(), pair(), sender=list(WRITERS), metric=M, mlps="free")
    near(together.effects, [[6]])  # through the OR; each alone 0


def test_the_gate_works_through_the_carriers_query_and_nothing_else():
    grid = avl.path_patch(
        micro_model(), pair(), sender=GATE_HEAD, receiver="heads.q, heads.k, heads.v, mlps", metric=M, decompose=True
    ).effects[0, 0]
    parts = {name: float(grid.sel(receiver=name)) for name in ("total", "direct", "L1H0.q", "joint", "remainder")}
    near(list(parts.values()), [4, 0, 4, 4, 0])
    others = grid.drop_sel(receiver=["total", "direct", "L1H0.q", "joint", "remainder"]).values
    near(others[~np.isnan(others)], 0)
    assert np.isnan(grid.sel(receiver="L0H1.q"))


def test_paths_into_values_and_keys_under_grouped_heads():
    # Sound against silence, both with the black picture: the relay's HEARD at the question is read by the carrier (4)
    # and the echo (2), which share one value.
    heard = pair(("black", "low", "H"), ("black", "silence", "H"))
    near(
        [path(RELAY, (1, 0, "v"), heard), path(RELAY, (1, 1, "v"), heard), path(RELAY, (1, KV(0), "v"), heard)],
        [4, 2, 6],
    )
    near([path(RELAY, (1, KV(0), "v"), heard, at=at) for at in ("question", "generation", "audio")], [6, 0, 0])
    # H against S: the asker makes the question's key 4 instead of 2, above the sink's 3.
    asked = pair(("black", "low", "H"), ("black", "low", "S"))
    near(
        [path(ASKER, (1, 0, "k"), asked), path(ASKER, (1, 1, "k"), asked), path(ASKER, (1, KV(0), "k"), asked)],
        [4, 2, 6],
    )
    near([path(ASKER, (1, 0, "q"), asked), path(ASKER, (1, KV(0), "v"), asked)], [0, 0])


def test_paths_into_mlps_and_from_the_embedding():
    near([path(PAINTER, (2, "mlp")), path(ONE, (1, "mlp")), path(list(WRITERS), (1, "mlp"))], [4, 0, 6])
    near([path((1, "mlp"), "logits"), path((2, "mlp"), "logits")], [6, 4])
    # The picture's own stream: seen by the gate's value alone 4; by both writers' 6, by one of them 0.
    near(path(("embed", "video"), (0, 0, "v")), 4)
    near(path(("embed", "video"), [(0, 1, "v"), (1, 2, "v")]), 6)
    near([path(("embed", "video"), (0, 1, "v")), path(("embed", "audio"), (0, 2, "v"))], [0, 0])


def test_paths_of_several_hops():
    near(path(("embed", "video"), "logits", via=[(0, 0, "v"), (1, 0, "q")]), 4)
    near(path(("embed", "video"), "logits", via="L0H1.v + L1H2.v > L1 mlp"), 6)
    near(path(("embed", "video"), "logits", via="L2H0.v"), 2)
    near(path(("embed", "video"), "L2 mlp", via="L2H0.v"), 4)
    heard = pair(("black", "low", "H"), ("black", "silence", "H"))
    near([path(("embed", "audio"), "logits", heard, via=[(0, 2, "v"), (1, h, "v")]) for h in (0, 1)], [4, 2])


# The main job's measures, on C = (M(va) - M(av)) / 2 = -10 and G = 8


@cache
def bench():
    conflicts = [micro_conflict()]
    made = Bench(ModelEngine(micro_model()), conflicts, Candidates.of(conflicts, micro_model().tokenizer))
    return made.chunks([0])


def effects(base, donor, *, freeze=False):
    wanted = Request(base, donor, freeze=freeze)
    return measure_requests(bench(), [wanted], heads=HEADS, examples=np.array([0]))[wanted].margin[0][:, :-1]


RELEASES = {
    # As if it had neither seen nor heard. The relay then has heard nothing: the echo's 2 s is lost.
    "blank_muted": {GATE_HEAD: 4, RELAY: -2, ECHO: -2, PAINTER: 6},
    # The same: what they write from black and silence is 0. Without the asker the echo reads the sink.
    "zero": {GATE_HEAD: 4, RELAY: -2, ASKER: -2, ECHO: -2, PAINTER: 6},
}


@pytest.mark.parametrize("donor", RELEASES)
def test_release(donor):
    near(effects("va", donor), by_head(RELEASES[donor]))


def test_direct_share():
    # Later heads held: the gate's release is all the carrier's, the painter's all its own (the booster is an MLP).
    near(effects("va", "blank_muted", freeze=True), by_head({ECHO: -2, PAINTER: 6}))


def test_reads():
    # Another picture (green: p = 0, but shown): the gate stays shut. Another sound (s = 0).
    near(effects("va", "wa"), by_head({PAINTER: 6, MIXER: 2}))
    near(effects("va", "vw"), by_head({RELAY: -2, ECHO: -2, MIXER: -2}))


def test_sufficiency_silenced_and_carries():
    # va's z in blank_a: the gate shuts (4), each writer alone blackens the OR (6), the painter 6, the mixer 2.
    near(-effects("blank_a", "va"), by_head({GATE_HEAD: 4, CARRIER: 4, ONE: 6, TWO: 6, PAINTER: 6, MIXER: 2}))
    # Silenced: the carrier would say 4 s, had it not been shut; relay, echo and mixer carry sound in the conflict too.
    silenced = effects("va", "blank_a") - effects("va", "blank_muted")
    near(silenced, by_head({CARRIER: 4, RELAY: 2, ECHO: 2, MIXER: 2}))
    near(-effects("blank_a", "blank_muted"), by_head({RELAY: 6, CARRIER: 4, ECHO: 2, MIXER: 2}))


def test_pair_synergy():
    sets = [WRITERS, (GATE_HEAD, CARRIER), (GATE_HEAD, PAINTER), (GATE_HEAD, *WRITERS, PAINTER)]
    found = release_of_sets(bench(), sets, ["blank_muted"] * 4, np.array([0])).release[:, 0]
    # The carrier's own z from blank_muted is 0: with it the gate opens nothing. All suppressors: 4 + 6 + 6 = 16, C = 6.
    near(found, [6, 0, 10, 16])
    alone = effects("va", "blank_muted")
    synergy = [one - sum(max(0.0, alone[head]) for head in heads) for one, heads in zip(found, sets, strict=True)]
    near(synergy, [6, -4, 0, 6])


# What must do nothing, and the norms


def test_idle_heads_and_the_bystander_do_nothing():
    for head in (*IDLE, BYSTANDER):
        near(measure(micro_model(), micro_input(), M, plan=Plan(zero(Site("z", head[0], head[1])))), [-10])


def test_norms_are_the_identity():
    """Whatever is added to the stream, the logits move by it: 5 to OUT before any layer is 10 in M."""
    for layer in range(3):
        value = torch.zeros(1, 16)
        value[0, 14] = 5.0
        plan = Plan(add(Site("resid_pre", layer, positions="generation"), value))
        near(measure(micro_model(), micro_input(), M, plan=plan), [0])
    frozen = avl.path_patch(micro_model(), pair(), metric=M, norms="frozen").effects
    near(frozen[0], by_head({CARRIER: 4, PAINTER: 2, MIXER: 2}))
