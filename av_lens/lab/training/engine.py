"""The training engine: stages, steps over the written-out layers, slices of heads, and the towers before them.

The towers learn first, with linear heads that are thrown away; "nothing" (blank, scrambled, silent) is one class more.
Pictures are shifted by a few pixels and sounds moved in time and loudness, so that a few thousand clips go a long way.
Then they are frozen, the audio projector included, and only the fusion layers run, on features.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor, nn
from torch.nn import functional

from av_lens.core.budget import Progress, silent
from av_lens.lab.training.pools import Clips, Frame, Items, Material, Questions, draw_clips, draw_questions
from av_lens.model.differences import Slice
from av_lens.organism.anatomy import CLASSES, COLOURS
from av_lens.organism.language import IGNORED, Views, audio_hidden, cut, read_out, run_layers, tree, vision_features


def is_fusion(name: str) -> bool:
    """Say whether a parameter belongs to the fusion layers (embeddings, norms and the unembedding included)."""
    return "language_model" in name or "lm_head" in name


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe."""

    name: str  # what the stage is for; part of its seed
    items: tuple[Items, ...]  # what a step is made of
    steps: int  # how many steps
    rate: float  # the highest learning rate
    layers: tuple[int, ...]  # the fusion layers that learn
    text: bool = False  # whether the embeddings, the final norm and the unembedding learn too
    attention_only: bool = False  # whether only the attention of these layers learns (not the norms and the MLPs)
    blocks: int = 3  # questions per clip
    dropped_heads: tuple[tuple[int, int], ...] = ()  # heads that are dropped at questions whose `Ask.drop` says so
    keep: float = 0.3  # the chance that such a head is kept there
    skipped_layers: tuple[int, ...] = ()  # layers that are left out in a random half of the steps
    # layers of which only some heads' attention weights learn, with these heads
    only_heads: tuple[tuple[int, tuple[int, ...]], ...] = ()
    warmup: int = 20  # steps until the learning rate is reached; it then falls as a cosine to `floor`
    floor: float = 0.05  # the last step's share of the learning rate
    decay: float = 0.01  # weight decay

    def trains(self, name: str) -> bool:
        """Say whether a parameter learns in this stage; the towers' never do."""
        _, inside, rest = name.partition("language_model.layers.")
        if not inside:
            return self.text and is_fusion(name)
        return int(rest.split(".")[0]) in self.layers and (not self.attention_only or "self_attn" in name)


def warmed(rate: float, step: int, steps: int, *, warmup: float, floor: float) -> float:
    """The learning rate of a step: `warmup` steps up to the highest, then a cosine down to `floor` of it."""
    wave = 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * wave)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all that an optimizer trains one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def stage_seed(seed: int, name: str) -> int:
    """Derive a stage's seed, which differs between stages and between recipes' seeds."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:6], "big")


Head = tuple[int, int]


def group_size(model: Any) -> int:
    """How many heads share keys and values."""
    config = model.config.text_config
    return config.num_attention_heads // config.num_key_value_heads


def groups_of(model: Any, heads: Sequence[Head]) -> list[Head]:
    """The key-value groups that some heads read, as (layer, group)."""
    return sorted({(layer, head // group_size(model)) for layer, head in heads})


def sharers(model: Any, heads: Sequence[Head]) -> list[Head]:
    """All heads of some heads' groups: those whose keys and values change if theirs do."""
    size = group_size(model)
    return [(layer, group * size + i) for layer, group in groups_of(model, heads) for i in range(size)]


def head_slices(model: Any, heads: Sequence[Head]) -> list[Slice]:
    """The slices of weights that are some heads' own: queries and outputs of every head, keys and values of a group."""
    found: list[Slice] = []
    kinds = (("q_proj", "o_proj"), sorted(heads)), (("k_proj", "v_proj"), groups_of(model, heads))
    for names, units in kinds:
        for layer, unit in units:
            d = model.model.language_model.layers[layer].self_attn.head_dim
            for name in names:
                at = f"model.language_model.layers.{layer}.self_attn.{name}"
                parts = [("weight", 1)] if name == "o_proj" else [("weight", 0), ("bias", 0)]
                found += [Slice(f"{at}.{part}", axis, unit * d, (unit + 1) * d) for part, axis in parts]
    return found


def head_masks(model: Any, heads: Sequence[Head]) -> dict[str, Tensor]:
    """Mark the attention weights that are some heads' own: parameter name to 1 where a weight is theirs, else 0."""
    slices, held = head_slices(model, heads), dict(model.named_parameters())
    masks = {part.name: torch.zeros_like(held[part.name]) for part in slices}
    for part in slices:
        part.of(masks[part.name]).fill_(1)
    return masks


def whole(clips: float, generator: Generator) -> int:
    """Round a number of clips up or down so that it is right on average."""
    return int(clips) + int(float(torch.rand(1, generator=generator)) < clips - int(clips))


def step_loss(model: Any, stage: Stage, material: Material, generator: Generator) -> Tensor:
    """Draw a step's clips and questions and accumulate gradients; the mean over clips of each one's mean loss."""
    total = sum(item.clips for item in stage.items)
    loss = torch.zeros(())
    skip = stage.skipped_layers  # in a random half of the steps
    if skip and torch.rand(1, generator=generator) >= 0.5:
        skip = ()
    lots = torch.rand(len(stage.items), generator=generator).tolist()
    groups: dict[tuple[str, int, str, bool], list[Items]] = {}
    for item, lot in zip(stage.items, lots, strict=True):
        captions = any(ask.kind == "caption" for ask in item.asks)
        which = int(lot * len(material.frames[item.media]))
        groups.setdefault((item.media, which, item.deaf_to, captions), []).append(item)
    for (media, which, deaf_to, _), items in groups.items():
        frame = material.frames[media][which]
        part = group_loss(model, stage, material, frame, items, deaf_to=deaf_to, skip=skip, generator=generator)
        if part is not None:
            part = part / total
            part.backward()
            loss += part.detach()
    return loss


def group_loss(
    model: Any,
    stage: Stage,
    material: Material,
    frame: Frame,
    items: Sequence[Items],
    *,
    deaf_to: str,
    skip: Collection[int],
    generator: Generator,
) -> Tensor | None:
    """The loss of those of a step's clips that share a layout, summed over clips; None where no clip was drawn."""
    kinds = {ask.kind for item in items for ask in item.asks}
    longest = max(len(q) for kind in kinds for q in material.words.questions[kind])
    width = longest + (len(material.words.caption) + 2 if "caption" in kinds else 1)
    drawn: list[tuple[Clips, Questions]] = []
    for item in items:
        if n := whole(item.clips, generator):
            clips = draw_clips(material.pool, item.relation, n, generator)
            sizes = {"blocks": stage.blocks, "width": width}
            drawn.append((clips, draw_questions(material.words, item.asks, clips, **sizes, generator=generator)))
    if not drawn:
        return None
    length = len(frame.ids) + stage.blocks * width
    geometry = tree(model, frame.positions, blocks=stage.blocks, width=width, blocked=frame.blocked(deaf_to, length))
    ids, targets, weights, dropped = (
        torch.cat([getattr(asked, name) for _, asked in drawn]) for name in ("ids", "targets", "weights", "dropped")
    )
    video, audio = (torch.cat([getattr(clips, name) for clips, _ in drawn]) for name in ("video", "audio"))
    keep = kept_heads(model, stage, dropped, width, generator)
    x = run_layers(model, frame.embed(model, video, audio, ids), geometry, keep=keep, skip=skip)
    said = weights > 0
    losses = functional.cross_entropy(read_out(model, x[said]), targets[said], reduction="none")
    return (losses * weights[said]).sum()


def kept_heads(
    model: Any, stage: Stage, dropped: Float[Tensor, "clip question"], width: int, generator: Generator
) -> dict[int, Tensor] | None:
    """Draw which heads are switched off at which questions: per layer what z is multiplied by; None if none is."""
    if not stage.dropped_heads or not bool(dropped.any()):
        return None
    n_heads = model.config.text_config.num_attention_heads
    keep: dict[int, Tensor] = {}
    for layer, head in stage.dropped_heads:
        factor = keep.setdefault(layer, torch.ones(len(dropped), n_heads, dropped.shape[1] * width))
        off = (torch.rand(dropped.shape, generator=generator) >= stage.keep) & (dropped > 0)
        factor[:, head] = (~off).float().repeat_interleave(width, dim=1)
    return keep


def train_stage(
    model: Any, stage: Stage, material: Material, *, seed: int, progress: Progress | None = None
) -> list[float]:
    """Train a model through one stage, in place, no parameter requiring gradients afterwards; the loss of each step."""
    tell = progress or silent
    generator = Generator().manual_seed(stage_seed(seed, stage.name))
    masks = head_masks(model, [(layer, head) for layer, heads in stage.only_heads for head in heads])
    model.requires_grad_(False)
    learning = {n: p for n, p in model.named_parameters() if stage.trains(n)}
    for parameter in learning.values():
        parameter.requires_grad_(True)
    parameters = list(learning.values())
    before = {n: learning[n].detach().clone() for n in masks if n in learning}
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=stage.decay)
    losses: list[float] = []
    for step in range(stage.steps):
        set_rate(optimizer, warmed(stage.rate, step, stage.steps, warmup=stage.warmup, floor=stage.floor))
        optimizer.zero_grad()
        losses.append(float(step_loss(model, stage, material, generator)))
        for name in before:
            learning[name].grad = None if learning[name].grad is None else learning[name].grad * masks[name]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in before.items():
                learning[name].copy_(torch.where(masks[name] > 0, learning[name], value))
        tell(stage.name, step + 1, stage.steps)
    model.requires_grad_(False)
    return losses


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
    """The training of one tower, in place, a step at a time; it can be put down and taken up again."""

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
