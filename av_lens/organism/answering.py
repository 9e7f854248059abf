"""What a model answers to many clips, quickly, and how often it names the sound, the picture, or neither.

Logits are those of the plain forward pass, which `evaluation` compares on a sample. Each clip is asked to hear, to see
and for the colour, its phrasing taken in turn; the answer is the most likely token of the whole vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from av_lens.errors import InputError
from av_lens.organism import anatomy, language
from av_lens.organism.footage import HeldOut, Media

Head = tuple[int, int]
BATCH = 60


def plain(model: Any) -> Any:
    """Copy a model as a HuggingFace thinker without hooks."""
    held = getattr(model, "hf_model", model)
    weights = {re.sub(r"\._original_component", "", name): value for name, value in held.state_dict().items()}
    built = anatomy.build_model(copy.deepcopy(held.config), seed=0)
    # A bridge shows the same weights under several names; the thinker's own are among them.
    built.load_state_dict({name: weights[name].detach().float().cpu() for name in built.state_dict()})
    return built.requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Asked:
    """Clips in one layout, each with the same number of questions."""

    layout: str  # one of `language.LAYOUTS`
    questions: Sequence[Sequence[str]]  # for each clip, its questions; as many for each, all of five tokens
    video: Float[Tensor, "clip video_pos d_model"] | None  # what is put at the video tokens, or None
    audio: Float[Tensor, "clip audio_pos d_model"] | None  # what is put at the audio tokens, or None
    # for each clip and question, answer tokens that are given already, as many for each
    begun: Sequence[Sequence[Sequence[int]]] | None = None

    def __len__(self) -> int:
        return len(self.questions)

    def parts(self) -> Iterator[Asked]:
        """Some of the clips at a time."""
        for start in range(0, len(self), BATCH):
            cut = slice(start, start + BATCH)
            video, audio = (None if features is None else features[cut] for features in (self.video, self.audio))
            begun = None if self.begun is None else self.begun[cut]
            yield Asked(self.layout, self.questions[cut], video, audio, begun)


def blocked(layout: str, *, query: str, key: str, blocks: int, width: int) -> Bool[Tensor, "pos pos"]:
    """Mark attention edges to cut: true where a query may not see a key; the role "text" is all that is no medium."""
    frame = language.make_frame(layout)
    every = torch.arange(len(frame.ids) + blocks * width)
    roles = {"video": torch.isin(every, frame.video), "audio": torch.isin(every, frame.audio)}
    roles["text"] = ~(roles["video"] | roles["audio"])
    asking = torch.stack([roles[name] for name in query.split("|")]).any(0)
    return asking[:, None] & roles[key][None]


@torch.no_grad()
def _begin(model: Any, asked: Asked, cut: tuple[str, str] | None = None) -> tuple[Tensor, language.Tree]:
    """The stream before the first layer, and positions and mask of one prefix with its questions."""
    frame, blocks = language.make_frame(asked.layout), len(asked.questions[0])
    begun = asked.begun or [[()] * blocks] * len(asked)
    rows = [
        [
            token
            for question, words in zip(*both, strict=True)
            for token in (*language.prompt(question, asked.layout).asked, *words)
        ]
        for both in zip(asked.questions, begun, strict=True)
    ]
    if len({len(row) for row in rows}) != 1:
        raise InputError("all questions of a batch need the same number of tokens.")
    stream, width = frame.embed(model, asked.video, asked.audio, torch.tensor(rows)), len(rows[0]) // blocks
    edges = None if cut is None else blocked(asked.layout, query=cut[0], key=cut[1], blocks=blocks, width=width)
    return stream, language.tree(model, frame.positions, blocks=blocks, width=width, blocked=edges)


def _silenced(model: Any, heads: Sequence[Head], batch: int, geometry: language.Tree) -> dict[int, Tensor]:
    """Factors for z that switch heads off at all text positions after the media."""
    shape = (batch, model.config.text_config.num_attention_heads, geometry.blocks * geometry.width)
    keep: dict[int, Tensor] = {}
    for layer, head in heads:
        keep.setdefault(layer, torch.ones(shape))[:, head] = 0
    return keep


def _asked_rows(stream: Tensor, geometry: language.Tree) -> Float[Tensor, "clip question slot d_model"]:
    """The questions' rows of a stream."""
    return stream[:, -geometry.blocks * geometry.width :].unflatten(1, (geometry.blocks, geometry.width))


@torch.no_grad()
def logits(
    model: Any,
    asked: Asked,
    *,
    silenced: Sequence[Head] = (),
    cut: tuple[str, str] | None = None,
    slots: Sequence[int] = (-1,),
) -> Float[Tensor, "clip question slot d_vocab"]:
    """Answer every question about every clip, at each `slots` of its text (-1: where the answer begins).

    `silenced` heads' z is zeroed after the media; attention is `cut` between (query role, key role) in all layers.
    """
    found = []
    for part in asked.parts():
        stream, geometry = _begin(model, part, cut)
        stream = language.run_layers(model, stream, geometry, keep=_silenced(model, silenced, len(part), geometry))
        found.append(language.read_out(model, _asked_rows(stream, geometry)[:, :, list(slots)]))
    return torch.cat(found)


@torch.no_grad()
def streams(model: Any, asked: Asked) -> Float[Tensor, "clip question layer d_model"]:
    """Record the residual stream where the answer begins: before the first layer, then after each."""
    found = []
    for part in asked.parts():
        stream, geometry = _begin(model, part)
        seen = [_asked_rows(stream, geometry)[:, :, -1]]
        for layer in range(model.config.text_config.num_hidden_layers):
            stream = language.run_layers(model, stream, geometry, start=layer, stop=layer + 1)
            seen.append(_asked_rows(stream, geometry)[:, :, -1])
        found.append(torch.stack(seen, 2))
    return torch.cat(found)


@torch.no_grad()
def each_head(model: Any, asked: Asked) -> Iterator[tuple[Head, Float[Tensor, "clip question d_vocab"]]]:
    """Silence every head alone, each time from its own layer on: (layer, head), and the logits of the answer."""
    config = model.config.text_config
    stream, geometry = _begin(model, asked)
    for layer in range(config.num_hidden_layers):
        for head in range(config.num_attention_heads):
            keep = _silenced(model, [(layer, head)], len(asked), geometry)
            after = language.run_layers(model, stream, geometry, start=layer, keep=keep)
            yield (layer, head), language.read_out(model, _asked_rows(after, geometry)[:, :, -1])
        if layer + 1 < config.num_hidden_layers:
            stream = language.run_layers(model, stream, geometry, start=layer, stop=layer + 1)


BOTH = ("separate", "in_video")
KINDS = ("hear", "see", "colour")
COUNTED = ("sound", "picture", "colour", "nothing", "other", "right")


class Cell(NamedTuple):
    """What a model is given."""

    layouts: tuple[str, ...]  # where the media stand in the prompt
    picture: str  # "own", "blank" or "" for none
    sound: str  # "own", "partner", "mute" or "" for none


CELLS: Mapping[str, Cell] = {
    "audio_only": Cell(("audio",), "", "own"),
    "video_only": Cell(("video",), "own", ""),
    "factual": Cell(BOTH, "own", "own"),
    "conflict": Cell(BOTH, "own", "partner"),
    "blank_picture": Cell(BOTH, "blank", "own"),
    "mute_sound": Cell(BOTH, "own", "mute"),
}


Truth = Mapping[str, Int64[Tensor, " clip"]]
"""The class of each clip's "picture" and of its "sound", and the "colour" of the picture; -1 where there is none."""


def truth(cell: Cell, clips: HeldOut) -> Truth:
    """Say what is on the clips of a cell."""
    views, none = clips.views, torch.full_like(clips.views.picture, -1)
    sounds = {"own": views.sound, "partner": views.sound[clips.partner]}
    seen = (views.picture, views.colour) if cell.picture == "own" else (none, none)
    return {"picture": seen[0], "sound": sounds.get(cell.sound, none), "colour": seen[1]}


def ask(cell: Cell, layout: str, clips: HeldOut, media: Media, kinds: tuple[str, ...] = KINDS) -> Asked:
    """Put questions to the clips of a cell in one of its layouts; every clip is asked each kind."""
    n = len(clips.partner)
    pictures = {"own": media.video, "blank": media.blank.expand(n, -1, -1)}
    sounds = {"own": media.audio, "partner": media.audio[clips.partner], "mute": media.mute[torch.arange(n) % 2]}
    asked = [[anatomy.QUESTIONS[kind][at % len(anatomy.QUESTIONS[kind])] for kind in kinds] for at in range(n)]
    return Asked(layout, asked, pictures.get(cell.picture), sounds.get(cell.sound))


def tally(answers: Int64[Tensor, " clip"], kind: str, what: Truth) -> dict[str, int]:
    """Count what answers name, by `COUNTED`; where sound and picture agree, an answer counts for both."""
    colours = torch.tensor([language.answer_ids(name)[0] for name in anatomy.COLOURS])
    words = {"sound": language.class_ids(), "picture": language.class_ids(), "colour": colours}

    counts = {name: (what[name] >= 0) & (answers == words[name][what[name].clamp(min=0)]) for name in words}
    counts["nothing"] = answers == language.answer_ids(anatomy.NOTHING)[0]
    counts["other"] = ~torch.stack([*counts.values()]).any(0)
    asked = {"hear": "sound", "see": "picture", "colour": "colour"}[kind]
    counts["right"] = torch.where(what[asked] >= 0, counts[asked], counts["nothing"])
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
    """Count a model's answers under `silenced` and `cut` as of `logits`: a row for each cell, layout and kind."""
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


def captioned(model: Any, clips: HeldOut, media: Media) -> pd.DataFrame:
    """Read the two slots of a caption, the words between given; rows as of `behave`, of both caption kinds."""
    rows: list[dict[str, Any]] = []
    for name in ("factual", "conflict"):
        cell = CELLS[name]
        what = truth(cell, clips)
        begun = [
            [language.answer_ids(f"i see a {anatomy.CLASSES[label]} and hear a")] for label in what["picture"].tolist()
        ]
        for layout in cell.layouts:
            asked = ask(cell, layout, clips, media, ("caption",))
            answers = logits(model, replace(asked, begun=begun), slots=(-len(begun[0][0]) + 2, -1))[:, 0].argmax(-1)
            for slot, kind in enumerate(("see", "hear")):
                found = tally(answers[:, slot], kind, what)
                rows.append({"cell": name, "layout": layout, "kind": f"caption_{kind}", "n": len(answers)} | found)
    return pd.DataFrame(rows)
