"""What can be made again is kept within a budget."""

from __future__ import annotations

import numpy as np

from av_lens.memory import Bounded


def test_the_least_recently_used_goes_and_what_grew_counts():
    kept, made = Bounded[np.ndarray](100), list[str]()

    def make(name, size):
        return lambda: made.append(name) or np.zeros(size, np.uint8)

    first = kept.once("a", make("a", 40))
    kept.once("b", make("b", 40))
    assert kept.once("a", make("a again", 40)) is first
    kept.once("c", make("c", 40))  # b goes
    kept.once("a", make("a again", 40))
    kept.once("b", make("b again", 40))
    assert made == ["a", "b", "c", "b again"]
    kept.forget(lambda key: key != "a")
    kept.once("large", make("large", 1000))  # one is kept, however large
    assert kept.once("large", make("large again", 1000)).nbytes == 1000
    assert made[-1] == "large"
