"""What `Grid` and `EdgeScores` share: numbers by example and place, and the runs that they are compared with."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from av_lens.errors import InputError
from av_lens.results.netcdf import Saved, plain_json, words

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
        clusters = more.pop("clusters")
        clusters = tuple(range(n)) if clusters is None else tuple(int(c) for c in clusters)
        return cls(xr.DataArray(array, dims=("example", *axes), coords=coords), *made, clusters=clusters, **more)

    def _data(self) -> xr.Dataset:
        clusters = xr.DataArray(np.asarray(self.clusters, dtype=np.int32), dims="example")
        lines = {name: getattr(self, name) for name in _LINES}
        said = {name: getattr(self, name) for name in _WORDS}
        return xr.Dataset({"values": self.values} | lines | {"clusters": clusters}, attrs=said)

    @classmethod
    def _of_data(cls: type[Kind], data: xr.Dataset, **more: Any) -> Kind:
        clusters = tuple(int(c) for c in data["clusters"].values)
        lines = {name: data[name] for name in _LINES}
        rest = {"provenance": plain_json(data, "provenance"), **words(data, *_WORDS)}
        return cls(values=data["values"], clusters=clusters, **lines, **rest, **more)

    def __repr__(self) -> str:
        sizes = " x ".join(f"{size} {name}" for name, size in self.values.sizes.items())
        partial = f"; {self.partial}" if self.partial else ""
        return f"{type(self).__name__}({self.metric} [{self.unit}], {sizes}; {self.direction}{partial})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self._shown().to_html()}"

    def _shown(self) -> pd.DataFrame:
        """The table that a notebook shows."""
        raise NotImplementedError


def require_numbers(values: xr.DataArray, what: str) -> None:
    """Refuse values that are no numbers, or that lie on an axis without labels; `what` says what they are of."""
    labels = {name: values.coords[name] for name in values.dims if name in values.coords}
    good = {name for name, found in labels.items() if found.dims == (name,) and found.dtype.kind != "S"}
    bare = [str(name) for name in values.dims if name not in good]
    if values.dtype.kind not in "biuf" or bare:
        raise InputError(f"{what} holds numbers on labelled axes; got {values.dtype}, without labels: {bare}.")
