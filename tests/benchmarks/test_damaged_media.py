"""Is a damaged file read, or refused, in little time? Each in less than 10 s of the processor."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from damaged_media import EDITS, OPTIONS, STARTS, SUFFIXES, attempt, mutated, victims
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MOST = 10.0
SETTINGS = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return victims(tmp_path_factory.mktemp("victims"))


def soon(path: Path, data: bytes, options: dict[str, Any]) -> None:
    began = time.process_time()
    attempt(path, data, options)
    assert time.process_time() - began < MOST


@pytest.mark.slow
@settings(max_examples=150, **SETTINGS)
@given(
    suffix=st.sampled_from(SUFFIXES),
    head=st.booleans(),
    edits=EDITS,
    keep=st.floats(0.01, 1) | st.just(1.0),
    options=OPTIONS,
)
def test_mutated_and_truncated_media(files, tmp_path_factory, suffix, head, edits, keep, options):
    data = mutated(files[suffix], edits, head=head, keep=keep)
    soon(tmp_path_factory.getbasetemp() / f"mutated{suffix}", data, options)


@pytest.mark.slow
@settings(max_examples=60, **SETTINGS)
@given(magic=st.sampled_from(STARTS), body=st.binary(min_size=1, max_size=3000), suffix=st.sampled_from(SUFFIXES))
def test_random_bytes(tmp_path_factory, magic, body, suffix):
    soon(tmp_path_factory.getbasetemp() / f"random{suffix}", magic + body, {})
