"""More nodes than are measured: who is chosen by gradients, and that all else stays as it is."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
from fake_model import FakeModel, bench_of, fake_conflicts, isolated

from av_lens.errors import BudgetError, ProtocolError
from av_lens.isolation.measuring.effects import ESTIMANDS
from av_lens.isolation.measuring.engine import MLP, PRIMARY_DONORS
from av_lens.isolation.naming import evidence, roles, screen
from av_lens.isolation.naming.evidence import with_means
from av_lens.isolation.naming.roles import run_tests
from av_lens.replay.traces import Trace

N, DELTA = 44, 0.7
GATE, WRITER, OPPONENT, CARRIERS = (0, 1), (2, 0), (2, 1), {(0, 0), (1, 0)}


@contextmanager
def small_limits():
    """Measure 8 of the 15 nodes: 5 by AtP*, 3 by what carriers are told by."""
    with pytest.MonkeyPatch.context() as patched:
        for module, name, value in ((roles, "ALL_NODES", 8), (screen, "ALL_NODES", 8), (screen, "BY_ATP", 5)):
            patched.setattr(module, name, value)
        patched.setattr(screen, "BY_CARRYING", 3)
        yield


@pytest.fixture
def few():
    with small_limits():
        yield


def chunks_of(model, n=16, site="suffix"):
    chunks = bench_of(model, fake_conflicts(n)).chunks(range(n), site)
    with_means(chunks)
    return chunks


def test_guesses_are_first_order_effects_and_atp_star_averages_what_passes_each_dropped_layer():
    (chunk,) = chunks_of(FakeModel(noise=0.0))
    found = {name: values.mean(0) for name, values in screen._guessed(chunk).items()}
    zero = np.zeros((3, 5))
    # The model is linear: a plain guess is exact. Of the gate's two drops one takes its only way, through L1H0.
    zero[GATE], zero[WRITER], zero[OPPONENT], zero[0, 0] = 3 / 2, 6, 2, -4
    for donor in PRIMARY_DONORS:
        assert found[donor] == pytest.approx(zero, abs=1e-5), donor
    carried = np.zeros((3, 5))
    carried[0, 0], carried[1, 0] = 4, 3
    assert found["carries"] == pytest.approx(carried, abs=1e-5)
    # silenced: blank_a's own z less blank_muted's, in `va`, where the gate shuts L1H0 as before
    assert found["silenced"][1, 0] == pytest.approx(3, abs=1e-5)


def test_suppressors_come_by_atp_star_and_carriers_fill_up(few):
    chunks = chunks_of(FakeModel())
    chosen = screen.screen(screen.guesses(chunks, np.arange(16)), chunks[0].bench.nodes)
    # By sign: 6, 2, 1.5, then 0; by size L0H0's -4 is second.
    assert list(chosen.items())[:4] == [
        (WRITER, "AtP* (rank 1)"), ((0, 0), "size of AtP* (rank 2)"), (OPPONENT, "AtP* (rank 2)"),
        (GATE, "AtP* (rank 3)")]  # fmt: skip
    assert len(chosen) == 8
    assert chosen[1, 0] == "guess of carries (rank 2)"
    assert all(head != MLP for _, head in list(chosen)[5:])


def test_the_best_rank_on_any_screen_counts_and_ties_go_by_layer_and_head():
    one, two = np.array([[5.0, 1.0, np.nan]]), np.array([[0.0, 9.0, 3.0]])
    ranked = screen.best_ranked({"one": one, "two": two}, [(0, 0), (0, 1), (0, 2)])
    assert list(ranked.items()) == [((0, 0), "one (rank 1)"), ((0, 1), "two (rank 1)"), ((0, 2), "two (rank 2)")]


def test_a_stack_whose_gradients_do_not_fit_is_halved(monkeypatch):
    (chunk,) = chunks_of(FakeModel())
    whole, real, sizes = screen._guessed(chunk), Trace.gradients, list[int]()

    def small(self, *given, **options):
        sizes.append(self.batch)
        if self.batch > 4:
            raise BudgetError("too large")
        return real(self, *given, **options)

    monkeypatch.setattr(Trace, "gradients", small)
    again = screen._guessed(chunk)
    assert sizes[:3] == [16, 8, 4]
    for name, values in whole.items():
        assert again[name] == pytest.approx(values, abs=1e-5)


@pytest.fixture(scope="module")
def whole():
    return isolated(FakeModel(), fake_conflicts(N), s=0.1, quick=True, named_only=True)


@pytest.fixture(scope="module")
def found():
    with small_limits():
        return isolated(FakeModel(), fake_conflicts(N), s=0.1, named_only=True)


def test_the_exact_figures_and_the_family_are_those_of_a_run_without_a_screen(whole, found):
    assert found.protocol["family"] == whole.protocol["family"]
    key = "discovery/suffix/release/{}".format
    for donor in PRIMARY_DONORS:
        mine, all_ = found.arrays[key(donor)], whole.arrays[key(donor)]
        known = ~np.isnan(mine)
        assert known.any(0).sum() == 8
        assert np.array_equal(mine[known], all_[known])
    names = ["layer", "head", "role", "donor"]
    suppress = [one.heads[one.heads["role"].isin(roles.RELEASING)] for one in (found, whole)]
    assert suppress[0][names].to_numpy().tolist() == suppress[1][names].to_numpy().tolist()
    assert {*zip(suppress[0]["layer"], suppress[0]["head"], strict=True)} == {GATE, WRITER, OPPONENT}
    for column in ("q", "effect", "discovery_p", "p_holm"):
        assert suppress[0][column].to_numpy() == pytest.approx(suppress[1][column].to_numpy()), column
    family = found.protocol["family"]
    assert suppress[0]["p_maxt"].to_numpy() == pytest.approx(
        np.minimum(1, family * suppress[0]["discovery_p"].to_numpy())
    )


def test_the_reasons_say_what_was_not_measured_and_what_power_it_costs(found, whole):
    (note,) = [one for one in found.reasons if "screen" in one]
    assert note.startswith("Of 15 nodes a screen by gradients chose 8 at suffix; the others were not measured")
    assert "Stopped early, as futile: 3 at 25% of discovery, 0 at 50% of discovery" in note
    assert "which is the power lost" in note
    assert not any("screen" in one for one in whole.reasons)


def test_members_tell_which_guess_chose_them(found):
    members = found.members[found.members["chosen"]]
    assert {*zip(members["layer"], members["head"], strict=True)} == {GATE, WRITER, OPPONENT}
    assert sorted(members["screen"]) == ["AtP* (rank 1)", "AtP* (rank 2)", "AtP* (rank 3)"]


def test_a_futile_node_keeps_the_figures_of_its_look_passes_nothing_and_stays_a_candidate(found):
    release = found.arrays["discovery/suffix/release/zero"]
    measured = (~np.isnan(release)).sum(0)
    n = int(found.summary["n discovery"])
    assert sorted(set(measured.ravel().tolist())) == [0, -(-n // 4), n]
    assert measured[GATE] == measured[WRITER] == measured[0, 0] == n
    stopped = {(layer, head) for layer, head in zip(*np.nonzero(measured == -(-n // 4)), strict=True)}
    assert len(stopped) == 3
    pairs = {(*row[:2],) for row in found.synergies[["layer", "head"]].to_numpy().tolist()}
    pairs |= {(*row,) for row in found.synergies[["layer2", "head2"]].to_numpy().tolist()}
    assert stopped & pairs


def test_a_stopped_node_has_p_1_in_every_test():
    rng, n = np.random.default_rng(0), 30
    figures = {(one.name, one.donor): rng.normal(3, 1, (n, 2, 3)) for one in ESTIMANDS}
    half = roles.Half("discovery", np.arange(n), list(range(n)), _boot(n), np.ones(n), np.zeros(n))
    found = roles.Evidence(figures, half, mlps=True)
    before = run_tests(found, s=0.1, family=50, seed=0)
    after = run_tests(dataclasses.replace(found, stopped=((0, 1),)), s=0.1, family=50, seed=0)
    assert before.release_p["zero"][0, 1] < 0.01
    assert after.release_p["zero"][0, 1] == 1
    assert after.p["gate", "zero"][0, 1] == 1
    assert np.array_equal(after.release_p["zero"][1], before.release_p["zero"][1])


def _boot(n):
    from av_lens.results.statistics import Bootstrap

    return Bootstrap.draw(list(range(n)), [f"s{i}" for i in range(n)], [f"p{i}" for i in range(n)], seed=0)


def test_looks_are_a_quarter_a_quarter_and_half_in_the_order_of_the_hash():
    ids = [f"c{i}" for i in range(10)]
    parts = screen.looks_of(np.arange(100, 110), ids, seed=3)
    assert [len(part) for part in parts] == [3, 2, 5]
    assert sorted(np.concatenate(parts).tolist()) == list(range(100, 110))
    hashes = [screen.rank_hash(3, ids[i - 100]) for i in np.concatenate(parts)]
    assert hashes == sorted(hashes)


def test_nodes_stop_only_where_no_figure_can_reach_delta():
    n, rng = 40, np.random.default_rng(0)
    values = {(one.name, one.donor): np.zeros((n, 1, 5)) + rng.normal(0, 0.1, (n, 1, 5)) for one in ESTIMANDS}
    values["release", "zero"][:, 0, 1] += 1.5  # above delta, which is 1
    values["carries", "blank_muted"][:, 0, 2] += 1.0
    values["silenced", "blank_a - blank_muted"][:, 0, 3] += 5.0
    values["release", "mean_other"][:] = np.nan  # as at media sites
    half = roles.Half("discovery", np.arange(n), list(range(n)), _boot(n), np.full(n, 10.0), np.zeros(n))
    found = roles.Evidence(values, half, mlps=True)
    assert screen.futile(found, found.nodes, s=0.1) == [(0, 0), (0, MLP)]


def test_power_lost_by_stopping_is_the_chance_that_a_found_effect_looks_futile():
    family, rng = 500, np.random.default_rng(0)
    assert 0 < screen.power_lost(family) < 1e-4
    # An effect so small that the bound is not next to 0, simulated: 120 conflicts, family 1.
    beyond = (1.6449 + 0.8416) / np.sqrt(120)
    x = beyond + rng.normal(size=(20000, 120))
    means = [x[:, :30].mean(1), x[:, :60].mean(1)]
    stops = (means[0] + 1.96 / np.sqrt(30) < 0) | (means[1] + 1.96 / np.sqrt(60) < 0)
    assert 0 < stops.mean() <= screen.power_lost(1)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_the_bound_of_a_high_percentile_holds_in_19_of_20_draws(draw):
    rng = np.random.default_rng(0)
    every = getattr(rng, draw)(size=(400, 612))
    held = [screen.upper_bound(rng.permutation(row)[:64], 99) >= np.percentile(row, 99) for row in every]
    largest = [rng.permutation(row)[:64].max() >= np.percentile(row, 99) for row in every]
    assert np.mean(held) >= 0.93
    assert np.mean(largest) < 0.7  # what no order statistic does


def test_the_null_of_many_nodes_is_measured_on_drawn_ones(few):
    chunks = chunks_of(FakeModel())
    hearing = np.full(16, 7.0)
    bench = chunks[0].bench
    drawn = screen.drawn_nodes(bench.nodes, 0)
    assert len(drawn) == 8
    assert drawn == sorted(drawn, key=bench.nodes.index)
    assert drawn != screen.drawn_nodes(bench.nodes, 1)
    all_ = evidence.null_share(chunks, np.arange(16), hearing)
    part = evidence.null_share(chunks, np.arange(16), hearing, [(1, 1), (0, 0), (0, 2), (1, 2), (2, 2), (2, 3)])
    assert 0.9 < all_ < 8 / 7 < part  # L1H1 answers whatever else is asked, 8 logits


def test_decoding_is_no_site_of_the_search():
    with pytest.raises(ProtocolError, match=r"'generated' is what decoding adds.*captions alone \(captions=True\)"):
        isolated(FakeModel(), fake_conflicts(N), sites=("suffix", "generated"))
