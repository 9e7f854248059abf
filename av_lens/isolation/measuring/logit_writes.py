"""What does each head write to the answers' logits itself? Direct logit attribution at the asked position, mirrored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.estimands import PerHead

DLA = ("dla", "")
"""What heads write, beside the estimands of their edits."""


def direct_writes(chunks: Sequence[Chunk], examples: Int[np.ndarray, " example"]) -> PerHead:
    """Attribute M directly to the heads at the asked position, mirrored: (va - av) / 2.

    At a run's own norm scale; positive: the write favours the answer that hearing favours. Synonyms: each token counts
    by its share of the answer's own probability.
    """
    return gathered(chunks, examples, "direct writes", {}, _chunk_writes)["margin"]


def _chunk_writes(chunk: Chunk) -> dict[str, np.ndarray]:
    """Every head's direct share of M in one stack, mirrored: `[batch, layer, head]`."""
    candidates, sides = chunk.bench.candidates, list[np.ndarray]()
    for cell in ("va", "av"):
        recording = chunk.run(cell)
        scores = candidates.weighed(chunk.bench.engine.writes(recording, candidates.tokens), recording.logits)
        sides.append(candidates.margin(scores, chunk.examples))
    return {"margin": (0.5 * (sides[0] - sides[1])).transpose(2, 0, 1)}
