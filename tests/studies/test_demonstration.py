"""The demo from end to end, with a stand-in for the search; on the shipped models it is the slow test."""

from __future__ import annotations

import dataclasses
import json

import pytest
from planted_record import planted_isolation

from av_lens.lab import demonstration
from av_lens.lab.demonstration import PLANTED, SUBJECT, run_demo
from av_lens.results.record import Isolation

CONFLICTS, FEW = 4, 3


@pytest.fixture
def stand_in(monkeypatch):
    """Count the searches instead of doing them."""
    calls: list[str] = []

    def search(model, conflicts, *, seed, progress, quick, workers, named_only=False, grown=None):
        calls.append(model)
        assert workers >= 1
        assert len(conflicts) == (FEW if model == PLANTED else CONFLICTS)
        progress("effects", 1, 1)
        found = planted_isolation(seed)
        provenance = {**found.provenance, "model": model}
        found = dataclasses.replace(found, conflicts=found.conflicts.head(CONFLICTS), provenance=provenance)
        if grown is not None:
            grown(dataclasses.replace(found, verdict="The picture dominates."))
        return found

    monkeypatch.setattr(demonstration, "load", lambda name: name)
    monkeypatch.setattr(demonstration, "isolate", search)
    monkeypatch.setattr(
        demonstration, "planted_truth", lambda name: {(5, 2): "writer", (5, 3): "writer", (3, 4): "gate"}
    )
    return calls


def test_isolates_then_calibrates_and_the_report_grows_meanwhile(stand_in, tmp_path):
    told, early = [], []

    def said(line):
        early.append((line, list(stand_in), (tmp_path / "report.html").exists()))

    def progress(stage, done, total):
        told.append((stage, done, total))
        if stage.startswith(PLANTED):
            text = (tmp_path / "report.html").read_text(encoding="utf-8")
            assert demonstration.GROWING in text
            assert "The picture dominates." in text

    shown = run_demo(tmp_path, conflicts=CONFLICTS, calibrate_on=FEW, seed=0, progress=progress, told=said)
    assert stand_in == [SUBJECT, PLANTED]
    assert early == [("so far: The picture dominates.", [SUBJECT], False)]
    assert shown.calibration.passed
    assert shown.report == tmp_path / "report.html"
    text = shown.report.read_text(encoding="utf-8")
    assert text.count("data:video/mp4;base64,") == CONFLICTS
    assert shown.calibration.sentence in text
    assert demonstration.GROWING not in text
    assert "no evidence about real ones" in text
    assert len(list((tmp_path / "clips").glob("*-conflict.mp4"))) == CONFLICTS
    assert Isolation.load(tmp_path / "numbers").verdict == shown.found.verdict
    assert set(json.loads((tmp_path / "seconds.json").read_text())) == {"clips", "calibration", "isolation", "report"}
    assert (f"{PLANTED}: effects", 1, 1) in told
    assert told[0][0] == "writing conflict clips"


def test_goes_on_where_it_stopped(stand_in, tmp_path, monkeypatch):
    whole = demonstration.isolate

    def page(found, out, **options):
        (out / "report.html").write_text("a page")
        return out / "report.html"

    monkeypatch.setattr(demonstration, "write_bundle", page)

    def stops_at_the_plant(model, conflicts, **options):
        if model == PLANTED:
            raise KeyboardInterrupt
        return whole(model, conflicts, **options)

    monkeypatch.setattr(demonstration, "isolate", stops_at_the_plant)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, conflicts=CONFLICTS, calibrate_on=FEW, seed=0)
    assert stand_in == [SUBJECT]
    monkeypatch.setattr(demonstration, "isolate", whole)
    run_demo(tmp_path, conflicts=CONFLICTS, calibrate_on=FEW, seed=0)
    assert stand_in == [SUBJECT, PLANTED]
    run_demo(tmp_path, conflicts=CONFLICTS, calibrate_on=FEW, seed=0)
    assert stand_in == [SUBJECT, PLANTED]
    run_demo(tmp_path, conflicts=CONFLICTS, calibrate_on=FEW, seed=1)
    assert len(stand_in) == 4


@pytest.mark.slow
def test_on_the_shipped_models(tmp_path):
    shown = run_demo(tmp_path)
    assert shown.calibration.passed
    assert shown.found.verdict_kind == "named"
    assert len(shown.found.conflicts) == 132
    assert "exploratory" not in shown.found.stamps
    assert 1 <= len(shown.found.suppressors) <= 8
    assert sum(shown.seconds.values()) < 480, "twice the time that two free cores are meant to need"
