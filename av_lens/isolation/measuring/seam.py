"""What does the isolation ask of a model? The one seam: recordings, swaps, and the `Engine` that runs them.

A `Recording` is an unedited run of a stack of one-layout inputs (its logits at the asked position, every head's z from
the site on). A `Swap` says which heads get what z instead, and which other outputs what value. An `Engine` answers with
an `Edited` run: its logits at the asked position, and the stream that entered the final norm there.

A swap acts at the *site*'s positions only. `freeze=True` also holds every later layer's z at the recording's own: what
is left is the head's own write, through MLPs and norms that are recomputed (the *direct* effect).

*Norm frozen*: logits read from a run's stream with the final norm dividing by what it divided by in the unedited run of
that cell. Reading out is then linear, so that what a change of the stream does to the logits is the same whatever the
norm would have made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.errors import ProtocolError, unknown

Head = tuple[int, int]
SITES = ("suffix", "generation", "audio", "sinks")
MEDIA_SITES = ("audio", "sinks")
"""Sites before the question: nothing that is asked can change what heads do there."""


@dataclass(frozen=True, eq=False)
class Part:
    """An output that is no head's z, and what it becomes at the site: `value` is `[batch or 1, site, d]`.

    Attributes:
        component: "mlp_out", "k" or "v".
        layer: its layer.
        head: the key-value head; None where there are no heads.
        value: the new value.
    """

    component: str
    layer: int
    head: int | None
    value: Float[Tensor, "one_or_batch site d"]


@dataclass(frozen=True, eq=False)
class Swap:
    """Heads `(layer, head)` and what their z becomes at the site: one `[batch or 1, pos, d_head]` each."""

    heads: tuple[Head, ...]
    values: tuple[Float[Tensor, "one_or_batch site d_head"], ...]
    freeze: bool = False
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, eq=False)
class Recording:
    """An unedited run of a stack of inputs.

    `window` are the positions from the site's first on, `site` the site's own; `z` covers the window. `final` is the
    residual stream that enters the final norm at the asked position.
    """

    inputs: Any
    site: Int[np.ndarray, " site"]
    window: Int[np.ndarray, " window"]
    logits: Float[Tensor, "batch d_vocab"]
    z: Float[Tensor, "layer batch window head d_head"]
    final: Float[Tensor, "batch d_model"]
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def site_z(self) -> Float[Tensor, "layer batch site head d_head"]:
        """Every head's z at the site."""
        inside = torch.from_numpy(np.searchsorted(self.window, self.site))
        return self.z[:, :, inside]


@dataclass(frozen=True, eq=False)
class Edited:
    """An edited run of a recording's inputs, at the asked position.

    Attributes:
        logits: what it says.
        final: the stream that enters its final norm.
    """

    logits: Float[Tensor, "batch d_vocab"]
    final: Float[Tensor, "batch d_model"]


@runtime_checkable
class Engine(Protocol):
    """What the isolation asks of a model."""

    @property
    def n_layers(self) -> int:
        """Fusion layers."""
        ...

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        ...

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads of a layer."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The outputs beside z that a swap may replace: "mlp_out", "k", "v"."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Resolves answers to token ids."""
        ...

    def cells(self, conflict: Any, question: str | None) -> Any:
        """The conflict's cells, asked its own question (None) or another; `audio_only_v` mirrors `audio_only`."""
        ...

    def text_only(self, question: str) -> Any:
        """The bare question, without any media."""
        ...

    def stack(self, inputs: Sequence[Any]) -> Any:
        """Join inputs of one layout along the batch."""
        ...

    def together(self, inputs: Any) -> int:
        """How many inputs of this length one stack may hold."""
        ...

    def record(self, inputs: Any, positions: Int[np.ndarray, " site"]) -> Recording:
        """Run a stack unedited; the site is at these positions."""
        ...

    def capture(
        self, inputs: Any, positions: Int[np.ndarray, " site"], components: Sequence[str]
    ) -> Mapping[str, Float[Tensor, "layer batch site ..."]]:
        """Run a stack unedited and keep some of `parts` at the site."""
        ...

    def incoming(self, inputs: Any) -> Float[np.ndarray, "batch pos"]:
        """How much value-weighted attention each position gets from the suffix, all layers and heads together."""
        ...

    def edited(self, recording: Recording, swaps: Sequence[Swap]) -> Iterator[Float[Tensor, "batch d_vocab"]]:
        """The logits at the asked position under each swap, in order."""
        ...

    def changed(self, recording: Recording, swaps: Sequence[Swap]) -> Iterator[Edited]:
        """The edited run under each swap, in order."""
        ...

    def record_edited(self, recording: Recording, swap: Swap) -> Recording:
        """Run a recording's inputs under a swap, to be edited further (`edited_runs.further`)."""
        ...

    def linear_logits(
        self, recording: Recording, final: Float[Tensor, "*more batch d_model"], ids: Int[Tensor, " token"]
    ) -> Float[Tensor, "*more batch token"]:
        """The tokens' logits of a stream, the final norm dividing by what it divided by in the recording."""
        ...

    def writes(self, recording: Recording, ids: Int[Tensor, " token"]) -> Float[Tensor, "layer head batch token"]:
        """What each head writes directly to the tokens' logits at the asked position, at the run's own norm scale."""
        ...

    def write_norms(self, recording: Recording) -> Float[np.ndarray, "layer head"]:
        """The mean over examples and site positions of the norm of z W_O."""
        ...


def site_positions(spans: Any, site: str, sinks: Sequence[int] = ()) -> Int[np.ndarray, " site"]:
    """Find a site's positions in a prompt.

    Args:
        spans: the prompt's `SpanMap`.
        site: "suffix" (question, header and generation position), "generation", "audio" or "sinks".
        sinks: the sinks of this layout, found on discovery.

    Returns:
        The positions, increasing.

    Raises:
        ProtocolError: an unknown site, or one that this prompt does not have.
    """
    if site not in SITES:
        raise ProtocolError(unknown("site", site, SITES))
    found = np.asarray(sinks if site == "sinks" else spans[site].positions, dtype=np.int64)
    if not len(found):
        why = (
            ": no media position of this layout gets 10 times the mean value-weighted attention from the suffix in "
            "discovery's conflicts. Search other sites."
            if site == "sinks"
            else f"; it has {spans!r}."
        )
        raise ProtocolError(f"the site {site!r} names no position of this prompt{why}")
    return np.sort(found)
