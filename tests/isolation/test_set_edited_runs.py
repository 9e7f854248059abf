"""Runs that start from an edited run equal runs of the whole set, by restarts and by plain hooks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import letter, tiny_hf_model, tiny_media, tiny_processor

from av_lens.core.readings import attention_mass
from av_lens.inputs import Conflict
from av_lens.isolation.measuring.bench import Bench, averaged
from av_lens.isolation.measuring.donors import Means, joined
from av_lens.isolation.measuring.engine import LATER as LATER_MLPS
from av_lens.isolation.measuring.engine import MLP, ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.sets.members import in_context
from av_lens.isolation.sets.search import video_attention
from av_lens.isolation.sets.sets import BuiltSet, SetReleases, release_of_sets
from av_lens.media import Clip
from av_lens.model import load
from av_lens.results.statistics import Bootstrap

ANSWERS = [letter(name) for name in "abcd"]
N = 3


def clip(seed):
    frames, waveform = tiny_media(2.0, seed=seed)
    return Clip.from_arrays(frames=frames, times=np.arange(len(frames)) / 2.0, waveform=waveform, rate=16000)


@pytest.fixture(scope="module")
def chunks():
    model = load(hf_model=tiny_hf_model(seed=1), processor=tiny_processor())
    conflicts = [
        Conflict(
            sound=clip(2 * i),
            picture=clip(2 * i + 1),
            question="What?",
            answers=(ANSWERS[i], ANSWERS[i + 1]),
            third=clip(100 + i),
            see="Who is it?",
            id=f"c{i}",
        )
        for i in range(N)
    ]
    found = {}
    for how in ("trace", "hooks"):
        bench = Bench(ModelEngine(model, how=how), conflicts, Candidates.of(conflicts, model.tokenizer))
        (found[how],) = bench.chunks(range(N))
        found[how].means = Means.over([found[how]])
    return found


@pytest.mark.parametrize("how", ["trace", "hooks"])
def test_at_media_positions_nothing_is_direct(chunks, how):
    """No head's write at the audio reaches the asked position but through later heads (the first edition asks)."""
    bench = chunks[how].bench
    (chunk,) = Bench(bench.engine, bench.conflicts, bench.candidates, site="audio", mlps=False).chunks(range(N))
    boot = Bootstrap.draw(range(N), list("abc"), list("def"), seed=0)
    half = Half("discovery", np.arange(N), list(range(N)), boot, np.ones(N), np.zeros(N))
    built = BuiltSet(((0, 1), (1, 2)), "blank_muted", 0.0)
    found = in_context([chunk], half, built, s=0.1, family=10, seed=0).evidence
    np.testing.assert_allclose(found["direct", "blank_muted"][:, [0, 1], [1, 2]], 0, atol=2e-5)
    assert np.abs(found["release", "blank_muted"][:, [0, 1], [1, 2]]).max() > 1e-4
    sets = [built.members, built.members[1:]]
    whole = release_of_sets([chunk], sets, ["blank_muted"] * 2, np.arange(N)).release
    np.testing.assert_allclose(found["release", "blank_muted"][:, 0, 1], whole[0] - whole[1], atol=2e-5)


def z_of(chunk, heads, donor="blank_muted"):
    return chunk.z("va", heads, donor)


def logits_of(chunk, run, plans):
    return [one.logits for one in chunk.bench.engine.changed(run, plans)]


UNDER = [(0, 1), (1, MLP), (2, 0)]
LATER = [(0, 3), (1, 1), (2, 1), (3, 3), (0, MLP), (1, 2), (2, MLP)]


@pytest.mark.parametrize("how", ["trace", "hooks"])
def test_a_further_edit_equals_the_edit_of_all(chunks, how):
    chunk = chunks[how]
    engine, run = chunk.bench.engine, chunk.run("va")
    edited = engine.record_edited(run, z_of(chunk, UNDER))
    assert (getattr(edited.trace, "own", None) is not None) is (how == "trace")
    sets = [UNDER, *([*UNDER, head] for head in LATER)]
    whole = logits_of(chunk, run, [run.plan(z_of(chunk, heads)) for heads in sets])
    torch.testing.assert_close(edited.logits, whole[0], atol=1e-5, rtol=0)
    again = logits_of(chunk, edited, [edited.plan(z_of(chunk, [head])) for head in LATER])
    for one, two in zip(again, whole[1:], strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
        assert (one - edited.logits).abs().max() > 1e-3


def test_restarts_and_hooks_agree_on_runs_edited_twice_and_frozen(chunks):
    """A head edited over two further layers of edits; frozen means: at the edited run's own."""
    found = {}
    for how, chunk in chunks.items():
        engine = chunk.bench.engine
        once = engine.record_edited(chunk.run("va"), z_of(chunk, UNDER))
        twice = engine.record_edited(once, z_of(chunk, [(1, 2)], "zero"))
        frozen = logits_of(chunk, once, [once.plan(z_of(chunk, [head]), freeze=True) for head in LATER])
        plans = [twice.plan(z_of(chunk, [(2, 3)])), twice.plan(z_of(chunk, [(1, 3)]), freeze=True)]
        plans += [twice.plan(z_of(chunk, [(1, 3)]), freeze=True, mlps=LATER_MLPS)]
        plans += [twice.plan(z_of(chunk, [(1, 3)]), mlps=(2, 3))]
        again = logits_of(chunk, twice, plans)
        found[how] = [
            once.parts["z"],
            once.parts["mlp_out"],
            once.final,
            twice.parts["z"],
            twice.logits,
            *frozen,
            *again,
        ]
    for one, two in zip(found["trace"], found["hooks"], strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)
    assert (found["trace"][-2] - found["trace"][-3]).abs().max() > 1e-4  # MLPs make something of a write
    by_head = dict(zip(LATER, found["trace"][5:12], strict=True))
    free = logits_of(chunk, once, [once.plan(z_of(chunk, [head])) for head in LATER])
    assert (by_head[0, 3] - free[0]).abs().max() > 1e-4  # an early head also acts through later ones
    torch.testing.assert_close(by_head[3, 3], free[3], atol=2e-5, rtol=0)  # the last layer's head does not


@pytest.mark.parametrize("how", ["trace", "hooks"])
def test_a_head_named_again_takes_the_new_value(chunks, how):
    chunk = chunks[how]
    engine, run = chunk.bench.engine, chunk.run("va")
    edited = engine.record_edited(run, z_of(chunk, UNDER))
    (one,) = logits_of(chunk, edited, [edited.plan(z_of(chunk, [(2, 0)], "zero"))])
    (two,) = logits_of(chunk, run, [run.plan(z_of(chunk, UNDER[:-1]) | z_of(chunk, [(2, 0)], "zero"))])
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize("donor", ["blank_muted", "zero"])
def test_releases_of_sets_are_those_of_whole_edits(chunks, donor):
    chunk, heads = chunks["trace"], [(0, 1), (1, 0), (1, 2), (1, MLP), (3, 3)]
    releases = SetReleases([chunk], np.arange(N), donor)
    releases.pairs(heads)
    releases.added(heads[:2], [(1, 2), (0, 0)])
    sets = [*itertools.combinations(heads, 2), (*heads[:2], (1, 2)), (*heads[:2], (0, 0)), tuple(heads)]
    whole = release_of_sets([chunks["hooks"]], sets, [donor] * len(sets), np.arange(N)).release
    np.testing.assert_allclose([releases.each(one) for one in sets], whole, atol=2e-5)
    assert np.abs(whole).max() > 1e-2
    assert (releases.each(()) == 0).all()


def test_the_last_measurement_is_not_made_again(chunks):
    counted = []
    releases = SetReleases([chunks["trace"]], np.arange(N), "zero", counted.append)
    releases.added((), [(0, 0), (0, 1)])
    releases.added((), [(0, 1), (0, 0)])
    releases.measure([((0, 0),)])
    assert counted == [2, 2]  # va and av


def test_a_member_in_context_loses_what_the_set_loses_without_it(chunks):
    members = ((1, 0), (0, 1), (3, 3), (2, MLP))
    boot = Bootstrap.draw(range(N), list("abc"), list("def"), seed=0)
    half = Half("discovery", np.arange(N), list(range(N)), boot, np.ones(N), np.zeros(N))
    for donor in ("blank_muted", "zero"):
        built = BuiltSet(members, donor, 0.0)
        found = in_context([chunks["trace"]], half, built, s=0.1, family=10, seed=0).evidence
        sets = [members, *(tuple(other for other in members if other != head) for head in members)]
        whole = release_of_sets([chunks["hooks"]], sets, [donor] * 5, np.arange(N)).release
        for number, (layer, head) in enumerate(members):
            loss = whole[0] - whole[1 + number]
            np.testing.assert_allclose(found["release", donor][:, layer, head], loss, atol=2e-5)
        np.testing.assert_allclose(found["direct", donor][:, 3, 3], found["release", donor][:, 3, 3], atol=2e-5)
        for key in ("reads picture", "reads sound", ("fall of G", donor), ("rise over others", donor)):
            values = found[key]
            assert not np.isnan(values[:, 1, 0]).any()
            assert np.isnan(values[:, 2, 2]).all()
        write = found["write", donor]
        assert np.abs(write[:, 1, 0] - found["direct", donor][:, 1, 0]).max() > 1e-4


def test_the_screen_by_attention_is_the_generation_positions_own(chunks):
    chunk = chunks["trace"]
    found = averaged([chunk], "attention to the video", video_attention)
    model, inputs = chunk.bench.engine.model, chunk.run("va").inputs
    mass = attention_mass(model, inputs, {"g": [len(inputs.spans) - 1]})[:, :, :, 0]
    video = mass[..., inputs.spans["video"].positions.tolist()].sum(-1).mean(0)
    np.testing.assert_allclose(found[:, :-1], video.numpy(), atol=1e-6)
    assert np.isnan(found[:, MLP]).all()


def test_stacks_of_different_sizes_are_joined_from_the_end():
    parts = [torch.zeros(1, 3, 5, 2, 2), torch.ones(1, 2, 4, 2, 2)]
    assert joined(parts).shape == (1, 5, 4, 2, 2)
