"""Opening what results save as netCDF: one door, which refuses what is not there, not ours, or too new."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from av_lens.errors import InputError
from av_lens.whole_files import write_whole


def named(path: str | Path) -> Path:
    """Give a file its ending.

    Args:
        path: the file.

    Returns:
        The path, with ".nc" where it has no ending.
    """
    return Path(path) if Path(path).suffix else Path(path).with_suffix(".nc")


def write_netcdf(data: xr.Dataset | xr.DataArray, path: Path) -> None:
    """Save as netCDF, whole or not at all.

    Args:
        data: what is saved.
        path: the file.

    Raises:
        FileError: it cannot be written.
    """
    write_whole(path, bytes(data.to_netcdf(engine="scipy")))


def opened(path: str | Path, schema: str, version: int, *, otherwise: str) -> xr.Dataset:
    """Read a saved result whole.

    Args:
        path: the file.
        schema: what it must hold, such as "av_lens.Grid".
        version: the newest version of it that is known.
        otherwise: what to say of a file that is no netCDF, after its name.

    Returns:
        Its contents, the file closed again.

    Raises:
        InputError: there is no such file, or it holds something else or a newer version.
    """
    if not Path(path).exists():
        raise InputError(f"no such file: {path}")
    try:
        with xr.open_dataset(path, engine="scipy", backend_kwargs={"mmap": False}) as found:
            data = found.load()
    except (TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} {otherwise}: {error}") from error
    kind, found_version = data.attrs.get("schema"), int(data.attrs.get("schema_version", 0))
    if kind != schema or found_version > version:
        raise InputError(
            f"{path} holds {kind or 'something else'}, version {found_version}; this av_lens reads {schema} up to "
            f"version {version}."
        )
    return data
