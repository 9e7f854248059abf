"""Path patching against brute force, to 1e-5."""

from __future__ import annotations

import numpy as np
import pytest
from brute_paths import LOGITS, METRIC, N_HEADS, N_LAYERS, Brute, drawn_receiver, ends, models, of
from tiny import tiny_clip

import av_lens as avl
from av_lens.errors import InputError, InterventionError
from av_lens.inputs.answers import Answer
from av_lens.interventions.edges import KV, Node, receivers, senders
from av_lens.methods import path_patch
from av_lens.metrics import logit_diff, measure


def check(found, sender, receiver, via=(), *, mlps, at=None, direction="denoise", norms="recomputed"):
    """One path by both ways, to 1e-5."""
    base, donor = found.pair.corrupt, found.pair.clean
    if direction == "noise":
        base, donor = donor, base
    options = {"mlps": mlps, "at": at, "norms": norms}
    grid = path_patch(
        found.model,
        found.pair,
        sender=sender,
        receiver=receiver,
        via=via,
        metric=METRIC,
        direction=direction,
        **options,
    )
    brute = Brute(found.twin, base, donor, found.group, **options)
    spec = found.model.spec
    sending = next(iter(senders(sender, spec, base.spans.roles).values()))
    hops = [ends(hop, spec) for hop in via]
    wanted = of(METRIC, found.model, brute.value(sending, ends(receiver, spec), hops))
    np.testing.assert_allclose(grid.values.values.reshape(2), wanted, atol=1e-5, rtol=0)
    return float(np.abs(grid.effects.values).max())


@pytest.mark.parametrize("n_kv_heads", [2, 8])
@pytest.mark.parametrize("mlps", ["frozen", "free"])
def test_random_paths_of_one_hop_are_the_brute_force(n_kv_heads, mlps):
    found, rng = models(n_kv_heads), np.random.default_rng(n_kv_heads)
    effects = []
    for kind in ("head", "head", "head", "mlp", "embed"):
        layer = int(rng.integers(N_LAYERS - 1))
        sender = {"head": (layer, int(rng.integers(N_HEADS))), "mlp": (layer, "mlp"), "embed": ("embed", "video")}[kind]
        receiver = drawn_receiver(rng, 0 if kind == "embed" else layer + 1, n_kv_heads)
        direction = str(rng.choice(["denoise", "noise"]))
        effects.append(check(found, sender, receiver, mlps=mlps, direction=direction))
    effects += [check(found, (0, 3), (2, 5, what), mlps=mlps, at="audio|question") for what in "qkv"]
    assert np.median(effects) > 1e-4, effects


@pytest.mark.parametrize("n_kv_heads", [2, 8])
@pytest.mark.parametrize("mlps", ["frozen", "free"])
def test_random_paths_of_two_hops_are_the_brute_force(n_kv_heads, mlps):
    found, rng = models(n_kv_heads), np.random.default_rng(10 + n_kv_heads)
    effects = []
    for last in ("logits", (3, 2, "k"), (3, "mlp")):
        hop = drawn_receiver(rng, 1, n_kv_heads)
        hop = (int(rng.integers(1, 3)), *hop[1:])
        effects.append(check(found, (0, int(rng.integers(N_HEADS))), last, (hop,), mlps=mlps))
    effects.append(check(found, (0, 1), (3, 0, "v"), ([(1, 2, "v"), (1, "mlp")], (2, 4, "v")), mlps=mlps))
    # A head and its own layer's MLP, sent together or passed through together: the MLP is not recomputed as well.
    effects.append(check(found, [(1, 2), (1, "mlp")], "logits", mlps=mlps))
    effects.append(check(found, ("embed", "generation|video"), "logits", ([(1, 2, "v"), (1, "mlp")],), mlps=mlps))
    assert max(effects) > 1e-6, effects


@pytest.mark.parametrize("n_kv_heads", [2, 8])
def test_receivers_patched_together_are_the_brute_force(n_kv_heads):
    found = models(n_kv_heads)
    together = [
        [(1, 2, "q"), (1, 2, "k"), (1, 2, "v")],
        [(1, 2, "v"), (2, 5, "k"), (3, 7, "v"), (2, "mlp")],
        [(1, "mlp"), (2, KV(1), "v"), (3, 0, "q"), (3, 6, "k")],
        "L2H4.v + L2H5.v + L3 mlp",
    ]
    for receiver in together:
        assert check(found, (0, 3), receiver, mlps="free") > 1e-5
    assert check(found, [(0, 3), (1, 6)], together[1], mlps="frozen") > 1e-5


@pytest.mark.parametrize("mlps", ["frozen", "free"])
@pytest.mark.parametrize("norms", ["recomputed", "frozen"])
def test_direct_effects_of_all_heads_are_the_brute_force_in_one_pass(mlps, norms):
    found = models(2)
    grid = path_patch(found.model, found.pair, metric=METRIC, mlps=mlps, norms=norms)
    assert grid.values.dims == ("example", "layer", "head")
    brute = Brute(found.twin, found.pair.corrupt, found.pair.clean, found.group, mlps=mlps, norms=norms)
    for layer, head in ((0, 0), (1, 5), (2, 3), (3, 7)):
        wanted = of(METRIC, found.model, brute.value([Node("head", layer, head)], [LOGITS]))
        got = grid.values.sel(layer=layer, head=head).values
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)
    assert float(np.abs(grid.effects).max()) > 1e-3


def test_frozen_norms_on_the_way_are_the_brute_force():
    for receiver in ((2, 1, "q"), (2, "mlp"), "logits"):
        check(models(2), (0, 2), receiver, mlps="free", norms="frozen")


def test_a_matrix_is_its_cells_and_what_cannot_pass_is_nan():
    found = models(2)
    grid = path_patch(
        found.model, found.pair, sender="heads, L1 mlp", receiver="heads.v, kv.k, mlps", metric=METRIC, budget_gb=0.01
    )
    assert grid.values.sizes == {"example": 2, "sender": 33, "receiver": 44}
    for sender, receiver in (("L0H3", "L1H2.v"), ("L1H7", "L3KV1.k"), ("L1 mlp", "L2 mlp"), ("L2H0", "L2 mlp")):
        alone = path_patch(found.model, found.pair, sender=sender, receiver=receiver, metric=METRIC)
        cell = grid.values.sel(sender=sender, receiver=receiver).values
        np.testing.assert_allclose(cell, alone.values.values[:, 0], atol=1e-5)
    for sender, receiver in (("L1H0", "L1H5.v"), ("L2H1", "L1KV0.k"), ("L1 mlp", "L1 mlp"), ("L3H0", "L0 mlp")):
        assert np.isnan(grid.values.sel(sender=sender, receiver=receiver)).all()
    assert not np.isnan(grid.values.sel(sender="L0H0", receiver="L0 mlp")).any()


def test_a_group_is_its_heads_together_and_not_one_of_them():
    found = models(2)
    options = {"sender": (0, 3), "metric": METRIC}
    group = path_patch(found.model, found.pair, receiver=(1, KV(1), "k"), **options).values
    heads = path_patch(found.model, found.pair, receiver=[(1, head, "k") for head in (4, 5, 6, 7)], **options).values
    one = path_patch(found.model, found.pair, receiver=(1, 4, "k"), **options).values
    np.testing.assert_allclose(group.values, heads.values, atol=1e-5)
    assert np.abs(group.values - one.values).max() > 1e-5


@pytest.mark.parametrize("mlps", ["frozen", "free"])
def test_total_is_patching_and_the_parts_close(mlps):
    found = models(2)
    receiver = "heads.q, heads.k, heads.v"
    grid = path_patch(
        found.model,
        found.pair,
        sender="L2H1, L3H4, L2 mlp",
        receiver=receiver,
        metric=METRIC,
        decompose=True,
        mlps=mlps,
    ).effects
    patched = avl.patch(found.model, found.pair, over="head", at=found.pair.clean.spans.all, metric=METRIC).effects
    np.testing.assert_allclose(grid.sel(sender="L2H1", receiver="total"), patched.sel(layer=2, head=1), atol=1e-5)
    parts = grid.sel(receiver=["direct", "joint", "remainder"]).sum("receiver")
    np.testing.assert_allclose(parts, grid.sel(receiver="total"), atol=1e-6)
    last = grid.sel(sender="L3H4")  # after the last layer's heads only the MLP is left
    assert np.isnan(last.sel(receiver="joint")).all()
    if mlps == "free":
        np.testing.assert_allclose(last.sel(receiver="direct"), last.sel(receiver="total"), atol=1e-5)
        assert float(np.abs(last.sel(receiver="remainder")).max()) < 1e-5
        # What head 2.1 and its layer's MLP do besides passes layer 3's heads: all of it is named here.
        assert float(np.abs(grid.sel(sender="L2H1", receiver="remainder")).max()) < 0.2 * float(
            np.abs(grid.sel(sender="L2H1", receiver="total")).max()
        )
    else:
        assert float(np.abs(last.sel(receiver="remainder")).max()) > 1e-4


def test_a_run_sent_into_itself_changes_nothing():
    found = models(2)
    same = avl.Pair(clean=found.pair.clean, corrupt=found.pair.clean)
    for receiver in ("logits", "heads.k", "mlps"):
        grid = path_patch(found.model, same, receiver=receiver, metric=METRIC)
        assert float(np.abs(grid.effects).max()) < 1e-5


def test_positions_say_where_heads_send():
    found = models(2)
    options = {"sender": "heads", "metric": METRIC}
    grids = {at: path_patch(found.model, found.pair, at=at, **options).effects for at in (None, "generation", "audio")}
    np.testing.assert_allclose(grids[None], grids["generation"], atol=1e-6)  # logits are read at the last position
    assert float(np.abs(grids["audio"]).max()) == 0.0


def test_answers_of_several_tokens():
    found = models(2)
    metric = logit_diff(Answer("dog", ((70, 71),)), Answer("cat", ((75, 76),)))
    total, one = (
        path_patch(
            found.model, found.pair, sender=(1, 2), receiver=(2, 3, "v"), metric=metric, decompose=True
        ).values.sel(receiver=name)
        for name in ("total", "L2H3.v")
    )
    patched = avl.patch(found.model, found.pair, over="head", at=found.pair.clean.spans.all, metric=metric)
    np.testing.assert_allclose(total[:, 0], patched.values.sel(layer=1, head=2), atol=1e-5)
    base = measure(found.model, found.pair.corrupt, metric).numpy()
    assert np.abs(one.values[:, 0] - base).max() > 1e-6


def test_several_layouts_keep_their_order():
    found = models(2)
    separate = [found.model.encode(tiny_clip(1.0, seed=seed), "What?", sound="separate") for seed in (0, 1)]
    pairs = [found.pair[:1], avl.Pair(clean=separate[0], corrupt=separate[1]), found.pair[1:]]
    grid = path_patch(found.model, pairs, sender=(1, 2), receiver=(2, "mlp"), metric=METRIC)
    for i, pair in enumerate(pairs):
        alone = path_patch(found.model, pair, sender=(1, 2), receiver=(2, "mlp"), metric=METRIC)
        np.testing.assert_allclose(grid.values[i], alone.values[0], atol=1e-5)
        np.testing.assert_allclose(grid.donor[i], alone.donor[0], atol=1e-5)


def test_words_name_the_same_ends_as_tuples():
    spec = models(2).model.spec
    for word, given in (("L5H1.q", (2, 1, "q")), ("L2KV1.v", (2, KV(1), "v")), ("L3 mlp", (3, "mlp"))):
        word = word.replace("L5", "L2")
        assert list(receivers(word, spec).values()) == list(receivers(given, spec).values())
    assert list(senders("L1H2 + L2 mlp", spec, ())) == ["L1H2 + L2 mlp"]
    assert list(senders("heads", spec, ()))[:9] == [*(f"L0H{h}" for h in range(8)), "L1H0"]
    assert list(senders("spans", spec, ("audio", "video"))) == ["embed audio", "embed video"]
    assert list(receivers({"keys": [(1, 0, "k"), (2, 0, "k")], "logits": "logits"}, spec)) == ["keys", "logits"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sender": (1, 9)}, InterventionError, r"head 9 of z is out of range: it has 8 heads"),
        ({"sender": (4, 0)}, InterventionError, r"layer 4 is past the end"),
        ({"sender": "L1X2"}, InputError, r"'L1X2' is no sender\. Write 'L3H2'"),
        ({"sender": (1, 2, "q")}, InputError, r"L1H2\.q is no sender"),
        ({"sender": ("embed", "smell")}, InputError, r"smell"),
        ({"receiver": (1, 2)}, InputError, r"L1H2 is no receiver: say through which input"),
        ({"receiver": (1, KV(0), "q")}, InputError, r"key-value heads have no queries"),
        ({"receiver": (1, KV(5), "k")}, InterventionError, r"key-value heads \(0 to 1\)"),
        ({"receiver": [(1, KV(0), "k"), (1, 2, "k")]}, InputError, r"L1H2\.k is named twice"),
        ({"receiver": ["logits", (1, "mlp")]}, InputError, r"'logits' cannot be patched together"),
        ({"receiver": {}}, InputError, r"no receiver is named"),
        ({"sender": (3, 0), "receiver": (2, 1, "q")}, InputError, r"nothing can pass: no receiver \(L2H1\.q\)"),
        ({"via": [(2, 1, "q"), (1, 1, "q")]}, InputError, r"the hop L1H1\.q does not come after L2H1\.q"),
        ({"via": "logits"}, InputError, r"'logits' is no hop"),
        ({"decompose": True}, InputError, r"leave out via and 'logits'"),
        ({"mlps": "thawed"}, InputError, r"unknown mlps= 'thawed'"),
        ({"norms": "free"}, InputError, r"unknown norms= 'free'"),
        ({"direction": "restore"}, InputError, r"unknown direction 'restore'"),
        ({"at": "smell"}, InputError, r"smell"),
        ({"metric": lambda logits: logits[:, -1, 0] * np.nan}, InputError, r"NaN or infinite on the run without edits"),
        ({"metric": lambda logits: logits.sum()}, InputError, r"one number for the whole batch"),
    ],
)
def test_what_cannot_be_is_refused_with_words(options, error, text):
    found = models(2)
    with pytest.raises(error, match=text):
        path_patch(found.model, found.pair, **{"metric": METRIC, "sender": (0, 1)} | options)


def test_an_interrupted_matrix_keeps_what_is_done():
    found = models(2)

    def stop(stage, done, total):
        if done >= 8:
            raise KeyboardInterrupt

    grid = path_patch(found.model, found.pair, receiver=(3, "mlp"), metric=METRIC, budget_gb=1e-5, progress=stop)
    assert "interrupted" in grid.partial
    done = np.isfinite(grid.values.values[0].ravel())
    assert done[:8].all()
    assert not done[16:].any()
