"""Grids: signs and scales by hand, intervals that know clusters, and a file that gives back what it was given."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

from av_lens.errors import InputError
from av_lens.results import Grid
from av_lens.results.provenance import linked, plain, stamp


def example() -> Grid:
    return Grid.of(
        [[[1.0, 3.0], [np.nan, 2.0]], [[2.0, 2.0], [4.0, 0.0]]],
        axes={"layer": [0, 5], "span": ["audio", "vidéo"]},
        baseline=[1.0, 2.0],
        donor=[5.0, 2.0],
        metric="logit_diff(a, b)",
        unit="logit",
        direction="denoise",
        provenance={"seed": 3, "ids": [[1, 2]]},
    )


def test_effects_and_normalized_by_hand():
    grid = example()
    assert grid.effects.sel(example=0).values.tolist()[0] == [0.0, 2.0]
    assert grid.normalized().sel(example=0, layer=0).values.tolist() == [0.0, 0.5]
    assert np.isnan(grid.normalized().sel(example=1)).all()  # donor and baseline are equal: no scale


def test_what_was_not_measured_stays_nan_and_out_of_the_mean():
    grid = example()
    assert np.isnan(grid.effects.sel(example=0, layer=5, span="audio"))
    assert grid.mean().sel(layer=5, span="audio") == 2.0
    assert grid.mean().sel(layer=0, span="audio") == 0.0
    assert grid.mean("values").sel(layer=0, span="audio") == 1.5


def test_the_mean_of_normalized_is_a_ratio_of_means():
    grid = Grid.of([[2.0], [3.0]], axes={"layer": [0]}, baseline=[1.0, 1.0], donor=[2.0, 5.0])
    assert grid.mean("normalized").item() == pytest.approx((1 + 2) / (1 + 4))


def test_intervals_are_nan_below_five_clusters_and_resample_clusters():
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.normal(size=8), 50)[:, None]
    lone = Grid.of(shared, axes={"layer": [0]}, baseline=np.zeros(400))
    tied = Grid.of(shared, axes={"layer": [0]}, baseline=np.zeros(400), clusters=np.repeat(np.arange(8), 50))
    few = Grid.of(shared, axes={"layer": [0]}, baseline=np.zeros(400), clusters=np.arange(400) % 4)
    assert np.isnan(few.interval()).all()
    widths = [float(grid.interval().diff("bound").item()) for grid in (lone, tied)]
    assert widths[1] > 4 * widths[0]
    low, high = lone.interval(seed=1).values[0]
    assert low < shared.mean() < high
    # A mean of n equal-variance values: the percentile bounds lie near 1.96 standard errors.
    assert high - low == pytest.approx(2 * 1.96 * shared.std() / 20, rel=0.1)


def test_saved_and_loaded_grids_are_equal(tmp_path):
    grid = example()
    path = grid.save(tmp_path / "grid")
    assert path.name == "grid.nc"
    again = Grid.load(path)
    xr.testing.assert_equal(again.values, grid.values)
    xr.testing.assert_equal(again.baseline, grid.baseline)
    xr.testing.assert_equal(again.donor, grid.donor)
    for name in ("metric", "unit", "direction", "clusters", "shares", "provenance"):
        assert getattr(again, name) == getattr(grid, name)


def test_what_is_no_grid_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no such file"):
        Grid.load(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("not a grid")
    with pytest.raises(InputError, match=r"is not a saved grid"):
        Grid.load(tmp_path / "text.nc")
    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="scipy")
    with pytest.raises(InputError, match=r"holds something else"):
        Grid.load(tmp_path / "other.nc")


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match=r"values have shape \(2, 3\)"):
        Grid.of(np.zeros((2, 3)), axes={"layer": [0, 1]}, baseline=[0.0, 0.0])
    with pytest.raises(InputError, match=r"baseline needs one number for each of 2 examples"):
        Grid.of(np.zeros((2, 1)), axes={"layer": [0]}, baseline=[0.0])
    with pytest.raises(InputError, match=r"unknown figure 'effect'. Did you mean 'effects'"):
        example().mean("effect")  # pyright: ignore[reportArgumentType]


def test_the_frame_is_tidy():
    frame = example().to_frame()
    assert len(frame) == 8
    row = frame[(frame["example"] == 0) & (frame["layer"] == 0) & (frame["span"] == "vidéo")].iloc[0]
    assert (row["value"], row["effect"], row["normalized"], row["baseline"], row["cluster"]) == (3.0, 2.0, 0.5, 1.0, 0)


def test_shares_close_on_their_metric():
    grid = Grid.of([[1.0, 2.5]], axes={"part": ["embed", "L0H0"]}, baseline=[4.0], shares=True)
    assert grid.effects.values.tolist() == [[1.0, 2.5]]
    assert grid.closure_error.item() == 0.5
    assert grid.mean("normalized").values.tolist() == [0.25, 0.625]


def test_examples_that_share_a_source_are_one_cluster():
    assert linked([["a", "b"], ["c"], ["b", "d"], [], ["d"]]) == (0, 1, 0, 2, 0)


def test_a_stamp_is_plain_data():
    made = stamp(shape=(1, 2), value=np.float32(0.5), names={"a"}, path=object)
    assert json.loads(json.dumps(made)) == made
    assert made["versions"]["torch"]
    assert plain(np.arange(2)) == [0, 1]


def test_a_keyword_that_no_figure_takes_is_refused_with_the_near_word():
    with pytest.raises(InputError, match=r"unknown keyword of plot 'titel'\. Did you mean 'title'"):
        example().plot(titel="a")
