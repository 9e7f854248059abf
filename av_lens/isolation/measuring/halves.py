"""One half of the conflicts, and what hearing is in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from av_lens.results.statistics import Bootstrap, Interval

Row = dict[str, float]


@dataclass(frozen=True, eq=False)
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

    @property
    def gap(self) -> float:
        """The mean of G - C."""
        return float((self.G - self.C).mean())

    def delta(self, s: float) -> float:
        """Say which effect is large: a share of G."""
        return float(s * self.G.mean())

    def bounded(self, values: Float[np.ndarray, " example"], name: str = "value", prefix: str = "") -> Row:
        """Bound a mean: columns of a table."""
        return columns(self.boot.mean(values), f"{prefix}{name}", f"{prefix}low", f"{prefix}high")

    def shares(self, values: Float[np.ndarray, "example ..."]) -> Interval:
        """Bound means over the mean of G."""
        wide = self.G.reshape(self.G.shape + (1,) * (values.ndim - 1))
        return self.boot.ratio(values, np.broadcast_to(wide, values.shape))

    def share(self, values: Float[np.ndarray, " example"]) -> Row:
        """Bound a mean's share of G: columns of a table."""
        return columns(self.shares(values), "share", "share_low", "share_high")

    def rows(self, values: Float[np.ndarray, "example column"]) -> list[Row]:
        """Bound the mean of every column and its share of G, and count the conflicts that have a number."""
        mean, share, counts = self.boot.mean(values), self.shares(values), (~np.isnan(values)).sum(0)
        return [
            columns(mean, "mean", "low", "high", at=i)
            | columns(share, "share", "share_low", "share_high", at=i)
            | {"n": int(counts[i])}
            for i in range(values.shape[1])
        ]


def columns(bounds: Interval, *names: str, at: int | tuple[int, ...] = ()) -> Row:
    """Name the value, low and high (or the first of these) of one place as columns of a table."""
    parts = (bounds.value, bounds.low, bounds.high)
    return {name: float(part[at]) for name, part in zip(names, parts, strict=False)}
