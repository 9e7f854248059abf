"""How often a model names the sound, the picture, or neither, in every cell of the evaluation.

A cell says what the model is given: `factual` (a thing and its sound), `conflict` (a thing and another one's sound),
`blank_picture`, `mute_sound`, `audio_only`, `video_only`. Each clip is asked to hear, to see and for the colour, its
phrasing taken in turn. The answer is the most likely token of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """Say what is on the clips of a cell.

    Args:
        cell: the cell.
        clips: the held-out clips.

    Returns:
        Classes and colours.
    """
    none = torch.full_like(clips.views.picture, -1)
    sounds = {"own": clips.views.sound, "partner": clips.views.sound[clips.partner]}
    seen = cell.picture == "own"
    return Truth(
        picture=clips.views.picture if seen else none,
        sound=sounds.get(cell.sound, none),
        colour=clips.views.colour if seen else none,
    )


def ask(cell: Cell, layout: str, clips: HeldOut, media: Media, kinds: tuple[str, ...] = KINDS) -> Asked:
    """Put questions to the clips of a cell.

    Args:
        cell: the cell.
        layout: one of the cell's.
        clips: the held-out clips.
        media: what the model's towers put out for them.
        kinds: kinds of questions; every clip is asked each.

    Returns:
        Clips and questions.
    """
    n = len(clips.partner)
    pictures = {"own": media.video, "blank": media.blank.expand(n, -1, -1)}
    sounds = {"own": media.audio, "partner": media.audio[clips.partner], "mute": media.mute[torch.arange(n) % 2]}
    asked = [[grammar.QUESTIONS[kind][at % len(grammar.QUESTIONS[kind])] for kind in kinds] for at in range(n)]
    return Asked(layout, asked, pictures.get(cell.picture), sounds.get(cell.sound))


def _vocabulary() -> tuple[Tensor, Tensor, int]:
    """Answer tokens of classes, of colours, and of nothing."""
    colours = torch.tensor([layouts.answer_ids(name)[0] for name in grammar.COLOURS])
    return layouts.class_ids(), colours, layouts.answer_ids(grammar.NOTHING)[0]


def tally(answers: Int64[Tensor, " clip"], kind: str, what: Truth) -> dict[str, int]:
    """Count what answers name.

    Args:
        answers: token ids.
        kind: what was asked.
        what: what is on the clips.

    Returns:
        Counts by `COUNTED`; where sound and picture agree, an answer counts for both.
    """
    classes, colours, nothing = _vocabulary()

    def named(tokens: Tensor, target: Tensor) -> Tensor:
        return (target >= 0) & (answers == tokens[target.clamp(min=0)])

    sound, picture = named(classes, what.sound), named(classes, what.picture)
    colour, none = named(colours, what.colour), answers == nothing
    hit, present = {
        "hear": (sound, what.sound),
        "see": (picture, what.picture),
        "colour": (colour, what.colour),
    }[kind]
    counts = {
        "sound": sound,
        "picture": picture,
        "colour": colour,
        "nothing": none,
        "other": ~(sound | picture | colour | none),
        "right": torch.where(present >= 0, hit, none),
    }
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
    """Count a model's answers in every cell.

    Args:
        model: from `answering.plain`.
        clips: the held-out clips.
        media: what the model's towers put out for them.
        cells: names of cells.
        kinds: kinds of questions.
        silenced: heads that are zeroed at the positions after the media.
        cut: roles between which attention is cut in all layers.

    Returns:
        One row for each cell, layout and kind: `cell layout kind n` and the counts.
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
    """Read the two slots of a caption: "i see a (...) and hear a (...)".

    Args:
        model: from `answering.plain`.
        clips: the held-out clips.
        media: what the model's towers put out for them.

    Returns:
        Rows as `behave` gives them, kinds "caption_see" and "caption_hear"; the words between are given.
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
            asked = Asked(layout, asked.questions, asked.video, asked.audio, begun)
            answers = logits(model, asked, slots=(-len(begun[0][0]) + 2, -1))[:, 0].argmax(-1)
            for slot, kind in enumerate(("see", "hear")):
                found = tally(answers[:, slot], kind, what)
                rows.append({"cell": name, "layout": layout, "kind": f"caption_{kind}", "n": len(answers)} | found)
    return pd.DataFrame(rows)


def shares(counts: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Turn counts into shares with exact (Clopper-Pearson) intervals.

    Args:
        counts: from `behave` or `captions`.
        level: of the intervals.

    Returns:
        One row for each cell, layout, kind and answer: `cell layout kind answer count n share low high`.
    """
    rows: list[dict[str, Any]] = []
    for row in counts.to_dict("records"):
        for name in COUNTED:
            low, high = clopper_pearson(int(row[name]), int(row["n"]), level=level)
            place = {key: row[key] for key in ("cell", "layout", "kind")}
            rows.append(
                place
                | {"answer": name, "count": row[name], "n": row["n"], "share": row[name] / row["n"]}
                | {"low": low, "high": high}
            )
    return pd.DataFrame(rows)
