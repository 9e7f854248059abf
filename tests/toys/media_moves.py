"""What moves where the layers begin, once a second of sound or a square of the picture is another; and what should.

The towers' attention is switched off, so that each of their rows depends on its own piece of the medium.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from small_av import small_clip

MIXING = ("Attention", "CausalConv")  # in the names of modules that let a tower's positions read each other
MOST = 13  # squares: about so many are changed, one by one, of a larger picture
RIM = 3  # pixels of a square that a resized picture shares with its neighbours


def _nothing(part: Any, inputs: Any, output: Any) -> Any:
    return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output


@torch.no_grad()
def entering(model: Any, x: Any) -> torch.Tensor:
    """The stream that enters the layers, `[pos, d_model]`."""
    towers = [getattr(model.bridge, name) for name in model.family.adapter.towers]
    mixing = [part for tower in towers for part in tower.modules() if any(n in type(part).__name__ for n in MIXING)]
    handles = [part.register_forward_hook(_nothing) for part in mixing]
    try:
        return model.run_with_cache(x, ["hook_embed"])[1]["hook_embed"][0]
    finally:
        for handle in handles:
            handle.remove()


def moved(model: Any, layout: dict[str, Any], own: torch.Tensor, **changed: Any) -> set[int]:
    """Positions that enter the layers otherwise once the clip is another."""
    other = entering(model, model.encode(replace(small_clip(0), **changed), "What?", **layout))
    return set((own != other).any(-1).nonzero()[:, 0].tolist())


def by_sound(model: Any, layout: dict[str, Any], reach: tuple[float, float]) -> tuple[set[int], set[int], int]:
    """What one second of sound moves, what the map says, and how many tokens the sound has."""
    waveform = np.array(small_clip(0).waveform)
    waveform[4000:20000] *= 0.5
    x = model.encode(small_clip(0), "What?", **layout)
    table = x.table().query("role == 'audio'")
    said = (table["source_start_s"] - reach[0] < 1.25) & (table["source_end_s"] + reach[1] > 0.25)
    return moved(model, layout, entering(model, x), waveform=waveform), set(table.index[said]), len(table)


def by_square(model: Any, layout: dict[str, Any]) -> Iterator[tuple[set[int], set[int]]]:
    """What a token's square moves, in the frames that the map names, and that token."""
    clip = small_clip(0)
    x = model.encode(clip, "What?", **layout)
    table, own = x.table().query("row >= 0"), entering(model, x)
    high, wide = (clip.frames.shape[axis] / (table[name].max() + 1) for axis, name in ((1, "row"), (2, "col")))
    some = table.iloc[:: max(1, len(table) // MOST)]
    for position, row, col, start, end in some[["row", "col", "source_start_s", "source_end_s"]].itertuples():
        frames = np.array(clip.frames)
        shown = (clip.times > start - 1e-6) & (clip.times < end - 1e-6)
        down, across = (
            slice(round(n * size) + RIM, round((n + 1) * size) - RIM) for n, size in ((row, high), (col, wide))
        )
        for frame in frames[np.flatnonzero(shown)[0] : np.flatnonzero(shown)[-1] + 1]:
            frame[down, across] ^= 255
        yield moved(model, layout, own, frames=frames), {position}
