"""Commands on a folder of saved inputs: a decoder, encoders of one's own, and a manifest of media files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brought import Encoders, videollama2
from same_isolation import assert_same
from tiny_text import text_hf_model
from typer.testing import CliRunner

import av_lens as avl
from av_lens import bring
from av_lens.cli.main import app
from av_lens.lab.calibration import stage
from av_lens.organism import anatomy
from av_lens.results import Isolation


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def live(folder: Path) -> bring.BroughtModel:
    """The model with its own code, which keeps what it gives in a folder, beside the checkpoint of its decoder."""
    tokenizer, checkpoint = anatomy.tokenizer(), folder / "checkpoint"
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.15}
    decoder = text_hf_model("qwen2", **sizes)
    decoder.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    embed = videollama2(decoder.get_input_embeddings(), tokenizer, Encoders())
    model = bring.wrap(decoder, bring.Saved(folder / "givens", embed), tokenizer=tokenizer, name=str(folder / "givens"))
    (folder / "givens" / "bring.json").write_text('{"model": "../checkpoint"}')
    return model


def pairs(model: Any, conflicts: Any) -> list[avl.Pair]:
    cells = [conflict.cells(model, layout="separate") for conflict in conflicts]
    return [avl.Pair(clean=one["blank_a"], corrupt=one["va"]) for one in cells]


def test_patch_runs_on_saved_inputs(tmp_path):
    manifest, model = stage(tmp_path / "clips", conflicts=1, seed=0), live(tmp_path)
    conflicts = avl.conflicts(manifest)
    metric = avl.logit_diff(*conflicts[0].answers)
    wanted = avl.patch(model, pairs(model, conflicts), over="head", at="suffix", metric=metric)
    words = ("patch", tmp_path / "givens", manifest, "--layout", "separate", "--at", "suffix")
    done = run(*words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = avl.Grid.load(tmp_path / "out" / "patch.nc")
    np.testing.assert_array_equal(found.values, wanted.values)
    seen = run("inspect", tmp_path / "givens", *clip(manifest), "--sound", "none")
    assert seen.exit_code == 2, seen.output
    assert ".ask beside it says what is wanted" in seen.output.replace("\n", "")
    refused = run("patch", tmp_path / "givens", manifest)
    assert refused.exit_code == 2
    assert "sound='in_video' is asked of an embed" in refused.output


def clip(manifest: Path) -> tuple[Any, ...]:
    return sorted(manifest.parent.glob("*.mp4"))[0], "--question", "What do you hear?"


@pytest.mark.slow
def test_an_isolation_live_and_from_files_is_the_same(tmp_path):
    manifest, model = stage(tmp_path / "clips", conflicts=48, seed=0), live(tmp_path)
    wanted = avl.isolate(model, avl.conflicts(manifest), gate="report", quick=True, layout="separate")
    words = ("isolate", tmp_path / "givens", manifest, "--gate", "report", "--quick", "--layout", "separate")
    done = run(*words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert_same(Isolation.load(tmp_path / "out"), wanted)
