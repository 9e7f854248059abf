"""Conflicts on the bench: every cell run once, every donor ready, stacked by layout.

Cells are named picture first, sound second (`va` is the conflict: the picture's clip v seen, the sound's clip a heard).
A `Chunk` is a stack of conflicts of one layout and one wording; it runs a cell when first asked for and keeps it. A
*donor* is what a head's z becomes: another cell of the same conflict, zero, or a mean over discovery (`Means`). In the
mirrored cells (`av`, `blank_v`) a donor cell is mirrored too (a and v change places).

Choices where the protocol is silent: a donor of other length than the site is aligned from the end, and what overhangs
keeps the run's own z; conflicts without a third clip have NaN donors there, so that only their own figures are NaN.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.errors import ProtocolError
from av_lens.isolation.engine import Engine, Recording
from av_lens.isolation.scoring import Candidates, Reading
from av_lens.isolation.store import Arrays, Store

_PAIRS = (("va", "av"), ("vv", "aa"), ("wa", "wv"), ("vw", "aw"), ("blank_a", "blank_v"), ("v_muted", "a_muted"))
MIRROR = {one: two for pair in _PAIRS for one, two in (pair, pair[::-1])} | {"blank_muted": "blank_muted"}
MIRRORED_BASES = ("av", "blank_v")
W_CELLS = ("wa", "wv", "vw", "aw")
MEANS = ("mean_task", "mean_other")
PRIMARY_DONORS = ("blank_muted", "mean_other", "zero")

AllZ = Float[Tensor, "layer batch site head d_head"]


def align_end(donor: Float[Tensor, "layer batch donor_site head d_head"], base: AllZ) -> AllZ:
    """Lay a donor over a run of another length, the last positions on each other.

    Args:
        donor: the donor's z at its site.
        base: the run's own z at its site; kept where the donor does not reach.

    Returns:
        z of the base's shape.
    """
    have, want = donor.shape[2], base.shape[2]
    if have == want:
        return donor
    out = base.clone()
    k = min(have, want)
    out[:, :, want - k :] = donor[:, :, have - k :]
    return out


@dataclass(eq=False)
class Bench:
    """The conflicts of a run, their answers and the engine; `third[i]` says whether conflict i has a clip w."""

    engine: Engine
    conflicts: list[Any]
    candidates: Candidates
    site: str = "suffix"
    store: Store = field(default_factory=Store)
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
        """
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

    def chunks(self, examples: Sequence[int], site: str | None = None) -> list[Chunk]:
        """Group conflicts by layout and wording, in stacks that fit into memory.

        Args:
            examples: the conflicts.
            site: another site than the bench's.

        Returns:
            The chunks.
        """
        groups: dict[Any, list[int]] = defaultdict(list)
        for example in examples:
            conflict = self.conflicts[example]
            words = tuple(str(getattr(conflict, name, "")) for name in ("question", "see", "control", "prefix"))
            groups[(_layout(self.inputs(example, "va", "ask")), words)].append(example)
        parts: list[list[int]] = []
        for group in groups.values():
            size = self.engine.together(self.inputs(group[0], "va", "ask"))
            parts += [part.tolist() for part in np.array_split(group, -(-len(group) // size))]
        return [Chunk(self, np.array(part, dtype=np.int64), site or self.site) for part in parts]


def _layout(inputs: Any) -> Any:
    spans = inputs.spans
    positions = getattr(inputs, "position_ids", None)
    rotary = None if positions is None else hashlib.sha256(positions.cpu().numpy().tobytes()).hexdigest()
    return tuple(spans.roles), rotary


@dataclass(eq=False)
class Means:
    """Every head's z at the site over discovery, for the two mean donors.

    `z[name]` is `[layer, example, site, head, d_head]` on the CPU, name being "va", "av" (asked their own question) or
    "see" (`va` asked `see`); `sound` and `picture` are the examples' answers.
    """

    z: dict[str, Tensor]
    sound: Int[np.ndarray, " example"]
    picture: Int[np.ndarray, " example"]
    ids: tuple[str, ...] = ()

    @classmethod
    def over(cls, chunks: Sequence[Chunk]) -> Means:
        """Collect a half.

        Args:
            chunks: discovery's conflicts.

        Returns:
            The means' ingredients.

        Raises:
            ProtocolError: sites of different lengths under one question (conflicts asked in different words).
        """
        z: dict[str, Tensor] = {}
        for name, cell, question in (("va", "va", "ask"), ("av", "av", "ask"), ("see", "va", "see")):
            parts = [chunk.run(cell, question).site_z.cpu() for chunk in chunks]
            if len({part.shape[2] for part in parts}) > 1:
                shortest = min(part.shape[2] for part in parts)
                parts = [part[:, :, -shortest:] for part in parts]
            z[name] = torch.cat(parts, dim=1)
        examples = np.concatenate([chunk.examples for chunk in chunks])
        candidates = chunks[0].bench.candidates
        ids = tuple(str(chunks[0].bench.conflicts[int(i)].id) for i in examples)
        return cls(z, candidates.sound[examples], candidates.picture[examples], ids)

    def donor(self, name: str, sound: Int[np.ndarray, " batch"], picture: Int[np.ndarray, " batch"]) -> AllZ:
        """Average over the conflicts that share no answer with each edited one.

        Args:
            name: "va", "av" or "see".
            sound: the edited conflicts' sound answers.
            picture: and their picture's.

        Returns:
            The leave-out mean of each edited conflict; NaN where all share an answer with it.
        """
        apart = np.ones((len(sound), len(self.sound)), dtype=bool)
        for mine in (sound, picture):
            for theirs in (self.sound, self.picture):
                apart &= mine[:, None] != theirs[None]
        with np.errstate(invalid="ignore", divide="ignore"):
            weights = apart / apart.sum(1, keepdims=True)
        return torch.einsum("bn,lnshd->lbshd", torch.from_numpy(weights).to(self.z[name]), self.z[name])


@dataclass(eq=False)
class Chunk:
    """A stack of conflicts of one layout: its cells, run once each, and its donors."""

    bench: Bench
    examples: Int[np.ndarray, " batch"]
    site: str
    means: Means | None = None
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
            engine = self.bench.engine
            if cell == "text_only":
                bare = engine.text_only(str(self.bench.conflicts[int(self.examples[0])].question))
                stack = engine.stack([bare] * len(self.examples))
            else:
                stack = engine.stack([self.bench.inputs(int(i), cell, question) for i in self._present(cell)])
            self._runs[key] = engine.record(stack, self.site)
        return self._runs[key]

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
            candidates = self.bench.candidates
            present = self._present(cell) if cell not in W_CELLS or self._has_w() else []
            n, k = len(self.examples), len(candidates.names)
            out = Reading(np.full((n, k), np.nan), np.full(n, -2, dtype=np.int64), np.full(n, np.nan))
            if present:
                found = candidates.read(self.run(cell, question).logits, np.array(present))
                rows = np.flatnonzero(np.isin(self.examples, present))
                out.scores[rows], out.top[rows], out.mass[rows] = found.scores, found.top, found.mass
            self._readings[key] = out
        return self._readings[key]

    def _has_w(self) -> bool:
        return any(self.bench.has_third(int(i)) for i in self.examples)

    def donor(self, base: str, name: str, question: str = "ask") -> AllZ:
        """Give every head's donor z for a base cell.

        Args:
            base: the cell that is edited.
            name: "zero", "mean_task", "mean_other", or a cell as it is named for `va` and `blank_a`.
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
        else:
            z = align_end(self._cell_z(base, name, question), own)
        self._donors[key] = z
        return z

    def _mean(self, base: str, name: str) -> Tensor:
        if self.means is None:
            raise ProtocolError(f"the donor {name!r} needs discovery's means, which have not been collected.")
        if self.site == "audio":
            raise ProtocolError(f"the donor {name!r} is undefined at media positions: the question comes after them.")
        candidates = self.bench.candidates
        which = "see" if name == "mean_other" else ("av" if base in MIRRORED_BASES else "va")
        return self.means.donor(which, candidates.sound[self.examples], candidates.picture[self.examples])

    def _cell_z(self, base: str, name: str, question: str) -> Tensor:
        cell = MIRROR.get(name, name) if base in MIRRORED_BASES else name
        # Audio alone and bare text have another layout: the donor is asked the conflict's own question there.
        found = self.run(cell, "ask" if base in ("audio_only", "text_only") else question).site_z
        if cell not in W_CELLS:
            return found
        out = torch.full((found.shape[0], len(self.examples), *found.shape[2:]), torch.nan).to(found)
        out[:, np.flatnonzero(np.isin(self.examples, self._present(cell))).tolist()] = found
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
        ids = [str(self.bench.conflicts[int(i)].id) for i in self.examples]
        means = None if self.means is None else self.means.ids
        return self.bench.store.recall(name, {**depends, "ids": ids, "site": self.site, "means": means}, compute)

    def forget(self) -> None:
        """Drop runs and donors; readings are kept."""
        self._runs.clear()
        self._donors.clear()
