"""The graph of a circuit: members at their layers, sized by score, coloured by sign or role, and how they join."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from av_lens import colours, plots
from av_lens.errors import InputError
from av_lens.results import Circuit

NAMES = ["L0H0", "L0H1", "L0 mlp", "L1H0", "L1H1", "L1 mlp"]


def circuit(span=-10.0):
    """L1H0 and the MLP of layer 0 need each other; L0H1 stands in for L1H0; a fourth link is not sure."""
    order = [3, 2, 1, 0, 4, 5]
    nodes = pd.DataFrame(
        {
            "node": [NAMES[i] for i in order],
            "layer": [1, 0, 0, 0, 1, 1],
            "head": [0, -1, 1, 0, 1, -1],
            "score": [8.0, -2.0, 0.5, 0.1, 0.0, 0.0],
            "low": [7.0, -3.0, np.nan, 0.0, 0.0, 0.0],
            "high": [9.0, -1.0, np.nan, 0.2, 0.0, 0.0],
            "place": range(1, 7),
            "member": [True, True, True, False, False, False],
            "kept": [1.0, 0.9, np.nan, 0.1, 0.0, 0.0],
        }
    )
    links = pd.DataFrame(
        [
            ("L0 mlp", "L1H0", 0.4, 0.3, 0.5, "need each other"),
            ("L0H1", "L1H0", -0.2, -0.3, -0.1, "stand in for each other"),
            ("L0H1", "L0 mlp", 0.1, -0.1, 0.3, "need each other"),
        ],
        columns=pd.Index(["first", "second", "interaction", "low", "high", "how"]),
    )
    areas = pd.DataFrame(
        [("blank_muted", name, value, np.nan, np.nan, np.nan, np.nan) for name, value in (("span", span), ("f", 0.95))],
        columns=pd.Index(["empty", "figure", "value", "low", "high", "random", "p"]),
    )
    minimality = pd.DataFrame({"node": ["L1H0"], "adds": [0.8], "removed": ["L0H1"]})
    values = xr.Dataset(coords={"node": NAMES, "empty": ["blank_muted", "zero"]})
    other = pd.DataFrame()
    return Circuit(
        values,
        nodes,
        other,
        areas,
        other,
        minimality,
        links=links,
        stability=other,
        random=other,
        what="C",
        unit="logit",
    )


def by_name(fig):
    return {trace.name: trace for trace in fig.data}


def test_members_stand_at_their_layer_and_head_and_grow_with_their_score():
    fig = circuit().plot()
    found = by_name(fig)
    lowers, raises, rest = found["lowers m"], found["raises m"], found["not in the circuit"]
    # The whole model lies below the empty one: what scores positive lowers m.
    assert list(zip(lowers.x, lowers.y, lowers.text, strict=True)) == [(1, 0, "L1H0"), (0, 1, "L0H1")]
    assert list(zip(raises.x, raises.y, raises.text, strict=True)) == [(0, 2, "L0 mlp")]
    assert lowers.marker.color == colours.PICTURE
    assert raises.marker.color == colours.SOUND
    assert lowers.marker.size == pytest.approx([34.0, 10 + 24 * (0.5 / 8) ** 0.5])
    assert raises.marker.size == pytest.approx([10 + 24 * (2 / 8) ** 0.5])
    assert list(rest.x) == [0, 1, 1]
    assert list(fig.layout.yaxis.ticktext) == ["H0", "H1", "MLP"]
    assert "adds +0.80 to f without L0H1" in lowers.customdata[0]
    assert "90% of bootstraps" in raises.customdata[0]
    assert "bootstraps" not in lowers.customdata[1]  # not measured is not said
    assert by_name(circuit(span=10.0).plot())["raises m"].text[0] == "L1H0"


def test_lines_join_members_that_act_together():
    fig = circuit().plot()
    lines = [trace for trace in fig.data if trace.mode == "lines"]
    assert [line.name for line in lines] == [
        "L0 mlp and L1H0 need each other",
        "L0H1 and L1H0 stand in for each other",
    ]
    assert [line.line.dash for line in lines] == ["solid", "dot"]
    assert [line.line.width for line in lines] == pytest.approx([6.0, 3.5])
    assert [tuple(line.x) for line in lines] == [(0, 1), (0, 1)]
    assert not [trace for trace in plots.circuit(circuit(), least=0.5).data if trace.mode == "lines"]


@pytest.mark.parametrize("given", ["mapping", "finding"])
def test_roles_are_rows_and_colours(given):
    roles = {(1, 0): "gate", "L0H1": "picture writer"}
    if given == "finding":
        rows = [(1, 0, "gate"), (1, 0, "sound carrier"), (0, 1, "picture writer")]
        roles = SimpleNamespace(heads=pd.DataFrame(rows, columns=pd.Index(["layer", "head", "role"])))
    fig = plots.circuit(circuit(), roles=roles)
    found = by_name(fig)
    assert list(fig.layout.yaxis.ticktext) == ["MLP", "no role", "gate", "picture writer"]
    assert found["gate"].marker.color == colours.PURPLE
    assert list(found["gate"].y) == [2]
    assert list(found["picture writer"].text) == ["L0H1"]
    assert list(found["MLP"].text) == ["L0 mlp"]
    with pytest.raises(InputError, match="L7H0, which is no node"):
        plots.circuit(circuit(), roles={(7, 0): "gate"})
