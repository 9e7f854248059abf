"""The engine on a tiny random Qwen2.5-Omni: restarts equal hooked runs, and identities that no weights can break."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from organism_conflicts import drawn_conflicts
from tiny import letter, tiny_hf_model, tiny_media, tiny_processor

from av_lens.errors import ProtocolError
from av_lens.inputs import Conflict
from av_lens.inputs.conflict import clip_key
from av_lens.isolation import isolate
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.measuring.effects import Request, direct_writes, edited_readings, measure_requests
from av_lens.isolation.measuring.engine import LATER, MLP, ModelEngine
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.media import Clip
from av_lens.model import load

ANSWERS = [letter(name) for name in "abcd"]


def clip(seed):
    frames, waveform = tiny_media(2.0, seed=seed)
    return Clip.from_arrays(frames=frames, times=np.arange(len(frames)) / 2.0, waveform=waveform, rate=16000)


@pytest.fixture(scope="module")
def model():
    return load(hf_model=tiny_hf_model(seed=1), processor=tiny_processor())


@pytest.fixture(scope="module")
def conflicts():
    found = []
    for i in range(4):
        pair = (ANSWERS[i % 4], ANSWERS[(i + 1) % 4])
        third = clip(100 + i) if i != 2 else None
        found.append(
            Conflict(
                sound=clip(2 * i),
                picture=clip(2 * i + 1),
                question="What?",
                answers=pair,
                third=third,
                see="Who is it?",
                id=f"c{i}",
            )
        )
    return found


def bench_of(model, conflicts, how, site="suffix"):
    engine = ModelEngine(model, how=how)
    return Bench(engine, list(conflicts), Candidates.of(conflicts, model.tokenizer), site=site)


@pytest.fixture(scope="module")
def by_trace(model, conflicts):
    bench = bench_of(model, conflicts, "trace")
    (chunk,) = bench.chunks(range(4))
    chunk.means = Means.over([chunk])
    return chunk


@pytest.fixture(scope="module")
def by_hooks(model, conflicts):
    bench = bench_of(model, conflicts, "hooks")
    (chunk,) = bench.chunks(range(4))
    chunk.means = Means.over([chunk])
    return chunk


WANTED = [
    Request("va", "blank_muted"),
    Request("va", "mean_other"),
    Request("va", "zero", freeze=True),
    Request("va", "vw"),
    Request("blank_a", "va"),
    Request("va", "zero", freeze=True, mlps=LATER),
    Request("va", "blank_muted", mlps=(2, 3)),
]


def test_restarts_equal_full_hooked_runs(by_trace, by_hooks):
    heads = [(0, 1), (2, 3), (3, 0), (0, MLP), (2, MLP)]
    one = measure_requests([by_trace], WANTED, heads=heads, examples=np.arange(4))
    two = measure_requests([by_hooks], WANTED, heads=heads, examples=np.arange(4))
    for request in WANTED:
        a, b = one[request].margin, two[request].margin
        np.testing.assert_allclose(a, b, atol=1e-4)
        measured = ~np.isnan(a)
        assert measured.any()
        assert np.abs(a[measured]).max() > 1e-4, f"{request} changed nothing"
        assert not measured[:, 1].any()


def test_a_missing_third_clip_is_nan_for_that_conflict_alone(by_trace):
    found = measure_requests([by_trace], [Request("va", "vw")], heads=[(1, 0)], examples=np.arange(4))
    values = found[Request("va", "vw")].margin[:, 1, 0]
    assert np.isnan(values).tolist() == [False, False, True, False]


def test_a_cell_into_itself_changes_nothing(by_trace):
    engine = by_trace.bench.engine
    for cell in ("va", "blank_muted"):
        recording = by_trace.run(cell)
        own = recording.at_site("z")
        every = [(layer, head) for layer in range(4) for head in range(4)]
        z = {(layer, head): own[layer, :, :, head] for layer, head in every}
        plans = [*(recording.plan({head: z[head]}) for head in every), recording.plan(z)]
        for one in engine.changed(recording, plans):
            torch.testing.assert_close(one.logits, recording.logits, atol=1e-4, rtol=0)


def test_all_heads_from_another_cell_are_not_that_cell_but_zeroed_twice_is_once(by_trace):
    # Order within a set does not matter: z is replaced, not added.
    heads = [(1, 0), (1, 2), (3, 3)]
    one, two = edited_readings(by_trace, "va", [heads, heads[::-1]], ["zero", "zero"])
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)


def test_in_the_last_layer_the_direct_effect_is_the_whole_effect(by_trace):
    heads = [(3, head) for head in range(4)]
    free, frozen = Request("va", "blank_muted"), Request("va", "blank_muted", freeze=True)
    found = measure_requests([by_trace], [free, frozen], heads=heads, examples=np.arange(4))
    np.testing.assert_allclose(found[free].margin[:, 3], found[frozen].margin[:, 3], atol=1e-4)


def test_the_own_write_is_what_the_stream_and_the_final_norm_make_of_it(by_trace):
    """With all later heads and MLPs held, the stream that is read out moves by the write alone."""
    model, nodes = by_trace.bench.engine.model, [(0, 1), (2, 3), (1, MLP), (3, MLP)]
    wanted = Request("va", "zero", freeze=True, mlps=LATER)
    found = measure_requests([by_trace], [wanted], heads=nodes, examples=np.arange(4))[wanted].margin
    for node in nodes:
        change = []
        for cell in ("va", "av"):
            recording, (layer, head) = by_trace.run(cell), node
            own = recording.parts["mlp_out"][layer, :, -1]
            if head != MLP:
                own = recording.parts["z"][layer, :, -1, head] @ model.W_O[layer, head].detach()
            norm = model.ln_final.original_component
            with torch.no_grad():
                said = [norm(stream) @ model.W_U for stream in (recording.final, recording.final - own)]
            scores = [by_trace.bench.candidates.scores(logits, by_trace.examples) for logits in said]
            change.append(np.subtract(*(by_trace.bench.candidates.margin(s, by_trace.examples) for s in scores[::-1])))
        np.testing.assert_allclose(found[:, *node], 0.5 * (change[0] - change[1]), atol=1e-4)


def test_a_named_mlp_that_is_held_takes_what_passes_through_it(by_trace):
    """The last layer's head, its own layer's MLP held, is left with its write; an MLP before the head holds nothing."""
    free, write = Request("va", "zero"), Request("va", "zero", freeze=True, mlps=LATER)
    own, before = Request("va", "zero", mlps=(3,)), Request("va", "zero", mlps=(0, 1, 2))
    found = measure_requests([by_trace], [free, write, own, before], heads=[(3, 2)], examples=np.arange(4))
    found = {request: effect.margin[:, 3, 2] for request, effect in found.items()}
    np.testing.assert_allclose(found[own], found[write], atol=1e-4)
    np.testing.assert_allclose(found[before], found[free], atol=1e-6)
    assert np.abs(found[own] - found[free]).max() > 1e-4


def test_earlier_heads_have_an_indirect_part(by_trace):
    free, frozen = Request("va", "zero"), Request("va", "zero", freeze=True)
    found = measure_requests([by_trace], [free, frozen], heads=[(0, 0)], examples=np.arange(4))
    assert np.abs(found[free].margin[:, 0, 0] - found[frozen].margin[:, 0, 0]).max() > 1e-4


def test_direct_writes_are_the_heads_share_of_the_logit_difference(by_trace):
    # At the run's own norm scale the unembedding is linear: a share is what taking the write away would change.
    bench = by_trace.bench
    model = bench.engine.model
    shares = direct_writes([by_trace], np.arange(4))
    expected = np.zeros(4)
    norm = model.ln_final.original_component
    for sign, cell in ((0.5, "va"), (-0.5, "av")):
        recording = by_trace.run(cell)
        final = recording.final
        scale = (final.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        write = recording.parts["z"][2, :, -1, 1] @ model.W_O[2, 1].detach()
        change = (write / scale * norm.weight.detach()) @ model.W_U.detach()
        for i in range(4):
            a, v = (
                int(bench.candidates.ids[which[i], 0]) for which in (bench.candidates.sound, bench.candidates.picture)
            )
            expected[i] += sign * float(change[i, a] - change[i, v])
    np.testing.assert_allclose(shares[:, 2, 1], expected, atol=1e-4)


def test_mean_donors_leave_out_conflicts_that_share_an_answer(by_trace):
    # Answers go round in fours: of four conflicts exactly the opposite one shares none.
    z = by_trace.means.outputs("z", "va")
    candidates = by_trace.bench.candidates
    found = by_trace.means.donor("va", candidates.sound, candidates.picture)
    for i in range(4):
        torch.testing.assert_close(found[:, i], z[:, (i + 2) % 4])
    alone = by_trace.means.donor("va", candidates.sound[:1], candidates.sound[2:3])
    assert torch.isnan(alone).all()


def test_mean_other_is_aligned_from_the_end(by_trace):
    own = by_trace.run("va").at_site("z")
    other = by_trace.means.outputs("z", "see")
    assert other.shape[2] > own.shape[2]  # "Who is it?" is longer than "What?"
    donor = by_trace.donor("va", "mean_other")
    assert donor.shape == own.shape
    torch.testing.assert_close(donor[:, 0], other[:, 2, -own.shape[2] :])


def test_the_audio_site_has_no_mean_donor(model, conflicts):
    bench = bench_of(model, conflicts[:2], "trace", site="audio")
    (chunk,) = bench.chunks(range(2))
    chunk.means = None
    with pytest.raises(ProtocolError, match=r"the donor 'mean_other' needs discovery's means"):
        chunk.donor("va", "mean_other")
    found = measure_requests([chunk], [Request("va", "blank_muted")], heads=[(0, 0)], examples=np.arange(2))
    assert not np.isnan(found[Request("va", "blank_muted")].margin[:, 0, 0]).any()


def test_clips_are_named_by_content_or_by_file_and_window(tmp_path):
    one, two = clip(0), clip(1)
    assert clip_key(one) == clip_key(clip(0))
    assert clip_key(one) != clip_key(two)


@pytest.mark.slow
def test_the_whole_run_goes_through_on_random_weights_and_says_so(model):
    pairs = [(ANSWERS[i % 4], ANSWERS[(i + 1) % 4]) for i in range(40)]
    found = isolate(
        model,
        [
            Conflict(sound=clip(2 * i), picture=clip(2 * i + 1), question="What?", answers=p)
            for i, p in enumerate(pairs)
        ],
        gate="report",
        s=0.03,
    )
    assert "not interpretable" in found.stamps
    assert found.verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", ["av-tiny-planted", "av-tiny-balanced"])
def test_planted_heads_are_found_first_and_alone_and_a_balanced_model_names_none(name):
    from importlib.resources import files

    folder = files("av_lens") / "organism" / "checkpoints" / name
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{name} is not shipped yet")
    listed = [replace(one, id=None) for one in drawn_conflicts(48)]
    found = isolate(load(name), listed, gate="report")
    named = [(row.layer, row.head) for row in found.suppressors.itertuples()]
    if name == "av-tiny-balanced":
        assert named == []
        assert found.verdict_kind == "no suppression"
        return
    truth = {(head["layer"], head["head"]) for head in json.loads((folder / "planted.json").read_text())["heads"]}
    assert set(named) == truth
    largest = np.max([found.grid("release", donor) for donor in ("blank_muted", "mean_other", "zero")], axis=0)
    order = np.argsort(-largest.ravel())[: len(truth)]
    assert {(int(i) // found.n_heads, int(i) % found.n_heads) for i in order} == truth
