"""`Comparison`: did training repair it, and in the same nodes? Two checkpoints A and B on one manifest, paired.

`outcome` of a node is "unchanged" unless Holm's p is below .05; then "gone" (from above A's delta to within it),
"weaker", "new" (the other way round) or "stronger"; "not measured" where one of the two is missing. Positive changes
mean that B has more of it; figures are logits, of captions rates. Not measured is NaN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import xarray as xr

from av_lens.brief import Brief
from av_lens.checks import called
from av_lens.errors import InputError
from av_lens.results.provenance import Saved, plain_json, read_frame, words, written_frame
from av_lens.upstairs import upstairs

_CHANGE = ("n", "a", "b", "change", "low", "high")
COLUMNS: dict[str, tuple[str, ...]] = {
    "behaviour": ("half", "quantity", *_CHANGE),
    "nodes": (
        "name", "layer", "head", "site", "role_a", "role_b", "confirmed_a", "confirmed_b", "estimand", "donor",
        *_CHANGE, "delta", "p", "p_holm", "outcome",
    ),
    "captions": ("arm", "figure", *_CHANGE),
    "conflicts": ("id", "half", "C_a", "C_b", "G_a", "G_b"),
}  # fmt: skip
"""Columns of each table."""
OUTCOMES = ("gone", "weaker", "new", "stronger", "unchanged", "not measured")


def frame(name: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Build one of the tables."""
    return pd.DataFrame([dict(row) for row in rows], columns=list(COLUMNS[name]))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Brief, Saved):
    """What differs between two checkpoints; see the module for signs and columns.

    Attributes:
        verdict: the finding in words with its numbers.
        verdict_kind: "changed" or "no change found".
        a: the first model's name.
        b: the second's.
        behaviour: changes of C, G and the gap.
        nodes: changes of what is named in either.
        captions: changes of captions, where both have them.
        conflicts: what each conflict does in both.
        stamps: "exploratory" where the conflicts are too few for a verdict.
        reasons: what is missing, a sentence each.
        provenance: where it comes from.
    """

    kind: ClassVar[str] = "a saved comparison"
    verdict: str
    verdict_kind: str
    a: str
    b: str
    behaviour: pd.DataFrame
    nodes: pd.DataFrame
    captions: pd.DataFrame
    conflicts: pd.DataFrame
    stamps: tuple[str, ...]
    reasons: tuple[str, ...]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, columns in COLUMNS.items():
            if (found := list(getattr(self, name).columns)) != list(columns):
                raise InputError(f"table {name!r} of a comparison has columns {found}; it needs {list(columns)}.")
        if strange := sorted(set(self.nodes["outcome"]) - set(OUTCOMES)):
            raise InputError(f"an outcome is one of {', '.join(OUTCOMES)}; found {strange[0]!r}.")

    def plot(self, **options: Any) -> Any:
        """Draw the changes of behaviour, and every node in both models.

        Args:
            **options: passed to `av_lens.plots.changes`.

        Returns:
            A plotly figure.

        Raises:
            InputError: an unknown keyword.
        """
        return called("plot", upstairs("plots").changes, self, **options)

    def report(self, path: str | Path, **options: Any) -> Path:
        """Write the comparison as one self-contained page.

        Args:
            path: the html file to write.
            **options: passed to `av_lens.reports.write_comparison`.

        Returns:
            The path that was written.

        Raises:
            InputError: an unknown keyword.
        """
        return called("report", upstairs("reports").write_comparison, self, path, **options)

    def _data(self) -> xr.Dataset:
        tables = {name: written_frame(getattr(self, name)) for name in COLUMNS}
        said = {name: getattr(self, name) for name in ("verdict", "verdict_kind", "a", "b")}
        lists = {name: list(getattr(self, name)) for name in ("stamps", "reasons")}
        return xr.Dataset(attrs=said | {"tables": json.dumps(tables), "lists": json.dumps(lists)})

    @classmethod
    def _of_data(cls, data: xr.Dataset) -> Comparison:
        kept, lists = plain_json(data, "tables"), plain_json(data, "lists")
        parts: dict[str, Any] = {name: read_frame(kept[name]) for name in COLUMNS}
        parts |= {name: tuple(map(str, lists[name])) for name in ("stamps", "reasons")}
        return cls(
            provenance=plain_json(data, "provenance"), **words(data, "verdict", "verdict_kind", "a", "b"), **parts
        )
