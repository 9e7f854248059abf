"""A run that is killed, interrupted or stopped goes on where it was, with the numbers of one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from disk_faults import KINDS, failing, kinds_at
from fake_model import FakeModel, fake_conflicts, isolated
from same_isolation import assert_same

from av_lens import whole_files
from av_lens.errors import AvLensError, ProtocolError, UnfinishedError
from av_lens.isolation.measuring import store
from av_lens.isolation.measuring.store import Measured, Store
from av_lens.isolation.running import durable
from av_lens.isolation.running.durable import deadline
from av_lens.isolation.running.preparing import hash_of
from av_lens.results.record import Isolation
from av_lens.results.statistics import Bootstrap

N = 44


class Killed(BaseException):
    """Nothing that is caught on the way."""


def run(out=None, *, model=None, n=N, **options):
    options = {"s": 0.1, "seed": 0, "quick": True} | options
    return isolated(model or FakeModel(), fake_conflicts(n), out=out, **options)


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Fewer draws of the bootstrap everywhere: they are not what is tested, and most of the time."""
    draw = Bootstrap.draw
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Bootstrap, "draw", lambda *conflicts, **more: draw(*conflicts, **({"draws": 100} | more)))
        yield


@pytest.fixture(scope="module")
def whole(few_draws):
    return run()


def short(out=None, **options):
    """A run that stops where there is nothing to explain: all cells are read, and no head is edited."""
    return run(out, model=options.pop("model", None) or FakeModel(writer=0.0, gate=0.0, opponent=0.0), **options)


@pytest.fixture(scope="module")
def brief(few_draws):
    return short()


def ended_after(seconds, work, number):
    """Do the work in a child process and send it a signal; how it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, number)
    return os.waitpid(child, 0)[1]


class Slow(FakeModel):
    """The fake model, a millisecond an edit, so that there is a middle to be killed in."""

    def run_with_hooks(self, *given, **options):
        time.sleep(1e-3)
        return super().run_with_hooks(*given, **options)


def kills(work, *, times, seconds, seed=0):
    """Kill -9 at random moments of what would take so many seconds; how often the run was still going."""
    moments = random.Random(seed)
    ends = [ended_after(moments.uniform(0.05, 1.0) * seconds, work, signal.SIGKILL) for _ in range(times)]
    return sum(os.WIFSIGNALED(status) for status in ends)


def test_killed_twice_and_resumed_it_has_the_same_numbers(whole, tmp_path):
    assert kills(partial(run, tmp_path, model=Slow()), times=2, seconds=1.5) == 2
    lines = []
    found = run(tmp_path, told=lines.append)
    assert_same(found, whole)
    assert_same(Isolation.load(tmp_path), whole)
    assert any(line.startswith("resumed: ") for line in lines)


@pytest.mark.slow
def test_sigterm_at_any_moment_leaves_every_file_whole(whole, tmp_path):
    """Twelve moments all over a run, each going on from the one before; the command's own handler is at work."""
    from av_lens.cli.main import _Stops

    def work():
        with _Stops() as stops:
            try:
                run(tmp_path / "out", model=Slow())
            except KeyboardInterrupt:
                os._exit(stops.code)

    moments, stopped = random.Random(1), 0
    for _ in range(12):
        status = ended_after(moments.uniform(0.05, 1.5), work, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(status) in (0, 143)
        stopped += os.waitstatus_to_exitcode(status) == 143
        assert not list((tmp_path / "out").rglob("*.part"))
        for path in (tmp_path / "out" / "measured").glob("*"):
            np.load(path).close()
        ledger = tmp_path / "out" / durable.LEDGER
        assert all(json.loads(line) for line in (ledger.read_text() if ledger.exists() else "").splitlines())
    assert stopped >= 4
    assert_same(run(tmp_path / "out"), whole)


MODES = ("half written", "not moved", "moved", "ledger")


class Fault:
    """Death at one file, as by kill -9: `os.replace` does no more from then on; "ledger" dies in the line after it."""

    def __init__(self, target=None, mode=""):
        self.target, self.mode = target, mode
        self.seen: list[str] = []
        self.passed = self.dead = False
        self.replace, self.append = os.replace, whole_files.append_line

    def __call__(self, source, place):
        name = os.path.basename(place)
        self.seen.append(name)
        hit = name == self.target and self.mode != "ledger"
        if self.dead or (hit and self.mode != "moved"):
            if self.mode == "half written" and not self.dead:
                left = Path(place).with_name(".left.0123456789ab.part")  # the dead clear nothing up
                left.write_bytes(Path(source).read_bytes()[: os.path.getsize(source) // 2])
            self.die()
        self.replace(source, place)
        self.passed |= name == self.target and self.mode == "ledger"
        if hit:
            self.die()

    def line(self, path, line, **more):
        if self.dead or self.passed:
            with path.open("a") as file:
                file.write("" if self.dead else line[: len(line) // 2])
            self.die()
        self.append(path, line, **more)

    def die(self):
        self.dead = True
        raise Killed

    @contextmanager
    def at_work(self):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(whole_files.os, "replace", self)
            patched.setattr(whole_files, "append_line", self.line)
            yield


def write_points(tmp_path):
    """Every file that a run writes, in order; the ledger goes with the others."""
    fault = Fault()
    with fault.at_work():
        run(tmp_path / "counted")
    return [name for name in dict.fromkeys(fault.seen) if name != durable.LEDGER]


def die_at_each(points, whole, folder):
    """One folder, a run that dies at each write in turn, each going on from the one before."""
    for target, mode in points:
        fault = Fault(target, mode)
        with fault.at_work():
            try:
                run(folder)
            except Killed:
                assert fault.dead
            else:  # after a record's files no line is appended
                assert mode == "ledger", (target, mode)
    assert_same(run(folder), whole)
    assert_same(Isolation.load(folder), whole)
    assert not list(folder.rglob("*.part"))
    assert len([json.loads(line) for line in (folder / durable.LEDGER).read_text().splitlines()]) == N


@pytest.mark.slow
def test_dying_at_a_write_loses_nothing(whole, tmp_path):
    points = write_points(tmp_path)
    assert {"protocol.json", "isolation.json", "arrays.npz"} < set(points)
    assert sum(name.startswith("head-effects-") for name in points) == 5  # va and blank_a on both halves; see
    chosen = [(name, MODES[place % 4]) for place, name in enumerate(points)][::19]
    assert {mode for _, mode in chosen} == set(MODES)
    die_at_each(chosen, whole, tmp_path / "died")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_dying_at_every_write_loses_nothing(mode, whole, tmp_path):
    die_at_each([(name, mode) for name in write_points(tmp_path)], whole, tmp_path / "died")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_disk_at_every_file_loses_nothing(kind, whole, tmp_path):
    """One folder, a run that meets the fault at each file in turn, each going on from the one before."""
    points = [durable.LOCK, *write_points(tmp_path), durable.LEDGER]
    met = [target for target in points if kind in kinds_at(target, durable.LOCK)]
    for target in met:
        with failing(target, kind), pytest.raises((AvLensError, UnfinishedError)) as said:
            run(tmp_path / "met")
        assert re.search(rf"cannot write .*/{re.escape(target)}: {os.strerror(KINDS[kind])}", str(said.value))
        assert not list((tmp_path / "met").rglob("*.part"))
    assert len(met) > 60
    assert_same(run(tmp_path / "met"), whole)
    assert_same(Isolation.load(tmp_path / "met"), whole)


def test_a_finished_run_measures_nothing_again(whole, tmp_path):
    run(tmp_path)
    stores = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "Measured", lambda *given, **more: stores.append(Measured(*given, **more)) or stores[-1])
        assert_same(run(tmp_path), whole)
    assert stores
    assert not [one.name for one in stores if one.new]


def test_a_broken_measurement_is_made_again(brief, tmp_path):
    short(tmp_path)
    files = sorted((tmp_path / "measured").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:40])
    files[-1].write_bytes(b"")
    assert_same(short(tmp_path), brief)


def test_another_protocol_is_refused_with_what_differs_and_the_mend(tmp_path):
    short(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ProtocolError, match=r"under another protocol; they differ in .*seed \(0 there, 1 here\)") as no:
        short(tmp_path, seed=1)
    assert "Give another folder (--out), or the options and conflicts of that run." in str(no.value)
    with pytest.raises(ProtocolError, match=r"conflicts or halves \(44 conflicts there, 46 here\)"):
        short(tmp_path, n=46)
    with pytest.raises(ProtocolError, match=r"they differ in quick \(True there, False here\); left_out"):
        short(tmp_path, quick=False)
    other = FakeModel(writer=0.0, gate=0.0, opponent=0.5)
    with pytest.raises(ProtocolError, match=r"they differ in model \(weights\)"):
        short(tmp_path, model=other)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_changed_program_measures_again_and_says_so(brief, tmp_path, monkeypatch):
    short(tmp_path)
    stored = len(list((tmp_path / "measured").iterdir()))
    for module in ("durable", "preparing"):
        monkeypatch.setattr(f"av_lens.isolation.running.{module}.measuring_hash", lambda: "another program")
    lines = []
    assert_same(short(tmp_path, told=lines.append), brief)
    assert any("av_lens was changed since" in line for line in lines)
    assert len(list((tmp_path / "measured").iterdir())) == 2 * stored


def test_two_runs_cannot_write_in_one_folder(tmp_path):
    class Nested(FakeModel):
        def run_with_hooks(self, *given, **options):
            short(tmp_path)
            return super().run_with_hooks(*given, **options)

    with pytest.raises(ProtocolError, match="another process is writing in"):
        short(tmp_path, model=Nested())


def test_an_interrupt_keeps_what_was_finished(whole, tmp_path):
    class Interrupted(FakeModel):
        left = 300

        def run_with_hooks(self, *given, **options):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().run_with_hooks(*given, **options)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model=Interrupted())
    rows = [json.loads(line) for line in (tmp_path / "conflicts.jsonl").read_text().splitlines()]
    assert len(rows) == N
    assert all("reading" in row["done"] for row in rows)
    assert_same(run(tmp_path), whole)


def test_a_budget_stops_before_a_measurement_and_the_same_call_goes_on(brief, tmp_path, monkeypatch):
    clock = [0.0]

    class Clock:
        @staticmethod
        def monotonic():
            clock[0] += 1.0  # every look costs a second
            return clock[0]

    monkeypatch.setattr(durable, "time", Clock)
    said = []
    for _ in range(20):
        try:
            found = short(tmp_path, budget=0.1)
        except UnfinishedError as stopped:
            said.append(str(stopped))
            continue
        break
    assert_same(found, brief)
    assert 2 <= len(said) < 20
    for text in said:
        assert text.startswith("stopped at the budget of 0.1 minutes, before: ")
        assert text.endswith(f"Everything is kept in {tmp_path}; the same command goes on from there.")
    assert "The effects of 0 of 44 conflicts are measured." in said[0]


def test_a_run_that_stops_in_a_control_has_no_gap_in_its_record(tmp_path, monkeypatch):
    # What a control is refused for is noted in its row; a stop is no refusal and must come through.
    def stops(name):
        if name == "a control":
            raise UnfinishedError("stopped in a control")

    monkeypatch.setattr(durable, "deadline", lambda *_: stops)
    with pytest.raises(UnfinishedError, match="stopped in a control"):
        run(tmp_path, budget=1)
    assert not (tmp_path / "numbers").exists()


def test_budgets_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ProtocolError, match="a run with a budget needs a folder"):
        run(budget=1)
    with pytest.raises(ProtocolError, match="the budget is 0 minutes; give a number above 0"):
        run(tmp_path, budget=0)


def test_a_full_disk_stops_the_run_and_is_no_reason_in_the_record(brief, tmp_path, monkeypatch):
    left, real = [10], os.fsync

    def full(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(file)

    with monkeypatch.context() as patched:
        patched.setattr(whole_files.os, "fsync", full)
        with pytest.raises(UnfinishedError, match=r"cannot write .*reading-.*No space left on device\. What was"):
            short(tmp_path)
    assert_same(short(tmp_path), brief)


def test_each_run_makes_at_least_one_measurement(tmp_path):
    store = Store(tmp_path, "key")
    store.before.append(deadline(1e-9, store, lambda: ""))
    store.recall("a", {}, lambda: {"x": np.zeros(1)})
    with pytest.raises(UnfinishedError, match=r"stopped at the budget of 1e-09 minutes, before: b\."):
        store.recall("b", {}, lambda: {"x": np.zeros(1)})


@pytest.mark.slow
def test_a_line_for_each_conflict(tmp_path):
    lines = []
    run(tmp_path, told=lines.append)
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "conflicts.jsonl").read_text().splitlines())}
    assert list(rows) == [conflict.id for conflict in fake_conflicts(N)]
    written = json.loads((tmp_path / "protocol.json").read_text())
    assert (written["hash"], written["model"]["threads"]) == (hash_of(written), torch.get_num_threads())
    dealt = written["halves"]["dealt"]
    assert {name: row["half"] for name, row in rows.items()} == dealt
    for row in rows.values():
        own = {"discovery": "unit effects at suffix", "confirmation": "sets at suffix"}[row["half"]]
        assert {"reading", "head effects at suffix", own} <= set(row["done"])
        assert row["seconds"] == pytest.approx(sum(row["done"].values()), abs=0.01)
        assert row["G"] == pytest.approx(7, abs=0.1)
    told = [line.split()[0] for line in lines if "head effects at suffix" in line]
    assert sorted(told) == sorted(rows)


def test_nested_measurements_count_their_seconds_once(tmp_path):
    store, seen = Store(tmp_path, "key"), []
    store.told.append(seen.append)

    def inner():
        time.sleep(0.05)
        return {"x": np.ones(2)}

    def outer():
        return {"y": 2 * store.recall("inner", {}, inner)["x"]}

    assert store.recall("outer", {}, outer)["y"].tolist() == [2, 2]
    assert [(one.name, one.new) for one in seen] == [("inner", True), ("outer", True)]
    assert seen[0].seconds >= 0.05 > seen[1].seconds
