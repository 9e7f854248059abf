"""What does each head write to the answers' logits itself? Direct logit attribution at the asked position, mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int

from av_lens.isolation.measuring.bench import Chunk

PerHead = Float[np.ndarray, "example layer head"]


def direct_writes(
    chunks: Sequence[Chunk], examples: Int[np.ndarray, " example"], n_layers: int, n_heads: int
) -> PerHead:
    """Attribute M directly to the heads at the asked position, mirrored: (va - av) / 2.

    Negative: the head writes the picture's answer over the sound's. The difference of two answers needs no centring
    over the vocabulary: what all answers share cancels.

    Args:
        chunks: the conflicts, stacked.
        examples: their order in the result.
        n_layers: fusion layers.
        n_heads: heads of a layer.

    Returns:
        Each head's share of M, at the run's own norm scale.
    """
    out = np.full((len(examples), n_layers, n_heads), np.nan)
    for chunk in chunks:
        place = np.array([int(np.flatnonzero(examples == i)[0]) for i in chunk.examples])
        out[place] = chunk.remember("direct writes", {}, partial(_chunk_writes, chunk))["margin"].transpose(2, 0, 1)
    return out


def _chunk_writes(chunk: Chunk) -> dict[str, np.ndarray]:
    """Every head's direct share of M in one stack, mirrored: `[layer, head, batch]`."""
    candidates = chunk.bench.candidates
    ids, tokens = torch.from_numpy(candidates.ids), candidates.tokens
    sides: list[np.ndarray] = []
    for cell in ("va", "av"):
        recording = chunk.run(cell)
        each = chunk.bench.engine.writes(recording, tokens)
        logits = recording.logits.double()[:, tokens].unflatten(-1, ids.shape)
        # Synonyms: each token counts by its share of the answer's own probability.
        weight = logits.masked_fill((ids < 0).to(logits.device), -torch.inf).softmax(-1)
        scores = (each.double().unflatten(-1, ids.shape) * weight).sum(-1).cpu().numpy()
        sides.append(candidates.margin(scores, chunk.examples))
    return {"margin": 0.5 * (sides[0] - sides[1])}
