"""A tiny wrapped thinker and small stacks of inputs, built once for the tests that edit and replay."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from tiny import tiny_hf_model, tiny_media, tiny_processor

import av_lens as avl


@cache
def small_model() -> Any:
    """Four layers, four query heads on two key-value heads, float32, random weights."""
    return avl.load("tiny", hf_model=tiny_hf_model(), processor=tiny_processor())


def small_clip(seed: int, seconds: float = 2.0) -> Any:
    frames, waveform = tiny_media(seconds, seed=seed)
    return avl.Clip.from_arrays(frames=frames, times=np.arange(len(frames)) / 2, waveform=waveform, rate=16000)


@cache
def small_inputs(seeds: tuple[int, ...] = (0, 1), question: str = "What?", sound: str = "in_video") -> Any:
    """A stack of clips with one question."""
    model = small_model()
    return avl.AVInputs.stack([model.encode(small_clip(seed), question, sound=sound) for seed in seeds])


@cache
def ungrouped_model() -> Any:
    """The small model with every key-value head written out once for each query head that shares it."""
    grouped, whole = tiny_hf_model(), tiny_hf_model(n_kv_heads=4)
    state = grouped.state_dict()
    for name, tensor in state.items():
        if "language_model.layers" in name and ("k_proj" in name or "v_proj" in name):
            state[name] = tensor.unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    return avl.load("ungrouped", hf_model=whole, processor=tiny_processor())
