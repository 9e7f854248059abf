"""How much does a set of heads release? Measured once per set and donor, remembered, many sets at a time.

Sets that the search asks for nearly always share all members but one. `SetReleases.added` measures a set with each of
several further heads: the shared members are edited once, and each further head restarts at its own layer
(`edited_runs`). Values are releases, [change of M in va - change of M in av] / 2, per conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.donors import MIRROR
from av_lens.isolation.measuring.effects import mirrored
from av_lens.isolation.measuring.recordings import Head

Members = tuple[Head, ...]
Tick = Callable[[int], None]
HELD_BYTES = 4e9
"""Traces of all conflicts are kept between measurements where they take no more; else they are made again."""


@dataclass(eq=False)
class SetReleases:
    """Releases of sets by one donor on one half, each measured when first asked for.

    Attributes:
        chunks: the conflicts, stacked.
        examples: their order in the results.
        donor: the donor.
        tick: called with the number of sets just measured.
    """

    chunks: Sequence[Chunk]
    examples: Int[np.ndarray, " example"]
    donor: str
    tick: Tick | None = None
    _known: dict[frozenset[Head], Float[np.ndarray, " example"]] = field(default_factory=dict)

    def learn(self, singles: Mapping[Head, Float[np.ndarray, " example"]]) -> None:
        """Take over what was measured elsewhere."""
        self._known |= {frozenset((head,)): np.asarray(values) for head, values in singles.items()}

    def each(self, members: Sequence[Head]) -> Float[np.ndarray, " example"]:
        """Give a set's release on every conflict."""
        self.measure([tuple(members)])
        return self._known[frozenset(members)] if members else np.zeros(len(self.examples))

    def mean(self, members: Sequence[Head]) -> float:
        """Give a set's mean release."""
        values = self.each(members)
        return float(np.nanmean(values)) if (~np.isnan(values)).any() else float("nan")

    def added(self, members: Sequence[Head], heads: Sequence[Head]) -> list[float]:
        """Give the mean release of a set with one more head, for each of several."""
        unknown = [head for head in heads if frozenset((*members, head)) not in self._known]
        if unknown:
            depends = {"donor": self.donor, "members": sorted(members), "heads": unknown}
            found = self._over_chunks(
                "set and one more head", depends, partial(self._margins, sorted(members), [(head,) for head in unknown])
            )
            self._known |= {frozenset((*members, h)): values for h, values in zip(unknown, found, strict=True)}
        return [self.mean((*members, head)) for head in heads]

    def measure(self, sets: Sequence[Members]) -> None:
        """Measure sets that may share nothing."""
        unknown = list(dict.fromkeys(tuple(sorted(one)) for one in sets if one and frozenset(one) not in self._known))
        if unknown:
            depends = {"donor": self.donor, "sets": unknown}
            found = self._over_chunks("releases of sets", depends, partial(self._margins, (), unknown))
            self._known |= {frozenset(one): values for one, values in zip(unknown, found, strict=True)}

    def pairs(self, heads: Sequence[Head]) -> None:
        """Measure all pairs of some heads."""
        ordered = sorted(heads)
        wanted = [(one, two) for i, one in enumerate(ordered) for two in ordered[i + 1 :]]
        if all(frozenset(pair) in self._known for pair in wanted):
            return
        found = self._over_chunks(
            "pairs of heads", {"donor": self.donor, "heads": ordered}, partial(self._pairs, ordered)
        )
        self._known |= {frozenset(pair): values for pair, values in zip(wanted, found, strict=True)}

    def _over_chunks(
        self, name: str, depends: Mapping[str, object], compute: Callable[[Chunk, str], Float[np.ndarray, "set batch"]]
    ) -> Float[np.ndarray, "set example"]:
        """Measure on every chunk, in both cells, and lay the conflicts out in their order."""
        found = gathered(self.chunks, self.examples, name, depends, partial(self._mirrored, compute=compute))
        return np.ascontiguousarray(found["release"].T)

    def _mirrored(
        self, chunk: Chunk, compute: Callable[[Chunk, str], Float[np.ndarray, "set batch"]]
    ) -> dict[str, np.ndarray]:
        changes: list[np.ndarray] = []
        for cell in ("va", MIRROR["va"]):
            changes.append(compute(chunk, cell) - chunk.margin(cell))
            self._let_go(chunk, cell)
        return {"release": mirrored(changes[0], changes[1]).T}

    def _let_go(self, chunk: Chunk, cell: str) -> None:
        trace = chunk.run(cell).trace
        if trace is not None:
            one = sum(part.nbytes for parts in (trace.resid, trace.keys, trace.values) for part in parts)
            if 2 * len(self.chunks) * one > HELD_BYTES:
                chunk.drop_traces(cell)

    def _margins(
        self, under: Sequence[Head], sets: Sequence[Sequence[Head]], chunk: Chunk, cell: str
    ) -> Float[np.ndarray, "set batch"]:
        """M in a cell with some heads edited, and each of several sets edited on top."""
        engine, candidates, run = chunk.bench.engine, chunk.bench.candidates, chunk.run(cell)
        if under:
            run = engine.record_edited(run, chunk.z(cell, under, self.donor))
        out = np.full((len(sets), len(chunk.examples)), np.nan)
        order = sorted(range(len(sets)), key=lambda i: min(sets[i]))
        plans = [run.plan(chunk.z(cell, sets[i], self.donor)) for i in order]
        for i, one in zip(order, engine.changed(run, plans), strict=True):
            out[i] = candidates.margin(candidates.scores(one.logits), chunk.examples)
        if self.tick is not None:
            self.tick(len(sets))
        return out

    def _pairs(self, heads: Sequence[Head], chunk: Chunk, cell: str) -> Float[np.ndarray, "set batch"]:
        """All pairs: each head edited once, and every later one on top of it."""
        later = [(one, [(two,) for two in heads[i + 1 :]]) for i, one in enumerate(heads[:-1])]
        return np.concatenate([self._margins((one,), rest, chunk, cell) for one, rest in later])
