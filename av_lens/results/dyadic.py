"""How sure are we of a mean where conflicts share sources, or words? Protocol section 7 has the formulas.

`Dyadic` is the rule of shared sources, `Components` that of disjoint ones (`results.statistics`; where the skewness of
the components' sums is below 0 flips find too much, docs/type_one.md). They and the first edition's `Bootstrap` answer
the same questions (`Inference`), each for values `[example, ...]` that are NaN where not measured.

Sources: Aronow, Samii and Assenova (2015), cluster-robust variance for dyadic data; Hall (1992), removal of skewness by
a monotone transformation; Owen (2007), the pigeonhole bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse, stats

from av_lens.results.statistics import DRAWS, FEWEST_CLIPS, FEWEST_COMPONENTS, Bootstrap, Flips, Interval

LEAST_DF = 3.0
SOURCE, COMPONENT, WORD = "source", "component", "word"
"""What a `Dyadic` may take for a source."""
_CHUNK = 2**22
Columns = Float[np.ndarray, "example column"]
PerColumn = Float[np.ndarray, " column"]


class Spread(NamedTuple):
    """How far the mean of each column may be off: its standard error, skewness g, df; whether sources are enough."""

    error: PerColumn
    g: PerColumn
    df: PerColumn
    enough: Bool[np.ndarray, " column"]


def corrected(t: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Take the skewness g out of t."""
    return t + g / 6 + g * t**2 / 3 + g**2 * t**3 / 27


def inverted(c: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Find the t whose correction is c."""
    straight = np.abs(g) < 1e-9
    safe = np.where(straight, 1.0, g)
    return np.where(straight, c, 3 / safe * (np.cbrt(1 + safe * (c - safe / 6)) - 1))


@dataclass(frozen=True, eq=False)
class Dyadic:
    """Conflicts and the sources that they share; `unit` is what a source is."""

    members: Int[np.ndarray, "example place"]
    n_sources: int
    unit: str = SOURCE

    @classmethod
    def of(cls, sources: Sequence[Iterable[str]], *, unit: str = SOURCE) -> Dyadic:
        """Number the sources of each conflict; an empty name is no source, one named twice counts once."""
        names: dict[str, int] = {}
        sets = [sorted({names.setdefault(name, len(names)) for name in one if name}) for one in sources]
        # Rows are filled up with a number that is no source's.
        members = np.full((len(sets), max(map(len, sets), default=0)), len(names), dtype=np.int64)
        for row, numbers in zip(members, sets, strict=True):
            row[: len(numbers)] = numbers
        return cls(members, len(names), unit)

    @property
    def rule(self) -> str:
        """The rule in words."""
        return f"dyadic by {self.unit}: t' corrected for skewness, its inverse for intervals"

    @cached_property
    def _incidence(self) -> Any:
        rows, places = np.nonzero(self.members < self.n_sources)
        where = (self.members[rows, places], rows)
        return sparse.csr_array((np.ones(len(rows)), where), shape=(self.n_sources, len(self.members)))

    @cached_property
    def _neighbours(self) -> Any:
        return ((self._incidence.T @ self._incidence) > 0).astype(np.float64).tocsr()

    @cached_property
    def _sets(self) -> tuple[Any, Float[np.ndarray, "set 1"]]:
        """Conflicts with one set of sources, `[set, example]`, and k - 1 of each."""
        found, group = np.unique(self.members, axis=0, return_inverse=True)
        n = len(self.members)
        joined = sparse.csr_array((np.ones(n), (group.ravel(), np.arange(n))), shape=(len(found), n))
        return joined, (found < self.n_sources).sum(1, keepdims=True) - 1.0

    def spread(self, e: Columns, known: Bool[np.ndarray, "example column"]) -> Spread:
        """Estimate how far means are off, from what is left of each value when its mean is taken off (0 if unknown)."""
        n, own = known.sum(0), (e**2).sum(0)
        weight = self._incidence @ known.astype(np.float64)
        count = (weight > 0).sum(0)
        joined, less = self._sets
        cubes = ((self._incidence @ e) ** 3).sum(0) - (less * (joined @ e) ** 3).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            v = np.maximum((e * (self._neighbours @ e)).sum(0), own) / n**2 * (count / (count - 1))
            g = np.where(v > 0, cubes / n**3 / v**1.5, 0.0)
            df = np.fmax(LEAST_DF, (weight.sum(0) ** 2 / (weight**2).sum(0) - 1) / 2)
        return Spread(np.sqrt(v), g, df, count >= FEWEST_CLIPS)

    def mean(self, values: np.ndarray, *, level: float = 0.95) -> Interval:
        """Bound a mean over examples."""
        return self.ratio(values, np.ones(len(values)), level=level)

    def ratio(self, above: np.ndarray, below: np.ndarray, *, level: float = 0.95) -> Interval:
        """Bound a ratio of means."""
        top, bottom = (_flat(side) for side in (above, below))
        bottom = np.broadcast_to(bottom, top.shape)
        known = ~(np.isnan(top) | np.isnan(bottom))
        top, bottom = np.where(known, top, 0.0), np.where(known, bottom, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = np.where(known.any(0), top.sum(0) / bottom.sum(0), np.nan)
            e = (top - value * bottom) / (bottom.sum(0) / known.sum(0))
        found = self._bounds(value, np.where(known & np.isfinite(e), e, 0.0), known, level)
        return Interval(*(part.reshape(above.shape[1:]) for part in found))

    def _bounds(
        self, value: PerColumn, e: Columns, known: Bool[np.ndarray, "example column"], level: float
    ) -> tuple[PerColumn, PerColumn, PerColumn]:
        error, g, df, enough = self.spread(e, known)
        c = stats.t.ppf((1 + level) / 2, df)
        low, high = (np.where(enough, value - inverted(side * c, g) * error, np.nan) for side in (1, -1))
        return value, low, high

    def derived(self, rule: Callable[..., np.ndarray], *columns: np.ndarray) -> tuple[float, float, float]:
        """Bound a figure that is computed from several means, such as |E_V| / (|E_A| + |E_V|), to first order."""
        stacked = np.stack(columns, axis=1)
        known = np.asarray(~np.isnan(stacked).any(1))
        if not known.any():
            return math.nan, math.nan, math.nan
        means = stacked[known].mean(0)
        value = float(rule(*means[:, None])[0])
        step = 1e-5 * np.diag(np.maximum(np.abs(means), stacked[known].std(0)) + 1e-12)
        slope = (rule(*(means + step).T) - rule(*(means - step).T)) / (2 * np.diag(step))
        e = np.where(known[:, None], stacked - means, 0.0) @ slope
        found = self._bounds(np.array([value]), e[:, None], known[:, None], 0.95)
        return value, float(found[1][0]), float(found[2][0])

    def pivots(self, values: Columns) -> tuple[PerColumn, Spread]:
        """Compute t' of every column."""
        known = ~np.isnan(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(known, values, 0.0).sum(0) / known.sum(0)
            spread = self.spread(np.where(known, values - mean, 0.0), known)
            t = np.where(spread.error > 0, mean / spread.error, np.where(mean > 0, np.inf, -np.inf))
            bent = np.where(np.isinf(t), t, corrected(t, spread.g))
        return np.where(np.isnan(mean) | ~spread.enough, np.nan, bent), spread

    def test(self, values: np.ndarray, *, family: int | None = None, seed: int = 0) -> Flips:
        """Test that means are above 0; p has no floor, so that the family's size changes nothing."""
        del family
        flat = _flat(values)
        seen, spread = self.pivots(flat)
        p = np.where(np.isnan(seen), np.nan, stats.t.sf(seen, spread.df))
        largest = self._largest(flat, spread.error, np.random.default_rng(seed))
        # As many draws as are above what was seen; equal ones count.
        above = len(largest) - np.searchsorted(np.sort(largest), seen - 1e-9, side="left")
        p_maxt = np.where(np.isnan(seen), np.nan, (1 + above) / (1 + len(largest)))
        shape = values.shape[1:]
        return Flips(p.reshape(shape), p_maxt.reshape(shape), DRAWS, False)

    def _largest(self, values: Columns, error: PerColumn, rng: np.random.Generator) -> Float[np.ndarray, " draw"]:
        """Draw the largest of (weighted mean - mean) / sqrt(v) over the columns."""
        usable = (error > 0) & np.isfinite(error)
        if not usable.any():
            return np.zeros(DRAWS)
        counts = rng.multinomial(self.n_sources, np.full(self.n_sources, 1 / self.n_sources), size=DRAWS)
        counts = np.concatenate([counts, np.ones((DRAWS, 1), dtype=counts.dtype)], axis=1)
        weights = counts[:, self.members].prod(2).astype(np.float64)
        known = ~np.isnan(values[:, usable])
        taken = np.where(known, values[:, usable], 0.0)
        mean, scale = taken.sum(0) / known.sum(0), error[usable]
        out, step = np.full(DRAWS, -np.inf), max(1, _CHUNK // DRAWS)
        for start in range(0, taken.shape[1], step):
            part = slice(start, start + step)
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn = (weights @ taken[:, part]) / (weights @ known[:, part].astype(np.float64))
                out = np.fmax(out, np.fmax.reduce((drawn - mean[part]) / scale[part], axis=1))
        return out

    @cached_property
    def _worth(self) -> tuple[float, float]:
        """As how many independent conflicts these count at least (all variance in the sources), and df."""
        weight = self._incidence.sum(1)
        total, squares = float(weight.sum()), float((weight**2).sum())
        return len(self.members) * total / squares, max(LEAST_DF, (total**2 / squares - 1) / 2)

    def smallest_effect(self, *, family: int) -> float:
        """Say how large an effect is found four times in five, in deviations between independent conflicts."""
        if not len(self.members):
            return math.inf
        n, df = self._worth
        return smallest_of(n, df, family=family)

    def deviation(self, values: np.ndarray) -> np.ndarray:
        """Estimate the deviation between that many independent conflicts."""
        flat = _flat(values)
        error = self.pivots(flat)[1].error * math.sqrt(self._worth[0])
        return np.where(np.isnan(flat).all(0), np.nan, error).reshape(values.shape[1:])

    def taken(self, rows: Int[np.ndarray, " row"], copies: Int[np.ndarray, "row place"] | int = 0) -> Dyadic:
        """Take conflicts, some of them several times; copies of a source by another number are sources of their own."""
        real = self.members[rows] < self.n_sources
        numbers = np.where(real, self.members[rows] + self.n_sources * copies, -1)
        names, numbered = np.unique(numbers[real], return_inverse=True)
        numbers[~real], numbers[real] = len(names), numbered
        return Dyadic(numbers, len(names), self.unit)

    def drawn(self, rng: np.random.Generator) -> tuple[Int[np.ndarray, " row"], Dyadic]:
        """Draw the sources again: a conflict comes once for each pair of its sources' copies."""
        counts = rng.multinomial(self.n_sources, np.full(self.n_sources, 1 / self.n_sources))
        times = np.append(counts, 1)[self.members]
        rows = np.repeat(np.arange(len(times)), times.prod(1))
        copies = [one for row in times.tolist() for one in product(*map(range, row))]
        return rows, self.taken(rows, np.array(copies, dtype=np.int64).reshape(len(rows), -1))


def _flat(values: np.ndarray) -> Columns:
    return np.asarray(values, dtype=np.float64).reshape(len(values), -1)


def smallest_of(n: float, df: float, *, family: int, level: float = 0.05, power: float = 0.8) -> float:
    """Find the smallest effect that t' of n independent conflicts can show, in their standard deviations."""
    return float((stats.t.isf(level / family, df) + stats.norm.ppf(power)) / math.sqrt(n))


@dataclass(frozen=True, eq=False, kw_only=True)
class Components(Bootstrap):
    """Bootstrap and sign flips of components; t' with every component one source where they are skewed to the left."""

    skewed: Dyadic

    @property
    def rule(self) -> str:
        """The rule in words."""
        return "bootstrap and sign flips by component; where g < 0, p by t' with every component one source"

    def test(self, values: np.ndarray, *, family: int | None = None, seed: int = 0) -> Flips:
        """Test that means are above 0."""
        flips, bent = super().test(values, family=family, seed=seed), self.skewed.test(values, seed=seed)
        left = self.skewed.pivots(_flat(values))[1].g.reshape(values.shape[1:]) < 0
        p, p_maxt = (np.where(left, two, one) for one, two in ((flips.p, bent.p), (flips.p_maxt, bent.p_maxt)))
        return Flips(p, p_maxt, flips.n_flips, flips.exact)


Inference = Bootstrap | Dyadic
"""What a half is judged by."""


def by_components(components: Sequence[int], clips: tuple[Sequence[str], Sequence[str]], *, seed: int) -> Inference:
    """Choose the rule of conflicts that do not share sources: with fewer than 20 components left, t' alone."""
    skewed = Dyadic.of([(str(one),) for one in components], unit=COMPONENT)
    if len(set(components)) < FEWEST_COMPONENTS:
        return skewed
    drawn = Bootstrap.draw(components, *clips, seed=seed)
    return Components(**vars(drawn), skewed=skewed)


def drawn_again(
    rule: Inference, third: Inference | None, components: Sequence[int], rng: np.random.Generator, *, seed: int
) -> tuple[Int[np.ndarray, " row"], list[int], Inference, Inference | None]:
    """Draw a half again, its components or its shared sources; copies share sources, which can only widen intervals."""
    numbers = np.asarray(components)
    if isinstance(rule, Dyadic) and rule.unit == SOURCE:
        rows, again = rule.drawn(rng)
        return rows, numbers[rows].tolist(), again, _third(third, rows)
    drawn = [np.flatnonzero(numbers == one) for one in rng.choice(np.unique(numbers), size=len(set(components)))]
    rows = np.concatenate(drawn)
    renamed = [number for number, part in enumerate(drawn) for _ in part]
    if not isinstance(rule, Bootstrap):
        return rows, renamed, Dyadic.of([(str(one),) for one in renamed], unit=COMPONENT), _third(third, rows)
    assert rule.clips is not None
    clips = [[f"{number}:{of[i]}" for number, i in zip(renamed, rows, strict=True)] for of in rule.clips]
    boot = Bootstrap.draw(renamed, *clips, seed=seed, draws=1000)
    if isinstance(rule, Components):
        return (
            rows,
            renamed,
            Components(**vars(boot), skewed=Dyadic.of([(str(i),) for i in renamed])),
            _third(third, rows),
        )
    return rows, renamed, boot, None


def _third(third: Inference | None, rows: np.ndarray) -> Dyadic | None:
    return third.taken(rows) if isinstance(third, Dyadic) else None
