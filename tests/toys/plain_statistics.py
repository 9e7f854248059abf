"""Section 7 of the protocol, written a second time from its text: plain loops over conflicts, no arrays, no shortcuts.

A conflict's *units* are the set of its sources (of its third clip too, where an effect uses it), or of its two words.

Read out of the text where it leaves a choice: hash(seed, x) is sha256 of "seed:x"; a component's hash is the smallest
of its conflicts'; ties of swaps go by half 0's source, then by the other's; where a value is not known, its conflict
and what sources only it has are left out.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

NEAR = 10.0
Units = Sequence[frozenset[Hashable]]


def hashed(seed: int, name: str) -> str:
    """hash(seed, name)."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


# Sources and doubles.


@dataclass(frozen=True)
class Window:
    """A clip: its file, from when to when; what its streams hold, None where constant; a name that was given."""

    file: str
    start: float
    end: float
    sound: str | None = None
    frames: str | None = None
    given: str | None = None


def sources(windows: Sequence[Window]) -> list[int]:
    """Number the sources of some clips; copies of a recording count as its one file."""

    def same(i: int, j: int) -> bool:
        a, b = windows[i], windows[j]
        equal = [(a.file, b.file), (a.sound, b.sound), (a.frames, b.frames)]
        return a.given is b.given is None and any(x is not None and x == y for x, y in equal)

    recording = joined(len(windows), same)

    def at_once(i: int, j: int) -> bool:
        a, b = windows[i], windows[j]
        if a.given is not None or b.given is not None:
            return a.given == b.given
        return recording[i] == recording[j] and max(a.start, b.start) - min(a.end, b.end) < NEAR

    return joined(len(windows), at_once)


def joined(n: int, together: Callable[[int, int], bool]) -> list[int]:
    """Number the classes of n things of which some pairs belong together."""
    label = list(range(n))
    for i, j in itertools.combinations(range(n), 2):
        if together(i, j) and label[i] != label[j]:
            label = [label[i] if one == label[j] else one for one in label]
    return label


def doubles(pairs: Sequence[tuple[Hashable, Hashable]], questions: Sequence[str]) -> list[int]:
    """Which conflicts are an earlier one again: the same two sources, either way round, asked the same."""
    keys = [(frozenset(pair), question) for pair, question in zip(pairs, questions, strict=True)]
    return [i for i, key in enumerate(keys) if key in keys[:i]]


# The deal.


def components(units: Units) -> list[int]:
    """Number the components of the graph in which conflicts that share a source are joined."""
    return joined(len(units), lambda i, j: bool(units[i] & units[j]))


def deal_components(ids: Sequence[str], answers: Sequence[str], units: Units, *, seed: int) -> list[int]:
    """Deal components, largest first, to the half with fewer conflicts of their sound answers, then with fewer."""
    label = components(units)
    members = {one: [i for i, other in enumerate(label) if other == one] for one in set(label)}
    halves: list[list[int]] = [[], []]
    for rows in sorted(members.values(), key=lambda rows: (-len(rows), min(hashed(seed, ids[i]) for i in rows))):
        words = {answers[i] for i in rows}

        def taken(half: list[int], words: set[str] = words) -> tuple[int, int]:
            return sum(answers[i] in words for i in half), len(half)

        min(halves, key=taken).extend(rows)
    return [0 if i in halves[0] else 1 for i in range(len(ids))]


def sources_are_shared(units: Units, half_of: Sequence[int]) -> bool:
    """Whether a half has below 20 components, or one above a tenth of its conflicts."""
    label = components(units)
    for half in (0, 1):
        mine = [one for one, of in zip(label, half_of, strict=True) if of == half]
        if len(set(mine)) < 20 or any(mine.count(one) > len(mine) / 10 for one in set(mine)):
            return True
    return False


def across(pairs: Sequence[tuple[str, str]], half: set[str]) -> int:
    """How many conflicts have one source in the half and one without."""
    return sum((a in half) != (b in half) for a, b in pairs)


def deal_sources(pairs: Sequence[tuple[str, str]], *, seed: int, swap: bool = True) -> set[str]:
    """The sources of half 0: grown by conflicts into it, then mended by swaps (unless none are asked for)."""
    sources = sorted({one for pair in pairs for one in pair}, key=lambda one: hashed(seed, one))
    half = {sources[0]}
    while len(half) < len(sources) // 2:

        def wanted(one: str) -> tuple[int, int, str]:
            mine = [pair for pair in pairs if one in pair]
            into = sum(any(other in half for other in pair) for pair in mine)
            return -into, len(mine), hashed(seed, one)

        half.add(min((one for one in sources if one not in half), key=wanted))
    while swap:
        swaps = [(one, other) for one in sources if one in half for other in sources if other not in half]
        best = min(
            swaps,
            key=lambda two: (across(pairs, half - {two[0]} | {two[1]}), *(hashed(seed, one) for one in two)),
        )
        after = half - {best[0]} | {best[1]}
        if across(pairs, after) >= across(pairs, half):
            return half
        half = after
    return half


# Dyadic inference.


@dataclass(frozen=True)
class Dyadic:
    """A mean (or a ratio of means), its standard error, skewness g and degrees of freedom."""

    value: float
    error: float
    g: float
    df: float

    @property
    def t(self) -> float:
        """t', corrected for skewness."""
        t = self.value / self.error
        return t + self.g / 6 + self.g * t**2 / 3 + self.g**2 * t**3 / 27

    @property
    def p(self) -> float:
        """One-sided: the mean is not above 0."""
        return float(stats.t.sf(self.t, self.df))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval."""
        c = float(stats.t.ppf(0.975, self.df))
        low, high = (self.value - self._uncorrected(one) * self.error for one in (c, -c))
        return low, high

    def _uncorrected(self, c: float) -> float:
        if abs(self.g) < 1e-9:
            return c
        inside = 1 + self.g * (c - self.g / 6)
        return 3 / self.g * (math.copysign(abs(inside) ** (1 / 3), inside) - 1)


@functools.cache
def sharing(units: tuple[frozenset[Hashable], ...]) -> list[tuple[int, int]]:
    """The ordered pairs of conflicts that share at least one unit, a conflict with itself included."""
    every = range(len(units))
    return [(i, j) for i in every for j in every if units[i] & units[j]]


def dyadic(values: Sequence[float], units: Units, below: Sequence[float] | None = None) -> Dyadic:
    """The mean of some values, or their ratio to `below`, of conflicts that share units.

    A conflict with NaN is left out, and its sources with it.
    """
    y = [1.0] * len(values) if below is None else list(below)
    kept = [i for i in range(len(values)) if not math.isnan(values[i]) and not math.isnan(y[i])]
    n, below_all = len(kept), sum(y[i] for i in kept)
    r = sum(values[i] for i in kept) / below_all
    e = {i: (values[i] - r * y[i]) / (below_all / n) for i in kept}
    sources = set().union(*(units[i] for i in kept))
    shared = sum(e[i] * e[j] for i, j in sharing(tuple(units)) if i in e and j in e)
    v = max(shared, sum(one**2 for one in e.values())) / n**2 * len(sources) / (len(sources) - 1)
    cubes = sum(sum(e[i] for i in kept if one in units[i]) ** 3 for one in sources)
    for same in {units[i] for i in kept}:
        cubes -= (len(same) - 1) * sum(e[i] for i in kept if units[i] == same) ** 3
    w = [sum(one in units[i] for i in kept) for one in sources]
    df = max(3.0, 0.5 * (sum(w) ** 2 / sum(one**2 for one in w) - 1))
    return Dyadic(r, math.sqrt(v), cubes / n**3 / v**1.5, df)


def drawn_maximum(
    rows: Sequence[Sequence[float]], units: Units, counts: Sequence[Mapping[Hashable, int]]
) -> list[float]:
    """In every draw of source counts, the largest (weighted mean - mean) / sqrt(v) over rows."""
    found = [dyadic(row, units) for row in rows]
    out: list[float] = []
    for count in counts:
        weight = [math.prod(count[one] for one in of) for of in units]
        means = [sum(w * x for w, x in zip(weight, row, strict=True)) / sum(weight) for row in rows]
        out.append(max((mean - one.value) / one.error for mean, one in zip(means, found, strict=True)))
    return out


def largest_as_large(seen: float, drawn: Sequence[float]) -> float:
    """The p of max-T: (1 + draws whose maximum is as large) / (1 + draws)."""
    return (1 + sum(one >= seen for one in drawn)) / (1 + len(drawn))


# Components: the bootstrap and sign flips.


def flipped(values: Sequence[float], label: Sequence[int]) -> float:
    """The exact one-sided p of sign flips by component."""
    sums = [sum(x for x, of in zip(values, label, strict=True) if of == one) for one in sorted(set(label))]
    signs = list(itertools.product((1, -1), repeat=len(sums)))
    seen = sum(sums)
    as_large = sum(sum(s * x for s, x in zip(sign, sums, strict=True)) >= seen - 1e-9 for sign in signs)
    return as_large / len(signs)


def resampled(values: Sequence[float], label: Sequence[int], *, draws: int, seed: int) -> tuple[float, float]:
    """The bootstrap's 95% interval of a mean: components drawn with replacement."""
    rng, names = random.Random(seed), sorted(set(label))
    groups = {one: [x for x, of in zip(values, label, strict=True) if of == one] for one in names}
    means = [mean([x for one in rng.choices(names, k=len(names)) for x in groups[one]]) for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def can_pass(n_components: int, family: int) -> bool:
    """Whether any effect, however large, could pass."""
    return 2.0**-n_components * family <= 0.05


# Families.


def benjamini_hochberg(p: Sequence[float], family: int) -> list[float]:
    """q: the smallest level at which a p is among those rejected, among `family` tests."""
    ranked = sorted(p)
    return [min(1.0, *(family * other / (rank + 1) for rank, other in enumerate(ranked) if other >= one)) for one in p]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's p: the largest of (m - rank) p over the p that are as small."""
    ranked = sorted(p)
    return [min(1.0, max((len(p) - rank) * other for rank, other in enumerate(ranked) if other <= one)) for one in p]


def mean(values: Sequence[float]) -> float:
    """The mean of what is known."""
    known = [one for one in values if not math.isnan(one)]
    return sum(known) / len(known) if known else math.nan
