"""What was written before opens after: a record of schema 2, and what a run's key holds."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_model import FakeModel, fake_conflicts, isolated

import av_lens
from av_lens.errors import InputError
from av_lens.isolation.measuring.store import MEASURES, measuring_hash
from av_lens.isolation.running.preparing import hash_of
from av_lens.results.record import TABLES, Isolation


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Saved before isolation was built on plans: `isolate(..., s=0.1, quick=True, named_only=True)` on 44 conflicts."""
    folder = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(Path(__file__).with_name("record_v2.zip")) as held:
        held.extractall(folder)
    return folder


def test_a_record_written_before_opens_with_its_figures_and_is_saved_again_with_them(old, tmp_path):
    found = Isolation.load(old)
    assert "Confirmed at suffix: picture writer L2H0; sound opponent L2H1; gate L0H1." in found.verdict
    assert {(r.layer, r.head, r.role) for r in found.suppressors.itertuples()} == {
        (2, 0, "picture writer"), (2, 1, "sound opponent"), (0, 1, "gate")
    }  # fmt: skip
    assert found.grid("release", "blank_muted")[2, 0] == pytest.approx(6, abs=0.02)
    assert found.protocol["hash"] == hash_of(found.protocol) == found.provenance["protocol_hash"]
    assert found.heads["status"].eq("").all()  # a column that came later is empty
    assert found.heads[["release_half_dose", "write_share"]].isna().all(axis=None)
    assert not len(found.mlps)
    found.save(tmp_path)
    for path in old.glob("*.csv"):
        was, again = (pd.read_csv(place / path.name) for place in (old, tmp_path))
        pd.testing.assert_frame_equal(again[list(was.columns)], was)
        assert list(pd.read_csv(tmp_path / path.name).columns) == list(TABLES[path.stem])
    assert Isolation.load(tmp_path).verdict == found.verdict


def test_a_record_whose_columns_are_not_this_tables_is_refused(old, tmp_path):
    shutil.copytree(old, tmp_path / "record")
    head = json.loads((tmp_path / "record" / "isolation.json").read_text())
    few, strange = {"layer": "int"}, head["tables"]["heads"] | {"mood": "text"}
    for columns, said in (
        (few, f"it has 1 of {len(TABLES['heads'])} columns"),
        (strange, "columns, and strange ones: mood"),
    ):
        changed = head | {"tables": head["tables"] | {"heads": columns}}
        (tmp_path / "record" / "isolation.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=rf"heads\.csv is not the table 'heads' of a saved isolation.*{said}"):
            Isolation.load(tmp_path / "record")


def test_a_run_of_today_by_the_first_edition_finds_what_that_record_holds(old):
    was = Isolation.load(old)
    now = isolated(FakeModel(), fake_conflicts(44), s=0.1, quick=True, named_only=True, protocol="1")
    key = ["layer", "head", "role"]
    one, two = (frame.set_index(key).sort_index() for frame in (was.heads, now.heads))
    assert list(one.index) == list(two.index)
    for column in ("effect", "low", "high", "direct_share", "reads_picture", "sufficiency", "dla", "discovery_effect"):
        np.testing.assert_allclose(one[column], two[column], atol=1e-4, err_msg=column)
    criteria = ("s", "donors", "level", "direct_share_cut", "family", "least_gap_share", "damage", "non_inferiority")
    assert {name: was.protocol[name] for name in criteria} == {name: now.protocol[name] for name in criteria}


def test_the_key_holds_the_code_that_measures_and_no_other(tmp_path):
    for name in (*MEASURES, "plots", "reports", "lab", "cli.py"):
        place = tmp_path / name
        place = place if place.suffix else place / "inside.py"
        place.parent.mkdir(exist_ok=True)
        place.write_text("one")
    seen = [measuring_hash.__wrapped__(tmp_path)]
    for path in sorted(tmp_path.rglob("*.py")):
        path.write_text("two")
        seen.append(measuring_hash.__wrapped__(tmp_path))
        assert (seen[-1] != seen[-2]) == (path.relative_to(tmp_path).parts[0] in MEASURES), path
    assert all((Path(av_lens.__file__).parent / name).exists() for name in MEASURES)
