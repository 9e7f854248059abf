"""Section 4's further figures on the model that is worked out on paper: parts, frozen norm, repair, audio alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_model import N_HEADS, N_LAYERS, FakeModel, fake_conflicts, isolated

from av_lens.errors import ProtocolError
from av_lens.isolation.measuring import effects as estimands
from av_lens.isolation.measuring.behaviour import survey
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.measuring.effects import Estimand, Request, direct_writes, figures, measure_requests, requests
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.measuring.store import Store
from av_lens.isolation.naming.evidence import gather, null_share, search
from av_lens.isolation.naming.roles import adjust, family_size, run_tests, run_tests_together
from av_lens.isolation.sets.sets import CONTROLS, controls, release_of_sets
from av_lens.results.dealing import DISCOVERY
from av_lens.results.statistics import Bootstrap

N = 24
HEADS = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
GATE, WRITER, OPPONENT = (0, 1), (2, 0), (2, 1)


class Normed(FakeModel):
    """The same model with a final norm: logits are the stream over its root mean square, times 10."""

    norm = (10.0, 0.0)


def benched(engine, folder=None):
    listed = fake_conflicts(N)
    listed = [
        one if i == 0 else replace(one, third=next(o.sound for o in listed if o.answers[0] not in one.answers))
        for i, one in enumerate(listed)
    ]
    store = Store() if folder is None else Store(folder, "a run")
    return Bench(engine, listed, Candidates.of(listed, engine.model.tokenizer), store=store)


def found_of(model):
    bench = benched(ModelEngine(model))
    chunks = bench.chunks(range(N))
    means = Means.over(chunks)
    for chunk in chunks:
        chunk.means = means
    effects = measure_requests(chunks, requests(), heads=HEADS, examples=np.arange(N))
    return chunks, figures(effects)


@pytest.fixture(scope="module")
def linear():
    return found_of(FakeModel(noise=0.0))[1]


@pytest.fixture(scope="module")
def normed():
    return found_of(Normed(noise=0.0))


def at(of, estimand, donor, head):
    values = of[estimand, donor][:, head[0], head[1]]
    np.testing.assert_allclose(values, values[-1], atol=1e-4)
    return values[-1]


def test_parts_on_the_two_answers(linear):
    # Six answers: what is taken off one of them, 6, lowers the mean of all by 1.
    assert at(linear, "release on sound", "blank_muted", WRITER) == pytest.approx(1, abs=1e-4)
    assert at(linear, "release on picture", "blank_muted", WRITER) == pytest.approx(-5, abs=1e-4)
    assert at(linear, "release on sound", "zero", OPPONENT) == pytest.approx(2 - 2 / 6, abs=1e-4)
    assert at(linear, "release on picture", "zero", OPPONENT) == pytest.approx(-2 / 6, abs=1e-4)
    for donor in ("blank_muted", "mean_other", "zero"):
        for name in ("release", "direct"):
            parts = [linear[f"{name} on {answer}", donor] for answer in ("sound", "picture")]
            np.testing.assert_allclose(parts[0] - parts[1], linear[name, donor], atol=1e-5)


def test_a_new_estimand_with_a_new_donor_is_one_row(monkeypatch):
    """All else follows from the list: what is run, the mirror of a cell as donor, the figure, rows and arrays."""
    new = Estimand("hears another", "vv", Request("va", "vv"))
    monkeypatch.setattr(estimands, "ESTIMANDS", (*estimands.ESTIMANDS, new))
    assert Request("va", "vv") in requests()
    engine = ModelEngine(FakeModel(noise=0.0))
    engine.everything = True
    chunks = benched(engine).chunks(range(N))
    for chunk in chunks:
        chunk.means = Means.over(chunks)
    of = [(0, 0), WRITER]
    found = gather(chunks, half_of(DISCOVERY), of, site="suffix", s=0.1, family=1, seed=0)
    # The carrier says the other sound: 4 fall on one answer and rise on the other. The writer sees the same picture.
    assert at(found.evidence.figures, "hears another", "vv", (0, 0)) == pytest.approx(-8, abs=1e-4)
    assert at(found.evidence.figures, "hears another", "vv", WRITER) == pytest.approx(0, abs=1e-4)
    rows = [row for row in found.rows(DISCOVERY) if row["estimand"] == "hears another"]
    assert [(row["layer"], row["head"], row["donor"]) for row in rows] == [(0, 0, "vv"), (2, 0, "vv")]
    assert rows[0]["mean"] == pytest.approx(-8, abs=1e-4)
    assert "suffix/hears another/vv" in found.arrays()


def test_repair_is_direct_minus_total(linear):
    assert at(linear, "direct", "blank_muted", GATE) == pytest.approx(0, abs=1e-4)
    assert at(linear, "repair", "blank_muted", GATE) == pytest.approx(-3, abs=1e-4)
    assert at(linear, "repair", "blank_muted", WRITER) == pytest.approx(0, abs=1e-4)


def test_audio_alone_is_a_donor_without_a_picture(linear):
    assert at(linear, "release", "audio_only", WRITER) == pytest.approx(6, abs=1e-4)
    assert at(linear, "release", "audio_only", GATE) == pytest.approx(3, abs=1e-4)
    # It heard the same sound: a carrier's output stays. In the mirror it is the other sound's.
    assert at(linear, "release", "audio_only", (0, 0)) == pytest.approx(0, abs=1e-4)


def test_a_linear_read_out_has_nothing_to_freeze(linear):
    for name, donor in linear:
        if (f"{name} (norm frozen)", donor) in linear:
            np.testing.assert_allclose(linear[f"{name} (norm frozen)", donor], linear[name, donor], atol=1e-5)


def test_with_the_norm_frozen_zeroing_takes_away_exactly_what_was_written(normed):
    chunks, of = normed
    shares = direct_writes(chunks, np.arange(N))
    # Only the gate acts on later heads; L1H0 is silenced here and writes nothing.
    for head in (WRITER, OPPONENT, (0, 0)):
        where = (slice(None), *head)
        np.testing.assert_allclose(of["release (norm frozen)", "zero"][where], -shares[where], atol=1e-4)
        assert np.abs(of["release", "zero"][where] + shares[where]).min() > 0.05
    direct = of["direct (norm frozen)", "blank_muted"]
    np.testing.assert_allclose(
        of["repair (norm frozen)", "blank_muted"], direct - of["release (norm frozen)", "blank_muted"]
    )


def test_with_the_norm_frozen_effects_add_up(normed):
    chunks, _ = normed
    chunk = chunks[0]
    recording = chunk.run("va")
    engine, tokens = chunk.bench.engine, chunk.bench.candidates.tokens
    base = engine.linear_logits(recording, recording.final, tokens)
    torch.testing.assert_close(base, recording.logits[:, tokens])
    one, two = torch.randn(2, *recording.final.shape, generator=torch.Generator().manual_seed(0))
    changes = [engine.linear_logits(recording, recording.final + d, tokens) - base for d in (one, two, one + two)]
    torch.testing.assert_close(changes[0] + changes[1], changes[2])


# What is measured once is not run again.


def half_of(name, n=N):
    boot = Bootstrap.draw(range(n), [f"s{i}" for i in range(n)], [f"p{i}" for i in range(n)], seed=0, draws=200)
    return Half(name, np.arange(n), list(range(n)), boot, np.full(n, 7.0), np.full(n, -4.0))


def searched(engine, folder, sites=("suffix",), floor=None):
    bench = benched(engine, folder)
    survey(bench.chunks(range(N)), N)
    half = half_of(DISCOVERY)
    found = search(bench, half, s=0.1, floor=floor, sites=sites, seed=0, family=family_size(12, len(sites), 3))
    rows = controls(bench.chunks(range(N)), [WRITER], "zero", half=half)
    return found, rows


def test_a_second_search_over_the_same_store_runs_nothing(tmp_path):
    first, again = FakeModel(), FakeModel()
    one, rows = searched(ModelEngine(first), tmp_path, floor=0.03)
    two, same = searched(ModelEngine(again), tmp_path, floor=0.03)
    assert first.runs > 100
    assert again.runs == 0
    assert rows == same
    assert len(rows) == len(CONTROLS)
    assert one.named == two.named
    assert one.s == two.s
    for key, values in one.first.arrays().items():
        np.testing.assert_array_equal(values, two.first.arrays()[key])


# The threshold of other models: protocol section 5.


def test_the_null_is_the_99th_percentile_over_nodes_of_the_largest_release_under_control():
    class Distracted(FakeModel):
        """Asked for the colour, head L1H2 says the picture's answer, from the picture and always on: 5."""

        def _heads(self, one):
            z = super()._heads(one)
            if one.question == "colour" and one.picture is not None:
                z = z.clone()
                z[1, 2, one.picture] += 5
            return z

    bench = benched(ModelEngine(Distracted(noise=0.0)))
    chunks = bench.chunks(range(N))
    for chunk in chunks:
        chunk.means = Means.over(chunks)
    found = null_share(chunks, np.arange(N), np.full(N, 7.0))
    # Under control L1H1 writes 8 and L1H2 5 to the picture's answer, all other heads nothing.
    largest = np.array([0.0] * 13 + [5.0, 8.0])
    assert found == pytest.approx(np.percentile(largest, 99) / 7, abs=1e-4)
    plain = benched(ModelEngine(FakeModel(noise=0.0))).chunks(range(N))
    assert null_share(plain, np.arange(N), np.full(N, 7.0)) == pytest.approx(0.86 * 8 / 7, abs=1e-4)  # of 15 nodes


# The family of tests: protocol section 7.


def test_q_counts_every_site_that_was_asked_for(tmp_path):
    found, _ = searched(ModelEngine(FakeModel()), None)
    tests = [found.first.tests]
    n = family_size(12, 1, 3)
    one, release_one = adjust(tests, family=n)
    twice, release_twice = adjust(tests * 2, family=2 * n)
    asked, _ = adjust(tests, family=2 * n)
    role = ("picture writer", "zero")
    # The same tests at two sites: every rank and the family double. One of two sites missing: only the family does.
    np.testing.assert_allclose(twice[0][role], one[0][role])
    np.testing.assert_allclose(release_twice[1]["zero"], release_one[0]["zero"])
    np.testing.assert_allclose(asked[0][role], np.minimum(2 * one[0][role], 1), atol=0.05)
    at_writer = asked[0][role][2, 0] / one[0][role][2, 0]
    assert at_writer == pytest.approx(2)


def test_max_t_is_over_all_sites_that_were_searched():
    found, _ = searched(ModelEngine(FakeModel()), None)
    rng = np.random.default_rng(0)
    sites = [
        replace(
            one,
            figures=one.figures
            | {("release", donor): rng.normal(1, 2, values.shape) for donor, values in one.by_donor("release").items()},
        )
        for one in 2 * [found.first.evidence]
    ]
    alone = run_tests(sites[0], s=0.1, family=200, seed=0)
    both, _ = run_tests_together(sites, s=0.1, family=200, seed=0)
    np.testing.assert_array_equal(both.release_p["zero"], alone.release_p["zero"])
    assert (both.release_p_maxt["zero"] >= alone.release_p_maxt["zero"]).all()
    assert (both.release_p_maxt["zero"] > alone.release_p_maxt["zero"]).any()


# Sinks.


class Sinking(ModelEngine):
    """Position 0, the video, gets a share of the suffix's attention that the test chooses."""

    share = 1.0

    def incoming(self, inputs):
        mass = np.ones((len(inputs), 4))
        mass[:, 0] = self.share
        return mass


def test_without_sinks_the_site_is_left_out_and_said(tmp_path):
    found, _ = searched(Sinking(FakeModel()), None, sites=("suffix", "sinks"))
    assert list(found.sites) == ["suffix"]
    assert found.notes[0].startswith("the site 'sinks' was not searched: no media position gets 10 times")
    with pytest.raises(ProtocolError, match=r"the site 'sinks' was not searched.*no other site was asked for"):
        searched(Sinking(FakeModel()), None, sites=("sinks",))


def test_a_run_of_the_sinks_alone_looks_for_them_before_it_is_refused():
    engine = Sinking(FakeModel())
    engine.share = 1.0
    with pytest.raises(ProtocolError, match=r"the site 'sinks' was not searched.*no other site was asked for"):
        isolated(FakeModel(), fake_conflicts(48), engine=engine, s=0.1, sites=("sinks",))


# A conflict that lacks an edit.


def test_a_stack_without_third_clips_has_no_effect_of_a_w_cell():
    bench = benched(ModelEngine(FakeModel()))
    lone = bench.chunks([0])[0]  # the one conflict without a third clip
    assert torch.isnan(lone.donor("va", "wa")).all()
    assert not torch.isnan(lone.donor("va", "vv")).any()


def test_an_edit_that_a_conflict_lacks_is_no_answer_and_no_harm():
    class Lacking(ModelEngine):
        def changed(self, recording, plans):
            for one in super().changed(recording, plans):
                logits = one.logits.clone()
                logits[0] = torch.nan  # as where a mean leaves every other conflict out
                yield replace(one, logits=logits)

    chunks = benched(Lacking(FakeModel())).chunks(range(N))
    effect = release_of_sets(chunks, [[WRITER]], ["zero"], np.arange(N))
    first = [int(chunk.examples[0]) for chunk in chunks]
    assert np.isnan(effect.says_sound[0, first]).all()
    assert int(np.isnan(effect.says_sound).sum()) == len(first)
    for row in controls(chunks, [WRITER], "zero", half_of(DISCOVERY)):
        assert row["n"] == N - len(first), row["control"]


def test_the_mean_of_many_bfloat16_outputs_is_their_mean():
    bench = benched(ModelEngine(FakeModel()))
    means = Means.over(bench.chunks(range(N)))
    exact = means.donor("va", means.sound[:1], means.picture[:1])
    means._kept.update({key: z.bfloat16() for key, z in means._kept.items()})
    rounded = means.donor("va", means.sound[:1], means.picture[:1])
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-8, atol=1e-3)


def test_what_is_run_where_a_release_may_be_large_names_whom_everything_names(tmp_path):
    """The same rows, p and q as of a run of all figures for all nodes; the others' shares are not measured."""
    few, whole = ModelEngine(FakeModel(noise=0.3)), ModelEngine(FakeModel(noise=0.3))
    whole.everything = True
    one, all_of_it = (searched(engine, tmp_path / name)[0] for engine, name in ((few, "few"), (whole, "whole")))
    assert [replace(row, p_maxt=0.0) for row in one.named] == [replace(row, p_maxt=0.0) for row in all_of_it.named]
    assert {row.at for row in one.named} >= {GATE, WRITER, OPPONENT}
    here, there = one.first.evidence, all_of_it.first.evidence
    small = ~np.isnan(there["direct", "zero"]).all(0) & np.isnan(here["direct", "zero"]).all(0)
    assert small.any()
    assert not any(small[node] for node in (GATE, WRITER, OPPONENT))
    assert (there.largest_release[small] < there.half.delta(one.s)).all()
    for key, values in here.figures.items():
        known = ~np.isnan(values)
        np.testing.assert_allclose(values[known], there.figures[key][known], atol=1e-5, err_msg=str(key))
    for name in ("reads picture", "sufficiency", "silenced", "carries"):
        assert (np.isnan(here[name]) == np.isnan(there[name])).all()
