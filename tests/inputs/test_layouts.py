"""What the encoder makes of a clip is what the processor makes of it, and the map is what the model thinks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from av_lens.errors import InputError
from av_lens.inputs import Answer, Encoder
from av_lens.media import Clip

LAYOUTS = {
    "in_video": {"sound": "in_video"},
    "separate": {"sound": "separate"},
    "video_only": {"sound": None},
    "audio_only": {"picture": None},
    "image_audio": {"picture": "image"},
    "image": {"picture": "image", "sound": None},
    "text": {"picture": None, "sound": None},
}


def ids_from_first_principles(x: Any, hf: Any, fps: float) -> np.ndarray:
    """Walk the tokens and count, as the model's documentation says; written without the package's own code."""
    c = hf.config
    ids = x.ids[0].tolist()
    merge = 2
    spg = np.float32(2 / fps)
    grid = x.tensors.get("video_grid_thw", x.tensors.get("image_grid_thw"))
    h, w = (int(n) // merge for n in grid[0][1:]) if grid is not None else (0, 0)
    out, following, start, seen, last_kind, run_top = [], 0, 0, {}, None, 0
    media = {c.audio_token_id, c.video_token_id, c.image_token_id}
    for i, token in enumerate(ids):
        if token in media:
            if i == 0 or ids[i - 1] not in media:
                start, seen = following, {m: 0 for m in media}
            k = seen[token]
            seen[token] += 1
            if token == c.audio_token_id:
                triple = (start + k,) * 3
            else:
                t = int(np.float32(k // (h * w)) * spg * np.float32(25)) if token == c.video_token_id else 0
                triple = (start + t, start + k % (h * w) // w, start + k % w)
            run_top = max(triple) if token != last_kind else max(run_top, *triple)
            following = run_top + 1
        else:
            pair = x.tensors["use_audio_in_video"] and i > 0
            opened = pair and token == c.audio_start_token_id and ids[i - 1] == c.vision_start_token_id
            closed = pair and token == c.vision_end_token_id and ids[i - 1] == c.audio_end_token_id
            if opened or closed:
                triple = out[-1]
            else:
                triple = (following,) * 3
                following += 1
        last_kind = token
        out.append(triple)
    return np.array(out).T


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("seconds", "fps"), [(3.0, 2), (2.3, 2), (4.5, 1), (4.1, 4.0), (3.1, 5.0), (0.9, 2.0)])
def test_map_and_model_agree_on_every_layout(
    encoder: Encoder, hf: Any, make_clip, layout: str, seconds: float, fps: float
):
    x = encoder.encode(make_clip(seconds), "What do you hear?", fps=fps, **LAYOUTS[layout])
    assert x.layout == layout
    ids = x.position_ids[:, 0].numpy()
    assert np.array_equal(ids, ids_from_first_principles(x, hf, fps))
    spans = x.spans
    for name in ("audio", "video", "image"):
        at = spans[name].positions
        if not len(at):
            continue
        # In the interleaved layout both modalities count from the first of the block; apart, each from its own first.
        first = ids[0, spans.media.positions[0]] if layout == "in_video" else ids[0, at[0]]
        assert np.array_equal(spans.start_s[at], (ids[0, at] - first) / 25)
        if name == "audio":
            assert np.allclose(spans.end_s[at] - spans.start_s[at], 0.04)
            assert np.array_equal(spans.row[at], np.full(len(at), -1))
        else:
            assert np.array_equal(spans.row[at], ids[1, at] - first)
            assert np.array_equal(spans.col[at], ids[2, at] - first)
            # A patch lasts until the next one starts; the last as long as the rate says (an image one second).
            lasting = 2 / fps if name == "video" else 1.0
            starts = np.unique(spans.start_s[at])
            ends = np.append(starts[1:], np.float32(len(starts)) * np.float32(lasting))
            np.testing.assert_allclose(np.unique(spans.end_s[at]), ends, atol=1 / 25)
            assert np.array_equal(np.unique(spans.end_s[at])[:-1], starts[1:])
    tokens = hf.config.audio_token_id, hf.config.video_token_id, hf.config.image_token_id
    for name, token in zip(("audio", "video", "image"), tokens, strict=True):
        assert np.array_equal(spans[name].positions, np.flatnonzero(x.ids[0].numpy() == token))


@pytest.mark.parametrize("layout", ["separate", "video_only"])
def test_truncation_in_float32_is_followed(encoder: Encoder, hf: Any, make_clip, layout: str):
    x = encoder.encode(make_clip(2.0, fps=25.0), "What?", fps=25, **LAYOUTS[layout])
    ids = x.position_ids[:, 0].numpy()
    assert np.array_equal(ids, ids_from_first_principles(x, hf, 25.0))
    patch = (ids[0] - ids[0][x.spans.video.positions[0]])[x.spans.video.positions][:: 2 * 3]
    exact = np.arange(25) * 2  # what t * seconds_per_grid * 25 would be without rounding
    assert (patch < exact).any(), "this rate no longer shows the truncation that the test is about"
    assert np.array_equal(x.spans.start_s[x.spans.video.positions][:: 2 * 3], patch / 25)


@pytest.mark.parametrize("fps", [2.6, 3.7, 7.4])
def test_rates_on_which_processor_and_model_round_differently_are_refused(encoder: Encoder, make_clip, fps: float):
    clip = make_clip(31.0, fps=8.0, size=(56, 56))
    with pytest.raises(
        InputError, match=r"disagree about which second .*position \d+ .*use fps=1, 2, 4 or 5"
    ) as caught:
        encoder.encode(clip, "What?", fps=fps)
    assert f"fps={fps}" in str(caught.value)
    assert encoder.encode(clip, "What?", fps=fps, sound="separate").layout == "separate"


def by_the_processor(processor: Any, clip: Clip, layout: str, question: str) -> dict[str, Any]:
    """One call of the whole processor, with every fifth frame (10 -> 2 frames a second) taken by hand."""
    video, audio, image = ({"type": kind, kind: "-"} for kind in ("video", "audio", "image"))
    media = {"in_video": [video], "separate": [video, audio], "video_only": [video], "audio_only": [audio]}
    media |= {"image_audio": [image, audio], "image": [image], "text": []}
    content = [*media[layout], {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    assert clip.frames is not None
    if video in media[layout]:
        arguments["videos"] = [np.array(clip.frames[::5])]
        arguments["videos_kwargs"] = {"fps": 2.0, "do_sample_frames": False, "cap_pixels_per_frame": True}
    if image in media[layout]:
        arguments["images"] = [np.array(clip.frames[14])]
    if audio in media[layout] or layout == "in_video":
        arguments["audio"] = [np.array(clip.waveform)]
    if layout == "in_video":
        arguments |= {"audio_from_video_indices": [0], "load_audio_from_video": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        batch = dict(processor(**arguments))
    batch.pop("num_audio_tokens", None)
    return batch | {"use_audio_in_video": layout == "in_video"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_tensors_as_one_call_of_the_processor(
    encoder: Encoder, processor: Any, hf: Any, make_clip, layout: str
):
    clip = make_clip(3.0)
    mine = encoder.encode(clip, "What is it?", **LAYOUTS[layout]).tensors
    whole = by_the_processor(processor, clip, layout, "What is it?")
    assert set(mine) == set(whole)
    for name, value in whole.items():
        if name in ("input_features", "feature_attention_mask"):
            length = mine[name].shape[-1]
            assert length == 300 == int(whole["feature_attention_mask"].sum())
            assert torch.equal(mine[name], value[..., :length]), "the trimmed mel must be the processor's to the bit"
        elif isinstance(value, torch.Tensor):
            assert torch.equal(mine[name], value), name
        else:
            assert mine[name] == value
    with torch.no_grad():
        assert torch.equal(hf(**mine).logits, hf(**whole).logits)


def test_odd_numbers_of_frames_repeat_the_last(encoder: Encoder, make_clip):
    x = encoder.encode(make_clip(2.5), "What?", sound=None)
    video = x.spans.video
    assert x.provenance["frames"] == 5
    assert x.provenance["repeated_last_frame"] == 1
    assert x.spans.start_s[video.positions][::6].tolist() == [0.0, 1.0, 2.0]
    assert np.allclose(x.spans.source_start_s[video.positions][::6], [0.0, 1.0, 2.0])
    assert np.allclose(x.spans.source_end_s[video.positions][::6], [0.6, 1.6, 2.1])
    patches = x.tensors["pixel_values_videos"].reshape(3, 24, 3, 2, 14, 14)
    assert torch.equal(patches[2, :, :, 0], patches[2, :, :, 1])
    assert not torch.equal(patches[1, :, :, 0], patches[1, :, :, 1])


def test_frames_are_chosen_by_their_true_times(encoder: Encoder):
    times = np.array([0.02, 0.31, 0.52, 0.74, 1.01, 1.49, 1.51, 1.9])
    frames = np.stack([np.full((56, 84, 3), 20 * i, np.uint8) for i in range(8)])
    clip = Clip.from_arrays(frames=frames, times=times, duration=2.0)
    x = encoder.encode(clip, "What?")
    # Targets 0, .5, 1, 1.5: frames 0, 2, 4, and of 1.49 and 1.51, equally near, the earlier.
    assert encoder.layout.features.video(clip, 2).frames == (0, 2, 4, 5)
    video = x.spans.video.positions
    assert np.allclose(x.spans.source_start_s[video][::6], [0.02, 1.01])
    assert np.allclose(x.spans.source_end_s[video][::6], [0.74, 1.51])
    assert x.spans.start_s[video][::6].tolist() == [0.0, 1.0]


def test_how_long_the_last_frame_stays_belongs_to_the_picture(encoder: Encoder):
    frames = np.zeros((4, 56, 84, 3), dtype=np.uint8)
    short, long = (
        Clip.from_arrays(frames=frames, times=np.arange(4) / 2, duration=end, waveform=np.zeros(16000, np.float32))
        for end in (2.0, 3.0)
    )
    assert short.picture_hash == long.picture_hash
    assert encoder.layout.features.video(short, 2).frames == (0, 1, 2, 3)
    assert encoder.layout.features.video(long, 2).frames == (0, 1, 2, 3, 3, 3)


def test_a_source_slower_than_the_rate_shows_frames_again(encoder: Encoder, make_clip):
    clip = make_clip(2.0, fps=2.0)
    assert encoder.layout.features.video(clip, 4).frames == (0, 0, 1, 1, 2, 2, 3, 3)


def test_sound_tokens_end_with_the_sound(encoder: Encoder):
    # 995 mel frames give 249 tokens; the last of them has 15 ms of sound less than its 40.
    waveform = np.random.default_rng(0).normal(0, 0.1, 159_120).astype(np.float32)
    x = encoder.encode(Clip.from_arrays(waveform=waveform), "What?")
    audio = x.spans.audio.positions
    assert len(audio) == 249
    assert np.allclose(x.spans.source_start_s[audio], np.arange(249) * 0.04)
    assert x.spans.source_end_s[audio[-1]] == pytest.approx(9.945)
    assert x.spans.end_s[audio[-1]] == pytest.approx(9.96)


def test_a_waveform_at_another_rate_is_resampled_and_said(encoder: Encoder):
    tone = (np.sin(np.arange(44_100) * 2 * np.pi * 440 / 44_100) / 2).astype(np.float32)
    x = encoder.encode(Clip.from_arrays(waveform=tone, rate=44_100), "What?")
    assert x.provenance["resampled"] == [44_100, 16_000]
    assert len(x.spans.audio) == 25


def test_roles_of_the_chat_template(encoder: Encoder, make_clip):
    x = encoder.encode(
        make_clip(1.0), "Hear?", system="Be brief.", prefix="I hear a", answer=Answer("dog", ((32, *map(ord, "dog")),))
    )
    joined = {role: "".join(np.array(x.tokens)[x.spans[role].positions]) for role in set(x.spans.roles)}
    assert joined["system"] == "Be brief."
    assert joined["question"] == "Hear?"
    assert joined["header"] == "<|im_end|>\n<|im_start|>assistant\nI hear "
    assert joined["generation"] == "a"
    assert joined["generated"] == " dog"
    assert joined["boundary"] == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|vision_bos|><|audio_bos|><|audio_eos|><|vision_eos|>"
    )
    assert x.spans.suffix.runs == ((x.spans.question.positions[0], x.spans.generation_position + 1),)
    default = encoder.encode(make_clip(1.0), "Hear?")
    assert "".join(np.array(default.tokens)[default.spans.system.positions]) == "You are a helpful assistant."


def test_a_prefix_never_changes_the_tokens_before_it(encoder: Encoder):
    bare, prefixed = encoder.encode(None, "Hear?"), encoder.encode(None, "Hear?", prefix=" a")
    assert prefixed.ids[0, : len(bare.spans)].tolist() == bare.ids[0].tolist()
    assert bare.spans.roles[-1] == "generation"
    assert prefixed.spans.roles[len(bare.spans) - 1] == "header"


def test_features_are_computed_once_per_content(encoder: Encoder, make_clip):
    sound, picture = make_clip(1.5, seed=91), make_clip(1.5, seed=92)
    first = encoder.encode(picture.with_sound(sound), "What?")
    before = encoder.layout.features.memory.hits
    again = encoder.encode(picture.with_sound(sound), "Which?")
    assert encoder.layout.features.memory.hits == before + 2
    assert again.tensors["pixel_values_videos"] is first.tensors["pixel_values_videos"]
    assert again.tensors["input_features"] is first.tensors["input_features"]
    other = encoder.encode(picture, "What?")
    assert encoder.layout.features.memory.hits == before + 3
    assert not torch.equal(other.tensors["input_features"], first.tensors["input_features"])


def test_the_total_pixel_cap_is_on(processor: Any, hf: Any, make_clip):
    """The reference implementation shares a total budget among the frames; here it is made so small that it acts."""
    from noise import model_positions

    small = copy.copy(processor)
    small.video_processor = copy.deepcopy(processor.video_processor)
    small.video_processor.max_video_tokens = 8
    x = Encoder(small, hf.config, model_positions(hf)).encode(make_clip(3.0), "What?")
    # 8 tokens x 28 x 28 pixels x .9 x 2 / 6 frames is under 1.05 x the least size, so 3,292: 28 x 56 of 56 x 84.
    assert x.provenance["grid"] == [3, 1, 2]
    assert x.provenance["video_options"]["cap_pixels_per_frame"] is True
