"""Conflicts of the embedded world, two classes drawn for each, every clip used once."""

from __future__ import annotations

import numpy as np

from av_lens import organism
from av_lens.inputs import Conflict


def drawn_conflicts(n: int, *, seed: int = 0, first: int = 1000) -> list[Conflict]:
    """Draw the classes by `seed`; the clips are those of seeds `first`, `first` + 1, and so on."""
    classes, rng, found = list(organism.classes()), np.random.default_rng(seed), list[Conflict]()
    for i in range(n):
        a, v = (classes[j] for j in rng.permutation(len(classes))[:2])
        sound, picture = organism.clip(a, seed=first + 2 * i), organism.clip(v, seed=first + 1 + 2 * i)
        found.append(Conflict(sound=sound, picture=picture, question="What do you hear?", answers=(a, v), id=f"c{i}"))
    return found
