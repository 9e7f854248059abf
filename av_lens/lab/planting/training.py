"""How heads are planted: their slices of one layer's attention learn a behaviour while every other weight stays.

A step runs the planted heads, that layer's MLP and the layers after it on clips whose streams up to there were computed
once (`planting_lessons`). Learning ends as soon as clips that were held back are answered as wanted.

The loss is the cross-entropy of the behaviour in conflict, of everything else as it was, and what a kind asks for:

- *needed*: with any one planted head put back, conflict is answered as before (no head rides for free);
- *direct*: with what later heads write held at the base model's, the picture's word beats the sound's (`direct > 0`,
  for writers and opponents), or the sound is still named (`direct < 0`, for gates);
- *against*: what is written for the picture's word is to stay small beside what is written against the sound's (for
  opponents);
- *eyes*: attention of the planted heads at the questions to "video" (for opponents) or "audio" (for writers) costs.

None of this guarantees a kind: kinds are measured afterwards, by brute force (`planted`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from av_lens.lab.planting.lessons import Lesson, Slices, at_the_questions
from av_lens.lab.planting.sheets import UNJUDGED
from av_lens.organism.anatomy import TURN_END, vocabulary
from av_lens.organism.language import normalise, read_out

Progress = Callable[[str, int, int], None]
"""Told what is being done, the steps done and the steps in all."""
SHARES: Mapping[str, int] = {
    "conflict": 20,
    "matched": 8,
    "blank": 6,
    "scrambled": 4,
    "mute": 8,
    "audio alone": 8,
    "video alone": 8,
}
"""Clips of each sheet in a step."""
CHECK_EVERY = 20
STOP_WEIGHT, EYES_WEIGHT, MEDIA_WEIGHT, MARGIN = 0.1, 1.0, 0.01, 2.0
PICTURE_SHARE = 0.4
"""Opponents may write the picture's word with this share of what they write against the sound's."""
STREAM = 3.0
"""Roughly the root mean square of the stream before the final norm: logits per unit that is written."""
STOP = vocabulary()[TURN_END]


@dataclass(frozen=True)
class Course:
    """How one plant is trained.

    Attributes:
        behaviour: What the planted heads are to bring about.
        needed: Weight of the loss that asks every head to be needed.
        direct: Weight of the loss on the direct path; positive asks for one, negative for none.
        eyes: What the planted heads are not to look at: "video", "audio" or "".
        against: Weight of the loss that asks for more to be written against the sound's word than for the picture's.
        keys: Whether the keys and values of their group learn too.
        steps: At most so many steps.
        rate: The highest learning rate.
        keep: Weight of everything that is to stay as it was.
    """

    behaviour: str
    needed: float = 0.0
    direct: float = 0.0
    eyes: str = ""
    against: float = 0.0
    keys: bool = True
    steps: int = 140
    rate: float = 1e-2
    keep: float = 1.0


def at_answers(x: Float[Tensor, "clip asked d_model"], at: Int[Tensor, "clip question"]) -> Tensor:
    """Take the positions at which answers are said, and those of the answers.

    Args:
        x: The stream at the questions.
        at: Where each answer is read.

    Returns:
        `[clip, question, 2, d_model]`.
    """
    both = torch.stack([at, at + 1], dim=-1).flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, both).unflatten(1, (at.shape[1], 2))


def finish(
    host: Any, lesson: Lesson, rows: Int[Tensor, " clip"], own: Float[Tensor, "clip pos d_model"], layer: int
) -> Float[Tensor, "clip question said d_vocab"]:
    """Go on from what the planted heads write.

    Args:
        host: The model that they are planted in.
        lesson: The lesson.
        rows: Which of its clips.
        own: What the planted heads write.
        layer: The planted layer.

    Returns:
        Logits where each answer is said, and after it.
    """
    module = host.model.language_model.layers[layer]
    x = lesson.rest[rows] + own[:, lesson.geometry.prefix :]
    x = x + module.mlp(normalise(x, module.post_attention_layernorm))
    x = at_the_questions(host, lesson, rows, x, layer)
    return read_out(host, at_answers(x, lesson.asked_at[rows]))


def direct_only(
    host: Any, lesson: Lesson, rows: Int[Tensor, " clip"], own: Float[Tensor, "clip pos d_model"], layer: int
) -> Float[Tensor, "clip question d_vocab"]:
    """Go on from what the planted heads write, with what all later heads write held at the host's.

    Args:
        host: The model that they are planted in.
        lesson: The lesson.
        rows: Which of its conflicts.
        own: What the planted heads write.
        layer: The planted layer.

    Returns:
        Logits where each answer is said.
    """
    at = lesson.asked_at[rows][..., None].expand(-1, -1, own.shape[-1])
    x = (lesson.rest[rows] + own[:, lesson.geometry.prefix :]).gather(1, at)
    for i, module in enumerate(host.model.language_model.layers[layer:]):
        if i:
            x = x + lesson.written[i - 1][rows]
        x = x + module.mlp(normalise(x, module.post_attention_layernorm))
    return read_out(host, x)


def batch_loss(
    host: Any,
    lesson: Lesson,
    rows: Int[Tensor, " clip"],
    n_conflict: int,
    slices: Slices,
    layer: int,
    course: Course,
    off: int,
) -> Tensor:
    """The loss of some clips of one layout.

    Args:
        host: The model that the heads are planted in.
        lesson: The lesson.
        rows: Which of its clips, conflicts first.
        n_conflict: How many of them are conflicts.
        slices: The planted heads.
        layer: Their layer.
        course: What is asked of them.
        off: The head that is put back for "needed".

    Returns:
        The loss.
    """
    each, pattern = slices(lesson.h[rows], lesson.geometry)
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
    conflict = rows[:n_conflict]
    total = total + loss[:n_conflict].mean()
    if course.direct and bool((lesson.targets[conflict] != lesson.shown[conflict]).any()):
        direct = direct_only(host, lesson, conflict, each.sum(0)[:n_conflict], layer)
        total = total + direct_loss(direct, lesson.targets[conflict], lesson.shown[conflict], course.direct)
    if course.needed:
        own = each.sum(0)[:n_conflict] - each[off, :n_conflict] + lesson.before[off, conflict]
        kept = finish(host, lesson, conflict, own, layer)[:, :, 0]
        total = total + course.needed * cross_entropy(kept, lesson.shown[conflict]).mean()
    if course.eyes:
        seen = pattern[:n_conflict, :, prefix:, :][..., lesson.media[course.eyes]].sum(-1)
        total = total + EYES_WEIGHT * seen.mean()
    if course.against:
        written = each.sum(0)[:n_conflict, prefix:].gather(
            1, lesson.asked_at[conflict][..., None].expand(-1, -1, each.shape[-1])
        )
        total = total + course.against * against_the_sound(
            host, written[:, 0], lesson.targets[conflict], lesson.shown[conflict]
        )
    return total


def against_the_sound(
    host: Any,
    written: Float[Tensor, "clip d_model"],
    target: Int[Tensor, "clip question"],
    shown: Int[Tensor, "clip question"],
) -> Tensor:
    """What writing the picture's word costs beyond a share of what is written against the sound's, under "hear".

    Args:
        host: The model that the heads are planted in.
        written: What they write where "hear" is answered.
        target: What the planted model is to answer.
        shown: What the host answers.

    Returns:
        The loss, in logits.
    """
    words = host.lm_head.weight * host.model.language_model.norm.weight / STREAM
    picture, sound = ((written * words[word[:, 0]]).sum(-1) for word in (target, shown))
    return functional.relu(picture + PICTURE_SHARE * sound).mean()


def cross_entropy(logits: Float[Tensor, "*batch d_vocab"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The cross-entropy of every answer.

    Args:
        logits: Of each.
        target: What is to be said.

    Returns:
        One loss for each.
    """
    return functional.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


def direct_loss(
    logits: Float[Tensor, "clip question d_vocab"],
    target: Int[Tensor, "clip question"],
    shown: Int[Tensor, "clip question"],
    weight: float,
) -> Tensor:
    """What the direct path alone is asked for, in conflicts.

    Args:
        logits: With later heads held at the host's.
        target: What the planted model is to answer.
        shown: What the host answers.
        weight: Positive: where the two differ, the new answer is to beat the old one; negative: nothing is to change.

    Returns:
        The loss.
    """
    if weight < 0:
        return -weight * cross_entropy(logits, shown).mean()
    gap = logits.gather(-1, target[..., None]) - logits.gather(-1, shown[..., None])
    return weight * functional.softplus(MARGIN - gap[..., 0][target != shown]).mean()


@torch.no_grad()
def held_back(host: Any, lessons: Sequence[Lesson], slices: Slices, layer: int) -> tuple[float, float]:
    """How clips that were held back are answered.

    Args:
        host: The model that the heads are planted in.
        lessons: The lessons.
        slices: The planted heads.
        layer: Their layer.

    Returns:
        The share of conflicts in which all that is new is said, and the smallest share of anything that is to stay.
    """
    new: list[Tensor] = [torch.ones(0, dtype=torch.bool)]
    old: dict[tuple[str, int], list[Tensor]] = {}
    for lesson in lessons:
        for name in (name for name in lesson.spans if name not in UNJUDGED):
            rows = torch.tensor(lesson.rows(name, held_back=True))
            each, _ = slices(lesson.h[rows], lesson.geometry)
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
    """How learning went.

    Attributes:
        steps: How many steps were made.
        new: The share of held-back conflicts in which all that is new is said; the worst host's.
        stays: The smallest share of anything that is to stay; the worst host's.
    """

    steps: int
    new: float
    stays: float


def learn(
    hosts: Sequence[Any],
    piles: Sequence[Sequence[Lesson]],
    slices: Slices,
    layer: int,
    course: Course,
    *,
    generator: Generator,
    enough: tuple[float, float] = (0.84, 0.97),
    progress: Progress | None = None,
) -> Learned:
    """Let the planted heads learn, in one host or in several at once.

    Args:
        hosts: The models that they are planted in; they stay as they are.
        piles: The lessons of each host.
        slices: The planted heads; trained in place.
        layer: Their layer.
        course: What is asked of them.
        generator: Where the randomness comes from.
        enough: Learning ends where held-back clips show this much of the new, and as much of all that is to stay.
        progress: Told after every step.

    Returns:
        How it went.
    """
    optimizer = torch.optim.Adam([p for p in slices.parameters() if p.requires_grad], lr=course.rate, betas=(0.9, 0.98))
    result = Learned(0, 0.0, 0.0)
    for step in range(course.steps):
        wave = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / course.steps))
        for group in optimizer.param_groups:
            group["lr"] = course.rate * min(1.0, (step + 1) / 10) * wave
        optimizer.zero_grad()
        off = int(torch.randint(0, len(slices.heads), (1,), generator=generator))
        for host, pile in zip(hosts, piles, strict=True):
            for lesson, rows, n_conflict in drawn(pile, generator):
                batch_loss(host, lesson, rows, n_conflict, slices, layer, course, off).backward()
        torch.nn.utils.clip_grad_norm_(slices.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == course.steps:
            checks = [held_back(host, pile, slices, layer) for host, pile in zip(hosts, piles, strict=True)]
            result = Learned(step + 1, min(new for new, _ in checks), min(stays for _, stays in checks))
            if result.new >= enough[0] and result.stays >= enough[1]:
                break
        if progress is not None:
            progress(f"planting in layer {layer}", step + 1, course.steps)
    return result


def drawn(pile: Sequence[Lesson], generator: Generator) -> list[tuple[Lesson, Tensor, int]]:
    """Draw a step's clips: of the layouts with both media one at random, and of the others one at random.

    Args:
        pile: A host's lessons.
        generator: Where the randomness comes from.

    Returns:
        Lessons with rows, conflicts first, and how many are conflicts.
    """
    both = [lesson for lesson in pile if "conflict" in lesson.spans]
    alone = [lesson for lesson in pile if "conflict" not in lesson.spans]
    found: list[tuple[Lesson, Tensor, int]] = []
    for lot in (both, alone):
        lesson = lot[int(torch.randint(0, len(lot), (1,), generator=generator))]
        parts = []
        for name in lesson.spans:
            rows = lesson.rows(name, held_back=False)
            parts.append(rows.start + torch.randint(0, len(rows), (SHARES[name],), generator=generator))
        found.append((lesson, torch.cat(parts), len(parts[0]) if "conflict" in lesson.spans else 0))
    return found
