"""`LensReadout` and linear probes: what every layer's stream would say, and what can be read from it.

A probe is a multinomial logistic regression (scikit-learn) of standardized vectors. Where they are longer than there
are examples, they are first turned into the training set's row space: the L2 penalty keeps the probe inside it anyway.
*Control labels*: every source gets a label drawn at random, the same wherever it occurs, the labels' frequencies kept;
accuracy minus control accuracy is the *selectivity*. Sources: Alain and Bengio (2016); Hewitt and Liang (2019).

*Latent understanding* of a word in one example: 1 where its rank is below k at some of the positions and layers that
were read, else 0; "others" is the mean of the same maximum for other sounds' words, "excess" the difference.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from av_lens.brief import Brief
from av_lens.checks import called, parse_json, require_at_least, require_choice
from av_lens.errors import InputError
from av_lens.results.grid import Grid
from av_lens.results.provenance import Saved, plain_json, words
from av_lens.upstairs import upstairs

PENALTY_C = 0.1
_TINY = 1e-6
_ITERATIONS = 20_000  # a bound, not a cost: at a checkpoint's width, few dominant directions, a fit can need thousands


@dataclass(frozen=True, eq=False, repr=False)
class LinearProbe(Brief):
    """A fitted probe; `basis` is the training set's row space, or None where vectors are short."""

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
    members: dict[int, list[int]] = defaultdict(list)
    for example, group in enumerate(groups):
        members[group].append(example)
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
    together: dict[Any, list[Any]] = defaultdict(list)
    for one, label in zip(known, labels, strict=True):
        together[one].append(label)
    for one in asked:
        listed = together.get(one, list(labels))
        yield max(sorted(set(listed), key=str), key=listed.count)


OTHERS, EXCESS, SAID = "others", "excess", "said"
_READ, _TOP = ("example", "word", "layer", "pos"), ("example", "layer", "pos", "place")
_DIMS: dict[str, tuple[str, ...]] = {
    "ranks": _READ,
    "probabilities": _READ,
    "top_ids": _TOP,
    "top_probabilities": _TOP,
    "best_others": ("example", "layer", "other"),
    "said": ("example",),
    "clusters": ("example",),
}


@dataclass(frozen=True, eq=False, repr=False)
class LensReadout(Saved):
    """What a logit lens read.

    Attributes:
        ranks: ranks of the words, `[example, word, layer, pos]`; NaN where an example has no such position.
        probabilities: probabilities of the words, likewise.
        top_ids: the likeliest tokens, `[example, layer, pos, place]`; -1 where an example has no such position.
        top_probabilities: their probabilities.
        texts: the text of every token among them.
        best_others: the best rank over positions of other sounds' words, `[example, layer, other]`; NaN for its own.
        said: whether the first word is the model's answer, `[example]`; NaN without words.
    """

    kind: ClassVar[str] = "a saved readout"
    ranks: Grid
    probabilities: Grid
    top_ids: Int[np.ndarray, "example layer pos place"]
    top_probabilities: Float[np.ndarray, "example layer pos place"]
    texts: Mapping[int, str]
    best_others: Float[np.ndarray, "example layer other"]
    said: Float[np.ndarray, " example"]

    def __repr__(self) -> str:
        sizes = self.ranks.values.sizes
        words = ", ".join(map(str, self.ranks.values.coords["word"].values.tolist())) or "no words"
        return (
            f"LensReadout({sizes['example']} examples, {sizes['layer']} layers, {sizes['pos']} positions; {words}; "
            f"{self.best_others.shape[2]} other words)"
        )

    def best(self) -> Grid:
        """Take the best rank over positions."""
        best = self.ranks.values.min("pos")
        return self._grid(best.values, {name: best.coords[name].values for name in ("word", "layer")}, "best rank")

    def understanding(self, k: int = 5, *, by: str = "all") -> Grid:
        """Score whether the words are in the top k somewhere, against other sounds' words."""
        require_at_least("k", k, 1)
        require_choice("by", by, ("all", "layer"))
        words = self.ranks.values.coords["word"].values.tolist()
        if not words:
            raise InputError("no words were read: logit_lens(..., words=['dog']), or give it conflicts.")
        best = self.ranks.values.min("pos").values
        others = self.best_others
        if by == "all":
            best, others = best.min(2, keepdims=True), others.min(1, keepdims=True)
        hits = np.where(np.isnan(best), np.nan, best < k)
        counts = (~np.isnan(others)).sum(2)
        null = np.where(counts > 0, (others < k).sum(2) / np.maximum(counts, 1), np.nan)
        said = np.broadcast_to(self.said[:, None], null.shape)
        found = np.concatenate([hits, np.stack([null, hits[:, 0] - null, said], axis=1)], axis=1)
        axes: dict[str, Any] = {"figure": [*words, OTHERS, EXCESS, SAID]}
        name = f"latent understanding: in the top {k} at some position"
        if by == "layer":
            return self._grid(found, axes | {"layer": self.ranks.values.coords["layer"].values}, name)
        return self._grid(found[:, :, 0], axes, f"{name} and layer")

    def top(self, example: int = 0, *, layer: int | None = None, pos: int | None = None) -> pd.DataFrame:
        """List the likeliest tokens in words."""
        axes = self.ranks.values.coords
        rows: list[dict[Any, Any]] = []
        for i, at_layer in enumerate(axes["layer"].values.tolist()):
            for j, at in enumerate(axes["pos"].values.tolist()):
                ids = self.top_ids[example, i, j].tolist()
                if (layer is None or at_layer == layer) and (pos is None or at == pos) and -1 not in ids:
                    places: dict[Any, Any] = {n: self.texts[token] for n, token in enumerate(ids, 1)}
                    rows.append({"layer": at_layer, "pos": at} | places)
        return pd.DataFrame(rows)

    def plot(self, **options: Any) -> Any:
        """Draw the words' best ranks over positions, layer by layer."""
        return called("plot", upstairs("plots").layers, self.best(), **options)

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made."""
        return self.ranks.provenance

    def _data(self) -> xr.Dataset:
        data = {
            "top_ids": self.top_ids.astype(np.int32),
            "top_probabilities": self.top_probabilities,
            "said": self.said,
            "clusters": np.asarray(self.ranks.clusters, dtype=np.int32),
            "ranks": self.ranks.values.values,
            "probabilities": self.probabilities.values.values,
            "best_others": self.best_others,
        }
        axes = {name: self.ranks.values.coords[name].values for name in ("layer", "pos")}
        attributes = {"direction": self.ranks.direction}
        attributes["words"] = json.dumps(self.ranks.values.coords["word"].values.tolist())
        attributes["texts"] = json.dumps({str(token): text for token, text in self.texts.items()})
        # netCDF takes an axis without entries for one that grows, so what has none is left out.
        kept = {name: (_DIMS[name], values) for name, values in data.items() if values.size}
        return xr.Dataset(kept, coords=axes, attrs=attributes)

    @classmethod
    def _of_data(cls, data: xr.Dataset) -> LensReadout:
        made: dict[str, Any] = {"clusters": data["clusters"].values, "provenance": plain_json(data, "provenance")}
        made |= words(data, "direction")
        axes = {"word": np.array(parse_json(str(data.attrs["words"])), dtype=str)}
        axes |= {name: data.coords[name].values for name in ("layer", "pos")}
        sizes = {"example": len(data["said"])} | {name: len(labels) for name, labels in axes.items()}

        def of(name: str) -> np.ndarray:
            if name not in data and all(sizes.get(dim, 0) for dim in _DIMS[name]):
                raise ValueError(f"its {name} are missing")
            found = data[name].values if name in data else np.zeros([sizes.get(dim, 0) for dim in _DIMS[name]])
            if found.ndim != len(_DIMS[name]) or found.dtype.kind not in "biuf":
                raise ValueError(f"its {name} have the axes {data[name].dims} and the type {found.dtype}")
            return found

        grids = [xr.DataArray(of(name), dims=_DIMS[name], coords=axes) for name in ("ranks", "probabilities")]
        texts = plain_json(data, "texts")
        top, best = of("top_ids").astype(np.int64), of("best_others").astype(np.float64)
        if top.shape[:3] != grids[0].shape[:1] + grids[0].shape[2:] or best.shape[:2] != top.shape[:2]:
            raise ValueError(f"its tokens have the shape {top.shape}, its ranks {grids[0].shape}")
        if not {str(token) for token in np.unique(top[top != -1])} <= set(texts):
            raise ValueError("some of its tokens have no text")
        shares, said = (of(name).astype(np.float64) for name in ("top_probabilities", "said"))
        ranks, probabilities = readings(grids[0], "rank", **made), readings(grids[1], "probability", **made)
        named = {int(token): str(text) for token, text in texts.items()}
        return cls(ranks, probabilities, top, shares, named, best, said)

    def _grid(self, values: np.ndarray, axes: Mapping[str, Any], metric: str) -> Grid:
        unit = "tokens" if metric == "best rank" else "fraction of clips"
        made = {name: getattr(self.ranks, name) for name in ("clusters", "direction", "provenance")}
        return Grid.of(values, axes=axes, baseline=np.zeros(len(values)), metric=metric, unit=unit, **made)


def readings(values: xr.DataArray, what: str, *, clusters: Any, provenance: Mapping[str, Any], direction: str) -> Grid:
    """Make a grid of a lens's numbers: nothing is edited, so the baseline is 0."""
    axes = {name: values.coords[name].values for name in ("word", "layer", "pos")}
    said = {"metric": f"logit lens, {what}", "unit": "tokens" if what == "rank" else "probability"}
    made: dict[str, Any] = {"clusters": clusters, "direction": direction, "provenance": dict(provenance)}
    return Grid.of(values.values, axes=axes, baseline=np.zeros(len(values)), **said, **made)
