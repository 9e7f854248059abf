"""The synthetic world: reproducible, distinct, disjoint by split, and whole after mp4."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from av_lens.errors import InputError
from av_lens.lab.training.pools import nothing
from av_lens.organism import footage, pictures, sounds
from av_lens.organism.anatomy import CLASSES, COLOURS


def test_the_same_seed_gives_the_same_clip_and_another_another():
    first, again, other = (footage.clip("dog", seed=seed) for seed in (3, 3, 4))
    assert (first.picture_hash, first.sound_hash) == (again.picture_hash, again.sound_hash)
    assert first.picture_hash != other.picture_hash
    assert first.sound_hash != other.sound_hash


def test_splits_share_no_clip():
    made = [footage.example(split, "bell", seed) for split in footage.SPLITS for seed in range(4)]
    assert len({one.frames.tobytes() for one in made}) == len(made)
    assert len({one.waveform.tobytes() for one in made}) == len(made)


def test_the_global_random_states_are_left_alone():
    torch.manual_seed(0)
    before = (np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002 (the state that must not change)
    footage.clip("rain", seed=1)
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_clip_has_two_seconds_of_picture_and_sound():
    for name in footage.classes():
        clip = footage.clip(name, seed=0)
        assert clip.frames.shape == (16, 84, 84, 3)
        assert np.allclose(clip.times, np.arange(16) / 8)
        assert (len(clip.waveform), clip.rate, clip.duration) == (32000, 16000, 2.0)
        assert 0.2 < np.abs(clip.waveform).max() <= 1


def test_silhouettes_differ():
    """No two outlines overlap by more than three quarters of their union, and none is a speck or a full square."""
    stamps = {name: pictures._stamp(name, 24.0)[0] > 0 for name in CLASSES}
    for name, stamp in stamps.items():
        assert 0.1 < stamp.mean() < 0.6, name
    for one, two in itertools.combinations(CLASSES, 2):
        overlap = (stamps[one] & stamps[two]).sum() / (stamps[one] | stamps[two]).sum()
        assert overlap < 0.75, (one, two, overlap)


def test_the_figure_stays_in_the_frame_and_has_its_colour():
    for at, name in enumerate(CLASSES):
        colour = COLOURS[at % len(COLOURS)]
        frames = footage.clip(name, seed=at, colour=colour).frames.astype(float) / 255
        brightest = frames[0].max(-1) > 0.5
        assert brightest.sum() > 50
        assert brightest[[0, -1]].sum() + brightest[:, [0, -1]].sum() < 15  # a tip may touch the edge
        assert np.abs(np.median(frames[0][brightest], 0) - pictures.RGB[colour]).max() < 0.15


def test_the_figure_moves():
    moved = [
        np.abs(np.diff(footage.clip("clock", seed=seed).frames[[0, -1]].astype(int), axis=0)).mean()
        for seed in range(5)
    ]
    assert max(moved) > 5


def test_sounds_are_told_apart_by_their_mean_spectra():
    """Nearest class mean of mel means and deviations, from 4 clips a class, is mostly right on 4 others."""
    waves = [sounds.play(name, rng=np.random.default_rng([at, k])) for at, name in enumerate(CLASSES) for k in range(8)]
    mel = np.concatenate([footage.mel(waves[start : start + 48]) for start in (0, 48)])
    features = np.concatenate([mel.mean(2), mel.std(2)], 1).reshape(len(CLASSES), 8, -1)
    means = features[:, :4].mean(1)
    distance = ((features[:, 4:, None] - means) ** 2).sum(-1)
    assert (distance.argmin(-1) == np.arange(len(CLASSES))[:, None]).mean() >= 0.8


def test_mp4_keeps_a_clip_whole():
    clip = footage.clip("guitar", seed=0)
    back = footage.through_mp4(clip)
    assert back.frames.shape == clip.frames.shape
    assert np.allclose(back.times, clip.times)
    assert len(back.waveform) == len(clip.waveform)
    assert np.abs(back.frames.astype(int) - clip.frames).mean() < 6
    assert np.corrcoef(back.waveform, clip.waveform)[0, 1] > 0.95


def test_other_pictures_sounds_colours_and_nothing():
    dog = footage.clip("dog", seed=0)
    mixed = footage.clip("dog", seed=0, sound="siren", colour="white")
    assert mixed.sound_hash == footage.clip("siren", seed=0).sound_hash
    assert mixed.picture_hash != dog.picture_hash
    assert not footage.clip("dog", picture="blank").frames.any()
    mute = footage.clip("dog", sound="mute")
    assert not mute.waveform.any()
    assert mute.picture_hash == dog.picture_hash


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "dgo"}, "unknown class 'dgo'. Did you mean 'dog'?"),
        ({"name": "dog", "picture": "bel"}, "unknown class 'bel'. Did you mean 'bell'?"),
        ({"name": "dog", "colour": "gren"}, "unknown colour 'gren'. Did you mean 'green'?"),
        ({"name": "dog", "seed": -1}, "a seed is a whole number from 0; found -1."),
    ],
)
def test_what_is_not_in_the_world_is_refused(options, text):
    with pytest.raises(InputError) as error:
        footage.clip(**options)
    assert text in str(error.value)


def test_filming_resumes_and_views_agree_with_the_clips(tmp_path):
    told = []
    footage.film_all(tmp_path, per_class={"check": 1}, workers=1, progress=lambda *at: told.append(at))
    assert told[-1] == ("filming the world", 12, 12)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "check_dog_1.npz").unlink()
    footage.film_all(tmp_path, per_class={"check": 1}, workers=1)
    for path, time in written.items():
        assert (path.stat().st_mtime_ns == time) == (path.name != "check_dog_1.npz")
    views, hashes = footage.views_of(tmp_path, "check", n=1)
    clip = footage.through_mp4(footage.example("check", "dog", 0))
    assert views.frames.shape == (12, 8, 84, 84, 3)
    assert np.array_equal(views.frames[0].numpy(), clip.frames[::2])
    assert hashes[0] == [clip.picture_hash, clip.sound_hash]
    assert COLOURS[int(views.colour[0])] == footage.colour_of("check", "dog", 0)


def test_nothing_is_black_dim_or_scrambled_and_silent_or_faint(tmp_path):
    footage.film_all(tmp_path, per_class={"check": 1}, workers=1)
    views, _ = footage.views_of(tmp_path, "check", n=1)
    empty = nothing(views, every=2, seed=0)
    assert len(empty.picture) == 6
    assert (empty.picture == len(CLASSES)).all()
    black, dim, scrambled = empty.frames[0], empty.frames[1], empty.frames[2]
    assert not black.any()
    assert dim.flatten(0, 2).unique(dim=0).shape[0] == 1
    assert torch.equal(scrambled.flatten().sort()[0], views.frames[4].flatten().sort()[0])
    assert not torch.equal(scrambled, views.frames[4])
    assert empty.mel[0].std() == 0
    assert empty.mel[1].max() < views.mel.amax((1, 2)).min()
