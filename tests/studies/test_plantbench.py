"""The bench: what is known of a model, a run that goes on where it was stopped, the page from the record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from av_lens.errors import InputError
from av_lens.lab.calibration import PlantTruth, read_plant, truth_of
from av_lens.lab.plantbench import bench as plantbench
from av_lens.lab.plantbench import pages as plantbench_pages
from av_lens.lab.plantbench.methods import METHODS
from av_lens.lab.plantbench.pages import DONORS, chosen, mean_over, nulls
from av_lens.lab.plantbench.scores import DAMAGE_LAST
from av_lens.plots.plant_bench import plant_bench_svg

HEAD = {"layer": 5, "adds": 0.8, "alone": 0.7, "kind": "writer"}


def test_truth_files_of_both_schemas_are_read():
    old = truth_of({"schema": 1, "heads": [{**HEAD, "head": 0}, {**HEAD, "head": 1, "kind": "free rider"}]})
    assert old.kinds == {(5, 0): "picture writer"}
    assert old.free_riders == ((5, 1),)
    assert not old.redundant
    heads = [{**HEAD, "head": 0, "alone": 0.06, "free_rider": False}, {**HEAD, "head": 2, "kind": "opponent"}]
    new = truth_of(
        {"asked_for": "writers", "heads": heads, "decoys": [{"layer": 5, "head": 2}, {"layer": 4, "head": 7}]}
    )
    assert new.kinds == {(5, 0): "picture writer"}  # what is listed as a decoy is one
    assert (new.plant, new.redundant, new.beside_a_decoy) == ("writers", True, True)
    assert PlantTruth.of_dict(json.loads(json.dumps(new.as_dict()))) == new


def test_what_is_known_of_shipped_models():
    assert read_plant("av-tiny-balanced").null
    assert read_plant("av-tiny-planted").kinds == {(3, 2): "gate", (3, 3): "sound opponent"}
    subject = read_plant("av-tiny")
    assert (subject.plant, subject.null, subject.kinds) == ("subject", False, {})
    with pytest.raises(InputError, match="neither a folder nor a shipped model"):
        read_plant("av-tiny-plantd")


def entry(
    name: str, truth: PlantTruth, found: tuple[tuple[int, int], ...], *, blind: bool = False, layers: int = 2
) -> dict[str, Any]:
    """A scored model of layers of 4 heads, in which `found` scores highest; blank-picture patching may be blind."""
    strong = np.full((layers, 4), 0.01)
    for head in found:
        strong[head] = 3.0
    weak = strong[::-1, ::-1] if blind else strong
    scores = {"isolate": strong, DAMAGE_LAST: strong} | {
        method: weak if "blank picture" in method else strong for method in METHODS
    }
    named = [
        {"layer": head[0], "head": head[1], "role": truth.kinds.get(head, "undetermined"), "confirmed": True,
         "donor": "zero", "flags": "always on", "single": True, "member": False}
        for head in found
    ]  # fmt: skip
    return {
        "model": name, "truth": truth.as_dict(), "n_layers": layers, "n_heads": 4,
        "summary": {"G": 10.0, "C": -4.0, "gap": 14.0, "delta": 1.0, "n discovery": 30.0},
        "verdict_kind": "suppression", "verdict": "", "stamps": [], "named": named, "exchanged": [0, 1],
        "scores": {method: plantbench.plain_table(values) for method, values in scores.items()},
        "seconds": dict.fromkeys(scores, 1.0), "provenance": {"created": "2026-01-01"},
    }  # fmt: skip


def bench(folder: Path) -> plantbench.Scored:
    gate = PlantTruth("gates", {(0, 1): "gate"})
    writer = PlantTruth("decoy-and-writers", {(1, 2): "picture writer"}, decoys=((1, 3),))
    models = [
        entry("gates-1", gate, ((0, 1),), blind=True),
        entry("decoyed-2", writer, ((1, 2), (1, 3))),
        entry("balanced", PlantTruth("balanced", {}), ()),
        entry("av-tiny", PlantTruth("subject", {}), ((1, 0),)),
    ]
    return plantbench.Scored(folder, plantbench.criteria(conflicts=64, seed=7), models, [])


def test_the_record_judges_every_method(tmp_path: Path):
    record = plantbench_pages.record_of(bench(tmp_path))
    models = record["models"]
    assert [len(chosen(models, group)) for group in ("planted", "gate", "picture writer", "beside a decoy")] == [
        2,
        1,
        1,
        1,
    ]
    assert [one["model"] for one in nulls(models)] == ["balanced"]
    blank = "exact patching, blank picture"
    assert mean_over(chosen(models, "gate"), blank, "auroc")[0] == pytest.approx(3 / 7)
    assert mean_over(chosen(models, "gate"), "isolate", "auroc")[0] == 1.0
    decoyed = models[1]["methods"]["isolate"]
    assert (decoyed["false decoys"], decoyed["precision"], decoyed["recall"], decoyed["kind right"]) == (1, 0.5, 1, 1)
    assert models[1]["methods"]["DLA"].get("named") is None  # no effect on C: names nobody
    assert next(iter(models[0]["donors"])) == "blank_muted, mean_other"
    assert set(models[0]["heads"][0]["shares"]) == set(DONORS)
    json.dumps(record, allow_nan=False)


def test_means_over_models_have_an_interval_from_five_on():
    def one(value: float | None) -> dict[str, Any]:
        return {"methods": {"isolate": {"auroc": value}}}

    value, low, high = mean_over([one(1.0), one(0.5), one(None)], "isolate", "auroc")
    assert value == 0.75
    assert math.isnan(low)
    value, low, high = mean_over([one(x) for x in (1.0, 1.0, 1.0, 1.0, 0.0)], "isolate", "auroc")
    assert (value, high) == (0.8, 1.0)
    assert low < 0.6


def test_the_page_is_filled_from_the_record(tmp_path: Path):
    record = plantbench_pages.record_of(bench(tmp_path))
    with pytest.raises(InputError, match=r"plantbench\.md is not there or lacks"):
        plantbench_pages.store(record, tmp_path)
    (tmp_path / "plantbench.md").write_text(f"# Bench\n\n{plantbench_pages.PAGE.empty}\nEnd\n")
    page = plantbench_pages.store(record, tmp_path).read_text()
    assert page.startswith("# Bench")
    assert page.endswith("End\n")
    stored = json.loads((tmp_path / "plantbench.json").read_text())
    assert plantbench_pages.page_tables(stored) in page
    assert "| isolate | 0 of 1 | 0.000 | 0.0000 | 1 |" in page  # no null is named, one decoy is
    # A named decoy ranks as high as the true head beside it (AUROC 6.5 of 7), and a decoy is no null.
    assert "| AUROC | at least 0.98 | 0.964 | no |" in page
    assert "| kind right | at least 0.9 | 1.000 | yes |" in page
    assert "| models with nothing to be found, and a name | at most 1 of 20 | 0 of 1 | yes, of fewer than 20 |" in page
    assert "| av-tiny | L1H0 | – | " not in page  # all three primary donors show it
    svg = ElementTree.fromstring((tmp_path / "plantbench.svg").read_text())
    assert len(svg.findall(".//{*}title")) == 4 * len(plantbench_pages.ALL)  # planted, writer, gate, beside a decoy


def test_the_figure_leaves_out_what_was_not_measured():
    nothing = (math.nan, math.nan, math.nan)
    drawn = plant_bench_svg(
        {"a": {"x": (0.5, 0.4, 0.6), "y": nothing}, "b<": {"x": (1.0, math.nan, math.nan)}}, label="A"
    )
    svg = ElementTree.fromstring(drawn)
    marks = [one for one in svg.findall(".//{*}circle") if len(one)]
    assert [one.findtext("{*}title") for one in marks] == ["a, x: 0.500", "b<, x: 1.000"]
    assert float(marks[0].get("cx", "0")) == pytest.approx(210 + 0.5 * 550)
    with pytest.raises(InputError, match="at least one method"):
        plant_bench_svg({}, label="A")


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A bench whose models are scored at once; the list says which were."""
    done: list[str] = []

    def scored(name: str, *_: Any) -> dict[str, Any]:
        done.append(name)
        return entry(Path(name).name, read_plant(name), ((3, 2),), layers=7)

    monkeypatch.setattr(plantbench, "_scored", scored)
    monkeypatch.setattr(plantbench, "stage", lambda folder, **_: (folder / "pairs.jsonl").write_text(""))
    monkeypatch.setattr(plantbench, "read_conflicts", lambda path: [])
    return done


def test_a_run_goes_on_where_it_was_stopped(staged: list[str], tmp_path: Path):
    names = ["av-tiny-planted", "av-tiny-balanced"]
    first = plantbench.run_plantbench(names, out=tmp_path, limit=1)
    assert (staged, first.missing) == (["av-tiny-planted"], ["av-tiny-balanced"])
    second = plantbench.run_plantbench(names, out=tmp_path)
    assert staged == names
    assert [one["model"] for one in second.models] == names
    (tmp_path / "models" / "av-tiny-planted.json").write_text("{broken")
    plantbench.run_plantbench(names, out=tmp_path)
    assert staged == [*names, "av-tiny-planted"]


def test_another_model_of_the_same_name_is_scored_again(staged: list[str], tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "planted.json").write_text(json.dumps({"heads": [{**HEAD, "head": 0}]}))
    out = tmp_path / "out"
    plantbench.run_plantbench([str(folder)], out=out)
    (folder / "planted.json").write_text(json.dumps({"heads": [{**HEAD, "head": 1}]}))
    plantbench.run_plantbench([str(folder)], out=out)
    assert len(staged) == 2


@pytest.mark.usefixtures("staged")
def test_what_cannot_be_benched_is_refused(tmp_path: Path):
    plantbench.run_plantbench(["av-tiny-planted"], out=tmp_path)
    with pytest.raises(InputError, match=r"other criteria \(conflicts\)"):
        plantbench.run_plantbench(["av-tiny-planted"], out=tmp_path, conflicts=50)
    with pytest.raises(InputError, match="two models are called 'av-tiny-planted'"):
        plantbench.run_plantbench(["av-tiny-planted", "av-tiny-planted"], out=tmp_path)
    with pytest.raises(InputError, match="no model was given"):
        plantbench.run_plantbench([], out=tmp_path)
    empty = plantbench.run_plantbench(["av-tiny-balanced"], out=tmp_path, limit=0)
    with pytest.raises(InputError, match="no scored model yet"):
        plantbench_pages.record_of(empty)


@pytest.mark.usefixtures("staged")
def test_the_command_shows_tables_fills_the_page_and_says_what_is_left(tmp_path: Path):
    from typer.testing import CliRunner

    from av_lens.cli.main import app

    (tmp_path / "plantbench.md").write_text(f"{plantbench_pages.PAGE.empty}")
    folder, names = str(tmp_path / "out"), ["av-tiny-planted", "av-tiny-balanced"]
    said = CliRunner().invoke(app, ["plantbench", *names, "--out", folder, "--limit", "1", "--docs", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "Every method on the planted models" in said.output
    assert "left for later: av-tiny-balanced; the same command goes on." in said.output
    page = (tmp_path / "plantbench.md").read_text()
    assert "| av-tiny-planted | planted | -0.400 | L3H2 gate, L3H3 sound opponent | L3H2 gate |" in page
