"""A command for each method: its flags are the function's, and it runs on a manifest of media files."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
from typer.testing import CliRunner

import av_lens as avl
from av_lens.cli import toolbox
from av_lens.cli.main import app
from av_lens.lab.calibration import stage

EXTRA = {
    "weight-change": ["--base", "av-tiny-base"],
    "graft": ["--base", "av-tiny-base"],
    "caption": ["--max-new-tokens", "4"],
    "causal-trace": ["--seeds", "2"],
    "base-shift": ["--base", "av-tiny-base", "--max-new-tokens", "4"],
    "path-patch": ["--at", "generation"],
    "knockout": ["--draws", "1"],
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return stage(tmp_path_factory.mktemp("conflicts"), conflicts=3, seed=0)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough conflicts for halves that share no clip."""
    return stage(tmp_path_factory.mktemp("many"), conflicts=48, seed=0)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.mark.parametrize("method", toolbox.METHODS, ids=lambda method: method.command)
def test_flags_are_the_function_s_arguments(method):
    live = inspect.signature(getattr(import_module(f"av_lens.{method.module}"), method.function)).parameters
    flags = toolbox.flags_of(method)
    assert flags or method.feed == "none"
    for flag in flags:
        assert live[flag.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert flag.annotation.__metadata__[0].help, f"{method.function}'s docstring says nothing of {flag.name}"
        required = live[flag.name].default is inspect.Parameter.empty
        assert (flag.default is inspect.Parameter.empty) == required
    named = {flag.name for flag in flags} | {"metric", "progress", "base"}
    untold = [
        name for name, p in live.items() if p.kind is p.KEYWORD_ONLY and name not in named and p.default is p.empty
    ]
    assert not untold, f"the command can never give {untold}"


def test_patch_shows_saves_and_draws_what_the_function_finds(manifest, tmp_path):
    done = run("patch", "av-tiny", manifest, "--limit", 2, "--at", "suffix", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    grid = avl.Grid.load(tmp_path / "patch.nc")
    assert dict(grid.values.sizes) == {"example": 2, "layer": 7, "head": 8}
    model = avl.load("av-tiny")
    cells = [conflict.cells(model) for conflict in avl.conflicts(manifest)[:2]]
    pairs = [avl.Pair(clean=one["blank_a"], corrupt=one["va"]) for one in cells]
    answers = [conflict.answers for conflict in avl.conflicts(manifest)[:2]]
    by_hand = avl.patch(model, pairs[1], at="suffix", metric=avl.logit_diff(*answers[1]))
    assert float(abs(grid.effects[1] - by_hand.effects[0]).max()) < 1e-4
    assert (tmp_path / "patch.html").stat().st_size > 10_000
    assert len((tmp_path / "patch.csv").read_text().splitlines()) == 57


def test_what_a_function_refuses_is_one_message(manifest):
    done = run("patch", "av-tiny", manifest, "--over", "haed")
    assert done.exit_code == 2
    assert "Did you mean 'head'" in done.stderr
    done = run("patch", "av-tiny", manifest, "--corrupt", "vx")
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", toolbox.METHODS, ids=lambda method: method.command)
def test_every_command_runs_on_media_files(method, manifest, many, tmp_path):
    extra = EXTRA.get(method.command, [])
    if method.command == "steer":
        avl.Plan(avl.scale(avl.Site("z", 4, 7, "suffix"), 0.0)).save(tmp_path / "plan", model=avl.load("av-tiny"))
        extra = ["--plan", next(tmp_path.glob("plan*"))]
    fed = [] if method.feed == "none" else [many if method.command == "probe" else manifest]
    done = run(method.command, "av-tiny", *fed, "--out", tmp_path / "out", *extra)
    assert done.exit_code == 0, done.output
    assert any((tmp_path / "out").iterdir())
    print(done.output)
