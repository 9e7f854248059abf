"""Edge scores as data: ranking, sums, closure and refusals, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from av_lens.errors import InputError
from av_lens.results import EdgeScores, Grid

NAN = np.nan
# Two examples; the head cannot be read by its own queries.
VALUES = [[[1.0, 2.0, 3.0], [NAN, -6.0, 0.5]], [[3.0, 2.0, -3.0], [NAN, -2.0, 0.5]]]


def scores(**more):
    options = {"baseline": [1.0, 2.0], "donor": [8.0, 3.0], "metric": "M", "unit": "logit"} | more
    return EdgeScores.of(VALUES, senders=["embed", "L0H0"], receivers=["L0H0.q", "L0 mlp", "logits"], **options)


def test_sums_and_closure():
    found = scores()
    np.testing.assert_array_equal(found.nodes().effects.values, [[6.0, -5.5], [2.0, -1.5]])
    np.testing.assert_array_equal(found.closure_error.values, [8 - 1 - 6, 3 - 2 - 2])
    assert (found.senders, found.receivers) == (["embed", "L0H0"], ["L0H0.q", "L0 mlp", "logits"])
    apart = EdgeScores.of([[[1.0]]], senders=["L0H0"], receivers=["logits"], baseline=[0.0], donor=[1.0])
    assert np.isnan(apart.closure_error.values).all()


def test_edges_are_ranked_by_magnitude_with_their_sign_and_missing_ones_never():
    top = scores().top(3)
    assert top["receiver"].tolist() == ["L0 mlp", "L0H0.q", "L0 mlp"]
    assert top["sender"].tolist() == ["L0H0", "embed", "embed"]
    assert top["score"].tolist() == [-4.0, 2.0, 2.0]
    assert top["low"].isna().all()  # fewer than five clusters
    assert scores().top(1, rank="positive")["sender"].item() == "embed"
    assert scores().top(1, rank="negative")["score"].item() == -4.0
    assert len(scores().top(99)) == 5


def test_intervals_resample_clusters():
    values = np.repeat(np.array(VALUES)[:1], 6, axis=0) + np.arange(6)[:, None, None]
    found = EdgeScores.of(
        values,
        senders=["embed", "L0H0"],
        receivers=["L0H0.q", "L0 mlp", "logits"],
        baseline=np.zeros(6),
        donor=np.ones(6),
    )
    row = found.top(1)
    grid = Grid.of(values[:, 0, 2:], axes={"edge": [0]}, baseline=np.zeros(6))
    np.testing.assert_allclose(row[["low", "high"]].to_numpy()[0], grid.interval().values[0])


def test_frames_leave_missing_edges_out():
    frame = scores().to_frame()
    assert list(frame.columns) == ["example", "sender", "receiver", "score"]
    assert len(frame) == 10
    assert "EdgeScores(M [logit], 2 example x 2 sender x 3 receiver" in repr(scores())
    assert "<table" in scores()._repr_html_()


def test_what_is_no_edge_score_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"scores have shape \(2, 2, 3\); wanted example and then"):
        EdgeScores.of(VALUES, senders=["embed"], receivers=["a", "b", "c"], baseline=[0.0, 0.0], donor=[0.0, 0.0])
    with pytest.raises(InputError, match=r"donor needs one number for each of 2 examples; got \(1,\)"):
        scores(donor=[1.0])
    with pytest.raises(InputError, match=r"axes example, span \(or none\), sender, receiver; got"):
        EdgeScores(scores().values.transpose("example", "receiver", "sender"), *(scores().baseline,) * 2, (0, 1), "M")
    with pytest.raises(InputError, match=r"unknown rank 'size'"):
        scores().top(rank="size")
    with pytest.raises(InputError, match=r"no such file"):
        EdgeScores.load(tmp_path / "none.nc")
    grid = Grid.of([[1.0]], axes={"layer": [0]}, baseline=[0.0]).save(tmp_path / "grid.nc")
    with pytest.raises(InputError, match=r"holds av_lens.Grid, version 1"):
        EdgeScores.load(grid)
    (tmp_path / "text.nc").write_text("no")
    with pytest.raises(InputError, match=r"text\.nc is not a file of edge scores, or damaged"):
        EdgeScores.load(tmp_path / "text.nc")
