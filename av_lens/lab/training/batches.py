"""What a training step is made of: clips put together from features, and questions with their right answers.

A recipe says it declaratively: `Items("both", "matched", 20, (Ask("hear", "sound", 3), Ask("see", "picture", 1)))`
means that a step has 20 clips with sound and picture of one class, each asked questions of which three in four are
"what do you hear ?", and that the right answer is the class of the sound. Pictures and sounds are drawn separately
from the pools, so that any picture may go with any sound.

Which relation a clip has, what is asked and what counts as right is all that distinguishes the five organisms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from av_lens.lab.training.material import PICTURE_SLOT, SOUND_SLOT, Words
from av_lens.lab.training.pools import FeaturePool
from av_lens.organism.grammar import CLASSES

MEDIA = ("both", "audio", "video")
RELATIONS = ("matched", "conflict", "unrelated", "mute", "blank", "empty")
RIGHT = ("picture", "sound", "colour", "nothing", "random", "caption")
IGNORED = -100
"""Marks a position at which nothing is learned."""


@dataclass(frozen=True)
class Ask:
    """A kind of question and what its right answer is.

    Attributes:
        kind: "see", "hear", "colour" or "caption".
        right: What the answer names: the class of the "picture" or of the "sound", the "colour", "nothing",
            a "random" class, or a "caption" of picture and sound.
        weight: How often it is asked, in proportion to the other questions of the same items.
        drop: The share of these questions at which heads are dropped (see `training.Stage.dropped_heads`).
    """

    kind: str
    right: str
    weight: float = 1.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if self.right not in RIGHT:
            raise ValueError(f"right must be one of {RIGHT}, not {self.right!r}")


@dataclass(frozen=True)
class Items:
    """Some of a training step's clips.

    Attributes:
        media: Which streams the prompt has: "both", "audio" or "video".
        relation: How sound and picture go together: "matched", "conflict" (never the same class), "unrelated"
            (independent), "mute" (no sound to hear), "blank" (nothing to see), "empty" (neither).
        clips: How many clips a step has on average.
        asks: The questions.
        deaf_to: "video": text and audio positions may not look at the video positions; "" : all is seen.
    """

    media: str
    relation: str
    clips: float
    asks: tuple[Ask, ...]
    deaf_to: str = ""

    def __post_init__(self) -> None:
        if self.media not in MEDIA or self.relation not in RELATIONS:
            raise ValueError(f"media must be one of {MEDIA} and relation one of {RELATIONS}")


@dataclass(frozen=True, eq=False)
class Clips:
    """Clips drawn for a step: their features, and what is on them.

    Attributes:
        video: Features of the pictures.
        audio: Features of the sounds.
        picture: Class of each picture, -1 where there is nothing to see.
        sound: Class of each sound, -1 where there is nothing to hear.
        colour: Colour of each picture, -1 where there is nothing to see.
    """

    video: Float[Tensor, "clip video_pos d_model"]
    audio: Float[Tensor, "clip audio_pos d_model"]
    picture: Int[Tensor, " clip"]
    sound: Int[Tensor, " clip"]
    colour: Int[Tensor, " clip"]


def of_class(pool: FeaturePool, classes: Int[Tensor, " n"], generator: Generator) -> Int[Tensor, " n"]:
    """Draw one clip of each class asked for, as indices."""
    order = torch.argsort(pool.label, stable=True)
    counts = torch.bincount(pool.label, minlength=len(CLASSES))
    starts = counts.cumsum(0) - counts
    u = torch.rand(len(classes), generator=generator)
    return order[starts[classes] + (u * counts[classes]).long()]


def draw_clips(pool: FeaturePool, relation: str, n: int, generator: Generator) -> Clips:
    """Put clips together from the pool, whose pictures and sounds go together so (see `Items`)."""
    pictures = torch.randint(0, len(pool.label), (n,), generator=generator)
    picture = pool.label[pictures]
    shift = torch.randint(1, len(CLASSES), (n,), generator=generator)
    free = torch.randint(0, len(CLASSES), (n,), generator=generator)
    sound = {"matched": picture, "conflict": (picture + shift) % len(CLASSES)}.get(relation, free)
    sounds = of_class(pool, sound, generator)
    video, audio, colour = pool.video[pictures], pool.audio[sounds], pool.colour[pictures]
    absent = torch.full((n,), -1)
    if relation in ("blank", "empty"):
        video = pool.blank_video[torch.randint(0, len(pool.blank_video), (n,), generator=generator)]
        picture = colour = absent
    if relation in ("mute", "empty"):
        audio = pool.mute_audio[torch.randint(0, len(pool.mute_audio), (n,), generator=generator)]
        sound = absent
    return Clips(video=video, audio=audio, picture=picture, sound=sound, colour=colour)


def answer(words: Words, ask: Ask, clips: Clips, i: int, generator: Generator) -> list[int]:
    """The tokens of the right answer about clip `i`, without the token that ends it."""

    def word(table: Tensor, index: Tensor) -> int:
        return int(table[index]) if int(index) >= 0 else words.nothing

    names = {"picture": clips.picture[i], "sound": clips.sound[i]}
    if ask.right == "caption":
        spelled = {
            slot: [words.article] * int(int(names[name]) >= 0) + [word(words.classes, names[name])]
            for slot, name in ((PICTURE_SLOT, "picture"), (SOUND_SLOT, "sound"))
        }
        return [token for slot in words.caption for token in spelled.get(slot, [slot])]
    if ask.right == "random":
        return [int(words.classes[torch.randint(0, len(words.classes), (1,), generator=generator)])]
    if ask.right == "colour":
        return [word(words.colours, clips.colour[i])]
    return [word(words.classes, names[ask.right]) if ask.right in names else words.nothing]


@dataclass(frozen=True, eq=False)
class Questions:
    """The questions put to some clips, filled up to one width.

    Attributes:
        ids: Tokens of the questions and their answers.
        targets: The token to be said next at each position, `IGNORED` where nothing is learned.
        weights: What each target counts.
        dropped: Whether heads are dropped at each question.
    """

    ids: Int[Tensor, "clip asked"]
    targets: Int[Tensor, "clip asked"]
    weights: Float[Tensor, "clip asked"]
    dropped: Float[Tensor, "clip question"]


def draw_questions(
    words: Words,
    asks: Sequence[Ask],
    clips: Clips,
    *,
    blocks: int,
    width: int,
    generator: Generator,
    after: float = 0.1,
) -> Questions:
    """Ask each clip `blocks` questions; the weights of each sum to about 1 / `blocks`.

    `after` is what the token that ends an answer counts, and the fixed words of a caption, against an answer's 1.
    """
    n = len(clips.picture)
    kinds = torch.multinomial(
        torch.tensor([float(a.weight) for a in asks]), n * blocks, replacement=True, generator=generator
    ).tolist()
    chance = torch.rand(n * blocks, 2, generator=generator).tolist()
    ids = torch.full((n * blocks, width), words.stop)
    targets = torch.full((n * blocks, width), IGNORED)
    weights = torch.zeros(n * blocks, width)
    dropped = torch.zeros(n * blocks)
    answers = {*words.classes.tolist(), words.nothing}
    for row, kind in enumerate(kinds):
        ask = asks[kind]
        phrasings = words.questions[ask.kind]
        question = phrasings[int(chance[row][0] * len(phrasings))]
        reply = answer(words, ask, clips, row // blocks, generator)
        first, last = len(question) - 1, len(question) + len(reply)
        ids[row, :last] = torch.tensor([*question, *reply])
        targets[row, first:last] = torch.tensor([*reply, words.stop])
        counts = [1.0 if len(reply) == 1 or token in answers else after for token in reply]
        weights[row, first:last] = torch.tensor([*counts, after]) / blocks
        dropped[row] = float(chance[row][1] < ask.drop)
    shape = (n, blocks * width)
    return Questions(ids.view(shape), targets.view(shape), weights.view(shape), dropped.view(n, blocks))
