"""The bench: what is known of a model, a run that goes on where it was stopped, the page from the record."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from av_lens.errors import InputError
from av_lens.lab.calibration import PlantTruth, read_plant, truth_of
from av_lens.lab.plantbench import bench as plantbench
from av_lens.lab.plantbench import pages as plantbench_pages
from av_lens.lab.plantbench.bench import RULES
from av_lens.lab.plantbench.methods import METHODS
from av_lens.lab.plantbench.pages import chosen, mean_over
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
    name: str,
    truth: PlantTruth,
    found: tuple[tuple[int, int], ...],
    *,
    blind: bool = False,
    layers: int = 2,
    c: float = -4.0,
    struck: tuple[tuple[int, int], ...] = (),
) -> dict[str, Any]:
    """A scored model of layers of 4 heads, in which `found` scores highest; blank-picture patching may be blind."""
    strong = np.full((layers, 5), 0.01)
    for head in found:
        strong[head] = 3.0
    weak = strong[::-1, ::-1] if blind else strong
    scores = {method: weak if "blank picture" in method else strong for method in (*RULES, DAMAGE_LAST, *METHODS)}
    named = [
        {"layer": head[0], "head": head[1], "role": truth.kinds.get(head, "undetermined"), "donor": "zero",
         "confirmed": head not in struck, "struck": head in struck, "flags": "", "single": True, "member": False}
        for head in found
    ]  # fmt: skip
    names = [plantbench.node_name((layer, head)) for layer in range(layers) for head in (0, 1, 2, 3, -1)]
    true = [plantbench.node_name(at) for at in truth.at(0.1).kinds]
    off = [plantbench.node_name(at) for at in truth.at(0.1).free_riders]
    run = {"delta": 1.0, "verdict_kind": "suppression", "verdict": "", "stamps": [], "reasons": [], "named": named}
    return {
        "model": name, "truth": truth.as_dict(), "n_layers": layers, "n_heads": 4,
        "true": true, "innocent": [one for one in names if one not in {*true, *off}],
        "summary": {"G": 10.0, "C": c, "gap": 10.0 - c, "n discovery": 30.0},
        "runs": {rule: {**run, "s": s} for rule, s in zip(RULES, (0.1, 0.03), strict=True)},
        "scores": {method: plantbench.by_node(values, names) for method, values in scores.items()},
        "areas": {method: dict.fromkeys(plantbench_pages.AREAS, 0.5) for method in scores},
        "seconds": dict.fromkeys(scores, 1.0), "provenance": {"created": "2026-01-01"},
    }  # fmt: skip


def bench(folder: Path) -> plantbench.Scored:
    gate = PlantTruth("gates", {(0, 1): "gate"})
    writer = PlantTruth("decoy-and-writers", {(1, 2): "picture writer"}, decoys=((1, 3),))
    mlp = PlantTruth("mlp", {(1, -1): "gate", (0, 0): "gate"}, limits={(0, 0): 0.05})
    models = [
        entry("gates-1", gate, ((0, 1),), blind=True),
        entry("decoyed-2", writer, ((1, 2), (1, 3))),
        entry("mlp-3", mlp, ((1, -1), (0, 3)), struck=((0, 3),)),
        entry("short-4", PlantTruth("gates", {(0, 1): "gate"}, missing=("it rides for free",)), ((0, 2),)),
        entry("balanced", PlantTruth("balanced", {}), (), c=9.0),
        entry("crosstalk", PlantTruth("crosstalk", {}), ((0, 2),), c=5.0, struck=((0, 2),)),
        entry("av-tiny", PlantTruth("subject", {}), ((1, 0),)),
    ]
    return plantbench.Scored(folder, plantbench.criteria(conflicts=64, seed=7), models, [])


def test_the_record_judges_every_method(tmp_path: Path):
    models = [plantbench_pages.summary_of(one) for one in plantbench_pages.record_of(bench(tmp_path))["models"]]
    groups = ("planted", "gate", "picture writer", "beside a decoy", "mlp", "short", "null", "null with a gap")
    assert [[one["model"] for one in chosen(models, group)] for group in groups] == [
        ["gates-1", "decoyed-2", "mlp-3"],
        ["gates-1", "mlp-3"],
        ["decoyed-2"],
        ["decoyed-2"],
        ["mlp-3"],
        ["short-4"],
        ["balanced", "crosstalk"],
        ["crosstalk"],
    ]
    blank = "exact patching, blank picture"
    assert mean_over(chosen(models, "gate")[:1], blank, "auroc")[0] == pytest.approx(4 / 9)
    assert mean_over(chosen(models, "gate")[:1], "isolate", "auroc")[0] == 1.0
    decoyed, mlp = (models[i]["methods"]["isolate"] for i in (1, 2))
    assert (decoyed["false decoys"], decoyed["precision"], decoyed["recall"], decoyed["kind right"]) == (1, 0.5, 1, 1)
    assert models[1]["methods"]["DLA"].get("named") is None  # no effect on C: names nobody
    # (0, 0) adds .05 G: minor at s = .10, true at .03; (0, 3) is struck, so that no head is called a suppressor.
    assert (mlp["recall"], mlp["confirmed false"], mlp["struck false"], mlp["mlp alone"]) == (1.0, 0.0, 1.0, 1.0)
    assert models[2]["methods"]["isolate, s = .03"]["recall"] == 0.5
    assert (mlp["auroc"], mlp["screened"], mlp["CPR, zero"]) == (pytest.approx(7.5 / 8), 1.0, 0.5)


def test_means_over_models_have_an_interval_from_five_on():
    def one(value: float | None) -> dict[str, Any]:
        return {"methods": {"isolate": {"auroc": value}}}

    value, low, high = mean_over([one(1.0), one(0.5), one(None)], "isolate", "auroc")
    assert value == 0.75
    assert math.isnan(low)
    value, low, high = mean_over([one(x) for x in (1.0, 1.0, 1.0, 1.0, 0.0)], "isolate", "auroc")
    assert (value, high) == (0.8, 1.0)
    assert low < 0.6


def test_the_page_is_filled_from_the_record_and_a_reader_recomputes_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    record, docs = plantbench_pages.record_of(bench(tmp_path)), tmp_path / "docs"
    docs.mkdir()
    with pytest.raises(InputError, match=r"plantbench\.md is not there or lacks"):
        plantbench_pages.store(record, docs)
    (docs / "plantbench.md").write_text(f"# Bench\n\n{plantbench_pages.PAGE.empty}\nEnd\n")
    page = plantbench_pages.store(record, docs).read_text()
    assert page.startswith("# Bench")
    assert page.endswith("End\n")
    assert plantbench_pages.read_record(docs) == json.loads(json.dumps(record))
    assert plantbench_pages.page_tables(plantbench_pages.read_record(docs)) in page
    for row in (
        "| isolate | planted | auroc | at least 0.97 | 0.961 | no |",
        "| isolate | planted | kind right | at least 0.85 | 1.000 | yes |",
        "| isolate | null | confirmed false | at most 1 of 24 | 0 of 2 | yes, of fewer than 24 |",
        "| isolate | planted | confirmed false | at most 2 of 40 | 1 of 3 | no, of fewer than 40 |",
        "| isolate | mlp | mlp alone | at least 5 of 6 | 1 of 1 | yes, of fewer than 6 |",
        "| isolate | 0 of 1 | 0.000 | 1 of 1 | 1.000 | 1 |",  # nulls without and with a gap; one decoy is named
        "| isolate | planted | 1 | 1 | 0 | 3 |",  # one donor: a false name struck, the decoy left, none lost
        "| short-4 | gates | -0.400 | L0H1 gate | L0H2 undetermined | 0.444 | 0.000 | 0.000 | it rides for free |",
    ):
        assert row in page, row
    svg = ElementTree.fromstring((docs / "plantbench.svg").read_text())
    assert len(svg.findall(".//{*}title")) == 5 * len(plantbench_pages.ALL)  # planted, mlp, writer, gate, decoy

    lines = page.split("```python\n")[1].split("\n```")[0]
    assert len(lines.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    row = next(row for row in page.splitlines() if row.startswith("| AtP* |"))
    assert capsys.readouterr().out.strip() == row.split("|")[2].strip() == "0.961"


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

    def scored(name: plantbench.Recipe, *_: Any) -> dict[str, Any]:
        done.append(name.place)
        return entry(name.name, read_plant(name.place), ((3, 2),), layers=7)

    monkeypatch.setattr(plantbench, "_scored", scored)
    monkeypatch.setattr(plantbench, "stage", lambda folder, **_: (folder / "pairs.jsonl").write_text(""))
    monkeypatch.setattr(plantbench, "read_conflicts", lambda path: [])
    return done


def test_a_run_stops_between_models_and_goes_on_there(
    staged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names, now, scored = ["av-tiny-planted", "av-tiny-balanced"], [0.0], plantbench._scored

    def slow(*given: Any) -> dict[str, Any]:
        now[0] += 60.0
        return scored(*given)

    monkeypatch.setattr(plantbench, "_scored", slow)
    monkeypatch.setattr(plantbench, "time", SimpleNamespace(monotonic=lambda: now[0]))
    first = plantbench.run_plantbench(names, out=tmp_path, minutes=1.5)  # a second model would end after 2
    assert (staged, first.missing) == (["av-tiny-planted"], ["av-tiny-balanced"])
    second = plantbench.run_plantbench(names, out=tmp_path)
    assert staged == names
    assert [one["model"] for one in second.models] == names
    third = plantbench.run_plantbench(names, out=tmp_path, minutes=0)  # what is there needs no time
    assert (len(third.models), third.missing) == (2, [])
    (tmp_path / "models" / "av-tiny-planted.json").write_text("{broken")
    plantbench.run_plantbench(names, out=tmp_path)
    assert staged == [*names, "av-tiny-planted"]
    monkeypatch.setattr(plantbench, "measuring_hash", lambda also: f"another program, {also}")
    plantbench.run_plantbench(names, out=tmp_path)
    assert len(staged) == 5  # other code measures: all are scored again


def test_the_fresh_models_are_fixed_before_the_first_is_made(
    staged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    listed, planted = tmp_path / "fresh.txt", list[tuple[str, dict[str, Any]]]()
    listed.write_text("writers 0 4\nbalanced 1 -\nmixture 0 - gap=.4 of=0\ngates 0 1\n")

    def plant(kind: str, *, out: str, **options: Any) -> None:
        if kind == "gates":
            raise InputError("there is no room.")
        del options["progress"]
        planted.append((kind, options))
        Path(out).mkdir(parents=True)
        (Path(out) / "planted.json").write_text(json.dumps({"heads": [{**HEAD, "head": 0}]}))

    monkeypatch.setattr("av_lens.lab.planting.planting.plant", plant)
    bases, out = ("av-tiny-planted", "av-tiny-balanced"), tmp_path / "out"
    with pytest.raises(InputError, match=r"line 2 of .* asks for base 1 and 1 were given.*a --base for each"):
        plantbench.run_plantbench(out=out, fresh=listed, bases=bases[:1])
    found = plantbench.run_plantbench(out=out, fresh=listed, bases=bases)
    writers = out / "planted" / "writers-b0-L4-s300000"
    assert planted == [
        ("writers", {"base": bases[0], "seed": 300_000, "layer": 4}),
        ("mixture", {"base": bases[0], "seed": 300_002, "gap": 0.4, "of": [str(writers)]}),
    ]
    assert [Path(one).name for one in staged] == ["writers-b0-L4-s300000", bases[1], "mixture-b0-s300002"]
    assert found.criteria["fresh"][0] == "writers 0 4"
    assert found.missing == ["gates-b0-L1-s300003 (cannot be made: there is no room.)"]
    assert "Not scored: gates-b0-L1-s300003 (cannot" in plantbench_pages.header_line(plantbench_pages.record_of(found))
    shutil.rmtree(out / "planted")  # what is scored need not be there; a mixture's parts must
    plantbench.run_plantbench(out=out, fresh=listed, bases=bases)
    assert (len(planted), len(staged)) == (2, 3)
    (out / "models" / "mixture-b0-s300002.json").unlink()
    plantbench.run_plantbench(out=out, fresh=listed, bases=bases)
    assert [kind for kind, _ in planted[2:]] == ["writers", "mixture"]
    assert len(staged) == 4
    listed.write_text("writers 0 4\n")
    with pytest.raises(InputError, match=r"other criteria \(fresh\)"):
        plantbench.run_plantbench(out=out, fresh=listed, bases=bases)
    listed.write_text("riters 0 4\n")
    with pytest.raises(InputError, match="kind of fresh model"):
        plantbench.run_plantbench(out=out, fresh=listed, bases=bases)


def test_the_list_of_fresh_models_holds_what_the_bench_must_hold():
    lines = [line.split() for line in Path(plantbench.__file__).with_name("fresh.txt").read_text().splitlines()]
    kinds = [kind for kind, *_ in lines]
    nulls = [kind for kind in kinds if kind in ("decoy", "decoy-colours", "balanced", "crosstalk")]
    assert len(kinds) - len(nulls) >= 40
    assert len(nulls) >= 24
    assert kinds.count("crosstalk") * 3 >= len(nulls)
    for kind, least in {"mixture": 8, "mlp": 6, "sink": 4, "redundant-gates": 4}.items():
        assert kinds.count(kind) >= least, kind
    assert {"writers", "two-pairs", "single", "opponents", "gates", "redundant-writers", "decoy-and-writers"} < set(
        kinds
    )
    assert sum(base == "3" and kind not in nulls for kind, base, *_ in lines) >= 6  # the base of 144 heads
    assert {float(more[0].removeprefix("gap=")) for kind, _, _, *more in lines if kind == "mixture"} >= {0.3, 0.8}


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
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(InputError, match="no model was given"):
        plantbench.run_plantbench(out=tmp_path, fresh=tmp_path / "none.txt")
    empty = plantbench.run_plantbench(["av-tiny-balanced"], out=tmp_path, minutes=0)
    with pytest.raises(InputError, match="no scored model yet"):
        plantbench_pages.record_of(empty)


@pytest.mark.usefixtures("staged")
def test_the_command_shows_tables_fills_the_page_and_says_what_is_left(tmp_path: Path):
    from typer.testing import CliRunner

    from av_lens.cli.main import app

    (tmp_path / "plantbench.md").write_text(f"{plantbench_pages.PAGE.empty}")
    folder, names = str(tmp_path / "out"), ["av-tiny-planted", "av-tiny-balanced"]
    plantbench.run_plantbench(names[:1], out=folder)
    said = CliRunner().invoke(app, ["plantbench", *names, "--out", folder, "--minutes", "0", "--docs", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "Every method on the planted models" in said.output
    assert "left for later: av-tiny-balanced; the same command goes on." in said.output
    page = (tmp_path / "plantbench.md").read_text()
    assert "| av-tiny-planted | planted | -0.400 | L3H2 gate, L3H3 sound opponent | L3H2 gate |" in page
