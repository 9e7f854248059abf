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

from av_lens.results.record import Isolation
from av_lens.studies.staged_conflicts import stage


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
