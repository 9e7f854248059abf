"""The command line: defaults are the functions', errors are one message, help is quick, tables say what was found."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted_record import planted_isolation
from rich.console import Console
from typer.testing import CliRunner

from av_lens import __version__
from av_lens.cli import console, faults
from av_lens.cli.faults import signature
from av_lens.cli.main import app
from av_lens.core.budget import Bars
from av_lens.errors import AvLensError, ManifestError


@pytest.fixture
def run():
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words])


def drawn(table) -> str:
    target = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    target.print(table)
    target.file.close()
    return target.export_text()


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, f"av-lens {__version__}")


def test_help_names_every_command_and_loads_no_torch():
    code = "import sys; sys.argv = ['av-lens', '--help']\nfrom av_lens.cli.main import run\ntry: run()\n"
    code += (
        "except SystemExit: pass\nprint([m for m in ('torch', 'transformers', 'pandas', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    commands = "demo pairs isolate inspect models check train bench plantbench seeds true-shapes type-one"
    for command in commands.split():
        assert command in done.stdout


CHEAP = """
import sys
from av_lens.cli.main import app
from typer.testing import CliRunner
here = sys.argv[1]
for words in (
    ["isolate", "av-tiny", here + "/pair.jsonl", "--out", here],
    ["isolate", "av-tinny", here + "/pairs.jsonl", "--out", here],
    ["knockout", here + "/modell", here + "/pairs.jsonl"],
    ["patch", here + "/model", here + "/pairs.jsonl", "--clean", "blank"],
    ["inspect", "av-tiny", here + "/nope.mp4", "--question", "?"],
    ["generate", "av-tiny", here + "/nope.mp4", "--question", "?", "--plan", here + "/plan.json"],
    ["weight-change", "av-tiny", "--base", "av-tiny-bas"],
    ["check", "av-tiny", here + "/nope.mp4", "--out", here + "/nowhere/it.json"],
):
    done = CliRunner().invoke(app, words)
    print(done.exit_code, done.stderr, [m for m in ("torch", "transformers", "pandas", "xarray") if m in sys.modules])
"""


def test_cheap_faults_are_told_before_torch_is_imported(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"sound": 1}\n{oops\n', encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{}")
    done = subprocess.run([sys.executable, "-c", CHEAP, str(tmp_path)], capture_output=True, text=True, check=True)
    said = done.stdout
    assert said.count("[]\n") == said.count("2 error: ") == 8, said
    for text in (
        "pair.jsonl: there is no such file. Did you mean '" + str(tmp_path / "pairs.jsonl"),
        "unknown model 'av-tinny'. Did you mean 'av-tiny'",
        "line 1: 'picture' is missing",
        "line 2: not json",
        f"does not exist. Did you mean '{tmp_path / 'model'}'",
        "cut short: its header should have 32 bytes, the file has 10",
        "unknown cell 'blank'",
        "no media file at " + str(tmp_path / "nope.mp4"),
        "cannot read the plan " + str(tmp_path / "plan.json") + ": no such file.",
        "unknown model 'av-tiny-bas'. Did you mean 'av-tiny-base'",
        "it.json: there is no folder " + str(tmp_path / "nowhere"),
    ):
        assert text in said, text


@pytest.mark.parametrize(
    ("module", "function"),
    [("lab.demonstration", "run_demo"), ("isolation.running.pipeline", "isolate"),
     ("lab.demonstration", "isolate_into"), ("inputs.encoder", "Encoder.encode"),
     ("media.source", "load_clip"), ("lab.training.courses", "train"),
      ("lab.replay_benchmark.benchmark", "run_benchmark"),
     ("lab.plantbench.bench", "run_plantbench"), ("lab.seeds", "run_seeds"),
     ("lab.true_shapes", "run_at_true_shapes"), ("lab.guarantees", "check"), ("lab.type_one", "run_type_one")],
)  # fmt: skip
def test_defaults_are_the_functions(module, function):
    import importlib

    value = importlib.import_module(f"av_lens.{module}")
    for part in function.split("."):
        value = getattr(value, part)
    live = {name: p.default for name, p in inspect.signature(value).parameters.items() if p.default is not p.empty}
    read = signature(module, function)
    assert read
    for name, found in read.items():
        assert live[name] == found, name


def test_defaults_that_are_not_there_are_refused():
    with pytest.raises(AvLensError, match=r"no module av_lens\.nowhere"):
        signature("nowhere", "f")
    with pytest.raises(AvLensError, match="defines no function g"):
        signature("cli.faults", "g")


class TestErrors:
    def test_one_message_on_stderr_and_exit_code_2(self, run, tmp_path):
        missing = tmp_path / "nope.mp4"
        result = run("inspect", "av-tiny", missing, "--question", "What do you hear?")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert str(missing) in result.stderr
        assert "Traceback" not in result.output

    def test_debug_shows_where_it_came_from(self, run, tmp_path):
        result = run("--debug", "inspect", "av-tiny", tmp_path / "nope.mp4", "--question", "?")
        assert isinstance(result.exception, AvLensError)

    def test_a_manifest_with_faults_lists_them_all(self, run, tmp_path):
        manifest = tmp_path / "pairs.jsonl"
        manifest.write_text('{"sound": 1}\nnot json\n', encoding="utf-8")
        result = run("isolate", "av-tiny", manifest, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "line 1" in result.stderr
        assert "line 2" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_wrong_words_names_and_paths_are_told_together(self, run, tmp_path):
        words = ("--dtype", "float23", "--gate", "stopp", "--layout", "in_video")
        result = run("isolate", "av-tinny", tmp_path / "x.jsonl", "--out", tmp_path, *words)
        assert result.exit_code == 2
        for said in ("x.jsonl: there is no such file", "Did you mean 'av-tiny'", "Did you mean 'float32'"):
            assert said in result.stderr
        assert "unknown gate 'stopp'. Did you mean 'stop'" in result.stderr
        words = ("--suppressed", "pictur", "--protocol", "3", "--layout", "in_vide", "--limit", "0")
        result = run("isolate", "av-tiny", tmp_path / "x.jsonl", "--out", tmp_path, *words)
        for said in ("x.jsonl", "unknown suppressed 'pictur'. Did you mean 'picture'", "unknown protocol '3'",
                     "unknown layout 'in_vide'", "--limit 0 leaves no conflict"):  # fmt: skip
            assert said in result.stderr
        result = run("isolate", "av-tiny", tmp_path / "x.jsonl", "--out", tmp_path, "--sites", "suffix,sufix")
        assert "unknown site 'sufix'. Did you mean 'suffix'" in result.stderr
        (tmp_path / "pairs.jsonl").write_text("{}\n")
        result = run("patch", "av-tiny", tmp_path / "pair.jsonl", "--corrupt", "vx")
        assert "Did you mean '" + str(tmp_path / "pairs.jsonl") in result.stderr
        assert "unknown cell 'vx'" in result.stderr

    def test_brackets_in_a_message_are_not_markup(self, run, monkeypatch):
        def refuse():
            raise ManifestError("[bold]axes [batch, pos][/bold]")

        monkeypatch.setattr(faults, "short_names", refuse)
        assert "[bold]axes [batch, pos][/bold]" in run("models").stderr

    def test_an_interrupt_says_how_to_go_on(self, run, monkeypatch):
        def stop():
            raise KeyboardInterrupt

        monkeypatch.setattr(faults, "short_names", stop)
        result = run("models")
        assert result.exit_code == 130
        assert "stopped; nothing of it is kept, the same command begins anew." in result.stderr

    def test_a_word_that_is_no_command_is_a_usage_error(self, run):
        assert run("isolat").exit_code == 2


def test_models_lists_what_is_shipped_and_what_has_an_adapter(run, monkeypatch):
    monkeypatch.setattr(faults, "short_names", lambda: [("av-tiny", "the main subject")])
    result = run("models")
    assert result.exit_code == 0
    assert "av-tiny" in result.stdout
    assert "the main subject" in result.stdout
    assert "Qwen/Qwen2.5-Omni-3B" in result.stdout.replace("\n", " ")
    assert "guarantees; replay restarts" in " ".join(result.stdout.split())


def test_a_verdict_says_what_failed():
    checks = [
        ("a", True, ""),
        ("b", False, "2.0"),
        ("c", None, "not checked"),
        ("replay is the hooked run", True, "1; restarts"),
    ]
    assert faults.verdict(checks) == "2 of 3 guarantees; not: b; replay restarts"
    hooked = ("replay is the hooked run", True, "40 plans; runs hooked: it norms; it has a window")
    assert faults.verdict([hooked]) == "1 of 1 guarantees; replay runs hooked: it norms; it has a window"


class TestTables:
    def test_heads(self):
        text = drawn(console.head_table(planted_isolation(), rows=2))
        assert "2 of 3" in text
        first = next(line for line in text.splitlines() if "L5 H2" in line)
        assert " ".join(first.split()) == "L5 H2 picture writer – blank_muted 3.77 3.37 4.17 0.46 0.97 0.0012 confirmed"

    def test_behaviour(self):
        text = drawn(console.behaviour_table(planted_isolation()))
        lines = [" ".join(line.split()) for line in text.splitlines()]
        assert "G discovery 8.2 7.9 8.5 22" in lines
        assert "right in va confirmation 0.05 0 0.11 22" in lines

    def test_cells(self):
        shown = [console.cell(v) for v in (None, float("nan"), True, 0.12345, 12345.6, "[x]", 3)]
        assert shown == ["–", "–", "yes", "0.123", "12346", r"\[x]", "3"]


class TestPositions:
    @pytest.fixture
    def frame(self) -> pd.DataFrame:
        nan = np.nan
        return pd.DataFrame(
            dict(
                position=range(5),
                token=["<b>", "<v>", "<v>", "what", "?"],
                role=["boundary", "video", "video", "question", "generation"],
                start_s=[nan, 0.0, 0.0, nan, nan],
                end_s=[nan, 1.0, 1.0, nan, nan],
                source_start_s=[nan, 0.0, 0.0, nan, nan],
                source_end_s=[nan, 0.9, 0.9, nan, nan],
                row=[-1, 0, 1, -1, -1],
                col=[-1, 0, 0, -1, -1],
            )
        )

    def test_by_run(self, frame):
        lines = [" ".join(line.split()) for line in drawn(console.by_run(frame)).splitlines()]
        assert "video 1–2 2 0.00–1.00 0.00–0.90 2 x 1 '<v>' x 2" in lines
        assert "question 3 1 – – – 'what'" in lines

    def test_by_position(self, frame):
        lines = [" ".join(line.split()) for line in drawn(console.by_position(frame)).splitlines()]
        assert "2 video '<v>' 0.00–1.00 0.00–0.90 1 0" in lines
        assert "0 boundary '<b>' – – – –" in lines


class TestBars:
    def test_where_nobody_watches_a_stage_is_one_line_when_done(self):
        target = Console(width=100, record=True, file=open("/dev/null", "w"), force_terminal=False)  # noqa: SIM115
        with Bars(target) as bars:
            for done in (1, 2, 3):
                bars("effects", done, 3)
            bars("sets", 1, 2)
        target.file.close()
        lines = target.export_text().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("effects: 3 in ")

    def test_a_terminal_gets_a_bar(self):
        target = Console(width=100, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
        with Bars(target) as bars:
            bars("effects", 1, 4)
            bars("effects", 4, 4)
        target.file.close()
        assert "4/4" in target.export_text()


def test_the_entry_point_is_installed():
    script = Path(sys.executable).with_name("av-lens")
    if not script.exists():
        pytest.skip("the package is not installed with its scripts")
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"av-lens {__version__}"


@pytest.mark.parametrize("planted", [(5, 2), (0, 0)])
def test_demo_says_calibration_verdict_heads_and_where_the_report_is(run, tmp_path, monkeypatch, planted):
    from av_lens.lab import demonstration
    from av_lens.lab.calibration import calibrate

    def shown(out, *, conflicts, seed, quick, progress, told):
        told("The picture dominates, so far.")
        progress("writing conflict clips", conflicts, conflicts)
        found = planted_isolation(seed)
        calibration = calibrate(found, {planted: "picture writer"})
        return demonstration.Demonstration(found=found, calibration=calibration, report=out / "report.html", seconds={})

    monkeypatch.setattr(demonstration, "run_demo", shown)
    result = run("demo", "--out", tmp_path, "--conflicts", 50)
    said = " ".join(result.stdout.split())
    good = planted == (5, 2)
    assert result.exit_code == (0 if good else 1), result.output
    assert ("calibration failed" in result.stderr) == (not good)
    outcome = "(L5 H2) came out on top" if good else "(L0 H0) did not all come out on top"
    assert "writing conflict clips: 50 in " in said
    assert said.index("The picture dominates, so far.") < said.index("calibration")
    assert f"calibration The head planted in av-tiny-planted {outcome}" in said
    assert "verdict (exploratory) Two heads of layer 5 keep the sound from being said" in said
    assert "L5 H3" in said
    assert f"written: {tmp_path / 'report.html'}" in said


def test_inspect_prints_every_span_with_its_times(run, tmp_path, monkeypatch):
    from tiny import tiny_clip, tiny_model

    path = tmp_path / "clip.mp4"
    tiny_clip().save(path)
    model = tiny_model()
    monkeypatch.setattr("av_lens.model.load", lambda name, **options: model)
    monkeypatch.setattr("av_lens.cli.faults.model", lambda name: None)
    table = tmp_path / "positions.csv"
    result = run("inspect", "tiny", path, "--question", "What do you hear?", "--csv", table)
    assert result.exit_code == 0, result.output
    frame = pd.read_csv(table)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for role in ("video", "audio", "generation"):
        where = frame.index[frame["role"] == role]
        assert any(line.startswith(f"{role} {where[0]}") for line in lines), role
    every = run("inspect", "tiny", path, "--question", "What do you hear?", "--all")
    assert every.exit_code == 0
    assert len(every.stdout.splitlines()) > len(frame)


class TestGenerate:
    """The tiny model's answer to a clip, as it is and under a plan file."""

    @pytest.fixture
    def asked(self, run, tmp_path, monkeypatch):
        from tiny import tiny_clip, tiny_model

        model = tiny_model()
        monkeypatch.setattr("av_lens.model.load", lambda name, **options: model)
        monkeypatch.setattr("av_lens.cli.faults.model", lambda name: None)
        tiny_clip().save(tmp_path / "clip.mp4")
        words = ("generate", "tiny", tmp_path / "clip.mp4", "--question", "What?", "--max-new-tokens", 4)
        return model, lambda *more: run(*words, *more)

    def test_both_answers_are_those_of_generate(self, asked, tmp_path):
        import av_lens as avl

        model, ask = asked
        plan = avl.Plan(avl.zero(avl.Site("mlp_out", 2, positions="suffix")))
        path = plan.save(tmp_path / "plan.json", model=model)
        result = ask("--plan", path)
        assert result.exit_code == 0, result.output
        x = model.encode(avl.load_clip(tmp_path / "clip.mp4"), "What?")
        plain, edited = (model.generate(x, max_new_tokens=4, return_type="text", plan=p) for p in (None, plan))
        assert plain != edited
        said = result.stdout.split("as it is:", 1)[1]
        assert [part.strip() for part in said.split("under the plan:")] == [plain.strip(), edited.strip()]

    def test_a_plan_for_another_model_is_refused_before_anything_runs(self, asked, tmp_path):
        import json

        import av_lens as avl

        model, ask = asked
        path = avl.Plan(avl.zero(avl.Site("mlp_out", 2))).save(tmp_path / "plan.json", model=model)
        changed = json.loads(path.read_text())
        changed["model"]["n_heads"] = 28
        path.write_text(json.dumps(changed))
        result = ask("--plan", path)
        assert result.exit_code == 2
        assert "was made for external with n_heads = 28" in result.stderr
        assert "as it is" not in result.stdout

    def test_sampling_draws_from_the_seed(self, asked):
        _, ask = asked
        said = [ask("--sample", "--seed", seed).stdout for seed in (1, 1, 2)]
        assert said[0] == said[1] != said[2]


def test_true_shapes_prints_the_page_and_fills_the_docs(run, tmp_path, monkeypatch):
    from av_lens.lab import true_shapes

    def made(recording, out, *, size, n, quick, progress):
        progress("reading every cell", n, n)
        return {
            "size": size, "layers": {"fusion": 4, "towers": 2}, "conflicts": n, "quick": quick, "threads": 2,
            "product_gflops": 100.0,
            "roles": {"video": 300, "audio": 25}, "stamps": ["not interpretable"], "peak_gb": 5.0,
            "seconds": {"search": 30.0, "towers": {"audio": 1.0, "vision": 2.0}},
            "stages": {"reading every cell": {"seconds": 10.0, "gflop": 500.0}},
        }  # fmt: skip

    monkeypatch.setattr(true_shapes, "run_at_true_shapes", made)
    result = run("true-shapes", tmp_path / "x.mp4", "--out", tmp_path, "--conflicts", 44, "--docs", tmp_path)
    assert result.exit_code == 0, result.output
    assert "the whole protocol) on 44 conflicts cut from disjoint windows" in " ".join(result.stdout.split())
    assert (tmp_path / "true_shapes.json").is_file()
    assert "7B, 24 GB (" in (tmp_path / "true_shapes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "module", "function", "page"),
    [
        ("bench", "replay_benchmark.benchmark", "run_benchmark", "benchmarks.md"),
        ("plantbench", "plantbench.bench", "run_plantbench", "plantbench.md"),
        ("seeds", "seeds", "run_seeds", "isolation.md"),
        ("type-one", "type_one", "run_type_one", "type_one.md"),
    ],
)
def test_a_page_that_cannot_be_filled_is_refused_before_the_work(
    run, tmp_path, monkeypatch, command, module, function, page
):
    import importlib

    def never(*_, **__):
        raise AssertionError("the work was begun")

    monkeypatch.setattr(importlib.import_module(f"av_lens.lab.{module}"), function, never)
    refused = run(command, "--docs", tmp_path)
    assert refused.exit_code == 2
    assert f"{page} is not there or lacks the comments" in " ".join(refused.stderr.split())
