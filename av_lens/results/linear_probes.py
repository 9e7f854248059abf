"""Linear probes: what can be read from vectors by a logistic regression, and how much of that is the probe's own doing?

Vectors are standardized by the training set's mean and standard deviation; the probe is a multinomial logistic
regression with an L2 penalty (1 / C). Where vectors are longer than there are training examples, they are first turned
into the training set's own row space, which leaves the fitted probe the same (the penalty keeps it inside that space)
and makes it quick.

*Control labels* (Hewitt and Liang, 2019): every source gets a label drawn at random, the same wherever it occurs, the
labels' frequencies kept. A probe that reads them has memorized sources; accuracy minus control accuracy is its
*selectivity*.

Source: Alain and Bengio (2016); Hewitt and Liang (2019). scikit-learn fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.brief import Brief
from av_lens.errors import InputError

PENALTY_C = 0.1
_TINY = 1e-6
_ITERATIONS = 20_000  # a bound, not a cost: at a checkpoint's width, few dominant directions, a fit can need thousands


@dataclass(frozen=True, eq=False, repr=False)
class LinearProbe(Brief):
    """A fitted probe.

    Attributes:
        mean: of the training vectors.
        scale: their standard deviation.
        basis: the training set's row space, or None where vectors are short.
        regression: scikit-learn's.
    """

    mean: Float[np.ndarray, " feature"]
    scale: Float[np.ndarray, " feature"]
    basis: Float[np.ndarray, "feature direction"] | None
    regression: Any

    @classmethod
    def fitted(
        cls, vectors: Float[np.ndarray, "example feature"], labels: Sequence[Any] | np.ndarray, *, c: float = PENALTY_C
    ) -> LinearProbe:
        """Fit a probe."""
        from sklearn.linear_model import LogisticRegression

        if not np.isfinite(vectors).all():
            raise InputError("a probe was given vectors that are NaN or infinite; the model's own run is broken.")
        if len(np.unique(labels)) < 2:
            raise InputError(f"a probe needs two labels at least, and all its training examples are {labels[0]!r}.")
        whole = np.asarray(vectors, dtype=np.float64)
        mean, scale = whole.mean(0), whole.std(0, ddof=1) + _TINY
        standard, basis = (whole - mean) / scale, None
        with _blas().limit(limits=1, user_api="blas"):  # on matrices this small, threads mostly wait for each other
            if standard.shape[1] > standard.shape[0]:
                basis = np.linalg.svd(standard, full_matrices=False)[2].T
                standard = standard @ basis
            regression = LogisticRegression(C=c, max_iter=_ITERATIONS).fit(standard, np.asarray(labels))
        return cls(mean, scale, basis, regression)

    def predicted(self, vectors: Float[np.ndarray, "example feature"]) -> np.ndarray:
        """Read labels."""
        standard = (np.asarray(vectors, dtype=np.float64) - self.mean) / self.scale
        return self.regression.predict(standard if self.basis is None else standard @ self.basis)


@cache
def _blas() -> Any:
    """Find the process's BLAS libraries, once: looking takes milliseconds, and scikit-learn has loaded them by now."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def control_labels(labels: Sequence[Any], sources: Sequence[str], *, seed: int) -> list[Any]:
    """Give every source a random label, the same wherever it occurs."""
    first = {source: label for source, label in zip(reversed(sources), reversed(labels), strict=True)}
    names = sorted(first)
    dealt = np.random.default_rng(seed).permutation(len(names))
    given = {name: first[names[int(i)]] for name, i in zip(names, dealt, strict=True)}
    return [given[source] for source in sources]


def folds(groups: Sequence[int], n: int) -> list[list[int]]:
    """Deal examples to folds, groups whole: the largest group first, to the smallest fold."""
    members: dict[int, list[int]] = {}
    for example, group in enumerate(groups):
        members.setdefault(group, []).append(example)
    if len(members) < 2:
        raise InputError("cross-validation needs two groups of clips at least; give conflicts that share fewer clips.")
    dealt: list[list[int]] = [[] for _ in range(min(n, len(members)))]
    for group in sorted(members.values(), key=lambda listed: -len(listed)):
        min(dealt, key=len).extend(group)
    return dealt


def held_out(
    vectors: Float[np.ndarray, "example feature"], labels: Sequence[Any], parts: Sequence[Sequence[int]], *, c: float
) -> np.ndarray:
    """Cross-validate: each fold is read by a probe of the others."""
    right = np.full(len(labels), np.nan)
    for part in parts:
        rest = [i for i in range(len(labels)) if i not in set(part)]
        known = [labels[i] for i in rest]
        if len(set(known)) > 1:
            read = LinearProbe.fitted(vectors[rest], known, c=c).predicted(vectors[list(part)])
            right[list(part)] = [float(a == labels[i]) for a, i in zip(read, part, strict=True)]
    return right


def looked_up(known: Sequence[Any], labels: Sequence[Any], asked: Sequence[Any]) -> Iterator[Any]:
    """Guess a label from another one alone: what most often goes with it."""

    def most_frequent(listed: Sequence[Any]) -> Any:
        return max(sorted(set(listed), key=str), key=list(listed).count)

    together: dict[Any, list[Any]] = {}
    for one, label in zip(known, labels, strict=True):
        together.setdefault(one, []).append(label)
    for one in asked:
        yield most_frequent(together.get(one, labels))
