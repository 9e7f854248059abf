"""The demo's conflicts: evenly dealt, never a clip used twice, files that come back as they were made."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from av_lens.errors import InputError
from av_lens.inputs import conflicts
from av_lens.lab.calibration import conflict_file, pairs, stage
from av_lens.media import load_clip
from av_lens.organism import footage


@pytest.mark.parametrize("n", [1, 12, 48, 60, 145])
def test_pairs_are_even_and_their_classes_differ(n):
    dealt = pairs(n, seed=3)
    assert len(dealt) == n
    assert all(heard != seen for heard, seen in dealt)
    for side in (0, 1):
        counts = Counter(pair[side] for pair in dealt)
        assert max(counts.values()) - min([counts.get(name, 0) for name in footage.classes()]) <= 1
    if n <= 132:
        assert max(Counter(dealt).values()) == 1
    assert all(len({pair[side] for pair in dealt[:12]}) == min(n, 12) for side in (0, 1))


def test_pairs_follow_the_seed():
    assert pairs(48, seed=0) == pairs(48, seed=0)
    assert pairs(48, seed=0) != pairs(48, seed=1)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    calls = []
    manifest = stage(folder, conflicts=3, seed=0, progress=lambda *call: calls.append(call))
    return folder, manifest, calls


def test_the_manifest_opens_and_every_clip_is_used_once(staged):
    folder, manifest, calls = staged
    listed = conflicts(manifest)
    assert [c.id for c in listed] == ["0000", "0001", "0002"]
    assert [(c.answers[0], c.answers[1]) for c in listed] == pairs(3, seed=0)
    hashes = {load_clip(path).picture_hash for path in folder.glob("*-[a-z]*.mp4") if "conflict" not in path.name}
    assert len(hashes) == 6
    assert calls[-1] == ("writing conflict clips", 3, 3)


def test_the_played_clip_has_the_pictures_picture_and_the_sounds_sound(staged):
    folder, manifest, _ = staged
    conflict = conflicts(manifest)[0]
    played = load_clip(folder / conflict_file("0000"))
    picture, sound = conflict.picture.load(), conflict.sound.load()
    assert played.frames.shape == picture.frames.shape
    assert np.abs(played.frames.astype(int) - picture.frames).mean() < 6
    n = min(len(played.waveform), len(sound.waveform))
    assert np.corrcoef(played.waveform[:n], sound.waveform[:n])[0, 1] > 0.95
    assert abs(np.corrcoef(played.waveform[:n], picture.waveform[:n])[0, 1]) < 0.5


def test_clips_come_from_a_part_of_the_world_that_trains_nothing(staged):
    _, manifest, _ = staged
    conflict = conflicts(manifest)[0]
    made = footage.example("discovery", str(conflict.answers[0]), 100_000)
    seen = conflict.sound.load()
    assert np.abs(seen.frames.astype(int) - made.frames).mean() < 6


def test_no_conflicts_are_refused(tmp_path):
    with pytest.raises(InputError, match="0 conflicts were asked for"):
        stage(tmp_path, conflicts=0, seed=0)
