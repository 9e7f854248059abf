"""Parts are done once under the same settings, again under others, and leave nothing when they fail."""

from __future__ import annotations

import json

import pytest

from av_lens.lab.pages import Parts
from av_lens.results.provenance import source_hash
from av_lens.whole_files import write_whole


@pytest.fixture
def counted():
    calls: list[str] = []

    def work(folder):
        calls.append(folder.name)
        (folder / "x.txt").write_text(str(len(calls)))

    return calls, work


def test_a_finished_part_is_not_done_again(tmp_path, counted):
    calls, work = counted
    first = Parts(tmp_path, {"seed": 0})
    place = first.ensure("a", work)
    assert (place / "x.txt").read_text() == "1"
    assert set(first.seconds) == {"a"}
    second = Parts(tmp_path, {"seed": 0})
    assert second.ensure("a", work) == place
    assert len(calls) == 1
    assert second.seconds == {}


def test_other_settings_do_it_anew(tmp_path, counted):
    calls, work = counted
    Parts(tmp_path, {"seed": 0}).ensure("a", work)
    place = Parts(tmp_path, {"seed": 1}).ensure("a", work)
    assert (place / "x.txt").read_text() == "2"
    assert len(calls) == 2


def test_a_part_that_fails_leaves_the_finished_ones_and_is_begun_afresh(tmp_path, counted):
    _, work = counted
    parts = Parts(tmp_path, {"seed": 0})
    parts.ensure("a", work)

    def fails(folder):
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.ensure("b", fails)
    assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "b").exists()
    place = parts.ensure("b", work)
    assert sorted(p.name for p in place.iterdir()) == ["x.txt"]


def test_a_damaged_ledger_means_that_nothing_is_known(tmp_path, counted):
    calls, work = counted
    Parts(tmp_path, {"seed": 0}).ensure("a", work)
    (tmp_path / "parts.json").write_text("{")
    Parts(tmp_path, {"seed": 0}).ensure("a", work)
    assert len(calls) == 2
    assert set(json.loads((tmp_path / "parts.json").read_text())) == {"a"}


def test_the_key_depends_on_the_settings_and_the_source(tmp_path, monkeypatch):
    one = Parts(tmp_path, {"seed": 0}).key
    assert one == Parts(tmp_path, {"seed": 0}).key
    assert one != Parts(tmp_path, {"seed": 1}).key
    assert len(source_hash()) == 64
    monkeypatch.setattr("av_lens.lab.pages.source_hash", lambda: "another")
    assert one != Parts(tmp_path, {"seed": 0}).key


def test_a_file_is_written_whole(tmp_path):
    write_whole(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
