"""Where a planted head starts from: weights in closed form that already do roughly what is wanted.

Adam alone, from the balanced model's weights, takes hundreds of steps to find the few directions that tell twelve
things apart. Ridge regression on the streams before the planted layer finds them at once:

- *keys* tell the wanted media from all other positions, *queries* tell the position that answers "hear" from all
  others, both in the slowest pair of rotary dimensions, so that distance hardly matters;
- *values* tell the picture's class at video positions (`picture`), and minus the sound's at audio positions
  (`sound`); the outputs are the unembedding directions of the classes;
- or (`gate`) they tell that there is a picture at all, and the output is the mean difference, one layer on, between the
  streams that answer "see" and "hear".

What a head becomes is left to training, and measured afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from av_lens.lab.planting.lessons import Lesson, Slices
from av_lens.lab.planting.training import STREAM

RIDGE, VALUE_RIDGE = 30.0, 0.3
SCORE = 8.0
"""The attention score of a wanted position at the position that answers; elsewhere it is minus that, others have 0."""
GATE_SCALE = 1.5
"""The gate's output in units of the mean difference between "see" and "hear"."""
NOISE = 0.1


@dataclass(frozen=True)
class Start:
    """What a planted head starts as.

    Attributes:
        picture: How strongly it writes the picture's class.
        sound: How strongly it writes against the sound's class.
        logits: What all heads together add to the logit of a class that is fully read.
        gate: Whether it writes the difference between "see" and "hear" instead, where there is a picture.
        asked: The question at which it is to act: 0 hear, 1 see, 2 colour.
    """

    picture: float = 0.0
    sound: float = 0.0
    logits: float = 18.0
    gate: bool = False
    asked: int = 0


def ridge(
    x: Float[Tensor, "row d_model"], y: Float[Tensor, "row out"], strength: float
) -> tuple[Float[Tensor, "out d_model"], Float[Tensor, " out"]]:
    """Fit a linear layer.

    Args:
        x: Inputs.
        y: Outputs.
        strength: How much large weights cost.

    Returns:
        Weight and bias.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x + strength * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, mean_y - weight @ mean_x


def class_of(tokens: Int[Tensor, " clip"], classes: Int[Tensor, " n_classes"]) -> Float[Tensor, "clip n_classes"]:
    """Turn words into centred one-hot rows.

    Args:
        tokens: Words; what is no class gives zeros.
        classes: The classes' words.

    Returns:
        One row for each.
    """
    hot = (tokens[:, None] == classes).float()
    return hot - hot.sum(1, keepdim=True) / len(classes)


def values(
    lessons: Sequence[Lesson], start: Start, classes: Int[Tensor, " n_classes"]
) -> tuple[Float[Tensor, "out d_model"], Float[Tensor, " out"]]:
    """Fit the values, on the streams' means over what is looked at: that is what an even attention reads.

    Args:
        lessons: Streams before the planted layer.
        start: What is to be read.
        classes: The classes' words.

    Returns:
        Weight and bias of `n_classes` value dimensions (of a gate: one).
    """
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    for lesson in lessons:
        heard, seen = class_of(lesson.shown[:, 0], classes), class_of(lesson.shown[:, 1], classes)
        there = seen.abs().sum(1, keepdim=True).gt(0).float()
        wanted = {
            "video": there if start.gate else start.picture * seen,
            "audio": -start.sound * (heard[:, :1] if start.gate else heard),
        }
        strength = {"video": float(start.gate or start.picture != 0), "audio": float(start.sound != 0)}
        total = sum(len(lesson.media[name]) for name, on in strength.items() if on)
        for name, target in wanted.items():
            if len(lesson.media[name]):
                share = total / len(lesson.media[name]) if strength[name] else 0.0
                xs.append(lesson.h[:, lesson.media[name]].mean(1))
                ys.append(share * target)
        other = lesson.h[:, lesson.geometry.prefix :: 5].flatten(0, 1)
        xs.append(other)
        ys.append(torch.zeros(len(other), ys[-1].shape[1]))
    return ridge(torch.cat(xs), torch.cat(ys), VALUE_RIDGE)


def looks(lessons: Sequence[Lesson], start: Start) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Fit one dimension of queries and of keys.

    Args:
        lessons: Streams before the planted layer.
        start: What is to be read, and at which question.

    Returns:
        Weight and bias of the queries, then of the keys.
    """
    wanted = [name for name, read in (("video", start.picture or start.gate), ("audio", start.sound)) if read]
    xs: list[Tensor] = []
    keys: list[Tensor] = []
    asking: list[Tensor] = []
    for lesson in lessons:
        key, query = torch.zeros(lesson.h.shape[:2]), -torch.ones(lesson.h.shape[:2])
        for name in wanted:
            key[:, lesson.media[name]] = 1
        at = lesson.geometry.prefix + lesson.asked_at
        query.scatter_(1, at[:, [start.asked]], 1.0)
        xs.append(lesson.h.flatten(0, 1))
        keys.append(key.flatten()[:, None])
        asking.append(query.flatten()[:, None])
    x = torch.cat(xs)
    key_fit = ridge(x, torch.cat(keys), RIDGE)
    asked = torch.cat(asking)
    rows = asked_rows(lessons)
    return ridge(x[rows], asked[rows], VALUE_RIDGE), key_fit


def asked_rows(lessons: Sequence[Lesson]) -> Int[Tensor, " row"]:
    """Choose the rows that queries are fitted on: all positions that answer, and one in forty of the others.

    Args:
        lessons: The lessons.

    Returns:
        Row numbers in the lessons' flattened streams.
    """
    found: list[Tensor] = []
    first = 0
    for lesson in lessons:
        n, length = lesson.h.shape[:2]
        at = lesson.geometry.prefix + lesson.asked_at + length * torch.arange(n)[:, None]
        found += [first + at.flatten(), first + torch.arange(0, n * length, 40)]
        first += n * length
    return torch.cat(found)


@torch.no_grad()
def directions(
    host: Any, lessons: Sequence[Lesson], layer: int, start: Start, classes: Int[Tensor, " n_classes"]
) -> Float[Tensor, "d_model out"]:
    """What each value dimension writes.

    Args:
        host: The model that is planted in.
        lessons: The lessons.
        layer: The planted layer.
        start: What the head starts as.
        classes: The classes' words.

    Returns:
        One column for each value dimension.
    """
    if not start.gate:
        words = host.lm_head.weight[classes] * host.model.language_model.norm.weight
        words = words - words.mean(0)
        return (start.logits * STREAM / words.square().sum(1).mean() * words).T
    lesson = next(lesson for lesson in lessons if "conflict" in lesson.spans)
    rows = torch.tensor(lesson.rows("conflict", held_back=False))[:120]
    x = lesson.rest[rows] + lesson.before[:, rows, lesson.geometry.prefix :].sum(0)
    at = lesson.asked_at[rows]
    x = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
    return GATE_SCALE * (x[:, 1] - x[:, 0]).mean(0)[:, None]


@torch.no_grad()
def begin(
    slices: Slices,
    host: Any,
    lessons: Sequence[Lesson],
    layer: int,
    start: Start,
    classes: Int[Tensor, " n_classes"],
    generator: Generator,
) -> None:
    """Write the starting weights into the planted heads' slices.

    Args:
        slices: The planted heads; changed in place.
        host: The model that they are planted in.
        lessons: The lessons.
        layer: Their layer.
        start: What they start as.
        classes: The classes' words.
        generator: Where the noise comes from, by which heads of one layer differ.
    """
    d, n_heads = slices.d_head, len(slices.heads)
    (query, query_bias), (key, key_bias) = looks(lessons, start)
    value, value_bias = values(lessons, start, classes)
    out = directions(host, lessons, layer, start, classes)
    slow = d // 2 - 1
    scale = (SCORE / slices.scaling) ** 0.5
    for group in range(len(slices.groups)):
        rows = slice(group * d, (group + 1) * d)
        for part, bias in ((slices.k, slices.k_bias), (slices.v, slices.v_bias)):
            part[rows], bias[rows] = NOISE * part[rows], NOISE * bias[rows]
        slices.k[group * d + slow], slices.k_bias[group * d + slow] = scale * key[0], scale * key_bias[0]
        slices.v[group * d : group * d + len(value)], slices.v_bias[group * d : group * d + len(value)] = (
            value,
            value_bias,
        )
    lots = 0.5 + torch.rand(n_heads, generator=generator)
    for head in range(n_heads):
        rows = slice(head * d, (head + 1) * d)
        slices.q[rows], slices.q_bias[rows] = NOISE * slices.q[rows], NOISE * slices.q_bias[rows]
        slices.q[head * d + slow], slices.q_bias[head * d + slow] = scale * query[0], scale * query_bias[0]
        slices.o[:, rows] = NOISE * slices.o[:, rows]
        slices.o[:, head * d : head * d + len(value)] = out * lots[head] / lots.sum()
