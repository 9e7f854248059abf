"""How sure are we of a mean, a share, a hundred heads at once? Protocol sections 7 and 8.

What is resampled or flipped is the *component* (conflicts that share clips), never the conflict. Max-T compares sum /
sqrt(sum of squares of the component sums) with the largest of the whole family in the same flip. Large positive means
give small p; sampled, p = (1 + count) / (1 + flips). Harm: 59 items without one failure are the fewest that bound the
share below 5% (.95^59 < .05). NaN examples are left out of that column; a column of NaN gives NaN.

Sources: Westfall and Young (1993) for max-T; Benjamini and Hochberg (1995); Holm (1979); Clopper and Pearson (1934).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from av_lens.errors import InputError

DRAWS = 5000
FEWEST_CLIPS, FEWEST_COMPONENTS = 5, 20
FEWEST_ITEMS = 59
MOST_EXACT = 16
_CHUNK = 2**22  # numbers held at once while resampling


@dataclass(frozen=True, eq=False)
class Interval:
    """A figure and its interval, each an array of the values' shape without `example`."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Resampling weights, drawn once and shared by every figure of a half; `unit` is "component" or "clip"."""

    weights: Float[np.ndarray, "draw example"]
    unit: str
    n_clips: int
    clips: Int[np.ndarray, "2 example"] | None = None
    groups: Int[np.ndarray, " example"] | None = None

    @classmethod
    def draw(
        cls,
        components: Sequence[int],
        sound_clips: Sequence[str],
        picture_clips: Sequence[str],
        *,
        seed: int,
        draws: int = DRAWS,
    ) -> Bootstrap:
        """Draw the weights of every conflict in every draw."""
        rng = np.random.default_rng(seed)
        clips, position = np.unique([*sound_clips, *picture_clips], return_inverse=True)
        both = position.reshape(2, -1)
        groups, group = np.unique(np.asarray(components), return_inverse=True)
        if len(groups) >= FEWEST_COMPONENTS:
            counts = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=draws)
            return cls(counts[:, group].astype(np.float64), "component", len(clips), both, group)
        counts = rng.multinomial(len(clips), np.full(len(clips), 1 / len(clips)), size=draws).astype(np.float64)
        return cls(counts[:, both[0]] * counts[:, both[1]], "clip", len(clips), both, group)

    @classmethod
    def of_clusters(cls, n: int, *, seed: int) -> Bootstrap:
        """Draw how often each of n clusters is taken, for values that are sums over clusters."""
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
        return cls(counts.astype(np.float64), "cluster", n)

    def mean(self, values: np.ndarray, *, level: float = 0.95) -> Interval:
        """Bound a mean over examples."""
        return self.ratio(values, np.ones(len(values)), level=level)

    def ratio(
        self, above: np.ndarray, below: np.ndarray, *, level: float = 0.95, at_once: int | None = None
    ) -> Interval:
        """Bound a ratio of means, resampled as a ratio."""
        shape = above.shape[1:]
        top, bottom = (np.asarray(side, dtype=np.float64).reshape(len(side), -1) for side in (above, below))
        bottom = np.broadcast_to(bottom, top.shape)
        known = ~(np.isnan(top) | np.isnan(bottom))
        top, bottom = np.where(known, top, 0.0), np.where(known, bottom, 0.0)
        out = np.full((3, top.shape[1]), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            out[0] = np.where(known.any(0), top.sum(0) / bottom.sum(0), np.nan)
        tail = 100 * (1 - level) / 2
        step = at_once or max(1, _CHUNK // len(self.weights))
        enough = self._enough(known)
        for start in range(0, top.shape[1] if enough.any() else 0, step):
            part = slice(start, start + step)
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn = (self.weights @ top[:, part]) / (self.weights @ bottom[:, part])
            drawn[~np.isfinite(drawn)] = np.nan  # a draw that left nothing below the line is no draw
            usable = ~np.isnan(drawn).all(0) & enough[part]
            if usable.any():
                picked = drawn[:, usable]
                percentile = np.nanpercentile if np.isnan(picked).any() else np.percentile  # equal, and much faster
                out[1:, start + np.flatnonzero(usable)] = percentile(picked, [tail, 100 - tail], axis=0)
        return Interval(*(row.reshape(shape) for row in out))

    def _enough(self, known: Bool[np.ndarray, "example column"]) -> Bool[np.ndarray, " column"]:
        """Whether a column's own conflicts come from enough clips to be resampled."""
        if (clips := self.clips) is None or known.all():
            return np.full(known.shape[1], self.n_clips >= FEWEST_CLIPS)
        return np.array([len(np.unique(clips[:, column])) >= FEWEST_CLIPS for column in known.T], dtype=bool)

    def derived(self, rule: Callable[..., np.ndarray], *columns: np.ndarray) -> tuple[float, float, float]:
        """Bound a figure that is computed from several means, such as |E_V| / (|E_A| + |E_V|)."""
        stacked = np.stack(columns, axis=1)
        stacked = stacked[~np.isnan(stacked).any(1)]
        if not len(stacked):
            return math.nan, math.nan, math.nan
        value = float(rule(*stacked.mean(0)[:, None])[0])
        if self.n_clips < FEWEST_CLIPS or len(stacked) != self.weights.shape[1]:
            return value, math.nan, math.nan
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = rule(*((self.weights @ stacked) / self.weights.sum(1, keepdims=True)).T)
        tail = 100 * (1 - 0.95) / 2
        low, high = np.nanpercentile(drawn, [tail, 100 - tail])
        return value, float(low), float(high)

    @property
    def rule(self) -> str:
        """The rule in words."""
        return f"bootstrap by {self.unit}, sign flips by component"

    def test(self, values: np.ndarray, *, family: int | None = None, seed: int = 0) -> Flips:
        """Test that means are above 0, flipping the signs of whole components."""
        assert self.groups is not None
        return sign_flips(values, self.groups.tolist(), family=family, seed=seed)

    def smallest_effect(self, *, family: int) -> float:
        """Say how large an effect is found four times in five, in standard deviations between components."""
        assert self.groups is not None
        return smallest_effect(len(np.unique(self.groups)), family=family)

    def deviation(self, values: np.ndarray) -> np.ndarray:
        """Estimate the standard deviation between components; NaN where there is but one."""
        assert self.groups is not None
        with np.errstate(invalid="ignore", divide="ignore"):
            known = ~np.isnan(values)
            of = [self.groups == group for group in np.unique(self.groups)]
            means = np.stack([np.where(known[rows], values[rows], 0.0).sum(0) / known[rows].sum(0) for rows in of])
            return means.std(0, ddof=1) if len(means) > 1 else np.full(values.shape[1:], np.nan)


@runtime_checkable
class Bounding(Protocol):
    """What bounds means: a `Bootstrap`, or another rule."""

    def mean(self, values: np.ndarray, *, level: float = 0.95) -> Interval:
        """Bound a mean over examples."""
        ...


def interval(boot: Bounding, values: np.ndarray) -> tuple[float, float, float]:
    """Bound the mean of one column."""
    found = boot.mean(values)
    return float(found.value), float(found.low), float(found.high)


@dataclass(frozen=True, eq=False)
class Flips:
    """The outcome of a family of one-sided tests: single p and max-T p, of the tests' shape, and how many flips."""

    p: np.ndarray
    p_maxt: np.ndarray
    n_flips: int
    exact: bool


def _signs(n: int, flips: int, seed: int, step: int) -> Iterator[np.ndarray]:
    """All flips of n signs, or so many sampled ones, `step` of them at a time."""
    rng, exact = np.random.default_rng(seed), n <= MOST_EXACT
    for start in range(0, flips, step):
        rows = min(step, flips - start)
        drawn = np.arange(start, start + rows)[:, None] >> np.arange(n) if exact else rng.integers(0, 2, size=(rows, n))
        yield 1.0 - 2.0 * (drawn & 1)


def sign_flips(values: np.ndarray, components: Sequence[int], *, family: int | None = None, seed: int = 0) -> Flips:
    """Test that means are above 0, flipping the signs of whole components."""
    whole = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    measured = ~np.isnan(whole).all(0)
    flat = np.nan_to_num(whole[:, measured])
    groups, group = np.unique(np.asarray(components), return_inverse=True)
    sums = np.zeros((len(groups), flat.shape[1]))
    np.add.at(sums, group, flat)
    scale = np.sqrt((sums**2).sum(0))
    sums = sums / np.where(scale > 0, scale, 1.0)
    seen = sums.sum(0)
    exact = len(groups) <= MOST_EXACT
    flips = 2 ** len(groups) if exact else max(9999, math.ceil(10 * (family or whole.shape[1]) / 0.05))
    counts = np.zeros((2, flat.shape[1]))
    step = max(1, _CHUNK // max(1, flat.shape[1]))
    near = seen - 1e-9
    for signs in _signs(len(groups), flips, seed, step) if flat.size else ():
        drawn = signs @ sums
        counts[0] += (drawn >= near).sum(0)
        largest = np.sort(drawn.max(1))
        counts[1] += len(largest) - np.searchsorted(largest, near, side="left")
    p = np.full((2, *values.shape[1:]), np.nan)
    p.reshape(2, -1)[:, measured] = counts / flips if exact else (counts + 1) / (flips + 1)
    return Flips(p[0, ...], p[1, ...], flips, exact)


def benjamini_hochberg(p: np.ndarray, *, family: int | None = None) -> np.ndarray:
    """Adjust p-values for the false discovery rate."""
    return _stepwise(p, family, upward=True)


def holm(p: np.ndarray, *, family: int | None = None) -> np.ndarray:
    """Adjust p-values for the familywise error."""
    return _stepwise(p, family, upward=False)


def _stepwise(p: np.ndarray, family: int | None, *, upward: bool) -> np.ndarray:
    flat = np.asarray(p, dtype=np.float64).ravel()
    known = np.flatnonzero(~np.isnan(flat))
    out = np.full(flat.shape, np.nan)
    m = max(len(known), family or 0)
    order = known[np.argsort(flat[known], kind="stable")]
    rank = np.arange(1, len(known) + 1)
    scaled = flat[order] * (m / rank if upward else m - rank + 1)
    running = np.minimum.accumulate(scaled[::-1])[::-1] if upward else np.maximum.accumulate(scaled)
    out[order] = np.minimum(running, 1.0)
    return out.reshape(np.shape(p))


def clopper_pearson(count: int, n: int, *, level: float = 0.95, side: str = "two") -> tuple[float, float]:
    """Bound a share exactly."""
    if not 0 <= count <= n or side not in ("two", "upper"):
        raise InputError(
            f"clopper_pearson was asked for {count} of {n}, side {side!r}: give 0 <= count <= n and 'two' or 'upper'."
        )
    if n == 0:
        return math.nan, math.nan
    tail = (1 - level) / 2 if side == "two" else 1 - level
    low = 0.0 if count == 0 or side == "upper" else float(stats.beta.ppf(tail, count, n - count + 1))
    high = 1.0 if count == n else float(stats.beta.ppf(1 - tail, count + 1, n - count))
    return low, high


@dataclass(frozen=True)
class Harm:
    """A fall in accuracy, its one-sided 95% upper bound, and what that allows one to say."""

    n: int
    before: float
    after: float
    fall: float
    bound: float
    verdict: str


def non_inferiority(
    before: Float[np.ndarray, " example"], after: Float[np.ndarray, " example"], boot: Bounding, *, margin: float = 0.05
) -> Harm:
    """Bound how much an edit lowers a rate."""
    known = ~(np.isnan(before) | np.isnan(after))
    n = int(known.sum())
    if n == 0:
        return Harm(0, math.nan, math.nan, math.nan, math.nan, "untested")
    was, now = before[known], after[known]
    fall = float(was.mean() - now.mean())
    resampled = float(boot.mean(before - after, level=0.90).high)
    exact = clopper_pearson(int(((was > 0.5) & (now <= 0.5)).sum()), n, side="upper")[1]
    # Below 5 clips there is no interval, and without it nothing is excluded, however many items these clips made.
    bound = max(resampled, exact) if math.isfinite(resampled) else math.nan
    tested = n >= FEWEST_ITEMS and math.isfinite(bound)
    verdict = "untested" if not tested else "specific" if bound < margin else "not specific"
    return Harm(n, float(was.mean()), float(now.mean()), fall, bound, verdict)


def smallest_effect(n: int, *, family: int, level: float = 0.05, power: float = 0.8) -> float:
    """Find the smallest effect, in standard deviations, that n components can show at the ladder's first step."""
    if n < 1 or 2.0**-n > level / family:
        return math.inf
    return float((stats.norm.ppf(1 - level / family) + stats.norm.ppf(power)) / math.sqrt(n))
