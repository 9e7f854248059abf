"""Where a result came from, and results as netCDF files: one door in, which refuses what is not whole, and one out."""

import hashlib
import json
import platform
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from av_lens.checks import foreign_file, parse_json, whole_object
from av_lens.errors import InputError
from av_lens.whole_files import MOST_BYTES, TIMES, write_whole

PACKAGES = ("av-lens", "torch", "transformers", "transformer-lens", "numpy")
_PACKAGE = Path(__file__).resolve().parents[1]


def stamp(**more: Any) -> dict[str, Any]:
    """Note when, by which versions, and under which choices a result was made."""
    made = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version()}
    return made | {"versions": versions()} | {name: plain(value) for name, value in more.items()}


def versions() -> dict[str, str]:
    """Find the installed versions of what computes."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@cache
def source_hash() -> str:
    """Hash the package's own python files, so that a changed program never passes off an earlier one's numbers."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Turn a value into plain data: dictionaries, lists, strings, numbers, None."""
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset | range):
        return [plain(item) for item in value]
    return str(value)


def linked(groups: Sequence[Iterable[str]]) -> tuple[int, ...]:
    """Find which examples belong together because they share a source, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    named: dict[str, int] = {}
    ends = [(i, named.setdefault(one, len(groups) + len(named))) for i, group in enumerate(groups) for one in group]
    size = len(groups) + len(named)
    joined = coo_array((np.ones(len(ends)), np.array(ends, dtype=np.int32).reshape(-1, 2).T), shape=(size, size))
    order: dict[int, int] = {}
    labels = connected_components(joined, directed=False)[1][: len(groups)].tolist() if groups else []
    return tuple(order.setdefault(label, len(order)) for label in labels)


Kind = TypeVar("Kind", bound="Saved")
_KINDS = ("object", "str", "string", "bool", "int64", "int32", "float64", "float32")


class Saved:
    """A result that is saved as netCDF, without pickle, with its provenance, its kind and its schema's version."""

    kind: ClassVar[str]  # what a file of it is, in words, such as "a saved grid"
    schema_version: ClassVar[int] = 1

    def save(self, path: str | Path) -> Path:
        """Save the result as netCDF.

        Args:
            path: the file; ".nc" is added where it has no ending.

        Returns:
            The file that was written.
        """
        result: Any = self
        target = Path(path) if Path(path).suffix else Path(path).with_suffix(".nc")
        says = {"schema": f"av_lens.{type(self).__name__}", "schema_version": self.schema_version}
        says["provenance"] = json.dumps(plain(result.provenance), sort_keys=True)
        write_netcdf(self._data().assign_attrs(says), target)
        return target

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Open what was saved.

        Args:
            path: the file.

        Returns:
            The result, equal to the one that was saved.

        Raises:
            InputError: there is no such file, or it holds no such result of a known version.
        """
        with opened(path, f"av_lens.{cls.__name__}", cls.schema_version, what=cls.kind) as data:
            return cls._of_data(data)

    def _data(self) -> xr.Dataset:
        raise NotImplementedError

    @classmethod
    def _of_data(cls: type[Kind], data: xr.Dataset) -> Kind:
        raise NotImplementedError


def write_netcdf(data: xr.Dataset | xr.DataArray, path: Path) -> None:
    """Save as netCDF, whole or not at all."""
    write_whole(path, bytes(data.to_netcdf(engine="scipy")))


@contextmanager
def opened(path: str | Path, schema: str, version: int, *, what: str) -> Generator[xr.Dataset, None, None]:
    """Read a saved result whole (at most `TIMES` the file's size); whatever then fails is said of the file."""
    with foreign_file(path, what):
        # No mmap: the file may be written again, or removed, while the result is in use.
        options: dict[str, Any] = {"backend_kwargs": {"mmap": False}, "decode_times": False, "decode_timedelta": False}
        with Path(path).open("rb") as file:
            if file.read(3) != b"CDF":
                raise ValueError("it does not begin as one")
            file.seek(0)
            with xr.open_dataset(file, engine="scipy", **options) as found:
                data = found.load()
        if data.nbytes > MOST_BYTES + TIMES * Path(path).stat().st_size:
            raise ValueError(f"it says that it holds {data.nbytes} bytes")
        kind, found_version = data.attrs.get("schema"), int(data.attrs.get("schema_version", 0))
        if kind != schema or found_version > version:
            raise InputError(
                f"{path} holds {kind or 'something else'}, version {found_version}; this av_lens reads {schema} up to "
                f"version {version}."
            )
        yield data


def words(data: xr.Dataset, *names: str) -> dict[str, str]:
    """Take texts from a saved result."""
    return {name: str(data.attrs[name]) for name in names}


def plain_json(data: xr.Dataset, name: str) -> dict[str, Any]:
    """Take what was saved as json from a saved result."""
    return whole_object(parse_json(str(data.attrs[name]), finite=False), name)


def written_frame(frame: pd.DataFrame) -> list[list[Any]]:
    """Write a table as plain data."""
    return [[str(name), str(frame[name].dtype), plain(frame[name].tolist())] for name in frame.columns]


def read_frame(columns: Any) -> pd.DataFrame:
    """Read a table from plain data."""
    for _, kind, _ in columns:
        if kind not in _KINDS:
            raise ValueError(f"a column of type {str(kind)[:40]!r}")
    if len({len(values) for _, _, values in columns}) > 1:
        raise ValueError("columns of unequal length")
    return pd.DataFrame({str(name): pd.Series(list(values), dtype=kind) for name, kind, values in columns})
