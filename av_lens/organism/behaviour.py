"""How often a model names the sound, the picture, or neither, in every cell of the evaluation.

A cell says what the model is given: `factual` (a thing and its sound), `conflict` (a thing and another one's sound),
`blank_picture`, `mute_sound`, `audio_only`, `video_only`. Each clip is asked to hear, to see and for the colour, its
phrasing taken in turn. The answer is the most likely token of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int64
from torch import Tensor

from av_lens.organism import grammar, layouts
from av_lens.organism.answering import Asked, Head, logits
from av_lens.organism.held_out import HeldOut, Media
from av_lens.results.statistics import clopper_pearson

BOTH = ("separate", "in_video")
KINDS = ("hear", "see", "colour")
COUNTED = ("sound", "picture", "colour", "nothing", "other", "right")


@dataclass(frozen=True)
class Cell:
    """What a model is given.

    Attributes:
        layouts: where the media stand in the prompt.
        picture: "own", "blank" or "" for none.
        sound: "own", "partner", "mute" or "" for none.
    """

    layouts: tuple[str, ...]
    picture: str
    sound: str


CELLS: Mapping[str, Cell] = {
    "audio_only": Cell(("audio",), "", "own"),
    "video_only": Cell(("video",), "own", ""),
    "factual": Cell(BOTH, "own", "own"),
    "conflict": Cell(BOTH, "own", "partner"),
    "blank_picture": Cell(BOTH, "blank", "own"),
    "mute_sound": Cell(BOTH, "own", "mute"),
}


@dataclass(frozen=True, eq=False)
class Truth:
    """What is on each clip of a cell; -1 where there is nothing.

    Attributes:
        picture: class of the picture.
        sound: class of the sound.
        colour: colour of the picture.
    """

    picture: Int64[Tensor, " clip"]
    sound: Int64[Tensor, " clip"]
    colour: Int64[Tensor, " clip"]


def truth(cell: Cell, clips: HeldOut) -> Truth:
    """Say what is on the clips of a cell."""
    none = torch.full_like(clips.views.picture, -1)
    sounds = {"own": clips.views.sound, "partner": clips.views.sound[clips.partner]}
    seen = cell.picture == "own"
    return Truth(
        picture=clips.views.picture if seen else none,
        sound=sounds.get(cell.sound, none),
        colour=clips.views.colour if seen else none,
    )


def ask(cell: Cell, layout: str, clips: HeldOut, media: Media, kinds: tuple[str, ...] = KINDS) -> Asked:
    """Put questions to the clips of a cell in one of its layouts; every clip is asked each kind."""
    n = len(clips.partner)
    pictures = {"own": media.video, "blank": media.blank.expand(n, -1, -1)}
    sounds = {"own": media.audio, "partner": media.audio[clips.partner], "mute": media.mute[torch.arange(n) % 2]}
    asked = [[grammar.QUESTIONS[kind][at % len(grammar.QUESTIONS[kind])] for kind in kinds] for at in range(n)]
    return Asked(layout, asked, pictures.get(cell.picture), sounds.get(cell.sound))


def tally(answers: Int64[Tensor, " clip"], kind: str, what: Truth) -> dict[str, int]:
    """Count what answers name, by `COUNTED`; where sound and picture agree, an answer counts for both."""
    colours = torch.tensor([layouts.answer_ids(name)[0] for name in grammar.COLOURS])
    words = {"sound": layouts.class_ids(), "picture": layouts.class_ids(), "colour": colours}

    def named(name: str) -> Tensor:
        target = getattr(what, name)
        return (target >= 0) & (answers == words[name][target.clamp(min=0)])

    counts = {name: named(name) for name in words} | {"nothing": answers == layouts.answer_ids(grammar.NOTHING)[0]}
    counts["other"] = ~torch.stack([*counts.values()]).any(0)
    asked = {"hear": "sound", "see": "picture", "colour": "colour"}[kind]
    counts["right"] = torch.where(getattr(what, asked) >= 0, counts[asked], counts["nothing"])
    return {name: int(where.sum()) for name, where in counts.items()}


def behave(
    model: Any,
    clips: HeldOut,
    media: Media,
    *,
    cells: tuple[str, ...] = tuple(CELLS),
    kinds: tuple[str, ...] = KINDS,
    silenced: tuple[Head, ...] = (),
    cut: tuple[str, str] | None = None,
) -> pd.DataFrame:
    """Count a model's answers: one row for each cell, layout and kind, `cell layout kind n` and the counts.

    `silenced` heads are zeroed at the positions after the media; attention is `cut` between roles in all layers.
    """
    rows: list[dict[str, Any]] = []
    for name in cells:
        cell = CELLS[name]
        what = truth(cell, clips)
        for layout in cell.layouts:
            said = logits(model, ask(cell, layout, clips, media, kinds), silenced=silenced, cut=cut)
            answers = said[:, :, 0].argmax(-1)
            for at, kind in enumerate(kinds):
                found = tally(answers[:, at], kind, what)
                rows.append({"cell": name, "layout": layout, "kind": kind, "n": len(answers)} | found)
    return pd.DataFrame(rows)


def captions(model: Any, clips: HeldOut, media: Media) -> pd.DataFrame:
    """Read the two slots of a caption: "i see a (...) and hear a (...)"; the words between are given.

    Rows as `behave` gives them, of kinds "caption_see" and "caption_hear".
    """
    rows: list[dict[str, Any]] = []
    for name in ("factual", "conflict"):
        cell = CELLS[name]
        what = truth(cell, clips)
        begun = [
            [layouts.answer_ids(f"i see a {grammar.CLASSES[label]} and hear a")] for label in what.picture.tolist()
        ]
        for layout in cell.layouts:
            asked = ask(cell, layout, clips, media, ("caption",))
            answers = logits(model, replace(asked, begun=begun), slots=(-len(begun[0][0]) + 2, -1))[:, 0].argmax(-1)
            for slot, kind in enumerate(("see", "hear")):
                found = tally(answers[:, slot], kind, what)
                rows.append({"cell": name, "layout": layout, "kind": f"caption_{kind}", "n": len(answers)} | found)
    return pd.DataFrame(rows)


def shares(counts: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Turn counts into shares with exact (Clopper-Pearson) intervals, a row for each cell, layout, kind and answer."""
    rows: list[dict[str, Any]] = []
    for row in counts.to_dict("records"):
        for name in COUNTED:
            low, high = clopper_pearson(int(row[name]), int(row["n"]), level=level)
            place = {key: row[key] for key in ("cell", "layout", "kind")} | {"answer": name, "count": row[name]}
            rows.append(place | {"n": row["n"], "share": row[name] / row["n"], "low": low, "high": high})
    return pd.DataFrame(rows)
