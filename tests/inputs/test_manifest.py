"""A manifest is checked as a whole: every fault of every line in one error, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from av_lens.errors import InputError, ManifestError
from av_lens.inputs import Conflict, Encoder, conflicts
from av_lens.media import Clip, ClipFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from noise import noise_clip

    home = tmp_path_factory.mktemp("manifest")
    (home / "clips").mkdir()
    for seed, name in enumerate(("dog", "siren")):
        noise_clip(1.0, seed=seed).save(home / "clips" / f"{name}.mp4")
    noise_clip(1.0, sound=False).save(home / "silent.mp4")
    Clip.from_arrays(waveform=np.zeros(16000, np.float32)).save(home / "dark.wav")
    (home / "empty.mp4").write_bytes(b"")
    (home / "text.mp4").write_text("no medium at all")
    return home


GOOD: dict[str, Any] = {
    "sound": "clips/siren.mp4",
    "picture": "clips/dog.mp4",
    "question": "What do you hear?",
    "answers": ["siren", "dog"],
}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_good_manifest(folder: Path, encoder: Encoder):
    more = {"id": "two", "answers": [["siren", "alarm"], ["dog", "hound"]], "start": 0.2, "end": 0.9, "prefix": "a"}
    more |= {"see": "What is shown?", "control": "Which day is it?"}
    first, second = conflicts(write(folder, GOOD, "", GOOD | more))
    assert (first.id, first.question, first.answers) == ("line 1", "What do you hear?", ("siren", "dog"))
    assert (first.see, first.control, first.prefix) == ("What do you see?", "What colour is it?", "")
    assert first.sound.path == str(folder / "clips" / "siren.mp4")
    assert (second.id, second.see, second.control, second.prefix) == ("two", "What is shown?", "Which day is it?", "a")
    assert second.answers == (("siren", "alarm"), ("dog", "hound"))
    assert (second.picture.start, second.picture.end) == (0.2, 0.9)
    x = second.cells(encoder)["va"]
    assert x.provenance["conflict"] == "two"
    assert x.clips[0].duration == pytest.approx(0.7, abs=0.02)


def test_every_fault_of_every_line_at_once(folder: Path):
    path = write(
        folder,
        GOOD | {"id": "one", "qestion": "?"},
        GOOD | {"id": "one", "answers": ["dog", " DOG"], "start": 2, "end": 1},
        {"picture": "clips/dog.mp4", "question": "", "answers": "dog"},
        "{oops",
        "[1, 2]",
        GOOD,
        GOOD | {"sound": "silent.mp4", "picture": "dark.wav"},
        GOOD | {"sound": "nowhere.mp4", "picture": "empty.mp4"},
        GOOD | {"sound": "text.mp4", "start": True},
        GOOD | {"sound": "text.mp4", "end": -1},
        GOOD | {"sound": "clips/dog.mp4"},
        GOOD | {"start": 30},
        GOOD | {"answers": ["dog", "cat", "cow"]},
        GOOD | {"answers": [["dog", 3], "cat"]},
        GOOD | {"prefix": 3},
    )
    with pytest.raises(ManifestError) as caught:
        conflicts(path)
    text = str(caught.value)
    assert text.startswith(f"{path} has ")
    assert "nothing was run" in text
    for fault in (
        "line 1: unknown key 'qestion'. Did you mean 'question'? Known: id, sound, picture",
        "line 2: equal answers: both sides hold 'dog'",
        "line 2: 'end' (1 s) must lie after 'start' (2 s)",
        "line 2: the id 'one' stands on line 1 already",
        "line 3: 'sound' is missing",
        "line 3: 'question' is empty",
        "line 3: 'answers' is a list of two, the sound's and the picture's; found \"dog\"",
        "line 4: not json: Expecting property name",
        "line 5: a line is a json object, found list",
        "line 7: sound: " + str(folder / "silent.mp4") + " has no audio stream",
        "line 7: picture: " + str(folder / "dark.wav") + " has no picture",
        "line 8: sound: no media file at " + str(folder / "nowhere.mp4"),
        "line 8: picture: ",
        "line 9: 'start' is a number of seconds from 0, found true",
        "line 10: 'end' is a number of seconds from 0, found -1",
        "line 11: sound and picture are the same file and window",
        "line 12: sound: start=30 s is past the end of",
        "line 13: answers are two, the sound's and the picture's; found 3",
        "line 14: an answer is a word or a list of synonyms",
        "line 15: 'prefix' is a text, found 3",
    ):
        assert fault in text, f"{fault!r} is not in:\n{text}"
    assert "line 6:" not in text


def test_a_file_that_is_no_medium(folder: Path):
    with pytest.raises(ManifestError, match=r"line 1: sound: .*text\.mp4"):
        conflicts(write(folder, GOOD | {"sound": "text.mp4"}))


def test_no_manifest_and_an_empty_one(folder: Path):
    with pytest.raises(ManifestError, match=r"cannot read the manifest .*gone.jsonl: there is no such file. Check"):
        conflicts(folder / "gone.jsonl")
    write(folder, GOOD)
    with pytest.raises(ManifestError, match=r"no such file. Did you mean '.*/pairs.jsonl'\?"):
        conflicts(folder / "pair.jsonl")
    with pytest.raises(ManifestError, match=r"no such file. The folder '.*/nowhere' does not exist either"):
        conflicts(folder / "nowhere" / "pairs.jsonl")
    with pytest.raises(ManifestError, match="holds no conflict: one json object per line"):
        conflicts(write(folder, "", ""))


def test_many_faults_are_counted(folder: Path):
    with pytest.raises(ManifestError, match=r"has 80 faults; .*(?s:.*)\.\.\. and 30 more"):
        conflicts(write(folder, *["{"] * 80))


# Every character that some reader of lines takes for a line's end and json does not, and a pair of surrogates.
NO_LINE_ENDS = "\u2028\u2029\x85\U0001f600"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_with_a_line_feed_and_nothing_else(folder: Path, end: str, mark: str):
    rows = [GOOD | {"question": f"What{NO_LINE_ENDS}?", "id": NO_LINE_ENDS}, GOOD]
    path = folder / "ends.jsonl"
    text = end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes((mark + text + end).encode())
    first, second = conflicts(path)
    assert (first.id, first.question, second.id) == (NO_LINE_ENDS, f"What{NO_LINE_ENDS}?", "line 2")
    path.write_bytes((mark + text + end + "{oops").encode())
    with pytest.raises(ManifestError, match=r"has 1 fault; nothing was run:\n  line 3: not json"):
        conflicts(path)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"question": "a", "question": "b"}', "not json: the key 'question' stands there twice"),
        ('{"start": NaN}', "not json: NaN is no finite number"),
        ('{"end": 1e999}', "not json: 1e999 is no finite number"),
        ('{"id": "\\ud800"}', r"not json: half of a character (\ud800, a lone surrogate), which no text file can hold"),
        ('{"answers": ["dog", "\\udc00x"]}', r"not json: half of a character (\udc00"),
        ('{"id": ' + "[" * 100_000, "not json: it is nested too deeply"),
        ('{"start": ' + "9" * 5000 + "}", "not json: Exceeds the limit"),
        ("{}\r{}", "not json: Extra data at column 4"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_almost_json_is_refused_with_its_line(folder: Path, line: str, fault: str):
    with pytest.raises(ManifestError) as caught:
        conflicts(write(folder, GOOD, line))
    assert f"line 2: {fault}" in str(caught.value)


def test_a_file_that_is_no_text_is_named(folder: Path):
    path = folder / "wide.jsonl"
    path.write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(ManifestError, match=r"cannot read the manifest .*wide.jsonl: .* It is a text file in UTF-8"):
        conflicts(path)


def test_a_name_that_a_line_without_one_gets_is_taken_once(folder: Path):
    with pytest.raises(ManifestError, match="line 2: the id 'line 2' stands on line 1 already"):
        conflicts(write(folder, GOOD | {"id": "line 2"}, GOOD))


def test_a_lines_files_are_looked_at_whatever_else_is_wrong_with_it(folder: Path):
    with pytest.raises(ManifestError) as caught:
        conflicts(write(folder, GOOD | {"sound": "nowhere.mp4", "qestion": "?", "answers": ["dog"]}))
    assert "has 3 faults" in str(caught.value)
    assert "line 1: sound: no media file at" in str(caught.value)
    with pytest.raises(ManifestError) as caught:
        conflicts(write(folder, GOOD | {"sound": "nowhere.mp4", "start": True}))
    assert "has 2 faults" in str(caught.value)
    assert "line 1: sound: no media file at" in str(caught.value)


def test_half_a_character_is_refused_in_a_conflict_made_by_hand(folder: Path):
    clips = {name: ClipFile(str(folder / "clips" / f"{name}.mp4")) for name in ("siren", "dog")}
    made = {"sound": clips["siren"], "picture": clips["dog"], "question": "?", "answers": ("siren", "dog")}
    for part in ({"id": "\ud800"}, {"question": "a\udfff"}, {"answers": (("siren", "\ud801"), ("dog", "cat"))}):
        with pytest.raises(InputError, match="its texts hold half of a character"):
            Conflict(**made | part)
