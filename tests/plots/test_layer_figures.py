"""Curves over layers and dots of conditions: the grid's own means and intervals, and what was not measured."""

from __future__ import annotations

import numpy as np
import pytest

from av_lens import colours, plots
from av_lens.errors import InputError
from av_lens.results import Grid


def flow(n=8):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n, 2, 3, 4, 5))
    axes = {
        "query": ["question", "generation"],
        "key": ["audio", "video", "sinks"],
        "layer": range(4),
        "head": range(5),
    }
    return Grid.of(
        values, axes={name: list(of) for name, of in axes.items()}, baseline=np.zeros(n), metric="flow", unit="share"
    )


def named(fig, name):
    return [trace for trace in fig.data if trace.name == name]


def test_curves_are_means_over_examples_and_heads_in_panels_of_the_other_axis():
    grid = flow()
    fig = plots.layers(grid)
    audio = named(fig, "audio")
    assert [trace.xaxis for trace in audio] == ["x", "x2"]
    wanted = grid.values.mean(("example", "head"))
    for trace, query in zip(audio, ("question", "generation"), strict=True):
        np.testing.assert_allclose(trace.y, wanted.sel(query=query, key="audio").values)
    assert audio[0].line.color == colours.ROLE_COLOURS["audio"]
    assert [note.text for note in fig.layout.annotations] == ["query question", "query generation"]
    assert fig.layout.yaxis.title.text == "share"
    bands = [trace for trace in fig.data if trace.fill == "tonexty" and trace.legendgroup == "audio"]
    low = Grid.of(
        grid.values.mean("head").sel(query="question", key="audio").values,
        axes={"layer": range(4)},
        baseline=np.zeros(8),
    ).interval()
    np.testing.assert_allclose(bands[0].y, low.sel(bound="low").values, atol=1e-9)


def test_the_grid_draws_itself_and_one_label_is_a_title_not_a_panel():
    one = flow().sel(query=["question"])
    fig = one.plot(title="reading")
    assert {trace.name for trace in fig.data if trace.name} == {"audio", "video", "sinks"}
    assert [note.text for note in fig.layout.annotations] == ["query question"]
    assert fig.layout.title.text == "reading"


def test_few_clusters_have_curves_without_bands():
    fig = plots.layers(flow(3))
    assert not [trace for trace in fig.data if trace.fill == "tonexty"]
    assert len(named(fig, "video")) == 2


def test_many_labels_are_a_map():
    values = np.arange(2 * 3 * 20, dtype=float).reshape(2, 3, 20)
    grid = Grid.of(values, axes={"layer": [0, 1, 2], "pos": list(range(20))}, baseline=[0, 0], unit="tokens")
    (heat,) = grid.plot().data
    np.testing.assert_allclose(heat.z, values.mean(0))
    assert heat.zmin == 0.0
    assert list(heat.x[:2]) == ["0", "1"]
    (signed,) = plots.layers(Grid.of(values - 50, axes={"layer": [0, 1, 2], "pos": range(20)}, baseline=[0, 0])).data
    assert signed.zmin == -signed.zmax


def cuts(n=6):
    values = np.random.default_rng(1).normal(size=(n, 2, 3))
    values[:, 1, 2] = np.nan
    axes = {"edge": ["video -> generation", "audio -> generation"], "condition": ["cut", "equal mass", "other heads"]}
    return Grid.of(values, axes=axes, baseline=np.zeros(n), metric="C", unit="logit")


def test_dots_stand_at_the_means_with_intervals_and_say_what_was_not_measured():
    grid = cuts()
    fig = grid.plot()
    assert [trace.name for trace in fig.data] == ["cut", "equal mass", "other heads"]
    np.testing.assert_allclose(fig.data[0].x, grid.mean().sel(condition="cut").values)
    low = grid.interval().sel(condition="cut", bound="low").values
    np.testing.assert_allclose(fig.data[0].x - fig.data[0].error_x.arrayminus, low)
    assert len(fig.data[2].x) == 1
    (note,) = fig.layout.annotations
    assert note.text == "not measured: other heads"
    assert list(fig.layout.yaxis.ticktext) == ["video -> generation", "audio -> generation"]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="layers draws grids over layers"):
        plots.layers(cuts())
    with pytest.raises(InputError, match="conditions draws the axis condition"):
        plots.conditions(flow())
    with pytest.raises(InputError, match="Did you mean 'query'"):
        plots.layers(flow(), panels="queries")
    wide = Grid.of(
        np.zeros((2, 2, 2, 2, 2)), axes={k: [0, 1] for k in ("edge", "width", "layer", "span")}, baseline=[0, 0]
    )
    with pytest.raises(InputError, match=r"at most two axes beside layer.*grid\.sel"):
        plots.layers(wide)


def test_places_are_chosen_by_label():
    grid = flow()
    one = grid.sel(query="question", key=["audio", "video"])
    assert one.values.dims == ("example", "key", "layer", "head")
    np.testing.assert_array_equal(one.values.values, grid.values.values[:, 0, :2])
    assert one.metric == grid.metric
    np.testing.assert_array_equal(one.baseline.values, grid.baseline.values)
    with pytest.raises(InputError, match=r"unknown axis 'kye'. Did you mean 'key'"):
        grid.sel(kye="audio")
    with pytest.raises(InputError, match=r"unknown key 'adio'. Did you mean 'audio'"):
        grid.sel(key="adio")
