"""A folder of LoRA weights opens as peft would have merged it; what does not fit is refused in words."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_av import small_clip, small_inputs
from tiny import randomized, tiny_hf_model, tiny_processor
from tiny_families import vl_config, vl_processor
from transformers import Qwen2_5_VLForConditionalGeneration

import av_lens as avl
from av_lens.errors import ModelError

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_hf_model().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


def told(base: Any, **more: Any) -> dict[str, Any]:
    """What a LoRA folder says of itself."""
    return {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"], "task_type": None} | more  # fmt: skip


def drawn(path: Path, base: Path, prefix: str = "base_model.model.", **more: Any) -> Path:
    """A LoRA folder without peft: rank 4 on the queries and values of the decoder."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, module in tiny_hf_model().named_modules():
        if "language_model" in name and name.endswith(("q_proj", "v_proj")):
            for part, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                weights[f"{prefix}{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator) / 4
    path.mkdir()
    pattern = r".*language_model.*\.(q_proj|v_proj)"
    (path / "adapter_config.json").write_text(json.dumps(told(base, target_modules=pattern, **more)))
    save_file(weights, path / "adapter_model.safetensors")
    return path


@needs_peft
@torch.no_grad()
def test_it_is_the_base_with_the_product_added(base, tmp_path):
    path = drawn(tmp_path / "lora", base)
    model = avl.load(path)
    weights, wanted = load_file(path / "adapter_model.safetensors"), tiny_hf_model()
    for name, module in wanted.named_modules():
        a, b = (weights.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        if a is not None:
            module.weight.data += 8 / 4 * b @ a
    wanted = avl.load("tiny", hf_model=wanted, processor=tiny_processor())
    x = small_inputs((0,))
    torch.testing.assert_close(model(x), wanted(x), atol=1e-5, rtol=0)
    plain = avl.load(base)
    assert float((model(x) - plain(x)).abs().max()) > 0.1
    torch.testing.assert_close(model.W_Q, wanted.W_Q, atol=1e-6, rtol=0)
    assert model.provenance["source"] == str(path)
    assert model.provenance["base"] == str(base)
    assert model.trace(x).hooked_because == ""
    assert torch.equal(model.encode(small_clip(0), "What?").ids, x.ids)


@needs_peft
@torch.no_grad()
def test_it_is_what_peft_merges(base, tmp_path):
    from peft import PeftModel

    path = drawn(tmp_path / "lora", base, use_rslora=True)
    warnings.simplefilter("ignore")  # peft calls what transformers gives up
    merged, x = PeftModel.from_pretrained(tiny_hf_model(), str(path)).merge_and_unload(), small_inputs((0,))
    merged.set_attn_implementation("eager")
    assert torch.equal(avl.load(path)(x), merged.eval()(**x.tensors).logits)


@needs_peft
def test_a_base_beside_the_adapter_is_found(base, tmp_path):
    (tmp_path / "base").symlink_to(base)
    path = drawn(tmp_path / "lora", Path("../base"))
    assert avl.load(path).spec.n_layers == 4


@needs_peft
def test_weights_that_find_no_place_are_refused(base, tmp_path):
    path = drawn(tmp_path / "lora", base, prefix="base_model.model.thinker.")
    with pytest.raises(ModelError, match=r"do not belong together: of .* longer names: merge it"):
        avl.load(path)


@needs_peft
@pytest.mark.parametrize("options", [{"device_map": "auto"}])
def test_an_adapter_lies_in_one_place(base, tmp_path, options):
    with pytest.raises(ModelError, match=r"is an adapter over .* Leave device_map= out, or save the whole model first"):
        avl.load(drawn(tmp_path / "lora", base), **options)


@needs_peft
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_an_adapter_of_the_unembedding_stays_off_the_embedding(tmp_path, tied):
    """peft merges in place: where both are one weight the embedding would be changed too."""
    from peft import LoraConfig, get_peft_model

    config = vl_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    randomized(Qwen2_5_VLForConditionalGeneration, config, 0).save_pretrained(tmp_path / "base")
    vl_processor().save_pretrained(tmp_path / "base")
    opened = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "base")
    warnings.simplefilter("ignore")
    how = LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    trained = get_peft_model(opened, how).eval()
    trained.save_pretrained(tmp_path / "lora", save_embedding_layers="auto" if not tied else False)
    if tied:
        with pytest.raises(ModelError, match="changes embed_tokens or lm_head, which are one weight in"):
            avl.load(tmp_path / "lora")
        return
    model = avl.load(tmp_path / "lora")
    x = model.encode(small_clip(0), "What?", sound=None)
    torch.testing.assert_close(model(x), trained(**x.tensors).logits, atol=1e-4, rtol=0)


def test_without_peft_it_is_said_what_to_install(base, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"and peft is not installed: pip install 'av_lens\[lora\]'"):
        avl.load(drawn(tmp_path / "lora", base))


def no_weights(path: Path) -> None:
    (path / "adapter_model.safetensors").unlink()


def pickled(path: Path) -> None:
    no_weights(path)
    (path / "adapter_model.bin").write_bytes(b"x")


def said(**more: Any) -> Any:
    def write(path: Path) -> None:
        about = json.loads((path / "adapter_config.json").read_text()) | more
        (path / "adapter_config.json").write_text(json.dumps(about))

    return write


FAULTS = {
    "no weights": (no_weights, r"has no adapter_model\.safetensors: it was not copied"),
    "pickled weights": (pickled, r"adapter_model\.bin is there, and pickled weights are never opened here"),
    "another kind": (
        said(peft_type="PREFIX_TUNING"),
        r"of the kind 'PREFIX_TUNING'; av_lens merges LORA alone",
    ),
    "no base": (
        said(base_model_name_or_path=None),
        "names no base: write its folder or hub name into adapter_c",
    ),
    "no json": (lambda path: (path / "adapter_config.json").write_text("{"), "adapter's configuration"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_refused(base, tmp_path, fault):
    path = drawn(tmp_path / "lora", base)
    spoil, text = FAULTS[fault]
    spoil(path)
    with pytest.raises(ModelError, match=text):
        avl.load(path)


@needs_peft
def test_a_base_that_is_gone_is_refused(tmp_path):
    path = drawn(tmp_path / "lora", tmp_path / "gone")
    with pytest.raises(ModelError, match=r"is an adapter over '.*gone', which is not there: .* its new place"):
        avl.load(path)


def test_an_adapter_beside_a_whole_model_is_refused(base, tmp_path):
    tiny_hf_model().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(told(base)))
    with pytest.raises(ModelError, match=r"holds an adapter .* beside a whole model: which of them is meant\?"):
        avl.load(tmp_path)


def test_adapters_that_stand_in_a_model_are_refused():
    """HuggingFace's `load_adapter` leaves the class as it is: direct attribution would read the base's weights."""
    hf_model = tiny_hf_model()
    attention = hf_model.model.language_model.layers[2].self_attn
    plain, attention.o_proj = attention.o_proj, torch.nn.Identity()
    attention.o_proj.base_layer = plain  # as peft does it
    with pytest.raises(ModelError, match=r"adapters \(peft\) stand in this model at .*layers\.2\.self_attn\.o_proj"):
        avl.load("tiny", hf_model=hf_model, processor=tiny_processor())
