"""The words for axes, in one place.

Every signature and docstring of av_lens names its axes with these words, so that `[batch, pos, head, d_head]` means
one thing everywhere. Media axes carry their unit in the explanation.
"""

from __future__ import annotations

from types import MappingProxyType

AXES = MappingProxyType(
    {
        "batch": "examples that run together",
        "pos": "positions of the prompt, as the fusion layers see them",
        "new_pos": "positions that decoding adds",
        "one": "a single number, kept as an axis",
        "query_pos": "positions that attend",
        "key_pos": "positions that are attended to",
        "head": "attention heads (query heads where layers share keys and values)",
        "kv_head": "key-value heads",
        "d_head": "the width of one head",
        "d_model": "the width of the residual stream",
        "d_mlp": "hidden units of an MLP",
        "d_vocab": "tokens of the vocabulary",
        "layer": "fusion layers, counted from 0",
        "example": "items of a data set, pairs or conflicts",
        "plan": "intervention plans that run side by side",
        "asked_pos": "positions at which logits are asked for; the last one is the generation position",
        "time": "frames of a clip, each with its time in seconds",
        "height": "rows of a frame, in pixels",
        "width": "columns of a frame, in pixels",
        "rgb": "red, green and blue",
        "sample": "samples of a waveform, at its rate in Hz",
    }
)
"""Axis name -> what it counts."""
