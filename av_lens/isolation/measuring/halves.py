"""One half's conflicts that are analysed, and how their figures are bounded: means, shares of G, columns of tables."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from av_lens.isolation.measuring.engine import W_CELLS
from av_lens.results.dyadic import Dyadic, Inference
from av_lens.results.statistics import Interval

Row = dict[str, float]


@dataclass(frozen=True, eq=False)
class Half:
    """One half's analysed conflicts and the rules that bound their figures (first edition: no `third`, no `words`)."""

    name: str
    examples: Int[np.ndarray, " example"]
    components: list[int]
    boot: Inference
    G: Float[np.ndarray, " example"]
    C: Float[np.ndarray, " example"]
    third: Inference | None = None
    words: Dyadic | None = None

    @property
    def gap(self) -> float:
        """The mean of G - C."""
        return float((self.G - self.C).mean())

    def by(self, donor: str) -> Inference:
        """Choose what an effect with this donor is bounded and tested by."""
        return self.third if donor in W_CELLS and self.third is not None else self.boot

    def delta(self, s: float) -> float:
        """Say which effect is large: a share of G."""
        return float(s * self.G.mean())

    def bounded(self, values: Float[np.ndarray, " example"], name: str = "value", prefix: str = "") -> Row:
        """Bound a mean: columns of a table."""
        return columns(self.boot.mean(values), f"{prefix}{name}", f"{prefix}low", f"{prefix}high")

    def shares(
        self,
        values: Float[np.ndarray, "example ..."],
        of: Float[np.ndarray, "example ..."] | None = None,
        donor: str = "",
    ) -> Interval:
        """Bound means over the mean of G, or over the means of other values."""
        whole = self.G if of is None else of
        wide = whole.reshape(whole.shape + (1,) * (values.ndim - whole.ndim))
        return self.by(donor).ratio(values, np.broadcast_to(wide, values.shape))

    def share(self, values: Float[np.ndarray, " example"]) -> Row:
        """Bound a mean's share of G: columns of a table."""
        return columns(self.shares(values), "share", "share_low", "share_high")

    def rows(self, values: Float[np.ndarray, "example column"], donor: str = "") -> list[Row]:
        """Bound the mean of every column and its share of G, and count the conflicts that have a number."""
        mean, share = self.by(donor).mean(values), self.shares(values, donor=donor)
        counts = (~np.isnan(values)).sum(0)
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
