"""`conflicts`: a file with one conflict per line, checked as a whole before anything runs.

Each line is a json object: `sound` and `picture` (paths relative to the manifest), `question`, `answers` (the sound's,
then the picture's; words or lists of synonyms), and optionally `id`, `start` and `end` (seconds, for both files),
`prefix`, `see`, `control`. Blank lines are skipped. Every line is validated, the files' headers too, and *all* faults
come in one error with their line numbers.

Not done: answers are compared as words here; whether they are one token shows only with a model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from av_lens.errors import ManifestError, MediaError, unknown
from av_lens.inputs.conflict import CONTROL, SEE, Conflict, answers_fault
from av_lens.media.files import ClipFile

KEYS = ("id", "sound", "picture", "question", "answers", "start", "end", "prefix", "see", "control")
_REQUIRED = ("sound", "picture", "question", "answers")
_TEXTS = ("id", "sound", "picture", "question", "prefix", "see", "control")
_MOST_SHOWN = 50


def conflicts(path: str | os.PathLike[str]) -> list[Conflict]:
    """Read a manifest of conflicts.

    Args:
        path: a jsonl file.

    Returns:
        One conflict per line, its clips not yet decoded.

    Raises:
        ManifestError: listing every fault of every line.
    """
    manifest = Path(path)
    try:
        lines = manifest.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"cannot read the manifest {manifest}: {error}") from error
    probes: dict[ClipFile, tuple[str, ...]] = {}
    found: list[Conflict] = []
    faults: list[str] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row, wrong = _parsed(line)
        if not wrong:
            wrong = [*_fields(row), *_repeated(row, number, first_line)]
        if not wrong:
            clips = {name: _clip_file(manifest, row, name) for name in ("sound", "picture")}
            wrong = [fault for name, clip in clips.items() for fault in _probed(name, clip, probes)]
            if clips["sound"] == clips["picture"]:
                wrong.append("sound and picture are the same file and window, so there is no conflict")
            if not wrong:
                found.append(_conflict(row, clips, number))
        faults += [f"line {number}: {fault}" for fault in wrong]
    if faults:
        shown = faults[:_MOST_SHOWN] + (
            [f"... and {len(faults) - _MOST_SHOWN} more"] if len(faults) > _MOST_SHOWN else []
        )
        many = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise ManifestError(f"{manifest} has {many}; nothing was run:\n  " + "\n  ".join(shown))
    if not found:
        raise ManifestError(
            f'{manifest} holds no conflict: one json object per line, {{"sound": ..., "picture": ..., ...}}'
        )
    return found


def _parsed(line: str) -> tuple[dict[str, Any], list[str]]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, [f"not json: {error.msg} at column {error.colno}"]
    if not isinstance(row, dict):
        return {}, [f"a line is a json object, found {type(row).__name__}"]
    return cast(dict[str, Any], row), []


def _fields(row: dict[str, Any]) -> Iterable[str]:
    for key in row:
        if key not in KEYS:
            yield unknown("key", key, KEYS)
    for key in _REQUIRED:
        if key not in row:
            yield f"{key!r} is missing"
    for key in _TEXTS:
        if key in row and not isinstance(row[key], str):
            yield f"{key!r} is a text, found {json.dumps(row[key])}"
        elif key in row and not row[key].strip() and key != "prefix":
            yield f"{key!r} is empty"
    if "answers" in row:
        yield from _answers(row["answers"])
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
    fault = answers_fault(cast(list[Any], answers))
    if fault:
        yield fault


def _window(row: dict[str, Any]) -> Iterable[str]:
    seconds: dict[str, float] = {}
    for key in ("start", "end"):
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            yield f"{key!r} is a number of seconds from 0, found {json.dumps(value)}"
        else:
            seconds[key] = float(value)
    if len(seconds) == 2 and seconds["end"] <= seconds["start"]:
        yield f"'end' ({seconds['end']:g} s) must lie after 'start' ({seconds['start']:g} s)"


def _repeated(row: dict[str, Any], number: int, first_line: dict[str, int]) -> Iterable[str]:
    name = row.get("id")
    if isinstance(name, str):
        if name in first_line:
            yield f"the id {name!r} stands on line {first_line[name]} already"
        first_line.setdefault(name, number)


def _clip_file(manifest: Path, row: dict[str, Any], name: str) -> ClipFile:
    end = row.get("end")
    path = os.path.normpath(manifest.parent / row[name])
    return ClipFile(path, start=float(row.get("start") or 0.0), end=None if end is None else float(end))


def _probed(name: str, clip: ClipFile, probes: dict[ClipFile, tuple[str, ...]]) -> list[str]:
    if clip not in probes:
        try:
            facts = clip.probe()
        except MediaError as error:
            probes[clip] = (str(error),)
        else:
            missing = [
                what for what, there in (("audio stream", facts.has_sound), ("picture", facts.has_picture)) if not there
            ]
            probes[clip] = tuple(f"{clip.path} has no {what}" for what in missing)
    return [f"{name}: {fault}" for fault in probes[clip]]


def _conflict(row: dict[str, Any], clips: dict[str, ClipFile], number: int) -> Conflict:
    answers = [answer if isinstance(answer, str) else tuple(answer) for answer in row["answers"]]
    return Conflict(
        sound=clips["sound"],
        picture=clips["picture"],
        question=row["question"],
        answers=(answers[0], answers[1]),
        prefix=row.get("prefix", ""),
        see=row.get("see", SEE),
        control=row.get("control", CONTROL),
        id=row.get("id", f"line {number}"),
    )
