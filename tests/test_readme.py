"""What the README says runs: its first example as it stands, its manifest line, its commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

from typer.testing import CliRunner

import av_lens as avl

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_first_example_runs_as_it_stands(capsys):
    names: dict[str, object] = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert "generation     1" in capsys.readouterr().out
    grid = names["grid"]
    assert isinstance(grid, avl.Grid)
    assert grid.values.dims == ("example", "layer", "head")
    assert float(grid.effects.max()) > 1.0  # some head kept the siren from being said
    assert avl.plots.heads(grid).data


def test_the_manifests_line_is_a_conflict(tmp_path: Path):
    line = json.loads(blocks("json")[0])
    for name in (line["sound"], line["picture"]):
        avl.organism.clip(name.removesuffix(".mp4"), seed=0).save(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    [conflict] = avl.conflicts(tmp_path / "pairs.jsonl")
    assert conflict.answers == ("siren", "dog")


def test_its_commands_are_the_checks_and_the_programs():
    from av_lens.cli.main import app

    shown = CliRunner().invoke(app, ["--help"]).output
    for command in set(re.findall(r"av-lens (\w+)", README)):
        assert command in shown, f"the README names `av-lens {command}`"
    checks = (Path(__file__).resolve().parents[1] / ".ci" / "run").read_text()
    assert f"\npytest{blocks('bash')[1].partition('/pytest')[2].rstrip()}\n" in checks
    assert "av-lens demo" in checks
    assert "-e '.[test]'" in blocks("bash")[1]
