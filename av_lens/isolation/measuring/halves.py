"""One half of the conflicts, and what hearing is in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from av_lens.results.statistics import Bootstrap


@dataclass(eq=False)
class Half:
    """One half's conflicts that are analysed: what their clips share, and hearing per conflict.

    Attributes:
        name: "discovery" or "confirmation".
        examples: the conflicts.
        components: each one's component.
        boot: their bootstrap weights.
        G: hearing with nothing to see.
        C: hearing under conflict.
    """

    name: str
    examples: Int[np.ndarray, " example"]
    components: list[int]
    boot: Bootstrap
    G: Float[np.ndarray, " example"]
    C: Float[np.ndarray, " example"]
