"""`Grid`: one number for each example and place, with what it is to be compared with, alone or with its rows.

    values      the metric of the edited run, `[example, ...places]`
    effects     values - baseline: what the edit changed; 0 where nothing was changed
    normalized  effects / (donor - baseline): 0 at the run that was edited, 1 at the donor

In a grid of *shares* (direct attribution) nothing is edited: `effects` are the values themselves, `baseline` is the
metric that they sum to, and `closure_error` what is missing. Not measured is NaN. Intervals resample *clusters* of
examples that share a clip. Grids, and `Tabled` grids with their rows, are saved as one netCDF file, without pickle.

    >>> import numpy as np
    >>> grid = Grid.of([[1.0, 3.0]], axes={"layer": [0, 1]}, baseline=[1.0], donor=[5.0], metric="logit_diff")
    >>> grid.effects.values.tolist(), grid.normalized().values.tolist()
    ([[0.0, 2.0]], [[0.0, 0.5]])
    >>> import pandas as pd
    >>> grid = Grid.of([[0.5]], axes={"figure": ["heard"]}, baseline=[0.0], metric="heard")
    >>> Tabled(grid, pd.DataFrame({"example": [0], "text": ["a dog"]})).to_frame()["text"].tolist()
    ['a dog']
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from av_lens.checks import called, foreign_file
from av_lens.errors import InputError, unknown
from av_lens.results.provenance import Saved, plain_json, read_frame, words, written_frame
from av_lens.results.statistics import FEWEST_CLIPS, Bootstrap
from av_lens.upstairs import upstairs

Kind = TypeVar("Kind", bound="Measured")
_LINES = ("baseline", "donor")
_WORDS = ("metric", "unit", "direction")


@dataclass(frozen=True, eq=False, repr=False)
class Measured(Saved):
    """Labelled numbers `[example, ...places]`, a baseline and a donor `[example]`, and the cluster of each example."""

    values: xr.DataArray
    baseline: xr.DataArray
    donor: xr.DataArray
    clusters: tuple[int, ...]
    metric: str
    unit: str = ""
    direction: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def partial(self) -> str:
        """How far an interrupted measurement came, in words; empty where all is there."""
        return str(self.provenance.get("partial", ""))

    @classmethod
    def _labelled(cls: type[Kind], array: np.ndarray, axes: Mapping[str, Any], lines: list[Any], **more: Any) -> Kind:
        """Build one from arrays that fit the axes; without clusters each example is one of its own."""
        n = len(array)
        coords = {"example": np.arange(n)} | {name: np.asarray(labels) for name, labels in axes.items()}
        made: list[xr.DataArray] = []
        for name, line in zip(_LINES, lines, strict=True):
            found = np.asarray(line, dtype=np.float64)
            if found.shape != (n,):
                raise InputError(f"{name} needs one number for each of {n} examples; got {found.shape}.")
            made.append(xr.DataArray(found, dims="example", coords={"example": coords["example"]}))
        given = more.pop("clusters")
        clusters = tuple(int(c) for c in (range(n) if given is None else given))
        return cls(xr.DataArray(array, dims=("example", *axes), coords=coords), *made, clusters=clusters, **more)

    def _data(self) -> xr.Dataset:
        clusters = xr.DataArray(np.asarray(self.clusters, dtype=np.int32), dims="example")
        said = {name: getattr(self, name) for name in _WORDS}
        figures = {name: getattr(self, name) for name in ("values", *_LINES)}
        return xr.Dataset(figures | {"clusters": clusters}, attrs=said)

    @classmethod
    def _of_data(cls: type[Kind], data: xr.Dataset, **more: Any) -> Kind:
        clusters = tuple(int(c) for c in data["clusters"].values)
        more |= {name: data[name] for name in ("values", *_LINES)} | words(data, *_WORDS)
        return cls(clusters=clusters, provenance=plain_json(data, "provenance"), **more)

    def __repr__(self) -> str:
        sizes = " x ".join(f"{size} {name}" for name, size in self.values.sizes.items())
        partial = f"; {self.partial}" if self.partial else ""
        return f"{type(self).__name__}({self.metric} [{self.unit}], {sizes}; {self.direction}{partial})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self._shown().to_html()}"

    def _shown(self) -> pd.DataFrame:
        raise NotImplementedError


def require_numbers(values: xr.DataArray, what: str) -> None:
    """Refuse values that are no numbers, or that lie on an axis without labels; `what` says what they are of."""
    labels = {name: values.coords[name] for name in values.dims if name in values.coords}
    good = {name for name, found in labels.items() if found.dims == (name,) and found.dtype.kind != "S"}
    bare = [str(name) for name in values.dims if name not in good]
    if values.dtype.kind not in "biuf" or bare:
        raise InputError(f"{what} holds numbers on labelled axes; got {values.dtype}, without labels: {bare}.")


@dataclass(frozen=True, eq=False, repr=False)
class Grid(Measured):
    """Labelled numbers of an intervention or an attribution; see the module for what each means.

    Attributes:
        values: `[example, ...places]`, labelled.
        baseline: the metric of the run that was edited, or that shares sum to, `[example]`.
        donor: the metric of the run that values were taken from, `[example]`; NaN where there is none.
        clusters: the cluster of each example.
        metric: what was measured.
        unit: its unit.
        direction: what was put into what, or which sign means what.
        shares: whether the values are shares of the baseline.
        provenance: how it was made.
    """

    kind: ClassVar[str] = "a saved grid"
    shares: bool = False

    def __post_init__(self) -> None:
        if not self.values.dims or self.values.dims[0] != "example":
            raise InputError(f"a grid's first axis is example; got {tuple(map(str, self.values.dims))}.")
        n = self.values.sizes["example"]
        require_numbers(self.values, "a grid")
        for name in ("baseline", "donor"):
            line = getattr(self, name)
            if line.shape != (n,) or line.dtype.kind not in "biuf":
                raise InputError(f"{name} needs one number for each of {n} examples; got {line.dtype} {line.shape}.")
        if len(self.clusters) != n:
            raise InputError(f"{len(self.clusters)} clusters for {n} examples.")

    @classmethod
    def of(
        cls,
        values: Any,
        *,
        axes: Mapping[str, Any],
        baseline: Any,
        donor: Any = None,
        clusters: Any = None,
        metric: str = "",
        **more: Any,
    ) -> Grid:
        """Build a grid from plain arrays.

        Args:
            values: `[example, ...]`.
            axes: the labels of every axis after example, in order.
            baseline: `[example]`.
            donor: `[example]`, or None where there is none.
            clusters: the number of each example's cluster; None makes each its own.
            metric: what was measured.
            **more: further attributes of the grid.

        Returns:
            The grid.

        Raises:
            InputError: the shapes do not fit.
        """
        array = np.asarray(values, dtype=np.float64)
        wanted = tuple(len(labels) for labels in axes.values())
        if array.ndim < 1 or array.shape[1:] != wanted:
            sizes = dict(zip(axes, wanted, strict=True))
            raise InputError(f"values have shape {array.shape}; the axes {sizes} follow example.")
        lines = [np.full(len(array), np.nan) if line is None else line for line in (baseline, donor)]
        return cls._labelled(array, axes, lines, clusters=clusters, metric=metric, **more)

    @property
    def effects(self) -> xr.DataArray:
        """What each edit changed, values - baseline; in a grid of shares the shares."""
        return self.values.copy() if self.shares else self.values - self.baseline

    @property
    def closure_error(self) -> xr.DataArray:
        """How far shares are from summing to their metric, `[example]`; NaN where the grid holds no shares."""
        if not self.shares:
            return self.baseline * np.nan
        return self.baseline - self.values.sum(self._places)

    @property
    def _places(self) -> tuple[str, ...]:
        return tuple(str(dim) for dim in self.values.dims[1:])

    def sel(self, **labels: Any) -> Grid:
        """Choose some places by their labels.

        Args:
            **labels: for an axis (`edge="video -> generation"`), one label, which takes the axis out, or a list.

        Returns:
            The smaller grid, same examples and baselines.

        Raises:
            InputError: an unknown axis or label.
        """
        single = [axis for axis, wanted in labels.items() if not isinstance(wanted, list | tuple | np.ndarray)]
        listed = {axis: [wanted] if axis in single else list(wanted) for axis, wanted in labels.items()}
        for axis, wanted in listed.items():
            if axis not in self._places:
                raise InputError(unknown("axis", axis, self._places))
            known = self.values.coords[axis].values.tolist()
            for label in wanted:
                if label not in known:
                    raise InputError(unknown(axis, label, known))
        return replace(self, values=self.values.sel(listed).squeeze(single, drop=True))

    def normalized(self) -> xr.DataArray:
        """Put effects on the scale of the pair: 0 at the run that was edited, 1 at the donor.

        Returns:
            effects / (donor - baseline), NaN where the two are equal; shares over their metric in a grid of shares.
        """
        return self.effects / self._whole.where(self._whole != 0)

    @property
    def _whole(self) -> xr.DataArray:
        return self.baseline if self.shares else self.donor - self.baseline

    def mean(self, of: str = "effects") -> xr.DataArray:
        """Average over examples.

        Args:
            of: "effects", "values", or "normalized" (a ratio of means, not a mean of ratios).

        Returns:
            The mean of every place; NaN examples are left out.

        Raises:
            InputError: an unknown `of`.
        """
        above, below = self._ratio(of)
        if below is None:
            return above.mean("example")
        return above.mean("example") / below.where(above.notnull()).mean("example")

    def interval(self, level: float | int = 0.95, *, of: str = "effects", seed: int = 0) -> xr.DataArray:
        """Bound the mean by resampling clusters of examples (percentile bootstrap, 5,000 draws).

        Args:
            level: of the two-sided interval.
            of: "effects", "values" or "normalized".
            seed: of the resampling.

        Returns:
            `[..., bound]` with bounds "low" and "high"; NaN below 5 clusters.

        Raises:
            InputError: an unknown `of`, or a level outside 0 to 1.
        """
        if not 0 < level < 1:
            raise InputError(f"level {level} is not between 0 and 1; 0.95 is usual.")
        above, below = self._ratio(of)
        names, group = np.unique(np.asarray(self.clusters), return_inverse=True)
        bounds = np.full((*above.shape[1:], 2), np.nan)
        if len(names) >= FEWEST_CLIPS:
            top = above.values.reshape(len(above), -1)
            bottom = np.ones_like(top) if below is None else np.broadcast_to(below.values[:, None], top.shape)
            known = ~(np.isnan(top) | np.isnan(bottom))
            sums = np.zeros((2, len(names), top.shape[1]))
            for number, array in enumerate((top, bottom)):
                np.add.at(sums[number], group, np.where(known, array, 0.0))
            found = Bootstrap.of_clusters(len(names), seed=seed).ratio(*sums, level=float(level), at_once=256)
            bounds = np.stack([found.low, found.high], axis=-1).reshape(bounds.shape)
        coords = {name: above.coords[name] for name in above.dims[1:]} | {"bound": ["low", "high"]}
        return xr.DataArray(bounds, dims=(*above.dims[1:], "bound"), coords=coords)

    def _ratio(self, of: str) -> tuple[xr.DataArray, xr.DataArray | None]:
        if of not in ("effects", "values", "normalized"):
            raise InputError(unknown("figure", of, ("effects", "values", "normalized")))
        return (self.values if of == "values" else self.effects), (self._whole if of == "normalized" else None)

    def to_frame(self) -> pd.DataFrame:
        """Lay the grid out as a tidy frame.

        Returns:
            One row for each example and place: the axes, `value effect normalized baseline donor cluster`.
        """
        columns: dict[str, Any] = {"value": self.values, "effect": self.effects, "normalized": self.normalized()}
        lines = {"baseline": self.baseline.values, "donor": self.donor.values, "cluster": np.asarray(self.clusters)}
        columns |= {name: ("example", line) for name, line in lines.items()}
        return xr.Dataset(columns).to_dataframe()[list(columns)].reset_index()

    def plot(self, **options: Any) -> Any:
        """Draw the grid: layers by heads as a map, other axes over layers as curves, conditions as dots, else bars.

        Args:
            **options: passed to `av_lens.plots.heads`, `.layers`, `.conditions` or `.attribution`.

        Returns:
            A plotly figure.

        Raises:
            InputError: an unknown keyword.
        """
        plots = upstairs("plots")
        places = {name for name in self._places if self.values.sizes[name] > 1 or name in ("layer", "head")}
        if {"layer", "head"} <= places and not {"key", "query", "condition", "edge"} & places:
            draw = plots.heads
        elif "layer" in places:
            draw = plots.layers
        else:
            draw = plots.conditions if "condition" in self._places else plots.attribution
        return called("plot", draw, self, **options)

    def _data(self) -> xr.Dataset:
        return super()._data().assign_attrs(shares=int(self.shares))

    @classmethod
    def _of_data(cls, data: xr.Dataset, **more: Any) -> Grid:
        return super()._of_data(data, shares=bool(data.attrs["shares"]), **more)

    def _shown(self) -> pd.DataFrame:
        return self.mean().to_series().rename("mean effect").to_frame().head(20)


_KEY = "rows"


@dataclass(frozen=True, eq=False, repr=False)
class Tabled:
    """Figures and the rows behind them.

    Attributes:
        grid: the figures, per example.
        rows: what they were computed from, with a column `example`.
    """

    grid: Grid
    rows: pd.DataFrame

    def __post_init__(self) -> None:
        if "example" not in self.rows.columns:
            raise InputError(f"the rows need a column 'example'; they have {list(self.rows.columns)}.")

    @property
    def partial(self) -> str:
        """How far an interrupted measurement came, in words; empty where all is there."""
        return self.grid.partial

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made."""
        return self.grid.provenance

    def mean(self, of: str = "effects") -> xr.DataArray:
        """Average over examples.

        Args:
            of: as in `Grid.mean`.

        Returns:
            The mean of every figure.
        """
        return self.grid.mean(of)

    def interval(self, level: float | int = 0.95, *, of: str = "effects", seed: int = 0) -> xr.DataArray:
        """Bound the mean by resampling clusters of examples.

        Args:
            level: of the two-sided interval.
            of: as in `Grid.interval`.
            seed: of the resampling.

        Returns:
            `[..., bound]` with bounds "low" and "high"; NaN below 5 clusters.
        """
        return self.grid.interval(level, of=of, seed=seed)

    def to_frame(self) -> pd.DataFrame:
        """Give the rows: a copy."""
        return self.rows.copy()

    def save(self, path: str | Path) -> Path:
        """Save grid and rows as netCDF.

        Args:
            path: the file; ".nc" is added where it has no ending.

        Returns:
            The file that was written.
        """
        return replace(self.grid, provenance=self.provenance | {_KEY: written_frame(self.rows)}).save(path)

    @classmethod
    def load(cls, path: str | Path) -> Tabled:
        """Open what was saved.

        Args:
            path: the file.

        Returns:
            Grid and rows, equal to those that were saved.

        Raises:
            InputError: there is no such file, or it holds no rows.
        """
        grid = Grid.load(path)
        if _KEY not in grid.provenance:
            raise InputError(f"{path} holds a grid without rows; open it with Grid.load.")
        rest = {name: value for name, value in grid.provenance.items() if name != _KEY}
        with foreign_file(path, "a grid with its rows"):
            return cls(replace(grid, provenance=rest), read_frame(grid.provenance[_KEY]))

    def __repr__(self) -> str:
        return f"{self.grid!r} with {len(self.rows)} rows ({', '.join(map(str, self.rows.columns))})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.rows.head(20).to_html()}"
