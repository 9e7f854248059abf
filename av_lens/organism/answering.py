"""What a model answers to many clips, quickly: media from features, several questions hung on one prefix.

This is the road that evaluation takes. It gives the logits of the plain forward pass (`evaluation` compares the two on
a sample through files, `encode` and `forward` every time it runs), and lets heads be silenced at the text positions and
attention between roles be cut everywhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from av_lens.errors import InputError
from av_lens.organism import anatomy, grammar, language, layouts

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
    """Clips in one layout, each with the same number of questions.

    Attributes:
        layout: one of `layouts.LAYOUTS`.
        questions: for each clip, its questions; as many for each, all of five tokens.
        video: what is put at the video tokens, or None.
        audio: what is put at the audio tokens, or None.
        begun: for each clip and question, answer tokens that are given already, as many for each.
    """

    layout: str
    questions: Sequence[Sequence[str]]
    video: Float[Tensor, "clip video_pos d_model"] | None
    audio: Float[Tensor, "clip audio_pos d_model"] | None
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
    """Mark attention edges to cut, in every layer: true where a query may not see a key.

    Roles are "audio", "video" and "text" (all positions that are neither, the questions included), or "text|audio".
    """
    made = layouts.prompt(grammar.QUESTIONS["hear"][0], layout)
    length = made.suffix + blocks * width
    every = torch.arange(length)
    roles = {"video": torch.isin(every, made.video), "audio": torch.isin(every, made.audio)}
    roles["text"] = ~(roles["video"] | roles["audio"])
    asking = torch.stack([roles[name] for name in query.split("|")]).any(0)
    return asking[:, None] & roles[key][None]


@torch.no_grad()
def _begin(model: Any, asked: Asked, cut: tuple[str, str] | None = None) -> tuple[Tensor, language.Tree]:
    """The stream before the first layer, and positions and mask of one prefix with its questions."""
    first = layouts.prompt(asked.questions[0][0], asked.layout)
    rows = []
    for at, questions in enumerate(asked.questions):
        ids = [first.ids[: first.suffix]]
        for block, question in enumerate(questions):
            ids.append(layouts.prompt(question, asked.layout).ids[first.suffix :])
            if asked.begun is not None:
                ids.append(torch.tensor(asked.begun[at][block], dtype=torch.int64))
        rows.append(torch.cat(ids))
    if len({len(row) for row in rows}) != 1:
        raise InputError("all questions of a batch need the same number of tokens.")
    stream = model.model.language_model.embed_tokens(torch.stack(rows))
    for features, at in ((asked.video, first.video), (asked.audio, first.audio)):
        if features is not None and len(at):
            stream = stream.index_copy(1, at, features)
    blocks = len(asked.questions[0])
    width = (stream.shape[1] - first.suffix) // blocks
    edges = None if cut is None else blocked(asked.layout, query=cut[0], key=cut[1], blocks=blocks, width=width)
    prefix = first.position_ids[:, : first.suffix]
    return stream, language.tree(model, prefix, blocks=blocks, width=width, blocked=edges)


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
    """Answer every question about every clip.

    `silenced` are heads whose z is zeroed at all positions after the media; attention is `cut` between (query role, key
    role) in all layers; `slots` are the positions of each question's text to read at, -1 where the answer begins.
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
