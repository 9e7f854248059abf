"""Workers that share a run's folder: who claims what, who is taken over, and one worker's numbers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_model import FakeModel, fake_conflicts, isolated
from same_isolation import assert_same

import av_lens as avl
from av_lens.errors import ProtocolError
from av_lens.isolation.measuring import crew as crews
from av_lens.isolation.measuring.crew import Crew, Elsewhere, workers_of
from av_lens.isolation.measuring.store import Store
from av_lens.isolation.running.durable import standing
from av_lens.isolation.running.workers import reloaded
from av_lens.lab.calibration import stage
from av_lens.results.record import Isolation

N = 44
TOYS = Path(__file__).parents[1] / "toys"
WORKER = [sys.executable, str(TOYS / "fake_worker.py")]


@pytest.fixture
def crew(tmp_path):
    with Crew(tmp_path) as one:
        yield one


def beating(folder, name):
    (folder / "workers" / name).write_text(json.dumps({"since": time.time(), "doing": "", "made": 0}))
    return folder / "workers" / name


def test_a_claim_counts_while_its_worker_lives(crew, tmp_path):
    place = tmp_path / "measured" / "it.npz"
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    name = f"{socket.gethostname()}-{other.pid}"
    beating(tmp_path, name)
    assert crew.claim(place, "it")
    crew.release(place, made=True)
    (tmp_path / "measured" / "it.npz.claim").write_text(name)
    assert not crew.claim(place, "it")
    other.kill()  # dead, and not yet waited for
    deadline = time.monotonic() + 5
    while not crew.claim(place, "it"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    other.wait()
    assert crew.claim(place, "it")  # its own


def test_on_another_machine_a_worker_is_dead_when_it_has_long_been_silent(crew, tmp_path):
    heard = beating(tmp_path, "elsewhere-1")
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "it.npz.claim").write_text("elsewhere-1")
    assert not crew.claim(tmp_path / "measured" / "it.npz", "it")
    assert [one.alive for one in workers_of(tmp_path) if one.name == "elsewhere-1"] == [True]
    long_ago = time.time() - crews.SILENT - 5
    os.utime(heard, (long_ago, long_ago))
    assert [one.alive for one in workers_of(tmp_path) if one.name == "elsewhere-1"] == [False]
    assert crew.claim(tmp_path / "measured" / "it.npz", "it")


def test_what_another_measures_is_left_or_waited_for(crew, tmp_path):
    store = Store(tmp_path, "run", crew=crew)
    measured = Store(tmp_path, "run").recall("it", {"ids": ["a"]}, lambda: {"x": np.arange(3.0)})
    (kept,) = (tmp_path / "measured").glob("*.npz")
    held = kept.read_bytes()
    kept.unlink()
    beating(tmp_path, "elsewhere-1")
    kept.with_name(kept.name + ".claim").write_text("elsewhere-1")
    with pytest.raises(Elsewhere), store.hurried(True):
        store.recall("it", {"ids": ["a"]}, lambda: pytest.fail("it was measured twice"))
    threading.Timer(0.2, lambda: kept.write_bytes(held)).start()
    found = store.recall("it", {"ids": ["a"]}, lambda: pytest.fail("it was measured twice"))
    assert np.array_equal(found["x"], measured["x"])
    assert store.made == 0


def test_what_fails_is_let_go_and_what_is_begun_is_finished(crew, tmp_path):
    store = Store(tmp_path, "run", crew=crew)
    with pytest.raises(ZeroDivisionError):
        store.recall("it", {}, lambda: {"x": np.zeros(1 // 0)})
    assert not list((tmp_path / "measured").glob("*.claim"))
    with store.hurried(True):
        waits = store.recall("it", {}, lambda: {"x": np.array(store._hurried)})["x"]
    assert not waits


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    options = {"s": 0.1, "quick": True, "named_only": True}
    return isolated(FakeModel(), fake_conflicts(N, n_classes=6), out=tmp_path_factory.mktemp("alone"), **options)


def test_two_processes_share_a_run_and_find_what_one_finds(alone, tmp_path):
    command = [*WORKER, str(tmp_path), str(N), "0.02"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    while not (tmp_path / "measured").is_dir():
        assert all(one.poll() is None for one in both)
        time.sleep(0.01)
    assert "Nobody works on it" not in standing(tmp_path)
    made = [int(one.communicate(timeout=120)[0]) for one in both]
    assert min(made) > 3
    assert sum(made) == len(list((tmp_path / "measured").glob("*.npz")))
    assert not list((tmp_path / "measured").glob("*.claim"))
    assert_same(Isolation.load(tmp_path), alone)
    assert standing(tmp_path).startswith(f"{N} conflicts, {sum(made)} measurements on disk; the record is there.")


@pytest.mark.parametrize("first", [True, False], ids=["leader", "follower"])
def test_a_killed_worker_is_followed(alone, tmp_path, first):
    command = [*WORKER, str(tmp_path), str(N), "0.05"]
    leader = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / "protocol.json").exists():
        time.sleep(0.01)
    follower = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "measured").glob("*.npz"))) < 12:
        time.sleep(0.01)
    killed, other = (leader, follower) if first else (follower, leader)
    killed.kill()
    assert other.wait(timeout=120) == 0
    killed.wait()
    assert_same(Isolation.load(tmp_path), alone)


def test_a_second_run_in_the_folder_must_say_that_it_joins(tmp_path):
    leader = subprocess.Popen([*WORKER, str(tmp_path), str(N), "0.2"], stdout=subprocess.DEVNULL)
    while not (tmp_path / "protocol.json").exists():
        time.sleep(0.01)
    with pytest.raises(ProtocolError, match=r"another process is writing .* join it \(--join"):
        isolated(FakeModel(), fake_conflicts(N, n_classes=6), s=0.1, out=tmp_path, quick=True, named_only=True)
    leader.kill()
    leader.wait()


def test_what_cannot_be_shared_is_refused(tmp_path):
    conflicts = fake_conflicts(N, n_classes=6)
    with pytest.raises(ProtocolError, match=r"workers=0: give how many processes"):
        isolated(FakeModel(), conflicts, workers=0)
    with pytest.raises(ProtocolError, match=r"an engine was given: leave workers out"):
        isolated(FakeModel(), conflicts, workers=2)
    with pytest.raises(ProtocolError, match=r"given as an object.*join=True on the same folder"):
        reloaded(FakeModel())
    with pytest.raises(ProtocolError, match=r"to join a run, name its folder"):
        isolated(FakeModel(), conflicts, join=True)
    with pytest.raises(ProtocolError, match=r"no run was begun in .*Give the folder of `isolate`"):
        standing(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_on_av_tiny_find_what_one_finds(workers, tmp_path):
    listed = avl.conflicts(stage(tmp_path / "clips", conflicts=44, seed=3))
    model, options = avl.load("av-tiny"), {"gate": "report", "quick": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))  # as many as each worker has: sums differ in their last bits
    one = avl.isolate(model, listed, out=tmp_path / "one", **options)
    torch.set_num_threads(threads)
    said: list[str] = []
    shared = avl.isolate(model, listed, out=tmp_path / "shared", workers=workers, told=said.append, **options)
    assert_same(shared, one)
    assert not [line for line in said if "stopped" in line]
