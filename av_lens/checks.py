"""Small checks of arguments, so that refusals read alike everywhere.

Each says what was asked, what would have been accepted, and raises the error class that its caller names.
"""

from __future__ import annotations

from collections.abc import Iterable

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
