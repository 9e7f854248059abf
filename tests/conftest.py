"""What every test shares: runtime shape checks over the whole package, one thread, and the real clip's place."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import checker
import jaxtyping

jaxtyping.jaxtyped = checker.checked  # what the hook writes above every function of the package
jaxtyping.install_import_hook("av_lens", "checker.typechecker")

import pytest

REAL_CLIP = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_clip.mp4"


@pytest.fixture(scope="session")
def real_clip_path() -> Path:
    """The real recording that lies beside the repository, never in it."""
    if not REAL_CLIP.exists():
        pytest.skip(f"the real clip is not there: {REAL_CLIP}")
    return REAL_CLIP
