"""What a run will cost, said beforehand: the arithmetic by hand, the prices from a probe, 30% on av-tiny."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from fake_model import N_LAYERS, FakeModel, bench_of, fake_conflicts, isolated

from av_lens.isolation.measuring import store
from av_lens.isolation.running import cost
from av_lens.isolation.running.cost import Estimate, Prices, Size, expected, probe, works

SIZE = Size(conflicts=10, discovery=5, confirmation=5, heads=4, layers=2)


class Timed(FakeModel):
    """The fake model, 40 ms a cell of a stack and 20 ms an edit of a stack, by the clock of these tests."""

    clock = 0.0

    def run_with_hooks(self, x, fwd_hooks=(), **options):
        recorded = sum(name.endswith("hook_z") for name, _ in fwd_hooks) >= N_LAYERS
        Timed.clock += 0.04 if recorded else 0.02
        return super().run_with_hooks(x, fwd_hooks, **options)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that only the timed model and looks at it move: a microsecond each."""

    def monotonic():
        Timed.clock += 1e-6
        return Timed.clock

    for module in (cost, store):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))


def bench(model, n=8):
    return bench_of(model, fake_conflicts(n))


def test_behaviour_is_fourteen_cells_a_conflict():
    assert works(SIZE)["behaviour"].cells == 14 * 10
    assert expected(Prices(cell=2, edit=0, figure=0), SIZE).parts["behaviour"] == 280


def test_effects_are_the_requests_of_every_head_in_a_cell_and_its_mirror():
    work = works(SIZE)["effects"]
    # On discovery all 4 heads (of many 64), a quarter of them whole; on confirmation the named ones, all of each.
    whole, of_all = 2 * len(cost.requests()), 2 * len(cost.OF_ALL)
    discovered = 0.75 * of_all + 0.25 * whole
    assert work.edits == discovered * 4 * 5 + whole * 4 * 5
    many = Size(conflicts=10, discovery=5, confirmation=5, heads=100, layers=2)
    assert works(many)["effects"].edits == discovered * 64 * 5 + whole * cost.NAMED * 5
    assert "screen" in works(many)
    assert "screen" not in works(SIZE)
    two = Size(conflicts=10, discovery=5, confirmation=5, heads=4, layers=2, sites=2)
    assert works(two)["effects"].edits == 2 * work.edits


def test_quick_leaves_pairs_and_robustness_out_of_the_price():
    prices = Prices(cell=0.01, edit=0.001, figure=0.001)
    many = dict(conflicts=120, discovery=60, confirmation=60, heads=64, layers=8)
    whole, quick = expected(prices, Size(**many)), expected(prices, Size(**many, quick=True))
    assert "robustness" in whole.parts
    assert "robustness" not in quick.parts
    # 64 x 63 / 2 pairs, three donors, a cell and its mirror, 60 conflicts
    assert works(Size(**many))["sets"].edits - works(Size(**many, quick=True))["sets"].edits >= 2016 * 3 * 2 * 60 / 2
    assert quick.seconds < whole.seconds


def test_a_line_with_time_and_memory():
    line = str(Estimate({"behaviour": 20.0, "sets": 400.0}, 1.25))
    assert line == (
        "Estimate: about 7.0 min (behaviour 20 s, sets 6.7 min), and 1.2 GB of memory, if there is something to search "
        "for."
    )
    assert "memory" not in str(Estimate({"behaviour": 20.0}, float("nan")))
    assert str(Estimate({"sets": 7200.0}, float("nan"))).startswith("Estimate: about 2.0 h (sets 2.0 h)")


def test_a_probe_prices_cells_and_edits_by_the_conflict():
    chunk = bench(Timed()).chunks(range(8))[0]
    prices = probe(chunk)
    assert prices.cell == pytest.approx(0.04 / 8, rel=1e-3)
    assert prices.edit == pytest.approx(0.02 / 8, rel=1e-3)
    assert prices.figure > 0


def test_the_estimate_is_made_once_for_a_folder(tmp_path):
    made = cost.estimated(bench(Timed()).chunks(range(8)), SIZE, folder=tmp_path, key="a")
    again = cost.estimated(bench(FakeModel()).chunks(range(8)), SIZE, folder=tmp_path, key="a")
    assert again == made
    other = cost.estimated(bench(FakeModel()).chunks(range(8)), SIZE, folder=tmp_path, key="b")
    assert other.seconds < made.seconds
    assert json.loads((tmp_path / "estimate.json").read_text())["key"] == "b"
    assert made.gigabytes > 0.1


def test_the_probe_changes_no_number():
    conflicts = fake_conflicts(44)
    options = {"s": 0.1, "quick": True}
    engine = FakeModel(writer=0.0, gate=0.0, opponent=0.0)
    lines: list[str] = []
    told = isolated(engine, conflicts, told=lines.append, **options)
    assert any(line.startswith("Estimate: about") for line in lines)
    untold = isolated(engine, conflicts, **options)
    assert told.behaviour.equals(untold.behaviour)
    assert np.array_equal(told.arrays["discovery/G"], untold.arrays["discovery/G"])
