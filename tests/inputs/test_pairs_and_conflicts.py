"""Pairs prove that they are aligned; a conflict's cells hold the media their names say, in one layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from av_lens.errors import AlignmentError, InputError, ProtocolError
from av_lens.inputs import AVInputs, Conflict, Encoder, Pair
from av_lens.inputs.conflict import fitted
from av_lens.media import Clip, ClipFile
from av_lens.memory import Memory

NAMES = [
    "va",
    "vv",
    "aa",
    "av",
    "vw",
    "aw",
    "wa",
    "wv",
    "v_muted",
    "a_muted",
    "blank_a",
    "blank_v",
    "blank_muted",
    "audio_only",
    "video_only",
]


def conflict(make_clip, **changes: Any) -> Conflict:
    fields: dict[str, Any] = {
        "sound": make_clip(2.0, seed=1),
        "picture": make_clip(2.0, seed=2),
        "third": make_clip(2.0, seed=3),
        "question": "What do you hear?",
        "answers": ("dog", "cat"),
    }
    return Conflict(**fields | changes)


def test_a_pair_of_aligned_inputs(encoder: Encoder, make_clip):
    pair = Pair(
        clean=encoder.encode(make_clip(2.0, seed=1), "Hear?"), corrupt=encoder.encode(make_clip(2.0, seed=2), "Fear?")
    )
    assert len(pair) == 1
    assert [pair.clean.tokens[p] for p in pair.differing] == ["H"]


def test_a_misaligned_pair_shows_the_first_difference(encoder: Encoder, make_clip):
    short, long = (encoder.encode(make_clip(seconds), "Hear?") for seconds in (2.0, 2.5))
    with pytest.raises(AlignmentError) as caught:
        Pair(clean=short, corrupt=long)
    first = next(i for i in range(len(short.spans)) if short.spans.roles[i] != long.spans.roles[i])
    text = str(caught.value)
    assert text.startswith(f"clean and corrupt are not aligned: they first differ at position {first}: clean has ")
    assert f"clean has {short.tokens[first]!r} ({short.spans.roles[first]}" in text
    assert f"corrupt has {long.tokens[first]!r} ({long.spans.roles[first]}" in text
    assert "(2.00 s)" in text
    assert "(2.50 s)" in text
    assert "clip.trimmed" in text


def test_a_pair_of_two_layouts_or_sizes_is_refused(encoder: Encoder, make_clip):
    clip = make_clip(2.0)
    with pytest.raises(AlignmentError, match="they first differ at position"):
        Pair(clean=encoder.encode(clip, "Hear?"), corrupt=encoder.encode(clip, "Hear?", sound="separate"))
    with pytest.raises(AlignmentError, match=r"clean holds 1 examples, corrupt 2"):
        Pair(clean=encoder.encode(clip, "Hear?"), corrupt=encoder.encode([clip, clip], "Hear?"))
    with pytest.raises(AlignmentError, match=r"row \d, col \d"):
        Pair(clean=encoder.encode(clip, "Hear?"), corrupt=encoder.encode(make_clip(2.0, size=(84, 56)), "Hear?"))


@pytest.mark.parametrize("layout", ["in_video", "separate"])
def test_each_cell_holds_what_its_name_says(encoder: Encoder, make_clip, layout: str):
    it = conflict(make_clip)
    cells = it.cells(encoder, layout=layout)
    assert list(cells) == NAMES
    assert len(cells) == 15
    assert cells["va"] is cells["va"]
    alone = {
        name: encoder.encode(clip, it.question, sound=layout).tensors
        for name, clip in (("a", it.sound), ("v", it.picture), ("w", it.third))
    }
    silence = cells["blank_muted"].tensors["input_features"]
    dark = cells["blank_muted"].tensors["pixel_values_videos"]
    assert silence.unique().numel() == 1
    assert [channel.unique().numel() for channel in dark.reshape(-1, 3, 392).unbind(1)] == [1, 1, 1]
    for name in NAMES[:-2]:
        picture, sound = name.split("_") if "_" in name else name
        seen = cells[name].tensors["pixel_values_videos"]
        heard = cells[name].tensors["input_features"]
        assert torch.equal(seen, dark if picture == "blank" else alone[picture]["pixel_values_videos"]), name
        assert torch.equal(heard, silence if sound == "muted" else alone[sound]["input_features"]), name
        assert cells[name].spans.layout_difference(cells["va"].spans) is None
        assert cells[name].layout == layout
        assert cells[name].provenance["cell"] == name
        assert cells[name].provenance["cut_to_s"] is None
    assert len(AVInputs.stack([cells[name] for name in NAMES[:-2]])) == 13
    assert cells["audio_only"].layout == "audio_only"
    assert torch.equal(cells["audio_only"].tensors["input_features"], alone["a"]["input_features"])
    assert cells["video_only"].layout == "video_only"
    assert torch.equal(cells["video_only"].tensors["pixel_values_videos"], alone["v"]["pixel_values_videos"])
    assert "input_features" not in cells["video_only"].tensors


def test_cells_are_lazy_and_share_their_features(processor: Any, hf: Any, make_clip):
    from noise import model_positions

    encoder = Encoder(processor, hf.config, model_positions(hf))
    cells = conflict(make_clip).cells(encoder)
    assert len(encoder.layout.features.memory) == 0
    for name in NAMES:
        _ = cells[name]
    # Pictures v, a, w and blank, sounds a, v, w and muted: eight features for fifteen cells.
    assert len(encoder.layout.features.memory) == 8
    other = conflict(make_clip).cells(encoder, question="See?")
    _ = other["va"]
    assert len(encoder.layout.features.memory) == 8


def test_decoded_sources_are_held_for_few_conflicts_and_made_again_for_the_others(encoder, make_clip, monkeypatch):
    held: Memory[Any] = Memory(1)
    monkeypatch.setattr("av_lens.inputs.conflict._SOURCES", held)
    alone = conflict(make_clip, id="x")
    whole = dict(alone.cells(encoder).items())
    taking_turns = alone.cells(encoder), conflict(make_clip, sound=make_clip(2.0, seed=9), id="y").cells(encoder)
    for name, wanted in whole.items():
        found, _ = (cells[name] for cells in taking_turns)
        for key, value in wanted.tensors.items():
            assert torch.equal(torch.as_tensor(found.tensors[key]), torch.as_tensor(value)), key
        assert found.provenance == wanted.provenance
        assert len(held) == 1
    bare = alone.cells(encoder, keep_clips=False)["va"]
    assert (whole["va"].clips[0] is None, bare.clips) == (False, (None,))
    assert bare.provenance == whole["va"].provenance


def test_without_a_third_clip_the_w_cells_are_refused_by_name(encoder: Encoder, make_clip):
    cells = conflict(make_clip, third=None).cells(encoder)
    assert list(cells) == [name for name in NAMES if "w" not in name]
    assert "wa" not in cells
    with pytest.raises(ProtocolError, match=r"cell 'wa' needs a third clip w .*Conflict\(third=\.\.\.\)"):
        _ = cells["wa"]
    with pytest.raises(InputError, match=r"unknown cell 'blank_mute'. Did you mean 'blank_muted'"):
        _ = cells["blank_mute"]


def test_sources_of_unequal_length_are_cut_to_the_shortest_and_it_is_said(encoder: Encoder, make_clip):
    it = conflict(make_clip, sound=make_clip(2.3, seed=1), picture=make_clip(3.0, seed=2), third=make_clip(2.0, seed=3))
    cells = it.cells(encoder)
    assert cells["va"].provenance["cut_to_s"] == pytest.approx(2.0)
    assert cells["va"].provenance["whole_s"] == pytest.approx(3.0)  # the longer of the conflict's two clips
    assert {len(cells[name].spans.audio) for name in NAMES[:-1]} == {50}
    assert {len(cells[name].spans.video) for name in NAMES if name != "audio_only"} == {12}
    assert any("trimmed to 0-2 s" in note for note in cells["va"].provenance["notes"])


def test_sources_with_other_frame_times_still_share_a_layout(encoder: Encoder, make_clip):
    # Cut to 1.52 s, a rate of 4 keeps the frame at 1.5 s of the 50-a-second source only: all are cut before it.
    it = conflict(
        make_clip, sound=make_clip(1.52, fps=50.0, seed=1), picture=make_clip(2.0, fps=10.0, seed=2), third=None
    )
    cells = it.cells(encoder, fps=4)
    assert len({len(cells[name].spans) for name in list(cells)[:-2]}) == 1


def test_pictures_of_another_size_are_cropped_and_scaled_and_it_is_said(encoder: Encoder, make_clip):
    it = conflict(make_clip, sound=make_clip(2.0, seed=1, size=(112, 112)))
    cells = it.cells(encoder)
    assert cells["aa"].tensors["video_grid_thw"].tolist() == cells["vv"].tensors["video_grid_thw"].tolist()
    assert any("cropped to 112x75 of 112x112 and scaled to 84x56" in note for note in cells["aa"].provenance["notes"])


def test_fitting_keeps_the_middle():
    frames = np.zeros((1, 40, 100, 3), dtype=np.uint8)
    frames[:, :, 30:70] = 200
    small = Clip.from_arrays(frames=np.zeros((1, 20, 20, 3), dtype=np.uint8))
    fit = fitted(Clip.from_arrays(frames=frames), small)
    assert fit.frames is not None
    assert fit.frames.shape == (1, 20, 20, 3)
    assert (fit.frames == 200).all()
    assert fitted(small, small) is small


def test_other_blanks_mutes_and_questions(encoder: Encoder, make_clip):
    it = conflict(make_clip, prefix="I hear a")
    noisy = it.cells(encoder, blank="scrambled", mute="noise", seed=3)
    plain = it.cells(encoder, question=it.see)
    assert noisy["blank_muted"].tensors["input_features"].unique().numel() > 1
    assert not torch.equal(
        noisy["blank_a"].tensors["pixel_values_videos"], plain["blank_a"].tensors["pixel_values_videos"]
    )
    assert plain["va"].questions == ("What do you see?",)
    assert "".join(noisy["va"].tokens[-8:]) == "I hear a"
    with pytest.raises(InputError, match=r"unknown layout 'in video'. Did you mean 'in_video'"):
        it.cells(encoder, layout="in video")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"answers": ("dog", "Dog ")}, "equal answers: both sides hold 'dog'"),
        ({"answers": (["dog", "hound"], ["cat", "hound"])}, "equal answers: both sides hold 'hound'"),
        ({"answers": (["dog", "hound"], "cat")}, "2 synonyms against 1"),
        ({"answers": ("dog", "")}, "an answer is empty"),
    ],
)
def test_answers_that_make_no_conflict_are_refused(make_clip, changes: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        conflict(make_clip, **changes)


def test_a_source_without_a_stream_is_refused(encoder: Encoder, make_clip, tmp_path):
    with pytest.raises(InputError, match=r"sound= is .* has no audio stream: each source of a conflict gives"):
        conflict(make_clip, sound=make_clip(2.0, sound=False))
    with pytest.raises(InputError, match=r"picture= is .* has no picture"):
        conflict(make_clip, picture=Clip.from_arrays(waveform=np.zeros(16000, np.float32)))
    make_clip(1.0, sound=False).save(tmp_path / "silent.mp4")
    cells = conflict(make_clip, sound=ClipFile(str(tmp_path / "silent.mp4"))).cells(encoder)
    with pytest.raises(InputError, match=r"sound= is .*silent.mp4.* has no audio stream"):
        _ = cells["va"]
