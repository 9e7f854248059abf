"""`av-lens isolate`: what is passed on, what is said, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from planted_record import planted_isolation
from tiny import tiny_clip
from typer.testing import CliRunner

from av_lens.cli.main import app
from av_lens.errors import ProtocolError, UnfinishedError
from av_lens.inputs import Conflict
from av_lens.lab import demonstration


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Run the command on a stand-in for the search; `seen` holds what the search was given."""
    seen: dict = {}
    clip = tiny_clip()
    words = {"sound": clip, "picture": clip, "question": "What?", "answers": ("dog", "bell")}
    listed = [Conflict(id=f"c{i}", **words) for i in range(5)]
    monkeypatch.setattr("av_lens.cli.faults.manifest", lambda path, limit: listed)
    monkeypatch.setattr("av_lens.inputs.conflict.conflicts_of", lambda lines: lines)
    monkeypatch.setattr("av_lens.model.load", lambda name, **options: f"model {name}")

    def search(model, conflicts, *, told, progress, **options):
        seen.update(options, model=model, conflicts=conflicts)
        told("Power: enough.")
        told("Estimate: about 3 s.")
        told("c0  discovery  [effects]")
        if "signal" in seen:
            os.kill(os.getpid(), seen["signal"])
            time.sleep(5)
        if "fails" in seen:
            raise seen["fails"]
        return planted_isolation(0)

    monkeypatch.setattr(demonstration, "isolate", search)
    monkeypatch.setattr(demonstration, "playable", lambda found, conflicts, *, most: {})
    monkeypatch.setattr(demonstration, "write_bundle", lambda found, out, **options: out / "report.html")

    def run(*more):
        words = ["isolate", "av-tiny", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out")]
        return CliRunner().invoke(app, [*words, *(str(word) for word in more)])

    return run, seen


def test_options_reach_the_search_and_its_lines_the_terminal(asked, tmp_path):
    run, seen = asked
    result = run("--limit", 3, "--budget", 2.5, "--quick", "--sites", "suffix, audio", "--gate", "report", "--seed", 7,
                 "--suppressed", "picture")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [conflict.id for conflict in seen["conflicts"]] == ["c0", "c1", "c2"]
    wanted = dict(budget=2.5, quick=True, sites=("suffix", "audio"), gate="report", seed=7, out=tmp_path / "out",
                  suppressed="picture")  # fmt: skip
    assert {name: seen[name] for name in wanted} == wanted
    assert seen["model"] == "model av-tiny"
    for line in ("Power: enough.", "Estimate: about 3 s.", "c0  discovery  [effects]", "verdict"):
        assert line in result.stdout


def test_left_out_options_are_the_functions_own(asked):
    run, seen = asked
    assert run().exit_code == 0
    assert len(seen["conflicts"]) == 5
    wanted = dict(
        budget=None, quick=False, sites=("suffix",), gate="stop", seed=0, layout="in_video", s=None, suppressed="sound"
    )
    assert {name: seen[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("fails", "code", "said"),
    [
        (UnfinishedError("stopped at the budget of 1 minutes; the same command goes on from there."), 3, "stopped at"),
        (KeyboardInterrupt(), 130, "stopped; what was finished is kept, the same command goes on from there."),
        (ProtocolError("refused: the model does not hear"), 2, "error: refused: the model does not hear"),
    ],
)
def test_each_way_to_end_has_its_code_and_its_sentence(asked, fails, code, said):
    run, seen = asked
    seen["fails"] = fails
    result = run()
    assert result.exit_code == code
    assert said in result.stderr
    assert ("error:" in result.stderr) == (code == 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_is_an_interrupt(asked, number, code):
    run, seen = asked
    seen["signal"] = number
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)  # a test in the background ignores Ctrl-C
    try:
        result = run()
        assert signal.getsignal(number) == default
    finally:
        signal.signal(number, before)
    assert result.exit_code == code
    assert result.stderr == "stopped; what was finished is kept, the same command goes on from there.\n"


def test_a_signal_that_is_ignored_stays_ignored(asked, monkeypatch):
    run, seen = asked
    seen["signal"] = signal.SIGHUP  # as under nohup
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run().exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_method_that_kept_what_it_had_done_ends_with_the_signals_code(asked, monkeypatch):
    run, seen = asked
    seen["signal"] = signal.SIGTERM
    stopped = demonstration.isolate

    def partial(*given, **options):
        try:
            return stopped(*given, **options)
        except KeyboardInterrupt:
            return planted_isolation(0)

    monkeypatch.setattr(demonstration, "isolate", partial)
    result = run()
    assert (result.exit_code, "verdict" in result.stdout) == (143, True)
    assert result.stderr == "stopped; what is shown holds what was done until then.\n"


def test_what_the_system_refuses_is_a_sentence(asked):
    run, seen = asked
    seen["fails"] = OSError(28, "No space left on device", "the log")
    result = run()
    assert result.exit_code == 2
    assert result.stderr == "error: [Errno 28] No space left on device: 'the log'\n"


def test_a_limit_of_none_is_refused(asked):
    run, _ = asked
    result = run("--limit", 0)
    assert (result.exit_code, "the limit is 0 conflicts; give at least 1" in result.stderr) == (2, True)


@pytest.mark.slow
def test_stopped_at_its_budget_it_goes_on_and_writes_the_page(tmp_path):
    from av_lens.lab.calibration import stage

    (tmp_path / "clips").mkdir()
    manifest = stage(tmp_path / "clips", conflicts=44, seed=5)
    words = ["isolate", "av-tiny", str(manifest), "--out", str(tmp_path / "out"), "--limit", "42", "--quick"]
    words += ["--gate", "report"]
    stopped = CliRunner().invoke(app, [*words, "--budget", "0.1"])
    assert stopped.exit_code == 3, stopped.output
    assert "stopped at the budget of 0.1 minutes" in stopped.stderr
    assert not (tmp_path / "out" / "report.html").exists()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "resumed: " in done.stdout
    assert "Estimate: about " in done.stdout
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Left out, as asked (quick): robustness, and pairs of heads in the search for sets." in page
    rows = [json.loads(line) for line in (tmp_path / "out" / "conflicts.jsonl").read_text().splitlines()]
    assert len(rows) == 42
    other = CliRunner().invoke(app, [*words[:-4], "41", "--quick"])
    assert other.exit_code == 2
    assert "under another protocol; they differ in" in other.stderr
