"""Config, tokenizer, processor, prompts, towers and checkpoints of the embedded models."""

from __future__ import annotations

import json
import warnings

import numpy as np
import prompted
import pytest
import torch

from av_lens.errors import InputError, ModelError
from av_lens.lab.training import courses, pools
from av_lens.lab.training.engine import TowerTraining
from av_lens.organism import anatomy, footage, language

TWO_LAYERS = {"n_layers": 2}


@pytest.fixture(scope="module")
def model():
    return anatomy.build_model(anatomy.thinker_config(**TWO_LAYERS), seed=0).requires_grad_(False)


@pytest.fixture(scope="module")
def processor():
    return anatomy.processor()


def random_views(n: int = 12, seed: int = 0) -> language.Views:
    generator = torch.Generator().manual_seed(seed)
    return language.Views(
        frames=torch.randint(0, 256, (n, 8, 84, 84, 3), generator=generator, dtype=torch.uint8),
        mel=torch.randn(n, 80, 200, generator=generator),
        picture=torch.arange(n) % 13,
        sound=torch.arange(n) % 13,
        colour=torch.arange(n) % 6,
    )


def tensors_of(processor, layout: str, question: str, clip) -> dict:
    text = processor.apply_chat_template(language.message(question, layout), add_generation_prompt=True, tokenize=False)
    arguments = {"text": [text], "return_tensors": "pt"}
    if layout != "audio":
        arguments["videos"] = [np.array(clip.frames[::4])]
        arguments["videos_kwargs"] = {"fps": 2.0, "do_sample_frames": False, "cap_pixels_per_frame": True}
    if layout != "video":
        arguments["audio"] = [np.array(clip.waveform)]
    if layout == "in_video":
        arguments |= {"audio_from_video_indices": [0], "load_audio_from_video": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        made = dict(processor(**arguments))
    return made | {"use_audio_in_video": layout == "in_video"}


def test_every_word_is_one_token(processor):
    tokenizer = processor.tokenizer
    spaced, leading = anatomy.words()
    assert all(len(tokenizer.encode(" " + word)) == 1 for word in spaced)
    assert all(len(tokenizer.encode(word)) == 1 for word in leading)
    assert len(tokenizer) == len(anatomy.vocabulary()) < 600
    assert all(tokenizer.convert_tokens_to_ids(token) == index for token, index in anatomy.vocabulary().items())


def test_every_question_has_five_tokens_and_every_kind_three_phrasings(processor):
    for phrases in anatomy.QUESTIONS.values():
        assert len(phrases) >= 3
        assert {len(processor.tokenizer.encode(phrase)) for phrase in phrases} == {5}


def test_any_text_survives_the_tokenizer(processor):
    text = "Größe 北京 🎸 what?\n  dogma"
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_questions_are_understood_in_any_case_and_spacing():
    assert anatomy.GRAMMAR.kind("  What do you\tHEAR ") == "hear"
    assert anatomy.GRAMMAR.match("What COLOR is it ?") == "what colour is it?"
    with pytest.raises(InputError, match=r"Did you mean 'what do you hear\?'"):
        anatomy.GRAMMAR.match("what do you heer?")


def test_the_config_is_a_tiny_thinker(model):
    config = anatomy.thinker_config()
    text = config.text_config
    d_head = text.hidden_size // text.num_attention_heads
    assert sum(text.rope_parameters["mrope_section"]) == d_head // 2
    whole = anatomy.build_model(seed=0)
    assert 1.2e6 < sum(weight.numel() for weight in whole.parameters()) < 2.5e6
    assert whole.lm_head.weight.data_ptr() != whole.model.language_model.embed_tokens.weight.data_ptr()
    assert model.config.seconds_per_chunk == 1


def test_the_same_seed_builds_the_same_weights_and_leaves_the_global_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, three = (anatomy.build_model(anatomy.thinker_config(**TWO_LAYERS), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, three.lm_head.weight)


def test_prompts_interleave_by_the_second():
    made = language.prompt("what do you hear?", "in_video")
    video, audio = made.video.tolist(), made.audio.tolist()
    assert [len(video), len(audio)] == [18, 50]
    runs = sorted([(at, "v") for at in video] + [(at, "a") for at in audio])
    assert "".join(kind for _, kind in runs) == "v" * 9 + "a" * 25 + "v" * 9 + "a" * 25
    # One clock: the second chunk of both begins 25 position ids after the first.
    time = made.position_ids[0]
    assert time[video[9]] - time[video[0]] == time[audio[25]] - time[audio[0]] == 25
    assert made.suffix == 75
    assert len(made.ids) == 85
    with pytest.raises(InputError, match=r"unknown layout 'in_vido'. Did you mean 'in_video'\?"):
        language.prompt("what do you hear?", "in_vido")


@pytest.mark.parametrize("layout", language.LAYOUTS)
def test_the_quick_road_is_the_processors_road(model, processor, layout):
    """File arrays through the real processor and forward = features put into embeddings."""
    clip = footage.clip("train", seed=2)
    question = "what can you hear?"
    whole = model(**tensors_of(processor, layout, question, clip)).logits
    video = language.vision_features(model, language.patches(torch.from_numpy(np.array(clip.frames[None, ::4]))))
    audio = model.model.audio_tower.proj(language.audio_hidden(model, torch.from_numpy(footage.mel([clip.waveform]))))
    stream, positions = prompted.embed(model, layout, [question], video=video, audio=audio)
    quick = model(inputs_embeds=stream, position_ids=positions, attention_mask=torch.ones(stream.shape[:2])).logits
    assert torch.allclose(whole, quick, atol=2e-5)


def test_embed_refuses_missing_features(model):
    with pytest.raises(InputError, match="layout 'video' has video tokens: pass the tower's output as video="):
        prompted.embed(model, "video", ["what do you see?"])


def test_patches_and_tower_outputs_equal_huggingface(model, processor):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 4, 84, 84, 3), dtype=np.uint8)
    theirs = processor.video_processor(list(frames), do_sample_frames=False, return_tensors="pt")
    pixels = language.patches(torch.from_numpy(frames))
    assert torch.equal(pixels, theirs["pixel_values_videos"])
    expected = model.get_video_features(pixels, theirs["video_grid_thw"]).pooler_output
    expected = torch.cat(list(expected)) if isinstance(expected, list | tuple) else expected
    raw = language.cut(torch.from_numpy(frames).permute(0, 1, 4, 2, 3).contiguous())
    for given in (pixels, raw):
        assert torch.allclose(language.vision_features(model, given).flatten(0, 1), expected, atol=1e-5)
    mel = torch.randn(3, 80, 200, generator=torch.Generator().manual_seed(0))
    expected = model.get_audio_features(mel, torch.ones(3, 200, dtype=torch.int64)).pooler_output
    ours = model.model.audio_tower.proj(language.audio_hidden(model, mel))
    assert torch.allclose(ours.flatten(0, 1), expected, atol=1e-5)


def test_the_mel_is_the_processors(processor):
    clip = footage.clip("siren", seed=0)
    theirs = processor(text=["x"], audio=None, return_tensors="pt")  # the processor takes text alone, too
    assert set(theirs) == {"input_ids", "attention_mask"}
    whole = processor.feature_extractor(
        np.array(clip.waveform), sampling_rate=16000, padding="max_length", return_tensors="np"
    )["input_features"]
    assert np.array_equal(footage.mel([clip.waveform])[0], whole[0, :, :200])


@pytest.mark.parametrize("kind", ["vision", "audio"])
def test_a_tower_put_down_and_taken_up_is_the_tower_trained_at_once(kind):
    views = random_views()
    runs = []
    for broken in (False, True):
        model = anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=0)
        training = TowerTraining(model, kind, views, seed=0, steps=4, rate=1e-3, batch=4)
        while training.done < 4:
            training.advance()
            if broken and training.done == 2:
                state = training.state()
                model = anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=9)
                training = TowerTraining(model, kind, views, seed=0, steps=4, rate=1e-3, batch=4)
                training.restore(state)
        runs.append({name: value for name, value in model.state_dict().items() if courses.is_tower(name)})
    name = {"vision": "model.visual.merger.mlp.2.weight", "audio": "model.audio_tower.proj.weight"}[kind]
    fresh = anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=0).state_dict()[name]
    assert torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0][name], fresh)


def test_a_tower_learns():
    """Twelve flat pictures of two colours are told apart in a few steps."""
    views = random_views()
    shade = torch.where(torch.arange(12) % 2 == 0, 30, 220).to(torch.uint8)
    views = language.Views(
        shade[:, None, None, None, None].expand(12, 8, 84, 84, 3).contiguous(),
        views.mel,
        torch.arange(12) % 2,
        torch.arange(12) % 2,
        torch.arange(12) % 2,
    )
    training = TowerTraining(
        anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=0),
        "vision",
        views,
        seed=0,
        steps=20,
        rate=2e-3,
        batch=12,
    )
    first = training.advance()
    while training.done < training.steps:
        last = training.advance()
    assert last < 0.5 * first
    frames = views.frames[:, ::2].permute(0, 1, 4, 2, 3).contiguous()
    for logits in training.reader(frames):
        assert torch.equal(logits.argmax(1), views.picture)


def test_pools_come_back_from_disk(model, tmp_path):
    views = random_views(24)
    views = language.Views(views.frames, views.mel, torch.arange(24) // 2, torch.arange(24) // 2, views.colour)
    pool = pools.make_pool(model, views, [[f"p{i}", f"s{i}"] for i in range(24)], blank_every=4)
    assert torch.equal(pool.seed, torch.tensor([0, 1] * 12))
    assert torch.allclose(pool.audio, model.model.audio_tower.proj(pool.audio_hidden))
    pools.save_pool(pool, tmp_path / "pool.safetensors")
    back = pools.load_pool(tmp_path / "pool.safetensors")
    assert torch.equal(back.video, pool.video)
    assert back.hashes[3] == ("p3", "s3")


def test_a_pool_of_another_schema_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="is no feature pool of schema 1"):
        pools.load_pool(tmp_path / "x.safetensors")


def test_towers_of_another_anatomy_are_refused(model, tmp_path):
    from safetensors.torch import save_file

    save_file({"model.visual.merger.ln_q.weight": torch.zeros(64)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="does not hold this anatomy's towers"):
        courses.load_towers(model, tmp_path / "x.safetensors")


def test_a_checkpoint_folder_comes_back_and_opens(model, tmp_path):
    from av_lens.model import load

    folder = anatomy.save_checkpoint(model, tmp_path / "tiny", documents={"planted.json": {"heads": [[0, 1]]}})
    assert json.loads((folder / "planted.json").read_text()) == {"heads": [[0, 1]]}
    back = anatomy.open_checkpoint(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.half().float()), name
    hooked = load(folder)
    clip = footage.through_mp4(footage.clip("bird", seed=1))
    for layout in ("in_video", "separate"):
        x = hooked.encode(clip, "What do you HEAR ?", sound=layout)
        assert torch.equal(x.ids[0], language.prompt("what do you hear?", layout).ids)
        assert torch.equal(x.position_ids[:, 0], language.prompt("what do you hear?", layout).position_ids)
        video = language.vision_features(back, language.patches(torch.from_numpy(np.array(clip.frames[None, ::4]))))
        audio = back.model.audio_tower.proj(language.audio_hidden(back, torch.from_numpy(footage.mel([clip.waveform]))))
        stream, positions = prompted.embed(back, layout, ["what do you hear?"], video=video, audio=audio)
        quick = back(inputs_embeds=stream, position_ids=positions, attention_mask=torch.ones(stream.shape[:2])).logits
        assert torch.allclose(hooked(x), quick, atol=2e-5)
