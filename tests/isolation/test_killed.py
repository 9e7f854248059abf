"""`av-lens isolate`, killed at moments all over a run and resumed, finds what an undisturbed run finds (slow).

pytest -m slow tests/isolation/test_killed.py
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest
from same_isolation import assert_same

from av_lens.lab.calibration import stage
from av_lens.results.record import Isolation


def measurements(out):
    """When each of the measurements in a folder was written, in order."""
    return sorted(path.stat().st_mtime for path in (out / "measured").glob("*.npz"))


@pytest.mark.slow
def test_the_command_killed_at_ten_moments_on_av_tiny(tmp_path):
    """Ten moments of an undisturbed run, evenly drawn; each is met again by what was measured until then."""
    (tmp_path / "clips").mkdir()
    manifest = str(stage(tmp_path / "clips", conflicts=44, seed=3))
    words = [sys.executable, "-c", "from av_lens.cli.main import run; run()", "isolate", "av-tiny", manifest]
    words += ["--quick", "--gate", "report", "--out"]
    begun = time.time()
    subprocess.run([*words, str(tmp_path / "whole")], check=True, capture_output=True)
    written = measurements(tmp_path / "whole")
    ended = time.time()
    drawn = random.Random(0)
    moments = sorted(drawn.uniform(begun, written[-1]) for _ in range(10))
    kept = []
    for moment in moments:
        until = sum(when <= moment for when in written)
        child = subprocess.Popen([*words, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
        while len(measurements(tmp_path / "killed")) < until:
            assert child.poll() is None
            assert time.time() - ended < 1800
            time.sleep(1e-3)
        time.sleep(moment - max([begun, *written[:until]]))
        child.kill()
        assert child.wait() == -signal.SIGKILL
        kept.append(len(measurements(tmp_path / "killed")))
    assert len(set(kept)) > 5
    assert kept[-1] < len(written)
    done = subprocess.run([*words, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    assert "resumed: " in done.stdout
    assert_same(Isolation.load(tmp_path / "killed"), Isolation.load(tmp_path / "whole"))


def heard() -> None:
    """A program that nohup started ignores SIGHUP, and so does all that it starts."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.slow
def test_sigterm_and_a_closed_terminal_end_the_command_and_it_goes_on_to_the_same_bits(tmp_path):
    """Five moments of a run, by SIGTERM and SIGHUP in turn; each ends with one sentence, no file is half written."""
    (tmp_path / "clips").mkdir()
    words = [sys.executable, "-c", "from av_lens.cli.main import run; run()", "isolate", "av-tiny"]
    words += [str(stage(tmp_path / "clips", conflicts=44, seed=3)), "--quick", "--gate", "report", "--out"]
    begun = time.time()
    subprocess.run([*words, str(tmp_path / "whole")], check=True, capture_output=True)
    files = measurements(tmp_path / "whole")
    drawn, kept = random.Random(0), []
    for place in range(5):
        number = (signal.SIGTERM, signal.SIGHUP)[place % 2]
        until = int((place + drawn.random()) * len(files) / 5)
        child = subprocess.Popen(
            [*words, str(tmp_path / "out")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=heard,
        )
        while (
            len(list((tmp_path / "out" / "measured").glob("[!.]*"))) < until
            or not (tmp_path / "out" / ".lock").exists()
        ):
            assert child.poll() is None
            assert time.time() - begun < 3600
            time.sleep(1e-3)
        time.sleep(drawn.random() * 0.2)
        child.send_signal(number)
        said = child.communicate()[1].decode()
        assert child.returncode == 128 + number, said
        assert said.strip() == "stopped; what was finished is kept, the same command goes on from there."
        assert not list((tmp_path / "out").rglob("*.part"))
        kept.append(len(measurements(tmp_path / "out")))
    assert kept == sorted(kept)
    assert 0 < kept[-1] < len(files)
    done = subprocess.run([*words, str(tmp_path / "out")], check=True, capture_output=True, text=True)
    assert "resumed: " in done.stdout
    assert_same(Isolation.load(tmp_path / "out"), Isolation.load(tmp_path / "whole"))
