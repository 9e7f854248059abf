"""`EdgeScores`: one number for each edge between two components, with what it should sum to.

A *sender* writes to the residual stream ("embed", "L3H5", "L3 mlp"); a *receiver* reads it ("L4H2.q", "L4H2.k",
"L4H2.v", "L4 mlp", "logits"; keys and values by query head). The score of an edge estimates what the metric does when
only this receiver reads this sender as it was in the donor run: positive means that the metric rises. Edges that do not
exist (the receiver does not come after the sender) are NaN.

    node(u)        = sum of the scores of all edges that leave u
    closure_error  = donor - baseline - node("embed")     whatever changes enters through the embedding

Means are over examples, intervals resample clusters of examples that share a clip. Saved as netCDF, without pickle.

    >>> scores = EdgeScores.of(
    ...     [[[2.0, -3.0]]], senders=["embed"], receivers=["L0 mlp", "logits"], baseline=[0.0], donor=[-0.5]
    ... )
    >>> scores.top(1)["receiver"].item(), float(scores.closure_error[0])
    ('logits', 0.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from av_lens.errors import InputError, unknown
from av_lens.results.grid import Grid
from av_lens.results.measured import Measured, require_numbers

RANKS = ("magnitude", "positive", "negative")


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Measured):
    """Scores of edges; see the module for names, sign and closure.

    Attributes:
        values: `[example, sender, receiver]`, or `[example, span, sender, receiver]` where edges are told apart by the
            positions at which they act.
        baseline: the metric of the run that an edge's change is imagined in, `[example]`.
        donor: the metric of the run that the change comes from, `[example]`.
        clusters: the cluster of each example.
        metric: what was measured.
        unit: its unit.
        direction: what was put into what, and which sign means what.
        provenance: how it was made.
    """

    kind: ClassVar[str] = "a file of edge scores"

    def __post_init__(self) -> None:
        dims = tuple(map(str, self.values.dims))
        if dims not in (("example", "sender", "receiver"), ("example", "span", "sender", "receiver")):
            raise InputError(f"edge scores have the axes example, span (or none), sender, receiver; got {dims}.")
        require_numbers(self.values, "a table of edge scores")
        named = [name for axis in ("sender", "receiver") for name in np.ravel(self.values.coords[axis])]
        if not all(isinstance(name, str) for name in named):
            raise InputError(f"senders and receivers are names; got {self.senders[:2]} and {self.receivers[:2]}.")
        if {len(self.clusters), *self.baseline.shape, *self.donor.shape} != {self.values.sizes["example"]}:
            raise InputError(
                f"{len(self.clusters)} clusters, a baseline of shape {self.baseline.shape} and a donor of shape "
                f"{self.donor.shape} for {self.values.sizes['example']} examples."
            )

    @classmethod
    def of(
        cls,
        values: Any,
        *,
        senders: Sequence[str],
        receivers: Sequence[str],
        baseline: Any,
        donor: Any,
        spans: Sequence[str] | None = None,
        clusters: Any = None,
        metric: str = "",
        **more: Any,
    ) -> EdgeScores:
        """Build edge scores from plain arrays.

        Args:
            values: `[example, (span,) sender, receiver]`.
            senders: names of the senders.
            receivers: names of the receivers.
            baseline: `[example]`.
            donor: `[example]`.
            spans: names of the spans, where the scores have that axis.
            clusters: the number of each example's cluster; None makes each its own.
            metric: what was measured.
            **more: further attributes.

        Returns:
            The scores.

        Raises:
            InputError: the shapes do not fit.
        """
        array = np.asarray(values, dtype=np.float64)
        axes = ({} if spans is None else {"span": list(spans)}) | {"sender": list(senders), "receiver": list(receivers)}
        if array.shape[1:] != tuple(map(len, axes.values())):
            sizes = {name: len(labels) for name, labels in axes.items()}
            raise InputError(f"scores have shape {array.shape}; wanted example and then {sizes}.")
        return cls._labelled(array, axes, [baseline, donor], clusters=clusters, metric=metric, **more)

    @property
    def senders(self) -> list[str]:
        """Names of the senders."""
        return self.values.coords["sender"].values.tolist()

    @property
    def receivers(self) -> list[str]:
        """Names of the receivers."""
        return self.values.coords["receiver"].values.tolist()

    @property
    def closure_error(self) -> xr.DataArray:
        """What the embedding's edges leave unexplained of donor - baseline, `[example]`; NaN without that sender."""
        if "embed" not in self.senders:
            return self.baseline * np.nan
        edges = self.values.sel(sender="embed", drop=True)
        return self.donor - self.baseline - edges.sum(edges.dims[1:])

    def nodes(self) -> Grid:
        """Sum the edges that leave each sender: to first order, what patching the sender does.

        Returns:
            A grid over `sender` (and `span`), `effects` being the sums.
        """
        sums = self.values.sum("receiver", min_count=1)
        axes = {str(name): sums.coords[name].values for name in sums.dims[1:]}
        values = sums.values + self.baseline.values.reshape(-1, *(1 for _ in axes))
        more = {name: getattr(self, name) for name in ("clusters", "metric", "unit", "direction", "provenance")}
        return Grid.of(values, axes=axes, baseline=self.baseline.values, donor=self.donor.values, **more)

    def mean(self) -> xr.DataArray:
        """Average over examples.

        Returns:
            The mean score of every edge.
        """
        return self.values.mean("example")

    def top(self, k: int = 20, *, rank: str = "magnitude", level: float | int = 0.95, seed: int = 0) -> pd.DataFrame:
        """List the strongest edges.

        Args:
            k: how many.
            rank: by "magnitude", or the most "positive" or most "negative" means.
            level: of the two-sided interval of the mean.
            seed: of the resampling.

        Returns:
            One row for each edge: `(span) sender receiver score low high`; bounds are NaN below 5 clusters.

        Raises:
            InputError: an unknown rank.
        """
        if rank not in RANKS:
            raise InputError(unknown("rank", rank, RANKS))
        mean = self.mean().values.reshape(-1)
        key = {"magnitude": -np.abs(mean), "positive": -mean, "negative": mean}[rank]
        order = np.argsort(key, kind="stable")
        order = order[~np.isnan(key[order])][: max(int(k), 0)]
        shape = self.values.shape[1:]
        places = np.unravel_index(order, shape)
        names = [str(name) for name in self.values.dims[1:]]
        axes = zip(names, places, strict=True)
        columns: dict[str, Any] = {name: self.values.coords[name].values[index] for name, index in axes}
        chosen = self.values.values.reshape(len(self.values), -1)[:, order]
        grid = Grid.of(chosen, axes={"edge": np.arange(len(order))}, baseline=None, clusters=self.clusters, shares=True)
        bounds = grid.interval(level, seed=seed)
        columns |= {"score": mean[order], "low": bounds.values[:, 0], "high": bounds.values[:, 1]}
        return pd.DataFrame(columns)

    def to_frame(self) -> pd.DataFrame:
        """Lay the scores out as a tidy frame.

        Returns:
            One row for each example and existing edge: `example (span) sender receiver score`.
        """
        frame = self.values.to_dataframe("score")["score"].dropna().reset_index()
        return pd.DataFrame(frame)

    def _shown(self) -> pd.DataFrame:
        return self.top(20)
