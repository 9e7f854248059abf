"""`EdgeScores` and `Circuit`: scores of edges, the nodes that do what the model does, and how faithful they are.

    f(C) = [m(C) - m(empty)] / [m(whole) - m(empty)]       0 for the empty circuit, 1 for the whole model
    CPR  = integral of f(C_k) d(k / nodes)              the k nodes with the largest signed scores; larger is better
    CMD  = integral of |1 - f(C_k)| d(k / nodes)        the k nodes with the largest scores in size; smaller is better

with k = max(1, round(share x nodes)) over `SHARES` and trapezoids in k, from the smallest k to the whole model. All are
ratios of means over examples; where the interval of m(whole) - m(empty) includes 0 every figure is NaN. Source: MIB,
Mueller et al. (2025, 2504.13151); f: Wang et al. (2022).

    >>> sizes(64)
    [1, 3, 6, 13, 32, 64]

`EdgeScores`: a *sender* writes to the residual stream ("embed", "L3H5", "L3 mlp"); a *receiver* reads it ("L4H2.q",
"L4H2.k", "L4H2.v", "L4 mlp", "logits"; keys and values by query head). A score estimates what the metric does when only
this receiver reads this sender as it was in the donor run; NaN where the receiver does not come after the sender.
closure_error = donor - baseline - node("embed"): whatever changes enters through the embedding.

    >>> scores = EdgeScores.of(
    ...     [[[2.0, -3.0]]], senders=["embed"], receivers=["L0 mlp", "logits"], baseline=[0.0], donor=[-0.5]
    ... )
    >>> scores.top(1)["receiver"].item(), float(scores.closure_error[0])
    ('logits', 0.5)

A `Circuit`'s scores are m(whole) - m(the node replaced), turned so that a positive score moves m from the empty model
towards the whole one. Its `values`: `scores[example, empty, node]`, `place[empty, order, node]` (0 first; orders
"signed" and "magnitude"), `m[example, empty, order, k]` of the k first nodes, `whole[example]`, `bare[example, empty]`.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from av_lens.checks import called
from av_lens.errors import InputError, unknown
from av_lens.results.grid import Grid, Measured, require_numbers
from av_lens.results.mib import mib_form
from av_lens.results.provenance import Saved, plain_json, read_frame, words, written_frame
from av_lens.results.statistics import FEWEST_CLIPS, Bootstrap, Interval, interval
from av_lens.upstairs import upstairs
from av_lens.whole_files import write_whole

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_TAILS = (2.5, 97.5)


def sizes(n: int) -> list[int]:
    """List the sizes at which a ranking is measured."""
    return sorted({max(1, round(share * n)) for share in SHARES})


@dataclass(frozen=True, eq=False)
class Scale:
    """The scale of f: 0 at the empty model, 1 at the whole."""

    boot: Bootstrap  # the examples' weights
    whole: Float[np.ndarray, " example"]  # m of the model
    bare: Float[np.ndarray, " example"]  # m with every candidate replaced

    @cached_property
    def span(self) -> tuple[float, float, float]:
        """m(whole) - m(empty), and its interval."""
        return interval(self.boot, self.whole - self.bare)

    @property
    def usable(self) -> bool:
        """Whether there is anything to share: the span's interval leaves 0 out (the span itself, without one)."""
        value, low, high = self.span
        return bool(value != 0 and not low <= 0 <= high)

    @property
    def sign(self) -> float:
        """1 where the whole model's m lies above the empty one's, -1 where it lies below."""
        return -1.0 if self.span[0] < 0 else 1.0

    def ratio(self, change: Float[np.ndarray, "circuit example"]) -> Interval:
        """Put changes of m on the scale."""
        if not self.usable:
            return Interval(*np.full((3, len(change)), np.nan))
        return self.boot.ratio(change.T, self.whole - self.bare)

    def share(self, m: Float[np.ndarray, "circuit example"]) -> Interval:
        """Compute f of circuits."""
        return self.ratio(m - self.bare)

    def area(
        self, m: Float[np.ndarray, "size example"], at: Sequence[int], n: int, *, distance: bool
    ) -> tuple[float, float, float]:
        """Integrate over sizes."""
        areas = [math.nan] * 3
        if self.usable:
            areas[0] = float(self._area(np.ones((1, len(self.whole))), m, at, n, distance)[0])
        if self.usable and self.boot.n_clips >= FEWEST_CLIPS:
            areas[1:] = np.nanpercentile(self._area(self.boot.weights, m, at, n, distance), _TAILS).tolist()
        return areas[0], areas[1], areas[2]

    def _area(
        self, weights: np.ndarray, m: np.ndarray, at: Sequence[int], n: int, distance: bool
    ) -> Float[np.ndarray, " draw"]:
        with np.errstate(invalid="ignore", divide="ignore"):
            f = (weights @ (m - self.bare).T) / (weights @ (self.whole - self.bare))[:, None]
        f[~np.isfinite(f)] = np.nan  # a draw that left nothing below the line is no draw
        return np.asarray(np.trapezoid(np.abs(1 - f) if distance else f, np.asarray(at) / n, axis=1))


RANKS = ("magnitude", "positive", "negative")


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Measured):
    """Scores of edges: positive means that the metric rises when the receiver reads the sender as in the donor run.

    Attributes:
        values: `[example, sender, receiver]`, or `[example, span, sender, receiver]` where told apart by positions.
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
        values = self.values.sum("receiver", min_count=1) + self.baseline
        axes = {str(name): values.coords[name].values for name in values.dims[1:]}
        more = {name: getattr(self, name) for name in ("clusters", "metric", "unit", "direction", "provenance")}
        return Grid.of(values, axes=axes, baseline=self.baseline, donor=self.donor, **more)

    def mean(self) -> xr.DataArray:
        """Average over examples: the mean score of every edge."""
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
        axes = zip(self.values.dims[1:], np.unravel_index(order, self.values.shape[1:]), strict=True)
        columns: dict[str, Any] = {str(name): self.values.coords[name].values[index] for name, index in axes}
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
        return pd.DataFrame(self.values.to_series().rename("score").dropna().reset_index())

    def _shown(self) -> pd.DataFrame:
        return self.top(20)


TABLES = ("nodes", "curve", "areas", "completeness", "minimality", "links", "stability", "random")


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Saved):
    """A circuit and its evidence.

    Attributes:
        values: the per-example numbers.
        nodes: every node, best first: score, place, whether it is a member, in what share of bootstraps it is.
        curve: f of the k first nodes, by empty donor and order.
        areas: span = m(whole) - m(empty), f, CPR and CMD, beside random orders' mean and p = (1 + as good) / (1 + all).
        completeness: f(C without K) beside f(model without K), for sets K of members.
        minimality: what each member adds to f, beside the set K removed in which it adds most.
        links: for every two members what one adds beside the other less what it adds without it.
        stability: overlap (Jaccard) of the k first nodes with those of resampled conflicts.
        random: each random draw's CPR, CMD, and f with the circuit's own number of nodes in every layer.
        what: m in words.
        unit: its unit.
        provenance: how it was made.
    """

    kind: ClassVar[str] = "a saved circuit"
    values: xr.Dataset
    nodes: pd.DataFrame
    curve: pd.DataFrame
    areas: pd.DataFrame
    completeness: pd.DataFrame
    minimality: pd.DataFrame
    links: pd.DataFrame
    stability: pd.DataFrame
    random: pd.DataFrame
    what: str
    unit: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.nodes["node"]) != set(self.values.coords["node"].values.tolist()):
            raise InputError("a circuit's table of nodes and its values name different nodes.")
        if not self.members:
            raise InputError("a circuit has one member at least.")

    @property
    def members(self) -> list[str]:
        """The circuit's nodes, best first."""
        return self.nodes.loc[self.nodes["member"], "node"].tolist()

    @property
    def empty(self) -> str:
        """The empty donor that the circuit was chosen with."""
        return str(self.values.coords["empty"].values[0])

    @property
    def order(self) -> str:
        """The order that the circuit was cut from: "magnitude" or "signed"."""
        return str(self.provenance.get("order", "magnitude"))

    def faithfulness(self, empty: str | None = None) -> tuple[float, float, float]:
        """Give f of the circuit.

        Args:
            empty: the empty donor; None for the one that it was chosen with.

        Returns:
            f and its interval.

        Raises:
            InputError: an unknown donor.
        """
        return self.figure("f", empty)

    def figure(self, name: str, empty: str | None = None) -> tuple[float, float, float]:
        """Give one figure of the table of areas.

        Args:
            name: "span", "f", "CPR" or "CMD".
            empty: the empty donor; None for the one that the circuit was chosen with.

        Returns:
            The figure and its interval.

        Raises:
            InputError: an unknown figure or donor.
        """
        asked = empty or self.empty
        for kind, word, column in (("empty donor", asked, "empty"), ("figure", name, "figure")):
            known = self.areas[column].unique().tolist()
            if word not in known:
                raise InputError(unknown(kind, word, known))
        row = self.areas[(self.areas["empty"] == asked) & (self.areas["figure"] == name)].iloc[0]
        return float(row["value"]), float(row["low"]), float(row["high"])

    def to_frame(self) -> pd.DataFrame:
        """Give the table of nodes, best first: a copy."""
        return self.nodes.copy()

    def to_mib(self, path: str | Path) -> Path:
        """Write the circuit's scores and members in the json form of MIB's circuit track.

        Args:
            path: the file to write.

        Returns:
            The file.

        Raises:
            InputError: a circuit that was saved before its model's sizes were kept.
            FileError: the file cannot be written.
        """
        if "sizes" not in self.provenance:
            raise InputError("this circuit does not say its model's sizes, which MIB's form needs: find it again.")
        columns = (self.nodes[name].tolist() for name in ("node", "score", "member"))
        rows = {node: (score, member) for node, score, member in zip(*columns, strict=True)}
        write_whole(Path(path), json.dumps(mib_form(rows, **self.provenance["sizes"])) + "\n")
        return Path(path)

    def plot(self, **options: Any) -> Any:
        """Draw the circuit by layer.

        Args:
            **options: passed to `av_lens.plots.circuit`.

        Returns:
            A plotly figure.

        Raises:
            InputError: an unknown keyword.
        """
        return called("plot", upstairs("plots").circuit, self, **options)

    def _data(self) -> xr.Dataset:
        tables = {name: written_frame(getattr(self, name)) for name in TABLES}
        return self.values.assign_attrs(what=self.what, unit=self.unit, tables=json.dumps(tables))

    @classmethod
    def _of_data(cls, data: xr.Dataset) -> Circuit:
        kept = plain_json(data, "tables")
        parts: dict[str, Any] = {name: read_frame(kept[name]) for name in TABLES}
        parts |= words(data, "what", "unit") | {"provenance": plain_json(data, "provenance")}
        made = cls(data.drop_attrs(), **parts)
        repr(made)  # what it says of itself needs every part
        return made

    def __repr__(self) -> str:
        f, low, high = self.faithfulness()
        bounds = f" ({low:.2f} to {high:.2f})" if low == low else ""
        shown = " ".join(self.members[:12]) + (" ..." if len(self.members) > 12 else "")
        return f"Circuit({len(self.members)} of {len(self.nodes)} nodes: {shown}; f = {f:.2f}{bounds}; {self.what})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.nodes.head(20).to_html(index=False)}"
