"""The study of seeds: its figures are the findings' own, its page is the record's; slow: av-tiny on few conflicts."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from planted_record import full_isolation, planted_isolation

from av_lens.errors import InputError
from av_lens.lab import seeds


def with_releases(found, values):
    arrays = {f"discovery/suffix/release/{donor}": np.full((3, *values.shape), -9e3) for donor in seeds.PRIMARY_DONORS}
    arrays["discovery/suffix/release/zero"] = np.stack([values - 1, values, values + 1])
    held_out = {"gap confirmation": 11.0, "heads for half of the gap": 2.0}
    return dataclasses.replace(found, arrays=arrays, summary=found.summary | held_out)


@pytest.fixture(scope="module")
def entry():
    values = np.arange(64.0).reshape(8, 8)
    found, again = planted_isolation(), planted_isolation()
    fewer = again.heads[again.heads["head"] != again.heads["head"].iloc[0]]
    again = dataclasses.replace(again, heads=fewer)
    return found, again, seeds.entry_of(with_releases(found, values), with_releases(again, values**2))


def test_an_entry_holds_the_findings_own_figures(entry):
    found, again, made = entry
    chosen = found.sets[found.sets["chosen"]].iloc[0]
    assert made["set"]["release"] == chosen["release"]
    assert made["set"]["members"] == chosen["members"]
    assert made["summary"] == {name: found.summary[name] for name in ("G", "C", "gap")} | {"gap confirmation": 11.0}
    headings, rows = seeds.tables({"models": [{"model": "x", **made}]})[0]
    assert headings == ["model", "x"]
    said = dict(rows)
    assert said["of the gap"] == f"{chosen['release'] / 11.0:.2f}"  # held out over held out, as the verdict says it
    assert said["heads for half"] == "2"
    both = [
        {f"L{row.layer}H{row.head}" for row in one.heads.itertuples() if row.role in seeds_roles()}
        for one in (found, again)
    ]
    assert (set(made["named"]), set(made["named again"])) == tuple(both)
    assert 0 < made["jaccard"] == len(both[0] & both[1]) / len(both[0] | both[1]) < 1
    assert made["rank correlation"] == pytest.approx(1.0)  # squares of rising numbers rise
    assert [row["control"] for row in made["specificity"]] == list(found.specificity["control"])
    assert said["not held to 5 points"] == "factual heard, audio-only (untested)"
    assert "text-only" not in said["not held to 5 points"]  # its divergence is reported, and held to nothing


def seeds_roles():
    return ("picture writer", "sound opponent", "gate", "undetermined")


def test_a_record_without_a_set_is_told_as_one(entry):
    found, again, _ = entry
    bare = dataclasses.replace(found, sets=found.sets.head(0), heads=found.heads.head(0), members=found.members.head(0))
    other = dataclasses.replace(again, heads=again.heads.head(0), members=again.members.head(0))
    values = np.arange(64.0).reshape(8, 8)
    made = {"model": "x", **seeds.entry_of(with_releases(bare, values), with_releases(other, -values))}
    assert made["set"] is None
    assert made["jaccard"] is None
    assert made["rank correlation"] == pytest.approx(-1.0)
    (_, sets), (_, halves) = seeds.tables({"models": [made]})
    assert [row[1:] for row in sets[3:9]] == [["–"]] * 6
    assert halves[0][1:4] == ["none", "none", "–"]


def test_the_page_is_filled_from_the_record(entry, tmp_path):
    record = {"models": [{"model": "av-tiny", **entry[2]}]}
    with pytest.raises(InputError, match=r"isolation\.md is not there or lacks"):
        seeds.store(record, tmp_path)
    (tmp_path / "isolation.md").write_text("before\n" + seeds.PAGE.empty.replace("\n\n", "\nold\n") + "after\n")
    text = seeds.store(record, tmp_path).read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert seeds.page_tables(record) in text
    assert json.loads((tmp_path / "seeds.json").read_text()) == record
    headings, rows = seeds.tables(record)[0]
    assert {len(row) for row in rows} == {len(headings)}


def test_no_model_and_two_of_one_name_are_refused_before_anything_is_staged(tmp_path):
    with pytest.raises(InputError, match="name at least one"):
        seeds.run_seeds([], out=tmp_path / "x")
    with pytest.raises(InputError, match="none twice"):
        seeds.run_seeds(["av-tiny", "elsewhere/av-tiny"], out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_full_record_with_every_table_makes_an_entry():
    found = with_releases(full_isolation(), np.arange(64.0).reshape(8, 8))
    assert seeds.entry_of(found, found)["jaccard"] == 1.0


@pytest.mark.slow
def test_av_tiny_is_isolated_twice_and_goes_on_where_it_was(tmp_path):
    first = seeds.run_seeds(["av-tiny"], out=tmp_path, conflicts=44)
    assert first["models"][0]["named"]
    again = seeds.run_seeds(["av-tiny"], out=tmp_path, conflicts=44)
    assert again["models"] == first["models"]
