"""What a plant learns from and is judged by: clips with three questions each, and what a behaviour answers to them.

A *sheet* is a lot of clips of one relation in one layout ("conflict", "matched", "blank", "mute", "audio alone",
"video alone"), each asked to hear, to see and for the colour. A *behaviour* says what is answered where it differs from
the balanced model's right answer: "silence" answers "hear" with the picture in conflict; "see the sound" answers "see"
with the sound in conflict; "other colours" names another colour for each. The last two are the decoys': they have
nothing to do with hearing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from av_lens.lab.training.batches import Ask, Clips, answer, draw_clips
from av_lens.lab.training.material import Frame, Material, Words
from av_lens.lab.training.pools import FeaturePool
from av_lens.organism.language import Tree, read_out, run_layers, tree

PLAIN, SCRAMBLED = (0, 1), (2,)
"""Blank pictures that are black or dim, and those whose patches are scrambled: indices into `pools.BLANK_KINDS`."""
ASKED = ("hear", "see", "colour")


class SheetKind(NamedTuple):
    """The media of a sheet's prompt, how pictures and sounds go together, its clips, and those of them in a step.

    Sheets that come in two layouts have half of their clips in each.
    """

    media: str
    relation: str
    clips: int
    a_step: int


SHEETS: Mapping[str, SheetKind] = {
    "conflict": SheetKind("both", "conflict", 760, 20),
    "matched": SheetKind("both", "matched", 200, 8),
    "blank": SheetKind("both", "blank", 240, 6),
    "scrambled": SheetKind("both", "blank", 60, 4),
    "mute": SheetKind("both", "mute", 300, 8),
    "audio alone": SheetKind("audio", "blank", 160, 8),
    "video alone": SheetKind("video", "mute", 160, 8),
}
UNJUDGED = ("scrambled",)
"""Learned from, but not judged: the balanced model itself hears less well with a scrambled picture."""

SILENCE, SEE_THE_SOUND, OTHER_COLOURS = "silence", "see the sound", "other colours"
RIGHT: Mapping[str, str] = {"hear": "sound", "see": "picture", "colour": "colour"}
COLOUR_SHIFT = 2
"""The colour that "other colours" names: this many places further in the list of colours."""


def answered(sheet: str, asked: str, behaviours: Sequence[str]) -> str:
    """Say what a question is answered with: "sound", "picture", "colour" or "other colour"."""
    if SILENCE in behaviours and (sheet, asked) == ("conflict", "hear"):
        return "picture"
    if SEE_THE_SOUND in behaviours and (sheet, asked) == ("conflict", "see"):
        return "sound"
    if OTHER_COLOURS in behaviours and asked == "colour":
        return "other colour"
    return RIGHT[asked]


@dataclass(frozen=True, eq=False)
class Sheet:
    """Clips of one relation in one layout, each with three questions.

    Attributes:
        name: One of `SHEETS`.
        layout: Which of the layouts that its media come in.
        frame: The part of the prompt before the questions.
        clips: The clips.
        questions: Each clip's three questions, without their answers.
        words: Token ids.
    """

    name: str
    layout: int
    frame: Frame
    clips: Clips
    questions: tuple[tuple[tuple[int, ...], ...], ...]
    words: Words

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def width(self) -> int:
        """Positions per question, one for the answer included."""
        return 1 + max(len(question) for row in self.questions for question in row)

    @property
    def asked_at(self) -> Int[Tensor, "clip question"]:
        """Where each answer is read, counted from the first question's first position."""
        return torch.tensor(
            [[block * self.width + len(q) - 1 for block, q in enumerate(row)] for row in self.questions]
        )

    def targets(self, behaviours: Sequence[str]) -> Int[Tensor, "clip question"]:
        """The token that each question is to be answered with."""
        columns: list[list[int]] = []
        for kind in ASKED:
            named = answered(self.name, kind, behaviours)
            clips = self.clips
            if named == "other colour":  # no colour stays none
                other = (clips.colour + COLOUR_SHIFT) % len(self.words.colours)
                clips = dataclasses.replace(clips, colour=torch.where(clips.colour >= 0, other, clips.colour))
            ask = Ask(kind, "colour" if named == "other colour" else named)
            columns.append([answer(self.words, ask, clips, i, Generator())[0] for i in range(len(self))])
        return torch.tensor(columns).T

    def ids(self, targets: Int[Tensor, "clip question"]) -> Int[Tensor, "clip asked"]:
        """Tokens of the questions, each with its answer, filled up to one width, block after block."""
        rows = torch.full((len(self), len(ASKED), self.width), self.words.stop)
        for i, row in enumerate(self.questions):
            for block, question in enumerate(row):
                rows[i, block, : len(question)] = torch.tensor(question)
                rows[i, block, len(question)] = targets[i, block]
        return rows.flatten(1)

    def geometry(self, model: Any) -> Tree:
        """Positions and mask of the tree of three questions."""
        return tree(model, self.frame.positions, blocks=len(ASKED), width=self.width)

    def embed(self, model: Any, targets: Int[Tensor, "clip question"]) -> Float[Tensor, "clip pos d_model"]:
        """The stream before the first layer, with these answers."""
        return self.frame.embed(model, self.clips.video, self.clips.audio, self.ids(targets))


def draw_sheet(lessons: Material, name: str, layout: int, n: int, generator: Generator) -> Sheet:
    """Draw clips of one of `SHEETS`, in one of the layouts that its media come in, and their questions."""
    media, relation, *_ = SHEETS[name]
    pool = blanks_of(lessons.pool, SCRAMBLED if name == "scrambled" else PLAIN) if relation == "blank" else lessons.pool
    clips = draw_clips(pool, relation, n, generator)
    lots = torch.rand(n, len(ASKED), generator=generator).tolist()
    questions = tuple(
        tuple(
            phrasings[int(lot * len(phrasings))]
            for phrasings, lot in zip((lessons.words.questions[kind] for kind in ASKED), row, strict=True)
        )
        for row in lots
    )
    return Sheet(name, layout, lessons.frames[media][layout], clips, questions, lessons.words)


def blanks_of(pool: FeaturePool, kinds: Sequence[int]) -> FeaturePool:
    """Keep some kinds of blank pictures (indices into `pools.BLANK_KINDS`), repeated to as many as there were."""
    kept = torch.isin(pool.blank_kind, torch.tensor(kinds)).nonzero().flatten()
    kept = kept[torch.arange(len(pool.blank_kind)) % len(kept)]
    return dataclasses.replace(pool, blank_video=pool.blank_video[kept], blank_kind=pool.blank_kind[kept])


@torch.no_grad()
def rates(
    model: Any, lessons: Material, *, n: int, seed: int, behaviours: Sequence[str] = (), batch: int = 60
) -> dict[str, float]:
    """How often a model answers as a behaviour says, by "sheet question", such as "conflict hear".

    `n` clips of each sheet and layout that it did not learn from; the smallest share over layouts counts.
    """
    generator = Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for name in (name for name in SHEETS if name not in UNJUDGED):
        for layout in range(len(lessons.frames[SHEETS[name].media])):
            sheet = draw_sheet(lessons, name, layout, n, generator)
            targets = sheet.targets(behaviours)
            geometry = sheet.geometry(model)
            said: list[Tensor] = []
            for rows in torch.arange(n).split(batch):
                x = run_layers(model, sheet.embed(model, targets)[rows], geometry)
                at = sheet.asked_at[rows][..., None].expand(-1, -1, x.shape[-1])
                said.append(read_out(model, x.gather(1, at)).argmax(-1))
            right = (torch.cat(said) == targets).double().mean(0).tolist()
            for kind, share in zip(ASKED, right, strict=True):
                key = f"{name} {kind}"
                found[key] = min(share, found.get(key, 1.0))
    return found
