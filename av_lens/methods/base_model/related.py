"""Two models of one descent: an audio-visual model and the vision-language model that it was made from.

The base is given the model's prompt in one of three ways:

    "out"      the sound's positions taken out: the prompt made anew of picture and question (`inputs.soundless`)
    "masked"   the model's own prompt, in which nothing reads the sound's positions: distances stay as they are
    "kept"     the model's own prompt, sound and all, for a base that takes sound

Refused: vocabularies of different sizes, and prompts that differ in more than the sound.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from av_lens.checks import require_choice
from av_lens.errors import ModelError
from av_lens.inputs import AVInputs
from av_lens.inputs.soundless import shared_positions, without_sound
from av_lens.interventions import Plan, cut
from av_lens.model.loading import load
from av_lens.spans import ROLES

AUDIO = ("out", "masked", "kept")
_READERS = "|".join(role for role in ROLES if role != "audio")


def opened(base: Any, model: Any) -> Any:
    """Open the base and refuse one whose answers cannot be compared with the model's."""
    found = load(base, device=model.device, dtype=model.dtype) if isinstance(base, str | Path) else base
    sizes = int(model.spec.d_vocab), int(found.spec.d_vocab)
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{model.name} has {sizes[0]} tokens and {found.name} {sizes[1]}, so their distributions cannot be "
            "compared. Give the model that this one was made from."
        )
    return found


def require_equal_sizes(model: Any, base: Any, mend: str) -> None:
    """Refuse models whose heads or streams are no counterparts."""
    for name in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head"):
        sizes = int(getattr(model.spec, name)), int(getattr(base.spec, name))
        if sizes[0] != sizes[1]:
            raise ModelError(f"{model.name} has {name} = {sizes[0]} and {base.name} {sizes[1]}: {mend}")


def prompt_for(base: Any, x: AVInputs, audio: str) -> AVInputs:
    """Make the base's prompt."""
    require_choice("way with the sound, audio=", audio, AUDIO)
    if audio != "out":
        return x
    silent = without_sound(base, x)
    shared_positions(x, silent, base.config)
    return silent


def deaf_plan(x: AVInputs, audio: str) -> Plan:
    """Make the plan under which the base runs."""
    return Plan(cut(_READERS, "audio")) if audio == "masked" and len(x.spans.audio) else Plan()


def matched(
    x: AVInputs, other: AVInputs, config: Any
) -> tuple[Int64[np.ndarray, " shared"], Int64[np.ndarray, " shared"]]:
    """Match positions of the model's prompt and the base's."""
    if x.layout == other.layout and x.spans.layout_difference(other.spans) is None:
        everything = np.arange(len(x.spans), dtype=np.int64)
        return everything, everything
    return shared_positions(x, other, config)
