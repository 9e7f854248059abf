"""Checkpoints that would run code, are damaged, or do not fit: never a prompt, never a raw error, never a number."""

from __future__ import annotations

import builtins
import json
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mutations import mutated
from safetensors.torch import load_file, save_file
from small_av import small_inputs, small_model
from tiny import tiny_clip, tiny_hf_model, tiny_processor

from av_lens.checkpoints import check_checkpoint
from av_lens.errors import AvLensError, ModelError
from av_lens.interventions import Plan, Site, add, cut, zero
from av_lens.model import load
from av_lens.organism.evaluation import Evaluation
from av_lens.replay import Trace

FEW, MANY = 12, 2000
FRAME = pd.DataFrame({"cell": ["va"], "count": [3], "n": [4]})
AUTO = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoVideoProcessor")
OWN = {name: "own.Own" for name in (*AUTO, "AutoFeatureExtractor")} | {"AutoTokenizer": ["own.Own", "own.Own"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("checkpoint")
    tiny_hf_model().save_pretrained(place)
    tiny_processor().save_pretrained(place)
    return place


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edited(folder: Path, name: str, **keys: Any) -> None:
    path = folder / name
    held = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def processor(folder: Path) -> None:
    edited(folder, "processor_config.json", auto_map=OWN, processor_class="OwnProcessor")


def parts(folder: Path) -> None:
    """The parts of the processor, each in its own file, each with code of its own."""
    held = json.loads((folder / "processor_config.json").read_text())
    own = {"image_processor_type": "Own", "video_processor_type": "Own", "feature_extractor_type": "Own"}
    for part, name in (("image_processor", "preprocessor_config"), ("video_processor", "video_preprocessor_config")):
        found = held.pop(part) | own | {"auto_map": OWN}
        (folder / f"{name}.json").write_text(json.dumps(found))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5OmniProcessor"}))


def nested(folder: Path) -> None:
    held = json.loads((folder / "processor_config.json").read_text())
    for part in ("image_processor", "video_processor", "feature_extractor"):
        held[part] |= {"auto_map": OWN, f"{part}_type": "Own"}
    (folder / "processor_config.json").write_text(json.dumps(held))


def tokenizer(folder: Path) -> None:
    edited(folder, "tokenizer_config.json", auto_map=OWN, tokenizer_class="OwnTokenizer", processor_class=None)
    edited(folder, "processor_config.json", processor_class="Qwen2_5OmniProcessor")


def model(folder: Path) -> None:
    edited(folder, "config.json", auto_map=OWN)


def kernel(folder: Path) -> None:
    """An attention that transformers would fetch from the hub and run."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edited(
        folder, "config.json", _attn_implementation="own/kernel", text_config=text | {"_attn_implementation": "own/k"}
    )


OWN_CODE: dict[str, tuple[Callable[[Path], None], str]] = {
    "processor": (processor, "processor_config.json"),
    "parts": (parts, "preprocessor_config.json, video_preprocessor_config.json"),
    "nested": (nested, "processor_config.json"),
    "tokenizer": (tokenizer, "tokenizer_config.json"),
    "model": (model, ""),
    "kernel": (kernel, ""),
}


def parted(kinds: Iterable[str], *slow: str) -> list[Any]:
    """Kinds as parameters, those that open a model once more among the slow tests."""
    return [pytest.param(kind, marks=pytest.mark.slow if kind in slow else ()) for kind in kinds]


def armed(folder: Path) -> Path:
    """Code beside the weights that leaves a mark when it is run."""
    mark = folder / "it_ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n")
    return mark


@pytest.mark.parametrize("kind", parted(OWN_CODE, "parts", "kernel"))
def test_no_code_from_a_checkpoint_runs_or_is_asked_about(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    change, named = OWN_CODE[kind]
    change(folder)
    mark, asked = armed(folder), list[str]()
    monkeypatch.setattr(builtins, "input", lambda said="": asked.append(said) or "y")
    if named:
        with pytest.raises(ModelError) as refused:
            load(folder)
        assert f"({named}: auto_map), and av_lens runs no code from a checkpoint. Take auto_map out" in str(
            refused.value
        )
    else:
        assert type(load(folder).processor).__name__ == "Qwen2_5OmniProcessor"
    assert not mark.exists()
    assert not asked


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN_CODE)
def test_yes_on_standard_input_changes_nothing(kind: str, folder: Path):
    OWN_CODE[kind][0](folder)
    mark = armed(folder)
    code = "import sys, av_lens\ntry: print(av_lens.load(sys.argv[1]))\n"
    code += "except av_lens.AvLensError as refused: print('REFUSED', refused)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], input="y\n" * 20, capture_output=True, text=True, check=True
    )
    assert not mark.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.stdout.startswith("REFUSED" if OWN_CODE[kind][1] else "HookedAVLLM"), done.stdout


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_number(folder: Path) -> None:
    rewritten(folder, lambda weights: weights["lm_head.weight"][3, 4:6].fill_(float("nan")))


def as_whole_numbers(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))


def text(folder: Path, **keys: Any) -> None:
    held = json.loads((folder / "config.json").read_text())
    edited(folder, "config.json", text_config=held["text_config"] | keys)


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    listed = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))


def outside(folder: Path) -> None:
    sharded(folder)
    listed = {"weight_map": {"lm_head.weight": "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def other_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    held = json.loads(path.read_text())
    held["added_tokens"] += [held["added_tokens"][-1] | {"id": 266 + i, "content": f"<{i}>"} for i in range(40)]
    path.write_text(json.dumps(held))


def write(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut_short, r"model.safetensors is not a whole file of weights.*it should have \d+ bytes and has"),
    "no header": (lambda f: write(f, "model.safetensors", "x"), "cut short: its header should have"),
    "NaN": (no_number, r"the weight .*lm_head.weight of .* holds 2 numbers of \d+ that are NaN or infinite"),
    "whole numbers": (as_whole_numbers, "is stored as I32; weights are floating-point numbers"),
    "config cut": (
        lambda f: write(f, "config.json", '{"model_type": '),
        "config.json is not a configuration, or damaged",
    ),
    "config a list": (lambda f: write(f, "config.json", "[1]"), "config.json is not a configuration"),
    "config without end": (lambda f: text(f, num_hidden_layers=10**9), "which is no size of a model"),
    "config too large": (lambda f: text(f, hidden_size=2**16), r"config.json wants \d+: they do not belong together"),
    "wider": (lambda f: text(f, intermediate_size=130), "weights of .* have other sizes than config.json says"),
    "deeper": (lambda f: text(f, num_hidden_layers=5, layer_types=["full_attention"] * 5), "weights of .* are missing"),
    "shallower": (
        lambda f: text(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "belong to layers that config.json does not have",
    ),
    "a word for a number": (
        lambda f: text(f, hidden_size="64"),
        "cannot read config.json|cannot read model.safetensors",
    ),
    "missing shard": (sharded, "names the weight file 'model-00002-of-00002.safetensors', which is not in the folder"),
    "shard outside": (outside, "names the weight file '../../etc/passwd', which is not in the folder"),
    "pickle alone": (pickled, "it has pytorch_model.bin: pickled weights can run code when they are opened"),
    "an adapter": (lambda f: write(f, "adapter_config.json", "{}"), "beside a whole model: which of them is meant"),
    "more tokens": (other_tokens, "is another model's: it has 306 tokens, the model 266"),
    "no processor": (
        lambda f: (f / "processor_config.json").unlink(),
        "cannot read the processor|without feature_extractor",
    ),
    "processor cut": (lambda f: write(f, "processor_config.json", "{"), "processor_config.json is not a configuration"),
    "tokenizer cut": (lambda f: write(f, "tokenizer.json", "{"), "cannot read the processor"),
    "own template": (lambda f: write(f, "chat_template.jinja", "{{ ''.__class__.__mro__ }}"), "chat template fails"),
}

OPENED = (
    "config too large",
    "deeper",
    "a word for a number",
    "more tokens",
    "no processor",
    "tokenizer cut",
    "own template",
)


@pytest.mark.parametrize("kind", parted(DAMAGED, *OPENED))
def test_a_damaged_or_mismatched_checkpoint_is_refused_in_words(kind: str, folder: Path):
    change, said = DAMAGED[kind]
    change(folder)
    with pytest.raises(ModelError, match=said):
        load(folder).encode(tiny_clip(), "What?")


def test_what_headers_tell_is_told_without_opening_the_model(folder: Path):
    check_checkpoint(str(folder))
    cut_short(folder)
    with pytest.raises(ModelError, match="cut short or overwritten"):
        check_checkpoint(str(folder))
    with pytest.raises(ModelError, match=r"'.*/copi' does not exist\. Did you mean '.*/copy'"):
        check_checkpoint(str(folder.with_name("copi")))


# Files that are not results of a whole table: traces, plans, evaluations, and whole checkpoints.


def plan() -> Plan:
    return Plan([zero(Site("z", 1, (0, 2), "suffix")), add(Site("resid_pre", 2, positions="question"), torch.ones(64)),
                 cut("generation", "video", layers=[1])])  # fmt: skip


SAVED: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "Trace": (
        lambda place: small_model().trace(small_inputs()).save(place / "a"),
        lambda path: Trace.load(path, small_model(), small_inputs()),
    ),
    "Plan": (lambda place: plan().save(place / "a.json", model=small_model()), Plan.load),
    "Evaluation": (
        lambda place: Evaluation(FRAME, FRAME, about={"clips": "ab"}).save(place / "a.json"),
        Evaluation.load,
    ),
}


def survive(kind: str, place: Path, seeds: range) -> Counter[str]:
    save, read = SAVED[kind]
    save(place)
    files = sorted(path for path in place.rglob("*") if path.is_file())
    main = next(path for path in files if path.suffix == (".safetensors" if kind == "Trace" else ".json"))
    kept = {path: path.read_bytes() for path in files}
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        path = files[seed % len(files)]
        path.write_bytes(mutated(kept[path], seed))
        try:
            repr(read(main))
            outcomes["usable"] += 1
        except AvLensError:
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
        path.write_bytes(kept[path])
    return outcomes


@pytest.mark.parametrize("kind", SAVED)
def test_a_damaged_file_is_refused_in_words(kind: str, tmp_path: Path):
    assert survive(kind, tmp_path, range(FEW if kind == "Trace" else 3 * FEW))["refused"] > FEW // 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVED)
def test_two_thousand_mutations_of_each_kind(kind: str, tmp_path: Path):
    outcomes = survive(kind, tmp_path, range(100, 100 + MANY))
    print(kind, dict(outcomes))
    assert sum(outcomes.values()) == MANY


@pytest.mark.slow
def test_mutated_checkpoints_are_refused_or_answer(whole: Path, tmp_path: Path):
    """Any file of a checkpoint, 200 times: what loads is a model whose logits are finite."""
    outcomes: Counter[str] = Counter()
    names = sorted(path.name for path in whole.iterdir())
    for seed in range(200):
        folder = Path(shutil.copytree(whole, tmp_path / str(seed)))
        path = folder / names[seed % len(names)]
        path.write_bytes(mutated(path.read_bytes(), seed))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(folder)
            outcomes["loads"] += 1
        except AvLensError:
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {path.name}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)
    print("checkpoints", dict(outcomes))
    assert outcomes["refused"] > 50
