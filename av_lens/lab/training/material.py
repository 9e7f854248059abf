"""What training needs beside a model: features to learn from, the tokens of questions and answers, and prompt layouts.

Everything comes from the processor's own prompts (`layouts`) and the one grammar; this module puts it into the form
that the stage engine reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from av_lens.lab.training.pools import FeaturePool
from av_lens.organism import anatomy, grammar, layouts

PICTURE_SLOT, SOUND_SLOT = -1, -2


@dataclass(frozen=True, eq=False)
class Words:
    """Token ids of questions and answers.

    Attributes:
        questions: For each kind, its phrasings: all tokens after the media, up to the answer.
        classes: One token for each class.
        colours: One token for each colour.
        nothing: The token of "nothing".
        stop: The token that ends an answer.
        caption: The tokens of a caption, with `PICTURE_SLOT` for the picture's words and `SOUND_SLOT` for the sound's.
        article: The token that goes before a class in a caption.
    """

    questions: Mapping[str, tuple[tuple[int, ...], ...]]
    classes: Int[Tensor, " n_classes"]
    colours: Int[Tensor, " n_colours"]
    nothing: int
    stop: int
    caption: tuple[int, ...]
    article: int


@dataclass(frozen=True, eq=False)
class Frame:
    """The part of a prompt that comes before the question, in one layout.

    Attributes:
        ids: Its tokens.
        positions: The model's own position ids.
        video: Where the picture's features go.
        audio: Where the sound's features go.
    """

    ids: Int[Tensor, " prefix"]
    positions: Int[Tensor, "3 prefix"]
    video: Int[Tensor, " video_pos"]
    audio: Int[Tensor, " audio_pos"]

    def embed(
        self,
        model: Any,
        video: Float[Tensor, "clip video_pos d_model"],
        audio: Float[Tensor, "clip audio_pos d_model"],
        questions: Int[Tensor, "clip asked"],
    ) -> Float[Tensor, "clip pos d_model"]:
        """Build the stream before the first layer, of clips with their questions; media that it lacks are not used."""
        table = model.model.language_model.embed_tokens.weight
        prefix = table[self.ids].expand(len(questions), -1, -1).clone()
        for at, features in ((self.video, video), (self.audio, audio)):
            if len(at):
                prefix[:, at] = features
        return torch.cat([prefix, table[questions]], dim=1)

    def blocked(self, deaf_to: str, length: int) -> Bool[Tensor, "pos pos"]:
        """True where a query (first axis) may not see a key: with "video", text and audio positions the video's."""
        cut = torch.zeros(length, length, dtype=torch.bool)
        if deaf_to == "video":
            queries = torch.zeros(length, dtype=torch.bool)
            queries[len(self.ids) :] = True
            queries[self.audio] = True
            cut[queries.nonzero(), self.video] = True
        return cut


@dataclass(frozen=True, eq=False)
class Material:
    """All that training needs beside the model.

    Attributes:
        pool: Features to learn from.
        words: Token ids of questions and answers.
        frames: For each kind of media ("both", "audio", "video") the layouts it comes in.
    """

    pool: FeaturePool
    words: Words
    frames: Mapping[str, tuple[Frame, ...]]


def make_words() -> Words:
    """Spell the grammar in tokens: questions (with all that follows them up to the answer) and answers."""
    suffixes: dict[str, tuple[tuple[int, ...], ...]] = {}
    for kind, phrasings in grammar.QUESTIONS.items():
        prompts = [layouts.prompt(phrasing, "separate") for phrasing in phrasings]
        suffixes[kind] = tuple(tuple(made.ids[made.suffix :].tolist()) for made in prompts)
    see, hear = layouts.answer_ids("i see"), layouts.answer_ids("and hear")
    return Words(
        questions=suffixes,
        classes=layouts.class_ids(),
        colours=torch.tensor([layouts.answer_ids(name)[0] for name in grammar.COLOURS]),
        nothing=layouts.answer_ids(grammar.NOTHING)[0],
        stop=anatomy.vocabulary()[anatomy.TURN_END],
        caption=(*see, PICTURE_SLOT, *hear, SOUND_SLOT),
        article=layouts.answer_ids("a")[0],
    )


def make_frame(layout: str) -> Frame:
    """Take the part of a layout's prompt that comes before the question."""
    made = layouts.prompt(grammar.QUESTIONS["hear"][0], layout)
    return Frame(made.ids[: made.suffix], made.position_ids[:, : made.suffix], made.video, made.audio)


def material(pool: FeaturePool) -> Material:
    """Gather what training needs: the pool with the grammar's tokens and all layouts."""
    frames = {"both": ("separate", "in_video"), "audio": ("audio",), "video": ("video",)}
    return Material(pool, make_words(), {media: tuple(map(make_frame, names)) for media, names in frames.items()})
