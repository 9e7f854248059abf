"""Groups, MLPs, attentions and layers: sums on paper, joint edits, and restarts that equal hooked runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import FakeModel, fake_conflicts
from tiny import letter, tiny_hf_model, tiny_media, tiny_processor

from av_lens.errors import ProtocolError
from av_lens.families.decoder import hook_name
from av_lens.inputs import Conflict
from av_lens.isolation.explaining import units as units_file
from av_lens.isolation.explaining.units import K_AND_V, Asked, unit_rows, units_of
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.measuring.effects import FIGURES, Request, edited_readings, measure_requests
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.media import Clip
from av_lens.model import load
from av_lens.results.record import table
from av_lens.results.statistics import Bootstrap

N = 12
WORDS = [letter(name) for name in "abcd"]


def half_of(n, g):
    boot = Bootstrap.draw(range(n), [f"s{i}" for i in range(n)], [f"p{i}" for i in range(n)], seed=0, draws=100)
    return Half("discovery", np.arange(n), list(range(n)), boot, np.full(n, g), np.full(n, -4.0))


def chunks_of(engine, conflicts, site="suffix"):
    bench = Bench(engine, list(conflicts), Candidates.of(conflicts, engine.model.tokenizer), site=site)
    chunks = bench.chunks(range(len(conflicts)))
    for chunk in chunks:
        chunk.means = Means.over(chunks)
    return chunks


def bench_of(model, conflicts):
    return Bench(ModelEngine(model), list(conflicts), Candidates.of(conflicts, model.tokenizer))


@pytest.fixture(scope="module")
def on_paper():
    rows = unit_rows(chunks_of(ModelEngine(FakeModel(noise=0.0)), fake_conflicts(N)), half_of(N, 7.0), site="suffix")
    return table("units", rows)


def value(frame, unit, layer, index, estimand, donor, column="mean"):
    found = frame.query("unit == @unit and layer == @layer and index == @index")
    found = found[(found["estimand"] == estimand) & (found["donor"] == donor)]
    assert len(found) == 1
    return found[column].iloc[0]


def test_joint_effects_are_the_sums_on_paper(on_paper):
    # L2H0 writes the picture (6), L2H1 against the sound (2): they share keys in this model.
    assert value(on_paper, "kv group", 2, 0, "release", "zero") == pytest.approx(8, abs=1e-4)
    assert value(on_paper, "kv group", 2, 1, "release", "zero") == pytest.approx(0, abs=1e-4)
    assert value(on_paper, "attention", 2, -1, "release", "blank_muted") == pytest.approx(8, abs=1e-4)
    assert value(on_paper, "kv group", 2, 0, "release", "zero", "share") == pytest.approx(8 / 7, abs=1e-4)
    # L0H0 carries the sound (4), L0H1 is the gate (3): without both, 3 is gained and 4 lost.
    assert value(on_paper, "kv group", 0, 0, "release", "blank_muted") == pytest.approx(-1, abs=1e-4)
    assert value(on_paper, "kv group", 0, 0, "carries", "blank_muted") == pytest.approx(4, abs=1e-4)
    assert value(on_paper, "attention", 1, -1, "carries", "blank_muted") == pytest.approx(3, abs=1e-4)
    # What writer and opponent do in the conflict, put into the blank picture: 8 of 7 are gone.
    assert value(on_paper, "attention", 2, -1, "sufficiency", "va") == pytest.approx(8, abs=1e-4)
    assert value(on_paper, "kv group", 0, 0, "sufficiency", "va") == pytest.approx(3, abs=1e-4)


def test_keys_and_values_of_which_nothing_comes_have_no_effect(on_paper):
    assert set(on_paper["unit"]) == {"kv group", "attention", "layer"}  # MLPs are nodes
    nothing = on_paper[on_paper["estimand"] == K_AND_V]
    assert (nothing["mean"] == 0).all()
    assert value(on_paper, "layer", 2, -1, "release", "zero") == pytest.approx(8, abs=1e-4)
    assert (on_paper["n"] == N).all()


def clip(seed):
    frames, waveform = tiny_media(2.0, seed=seed)
    return Clip.from_arrays(frames=frames, times=np.arange(len(frames)) / 2.0, waveform=waveform, rate=16000)


@pytest.fixture(scope="module")
def model():
    return load(hf_model=tiny_hf_model(seed=1), processor=tiny_processor())


@pytest.fixture(scope="module")
def conflicts():
    return [
        Conflict(
            sound=clip(2 * i), picture=clip(2 * i + 1), question="What?", see="Who is it?", id=f"c{i}",
            answers=(WORDS[i % 4], WORDS[(i + 1) % 4]),
        )
        for i in range(4)
    ]  # fmt: skip


def measured(engine, conflicts, units, wanted, site="suffix"):
    (chunk,) = chunks_of(engine, conflicts, site)
    return units_file._chunk_units(chunk, units, wanted)["margin"].transpose(1, 2, 0)


ASKED = [
    Asked("release", "va", "blank_muted"),
    Asked("release", "va", "mean_other"),
    Asked("sufficiency", "blank_a", "va", -1),
    Asked(K_AND_V, "va", "blank_muted", keys_and_values=True),
    Asked(K_AND_V, "va", "mean_other", keys_and_values=True),
    Asked(K_AND_V, "va", "zero", keys_and_values=True),
]


def test_restarts_equal_full_hooked_runs(model, conflicts):
    units = [unit for unit in units_of(bench_of(model, conflicts)) if unit.layer == 1]
    assert [unit.kind for unit in units] == ["kv group", "kv group", "attention", "layer"]
    one, two = (measured(ModelEngine(model, how=how), conflicts, units, ASKED) for how in ("trace", "hooks"))
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert np.nanmin(np.abs(one).max(-1)) > 1e-4, "a unit changed nothing"
    assert np.isnan(one).all(-1).sum() == 3 * 2  # K and V are a group's alone


def test_a_group_is_the_joint_edit_of_its_heads(model, conflicts):
    engine = ModelEngine(model)
    unit = next(
        unit
        for unit in units_of(bench_of(model, conflicts))
        if (unit.kind, unit.layer, unit.index) == ("kv group", 2, 1)
    )
    assert unit.nodes == ((2, 2), (2, 3))
    (chunk,) = chunks_of(engine, conflicts)
    found = measured(engine, conflicts, [unit], ASKED[:1])[0, 0]
    changes = []
    for cell in ("va", "av"):
        (read,) = edited_readings(chunk, cell, [[(2, 2), (2, 3)]], ["blank_muted"])
        before = chunk.reading(cell).scores
        changes.append(chunk.bench.candidates.margin(read.scores - before, chunk.examples))
    np.testing.assert_allclose(found, 0.5 * (changes[0] - changes[1]), atol=1e-5)


def test_k_and_v_of_a_group_by_hooks_of_ones_own(model, conflicts):
    engine = ModelEngine(model)
    unit = next(
        unit
        for unit in units_of(bench_of(model, conflicts))
        if (unit.kind, unit.layer, unit.index) == ("kv group", 1, 0)
    )
    found = measured(engine, conflicts[:1], [unit], ASKED[3:4])[0, 0, 0]
    candidates = Candidates.of(conflicts[:1], model.tokenizer)
    changes = []
    for cell in ("va", "av"):
        x, donor = (conflicts[0].cells(model)[name] for name in (cell, "blank_muted"))
        site = x.spans.suffix.positions.tolist()
        kept = {}

        def keep(name, kept=kept):
            return lambda activation, hook=None: kept.update({name: activation.clone()})

        def put(name, kept=kept, site=site):
            def fn(activation, hook=None):
                new = activation.clone()
                new[:, site, 0] = kept[name][:, site, 0]
                return new

            return fn

        names = [hook_name(part, 1) for part in ("k", "v")]
        with torch.no_grad():
            model.run_with_hooks(donor, fwd_hooks=[(name, keep(name)) for name in names])
            after = model.run_with_hooks(x, fwd_hooks=[(name, put(name)) for name in names])[:, -1]
            before = model(x)[:, -1]
        row = np.array([0])
        changes.append(candidates.margin(candidates.scores(after, row) - candidates.scores(before, row), row))
    np.testing.assert_allclose(found, 0.5 * (changes[0] - changes[1])[0], atol=1e-5)


# The engine, on the same model.


def test_every_figure_by_restart_and_by_hooks(model, conflicts):
    wanted = [Request("va", "audio_only"), Request("va", "blank_muted"), Request("va", "blank_muted", freeze=True)]
    heads = [(1, 0), (2, 3)]
    found = []
    for how in ("trace", "hooks"):
        chunks = chunks_of(ModelEngine(model, how=how), conflicts)
        found.append(measure_requests(chunks, wanted, heads=heads, examples=np.arange(4)))
    for request in wanted:
        for figure in FIGURES:
            one, two = (getattr(each[request], figure) for each in found)
            np.testing.assert_allclose(one, two, atol=1e-4)
            assert np.nanmax(np.abs(one)) > 1e-5


def test_audio_alone_is_laid_on_from_the_end_where_ids_are_equal(model, conflicts):
    (chunk,) = chunks_of(ModelEngine(model), conflicts)
    own, alone = chunk.run("va"), chunk.run("audio_only")
    donor = chunk.donor("va", "audio_only")
    ids = [run.inputs.ids[0].tolist()[::-1] for run in (own, alone)]
    k = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), len(ids[1]))
    k = min(k, donor.shape[2])
    assert k > 2
    torch.testing.assert_close(donor[:, :, -k:], alone.at_site("z")[:, :, -k:])
    torch.testing.assert_close(donor[:, :, :-k], own.at_site("z")[:, :, : donor.shape[2] - k])
    # In the mirrored conflict it is the picture's clip that is heard alone.
    mirrored = chunk.donor("av", "audio_only")
    x = model.encode(conflicts[0].cells(model).clip("vv"), "What?", sound="separate", picture=None)
    recording = chunk.bench.engine.record(x, x.spans.suffix.positions)
    torch.testing.assert_close(mirrored[:, 0, -k:], recording.at_site("z")[:, 0, -k:], atol=1e-5, rtol=0)


class Sinking(ModelEngine):
    """Two media positions get nearly all of the suffix's attention."""

    def incoming(self, inputs):
        mass = np.ones((len(inputs), len(inputs.spans)))
        mass[:, inputs.spans.media.positions[[1, 4]]] = 1000.0
        return mass


def test_sinks_are_a_site_of_media_positions(model, conflicts):
    found = {}
    for how in ("trace", "hooks"):
        engine = Sinking(model, how=how)
        bench = Bench(engine, list(conflicts), Candidates.of(conflicts, model.tokenizer))
        with pytest.raises(ProtocolError, match=r"the site 'sinks' names no position of this prompt: no media"):
            bench.chunks(range(4), "sinks")
        bench.find_sinks(range(4))
        (chunk,) = bench.chunks(range(4), "sinks")
        recording = chunk.run("va")
        media = recording.inputs.spans.media.positions
        assert len(media) > 10
        assert recording.site.tolist() == media[[1, 4]].tolist()
        wanted = [Request("va", "blank_muted"), Request("va", "blank_muted", freeze=True)]
        found[how] = measure_requests([chunk], wanted, heads=[(0, 1), (1, 2)], examples=np.arange(4))
        for donor, why in (("mean_other", "needs discovery's means"), ("audio_only", "undefined at media positions")):
            with pytest.raises(ProtocolError, match=why):
                chunk.donor("va", donor)
    for request in found["trace"]:
        one, two = (found[how][request].margin for how in ("trace", "hooks"))
        np.testing.assert_allclose(one, two, atol=1e-4)
        # What a head writes at a sink reaches the answer through later heads only.
        changed = np.nanmax(np.abs(one))
        assert changed < 1e-5 if request.freeze else changed > 1e-5
