"""What the embedded models learn from: pools of clips, items of every stage, and batches of them.

A pool depends on the towers (their seed) and the world, not on the language model. `Items("both", "matched", 20,
(Ask("hear", "sound", 3), Ask("see", "picture", 1)))`: a step has 20 clips with sound and picture of one class, three in
four questions are "what do you hear ?", and the right answer is the class of the sound.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Generator, Tensor

from av_lens.errors import ModelError
from av_lens.media import Clip
from av_lens.organism import anatomy, language
from av_lens.organism.anatomy import CLASSES
from av_lens.organism.footage import mel
from av_lens.organism.language import IGNORED, NOTHING, Frame, Views, make_frame, watch
from av_lens.organism.sounds import N_SAMPLES, RATE
from av_lens.whole_files import reading, whole_file


@dataclass(frozen=True, eq=False)
class FeaturePool:
    """Tower outputs of one split's clips."""

    video: Float32[Tensor, "clip video_pos d_model"]  # what is put at the video tokens
    audio_hidden: Float32[Tensor, "clip audio_pos d_tower"]  # the input of the audio tower's projector
    audio: Float32[Tensor, "clip audio_pos d_model"]  # what is put at the audio tokens: the projector's output
    label: Int64[Tensor, " clip"]  # class of the picture and of the sound
    colour: Int64[Tensor, " clip"]  # colour of the picture
    seed: Int64[Tensor, " clip"]  # `footage.example(split, class, seed)` makes the clip again
    blank_video: Float32[Tensor, "blank video_pos d_model"]  # pictures that show nothing
    blank_kind: Int64[Tensor, " blank"]  # which kind of nothing: 0 black, 1 dim, 2 scrambled
    mute_audio_hidden: Float32[Tensor, "blank audio_pos d_tower"]  # sounds that say nothing, before the projector
    mute_audio: Float32[Tensor, "blank audio_pos d_model"]  # the same after it
    mute_kind: Int64[Tensor, " blank"]  # which kind of nothing: 0 silence, 1 noise, 2 louder noise
    hashes: tuple[tuple[str, str], ...]  # each clip's picture hash and sound hash, after mp4


@torch.no_grad()
def make_pool(
    model: Any, views: Views, hashes: list[list[str]] | None = None, *, blank_every: int = 8, seed: int = 0
) -> FeaturePool:
    """Run a model's towers over a split."""
    project = model.model.audio_tower.proj
    video, hidden = watch(model, views)
    empty = nothing(views, every=blank_every, seed=seed)
    blank, mute = watch(model, empty)
    per_class = int((views.picture == 0).sum())
    kind = torch.arange(len(blank)) % 3
    return FeaturePool(
        video=video,
        audio_hidden=hidden,
        audio=project(hidden),
        label=views.picture.clone(),
        colour=views.colour.clone(),
        seed=torch.arange(len(video)) % per_class,
        blank_video=blank,
        blank_kind=kind,
        mute_audio_hidden=mute,
        mute_audio=project(mute),
        mute_kind=kind.clone(),
        hashes=tuple((picture, sound) for picture, sound in hashes or ()),
    )


def save_pool(pool: FeaturePool, path: str | os.PathLike[str]) -> None:
    """Write a pool as one safetensors file."""
    from safetensors.torch import save_file

    tensors = {field.name: getattr(pool, field.name) for field in fields(pool) if field.name != "hashes"}
    with whole_file(Path(path)) as beside:
        save_file(tensors, beside, metadata={"schema": "1", "hashes": json.dumps(pool.hashes)})


def load_pool(path: str | os.PathLike[str]) -> FeaturePool:
    """Read a pool."""
    from safetensors import safe_open

    with reading(Path(path)), safe_open(os.fspath(path), "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("schema") != "1":
            raise ModelError(f"{os.fspath(path)} is no feature pool of schema 1 (found {metadata.get('schema')}).")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return FeaturePool(**tensors, hashes=tuple((a, b) for a, b in json.loads(metadata["hashes"])))


def nothing(of: Views, *, every: int, seed: int) -> Views:
    """Blank the pictures and mute the sounds of some clips, as `Clip.blank` and `Clip.muted` do."""
    rng = np.random.default_rng([5, seed])
    frames, waves = of.frames[::every].clone(), []
    quiet_clip = Clip.from_arrays(waveform=np.zeros(N_SAMPLES, np.float32), rate=RATE)
    for at in range(len(frames)):
        draw = int(rng.integers(1 << 31))
        if at % 3 == 0:
            frames[at] = 0
        elif at % 3 == 1:
            frames[at] = torch.from_numpy((rng.uniform(0, 0.22, 3) * 255).astype(np.uint8))
        else:
            clip = Clip.from_arrays(frames=frames[at].numpy(), fps=4.0)
            frames[at] = torch.from_numpy(np.array(clip.blank(kind="scrambled", seed=draw).frames))
        waves.append(quiet_clip.muted(kind="silence" if at % 3 == 0 else "noise", seed=draw).waveform)
        if at % 3 == 2:
            waves[-1] = waves[-1] * rng.uniform(0.02, 1.5)
    spectra = np.concatenate([mel(waves[start : start + 50]) for start in range(0, len(waves), 50)])
    none = torch.full((len(frames),), NOTHING)
    return Views(frames, torch.from_numpy(spectra), none, none, torch.full((len(frames),), IGNORED))


def joined(first: Views, second: Views) -> Views:
    """Put two lots of clips one after the other."""
    return Views(*(torch.cat([getattr(one, field.name) for one in (first, second)]) for field in fields(Views)))


PICTURE_SLOT, SOUND_SLOT = -1, -2


@dataclass(frozen=True, eq=False)
class Words:
    """Token ids of questions and answers."""

    # for each kind, its phrasings: all tokens after the media, up to the answer
    questions: Mapping[str, tuple[tuple[int, ...], ...]]
    classes: Int[Tensor, " n_classes"]  # one token for each class
    colours: Int[Tensor, " n_colours"]  # one token for each colour
    nothing: int  # the token of "nothing"
    stop: int  # the token that ends an answer
    # the tokens of a caption, with `PICTURE_SLOT` for the picture's words and `SOUND_SLOT` for the sound's
    caption: tuple[int, ...]
    article: int  # the token that goes before a class in a caption


@dataclass(frozen=True, eq=False)
class Material:
    """All that training needs beside the model."""

    pool: FeaturePool  # features to learn from
    words: Words  # token ids of questions and answers
    frames: Mapping[str, tuple[Frame, ...]]  # for each kind of media ("both", "audio", "video") the layouts it comes in


def make_words() -> Words:
    """Spell the grammar in tokens: questions (with all that follows them up to the answer) and answers."""
    suffixes: dict[str, tuple[tuple[int, ...], ...]] = {}
    for kind, phrasings in anatomy.QUESTIONS.items():
        suffixes[kind] = tuple(tuple(language.prompt(phrasing, "separate").asked) for phrasing in phrasings)
    see, hear = language.answer_ids("i see"), language.answer_ids("and hear")
    return Words(
        questions=suffixes,
        classes=language.class_ids(),
        colours=torch.tensor([language.answer_ids(name)[0] for name in anatomy.COLOURS]),
        nothing=language.answer_ids(anatomy.NOTHING)[0],
        stop=anatomy.vocabulary()[anatomy.TURN_END],
        caption=(*see, PICTURE_SLOT, *hear, SOUND_SLOT),
        article=language.answer_ids("a")[0],
    )


def material(pool: FeaturePool) -> Material:
    """Gather what training needs: the pool with the grammar's tokens and all layouts."""
    frames = {"both": ("separate", "in_video"), "audio": ("audio",), "video": ("video",)}
    return Material(pool, make_words(), {media: tuple(map(make_frame, names)) for media, names in frames.items()})


MEDIA = ("both", "audio", "video")
RELATIONS = ("matched", "conflict", "unrelated", "mute", "blank", "empty")
RIGHT = ("picture", "sound", "colour", "nothing", "random", "caption")


@dataclass(frozen=True)
class Ask:
    """A kind of question and what its right answer is."""

    kind: str  # "see", "hear", "colour" or "caption"
    # what the answer names: the class of the "picture" or of the "sound", the "colour", "nothing", a "random" class, or
    # a "caption" of picture and sound
    right: str
    weight: float = 1.0  # how often it is asked, in proportion to the other questions of the same items
    drop: float = 0.0  # the share of these questions at which heads are dropped (see `engine.Stage.dropped_heads`)

    def __post_init__(self) -> None:
        if self.right not in RIGHT:
            raise ValueError(f"right must be one of {RIGHT}, not {self.right!r}")


@dataclass(frozen=True)
class Items:
    """Some of a training step's clips."""

    media: str  # which streams the prompt has: "both", "audio" or "video"
    # how sound and picture go together: "matched", "conflict" (never the same class), "unrelated" (independent), "mute"
    # (no sound to hear), "blank" (nothing to see), "empty" (neither)
    relation: str
    clips: float  # how many clips a step has on average
    asks: tuple[Ask, ...]  # the questions
    deaf_to: str = ""  # "video": text and audio positions may not look at the video positions; "" : all is seen

    def __post_init__(self) -> None:
        if self.media not in MEDIA or self.relation not in RELATIONS:
            raise ValueError(f"media must be one of {MEDIA} and relation one of {RELATIONS}")


@dataclass(frozen=True, eq=False)
class Clips:
    """Clips drawn for a step: their features, and what is on them."""

    video: Float[Tensor, "clip video_pos d_model"]  # features of the pictures
    audio: Float[Tensor, "clip audio_pos d_model"]  # features of the sounds
    picture: Int[Tensor, " clip"]  # class of each picture, -1 where there is nothing to see
    sound: Int[Tensor, " clip"]  # class of each sound, -1 where there is nothing to hear
    colour: Int[Tensor, " clip"]  # colour of each picture, -1 where there is nothing to see


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
    """The questions put to some clips, filled up to one width."""

    ids: Int[Tensor, "clip asked"]  # tokens of the questions and their answers
    targets: Int[Tensor, "clip asked"]  # the token to be said next at each position, `IGNORED` where nothing is learned
    weights: Float[Tensor, "clip asked"]  # what each target counts
    dropped: Float[Tensor, "clip question"]  # whether heads are dropped at each question


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
    """Ask each clip `blocks` questions, each of weight about 1 / `blocks`; `after` weighs a caption's fixed words."""
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
