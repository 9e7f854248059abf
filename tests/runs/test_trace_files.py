"""A trace that was saved is the trace that is loaded, bit for bit; and no other model, input or file passes for it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_av import small_inputs, small_model
from tiny import tiny_hf_model, tiny_processor

import av_lens as avl
from av_lens.errors import AvLensError, FileError, InputError, ModelError
from av_lens.interventions import Plan, Site, add, cut, zero
from av_lens.replay import Trace
from av_lens.replay import trace_files as files


def plans() -> list[Plan]:
    return [
        Plan(zero(Site("z", 1, 2, "suffix"))),
        Plan([add(Site("resid_pre", 2, positions="question"), torch.ones(64)), cut("generated", "video")]),
        Plan(zero(Site("pattern", 0, 1))),
        Plan(zero(Site("ln1", 1, positions="suffix"))),
    ]


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return avl.load("tiny", hf_model=tiny_hf_model(seed, dtype, **config), processor=tiny_processor())


@cache
def coarse_model() -> Any:
    return model_of(dtype=torch.bfloat16)


def contents(trace: Any) -> list[torch.Tensor]:
    return [*trace.resid, *trace.keys, *trace.values, *trace.tables]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model().trace(small_inputs()).save(tmp_path_factory.mktemp("traces") / "run")


def test_a_saved_and_a_loaded_trace_agree_bit_for_bit(tmp_path: Path):
    for model, sound in ((small_model(), "in_video"), (small_model(), "separate"), (coarse_model(), "in_video")):
        x = small_inputs(sound=sound)
        trace = model.trace(x)
        again = Trace.load(trace.save(tmp_path / "run"), model, x)
        assert len(contents(trace)) == len(contents(again)) == 5 + 4 + 4 + 2
        for kept, read in zip(contents(trace), contents(again), strict=True):
            assert kept.dtype == read.dtype
            assert torch.equal(kept, read)
        assert torch.equal(trace.replay(plans(), logits_at="all"), again.replay(plans(), logits_at="all"))
        assert torch.equal(trace.logits("all"), again.logits("all"))


def test_mask_and_reason_travel_too(tmp_path: Path):
    model, x = small_model(), small_inputs()
    n = len(x.spans)
    trace = model.trace(x)
    forbidden = torch.zeros(1, 1, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), torch.finfo(torch.float32).min)
    masked = Trace(**{**vars(trace), "mask": forbidden, "hooked_because": "left hooks"})
    again = Trace.load(masked.save(tmp_path / "run"), model, x)
    assert torch.equal(again.mask, forbidden)
    assert again.hooked_because == "left hooks"


def test_equal_models_and_inputs_may_be_built_anew(saved: Path):
    model = model_of()
    x = avl.AVInputs.stack([small_inputs()[0], small_inputs()[1]])
    again = Trace.load(saved, model, x)
    assert torch.equal(again.replay(plans()[0]), small_model().trace(x).replay(plans()[0]))


def test_the_ending_is_added_and_kept(tmp_path: Path):
    trace = small_model().trace(small_inputs())
    assert trace.save(tmp_path / "run") == tmp_path / "run.safetensors"
    assert trace.save(str(tmp_path / "run.trace")) == tmp_path / "run.trace"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.safetensors", "run.trace"]


# What is refused


def test_another_model_is_refused_and_the_parts_that_differ_are_named(saved: Path):
    x = small_inputs()
    with pytest.raises(ModelError, match=r"recorded by another model .* differ in .*layers 0.*record again"):
        Trace.load(saved, model_of(seed=1), x)
    with pytest.raises(ModelError, match=r"recorded in torch.float32, this model computes in torch.bfloat16"):
        Trace.load(saved, coarse_model(), x)
    with pytest.raises(ModelError, match=r"layers 3"):
        Trace.load(saved, model_of(n_layers=3), x)
    with pytest.raises(ModelError, match=r"differ in configuration\. Open the model"):
        Trace.load(saved, model_of(rms_norm_eps=1e-3), x)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("model.language_model.layers.2", "layers 2"),
        ("model.language_model.norm", "norm"),
        ("model.language_model.embed_tokens", "embed_tokens"),
        ("lm_head", "lm_head"),
        ("model.visual", "visual"),
        ("model.audio_tower", "audio_tower"),
    ],
)
def test_a_weight_that_changed_is_noticed_and_its_part_named(saved: Path, path: str, part: str):
    """Kept hashes must not hide it: the model is hashed before and after."""
    model, x = small_model(), small_inputs()
    Trace.load(saved, model, x)
    weight = next(model.hf_model.get_submodule(path).parameters())
    flat = weight.detach().view(-1)
    before = flat[7].item()
    try:
        with torch.no_grad():
            flat[7] = before + 1e-3
        with pytest.raises(ModelError, match=rf"they differ in {part}\."):
            Trace.load(saved, model, x)
    finally:
        with torch.no_grad():
            flat[7] = before
    Trace.load(saved, model, x)


def test_weights_replaced_behind_torchs_back_are_noticed(saved: Path):
    model, x = model_of(), small_inputs()
    Trace.load(saved, model, x)
    head = model.hf_model.lm_head._original_component
    head.weight.data.mul_(1.01)  # counted by no version
    with pytest.raises(ModelError, match=r"they differ in lm_head\."):
        Trace.load(saved, model, x)
    other = model_of()
    Trace.load(saved, other, x)
    norm = other.hf_model.model.language_model.norm._original_component
    changed = norm.weight.detach().clone()
    changed[1] += 0.5
    norm.weight = torch.nn.Parameter(changed)
    with pytest.raises(ModelError, match=r"they differ in norm\."):
        Trace.load(saved, other, x)


def test_hashes_are_made_once_for_unchanged_weights(monkeypatch: pytest.MonkeyPatch):
    model = model_of()
    first = files.weight_hashes(model)

    def never(*args: Any) -> None:
        raise AssertionError("unchanged weights were hashed again")

    monkeypatch.setattr(files, "_feed", never)
    assert files.weight_hashes(model) == first


def test_another_input_is_refused_and_the_parts_that_differ_are_named(saved: Path):
    model, x = small_model(), small_inputs()
    with pytest.raises(InputError, match=r"another input: it differs in .*input_features.*Encode the same clip"):
        Trace.load(saved, model, small_inputs(seeds=(0, 2)))
    with pytest.raises(InputError, match=r"differs in input_ids, spans\."):
        Trace.load(saved, model, small_inputs(question="Whom?"))
    with pytest.raises(InputError, match=r"spans"):
        Trace.load(saved, model, small_inputs(sound="separate"))
    with pytest.raises(InputError, match=r"attention_mask"):
        Trace.load(saved, model, x[0])
    roles = list(x.spans.roles)
    roles[20] = "question"
    moved = avl.AVInputs(**{**vars(x), "spans": type(x.spans)(**{**_columns(x.spans), "roles": tuple(roles)})})
    with pytest.raises(InputError, match=r"it differs in spans\."):
        Trace.load(saved, model, moved)


def _columns(spans: Any) -> dict[str, Any]:
    return {name: getattr(spans, name) for name in ("tokens", *files.SPAN_COLUMNS)}


def test_files_that_hold_no_whole_trace_are_refused(saved: Path, tmp_path: Path):
    model, x = small_model(), small_inputs()
    whole = saved.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        short = tmp_path / f"{size}.safetensors"
        short.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"is not a whole trace: cut short, damaged"):
            Trace.load(short, model, x)
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"\xff" * 4096)
    with pytest.raises(InputError, match=r"is not a whole trace"):
        Trace.load(noise, model, x)
    with pytest.raises(InputError, match=r"no such file: .*nowhere"):
        Trace.load(tmp_path / "nowhere.safetensors", model, x)
    with pytest.raises(InputError, match=r"no such file"):
        Trace.load(tmp_path, model, x)
    weights = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(3)}, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"holds safetensors of something else"):
        Trace.load(weights, model, x)
    with pytest.raises(InputError, match=r"no folder .*missing\. Make it first"):
        model.trace(x).save(tmp_path / "missing" / "run")


def rewritten(saved: Path, target: Path, *, drop: str | None = None, **metadata: str) -> Path:
    with files.safe_open(saved, framework="pt") as opened:
        about = dict(opened.metadata())
    tensors = {name: tensor for name, tensor in load_file(saved).items() if name != drop}
    save_file(tensors, target, metadata=about | metadata)
    return target


def test_other_schemas_and_missing_parts_are_refused(saved: Path, tmp_path: Path):
    model, x = small_model(), small_inputs()
    with pytest.raises(InputError, match=r"holds av_lens.Trace, version 2; this .* version 1"):
        Trace.load(rewritten(saved, tmp_path / "later.safetensors", schema_version="2"), model, x)
    with pytest.raises(InputError, match=r"keys.2 are missing"):
        Trace.load(rewritten(saved, tmp_path / "holes.safetensors", drop="keys.2"), model, x)
    with pytest.raises(InputError, match=r"is not a whole trace"):
        Trace.load(rewritten(saved, tmp_path / "mute.safetensors", about="{}"), model, x)
    Trace.load(rewritten(saved, tmp_path / "same.safetensors"), model, x)


def test_numbers_that_are_not_the_models_own_are_refused(saved: Path, tmp_path: Path):
    with files.safe_open(saved, framework="pt") as opened:
        about = dict(opened.metadata())
    tensors = load_file(saved)
    tensors["resid.4"] = tensors["resid.4"] + 1.0
    save_file(tensors, tmp_path / "other.safetensors", metadata=about)
    with pytest.raises(InputError, match=r"its numbers are not those that were saved"):
        Trace.load(tmp_path / "other.safetensors", small_model(), small_inputs())
    del about["sha256"]  # as files had none at first
    save_file(tensors, tmp_path / "other.safetensors", metadata=about)
    with pytest.raises(ModelError, match=r"does not fit this model any more: a restart does not reproduce"):
        Trace.load(tmp_path / "other.safetensors", small_model(), small_inputs())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trace = small_model().trace(small_inputs())
    path = trace.save(tmp_path / "run")
    before = path.read_bytes()

    def full(tensors: Any, place: Path, **options: Any) -> None:
        Path(place).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(FileError, match=r"cannot write .*run\.safetensors: no space left on device\. Make room"):
        trace.save(path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["run.safetensors"]


def test_the_file_says_what_made_it(saved: Path):
    with files.safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
    about = json.loads(metadata["about"])
    assert (metadata["schema"], metadata["schema_version"]) == ("av_lens.Trace", "1")
    assert {"av-lens", "torch"} <= set(about["versions"])
    assert (about["dtype"], about["hooked_because"], about["n_layers"]) == ("torch.float32", "", 4)
    assert issubclass(InputError, AvLensError)
