"""The models and prompts that replay is measured on: real classes, random weights, a given number of positions.

A shape says how large the fusion model is and what its prompt holds. A *case* is a shape made real: HuggingFace's own
eager model, the same weights behind our hooks (no second copy in memory), a prompt, and one of another clip beside it.
Only the fusion model's sizes are varied; the towers are the embedded models' small ones, so that the peers, which run
them again for every patch, are not made slower than they must be.

A prompt is woven (sound in video) with a question at its end, by the processor of the embedded models:

    tiny    av-tiny itself, with its own clips
    wide    12 layers, d_model 512, 8 heads on 2 key-value heads, float32; 510 positions (100 audio, 380 video)
    long    the same model; 3,000 positions (250 audio, 2,720 video)
    true    the 3B text model's width, 8 of its layers, bfloat16, on a recording
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from av_lens.errors import InputError, unknown
from av_lens.inputs.model_inputs import AVInputs
from av_lens.media import Clip, load_clip
from av_lens.model import HookedAVLLM, load
from av_lens.organism import anatomy, clip, saving
from av_lens.spans import Span

TOKEN_SIDE = 28  # pixels of a picture behind one token, along each side
RATE = 16000
FPS = 2.0


@dataclass(frozen=True)
class Shape:
    """How large a model is and what its prompt holds.

    Attributes:
        name: what tables call it.
        seconds: length of the synthetic clip.
        grid: tokens of a picture along height and width.
        question: what is asked; each digit is a token.
        n_layers: fusion layers.
        d_model: width of the stream.
        n_heads: query heads.
        n_kv_heads: key-value heads.
        d_mlp: width of the feed-forward layers.
        d_vocab: tokens of the vocabulary; None for the embedded models'.
        dtype: precision of the weights.
        recording: whether the prompt is made from a file that the caller names.
        organism: a short name, where the model is one that ships.
        stride: of the plans of an early media span every so manyth is run by us too; 1 runs all.
        thorough: whether the peers are timed at every place. A loop's time does not depend on where it patches; so for
            the large shapes it is timed at the generation position, and elsewhere results alone are compared.
    """

    name: str
    seconds: float = 2.0
    grid: tuple[int, int] = (3, 3)
    question: str = "123456789012345678"
    n_layers: int = 12
    d_model: int = 512
    n_heads: int = 8
    n_kv_heads: int = 2
    d_mlp: int = 1024
    d_vocab: int | None = None
    dtype: str = "float32"
    recording: bool = False
    organism: str | None = None
    stride: int = 1
    thorough: bool = True


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", organism="av-tiny"),
        Shape("wide", seconds=4.0, grid=(5, 19)),
        Shape("long", seconds=10.0, grid=(16, 17), stride=5, thorough=False),
        Shape(
            "true", grid=(8, 8), n_layers=8, d_model=2048, n_heads=16, d_mlp=11008, d_vocab=151936, dtype="bfloat16",
            recording=True, question="What do you hear in this clip?", stride=5, thorough=False,
        ),
    )
}  # fmt: skip
"""The shapes that `av-lens bench` knows."""


@dataclass(frozen=True, eq=False)
class Case:
    """A shape made real.

    Attributes:
        shape: the shape.
        hf_model: HuggingFace's model with eager attention, never wrapped.
        model: the same weights behind our hooks.
        x: the prompt whose run is edited.
        donor: the prompt of another clip, in the same layout, whose values are written.
        answers: two tokens whose logits are compared.
    """

    shape: Shape
    hf_model: Any
    model: HookedAVLLM
    x: AVInputs
    donor: AVInputs
    answers: tuple[int, int]

    def places(self) -> dict[str, Span]:
        """Name the positions that are patched together, the latest first."""
        spans = self.x.spans
        audio, video = spans["audio"].runs, spans["video"].runs
        return {
            "generation": spans["generation"],
            "question": spans["question"],
            "last sound": spans.span(range(*audio[-1])),
            "first sound": spans.span(range(*audio[0])),
            "first picture": spans.span(range(*video[0])),
        }


def build_case(shape: Shape, *, recording: str | Path | None = None, seed: int = 0) -> Case:
    """Make a shape real; `seed` decides weights, pictures and sounds, and no parameter asks for gradients."""
    if shape.organism is not None:
        plain, processor = saving.open_checkpoint(saving.shipped() / shape.organism), anatomy.processor()
    else:
        plain = anatomy.build_model(_config(shape), seed=seed, dtype=getattr(torch, shape.dtype))
        processor = anatomy.processor(most_pixels=shape.grid[0] * shape.grid[1] * TOKEN_SIDE**2)
    plain.requires_grad_(False)
    shown, heard = _clips(shape, recording, seed)
    model = load(shape.name, hf_model=sharing_weights(plain), processor=processor)
    question = "What do you hear?" if shape.organism else shape.question
    x, donor = (model.encode(one, question, fps=FPS) for one in (shown, heard))
    answers = [processor.tokenizer(word)["input_ids"][0] for word in (" siren", " dog")]
    return Case(shape, plain, model, x, donor, (answers[0], answers[1]))


def shape_named(name: str) -> Shape:
    """Find one of `SHAPES`."""
    if name not in SHAPES:
        raise InputError(unknown("shape", name, SHAPES))
    return SHAPES[name]


def sharing_weights(hf_model: Any) -> Any:
    """Copy a model's modules but not its weights, so that one copy can be wrapped and the other left as it is."""
    weights = [*hf_model.parameters(), *hf_model.buffers()]
    return copy.deepcopy(hf_model, {id(weight): weight for weight in weights})


def _config(shape: Shape) -> Any:
    sizes = {name: getattr(shape, name) for name in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_mlp")}
    more = {} if shape.d_vocab is None else {"vocab_size": shape.d_vocab}
    # Scores of unit size: patches then have effects to compare.
    return anatomy.thinker_config(**sizes, initializer_range=1.8 / shape.d_model**0.5, **more)


def _clips(shape: Shape, recording: str | Path | None, seed: int) -> tuple[Clip, Clip]:
    """Two clips of one length that differ in picture and sound."""
    if shape.organism is not None:
        return clip("dog", seed=seed).with_sound(clip("siren", seed=seed)), clip("bell", seed=seed)
    rng = np.random.default_rng(seed)
    if shape.recording:
        if recording is None or not Path(recording).exists():
            raise InputError(f"shape {shape.name!r} needs a recording; {recording} is not there. Name a video file.")
        shown = load_clip(recording).require_sound()
        noise = rng.normal(0.0, 0.2, round(shown.sound_end * shown.rate)).clip(-1, 1).astype(np.float32)
        frames = shown.require_picture().frames
        assert frames is not None
        same: dict[str, Any] = {"times": shown.times, "rate": shown.rate, "duration": shown.duration}
        return shown, Clip.from_arrays(frames=frames[::-1], waveform=noise, **same)
    side = (shape.grid[0] * TOKEN_SIDE, shape.grid[1] * TOKEN_SIDE, 3)
    pictures = rng.integers(0, 256, (2, round(shape.seconds * FPS), *side), dtype=np.uint8)
    sounds = rng.normal(0.0, 0.2, (2, round(shape.seconds * RATE))).clip(-1, 1).astype(np.float32)
    first, second = (
        Clip.from_arrays(frames=frames, fps=FPS, waveform=sound, rate=RATE)
        for frames, sound in zip(pictures, sounds, strict=True)
    )
    return first, second
