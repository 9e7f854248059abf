"""Conflicts as the plain implementation takes them: tensors and positions, nothing of the package but the encoding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plain_protocol import PlainCase

import av_lens
from av_lens.lab.calibration import stage

ROLES = {
    "suffix": ("question", "header", "generation"),
    "generation": ("generation",),
    "audio": ("audio",),
    "video": ("video", "image"),
}
QUESTIONS = ("hear", "see", "control")


MIRRORED = {"audio_only_v": "audio_only", "video_only_a": "video_only"}
"""Cells that are another's with sound and picture exchanged."""


class Tensors(Mapping[str, dict[str, Any]]):
    """The cells of a conflict under a question, those of `MIRRORED` among them; encoded when they are asked for."""

    def __init__(self, model: Any, conflict: Any, question: str) -> None:
        exchanged = replace(conflict, sound=conflict.picture, picture=conflict.sound, answers=conflict.answers[::-1])
        self.of, self.mirror = (one.cells(model, question=question) for one in (conflict, exchanged))

    def __iter__(self) -> Iterator[str]:
        return iter((*self.of, *MIRRORED))

    def __len__(self) -> int:
        return len(self.of) + len(MIRRORED)

    def __contains__(self, cell: object) -> bool:
        return cell in set(self)

    def inputs(self, cell: str) -> Any:
        """The encoded cell."""
        return self.mirror[MIRRORED[cell]] if cell in MIRRORED else self.of[cell]

    def __getitem__(self, cell: str) -> dict[str, Any]:
        return self.inputs(cell).tensors


def checkpoint(name: str) -> str:
    """The folder of a shipped organism."""
    return str(Path(av_lens.__file__).parent / "organism" / "checkpoints" / name)


def staged(folder: Path, *, conflicts: int, seed: int) -> list[Any]:
    """Conflicts of the synthetic world, from files and a manifest."""
    return list(av_lens.conflicts(stage(folder, conflicts=conflicts, seed=seed)))


def case(model: Any, conflict: Any) -> PlainCase:
    """One conflict, each of its cells encoded when it is asked for."""
    asked = {"hear": conflict.question, "see": conflict.see, "control": conflict.control}
    cells = {name: Tensors(model, conflict, question) for name, question in asked.items()}
    words = tuple(word if isinstance(word, str) else word.text for word in conflict.answers)
    return PlainCase(conflict.id, words, cells, {name: _sites(of.of["va"]) for name, of in cells.items()})


def _sites(x: Any) -> dict[str, list[int]]:
    roles = list(x.spans.roles)
    return {site: [i for i, role in enumerate(roles) if role in names] for site, names in ROLES.items()}


def tokens(model: Any, conflicts: Sequence[Any]) -> dict[str, list[tuple[int]]]:
    """The one token of every answer: with the leading space that it has in a sentence, else without."""
    found: dict[str, list[tuple[int]]] = {}
    for word in {word for conflict in conflicts for word in conflict.answers}:
        tried = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)]
        found[word] = [next((ids[0],) for ids in tried if len(ids) == 1)]
    return found


def dealt(conflicts: Sequence[Any], *, seed: int) -> dict[str, str]:
    """Deal conflicts that share no clip: by hash, to the half with fewer of its answer, then with fewer."""
    halves: dict[str, list[str]] = {"discovery": [], "confirmation": []}
    found: dict[str, str] = {}
    for conflict in sorted(conflicts, key=lambda c: _hash(f"{seed}:{c.id}")):
        word = conflict.answers[0]
        name = min(halves, key=lambda half: (halves[half].count(word), len(halves[half])))
        halves[name].append(word)
        found[conflict.id] = name
    return found


def with_thirds(conflicts: Sequence[Any], halves: dict[str, str], *, seed: int) -> list[Any]:
    """Give each conflict its third clip: the sound's source of that conflict of its half with the smallest hash."""
    out: list[Any] = []
    for conflict in conflicts:
        others = [
            other
            for other in conflicts
            if halves[other.id] == halves[conflict.id] and other.answers[0] not in conflict.answers
        ]
        drawn = min(others, key=lambda other: _hash(f"{seed}:{conflict.id}:w:{other.id}"))
        out.append(replace(conflict, third=drawn.sound))
    return out


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
