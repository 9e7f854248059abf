"""A manifest of conflicts: a file with one conflict per line, checked as a whole before anything heavy is imported.

Each line is a json object: `sound` and `picture` (paths relative to the manifest), `question`, `answers` (the sound's,
then the picture's; words or lists of synonyms), and optionally `id`, `start` and `end` (seconds, for both files, or a
list of the sound's and the picture's), `prefix`, `see`, `control`, `describe`, `source` (what the sound's clip and the
picture's were cut from: two texts) and `references` (a text on each of the two). *All* faults, of the files' headers
too, come in one error with their line numbers. Which tokens answers are shows only with a model.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from av_lens.checks import near_file, parse_json
from av_lens.errors import ManifestError, MediaError, unknown
from av_lens.media.source import ClipFile

SEE, CONTROL, DESCRIBE = "What do you see?", "What colour is it?", "Describe this short clip."

_ASIDE = ("prefix", "see", "control", "describe")
_FILES = ("sound", "picture")
_REQUIRED = (*_FILES, "question", "answers")
_TEXTS = ("id", *_FILES, "question", *_ASIDE)
KEYS = ("id", *_REQUIRED, "start", "end", *_ASIDE, "source", "references")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of a manifest: what a `Conflict` is made of, under the same names."""

    sound: ClipFile  # the file whose sound is heard
    picture: ClipFile  # the file whose picture is seen
    question: str  # what is asked
    answers: tuple[str | tuple[str, ...], str | tuple[str, ...]]  # the sound's, then the picture's
    prefix: str  # text of the assistant before the asked position
    see: str  # the question about the picture
    control: str  # a question about neither
    describe: str  # what is asked where captions are written
    id: str  # its name
    references: tuple[str, str] | None = None  # a text on the sound's clip and one on the picture's, or None
    source: tuple[str, str] | None = None  # what the sound's and the picture's clips were cut from


def read_manifest(path: str | os.PathLike[str]) -> list[Entry]:
    """Read and check a manifest; nothing is decoded."""
    manifest = Path(path)
    try:
        lines = manifest.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise ManifestError(f"cannot read the manifest {manifest}: there is no such file. {near_file(path)}") from error
    except (OSError, ValueError) as error:
        raise ManifestError(f"cannot read the manifest {manifest}: {error}. It is a text file in UTF-8.") from error
    probes: dict[ClipFile, tuple[str, ...]] = {}
    found: list[Entry] = []
    faults: list[str] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, wrong = _parsed(line)
        if not wrong:
            wrong = [*_fields(row), *_repeated(row, number, first_line), *_files(manifest, row, probes)]
        if not wrong:
            found.append(_entry(manifest, row, number))
        faults += [f"line {number}: {fault}" for fault in wrong]
    if faults:
        more = [f"... and {len(faults) - 50} more"] if len(faults) > 50 else []
        many = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        told = "\n  ".join(faults[:50] + more)
        raise ManifestError(f"{manifest} has {many}; nothing was run:\n  {told}")
    if not found:
        form = '{"sound": ..., "picture": ..., ...}'
        raise ManifestError(f"{manifest} holds no conflict: one json object per line, {form}")
    return found


def _parsed(line: str) -> tuple[dict[str, Any], list[str]]:
    try:
        row: Any = parse_json(line)
    except ValueError as error:
        return {}, [f"not json: {error}"]
    named = type(row).__name__
    return (row, []) if isinstance(row, dict) else ({}, [f"a line is a json object, found {named}"])


def _fields(row: dict[str, Any]) -> Iterable[str]:
    yield from (unknown("key", key, KEYS) for key in row if key not in KEYS)
    yield from (f"{key!r} is missing" for key in _REQUIRED if key not in row)
    for key in _TEXTS:
        if key in row and not isinstance(row[key], str):
            yield f"{key!r} is a text, found {json.dumps(row[key])}"
        elif key in row and not row[key].strip() and key != "prefix":
            yield f"{key!r} is empty"
    if "answers" in row:
        yield from _answers(row["answers"])
    if "references" in row and not _two(row["references"], str):
        yield f"'references' are two texts, the sound's clip's and the picture's; found {json.dumps(row['references'])}"
    if "source" in row and (fault := source_fault(row["source"])):
        yield fault
    yield from _window(row)


def _answers(answers: Any) -> Iterable[str]:
    if not isinstance(answers, list):
        yield f"'answers' is a list of two, the sound's and the picture's; found {json.dumps(answers)}"
        return
    for answer in cast(list[Any], answers):
        words = cast(list[Any], answer) if isinstance(answer, list) else [answer]
        if not all(isinstance(word, str) for word in words):
            yield f"an answer is a word or a list of synonyms, found {json.dumps(answer)}"
            return
    if fault := answers_fault(cast(list[Any], answers)):
        yield fault


def _two(value: Any, kind: type) -> bool:
    return isinstance(value, list) and [isinstance(one, kind) for one in cast(list[Any], value)] == [True, True]


def _window(row: dict[str, Any]) -> Iterable[str]:
    faults: dict[str, None] = {}
    for place, _ in enumerate(_FILES):
        seconds: dict[str, float] = {}
        for key in ("start", "end"):
            if (value := _at(row, key, place)) is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                faults[f"{key!r} is a number of seconds from 0, found {json.dumps(value)}"] = None
            else:
                seconds[key] = float(value)
        if len(seconds) == 2 and seconds["end"] <= seconds["start"]:
            faults[f"'end' ({seconds['end']:g} s) must lie after 'start' ({seconds['start']:g} s)"] = None
    yield from faults


def _at(row: dict[str, Any], key: str, place: int) -> Any:
    """The sound's (0) or the picture's (1) second; one that is not in a list is both's."""
    value = row.get(key)
    several = isinstance(value, list) and len(cast(list[Any], value)) == len(_FILES)
    return cast(list[Any], value)[place] if several else value


def _repeated(row: dict[str, Any], number: int, first_line: dict[str, int]) -> Iterable[str]:
    name = row.get("id", f"line {number}")
    if isinstance(name, str):
        if name in first_line:
            yield f"the id {name!r} stands on line {first_line[name]} already"
        first_line.setdefault(name, number)


def answers_fault(answers: Sequence[str | int | Sequence[Any]]) -> str | None:
    """Say what is wrong with two rival answers as far as it shows without a model."""
    if len(answers) != 2:
        return f"answers are two, the sound's and the picture's; found {len(answers)}"
    synonyms = [[answer] if isinstance(answer, str | int) else list(answer) for answer in answers]
    words = [{str(word).strip().casefold() for word in group} for group in synonyms]
    if not all(words) or any("" in group for group in words):
        return "an answer is empty: give a word such as 'dog'"
    if words[0] & words[1]:
        return f"equal answers: both sides hold {min(words[0] & words[1])!r}, so there is no conflict to measure"
    if len(words[0]) != len(words[1]):
        return f"{len(words[0])} synonyms against {len(words[1])}: give both answers the same number"
    return None


def source_fault(found: Any) -> str | None:
    """Say what is wrong with the sources that a conflict names."""
    listed = cast(list[Any], found) if isinstance(found, list) else []
    if len(listed) == 2 and all(isinstance(one, str) and one.strip() for one in listed):
        return None
    return f"'source' is a list of two texts, the sound's and the picture's, found {json.dumps(found, default=repr)}"


def _files(manifest: Path, row: dict[str, Any], probes: dict[ClipFile, tuple[str, ...]]) -> Iterable[str]:
    """Look at the files that a line names, whatever else is wrong with it."""
    wrong = list(_window(row))
    if wrong:
        row = {key: value for key, value in row.items() if key not in ("start", "end")}
    named = [name for name in _FILES if isinstance(row.get(name), str) and row[name].strip()]
    clips = {name: _clip_file(manifest, row, name) for name in named}
    for name, clip in clips.items():
        yield from _probed(name, clip, probes)
    if len(clips) == 2 and not wrong and clips["sound"] == clips["picture"]:
        yield "sound and picture are the same file and window, so there is no conflict"


def _clip_file(manifest: Path, row: dict[str, Any], name: str) -> ClipFile:
    start, end = (_at(row, key, _FILES.index(name)) for key in ("start", "end"))
    path = os.path.normpath(manifest.parent / row[name])
    return ClipFile(path, start=float(start or 0.0), end=None if end is None else float(end))


def _probed(name: str, clip: ClipFile, probes: dict[ClipFile, tuple[str, ...]]) -> list[str]:
    if clip not in probes:
        try:
            facts = clip.probe()
            there = {"audio stream": facts.has_sound, "picture": facts.has_picture}
            probes[clip] = tuple(f"{clip.path} has no {what}" for what in there if not there[what])
        except MediaError as error:
            probes[clip] = (str(error),)
    return [f"{name}: {fault}" for fault in probes[clip]]


def _entry(manifest: Path, row: dict[str, Any], number: int) -> Entry:
    answers: Any = tuple(answer if isinstance(answer, str) else tuple(answer) for answer in row["answers"])
    texts: dict[str, Any] = {"prefix": "", "see": SEE, "control": CONTROL, "describe": DESCRIBE, "id": f"line {number}"}
    texts |= {name: text for name, text in row.items() if name in texts}
    sound, picture = (_clip_file(manifest, row, name) for name in _FILES)
    texts |= {name: tuple(row[name]) if name in row else None for name in ("source", "references")}
    return Entry(sound=sound, picture=picture, question=row["question"], answers=answers, **texts)
