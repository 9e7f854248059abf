"""The record of an isolation: built whole or refused, saved and opened equal, never by pickle."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_record import planted_isolation

from av_lens.errors import InputError
from av_lens.results.record import TABLES, Isolation, table


def powerless() -> Isolation:
    """A record with a figure that was not measured."""
    found = planted_isolation()
    return replace(found, summary=found.summary | {"power": float("nan")})


def test_a_saved_record_opens_equal(tmp_path):
    found = powerless()
    found.save(tmp_path / "out")
    again = Isolation.load(tmp_path / "out")
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(found, name), getattr(again, name), check_exact=True)
    assert set(found.arrays) == set(again.arrays)
    for key, value in found.arrays.items():
        np.testing.assert_array_equal(value, again.arrays[key])
    assert again.verdict == found.verdict
    assert again.stamps == found.stamps
    assert np.isnan(again.summary["power"])
    assert {k: v for k, v in again.summary.items() if k != "power"} == {
        k: v for k, v in found.summary.items() if k != "power"
    }
    assert again.protocol == found.protocol
    assert again.provenance == found.provenance


def test_files_are_plain_data(tmp_path):
    powerless().save(tmp_path)
    head = json.loads((tmp_path / "isolation.json").read_text())
    assert head["version"] == 2
    assert head["summary"]["power"] is None
    assert "NaN" not in (tmp_path / "isolation.json").read_text()
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as data:
        assert all(data[key].dtype == np.float64 for key in data.files)
    assert not list(tmp_path.glob(".*.part"))


def test_an_empty_record_round_trips(tmp_path):
    found = Isolation(verdict="no suppression", n_layers=1, n_heads=2, summary={})
    found.save(tmp_path)
    again = Isolation.load(tmp_path)
    assert again.heads.empty
    assert list(again.heads.columns) == list(TABLES["heads"])
    assert again.heads.dtypes.equals(found.heads.dtypes)


def test_grid_lays_effects_out_by_layer_and_head():
    found = planted_isolation()
    grid = found.grid("release", "blank_muted")
    np.testing.assert_allclose(grid, found.arrays["discovery/suffix/release/blank_muted"].mean(0))
    with pytest.raises(InputError, match=r"unknown effect 'releas \(zero\)'. Did you mean 'release \(zero\)'"):
        found.grid("releas", "zero")
    with pytest.raises(InputError, match=r"unknown column 'men'. Did you mean 'mean'"):
        found.grid("release", column="men")


def test_suppressors_are_the_confirmed_ones():
    found = planted_isolation()
    assert found.suppressors[["layer", "head"]].to_numpy().tolist() == [[5, 2], [5, 3]]


def test_faults_are_refused():
    with pytest.raises(InputError, match=r"unknown table 'head'. Did you mean 'heads'"):
        table("head", [])
    with pytest.raises(InputError, match=r"table 'heads': unknown column 'layr'. Did you mean 'layer'"):
        table("heads", [{"layr": 1}])
    found = planted_isolation()
    with pytest.raises(InputError, match=r"table 'heads' has columns"):
        replace(found, heads=found.heads.drop(columns="q"))
    with pytest.raises(InputError, match=r"unknown role 'picture writr'. Did you mean 'picture writer'"):
        replace(found, heads=found.heads.assign(role="picture writr"))


def test_loading_what_is_not_there_says_so(tmp_path):
    with pytest.raises(InputError, match=r"isolation\.json is not there"):
        Isolation.load(tmp_path)
    planted_isolation().save(tmp_path)
    head = json.loads((tmp_path / "isolation.json").read_text())
    (tmp_path / "isolation.json").write_text(json.dumps(head | {"version": 99}))
    with pytest.raises(InputError, match="schema version 99; this av_lens reads version 2"):
        Isolation.load(tmp_path)


def test_missing_is_nan_never_zero():
    frame = table("heads", [{"layer": 1, "head": 2, "role": "gate"}])
    assert np.isnan(frame.loc[0, "effect"])
    assert frame.loc[0, "flags"] == ""
    assert not frame.loc[0, "confirmed"]


def test_layers_are_those_of_the_model_and_knowledge_counts_the_ones_passed():
    found = planted_isolation()
    row = table("knowledge", [{"layer": found.n_layers}])
    assert replace(found, knowledge=row).knowledge["layer"].tolist() == [found.n_layers]
    beyond = {"knowledge": row.assign(layer=found.n_layers + 1), "heads": found.heads.assign(layer=found.n_layers)}
    for name, rows in beyond.items():
        with pytest.raises(InputError, match=rf"table '{name}' names a layer beyond the {found.n_layers} that"):
            replace(found, **{name: rows})
