"""Small checks of arguments, so that refusals read alike everywhere.

Each says what was asked, what would have been accepted, and raises the error class that its caller names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from av_lens.errors import AvLensError, InputError, unknown


def require_choice(kind: str, value: object, known: Iterable[object], error: type[AvLensError] = InputError) -> None:
    """Refuse a value that is not among the known ones.

    Args:
        kind: what the value is, such as "return_type".
        value: what was given.
        known: everything accepted.
        error: the class to raise.

    Raises:
        AvLensError: the value is not known; the nearest is named.
    """
    options = list(known)
    if value not in options:
        raise error(unknown(kind, value, options))


def require_at_least(kind: str, value: float | int, least: float | int, error: type[AvLensError] = InputError) -> None:
    """Refuse a number that is too small.

    Args:
        kind: what the number is, such as "max_new_tokens".
        value: what was given.
        least: the smallest accepted.
        error: the class to raise.

    Raises:
        AvLensError: the value is below `least` or not a number.
    """
    if not value >= least:
        raise error(f"{kind} must be at least {least}, not {value}.")


def require_keywords(
    verb: str,
    given: Iterable[str],
    *takers: Callable[..., object],
    own: Iterable[str] = (),
    more: Iterable[str] = (),
    refused: Mapping[str, str] | None = None,
    error: type[AvLensError] = InputError,
) -> None:
    """Refuse keywords that none of the functions they are handed on to names.

    Args:
        verb: whose keywords they are.
        given: the keywords.
        *takers: where they go; what these name in their signatures is accepted.
        own: parameters of the takers that the verb fills in itself.
        more: accepted keywords that stand in no signature.
        refused: keywords that are not taken though a taker names them, each with the reason and the mend.
        error: the class to raise.

    Raises:
        AvLensError: a keyword is not known (the nearest is named), or not taken.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name for taker in takers for p in inspect.signature(taker).parameters.values() if p.kind in kinds}
    reasons = refused or {}
    known = sorted((named | set(more)) - set(own) - set(reasons))
    for name in given:
        if name in reasons:
            raise error(f"{verb} takes no {name}=: {reasons[name]}.")
        if name not in known:
            raise error(unknown(f"keyword of {verb}", name, known))


def called(verb: str, function: Callable[..., Any], *given: object, **options: object) -> Any:
    """Hand keywords on to a function that may not know them.

    Args:
        verb: whose keywords they are.
        function: where they go.
        *given: its first arguments.
        **options: the keywords.

    Returns:
        What the function returns.

    Raises:
        InputError: a keyword that the function does not name; the nearest is named.
    """
    require_keywords(verb, options, function, own=tuple(inspect.signature(function).parameters)[: len(given)])
    return function(*given, **options)
