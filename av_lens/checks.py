"""Small checks of arguments, and the border for files: refusals read alike everywhere."""

import difflib
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from av_lens.errors import AvLensError, InputError, UnfinishedError, unknown

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def require_choice(kind: str, value: object, known: Iterable[object]) -> None:
    """Refuse a value that is not among the known ones."""
    options = list(known)
    if value not in options:
        raise InputError(unknown(kind, value, options))


def require_at_least(kind: str, value: float | int, least: float | int) -> None:
    """Refuse a number that is too small."""
    if not value >= least:
        raise InputError(f"{kind} must be at least {least}, not {value}.")


def near_file(path: str | os.PathLike[str]) -> str:
    """Suggest a file or folder where the one that was named is not there."""
    wanted = Path(path).expanduser()
    folder = wanted.parent
    if not folder.is_dir():
        return f"The folder {str(folder)!r} does not exist either."
    try:
        beside = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return "Check its spelling."
    near = difflib.get_close_matches(wanted.name, beside, n=1, cutoff=0.6)
    return f"Did you mean {str(folder / near[0])!r}?" if near else "Check its spelling."


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Read json from elsewhere, strictly: each key once, whole characters, real numbers."""

    def number(written: str) -> float:
        found = float(written)
        if finite and not math.isfinite(found):
            raise ValueError(f"{written} is no finite number")
        return found

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
        return found

    try:
        whole = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        if half := half_character(whole):
            raise ValueError(half)
        found = json.loads(whole, parse_float=number, parse_constant=number, object_pairs_hook=once)
        if "\\u" in whole and (half := half_character(json.dumps(found, ensure_ascii=False))):
            raise ValueError(half)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{error.msg} at {place}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found


def whole_object(found: Any, name: str) -> dict[str, Any]:
    """Refuse json that is no object."""
    if not isinstance(found, dict):
        raise ValueError(f"{name} should be a json object, found {type(found).__name__}")
    return cast(dict[str, Any], found)


def half_character(text: str) -> str:
    """Find a lone surrogate, half of a character, which no file can hold as text."""
    found = _HALF_CHARACTER.search(text)
    kind = "a lone surrogate), which no text file can hold"
    return f"half of a character (\\u{ord(found[0]):04x}, {kind}" if found else ""


@contextmanager
def foreign_file(
    path: str | os.PathLike[str], what: str, *, mend: str = "", error: type[AvLensError] = InputError
) -> Generator[None, None, None]:
    """Turn what is raised while a file from elsewhere is read, misfitting numbers too, into one sentence about it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            yield
    except (AvLensError, UnfinishedError):
        raise
    except FileNotFoundError as missing:
        raise error(f"no such file: {path}. {near_file(path)}") from missing
    except Exception as found:  # what parsers raise on foreign bytes has no common class
        first = next(iter(str(found).strip().splitlines()), "")[:200]
        why = f"{type(found).__name__}: {first}" if first else type(found).__name__
        again = mend or "Copy it again, or make it again."
        raise error(f"{path} is not {what}, or damaged ({why}). {again}") from found


def require_keywords(
    verb: str,
    given: Iterable[str],
    *takers: Callable[..., object],
    own: Iterable[str] = (),
    more: Iterable[str] = (),
    refused: Mapping[str, str] | None = None,
) -> None:
    """Refuse keywords that none of the functions they are handed on to names."""
    given = tuple(given)
    if not given:  # most calls: no signature is read
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name for taker in takers for p in inspect.signature(taker).parameters.values() if p.kind in kinds}
    reasons = refused or {}
    known = sorted((named | set(more)) - set(own) - set(reasons))
    for name in given:
        if name in reasons:
            raise InputError(f"{verb} takes no {name}=: {reasons[name]}.")
        if name not in known:
            raise InputError(unknown(f"keyword of {verb}", name, known))


def called(verb: str, function: Callable[..., Any], *given: object, **options: object) -> Any:
    """Hand keywords on to a function that may not know them."""
    require_keywords(verb, options, function, own=tuple(inspect.signature(function).parameters)[: len(given)])
    return function(*given, **options)
