"""Conflicts on the bench: every cell run once, every donor ready, stacked by layout (a `Chunk`)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.core.readings import sink_positions, sinks_of
from av_lens.errors import ProtocolError
from av_lens.inputs import AVInputs
from av_lens.inputs.conflict import ClipKeys
from av_lens.inputs.model_inputs import shared
from av_lens.interventions import Plan
from av_lens.isolation.measuring.crew import Elsewhere
from av_lens.isolation.measuring.donors import Means, align_end, equal_ending
from av_lens.isolation.measuring.engine import (
    ENCODING_SITES,
    MEANS,
    MEDIA_SITES,
    MIRROR,
    MIRRORED_BASES,
    MLP,
    OTHER_LAYOUT,
    W_CELLS,
    AllOutputs,
    ModelEngine,
    Node,
    Recording,
    Values,
    Z,
    listed_nodes,
    part_of,
    site_positions,
)
from av_lens.isolation.measuring.scoring import Candidates, CellReading, Edited, Said, Spoken
from av_lens.isolation.measuring.store import Arrays, Store
from av_lens.memory import Bounded
from av_lens.spans import SpanMap

Progress = Callable[[str, int, int], None]
RUNS_BYTES = 1 << 29
"""Memory for recorded runs and donors: what was used last is kept, all else is made again."""
DESCRIBE = "describe"


T = TypeVar("T")


@dataclass(eq=False)
class Bench:
    """The conflicts of a run, their answers and engine; the wordings are "ask", "see", "control" and "describe"."""

    engine: ModelEngine
    conflicts: list[Any]
    candidates: Candidates
    site: str = "suffix"
    store: Store = field(default_factory=Store)
    sinks: list[tuple[SpanMap, list[int]]] = field(default_factory=list)
    keys: ClipKeys = field(default_factory=ClipKeys)
    mlps: bool = True
    progress: Progress = lambda stage, done, total: None
    _kept: Bounded[Any] = field(init=False, default_factory=lambda: Bounded(RUNS_BYTES))

    @property
    def shape(self) -> tuple[int, int]:
        """Of tables `[layer, node]`."""
        return self.engine.n_layers, self.engine.n_heads + self.mlps

    @property
    def nodes(self) -> list[Node]:
        """All heads and MLPs, layer by layer."""
        return listed_nodes(*self.shape, self.mlps)

    def inputs(self, example: int, cell: str, question: str) -> AVInputs:
        """Encode one cell of one conflict; refused where a clip's file was changed since the run began."""
        conflict = self.conflicts[example]
        self.keys.check(conflict)
        bare = dataclasses.replace(conflict, prefix="") if question == DESCRIBE else conflict
        return self.engine.cells(bare, None if question == "ask" else str(getattr(conflict, question)))[cell]

    def kept(self, chunk: Chunk, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """Give what was made of a stack, a run or a donor, or make it (again)."""
        return self._kept.once((chunk, *key), make)

    def forget(self, chunk: Chunk) -> None:
        """Drop what was made of a stack."""
        self._kept.forget(lambda key: key[0] is chunk)

    def find_sinks(self, examples: Sequence[int]) -> None:
        """Find every layout's sinks: media positions with over 10 times the mean incoming value-weighted attention."""
        found: list[tuple[SpanMap, list[np.ndarray]]] = []
        chunks = self.chunks(examples, "suffix")
        for chunk, mass in zip(chunks, shared_out(chunks, _incoming_of), strict=True):
            spans = chunk.inputs("va").spans
            parts = next((parts for of, parts in found if of.layout_difference(spans) is None), None)
            if parts is None:
                found.append((spans, [mass]))
            else:
                parts.append(mass)
        self.sinks = [(spans, sink_positions(np.concatenate(parts), spans).tolist()) for spans, parts in found]

    def positions(self, inputs: AVInputs, site: str) -> Int[np.ndarray, " site"]:
        """Find a site's positions in some inputs; refused where it has none there."""
        return site_positions(inputs.spans, site, sinks_of(inputs.spans, self.sinks) if site == "sinks" else ())

    def chunks(self, examples: Sequence[int], site: str | None = None) -> list[Chunk]:
        """Group conflicts by layout and wording, in stacks that fit into memory; layouts without sinks go there."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for example in examples:
            of = layout_of(self.inputs(example, "va", "ask")), bool(self.candidates.long[example])
            groups[*of, *wording(self.conflicts[example])].append(example)
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


def wording(conflict: Any) -> list[str]:
    """What a conflict is asked, and the words before the answer."""
    return [str(getattr(conflict, name, "")) for name in ("question", "see", "control", "prefix", DESCRIBE)]


def _incoming_of(chunk: Chunk) -> np.ndarray:
    def compute() -> Arrays:
        return {"mass": chunk.bench.engine.incoming(chunk.inputs("va"))}

    return chunk.bench.store.recall("incoming attention", {"ids": chunk.ids}, compute)["mass"]


def layout_of(inputs: AVInputs) -> tuple[tuple[str, ...], str]:
    """Say what tells one token layout from another: the positions' roles, and the hash of their rotary ids."""
    rotary = hashlib.sha256(inputs.position_ids.cpu().numpy().tobytes()).hexdigest()
    return tuple(inputs.spans.roles), rotary


@dataclass(eq=False)
class Chunk:
    """A stack of conflicts of one layout: its cells, run once each, and its donors."""

    bench: Bench
    examples: Int[np.ndarray, " batch"]
    site: str
    means: Means | None = None
    constants: dict[str, Callable[[Recording, str], Tensor]] = field(default_factory=dict)
    _readings: dict[tuple[str, str], CellReading] = field(default_factory=dict)

    def run(self, cell: str, question: str = "ask") -> Recording:
        """Run a cell of these conflicts ("text_only" is the bare question), or give the run that was made."""

        def record() -> Recording:
            stack = self.inputs(cell, question)
            return self.bench.engine.record(stack, self.bench.positions(stack, self.site))

        return self.bench.kept(self, (cell, question), record)

    @property
    def encoding(self) -> bool:
        """Whether the site is where sound or picture are encoded: other roles are told there, by two donors."""
        return self.bench.mlps and self.site in ENCODING_SITES

    def taken(self, examples: Int[np.ndarray, " example"]) -> list[Chunk]:
        """Make a stack of those of its conflicts that are among some, if any are."""
        mine = self.examples[np.isin(self.examples, examples)]
        return [Chunk(self.bench, mine, self.site, self.means)] if len(mine) else []

    @property
    def ids(self) -> list[str]:
        """The conflicts' names."""
        return [str(self.bench.conflicts[int(i)].id) for i in self.examples]

    def rows(self, examples: Int[np.ndarray, " example"]) -> Int[np.ndarray, " batch"]:
        """Say where these conflicts stand among others."""
        return np.array([int(np.flatnonzero(examples == i)[0]) for i in self.examples])

    @property
    def with_third(self) -> list[int]:
        """The conflicts that have a third clip."""
        conflicts = self.bench.conflicts
        return [i for i in self.examples.tolist() if getattr(conflicts[i], "third", None) is not None]

    def has(self, donor: str) -> bool:
        """Say whether these conflicts, or some of them, have a donor at the site."""
        if donor in W_CELLS:
            return bool(self.with_third)
        return self.means is not None if donor in MEANS else self.site not in MEDIA_SITES or donor not in OTHER_LAYOUT

    def inputs(self, cell: str, question: str = "ask") -> AVInputs:
        """Stack a cell's inputs; of a w cell only of the conflicts that have it."""
        if cell == "text_only":
            bare = self.bench.engine.model.encode(None, str(self.bench.conflicts[int(self.examples[0])].question))
            return shared(AVInputs.stack([bare] * len(self.examples)))
        return shared(AVInputs.stack([self.bench.inputs(i, cell, question) for i in self._present(cell)]))

    def _present(self, cell: str) -> list[int]:
        present = self.with_third if cell in W_CELLS else self.examples.tolist()
        if not present:
            raise ProtocolError(
                f"the cell {cell!r} needs a third clip and none of these conflicts has one: give `third=`, or more "
                "conflicts with other answers."
            )
        return present

    def reading(self, cell: str, question: str = "ask") -> CellReading:
        """Read what a cell says."""
        key = (cell, question)
        if key not in self._readings:
            depends = {"cell": cell, "question": question, "ids": self.ids}
            found = self.bench.store.recall("reading", depends, lambda: vars(self._read(cell, question)))
            self._readings[key] = CellReading(**found)
        return self._readings[key]

    def _read(self, cell: str, question: str) -> CellReading:
        run = self.run(cell, question)
        traced = run.trace is not None
        found = self.read(self.own(run))
        if not traced:
            run.trace = None
        return found

    @cached_property
    def spoken(self) -> Spoken | None:
        """The two answers, to be said to their end; None where all have one token."""
        if not self.bench.candidates.long[self.examples].any():
            return None
        return Spoken.of([self.bench.conflicts[int(i)].answers for i in self.examples], self.bench.engine.model)

    def changed(self, run: Recording, plans: Sequence[Plan]) -> Iterator[Edited]:
        """Run a cell again under each plan, in order, with the two answers after it where they have several tokens."""
        if self.spoken is None:
            return self.bench.engine.changed(run, plans)
        return self.bench.engine.changed(run, plans, self.spoken.continuations(len(self.examples)))

    def own(self, run: Recording) -> Edited:
        """Give a recording itself, likewise."""
        return Edited(run.logits, run.final) if self.spoken is None else next(self.changed(run, [Plan()]))

    def said(self, one: Edited, own: Edited | None = None) -> Said | None:
        """Sum up what a run says of the two answers, if they have several tokens (see `Spoken.said`)."""
        return None if self.spoken is None else self.spoken.said(self.bench.engine.model, one, own)

    def scores(self, one: Edited) -> Float[np.ndarray, "batch column"]:
        """Score every candidate in a run."""
        return self.bench.candidates.scores(one.logits, self.examples, self.said(one))

    def read(self, one: Edited) -> CellReading:
        """Read a run."""
        return self.bench.candidates.read(one.logits, self.examples, self.said(one))

    def margin(self, cell: str, question: str = "ask") -> Float[np.ndarray, " batch"]:
        """Give M in an unedited cell."""
        return self.bench.candidates.margin(self.reading(cell, question).scores, self.examples)

    def says(self, answer: str) -> Float[np.ndarray, " batch"]:
        """Say where the unedited conflict gets the "sound"'s or the "picture"'s answer: 1, else 0."""
        owner: np.ndarray = getattr(self.bench.candidates, answer)
        return (self.reading("va").top == owner[self.examples]).astype(np.float64)

    def output(self, cell: str, question: str = "ask", part: str = Z) -> AllOutputs:
        """Give a component of an unedited cell at the site."""
        return self.bench.engine.capture(self.run(cell, question), part)

    def donor(self, base: str, name: str, question: str = "ask", part: str = Z) -> AllOutputs:
        """Give what a component becomes in a base cell; NaN for conflicts that lack it, refused where the site does."""
        return self.bench.kept(self, (base, name, question, part), lambda: self._donor(base, name, question, part))

    def _donor(self, base: str, name: str, question: str, part: str) -> AllOutputs:
        run, own = self.run(base, question), self.output(base, question, part)
        if name == "zero":
            found = torch.zeros_like(own[:, :1])
        elif name == "half_dose":
            found = own / 2
        elif name in MEANS:
            found = align_end(self._mean(base, name, part).to(own), own)
        elif name in self.constants:
            found = self.constants[name](run, part)
        else:
            found = self._cell_output(base, name, question, part)
        return found

    def z(self, base: str, nodes: Sequence[Node], name: str, question: str = "ask") -> Values:
        """Give some nodes' donor outputs for a base cell, by node."""
        found = {node: self.donor(base, name, question, part_of(node))[node[0]] for node in nodes}
        return {node: one if node[1] == MLP else one[:, :, node[1]] for node, one in found.items()}

    def _mean(self, base: str, name: str, part: str) -> Tensor:
        if self.means is None:
            raise ProtocolError(f"the donor {name!r} needs discovery's means, which have not been collected.")
        if self.site in MEDIA_SITES:
            raise ProtocolError(f"the donor {name!r} is undefined at media positions: the question comes after them.")
        candidates = self.bench.candidates
        which = "see" if name == "mean_other" else ("av" if base in MIRRORED_BASES else "va")
        return self.means.donor(which, candidates.sound[self.examples], candidates.picture[self.examples], part)

    def _cell_output(self, base: str, name: str, question: str, part: str) -> Tensor:
        cell, own = self.donor_cell(base, name), self.output(base, question, part)
        if cell in W_CELLS and not self.with_third:  # other stacks of the half may have third clips
            return torch.full_like(own, torch.nan)
        # Audio alone and bare text have another layout: the donor is asked the conflict's own question there.
        asked = "ask" if base in ("audio_only", "text_only") else question
        found = self.output(cell, asked, part)
        if cell not in W_CELLS:
            inputs = self.run(cell, asked).inputs, self.run(base, question).inputs
            return align_end(found, own, most=equal_ending(*inputs))
        return self.spread(found, cell)

    def donor_cell(self, base: str, name: str) -> str:
        """Name the cell that gives a donor: the mirror in the mirrored bases; refused at sites that it has not."""
        if name in OTHER_LAYOUT and self.site in MEDIA_SITES:
            raise ProtocolError(f"the donor {name!r} is undefined at media positions: it has another layout.")
        return MIRROR.get(name, name) if base in MIRRORED_BASES else name

    def spread(self, values: Float[Tensor, "layer present ..."], cell: str) -> Float[Tensor, "layer batch ..."]:
        """Lay values of a w cell out over all conflicts; NaN for those that lack it."""
        out = torch.full((values.shape[0], len(self.examples), *values.shape[2:]), torch.nan).to(values)
        out[:, np.flatnonzero(np.isin(self.examples, self._present(cell))).tolist()] = values
        return out

    def remember(self, name: str, depends: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Measure something on these conflicts, or give the stored measurement (see `store`)."""
        means = None if self.means is None else self.means.ids
        of: dict[str, Any] = {"ids": self.ids, "site": self.site, "means": means}
        if self.site == "sinks":
            of["positions"] = [positions for _, positions in self.bench.sinks]
        return self.bench.store.recall(name, {**depends, **of}, compute)

    def drop_traces(self, *cells: str, question: str = "ask") -> None:
        """Let go of cells' traces, which are large."""
        for cell in cells:
            self.run(cell, question).trace = None

    def forget(self) -> None:
        """Drop runs and donors; readings are kept."""
        self.bench.forget(self)


def gathered(
    chunks: Sequence[Chunk],
    examples: Int[np.ndarray, " example"],
    name: str,
    depends: Mapping[str, Any],
    compute: Callable[[Chunk], Arrays],
    stage: str | None = None,
) -> Arrays:
    """Measure every stack, or open what was stored, and put the conflicts in order; `stage` "" tells no progress."""
    out: Arrays = {}
    done = 0

    def measure(chunk: Chunk) -> Arrays:
        nonlocal done
        found = chunk.remember(name, depends, partial(compute, chunk))
        done += 1
        if stage != "":
            chunk.bench.progress(stage or name, done, len(chunks))
        return found

    for chunk, found in zip(chunks, shared_out(chunks, measure), strict=True):
        rows = chunk.rows(examples)
        for key, values in found.items():
            if key not in out:
                out[key] = np.full((len(examples), *values.shape[1:]), np.nan)
            out[key][rows] = values
    return out


def shared_out(chunks: Sequence[Chunk], task: Callable[[Chunk], T]) -> list[T]:
    """Do a task for every stack, those first that no other worker is at; what it gives, in the stacks' order."""
    found: dict[int, T] = {}
    for hurried in (True, False):
        for number, chunk in enumerate(chunks):
            if number not in found:
                with suppress(Elsewhere), chunk.bench.store.hurried(hurried):
                    found[number] = task(chunk)
    return [found[number] for number in range(len(chunks))]


def in_order(
    chunks: Sequence[Chunk],
    examples: Int[np.ndarray, " example"],
    figure: Callable[[Chunk], Float[np.ndarray, " batch"]],
) -> Float[np.ndarray, " example"]:
    """Put a figure of every conflict in order."""
    out = np.full(len(examples), np.nan)
    for chunk, values in zip(chunks, shared_out(chunks, figure), strict=True):
        out[chunk.rows(examples)] = values
    return out


def averaged(
    chunks: Sequence[Chunk], name: str, compute: Callable[[Chunk], Float[np.ndarray, "layer node"]]
) -> Float[np.ndarray, "layer node"]:
    """Measure a figure of every node on every stack, and average over the conflicts."""
    parts = shared_out(chunks, lambda one: one.remember(name, {}, lambda: {"mean": compute(one)})["mean"])
    return np.average(np.stack(parts), axis=0, weights=[len(chunk.examples) for chunk in chunks])
