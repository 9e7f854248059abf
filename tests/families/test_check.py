"""The check of guarantees: it passes on a sound model, finds each planted fault, and its report can be sent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_av import small_clip
from tiny_families import TINY, family_model, folder
from transformer_lens import ActivationCache
from typer.testing import CliRunner

from av_lens.cli.main import app
from av_lens.errors import InputError
from av_lens.lab import check, guarantees, proofs
from av_lens.media import Clip
from av_lens.model import Check, CheckReport
from av_lens.replay import Trace

LAYOUTS = ["in_video", "separate", "video_only", "image_audio", "image", "audio_only", "text"]


def opened(name: str) -> dict[str, Any]:
    return {"hf_model": TINY[name].hf_model(0), "processor": TINY[name].processor()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a clip in a folder whose name is nobody's business."""
    made = tmp_path_factory.mktemp("grandmother")
    small_clip(0).save(made / "birthday.mp4")
    folder("qwen2_5_vl", made / "model")
    return made


@pytest.fixture(scope="module")
def report(place: Path) -> CheckReport:
    return check(place / "model", place / "birthday.mp4", question="Whose party?", quick=True, plans=4)


def named(report: CheckReport) -> dict[str, Check]:
    return {one.name: one for one in report.checks}


def passes(report: CheckReport, layouts: list[str], *, but: tuple[str, ...] = ()) -> None:
    """Every guarantee held; those named `but` say why they do not apply."""
    assert report.ok, str(report)
    found = named(report)
    assert layouts
    for layout in layouts:
        wanted = {f"{layout}: position ids are as derived", f"{layout}: logits are HuggingFace's to the bit"}
        wanted |= {f"{layout}: greedy tokens are HuggingFace's"}
        wanted |= {f"{layout}: rows out of the towers = tokens"} if layout != "text" else set()
        assert all(found[name].held or name.endswith(but) for name in wanted)
    for name in ("decompose_resid sums to the stream", "replay is the hooked run", "path patching is its definition"):
        assert found[name].held or name in but
    assert found["edits that change nothing have no effect"].found.endswith("largest effect 0")
    assert found["the CPU agrees with the device"].found == "not checked: the model is on the CPU"


def test_a_sound_model_passes(report):
    passes(report, ["video_only", "image", "text"])
    assert "4 random plans" in named(report)["replay is the hooked run"].found


def test_a_model_of_text_is_checked_too():
    passes(check(**opened("llama"), quick=True, plans=2), ["text"])


OF_ITS_OWN = ("position ids are as derived", "decompose_resid sums to the stream", "path patching is its definition")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TINY))
def test_every_family_passes_whole(name):
    found = check(**opened(name))
    every = LAYOUTS if "in_video" in TINY[name].layouts else [one for one in LAYOUTS if f"{one}: " in str(named(found))]
    passes(found, every, but=OF_ITS_OWN if name == "gemma4" else ())
    assert any(one.startswith("every hook of every layer") for one in found.passed)


def test_what_a_trace_holds_is_what_was_estimated(report):
    said = named(report)["a trace: memory and seconds"].found
    estimated, held = (float(said.partition(word)[2].split()[0]) for word in ("estimated ", "held "))
    assert held == pytest.approx(estimated, rel=0.02)


def test_it_says_on_what_it_was_found(report):
    assert report.about["architecture"] == "Qwen2_5_VLForConditionalGeneration"
    assert (report.about["layers"], report.about["heads"], report.about["dtype"]) == (4, 4, "float32")
    assert {"torch", "transformers", "transformer-lens"} <= set(report.about["versions"])
    assert report.about["clip"] == "84 x 56, 4 frames; 2.0 s of sound at 16000 Hz"


@pytest.fixture(scope="module")
def bench() -> proofs.Bench:
    model = family_model("qwen2_5_omni")
    return proofs.Bench(model, model.encode(small_clip(0), "What?"), "What?", plans=4, quick=True, seed=0)


def a_little_more(own: Any) -> Any:
    return lambda *given, **more: own(*given, **more) + 1e-2


def without_its_last_part(own: Any) -> Any:
    def fewer(*given: Any, **more: Any) -> Any:
        parts, labels = own(*given, **more)
        return parts[:-1], labels[:-1]

    return fewer


def from_another_head(own: Any) -> Any:
    return lambda model, pair, **more: own(model, pair, **(more | {"sender": (0, 1)}))


def by_a_little_more(own: Any) -> Any:
    return lambda site, factor: own(site, factor * 1.001)


FAULTS = {
    "replays": (proofs.replays, Trace, "replay", a_little_more),
    "decomposition": (proofs.decomposition, ActivationCache, "decompose_resid", without_its_last_part),
    "a_path": (proofs.a_path, proofs, "path_patch", from_another_head),
    "null_edits": (proofs.null_edits, proofs, "scale", by_a_little_more),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, bench, monkeypatch):
    proof, place, name, wrong = FAULTS[fault]
    assert {one.held for one in proof(bench)} == {True}
    monkeypatch.setattr(place, name, wrong(getattr(place, name)))
    assert {one.held for one in proof(bench)} == {False}


def test_a_hook_off_the_road_is_found(bench, monkeypatch):
    monkeypatch.setattr("av_lens.model.selfcheck.turned", lambda value, component: value)
    first, *others = proofs.hooks(bench)
    assert not first.held
    assert "turning blocks.3.hook_resid_mid changes the logits" in {one.name for one in others}


def test_another_model_than_huggingfaces_is_found(monkeypatch):
    own = guarantees.Opened.wrapped

    def moved(self: Any) -> Any:
        with torch.no_grad():
            self.hf_model.lm_head.weight[3] += 1.0
        return own(self)

    monkeypatch.setattr(guarantees.Opened, "wrapped", moved)
    found = named(check(**opened("qwen2_5_vl"), quick=True, plans=1))
    assert found["video_only: logits are HuggingFace's to the bit"].held is False
    assert found["video_only: rows out of the towers = tokens"].held


def test_what_breaks_off_is_a_guarantee_that_failed(monkeypatch, place):
    def broken(bench: Any) -> Any:
        raise RuntimeError(f"no kernel in {place / 'model'}/cache\nand a long story")

    broken.__doc__ = "What breaks."
    monkeypatch.setattr(guarantees, "PROOFS", (broken,))
    found = check(place / "model", quick=True, plans=1)
    assert found.failed == ("What breaks",)
    assert named(found)["What breaks"].found == "broke off: RuntimeError: no kernel in .../cache"


def test_a_map_that_the_model_does_not_share_is_a_guarantee_that_failed(monkeypatch):
    from av_lens.families.qwen2_5_vl import Qwen2_5VLMedia

    monkeypatch.setattr(Qwen2_5VLMedia, "_resumed", lambda self, block: block.max() + 2)
    found = check(**opened("qwen2_5_vl"), quick=True, plans=1)
    assert {"video_only: position ids", "image: position ids"} <= set(found.failed)
    assert "the model and this map disagree" in named(found)["image: position ids"].found


def test_the_report_tells_nothing_private(report, place):
    written = report.save(place / "it")
    assert written == place / "it.json"
    data, read = json.loads(written.read_text()), (place / "it.md").read_text()
    for text in (written.read_text(), read):
        for private in ("grandmother", "birthday", "party", str(place.parent), str(Path.home()) + "/"):
            assert private not in text
    assert data["ok"]
    assert data["about"]["model"] == "a local one"
    assert read.count("| held |") == sum(one["held"] is True for one in data["checks"]) > 10


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"plans": 0}, r"plans=0: at least one plan"),
        ({"devise": "cpu"}, r"unknown .*'devise'.*Did you mean 'device'"),
        (
            {"clip": Clip.from_arrays(waveform=np.zeros(16000, np.float32))},
            "takes text and video and image, and the clip",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        check(**(opened("qwen2_5_vl") | given))


def test_layouts_are_of_what_is_there():
    every, sound = small_clip(0), Clip.from_arrays(waveform=np.zeros(16000, np.float32))
    still = Clip.from_arrays(frames=np.zeros((1, 56, 84, 3), np.uint8), waveform=np.zeros(16000, np.float32))
    both = ("audio", "video", "image")
    assert [name for name, _ in guarantees.layouts(every, both)] == LAYOUTS
    assert [name for name, _ in guarantees.layouts(sound, both)] == ["audio_only", "text"]
    assert [name for name, _ in guarantees.layouts(still, both)] == ["image_audio", "image", "audio_only", "text"]
    assert [name for name, _ in guarantees.layouts(every, ("audio",))] == ["audio_only", "text"]


def test_the_cpu_is_compared_where_the_model_was_elsewhere(bench, monkeypatch):
    """A device that this machine has not: the model says that it is there, and is moved once."""
    model, moved = bench.model, list[str]()

    class Elsewhere(type(model)):
        device = SimpleNamespace(type="cuda")

        def to(self, place: str) -> Any:
            moved.append(place)
            return self

    monkeypatch.setattr(model, "__class__", Elsewhere)
    monkeypatch.setattr(proofs, "run", lambda model, x: SimpleNamespace(logits=torch.eye(3)[None] * len(moved or "ab")))
    (found,) = proofs.on_the_cpu(bench)
    assert moved == ["cpu"]
    assert not found.held
    assert found.found == "largest difference 1.0e+00 of the largest logit; likeliest token the same"


@pytest.fixture
def run() -> Any:
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("held", [True, False])
def test_the_command(run, place, tmp_path, monkeypatch, held):
    told: dict[str, Any] = {}

    def checked(*given: Any, **more: Any) -> CheckReport:
        told.update(more, given=given)
        return CheckReport((Check("that it holds", held, "3 of 3"),), {"dtype": "float32"})

    monkeypatch.setattr(guarantees, "check", checked)
    done = run("check", place / "model", place / "birthday.mp4", "--plans", "3", "--out", tmp_path / "it.json")
    assert done.exit_code == (0 if held else 1), done.output
    assert told["given"] == (str(place / "model"), place / "birthday.mp4")
    assert (told["plans"], told["quick"], told["device"]) == (3, False, None)
    assert " ".join(done.stdout.split()).count(f"that it holds {'held' if held else 'FAILED'} 3 of 3") == 1
    assert json.loads((tmp_path / "it.json").read_text())["ok"] is held


@pytest.mark.slow
def test_the_command_works(run, place):
    done = run("check", place / "model", "--quick", "--plans", "1", "--out", place / "whole.json")
    assert done.exit_code == 0, done.output
    assert "replay is the hooked run" in done.stdout


def test_the_command_refuses_before_it_works(run, tmp_path):
    done = run("check", "av-tinny", tmp_path / "no.mp4", "--dtype", "float33", "--out", tmp_path / "no" / "it.json")
    assert done.exit_code == 2
    for words in ("Did you mean 'av-tiny'", "no media file at", "Did you mean 'float32'", "there is no folder"):
        assert words in done.stderr
