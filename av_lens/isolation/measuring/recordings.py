"""What is kept of a run that edits start from, and an edit of heads written as a plan.

A `Recording` is a run of a stack of one-layout inputs: its logits at the asked position, every head's z from the site
on, the trace from which it is restarted (made when first needed), and the edits that it was made under, if any.
`Recording.plan` is the one place where "these heads get that z" becomes a `Plan`: edits act at the *site*'s positions
only. `freeze=True` also holds every later layer's z at the recording's own: what is left is the head's own write,
through MLPs and norms that are recomputed (the *direct* effect).

A frozen edit needs the asked position alone: every later head's output there is the recording's own, whatever happened
at other positions. The restart therefore begins at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.errors import ProtocolError, unknown
from av_lens.inputs import AVInputs
from av_lens.interventions import Edit, Plan, Site, replace
from av_lens.replay.traces import Trace
from av_lens.spans import SpanMap

Head = tuple[int, int]
Values = Mapping[Head, Float[Tensor, "_one_or_batch site d_head"]]
SITES = ("suffix", "generation", "audio", "sinks")
MEDIA_SITES = ("audio", "sinks")
"""Sites before the question: nothing that is asked can change what heads do there."""


@dataclass(eq=False)
class Recording:
    """A run of a stack of inputs.

    `window` is the run of positions from the site's first to the asked one, `final` the stream that enters the final
    norm at the asked position; `under` are the edits that the run was made with.
    """

    inputs: AVInputs
    site: Int[np.ndarray, " site"]
    window: Int[np.ndarray, " window"]
    logits: Float[Tensor, "batch d_vocab"]
    z: Float[Tensor, "layer batch window head d_head"]
    final: Float[Tensor, "batch d_model"]
    under: Values = field(default_factory=dict)
    trace: Trace | None = None

    @property
    def site_z(self) -> Float[Tensor, "layer batch site head d_head"]:
        """Every head's z at the site."""
        inside = torch.from_numpy(np.searchsorted(self.window, self.site))
        return self.z[:, :, inside]

    def plan(self, values: Values, *, freeze: bool = False) -> Plan:
        """Give heads another z at the site, on top of the edits that the run was made with.

        A restart computes the edited run's own layers anew from the first edit's on: only edits there are made again.
        """
        first, last = min(layer for layer, _ in values), self.site[-1:]
        if freeze and last[0] != self.window[-1]:
            return Plan()  # no head's own write at another position reaches the asked one
        restarts = self.trace is not None and not self.trace.hooked_because
        under = {h: z for h, z in self.under.items() if h not in values and (h[0] >= first or not restarts)}
        narrow = freeze and (restarts or not under)
        edits = edits_at(last if narrow else self.site, under | dict(values))
        if freeze:
            after = range(first + 1, len(self.z))
            edits += [replace(Site("z", layer, positions=last.tolist()), self.z[layer][:, -1:]) for layer in after]
        return Plan(edits)


def edits_at(positions: Int[np.ndarray, " place"], values: Values) -> list[Edit]:
    """Write heads' new z as edits at some of the site's last positions."""
    at, n = positions.tolist(), len(positions)
    return [
        replace(Site("z", layer, head=head, positions=at), z[:, -n:] if z.shape[1] > 1 else z)
        for (layer, head), z in values.items()
    ]


@dataclass(frozen=True, eq=False)
class Edited:
    """An edited run at the asked position: its logits, and the stream that enters the final norm."""

    logits: Float[Tensor, "batch d_vocab"]
    final: Float[Tensor, "batch d_model"]


def site_positions(spans: SpanMap, site: str, sinks: Sequence[int] = ()) -> Int[np.ndarray, " site"]:
    """Find a site's positions in a prompt, ascending; an unknown site and one without positions are refused."""
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
