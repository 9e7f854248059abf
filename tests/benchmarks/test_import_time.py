"""What does `import av_lens` cost beside TransformerLens's?"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], capture_output=True, check=True)
    return time.perf_counter() - start


@pytest.mark.slow
def test_importing_costs_at_most_a_third_more_than_transformer_lens():
    ours = min(seconds("import av_lens") for _ in range(3))
    theirs = min(seconds("import transformer_lens") for _ in range(3))
    assert ours <= 1.3 * theirs, f"{ours:.2f} s against {theirs:.2f} s"
