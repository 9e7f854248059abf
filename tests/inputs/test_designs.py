"""From labelled clips to conflicts: labels, captions, the three designs, what is left out."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from small_av import small_clip
from typer.testing import CliRunner

import av_lens as avl
from av_lens.cli.main import app
from av_lens.errors import InputError
from av_lens.inputs.designs import design_conflicts
from av_lens.results.events import Lexicon

KINDS = ("dog_barking", "church_bells", "rain", "typing_on_typewriter")


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "one.mp4"
    small_clip(0).save(path)
    return path


@pytest.fixture
def folder(clip_file, tmp_path):
    """Clips of four kinds, of which the first has most."""
    for kind, n in zip(KINDS, (6, 4, 3, 2), strict=True):
        (tmp_path / "clips" / kind).mkdir(parents=True)
        for i in range(n):
            shutil.copy(clip_file, tmp_path / "clips" / kind / f"{i}.mp4")
    return tmp_path / "clips"


def used(made):
    return Counter(line["sound"] for line in made.lines) + Counter(line["picture"] for line in made.lines)


def test_disjoint_uses_each_clip_once_and_as_many_as_can_be(folder):
    made = design_conflicts(folder)
    assert len(made) == 7  # of 15 clips one is left over
    assert set(used(made).values()) == {1}
    assert [len(files) for files in made.left_out.values()] == [1]
    assert all(len(set(line["answers"])) == 2 for line in made.lines)
    assert {word for line in made.lines for word in line["answers"]} == {"dog", "bells", "rain", "typewriter"}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("bell", "Bell", "drum"), {"bell", "drum"}),
        (("bell", "bells", "drum"), {"bells", "drum"}),
        (("bell", "church_bells", "drum"), {"bells", "drum"}),
    ],
)
def test_a_label_that_all_clips_of_a_kind_have_is_the_answer(clip_file, tmp_path, labels, words):
    rows = []
    for i, label in enumerate(labels):
        shutil.copy(clip_file, tmp_path / f"{i}.mp4")
        rows.append({"file": f"{tmp_path}/{i}.mp4", "label": label})
    made = design_conflicts(rows)
    assert {word for line in made.lines for word in line["answers"]} == words


@pytest.mark.parametrize("design", ["permutation", "assignment"])
def test_an_exchange_uses_every_sound_and_every_picture(folder, design):
    made = design_conflicts(folder, design=design)
    assert len(made) == 15
    assert set(used(made).values()) == {2}
    assert all(line["answers"][0] != line["answers"][1] for line in made.lines)


def test_the_seed_draws(folder):
    lines = [design_conflicts(folder, seed=seed).lines for seed in (0, 0, 1)]
    assert lines[0] == lines[1] != lines[2]


def test_an_assignment_takes_the_least_alike_captions(clip_file, tmp_path):
    words = ["a dog by the sea", "a dog at home", "rain at home", "rain by the sea"]
    rows = []
    for i, caption in enumerate(words):
        shutil.copy(clip_file, tmp_path / f"{i}.mp4")
        rows.append({"file": f"{tmp_path}/{i}.mp4", "caption": caption, "label": caption.split()[i < 2]})
    made = design_conflicts(rows, design="assignment")
    joined = {(line["references"][0], line["references"][1]) for line in made.lines}
    assert joined == {(words[0], words[2]), (words[2], words[0]), (words[1], words[3]), (words[3], words[1])}


def test_a_manifest_says_all_of_it(clip_file, tmp_path):
    rows = [
        {"path": str(clip_file), "category": "dog", "start": 0, "end": 1.5, "video_id": "one"},
        {"path": str(clip_file), "category": "siren", "start": 0.5, "end": 2.0, "video_id": "two"},
    ]
    (tmp_path / "other").mkdir()
    shutil.copy(clip_file, tmp_path / "other" / "2.mp4")
    rows[1]["path"] = str(tmp_path / "other" / "2.mp4")
    made = design_conflicts(rows, prefix="")
    manifest = made.save(tmp_path / "pairs.jsonl")
    line = json.loads(manifest.read_text())
    assert sorted(line["answers"]) == ["dog", "siren"]
    (conflict,) = avl.conflicts(manifest)
    windows = {"dog": (0.0, 1.5), "siren": (0.5, 2.0)}
    for answer, clip in zip(conflict.answers, (conflict.sound, conflict.picture), strict=True):
        assert (clip.start, clip.end) == windows[answer]
    assert not any(part.startswith("/") for part in (line["sound"], line["picture"]))


def test_captions_name_one_sound_or_are_left_out(clip_file, tmp_path):
    captions = ["A dog barks", "A puppy is barking", "Rain falls", "A dog barks in the rain", "Something happens"]
    table = ["file\tcaption"]
    for i, caption in enumerate(captions):
        shutil.copy(clip_file, tmp_path / f"{i}.mp4")
        table.append(f"{i}.mp4\t{caption}")
    (tmp_path / "clips.tsv").write_text("\n".join(table))
    made = design_conflicts(tmp_path / "clips.tsv", design="permutation")
    left = {why: len(files) for why, files in made.left_out.items()}
    assert left["its caption names several sounds"] == 1
    assert left["its caption names no sound of the lexicon"] == 1
    assert len(made) == 2  # two dogs and one rain: one dog has no partner
    assert "names several sounds: 1 (3.mp4)" in str(made)


def test_clips_that_cannot_stand_in_a_conflict_are_counted(folder, clip_file, tmp_path):
    (folder / "rain" / "broken.mp4").write_bytes(b"no film")
    avl.Clip.from_arrays(waveform=np.zeros(32000, dtype=np.float32), rate=16000).save(folder / "rain" / "deaf.wav")
    small_clip(0, seconds=0.5).save(folder / "rain" / "short.mp4")
    left = {why: len(files) for why, files in design_conflicts(folder).left_out.items()}
    assert left["it cannot be read"] == left["it has no picture"] == left["it is shorter than 1 s"] == 1


def test_clips_of_one_source_are_never_joined(tmp_path):
    rows = []
    for i, (label, source) in enumerate([("dog", "a"), ("rain", "a"), ("dog", "b"), ("rain", "b")]):
        small_clip(i).save(tmp_path / f"{i}.mp4")
        rows.append({"file": str(tmp_path / f"{i}.mp4"), "label": label, "source": source})
    for design in ("disjoint", "permutation", "assignment"):
        made = design_conflicts(rows, design=design)
        assert len(made) == (2 if design == "disjoint" else 4)
        assert all(line["source"][0] != line["source"][1] for line in made.lines)


@pytest.mark.parametrize(
    ("clips", "said"),
    [
        ("nowhere", "no such file or folder"),
        ([{"label": "dog"}], "row 1 names no file"),
        ([{"file": "a.mp4"}], "neither label nor caption"),
        ([{"file": "a.mp4", "label": "dog", "start": "soon"}], "start is a number of seconds"),
        ([{"file": "a.mp4", "label": "dog"}], "0 usable clips of 0 kinds of sound"),
        ([{"video": {"path": None, "bytes": b""}, "label": "dog"}], "write them to files first"),
    ],
)
def test_what_is_refused(clips, said, tmp_path):
    with pytest.raises(InputError, match=said):
        design_conflicts(tmp_path / clips if isinstance(clips, str) else clips)


def test_the_command_writes_a_manifest(folder, tmp_path):
    made = CliRunner().invoke(app, ["pairs", str(folder), "--out", str(tmp_path / "out" / "pairs.jsonl")])
    assert made.exit_code == 0, made.output
    assert "7 conflicts over 4 kinds of sound" in made.output
    assert len(avl.conflicts(tmp_path / "out" / "pairs.jsonl")) == 7


def test_every_class_of_the_data_sets_is_an_event():
    lexicon = Lexicon.of_sounds()
    assert len(lexicon.classes) > 320
    assert {lexicon.event(name) for name, _ in lexicon.classes} <= set(lexicon.events)
    assert lexicon.event("playing violin, fiddle") == lexicon.event("violin") == "violin"
    assert lexicon.event("chicken crowing") == "rooster"
