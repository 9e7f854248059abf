"""Which families are found, from where, and in which words a wrong one is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_clip, tiny_config, tiny_hf_model, tiny_processor, untouched
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerModel

import av_lens as avl
from av_lens.errors import InputError, ModelError
from av_lens.families import registry
from av_lens.families.qwen2_5_omni import FAMILY
from av_lens.families.qwen_media import QwenMedia
from av_lens.inputs import Encoder


class ToyInner(Qwen2_5OmniThinkerModel):
    """Somebody's change of the thinker's inside."""

    def forward(self, **kwargs: Any) -> Any:
        self.runs = getattr(self, "runs", 0) + 1
        return super().forward(**kwargs)


class ToyThinker(Thinker):
    """Somebody's class derived from one that is known."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = ToyInner(config)


class ToyMedia(QwenMedia):
    """Another clock: its tokens of sound stand for twice as long."""

    frames_per_token = 8


class WrongMedia(QwenMedia):
    """Half as many tokens of sound as the tower gives."""

    def sound_tokens(self, mel_frames: int) -> int:
        return super().sound_tokens(mel_frames) // 2


TOY = replace(FAMILY, model_class=ToyThinker, media=ToyMedia, model_types=("toy_thinker",), inner_config={})


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own, in which nothing was looked for yet."""
    monkeypatch.setattr(registry, "_KNOWN", {})
    registry._discover.cache_clear()
    yield
    registry._discover.cache_clear()


def toy() -> Any:
    """The toy with the weights of a tiny thinker."""
    plain = tiny_hf_model()
    made = ToyThinker(tiny_config())
    made.load_state_dict(plain.state_dict())
    return made.eval(), plain


def named(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    """Let a package that is not there name these as its families."""
    entries = [EntryPoint(name, f"somewhere:{name}", registry.GROUP) for name in attributes]
    monkeypatch.setattr(EntryPoint, "load", lambda self: attributes[self.name])
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.GROUP else [])


def test_a_class_that_is_derived_from_a_known_one_is_of_its_family():
    made, plain = toy()
    assert registry.family_of(type(made)) is FAMILY
    model = avl.load(hf_model=made, processor=tiny_processor())
    assert model.family is FAMILY
    x = model.encode(tiny_clip(), "What?")
    with torch.no_grad():
        before = made.model.runs
        assert torch.equal(model(x), untouched(plain)(**x.tensors).logits)
        assert made.model.runs == before + 1  # its own forward is still on the road
    assert model.trace(x).hooked_because == ""
    assert torch.equal(model.generate(x, max_new_tokens=2), untouched(plain).generate(**x.tensors, max_new_tokens=2))


def test_a_registered_family_goes_before_that_of_the_class_it_is_derived_from(fresh):
    assert registry.family_of(ToyThinker) is registry.family_of("qwen2_5_omni")
    ours = registry.families()
    registry.register_family(TOY)
    registry.register_family(TOY)  # said again, it is the same
    assert registry.families() == (*ours, TOY)
    assert registry.family_of(ToyThinker) is registry.family_of("toy_thinker") is TOY
    assert registry.family_of(Thinker) is registry.family_of("qwen2_5_omni_thinker") is FAMILY
    assert registry.family_of("unheard_of", "toy_thinker") is TOY
    with pytest.raises(ModelError, match=r"no adapter for 'Linear'.* Qwen2_5Omni.*, ToyThinker. To add a family"):
        registry.family_of(torch.nn.Linear)


def test_a_familys_own_layout_of_media_reaches_the_inputs_and_the_models_proof(fresh):
    registry.register_family(TOY)
    made, plain = toy()
    model = avl.load(hf_model=made, processor=tiny_processor())
    x = model.encode(tiny_clip(), "What?", sound="separate")
    assert x.spans.source_start_s[x.spans.audio.positions][:4] == pytest.approx([0.0, 0.08, 0.16, 0.24])
    usual = Encoder(tiny_processor(), plain.config, model.position_ids)  # by what its configuration says
    spans = usual.encode(tiny_clip(), "What?", sound="separate").spans
    assert spans.source_start_s[spans.audio.positions][:4] == pytest.approx([0.0, 0.04, 0.08, 0.12])
    wrong = Encoder(tiny_processor(), plain.config, model.position_ids, media=WrongMedia)
    with pytest.raises(InputError, match="the model cannot compute position ids for this input"):
        wrong.encode(tiny_clip(), "What?", sound="separate")


def test_a_checkpoint_that_names_a_registered_class_is_opened_as_it(fresh, tmp_path):
    registry.register_family(TOY)
    made, _ = toy()
    made.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    model = avl.load(tmp_path)
    assert model.family is TOY
    assert type(model.hf_model) is ToyThinker


def test_another_packages_family_is_found_by_its_entry_point(fresh, monkeypatch):
    named(monkeypatch, ToyThinker=TOY)
    assert registry.family_of(ToyThinker) is TOY
    assert FAMILY in registry.families()
    assert registry.families()[-1] is TOY


def test_a_taken_name_is_refused_in_words(fresh, monkeypatch):
    words = (
        r"the family of ToyThinker cannot be added: its name 'qwen2_5_omni' is that of the family of "
        r"Qwen2_5OmniThinkerForConditionalGeneration already\. Give it names of its own, or leave one of the two out\."
    )
    clashing = replace(TOY, model_types=("toy_thinker", "qwen2_5_omni"))
    with pytest.raises(ModelError, match=words):
        registry.register_family(clashing)
    assert TOY not in registry.families()
    assert clashing not in registry.families()  # none of its names stays behind
    registry._discover.cache_clear()
    named(monkeypatch, ToyThinker=clashing)
    with pytest.raises(ModelError, match=words):
        registry.families()


def test_an_entry_point_that_is_no_family_is_refused_in_words(fresh, monkeypatch):
    named(monkeypatch, Wrong=ToyThinker)
    with pytest.raises(ModelError, match="somewhere:Wrong, which a package names as a model family, is no Family"):
        registry.families()
    monkeypatch.setattr(EntryPoint, "load", lambda self: 1 / 0)
    with pytest.raises(ModelError, match=r"'Wrong' of another package \(somewhere:Wrong\) cannot be loaded: division"):
        registry.families()


OWN = (
    *("video_grid_thw", "image_grid_thw", "video_second_per_grid", "pixel_values", "input_features"),
    *("feature_attention_mask", "use_audio_in_video", "seconds_per_chunk", "position_id_per_seconds", "thinker_config"),
    *("audio_token_id", "video_token_id", "image_token_id", "_start_token_id", "_end_token_id", "_bos_token"),
    *("num_audio_tokens", "second_per_grid", "im_start", "temporal_patch_size", "merge_size", "hop_length"),
)


@pytest.mark.parametrize("room", ["inputs", "model"])
def test_no_familys_names_stand_outside_families(room: str):
    for path in (Path(avl.__file__).parent / room).rglob("*.py"):
        found = re.findall("|".join(OWN), path.read_text())
        assert not found, f"{path.name} says {found[0]}: a family's own business (families/)"
