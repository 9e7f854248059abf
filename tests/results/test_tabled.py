"""A grid with its rows: saved together, opened equal."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from av_lens.errors import InputError
from av_lens.results.grid import Grid, Tabled


def made() -> Tabled:
    values = np.array([[[0.0]], [[1.0]], [[np.nan]]])
    grid = Grid.of(values, axes={"plan": ["none"], "figure": ["heard"]}, baseline=np.zeros(3), metric="captions")
    rows = pd.DataFrame({"text": ["a", "b é", ""], "example": [0, 1, 2], "score": [0.5, np.nan, 1.0], "ok": [True] * 3})
    return Tabled(grid, rows)


def test_what_is_saved_is_what_is_opened(tmp_path):
    before = made()
    after = Tabled.load(before.save(tmp_path / "said"))
    pd.testing.assert_frame_equal(after.rows, before.rows)
    np.testing.assert_array_equal(after.grid.values, before.grid.values)
    assert after.provenance == before.provenance
    assert float(after.mean().squeeze()) == 0.5
    assert after.to_frame() is not after.rows


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="need a column 'example'"):
        Tabled(made().grid, pd.DataFrame({"text": ["a"]}))
    path = made().grid.save(tmp_path / "grid")
    with pytest.raises(InputError, match="holds a grid without rows"):
        Tabled.load(path)
