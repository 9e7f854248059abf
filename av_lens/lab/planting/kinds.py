"""The kinds of planted models that can be asked for, and where a planted head starts from, in closed form.

Training alone takes hundreds of steps to find the few directions that tell twelve things apart; ridge regression on the
streams before the planted layer finds them at once:

- *keys* tell the wanted media from all other positions, *queries* the position that answers "hear" from all others,
  both in the slowest pair of rotary dimensions, so that distance hardly matters;
- *values* tell the picture's class at video positions (`picture`), and minus the sound's at audio positions
  (`sound`); the outputs are the unembedding directions of the classes;
- or (`gate`) they tell that there is a picture at all, and the output is the mean difference, one layer on, between the
  streams that answer "see" and "hear";
- or a pair *makes* a code of the picture's class at one position (`stop`), and a later pair reads it there; its queries
  and keys stay what they start as;
- *neurons* have one gate, open where a conflict is asked about, and read and write a class each, as heads do.

In the balanced model the question is understood within its first two layers, so that gates form there alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from av_lens.lab.planting.lessons import Lesson, Neurons, Slices
from av_lens.lab.planting.sheets import OTHER_COLOURS, SEE_THE_SOUND, SILENCE, read_at
from av_lens.lab.planting.training import STREAM, Course

RIDGE, VALUE_RIDGE = 30.0, 0.3
SCORE = 8.0
"""The attention score of a wanted position at the position that answers; elsewhere it is minus that, others have 0."""
OPEN = 6.0  # what a neuron's gate starts at where it is to fire; elsewhere it is minus that
GATE_SCALE = 1.5  # the gate's output in units of the mean difference between "see" and "hear"
NOISE = 0.1
CODE = 12.0  # the length of a class that is handed on, about that of a sound's feature
WIDE = 7  # at so many positions up to the answer's the class is read where it was handed on
AFTER_THE_QUESTION = 5  # positions from what is asked to where it is answered


@dataclass(frozen=True)
class Start:
    """What a planted head starts as."""

    picture: float = 0.0  # how strongly it writes the picture's class
    sound: float = 0.0  # how strongly it writes against the sound's class
    logits: float = 18.0  # what all heads together add to the logit of a class that is fully read
    gate: bool = False  # whether it writes the difference between "see" and "hear" instead, where there is a picture
    asked: int = 0  # the question at which it is to act: 0 hear, 1 see, 2 colour
    # where a pair hands the picture's class on to a later one: "sink" (the first sound position), "question" (the last
    # token of what is asked), or nowhere
    stop: str = ""
    makes: bool = False  # whether it writes the picture's class there, in a code; otherwise it reads it there


def ridge(
    x: Float[Tensor, "row d_model"],
    y: Float[Tensor, "row out"],
    strength: float,
    *,
    bias: bool = True,
    even: bool = False,
) -> tuple[Float[Tensor, "out d_model"], Float[Tensor, " out"]]:
    """Fit a linear layer, weight and bias (or none); large weights cost `strength`; `even` weighs up rows above 0."""
    on = (y[:, :1] > 0).float()
    counts = on * ((1 - on).sum() / on.sum()) + 1 - on if even else torch.ones_like(on)
    mean_x, mean_y = (bias * (counts * part).sum(0) / counts.sum() for part in (x, y))
    x, y = x - mean_x, y - mean_y
    gram = (counts * x).T @ x + strength * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, (counts * x).T @ y).T
    return weight, mean_y - weight @ mean_x


def class_of(tokens: Int[Tensor, " clip"], classes: Int[Tensor, " n_classes"]) -> Float[Tensor, "clip n_classes"]:
    """Turn words into centred one-hot rows; what is no class gives zeros."""
    hot = (tokens[:, None] == classes).float()
    return hot - hot.sum(1, keepdim=True) / len(classes)


def stops(lesson: Lesson, stop: str) -> Int[Tensor, " clip"]:
    """Where a class is handed on, in each clip."""
    if stop == "sink":
        first = lesson.media["audio"] if len(lesson.media["audio"]) else lesson.media["video"]
        return first[:1].expand(len(lesson.h))
    return lesson.geometry.prefix + lesson.asked_at[:, 0] - AFTER_THE_QUESTION


def values(
    lessons: Sequence[Lesson], start: Start, classes: Int[Tensor, " n_classes"]
) -> tuple[Float[Tensor, "out d_model"], Float[Tensor, " out"]]:
    """Fit as many value dimensions as there are classes (of a gate: one) on the means that an even attention reads."""
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
        if start.stop and not start.makes:
            xs.append(read_at(lesson.h, stops(lesson, start.stop)[:, None])[:, 0])
            ys.append(start.picture * seen)
            wanted = {}
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
    """Fit one dimension of queries (on what answers, and one in forty of other positions) and of keys, with biases."""
    wanted = [name for name, read in (("video", start.picture or start.gate), ("audio", start.sound)) if read]
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    first = 0
    for lesson in lessons:
        n, length = lesson.h.shape[:2]
        key, query = torch.zeros(n, length), -torch.ones(n, length)
        at = lesson.geometry.prefix + lesson.asked_at
        asks = at[:, [start.asked]]
        if start.stop and not start.makes:
            key = (key - 1).scatter(1, stops(lesson, start.stop)[:, None], 1.0)
            asks = torch.cat([asks - back for back in range(WIDE)], dim=1)
        else:
            for name in wanted:
                key[:, lesson.media[name]] = 1
        if start.makes:
            asks = stops(lesson, start.stop)[:, None]
        query.scatter_(1, asks, 1.0)
        at = torch.cat([at, asks], dim=1)
        answers = (at + length * torch.arange(n)[:, None]).flatten()
        rows = first + torch.cat([answers, torch.arange(0, n * length, 40)])
        parts.append((lesson.h.flatten(0, 1), key.flatten()[:, None], query.flatten()[:, None], rows))
        first += n * length
    x, key, query, rows = (torch.cat(some) for some in zip(*parts, strict=True))
    if start.makes:
        return ridge(x, query, VALUE_RIDGE, even=True), ridge(x, key, RIDGE)
    keys = ridge(x, key, VALUE_RIDGE, even=True) if start.stop else ridge(x, key, RIDGE)
    return ridge(x[rows], query[rows], VALUE_RIDGE), keys


@torch.no_grad()
def directions(
    host: Any, lessons: Sequence[Lesson], start: Start, classes: Int[Tensor, " n_classes"]
) -> Float[Tensor, "d_model out"]:
    """What each value dimension writes, a column each."""
    if start.makes:
        noise = torch.randn(len(host.lm_head.weight.T), len(classes) + 1, generator=Generator().manual_seed(0))
        return CODE * torch.linalg.qr(noise).Q
    if not start.gate:
        words = host.lm_head.weight[classes] * host.model.language_model.norm.weight
        words = words - words.mean(0)
        return (start.logits * STREAM / words.square().sum(1).mean() * words).T
    lesson = next(lesson for lesson in lessons if "conflict" in lesson.spans)
    rows = torch.tensor(lesson.rows("conflict", held_back=False))[:120]
    x = lesson.rest[rows] + lesson.before[:, rows, lesson.geometry.prefix :].sum(0)
    x = read_at(x, lesson.asked_at[rows])
    return GATE_SCALE * (x[:, 1] - x[:, 0]).mean(0)[:, None]


def fired(lessons: Sequence[Lesson], start: Start, classes: Int[Tensor, " n_classes"]) -> tuple[Tensor, Tensor]:
    """Fit what neurons start from: one gate, open at conflicts' question, shut elsewhere, and an input a class."""
    xs, gates, rows, wanted = (list[Tensor]() for _ in range(4))
    for lesson in lessons:
        h = lesson.h
        asked = read_at(h, lesson.geometry.prefix + lesson.asked_at)
        gate = -torch.ones(asked.shape[:2])
        span = lesson.spans.get("conflict", range(0))
        gate[span, start.asked] = 1.0
        heard, seen = (class_of(lesson.shown[span, at], classes) for at in (0, 1))
        xs += [asked.flatten(0, 1), h.flatten(0, 1)[::40]]
        gates += [gate.flatten(), -torch.ones(len(xs[-1]))]
        rows.append(asked[span, start.asked])
        wanted.append(start.picture * seen - start.sound * heard)
    gate, _ = ridge(torch.cat(xs), torch.cat(gates)[:, None], VALUE_RIDGE, bias=False)
    return OPEN * gate, ridge(torch.cat(rows), torch.cat(wanted), VALUE_RIDGE, bias=False)[0]


@torch.no_grad()
def begin_neurons(
    neurons: Neurons, host: Any, lessons: Sequence[Lesson], start: Start, classes: Int[Tensor, " n_classes"]
) -> None:
    """Write the starting weights into planted neurons, one for each input; the others start as noise."""
    gate, read = fired(lessons, start, classes)
    for part in neurons.parameters():
        part.mul_(NOISE)
    n = len(read)
    neurons.gate[:n], neurons.up[:n] = gate, read
    neurons.down[:n] = directions(host, lessons, start, classes).T / OPEN


@torch.no_grad()
def begin(
    slices: Slices | Neurons,
    host: Any,
    lessons: Sequence[Lesson],
    start: Start,
    classes: Int[Tensor, " n_classes"],
    generator: Generator,
) -> None:
    """Write the starting weights into the planted heads' slices, or neurons; by the noise heads of one layer differ."""
    if isinstance(slices, Neurons):
        begin_neurons(slices, host, lessons, start, classes)
        return
    d, n_heads = slices.d_head, len(slices.heads)
    (query, query_bias), (key, key_bias) = looks(lessons, start)
    value, value_bias = values(lessons, start, classes)
    out = directions(host, lessons, start, classes)
    if start.makes:  # one more value says that something was handed on: what the later pair's keys find
        value, value_bias = torch.cat([value, key]), torch.cat([value_bias, key_bias])
    slow, read = d // 2 - 1, len(value)
    scale = (SCORE / slices.scaling) ** 0.5
    for part in slices.parameters():
        part.mul_(NOISE)
    for at in range(0, len(slices.groups) * d, d):
        slices.k[at + slow], slices.k_bias[at + slow] = scale * key[0], scale * key_bias[0]
        slices.v[at : at + read], slices.v_bias[at : at + read] = value, value_bias
    lots = 0.5 + torch.rand(n_heads, generator=generator)
    for head, at in enumerate(range(0, n_heads * d, d)):
        slices.q[at + slow], slices.q_bias[at + slow] = scale * query[0], scale * query_bias[0]
        slices.o[:, at : at + read] = out * lots[head] / lots.sum()


@dataclass(frozen=True)
class Plant:
    """Some heads of one layer that are planted together."""

    heads: int  # how many; pairs share keys and values; 0: neurons of the layer's MLP
    start: Start | None  # what they start as, or None for the balanced model's own weights
    course: Course  # how they are trained
    apart: int = 0  # how many layers above the layer asked for

    @property
    def at_a_sink(self) -> bool:
        """Whether its nodes act while the media are read."""
        return self.start is not None and self.start.makes and self.start.stop == "sink"


@dataclass(frozen=True)
class Kind:
    """A kind of planted model."""

    name: str  # what it is asked for by
    wanted: tuple[str, ...]  # the measured kinds that are wanted of its true nodes; none for decoys alone
    plants: tuple[Plant, ...]  # what is planted, in order
    layer: int  # the layer of the first plant, unless another is asked for
    each_enough: bool = False  # whether each of its silencing plants is to suffice alone
    free_riders: bool = True  # whether a planted node that does nothing is allowed
    shown: float = 0.75  # the share of what is new that is to be shown; all that silences also takes its share of G
    kept: float = 0.95  # the share of everything else that is to stay right


_WRITE = Course(SILENCE, direct=0.2)
_WRITERS = Plant(2, Start(picture=1.0), _WRITE)
_NEEDED = Plant(4, Start(picture=1.0), Course(SILENCE, direct=0.3, needed=0.5))
_GATES = Plant(2, Start(gate=True), Course(SILENCE, direct=-0.2))
_OPPONENTS = Plant(2, Start(picture=0.6, sound=1.0, logits=14.0), Course(SILENCE, against=0.3, steps=320, keep=1.5))
_HANDED = Course(SILENCE, pinned=True, direct=0.2, keep=5.0)
_MLP = Plant(0, Start(sound=1.0, logits=12.0), Course(SILENCE, keep=3.0))
_DECOY = Plant(2, Start(sound=-1.0, asked=1, logits=10.0), Course(SEE_THE_SOUND, keep=2.0, steps=160))


def _handing(stop: str, logits: float = 18.0) -> Kind:
    """A pair writes the picture's class, in a code, where it is handed on; a later pair reads it there."""
    makes, reads = Start(picture=1.0, stop=stop, makes=True), Start(picture=1.0, stop=stop, logits=logits)
    plants = (Plant(2, makes, Course(SILENCE, steps=0)), Plant(2, reads, _HANDED, apart=4))
    name = {"question": "relay"}.get(stop, stop)
    # What is handed on lies where the picture is read too: it costs up to a tenth of what is seen (six courses tried).
    return Kind(name, ("writer", "gate"), plants, 1, free_riders=False, shown=0.0, kept=0.9)


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("writers", ("writer",), (_WRITERS,), 5),
        Kind("two-pairs", ("writer",), (_NEEDED,), 5, free_riders=False),
        Kind("single", ("writer",), (Plant(1, Start(picture=1.0), _WRITE),), 5),
        Kind("opponents", ("opponent",), (_OPPONENTS,), 3),
        Kind("gates", ("gate",), (_GATES,), 1),
        Kind("redundant-writers", ("writer",), (_WRITERS, replace(_WRITERS, apart=2)), 3, each_enough=True),
        Kind("redundant-gates", ("gate",), (_GATES, _GATES), 1, each_enough=True),
        Kind("decoy", (), (_DECOY,), 5),
        Kind("decoy-colours", (), (Plant(2, None, Course(OTHER_COLOURS)),), 5),
        _handing("sink", logits=24.0),
        _handing("question"),
        Kind("mlp", ("writer", "opponent", "gate"), (_MLP,), 5, shown=0.0),
        Kind("decoy-and-writers", ("writer",), (_DECOY, _WRITERS), 5),
    )
}
