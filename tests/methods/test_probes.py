"""Probes: what they read is what a cache holds; a sound that is there is found, a picture is not taken for it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_av import small_clip, small_inputs, small_model

import av_lens as avl
from av_lens.core import run
from av_lens.core.readings import pooled_streams
from av_lens.errors import InputError, InterventionError
from av_lens.methods.probes import Streams, at_chosen_layer, probe, read_streams
from av_lens.results.dealing import Member

NAMES = ("dog", "cat", "car", "bell")


def made(n: int = 40, *, seed: int = 0, shared: int = 0) -> Streams:
    """Layer 0: noise. Layer 1: the sound at span "audio". Layer 2: the picture there, and the clip's own mark."""
    rng = np.random.default_rng(seed)
    labels = [(NAMES[i % 4], NAMES[(i + 1 + i // 4 % 3) % 4]) for i in range(n)]
    clips = [(f"s{i}", f"p{i}") for i in range(n)]
    clips[n - shared :] = [("s0", f"p{i}") for i in range(n - shared, n)]
    members = tuple(Member(str(i), *clip, label[0]) for i, (clip, label) in enumerate(zip(clips, labels, strict=True)))
    vectors = 0.1 * rng.normal(size=(n, 2, 3, 2, 10))
    streams = Streams(vectors, ("audio", "question"), ("va", "av"), members, tuple(labels), "made")
    for i in range(n):
        for number, cell in enumerate(("va", "av")):
            vectors[i, number, 1, 0, NAMES.index(streams.label(i, cell, "sound"))] += 1
            vectors[i, number, 2, 0, NAMES.index(streams.label(i, cell, "picture"))] += 1
    return streams


def test_a_cells_labels_and_sources():
    streams = made()
    assert [streams.label(0, cell, what) for cell in ("va", "av") for what in ("sound", "picture")] == [
        "dog", "cat", "cat", "dog",
    ]  # fmt: skip
    assert [streams.source(3, cell, what) for cell in ("va", "av") for what in ("sound", "picture")] == [
        "s3", "p3", "p3", "s3",
    ]  # fmt: skip


@pytest.mark.parametrize(("target", "layer"), [("sound", 1), ("picture", 2)])
def test_what_is_there_is_read_where_it_is(target, layer):
    grid = probe(None, made(), target=target, c=1.0)
    accuracy = grid.mean().sel(figure="accuracy")
    assert float(accuracy.sel(span="audio", layer=layer)) == 1.0
    assert float(accuracy.sel(span="question").max()) < 0.5
    assert float(accuracy.sel(span="audio", layer=0)) < 0.5
    assert float(grid.mean().sel(figure="control").max()) < 0.5
    np.testing.assert_allclose(
        grid.values.sel(figure="selectivity"), grid.values.sel(figure="accuracy") - grid.values.sel(figure="control")
    )
    assert grid.provenance["chosen"]["audio"] == layer
    kept = at_chosen_layer(grid)
    np.testing.assert_array_equal(kept.values.sel(span="audio"), grid.values.sel(span="audio", layer=layer))
    assert kept.values.dims == ("example", "span", "figure")


def test_on_conflicts_the_picture_is_not_the_sound():
    """Layer 2 holds the picture alone; reading the sound from it gives what the picture's class alone gives."""
    grid = probe(None, made(240), target="sound")
    picture_only = grid.mean().sel(span="audio", layer=2)
    assert float(picture_only.sel(figure="accuracy")) < 0.5
    one_cell = made(240)
    agreeing = dataclasses.replace(one_cell, labels=tuple((a, NAMES[NAMES.index(a) - 1]) for a, _ in one_cell.labels))
    vectors = np.array(agreeing.vectors)
    for i in range(240):
        vectors[i, 0, 2, 0] = np.eye(10)[NAMES.index(agreeing.label(i, "va", "picture"))]
    told = dataclasses.replace(agreeing, vectors=vectors[:, :1], cells=("va",))
    grid = probe(None, told, target="sound")
    assert float(grid.mean().sel(span="audio", layer=2, figure="accuracy")) == 1.0
    assert float(grid.mean().sel(span="audio", layer=2, figure="other alone")) == 1.0  # and the control says why


def test_halves_share_no_clip():
    streams = made(shared=8)
    grid = probe(None, streams)
    tested, learnt = (
        {clip for i in ids for clip in (streams.members[int(i)].sound_clip, streams.members[int(i)].picture_clip)}
        for ids in (grid.provenance["conflicts"], grid.provenance["discovery"])
    )
    assert not tested & learnt
    assert len(grid.values) == len(grid.provenance["conflicts"])
    assert len(set(grid.clusters)) <= len(grid.values)
    again = probe(None, streams)
    np.testing.assert_array_equal(grid.values, again.values)


def test_a_class_that_was_never_learnt_is_not_measured():
    streams = made()
    confirmation = [int(i) for i in probe(None, streams).provenance["conflicts"]]
    labels = list(streams.labels)
    labels[confirmation[0]] = ("whale", "shark")
    grid = probe(None, dataclasses.replace(streams, labels=tuple(labels)))
    tested = grid.provenance["conflicts"]
    assert grid.provenance["not_learnt"] == 2
    assert np.isnan(grid.values.sel(figure="accuracy")[tested.index(str(confirmation[0]))]).all()
    assert np.isfinite(grid.values.sel(figure="accuracy")).sum() == (len(tested) - 1) * 6


@pytest.mark.parametrize("layout", ["in_video", "separate"])
def test_pooled_streams_are_means_of_the_cache(layout):
    model, x = small_model(), small_inputs((0, 1), sound=layout)
    found = pooled_streams(model, x, ("audio", "question|generation"))
    assert found.shape == (2, 5, 2, 64)
    with torch.no_grad():
        cache = run(model, x, capture=["resid_pre", "resid_post"]).cache
    for number, span in enumerate(("audio", "question|generation")):
        where = list(x.spans[span])
        for layer in range(4):
            torch.testing.assert_close(found[:, layer, number], cache["resid_pre", layer][:, where].mean(1))
        torch.testing.assert_close(found[:, 4, number], cache["resid_post", 3][:, where].mean(1))


def conflicts(n: int) -> list[avl.Conflict]:
    return [
        avl.Conflict(
            sound=small_clip(2 * i), picture=small_clip(2 * i + 1), question="What?",
            answers=([NAMES[i % 2], "one"], [NAMES[2 + i % 2], "other"]),
        )
        for i in range(n)
    ]  # fmt: skip


def test_conflicts_become_streams_in_order():
    model, listed = small_model(), conflicts(16)
    streams = read_streams(model, listed, at=("audio", "generation"), stack=5)
    assert streams.vectors.shape == (16, 2, 5, 2, 64)
    for i in (0, 7, 15):
        for number, cell in enumerate(("va", "av")):
            x = listed[i].cells(model)[cell]
            wanted = pooled_streams(model, x, ("audio", "generation"))[0]
            np.testing.assert_allclose(streams.vectors[i, number], wanted, atol=1e-5)
    assert streams.labels[1] == ("cat", "bell")
    grid = probe(model, streams, draws=1)
    assert grid.values.shape == (8, 2, 5, 4)
    assert grid.metric == "probe of the sound"


def test_refusals():
    model = small_model()
    with pytest.raises(InputError, match=r"unknown target 'sond'\. Did you mean 'sound'"):
        probe(None, made(), target="sond")
    with pytest.raises(InputError, match="unknown conflict cell 'vv'"):
        probe(model, conflicts(16), cells=("va", "vv"))
    with pytest.raises(InputError, match="3 conflicts, 4 spans and 2 cells: probes need 16 conflicts"):
        probe(model, conflicts(3))
    with pytest.raises(InputError, match="c is the inverse of a penalty"):
        probe(None, made(), c=0.0)
    with pytest.raises(InterventionError, match="the probe names no position"):
        probe(model, conflicts(16), at="image")
    with pytest.raises(InputError, match=r"halves that share no clip hold \d+ and \d+ conflicts \(\d+ given up\)"):
        probe(None, made(16, shared=15))
    one = dataclasses.replace(made(), labels=(("dog", "dog"),) * 40)
    with pytest.raises(InputError, match="the discovery half has one class of sound only"):
        probe(None, one)
    own = dataclasses.replace(made(), labels=tuple((f"a{i}", f"b{i}") for i in range(40)))
    with pytest.raises(InputError, match="no class of sound is in both halves"):
        probe(None, own)
    broken = dataclasses.replace(made(), vectors=np.full((40, 2, 3, 2, 10), np.nan))
    with pytest.raises(InputError, match="the model's own run is broken"):
        probe(None, broken)
    with pytest.raises(InputError, match="at_chosen_layer takes the grid that probe returned"):
        at_chosen_layer(at_chosen_layer(probe(None, made())))
