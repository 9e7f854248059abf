"""`Circuit`: the nodes that do what the model does, and how faithful, complete, minimal and stable they are.

Scores are *contributions*, in the unit of m: m(whole) - m(the node replaced), turned so that a positive score moves m
from the empty model towards the whole one, whichever way that is. `values` holds every per-example number behind the
tables:

    scores[example, empty, node]           contributions (one example where scores were given as means)
    place[empty, order, node]              each node's place in the order, 0 first; "signed" and "magnitude"
    m[example, empty, order, k]            m of the k first nodes; whole[example] and bare[example, empty] beside

The tables:

    nodes         every node: score and interval, its place, whether it is a member, in what share of bootstraps it is
    curve         f of the k first nodes, by empty donor and order
    areas         span = m(whole) - m(empty), f of the circuit, CPR and CMD; beside them the mean of random orders, and
                  p = (1 + random orders that do as well) / (1 + random orders)
    completeness  f(C without K) beside f(model without K), for sets K of members
    minimality    for each member what it adds to f, beside the set K removed in which it adds most
    links         for every two members what one adds to f beside the other less what it adds without it, and whether
                  they need each other or stand in for each other
    stability     overlap (Jaccard) of the k first nodes with those of resampled conflicts
    random        each random draw: its CPR and CMD, and f of a circuit with the circuit's own number in every layer

f, CPR and CMD are defined in `av_lens.results.faithfulness`. Saved as netCDF, without pickle.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import xarray as xr

from av_lens.checks import called
from av_lens.errors import InputError, unknown
from av_lens.results.netcdf import Saved, plain_json, read_frame, words, written_frame
from av_lens.upstairs import upstairs

TABLES = ("nodes", "curve", "areas", "completeness", "minimality", "links", "stability", "random")


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Saved):
    """A circuit and its evidence; see the module for what each table says.

    Attributes:
        values: the per-example numbers.
        nodes: one row for each candidate, best first.
        curve: f over sizes.
        areas: CPR and CMD.
        completeness: sets of members taken away.
        minimality: what each member adds.
        links: how every two members act together.
        stability: overlap over bootstraps.
        random: the random baseline.
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
        """Give the table of nodes.

        Returns:
            A copy, best first.
        """
        return self.nodes.copy()

    def plot(self, **options: Any) -> Any:
        """Draw the circuit by layer.

        Args:
            **options: passed to `av_lens.plots.circuit`.

        Returns:
            A plotly figure.

        Raises:
            InputError: an unknown keyword.
        """
        plots: Any = upstairs("plots")
        return called("plot", plots.circuit, self, **options)

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
