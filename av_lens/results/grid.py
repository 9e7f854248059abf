"""`Grid`: one number for each example and place, with what it is to be compared with.

    values      the metric of the edited run, `[example, ...places]`
    effects     values - baseline: what the edit changed; 0 where nothing was changed
    normalized  effects / (donor - baseline): 0 at the run that was edited, 1 at the donor

`baseline` is the metric of the run that was edited, `donor` that of the run the values came from, both per example. In
a grid of *shares* (direct attribution) nothing is edited: `effects` are the values themselves, `baseline` is the metric
that they sum to, and `closure_error` what is missing. Not measured is NaN.

Means are over examples; intervals resample *clusters* of examples that share a clip, and are NaN below 5 clusters.
A grid is saved as netCDF, without pickle, with its provenance and a schema version.

    >>> import numpy as np
    >>> grid = Grid.of([[1.0, 3.0]], axes={"layer": [0, 1]}, baseline=[1.0], donor=[5.0], metric="logit_diff")
    >>> grid.effects.values.tolist(), grid.normalized().values.tolist()
    ([[0.0, 2.0]], [[0.0, 0.5]])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from av_lens.checks import called
from av_lens.errors import InputError, unknown
from av_lens.results.measured import Measured, require_numbers
from av_lens.results.statistics import FEWEST_CLIPS, Bootstrap
from av_lens.upstairs import upstairs


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
        for axis, wanted in labels.items():
            if axis not in self._places:
                raise InputError(unknown("axis", axis, self._places))
            known = self.values.coords[axis].values.tolist()
            for label in wanted if isinstance(wanted, list | tuple | np.ndarray) else [wanted]:
                if label not in known:
                    raise InputError(unknown(axis, label, known))
        single = [axis for axis, wanted in labels.items() if not isinstance(wanted, list | tuple | np.ndarray)]
        chosen = {axis: list(wanted) if isinstance(wanted, tuple) else wanted for axis, wanted in labels.items()}
        return replace(self, values=self.values.sel(chosen).drop_vars(single, errors="ignore"))

    def normalized(self) -> xr.DataArray:
        """Put effects on the scale of the pair: 0 at the run that was edited, 1 at the donor.

        Returns:
            effects / (donor - baseline), NaN where the two are equal; shares over their metric in a grid of shares.
        """
        whole = self.baseline if self.shares else self.donor - self.baseline
        return self.effects / whole.where(whole != 0)

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
        if of == "values":
            return self.values, None
        whole = self.baseline if self.shares else self.donor - self.baseline
        return self.effects, whole if of == "normalized" else None

    def to_frame(self) -> pd.DataFrame:
        """Lay the grid out as a tidy frame.

        Returns:
            One row for each example and place: the axes, `value effect normalized baseline donor cluster`.
        """
        columns = {"value": self.values, "effect": self.effects, "normalized": self.normalized()}
        data = xr.Dataset(columns).to_dataframe()[list(columns)].reset_index()
        position = data["example"].to_numpy()
        lookup = {label: i for i, label in enumerate(self.values.coords["example"].values.tolist())}
        rows = np.array([lookup[label] for label in position.tolist()])
        data["baseline"] = self.baseline.values[rows]
        data["donor"] = self.donor.values[rows]
        data["cluster"] = np.asarray(self.clusters)[rows]
        return data

    def plot(self, **options: Any) -> Any:
        """Draw the grid: layers by heads as a map, other axes over layers as curves, conditions as dots, else bars.

        Args:
            **options: passed to `av_lens.plots.heads`, `.layers`, `.conditions` or `.attribution`.

        Returns:
            A plotly figure.

        Raises:
            InputError: an unknown keyword.
        """
        plots: Any = upstairs("plots")
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
