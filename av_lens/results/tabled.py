"""`Tabled`: a grid together with the rows that it was computed from, such as one row for each token or caption.

`grid` holds the figures with their intervals, `rows` what they are means of, for reading and for figures of one's own.
Both are saved in one netCDF file, without pickle.

    >>> import pandas as pd
    >>> from av_lens.results.grid import Grid
    >>> grid = Grid.of([[0.5]], axes={"figure": ["heard"]}, baseline=[0.0], metric="heard")
    >>> Tabled(grid, pd.DataFrame({"example": [0], "text": ["a dog"]})).to_frame()["text"].tolist()
    ['a dog']
"""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from av_lens.checks import foreign_file
from av_lens.errors import InputError
from av_lens.results.grid import Grid
from av_lens.results.netcdf import read_frame, written_frame

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
        """Give the rows.

        Returns:
            A copy.
        """
        return self.rows.copy()

    def save(self, path: str | Path) -> Path:
        """Save grid and rows as netCDF.

        Args:
            path: the file; ".nc" is added where it has no ending.

        Returns:
            The file that was written.
        """
        whole = self.grid.provenance | {_KEY: written_frame(self.rows)}
        return dataclasses.replace(self.grid, provenance=whole).save(path)

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
            return cls(dataclasses.replace(grid, provenance=rest), read_frame(grid.provenance[_KEY]))

    def __repr__(self) -> str:
        return f"{self.grid!r} with {len(self.rows)} rows ({', '.join(map(str, self.rows.columns))})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.rows.head(20).to_html()}"
