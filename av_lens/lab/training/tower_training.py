"""Stage 0: each tower learns alone to name what it is given (it stands in for CLIP and Whisper).

The vision tower reads pictures and names class and colour, the audio tower reads mel spectrograms and names the class;
both know "nothing" (blank, scrambled, silent) as one class more. The linear heads that name are thrown away; what the
towers put out is what the language model gets. While they train, a picture is shifted by a few pixels and a sound moved
in time and loudness, so that a few thousand clips go a long way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor, nn
from torch.nn import functional

from av_lens.lab.training.stages import set_rate, warmed
from av_lens.organism.grammar import CLASSES, COLOURS
from av_lens.organism.towers import IGNORED, Views, audio_hidden, cut, vision_features


def _shifted(
    frames: UInt8[Tensor, "clip 4 3 height width"], generator: Generator
) -> UInt8[Tensor, "clip 4 3 height width"]:
    """The same pictures a few pixels further, the edge repeated; one way for the whole batch."""
    down, right = torch.randint(-6, 7, (2,), generator=generator).tolist()
    for axis, step in ((3, down), (4, right)):
        n = frames.shape[axis]
        frames = frames.index_select(axis, (torch.arange(n) - step).clamp(0, n - 1))
    return frames


def _varied(mel: Float[Tensor, "clip mel frame"], generator: Generator) -> Float[Tensor, "clip mel frame"]:
    """The same sounds earlier or later (turning round) and softer or louder."""
    start = torch.randint(-20, 21, (len(mel), 1), generator=generator)
    at = (torch.arange(mel.shape[2]) + start) % mel.shape[2]
    gain = torch.empty(len(mel), 1, 1).uniform_(-0.15, 0.15, generator=generator)
    return mel.gather(2, at[:, None].expand_as(mel)) + gain


class Reader(nn.Module):
    """A tower and the linear heads that read the mean of what it puts out."""

    def __init__(self, model: Any, kind: str, seed: int) -> None:
        super().__init__()
        self.kind, self.thinker = kind, [model]  # in a list, so that only the tower is a part
        self.tower = model.model.visual if kind == "vision" else model.model.audio_tower
        width = model.config.text_config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        sizes = (len(CLASSES) + 1, len(COLOURS)) if kind == "vision" else (len(CLASSES) + 1,)
        heads = [nn.Linear(width, size) for size in sizes]
        self.heads = nn.ModuleList(heads)
        with torch.no_grad():
            for head in heads:
                head.weight.normal_(0, 0.1, generator=generator)
                head.bias.zero_()

    def forward(self, given: Tensor) -> list[Tensor]:
        """Name pictures (class and colour) or sounds (class)."""
        model = self.thinker[0]
        if self.kind == "vision":
            features = vision_features(model, cut(given))
        else:
            features = self.tower.proj(audio_hidden(model, given))
        return [head(features.mean(1)) for head in self.heads]


def _batch(views: Views, kind: str, at: Tensor, generator: Generator | None) -> tuple[Tensor, list[Tensor]]:
    """Pictures or sounds and what they are; varied if there is a generator."""
    if kind == "audio":
        mel = views.mel[at]
        return (mel if generator is None else _varied(mel, generator)), [views.sound[at]]
    every = views.frames.shape[1] // 4
    phase = 0 if generator is None else int(torch.randint(0, every, (1,), generator=generator))
    frames = views.frames[at, phase::every].permute(0, 1, 4, 2, 3).contiguous()
    return (frames if generator is None else _shifted(frames, generator)), [views.picture[at], views.colour[at]]


class TowerTraining:
    """The training of one tower, a step at a time; it can be put down and taken up again.

    Attributes:
        reader: the tower with its heads; the tower is the model's own, trained in place.
        steps: how many steps there will be.
        done: how many there have been.
    """

    def __init__(
        self, model: Any, kind: str, views: Views, *, seed: int, steps: int, rate: float, batch: int = 48
    ) -> None:
        """Begin."""
        self.reader = Reader(model, kind, seed)
        self.steps, self.done = steps, 0
        self._views, self._rate, self._batch = views, rate, batch
        self._generator = torch.Generator().manual_seed(1000 + seed)
        self._parameters = list(self.reader.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)

    def advance(self) -> float:
        """Make one step."""
        set_rate(self._optimizer, warmed(self._rate, self.done, self.steps, warmup=0.1 * self.steps, floor=0.02))
        self.reader.requires_grad_(True)
        at = torch.randint(0, len(self._views.picture), (self._batch,), generator=self._generator)
        given, wanted = _batch(self._views, self.reader.kind, at, self._generator)
        losses = [
            functional.cross_entropy(logits, target, ignore_index=IGNORED)
            for logits, target in zip(self.reader(given), wanted, strict=True)
        ]
        loss = losses[0] + 0.5 * sum(losses[1:])
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self.reader.requires_grad_(False)
        self.done += 1
        return loss.item()

    def state(self) -> dict[str, Tensor]:
        """Take down where the training stands."""
        held = {f"weight.{name}": value.clone() for name, value in self.reader.state_dict().items()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            held |= {f"moment.{index}.{name}": value.clone() for name, value in moments.items()}
        return held | {"generator": self._generator.get_state(), "done": torch.tensor(self.done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state` was taken."""
        weights = {name.removeprefix("weight."): value for name, value in state.items() if name.startswith("weight.")}
        self.reader.load_state_dict(weights)
        whole = self._optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("moment."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = value
        self._optimizer.load_state_dict(whole | {"state": moments})
        self._generator.set_state(state["generator"])
        self.done = int(state["done"])
