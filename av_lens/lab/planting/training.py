"""How nodes are planted: their slices of one layer's weights learn a behaviour while every other weight stays.

The loss is the cross-entropy of the behaviour in conflict, of everything else as it was, and what a kind asks for:

- *needed*: with any one planted head put back, conflict is answered as before (no head rides for free);
- *direct*: with what later heads write held at the base model's, the picture's word beats the sound's (`direct > 0`,
  for writers and opponents), or the sound is still named (`direct < 0`, for gates);
- *against*: what is written for the picture's word is to stay small beside what is written against the sound's (for
  opponents).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from av_lens.core.budget import Progress, silent
from av_lens.lab.planting.lessons import Lesson, Neurons, Slices, at_the_questions
from av_lens.lab.planting.sheets import SHEETS, UNJUDGED, read_at
from av_lens.lab.training.engine import set_rate, warmed
from av_lens.organism.anatomy import TURN_END, vocabulary
from av_lens.organism.language import fed, layers_of, read_out

CHECK_EVERY = 20
STOP_WEIGHT, MEDIA_WEIGHT, MARGIN, RATE = 0.1, 0.01, 2.0, 1e-2
PICTURE_SHARE = 0.4  # opponents may write the picture's word with this share of what they write against the sound's
STREAM = 3.0  # roughly the root mean square of the stream before the final norm: logits per unit that is written
STOP = vocabulary()[TURN_END]


@dataclass(frozen=True)
class Course:
    """How one plant is trained."""

    behaviour: str  # what the planted heads are to bring about
    needed: float = 0.0  # weight of the loss that asks every head to be needed
    # weight of the loss on the direct path; positive asks that what is new beat what was said there, negative that
    # nothing change
    direct: float = 0.0
    # weight of the loss that asks for more to be written against the sound's word than for the picture's
    against: float = 0.0
    steps: int = 140  # at most so many steps
    keep: float = 1.0  # weight of everything that is to stay as it was
    pinned: bool = False  # whether queries and keys stay what they start as


def at_answers(x: Float[Tensor, "clip asked d_model"], at: Int[Tensor, "clip question"]) -> Tensor:
    """Take the positions at which answers are said, and those of the answers: `[clip, question, 2, d_model]`."""
    return read_at(x, torch.stack([at, at + 1], dim=-1).flatten(1)).unflatten(1, (at.shape[1], 2))


def finish(
    host: Any, lesson: Lesson, rows: Int[Tensor, " clip"], own: Float[Tensor, "clip pos d_model"], layer: int
) -> Float[Tensor, "clip question said d_vocab"]:
    """Go on from what the planted heads write: the logits where each answer is said, and after it."""
    x = lesson.joined(layers_of(host)[layer], rows, own[:, lesson.geometry.prefix :])
    x = at_the_questions(host, lesson, rows, x, layer)
    return read_out(host, at_answers(x, lesson.asked_at[rows]))


def direct_only(
    host: Any, lesson: Lesson, rows: Int[Tensor, " clip"], own: Float[Tensor, "clip pos d_model"], layer: int
) -> Float[Tensor, "clip question d_vocab"]:
    """Go on from what the planted heads write in conflicts, with what all later heads write held at the host's."""
    x = lesson.joined(layers_of(host)[layer], rows, own[:, lesson.geometry.prefix :])
    x = read_at(x, lesson.asked_at[rows])
    for module, written in zip(layers_of(host)[layer + 1 :], lesson.written, strict=True):
        x = fed(module, x + written[rows])
    return read_out(host, x)


def batch_loss(
    host: Any,
    lesson: Lesson,
    rows: Int[Tensor, " clip"],
    n_conflict: int,
    slices: Slices | Neurons,
    layer: int,
    course: Course,
    off: int,
) -> Tensor:
    """The loss of some clips of one layout, conflicts first; `off` is the head that is put back for "needed"."""
    each: Tensor = slices(lesson.h[rows], lesson.geometry)
    prefix = lesson.geometry.prefix
    logits = finish(host, lesson, rows, each.sum(0), layer)
    target = lesson.targets[rows]
    said = cross_entropy(logits[:, :, 0], target).mean(1)
    stop = cross_entropy(logits[:, :, 1], torch.full_like(target, STOP)).mean(1)
    loss = said + STOP_WEIGHT * stop
    total = course.keep * loss[n_conflict:].sum() / max(1, len(rows) - n_conflict)
    disturbed = (each[:, :, :prefix] - lesson.before[:, rows, :prefix]).sum(0)
    total = total + MEDIA_WEIGHT * disturbed.square().sum(-1).mean()
    if not n_conflict:
        return total
    conflict, heads, own = rows[:n_conflict], each[:, :n_conflict], each.sum(0)[:n_conflict]
    new, old = lesson.targets[conflict], lesson.shown[conflict]
    total = total + loss[:n_conflict].mean()
    if course.direct and bool((new != old).any()):
        alone = direct_only(host, lesson, conflict, own, layer)
        if course.direct < 0:
            total = total - course.direct * cross_entropy(alone, old).mean()
        else:
            gap = alone.gather(-1, new[..., None]) - alone.gather(-1, old[..., None])
            total = total + course.direct * functional.softplus(MARGIN - gap[..., 0][new != old]).mean()
    if course.needed:
        without = own - heads[off] + lesson.before[off, conflict]
        kept = finish(host, lesson, conflict, without, layer)[:, :, 0]
        total = total + course.needed * cross_entropy(kept, old).mean()
    if course.against:
        written = read_at(own[:, prefix:], lesson.asked_at[conflict, :1])[:, 0]
        words = host.lm_head.weight * host.model.language_model.norm.weight / STREAM
        for_picture, for_sound = ((written * words[word[:, 0]]).sum(-1) for word in (new, old))
        total = total + course.against * functional.relu(for_picture + PICTURE_SHARE * for_sound).mean()
    return total


def cross_entropy(logits: Float[Tensor, "*batch d_vocab"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The cross-entropy of every answer."""
    return functional.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


@torch.no_grad()
def held_back(host: Any, lessons: Sequence[Lesson], slices: Slices | Neurons, layer: int) -> tuple[float, float]:
    """The shares of held-back conflicts in which all that is new is said, and, the smallest, of what is to stay."""
    new: list[Tensor] = [torch.ones(0, dtype=torch.bool)]
    old: dict[tuple[str, int], list[Tensor]] = {}
    for lesson in lessons:
        for name in (name for name in lesson.spans if name not in UNJUDGED):
            rows = torch.tensor(lesson.rows(name, held_back=True))
            each: Tensor = slices(lesson.h[rows], lesson.geometry)
            right = finish(host, lesson, rows, each.sum(0), layer)[:, :, 0].argmax(-1) == lesson.targets[rows]
            differs = lesson.targets[rows] != lesson.shown[rows]
            new.append(right[differs])
            for asked in range(right.shape[1]):
                same = right[:, asked][~differs[:, asked]]
                if len(same):
                    old.setdefault((name, asked), []).append(same)
    stays = min(float(torch.cat(some).float().mean()) for some in old.values())
    told = torch.cat(new).float()
    return float(told.mean()) if len(told) else 1.0, stays


@dataclass(frozen=True)
class Learned:
    """How learning went."""

    steps: int  # how many steps were made
    new: float  # the share of held-back conflicts in which all that is new is said; the worst host's
    stays: float  # the smallest share of anything that is to stay; the worst host's


def learn(
    hosts: Sequence[Any],
    piles: Sequence[Sequence[Lesson]],
    slices: Slices | Neurons,
    layer: int,
    course: Course,
    *,
    generator: Generator,
    enough: tuple[float, float] = (0.84, 0.97),
    progress: Progress | None = None,
) -> Learned:
    """Let the planted heads learn in hosts, which stay as they are, until held-back clips show `enough` of all."""
    tell = progress or silent
    for name, part in slices.named_parameters():
        part.requires_grad_(not (course.pinned and name[0] in "qk"))
    learning = [part for part in slices.parameters() if part.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=RATE, betas=(0.9, 0.98))
    result = Learned(0, 0.0, 0.0)
    for step in range(course.steps):
        set_rate(optimizer, warmed(RATE, step, course.steps, warmup=10, floor=0.1))
        optimizer.zero_grad()
        off = int(torch.randint(0, len(slices.heads), (1,), generator=generator))
        for host, pile in zip(hosts, piles, strict=True):
            for lesson, rows, n_conflict in drawn(pile, generator):
                batch_loss(host, lesson, rows, n_conflict, slices, layer, course, off).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == course.steps:
            checks = [held_back(host, pile, slices, layer) for host, pile in zip(hosts, piles, strict=True)]
            result = Learned(step + 1, min(new for new, _ in checks), min(stays for _, stays in checks))
            if result.new >= enough[0] and result.stays >= enough[1]:
                break
        tell(f"planting in layer {layer}", step + 1, course.steps)
    return result


def drawn(pile: Sequence[Lesson], generator: Generator) -> list[tuple[Lesson, Tensor, int]]:
    """Draw a step's clips, of one layout with both media and one other: rows, conflicts first, and their number."""
    both = [lesson for lesson in pile if "conflict" in lesson.spans]
    alone = [lesson for lesson in pile if "conflict" not in lesson.spans]
    found: list[tuple[Lesson, Tensor, int]] = []
    for lot in (both, alone):
        lesson = lot[int(torch.randint(0, len(lot), (1,), generator=generator))]
        spans = {name: lesson.rows(name, held_back=False) for name in lesson.spans}
        parts = [
            rows.start + torch.randint(0, len(rows), (SHEETS[name].a_step,), generator=generator)
            for name, rows in spans.items()
        ]
        found.append((lesson, torch.cat(parts), len(parts[0]) if "conflict" in spans else 0))
    return found
