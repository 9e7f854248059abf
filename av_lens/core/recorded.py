"""What metrics ask of a recorded run: its input, and what it said."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor


@runtime_checkable
class Recorded(Protocol):
    """A run that was recorded (`replay.recording.Record`)."""

    @property
    def x(self) -> Any:
        """Its input."""
        ...

    def logits_at(self, rows: Int64[Tensor, " row"]) -> Float[Tensor, "batch row d_vocab"]:
        """Its logits at some positions."""
        ...
