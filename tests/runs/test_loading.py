"""From names and folders to models: what is opened, what is refused, and in which words."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import tiny_clip, tiny_config, tiny_hf_model, tiny_processor, untouched

from av_lens.errors import ModelError
from av_lens.families.registry import build_bridge, families, family_of
from av_lens.model import load, loading, short_names


@pytest.fixture(scope="module")
def hf_model():
    return tiny_hf_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hf_model):
    """A checkpoint of the fusion model alone."""
    place = tmp_path_factory.mktemp("thinker")
    hf_model.save_pretrained(place)
    tiny_processor().save_pretrained(place)
    return place


def full_config(thinker):
    from transformers import Qwen2_5OmniConfig

    return Qwen2_5OmniConfig(thinker_config=thinker.to_dict(), enable_audio_output=False)


@pytest.fixture(scope="module")
def full_folder(tmp_path_factory, hf_model):
    """A checkpoint laid out like the hub's: weights under `thinker.`, beside a talker and a vocoder."""
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("full")
    full_config(tiny_config()).save_pretrained(place)
    tiny_processor().save_pretrained(place)
    weights = {f"thinker.{name}": value.contiguous() for name, value in hf_model.state_dict().items()}
    weights = {name.replace("thinker.model.language_model.", "thinker.model."): v for name, v in weights.items()}
    weights = {name.replace("thinker.model.audio_tower.", "thinker.audio_tower."): v for name, v in weights.items()}
    weights = {name.replace("thinker.model.visual.", "thinker.visual."): v for name, v in weights.items()}
    weights |= {"talker.model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3), "token2wav.code2wav.x": torch.zeros(2)}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


def same_answers(model, hf_model, atol=0.0):
    x = model.encode(tiny_clip(), "What?")
    with torch.no_grad():
        wanted = untouched(hf_model)(**x.tensors).logits
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=atol)


def test_a_folder_of_the_fusion_model(folder, hf_model):
    model = load(folder)
    assert model.dtype == torch.float32
    assert not model.handed_in
    assert model.provenance["source"] == str(folder)
    assert not model.bridge.training
    processor = model.processor
    assert processor.tokenizer is model.tokenizer is model.bridge.tokenizer
    x = model.encode(tiny_clip(), "What?")
    # frames of 56 x 84 pixels are within the folder's own size: 2 x 3 tokens, for each pair of the four
    assert len(x.spans["video"]) == 2 * 2 * 3
    with torch.no_grad():
        assert torch.equal(model(x), untouched(hf_model)(**x.tensors).logits)


def test_a_full_checkpoint_opens_its_thinker_alone(full_folder, hf_model):
    model = load(str(full_folder))
    names = [name for name, _ in model.hf_model.named_parameters()]
    assert not any("talker" in name or "token2wav" in name for name in names)
    same_answers(model, hf_model)


def test_an_organisms_folder_keeps_its_sizes_and_is_raised_to_float32(tmp_path, folder, hf_model):
    place = tmp_path / "organism"
    shutil.copytree(folder, place)
    half = untouched(hf_model).to(torch.float16)
    half.save_pretrained(place)
    (place / "grammar.json").write_text("{}")
    model = load(place)
    assert model.dtype == torch.float32
    assert model.processor.videos_kwargs["size"] == {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    weight = model.hf_model.lm_head.weight
    assert torch.equal(weight, half.lm_head.weight.float())


@pytest.mark.parametrize(
    ("video", "image", "tokens"),
    [
        ((56, 56), None, 2 * 1 * 2),  # a size for videos alone: 1 x 2 tokens
        ((56, 56), (56, 56), 2 * 1 * 2),  # the old file for all pictures, which allows less than the class
        ((560, 1120), (112, 112), 2 * 17 * 25),  # more than the class has, for videos: at least 400 tokens
        ((112, 3584), (112, 3584), 2 * 10 * 14),  # the real checkpoints' old file: images'; the class's least is 128
    ],
)
def test_the_sizes_of_pictures_are_the_folders_own(tmp_path, folder, video, image, tokens):
    place = tmp_path / "sized"
    shutil.copytree(folder, place)
    stated = json.loads((place / "processor_config.json").read_text())
    for name, edges in (("video_processor", video), ("image_processor", image)):
        if edges is not None:
            stated[name].pop("size", None)
            stated[name] |= {"min_pixels": edges[0] ** 2, "max_pixels": edges[1] ** 2}
    (place / "processor_config.json").write_text(json.dumps(stated))
    model = load(place)
    x = model.encode(tiny_clip(), "What?")
    assert len(x.spans["video"]) == tokens, model.processor.videos_kwargs


def test_precision_can_be_chosen(folder):
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load(folder, dtype=torch.float16, device="cpu").dtype == torch.float16
    with pytest.raises(ModelError, match=r"'int8' is no floating-point dtype; pass torch\.float32"):
        load(folder, dtype="int8")


def test_the_rule_for_precision_and_device(monkeypatch):
    assert loading._stored_dtype({"thinker_config": {"torch_dtype": "bfloat16"}}, "thinker_config") == torch.bfloat16
    assert loading._stored_dtype({"dtype": "float16"}) == torch.float16
    assert loading._stored_dtype({}) == torch.float32
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 24 * 10**9))
    assert loading._fitting_device(7 * 10**9, torch.bfloat16) == torch.device("cuda")
    assert loading._fitting_device(9 * 10**9, torch.bfloat16) == torch.device("cpu")


def test_counting_parameters_allocates_nothing():
    config = tiny_config(d_model=1024, n_heads=8, n_kv_heads=2)
    counted = loading._count(family_of("qwen2_5_omni_thinker"), config)
    assert counted == sum(p.numel() for p in tiny_hf_model(d_model=1024, n_heads=8, n_kv_heads=2).parameters())


def test_a_model_that_is_there_is_wrapped_in_place(hf_model):
    mine = untouched(hf_model)
    model = load(hf_model=mine, processor=tiny_processor())
    assert model.hf_model is mine
    assert model.handed_in
    same_answers(model, hf_model)


def test_wrapping_twice_is_refused(hf_model):
    mine = untouched(hf_model)
    load(hf_model=mine, processor=tiny_processor())
    with pytest.raises(ModelError, match="is wrapped already"):
        load(hf_model=mine, processor=tiny_processor())


def test_two_models_of_one_configuration_keep_their_own_attention():
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    config = tiny_config()
    config._attn_implementation = "sdpa"
    one, two = (Qwen2_5OmniThinkerForConditionalGeneration(config) for _ in range(2))
    build_bridge(one)
    assert one.config.text_config._attn_implementation == "eager"
    assert two.config.text_config._attn_implementation == "sdpa"
    assert config.text_config._attn_implementation == "sdpa"


def test_the_adapter_is_registered_as_an_entry_point():
    """Of classes that TransformerLens has adapters of its own for, it would refuse an entry point with a warning."""
    from importlib.metadata import entry_points

    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    found = {entry.name: entry.load() for entry in entry_points(group="transformer_lens.architectures")}
    for family in families():
        if family.architecture in SUPPORTED_ARCHITECTURES:
            assert family.architecture not in found
        else:
            assert found[family.architecture] is family.adapter
    assert len(found) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("av-tinny", "unknown model 'av-tinny'."),
        ("/nowhere/at/all", "the checkpoint folder '/nowhere/at/all' does not exist."),
        ("./missing", "the checkpoint folder './missing' does not exist."),
    ],
)
def test_a_missing_checkpoint_is_named(name, text):
    with pytest.raises(ModelError) as error:
        load(name)
    assert text in str(error.value)
    assert "hort names" in str(error.value) or "hub name" in str(error.value)


def test_a_hub_name_without_a_network_is_explained():
    with pytest.raises(ModelError) as error:
        load("Qwen/Qwen2.5-Omni-0B")
    text = str(error.value)
    assert "cannot get config.json of 'Qwen/Qwen2.5-Omni-0B' from the HuggingFace hub" in text
    assert "Check the name and the network, or download the folder elsewhere and pass its path." in text


def test_a_model_with_no_adapter_is_refused_with_the_way_to_add_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ModelError) as error:
        load(tmp_path)
    text = str(error.value)
    assert "no adapter for 'mamba'" in text
    assert "Qwen2_5OmniThinkerForConditionalGeneration" in text
    assert "av_lens/families/<family>.py" in text
    with pytest.raises(ModelError, match="no adapter for 'Linear'"):
        load(hf_model=torch.nn.Linear(2, 2), processor=tiny_processor())


def test_an_empty_folder_and_a_file_are_no_checkpoints(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)
    file = tmp_path / "weights.bin"
    file.write_text("x")
    with pytest.raises(ModelError, match="is a file, not a folder"):
        load(file)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)


def test_missing_weights_are_refused_not_made_up(tmp_path, folder):
    from safetensors.torch import load_file, save_file

    place = tmp_path / "part"
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights of Qwen2_5Omni.* are missing .*lm_head.weight"):
        load(place)


def test_pickled_weights_are_refused(tmp_path, folder, hf_model):
    place = tmp_path / "pickled"
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(hf_model.state_dict(), place / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot read model\.safetensors"):
        load(place)


def test_a_folder_without_a_processor_says_so(tmp_path, hf_model):
    untouched(hf_model).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot read the processor in"):
        load(tmp_path)
    assert load(tmp_path, processor=tiny_processor()).spec.n_layers == 4


def test_nothing_to_load_is_said():
    with pytest.raises(ModelError, match="load needs a name, a folder, or hf_model= with processor="):
        load()
    with pytest.raises(ModelError, match="hf_model= needs processor= as well"):
        load(hf_model=tiny_hf_model())


def test_short_names_resolve_through_the_index(monkeypatch, tmp_path, folder):
    checkpoints = tmp_path / "organism" / "checkpoints"
    shutil.copytree(folder, checkpoints / "small")
    (checkpoints / "index.json").write_text(json.dumps({"av-small": {"folder": "small", "summary": "a test"}}))
    monkeypatch.setattr("av_lens.checkpoints.resources.files", lambda package: tmp_path)
    assert short_names() == {"av-small": "a test"}
    assert load("av-small").spec.d_model == 64
    with pytest.raises(ModelError, match="Did you mean 'av-small'"):
        load("av-smal")


def test_a_device_map_of_one_place_is_none():
    hf_model = tiny_hf_model(n_layers=1)
    hf_model.hf_device_map = {"model": 0, "lm_head": 0}
    assert load(hf_model=hf_model, processor=tiny_processor()).spec.n_layers == 1


def by_gptq(hf_model):
    hf_model.config.quantization_config = {"quant_method": "gptq", "bits": 4}


def by_its_quantizer(hf_model):
    hf_model.hf_quantizer = type("Quantizer", (), {"quantization_config": {"quant_method": "awq"}})()


def by_hand(hf_model):
    weight = hf_model.lm_head.weight.detach().to(torch.int8)
    hf_model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)


def in_eight_bit_floats(hf_model):
    hf_model.lm_head.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("quantise", "way"),
    [
        (by_gptq, "gptq"),
        (by_its_quantizer, "awq"),
        (by_hand, "torch.int8"),
        (in_eight_bit_floats, "torch.float8_e4m3fn"),
    ],
)
def test_quantised_models_are_refused(quantise, way):
    hf_model = tiny_hf_model(n_layers=1)
    quantise(hf_model)
    with pytest.raises(ModelError, match=rf"these weights are quantised \({way}\).* but bitsandbytes'\. Load it in bf"):
        load(hf_model=hf_model, processor=tiny_processor(), dtype=torch.bfloat16)


@pytest.mark.parametrize("levels", ["", "text_config", "thinker_config", "thinker_config text_config"])
def test_quantised_folders_are_refused_before_a_weight_is_read(tmp_path, levels):
    config = full_config(tiny_config()).to_dict() if "thinker" in levels else tiny_config().to_dict()
    level = config
    for name in levels.split():
        level = level[name]
    level["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"these weights are quantised \(awq\)"):
        load(tmp_path)
