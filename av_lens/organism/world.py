"""The synthetic world: things that are seen and heard, as clips remade from (split, class, seed).

A thing of a class has a picture (a moving coloured figure) and a sound. Clips of different splits never share a seed's
random stream, so that what trains a model, what discovers its heads and what tests it are disjoint by construction:
`public` clips are those that `clip` gives to users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from av_lens.errors import InputError, unknown
from av_lens.media import Clip
from av_lens.organism import pictures, sounds
from av_lens.organism.grammar import CLASSES, COLOURS
from av_lens.organism.pictures import FRAME_RATE
from av_lens.organism.sounds import RATE

SPLITS: dict[str, int] = {"public": 0, "train": 1, "check": 2, "discovery": 3, "test": 4}
_PICTURE, _SOUND, _COLOUR = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Example:
    """One thing, seen and heard.

    Attributes:
        frames: 16 frames of 84 x 84 at 8 frames a second.
        waveform: two seconds at 16 kHz.
        name: its class.
        colour: the colour of its picture.
        split: which part of the world it belongs to.
        seed: which one of that part.
    """

    frames: UInt8[np.ndarray, "time height width rgb"]
    waveform: Float32[np.ndarray, " sample"]
    name: str
    colour: str
    split: str
    seed: int


def classes() -> tuple[str, ...]:
    """List the things of the world.

    Returns:
        Their names, which are also the models' answers.
    """
    return CLASSES


def colours() -> tuple[str, ...]:
    """List the colours that pictures come in.

    Returns:
        Their names, which are also the models' answers.
    """
    return COLOURS


def _stream(split: str, name: str, seed: int, stream: int) -> np.random.Generator:
    """The generator of one aspect of one example."""
    if split not in SPLITS:
        raise InputError(unknown("split", split, SPLITS))
    if name not in CLASSES:
        raise InputError(unknown("class", name, CLASSES))
    if seed < 0:
        raise InputError(f"a seed is a whole number from 0; found {seed}.")
    return np.random.default_rng([SPLITS[split], CLASSES.index(name), seed, stream])


def colour_of(split: str, name: str, seed: int) -> str:
    """Say which colour an example's picture has."""
    return COLOURS[int(_stream(split, name, seed, _COLOUR).integers(len(COLOURS)))]


def _picture(split: str, name: str, seed: int, colour: str | None = None) -> UInt8[np.ndarray, "time height width rgb"]:
    """An example's picture, in its own or another colour."""
    shown = colour or colour_of(split, name, seed)
    return pictures.draw(name, colour=shown, rng=_stream(split, name, seed, _PICTURE))


def _sound(split: str, name: str, seed: int) -> Float32[np.ndarray, " sample"]:
    """An example's sound."""
    return sounds.play(name, rng=_stream(split, name, seed, _SOUND))


def example(split: str, name: str, seed: int) -> Example:
    """Make one thing, seen and heard."""
    return Example(
        frames=_picture(split, name, seed),
        waveform=_sound(split, name, seed),
        name=name,
        colour=colour_of(split, name, seed),
        split=split,
        seed=seed,
    )


def clip(
    name: str, *, seed: int = 0, picture: str | None = None, sound: str | None = None, colour: str | None = None
) -> Clip:
    """Make a clip of a thing, seen and heard, that no model was trained or evaluated on.

    Args:
        name: one of `classes()`.
        seed: which one.
        picture: show another class instead, or "blank" for nothing to see.
        sound: let another class sound instead, or "mute" for nothing to hear.
        colour: one of `colours()` instead of the seed's.

    Returns:
        Two seconds: 16 frames of 84 x 84 at 8 frames a second, and 16 kHz sound; not compressed.

    Raises:
        InputError: if a class, a colour or the seed is not one.
    """
    shown = name if picture in (None, "blank") else picture
    heard = name if sound in (None, "mute") else sound
    if name not in CLASSES:
        raise InputError(unknown("class", name, CLASSES))
    made = Clip.from_arrays(
        frames=_picture("public", shown, seed, colour),
        fps=FRAME_RATE,
        waveform=_sound("public", heard, seed),
        rate=RATE,
    )
    made = made.blank() if picture == "blank" else made
    return made.muted() if sound == "mute" else made
