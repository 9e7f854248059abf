"""Is the estimate that `av-lens isolate` gives beforehand within 30% of what the run then takes?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from av_lens.isolation.running import cost
from av_lens.results.record import Isolation


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False])
def test_within_30_percent_on_120_conflicts_of_av_tiny(quick, tmp_path):
    """The command itself, as a shell runs it: on two threads, without the checks of types under which tests run.

    Its time is the wall's, imports and page included: the machine must have nothing else to do.
    """
    from av_lens.lab.calibration import stage

    (tmp_path / "clips").mkdir()
    manifest = stage(tmp_path / "clips", conflicts=120, seed=1)
    words = ["isolate", "av-tiny", str(manifest), "--out", str(tmp_path / "run"), *(["--quick"] if quick else [])]
    code = "from av_lens.cli.main import run; run()"
    two = os.environ | {"OMP_NUM_THREADS": "2"}
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, env=two)
    whole = time.monotonic() - begun
    taken = Isolation.load(tmp_path / "run").provenance["seconds"]
    said = json.loads((tmp_path / "run" / "estimate.json").read_text())
    assert f"Estimate: about {cost.duration(said['seconds'])}" in done.stdout
    print(f"quick={quick}: {whole:.0f} s, {taken:.0f} s of it the run; said {said['seconds']:.0f} s: {said['parts']}")
    assert 0.7 < said["seconds"] / taken < 1.3
    assert whole < (180 if quick else 600)
