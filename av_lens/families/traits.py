"""What replay must know about an architecture: where its layers read more than a restart gives them.

A restart at layer l and position p hands the layers three things: the recorded stream, the recorded keys and values
before p, and the mask of the first layer. It is exact where a layer reads nothing else and nothing after its own
position. Each adapter declares where that does not hold (`replay_traits(config)`), and replay either allows for it or
runs full hooked forwards, which are always exact, and says why in `trace.hooked_because`.

| trait | what breaks | what replay does |
|---|---|---|
| `bidirectional` | inside a block of media, positions read later ones | starts at the block's first position |
| `sliding_window` | some layers have another mask than the first | hooked, where the prompt is longer than the window |
| `deepstack` | features are added to the stream between layers | hooked |
| `per_layer_inputs` | layers read embeddings of their own | hooked |
| `shared_keys` | layers read another layer's keys and values | hooked |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from av_lens.errors import ModelError, unknown
from av_lens.spans import ROLES

_HOOKED = {
    "deepstack": "features are added to the stream between its layers (deepstack)",
    "per_layer_inputs": "its layers read embeddings of their own beside the stream (per-layer inputs)",
    "shared_keys": "some of its layers read another layer's keys and values (shared keys)",
}


@dataclass(frozen=True, kw_only=True)
class ReplayTraits:
    """Where an architecture breaks what a restart assumes.

    Attributes:
        bidirectional: roles whose positions read each other both ways, within a run of neighbouring positions.
        sliding_window: how many positions the layers with a window read, where other layers have none or another; None
            where all layers have one mask.
        deepstack: whether features are added to the stream between layers.
        per_layer_inputs: whether layers read embeddings of their own.
        shared_keys: whether layers read another layer's keys and values.
    """

    bidirectional: tuple[str, ...] = ()
    sliding_window: int | None = None
    deepstack: bool = False
    per_layer_inputs: bool = False
    shared_keys: bool = False

    def __post_init__(self) -> None:
        for role in self.bidirectional:
            if role not in ROLES:
                raise ModelError(unknown("role", role, ROLES))
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelError(f"a sliding window holds at least one position, not {self.sliding_window}.")

    def obstacle(self, n_pos: int) -> str:
        """Say in words why a run of so many positions cannot be restarted; empty where a restart is exact."""
        reasons = [reason for name, reason in _HOOKED.items() if getattr(self, name)]
        if self.sliding_window is not None and n_pos > self.sliding_window:
            reasons.append(
                f"some of its layers read a sliding window of {self.sliding_window} positions, and there are {n_pos}"
            )
        return f"this architecture cannot be restarted: {'; '.join(reasons)}" if reasons else ""

    def restart(self, position: int, roles: Sequence[str]) -> int:
        """Find where a restart must begin for a change at a position: at the start of a block that reads both ways."""
        if position >= len(roles) or roles[position] not in self.bidirectional:
            return position
        while position and roles[position - 1] in self.bidirectional:
            position -= 1
        return position
