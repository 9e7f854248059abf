"""How much of what the model does does a circuit do, and how well does a ranking of nodes find it?

    f(C) = [m(C) - m(empty)] / [m(whole) - m(empty)]       0 for the empty circuit, 1 for the whole model
    CPR  = integral of f(C_k) d(k / nodes)              the k nodes with the largest signed scores; larger is better
    CMD  = integral of |1 - f(C_k)| d(k / nodes)        the k nodes with the largest scores in size; smaller is better

with k = max(1, round(share x nodes)) over `SHARES` and trapezoids in k, from the smallest k to the whole model: a
ranking that is faithful at every k has a CPR of (nodes - k_1) / nodes and a CMD of 0. All are ratios of means over
examples, and their intervals resample the examples' clips. Where the interval of m(whole) - m(empty) includes 0 there
is nothing to share and every figure is NaN; with too few clips for an interval the figures are given without one.

Source: MIB, Mueller et al. (2025, 2504.13151); f: Wang et al. (2022).

    >>> sizes(64)
    [1, 3, 6, 13, 32, 64]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from av_lens.results.statistics import FEWEST_CLIPS, Bootstrap, Interval, interval

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_TAILS = (2.5, 97.5)


def sizes(n: int) -> list[int]:
    """List the sizes at which a ranking is measured."""
    return sorted({max(1, round(share * n)) for share in SHARES})


@dataclass(frozen=True, eq=False)
class Scale:
    """The scale of f: 0 at the empty model, 1 at the whole.

    Attributes:
        boot: the examples' weights.
        whole: m of the model.
        bare: m with every candidate replaced.
    """

    boot: Bootstrap
    whole: Float[np.ndarray, " example"]
    bare: Float[np.ndarray, " example"]

    @cached_property
    def span(self) -> tuple[float, float, float]:
        """m(whole) - m(empty), and its interval."""
        return interval(self.boot, self.whole - self.bare)

    @property
    def usable(self) -> bool:
        """Whether there is anything to share: the span's interval leaves 0 out (the span itself, without one)."""
        value, low, high = self.span
        return bool(value != 0 and not low <= 0 <= high)

    @property
    def sign(self) -> float:
        """1 where the whole model's m lies above the empty one's, -1 where it lies below."""
        return -1.0 if self.span[0] < 0 else 1.0

    def ratio(self, change: Float[np.ndarray, "circuit example"]) -> Interval:
        """Put changes of m on the scale."""
        if not self.usable:
            nothing = np.full(len(change), np.nan)
            return Interval(nothing, nothing, nothing)
        return self.boot.ratio(change.T, self.whole - self.bare)

    def share(self, m: Float[np.ndarray, "circuit example"]) -> Interval:
        """Compute f of circuits."""
        return self.ratio(m - self.bare)

    def area(
        self, m: Float[np.ndarray, "size example"], at: Sequence[int], n: int, *, distance: bool
    ) -> tuple[float, float, float]:
        """Integrate over sizes."""
        if not self.usable:
            return float("nan"), float("nan"), float("nan")
        value = _area(np.ones((1, len(self.whole))), m, self, at, n, distance)[0]
        if self.boot.n_clips < FEWEST_CLIPS:
            return float(value), float("nan"), float("nan")
        drawn = _area(self.boot.weights, m, self, at, n, distance)
        low, high = np.nanpercentile(drawn, _TAILS)
        return float(value), float(low), float(high)


def _area(
    weights: np.ndarray, m: np.ndarray, scale: Scale, at: Sequence[int], n: int, distance: bool
) -> Float[np.ndarray, " draw"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        f = (weights @ (m - scale.bare).T) / (weights @ (scale.whole - scale.bare))[:, None]
    f[~np.isfinite(f)] = np.nan  # a draw that left nothing below the line is no draw
    return np.asarray(np.trapezoid(np.abs(1 - f) if distance else f, np.asarray(at) / n, axis=1))
