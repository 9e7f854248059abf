"""Conflicts on the bench: every cell run once, every donor ready, stacked by layout.

Cells are named picture first, sound second (`va` is the conflict: the picture's clip v seen, the sound's clip a heard).
A `Chunk` is a stack of conflicts of one layout and one wording; it runs a cell when first asked for and keeps it. A
*donor* is what a head's z becomes: another cell of the same conflict, zero, or a mean over discovery (`Means`). In the
mirrored cells (`av`, `blank_v`) a donor cell is mirrored too (a and v change places).

Choice where the protocol is silent: conflicts without a third clip have NaN donors there, so that only their own
figures are NaN.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.core.attention_mass import sink_positions, sinks_of
from av_lens.errors import ProtocolError
from av_lens.inputs.sources import ClipKeys
from av_lens.isolation.measuring.donors import (
    MEANS,
    MIRROR,
    MIRRORED_BASES,
    OTHER_LAYOUT,
    PRIMARY_DONORS,
    W_CELLS,
    AllZ,
    Means,
    align_end,
    equal_ending,
)
from av_lens.isolation.measuring.scoring import UNREAD, Candidates, Reading
from av_lens.isolation.measuring.seam import MEDIA_SITES, Engine, Recording, site_positions
from av_lens.isolation.measuring.store import Arrays, Store
from av_lens.spans import SpanMap

__all__ = ["MIRROR", "PRIMARY_DONORS", "Bench", "Chunk", "Means", "align_end"]


@dataclass(eq=False)
class Bench:
    """The conflicts of a run, their answers and the engine.

    `sinks` are those of each layout, found on discovery; `keys` knows the conflicts' files again.
    """

    engine: Engine
    conflicts: list[Any]
    candidates: Candidates
    site: str = "suffix"
    store: Store = field(default_factory=Store)
    sinks: list[tuple[SpanMap, list[int]]] = field(default_factory=list)
    keys: ClipKeys = field(default_factory=ClipKeys)
    _cells: dict[tuple[int, str | None], Any] = field(default_factory=dict)

    def wording(self, example: int, question: str) -> str | None:
        """Find the words of a question.

        Args:
            example: the conflict.
            question: "ask" (its own), "see" or "control".

        Returns:
            The words, None for its own question.
        """
        return None if question == "ask" else str(getattr(self.conflicts[example], question))

    def inputs(self, example: int, cell: str, question: str) -> Any:
        """Encode one cell of one conflict.

        Args:
            example: the conflict.
            cell: the cell.
            question: "ask", "see" or "control".

        Returns:
            The inputs.

        Raises:
            UnfinishedError: a file of the conflict is gone or was changed since the run began.
        """
        self.keys.check(self.conflicts[example])
        key = (example, self.wording(example, question))
        if key not in self._cells:
            self._cells[key] = self.engine.cells(self.conflicts[example], key[1])
        return self._cells[key][cell]

    def has_third(self, example: int) -> bool:
        """Say whether a conflict has a third clip.

        Args:
            example: the conflict.

        Returns:
            True if its w cells exist.
        """
        return getattr(self.conflicts[example], "third", None) is not None

    def find_sinks(self, examples: Sequence[int]) -> None:
        """Find every layout's sinks: media positions with over 10 times the mean incoming value-weighted attention.

        Args:
            examples: discovery's conflicts, in whose `va` they are found; other layouts have none.
        """
        found: list[tuple[SpanMap, list[np.ndarray]]] = []
        for chunk in self.chunks(examples, "suffix"):
            stack = chunk.inputs("va")
            measure = partial(self.engine.incoming, stack)
            depends = {"ids": chunk.ids}
            mass = self.store.recall("incoming attention", depends, lambda measure=measure: {"mass": measure()})["mass"]
            parts = next((parts for of, parts in found if of.layout_difference(stack.spans) is None), None)
            if parts is None:
                found.append((stack.spans, [mass]))
            else:
                parts.append(mass)
        self.sinks = [(spans, sink_positions(np.concatenate(parts), spans).tolist()) for spans, parts in found]

    def positions(self, inputs: Any, site: str) -> Int[np.ndarray, " site"]:
        """Find a site's positions in some inputs.

        Args:
            inputs: one example or a stack.
            site: the site set.

        Returns:
            The positions, increasing.

        Raises:
            ProtocolError: an unknown site, or one that these inputs do not have.
        """
        return site_positions(inputs.spans, site, sinks_of(inputs.spans, self.sinks) if site == "sinks" else ())

    def chunks(self, examples: Sequence[int], site: str | None = None) -> list[Chunk]:
        """Group conflicts by layout and wording, in stacks that fit into memory.

        Args:
            examples: the conflicts.
            site: another site than the bench's.

        Returns:
            The chunks; at the sinks those of layouts that have some.

        Raises:
            ProtocolError: no layout has sinks.
        """
        groups: dict[Any, list[int]] = defaultdict(list)
        for example in examples:
            conflict = self.conflicts[example]
            words = tuple(str(getattr(conflict, name, "")) for name in ("question", "see", "control", "prefix"))
            groups[(_layout(self.inputs(example, "va", "ask")), words)].append(example)
        parts: list[list[int]] = []
        site = site or self.site
        for group in groups.values():
            if site == "sinks" and not sinks_of(self.inputs(group[0], "va", "ask").spans, self.sinks):
                continue
            size = self.engine.together(self.inputs(group[0], "va", "ask"))
            parts += [part.tolist() for part in np.array_split(group, -(-len(group) // size))]
        if not parts:
            site_positions(self.inputs(int(examples[0]), "va", "ask").spans, site)
        return [Chunk(self, np.array(part, dtype=np.int64), site) for part in parts]


def _layout(inputs: Any) -> Any:
    spans = inputs.spans
    positions = getattr(inputs, "position_ids", None)
    rotary = None if positions is None else hashlib.sha256(positions.cpu().numpy().tobytes()).hexdigest()
    return tuple(spans.roles), rotary


@dataclass(eq=False)
class Chunk:
    """A stack of conflicts of one layout: its cells, run once each, and its donors."""

    bench: Bench
    examples: Int[np.ndarray, " batch"]
    site: str
    means: Means | None = None
    constants: dict[str, Callable[[Recording], Tensor]] = field(default_factory=dict)
    _runs: dict[tuple[str, str], Recording] = field(default_factory=dict)
    _readings: dict[tuple[str, str], Reading] = field(default_factory=dict)
    _donors: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)

    def run(self, cell: str, question: str = "ask") -> Recording:
        """Run a cell of these conflicts, or give the run that was made.

        Args:
            cell: the cell; "text_only" is the bare question.
            question: "ask", "see" or "control".

        Returns:
            The recording.
        """
        key = (cell, question)
        if key not in self._runs:
            stack = self.inputs(cell, question)
            self._runs[key] = self.bench.engine.record(stack, self.bench.positions(stack, self.site))
        return self._runs[key]

    @property
    def ids(self) -> list[str]:
        """The conflicts' names."""
        return [str(self.bench.conflicts[int(i)].id) for i in self.examples]

    def inputs(self, cell: str, question: str = "ask") -> Any:
        """Stack a cell's inputs.

        Args:
            cell: the cell; "text_only" is the bare question.
            question: "ask", "see" or "control".

        Returns:
            The stack; of a w cell only the conflicts that have it.
        """
        engine = self.bench.engine
        if cell == "text_only":
            bare = engine.text_only(str(self.bench.conflicts[int(self.examples[0])].question))
            return engine.stack([bare] * len(self.examples))
        return engine.stack([self.bench.inputs(int(i), cell, question) for i in self._present(cell)])

    def _present(self, cell: str) -> list[int]:
        if cell not in W_CELLS:
            return self.examples.tolist()
        present = [i for i in self.examples.tolist() if self.bench.has_third(i)]
        if not present:
            raise ProtocolError(
                f"the cell {cell!r} needs a third clip and none of these conflicts has one: give `third=`, or more "
                "conflicts with other answers."
            )
        return present

    def reading(self, cell: str, question: str = "ask") -> Reading:
        """Read what a cell says.

        Args:
            cell: the cell.
            question: "ask", "see" or "control".

        Returns:
            The reading, NaN (and top -2) for conflicts that lack the cell.
        """
        key = (cell, question)
        if key not in self._readings:
            depends = {"cell": cell, "question": question, "ids": self.ids}
            found = self.bench.store.recall("reading", depends, lambda: self._read(cell, question))
            self._readings[key] = Reading(found["scores"], found["top"], found["mass"])
        return self._readings[key]

    def _read(self, cell: str, question: str) -> Arrays:
        candidates = self.bench.candidates
        present = self._present(cell) if cell not in W_CELLS or self._has_w() else []
        n, k = len(self.examples), len(candidates.names)
        out = Reading(np.full((n, k), np.nan), np.full(n, UNREAD, dtype=np.int64), np.full(n, np.nan))
        if present:
            found = candidates.read(self.run(cell, question).logits, np.array(present))
            rows = np.flatnonzero(np.isin(self.examples, present))
            out.scores[rows], out.top[rows], out.mass[rows] = found.scores, found.top, found.mass
        return vars(out)

    def _has_w(self) -> bool:
        return any(self.bench.has_third(int(i)) for i in self.examples)

    def donor(self, base: str, name: str, question: str = "ask") -> AllZ:
        """Give every head's donor z for a base cell.

        Args:
            base: the cell that is edited.
            name: "zero", "mean_task", "mean_other", one of `constants`, or a cell as it is named for `va`, `blank_a`.
            question: what the base is asked.

        Returns:
            z at the base's site, on the base's device.

        Raises:
            ProtocolError: a mean donor without means, or at media positions, where it is undefined.
        """
        key = (base, name, question)
        if key in self._donors:
            return self._donors[key]
        own = self.run(base, question).site_z
        if name == "zero":
            z = torch.zeros_like(own[:, :1])
        elif name in MEANS:
            z = align_end(self._mean(base, name).to(own), own)
        elif name in self.constants:
            z = self.constants[name](self.run(base, question))
        else:
            z = self._cell_z(base, name, question)
        self._donors[key] = z
        return z

    def _mean(self, base: str, name: str) -> Tensor:
        if self.means is None:
            raise ProtocolError(f"the donor {name!r} needs discovery's means, which have not been collected.")
        if self.site in MEDIA_SITES:
            raise ProtocolError(f"the donor {name!r} is undefined at media positions: the question comes after them.")
        candidates = self.bench.candidates
        which = "see" if name == "mean_other" else ("av" if base in MIRRORED_BASES else "va")
        return self.means.donor(which, candidates.sound[self.examples], candidates.picture[self.examples])

    def _cell_z(self, base: str, name: str, question: str) -> Tensor:
        cell = self.donor_cell(base, name)
        if cell in W_CELLS and not self._has_w():  # other stacks of the half may have third clips
            return torch.full_like(self.run(base, question).site_z, torch.nan)
        # Audio alone and bare text have another layout: the donor is asked the conflict's own question there.
        asked = "ask" if base in ("audio_only", "text_only") else question
        found, own = self.run(cell, asked), self.run(base, question)
        if cell not in W_CELLS:
            return align_end(found.site_z, own.site_z, most=equal_ending(found.inputs, own.inputs))
        return self.spread(found.site_z, cell)

    def donor_cell(self, base: str, name: str) -> str:
        """Name the cell that gives a donor.

        Args:
            base: the cell that is edited.
            name: the donor, a cell as it is named for `va` and `blank_a`.

        Returns:
            The cell, mirrored where the base is.

        Raises:
            ProtocolError: `audio_only` at media positions: it has another layout.
        """
        if name in OTHER_LAYOUT and self.site in MEDIA_SITES:
            raise ProtocolError(f"the donor {name!r} is undefined at media positions: it has another layout.")
        return MIRROR.get(name, name) if base in MIRRORED_BASES else name

    def spread(self, values: Float[Tensor, "layer present ..."], cell: str) -> Float[Tensor, "layer batch ..."]:
        """Lay values of a w cell out over all conflicts.

        Args:
            values: of the conflicts that have the cell.
            cell: the cell.

        Returns:
            The same, NaN for the others.
        """
        out = torch.full((values.shape[0], len(self.examples), *values.shape[2:]), torch.nan).to(values)
        out[:, np.flatnonzero(np.isin(self.examples, self._present(cell))).tolist()] = values
        return out

    def remember(self, name: str, depends: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Measure something on these conflicts, or give the stored measurement (see `store`).

        Everything that runs the model for the isolation goes through here, so that a killed run loses little.

        Args:
            name: what is measured, as words.
            depends: what it depends on beside these conflicts, this site and the means, as plain values.
            compute: measures it; its arrays' rows are these conflicts.

        Returns:
            The arrays by name.
        """
        means = None if self.means is None else self.means.ids
        of: dict[str, Any] = {"ids": self.ids, "site": self.site, "means": means}
        if self.site == "sinks":
            of["positions"] = [positions for _, positions in self.bench.sinks]
        return self.bench.store.recall(name, {**depends, **of}, compute)

    def forget(self) -> None:
        """Drop runs and donors; readings are kept."""
        self._runs.clear()
        self._donors.clear()
