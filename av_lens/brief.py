"""How nouns show themselves: each field in a few words, so that a repr fits a screen whatever the tensors' sizes."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_MOST = 3  # members of a collection
_WIDEST = 160  # characters of anything else


class Brief:
    """A dataclass whose repr is brief; declare it with `repr=False`."""

    def __repr__(self) -> str:
        here: Any = self
        shown = (f"{one.name}={briefly(getattr(self, one.name))}" for one in fields(here) if one.repr)
        return f"{type(self).__name__}({', '.join(shown)})"


def briefly(value: Any) -> str:
    """Show a value in a few words."""
    if hasattr(value, "shape"):
        kind = str(value.dtype).removeprefix("torch.") if hasattr(value, "dtype") else type(value).__name__
        return f"{kind} {list(value.shape)}"
    if isinstance(value, Mapping):
        members = [f"{key!r}: {briefly(value[key])}" for key in list(value)[:_MOST]]
        return "{" + _listed(members, len(value)) + "}"
    if isinstance(value, tuple | list):
        return "(" + _listed([briefly(one) for one in value[:_MOST]], len(value)) + ")"
    text = repr(value)
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}..."


def _listed(members: list[str], total: int) -> str:
    return ", ".join(members) + (f", ... {total} in all" if total > len(members) else "")
