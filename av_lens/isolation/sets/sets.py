"""Sets of heads and MLPs edited together: what they release, and what else they break (`CONTROLS`, protocol section 8).

Sets that the search asks for nearly always share all members but one: `SetReleases.added` edits the shared members
once, and each further head restarts at its own layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from av_lens.errors import AvLensError
from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.effects import edited_readings, mirrored
from av_lens.isolation.measuring.engine import MLP, Node
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import UNREAD
from av_lens.isolation.measuring.store import Arrays
from av_lens.results.dyadic import Inference
from av_lens.results.statistics import non_inferiority


@dataclass(frozen=True, eq=False)
class SetEffect:
    """What editing sets together does, per set and example: the effect on C, and which answer `va` then gets."""

    release: Float[np.ndarray, "set example"]
    says_sound: Float[np.ndarray, "set example"]
    says_picture: Float[np.ndarray, "set example"]


def release_of_sets(
    chunks: Sequence[Chunk],
    sets: Sequence[Sequence[Node]],
    donors: Sequence[str],
    examples: Int[np.ndarray, " example"],
    stage: str = "",
) -> SetEffect:
    """Edit sets together in `va` and `av`, each by its donor, and measure the release."""
    depends = {"sets": [list(one) for one in sets], "donors": list(donors)}
    compute = partial(_chunk_release, sets=sets, donors=donors)
    found = gathered(chunks, examples, "sets", depends, compute, stage)
    return SetEffect(**{name: np.ascontiguousarray(values.T) for name, values in found.items()})


def _chunk_release(chunk: Chunk, sets: Sequence[Sequence[Node]], donors: Sequence[str]) -> dict[str, np.ndarray]:
    candidates, tops = chunk.bench.candidates, list[np.ndarray]()

    def change(cell: str) -> np.ndarray:
        read = edited_readings(chunk, cell, sets, donors)
        tops.append(np.stack([one.top for one in read]))
        return candidates.margin(np.stack([one.scores for one in read]), chunk.examples) - chunk.margin(cell)

    out, top = {"release": mirrored("va", change).T}, tops[0]
    for answer in ("sound", "picture"):
        # An edit that this conflict lacks (a mean that leaves every other conflict out) says nothing.
        said = np.where(top == UNREAD, np.nan, top == getattr(candidates, answer)[chunk.examples])
        out[f"says_{answer}"] = said.T
    return out


def cumulative(members: Sequence[Node]) -> list[tuple[Node, ...]]:
    """List a set's beginnings: the first member, the first two, ..."""
    return [tuple(members[: k + 1]) for k in range(len(members))]


@dataclass(eq=False)
class BuiltSet:
    """A set built on discovery, members in the search's order; `widened` says how far its random sets' pool was."""

    members: tuple[Node, ...]
    donor: str
    discovery_release: float
    screen: str = ""
    chosen: bool = False
    random: list[tuple[Node, ...]] = field(default_factory=list)
    widened: str = ""

    @property
    def name(self) -> str:
        """What the set is called in the tables."""
        return f"searched set ({self.donor})"


def head_names(nodes: Sequence[Node]) -> str:
    """Write heads and MLPs as words."""
    return " ".join(f"MLP {layer}" if head == MLP else f"L{layer}H{head}" for layer, head in nodes)


Members = tuple[Node, ...]
Tick = Callable[[int], None]
HELD_BYTES = 4e9
"""Traces of all conflicts are kept between measurements where they take no more; else they are made again."""


@dataclass(eq=False)
class SetReleases:
    """Releases of sets by one donor on one half, each when first asked for; `tick` counts the sets just measured."""

    chunks: Sequence[Chunk]
    examples: Int[np.ndarray, " example"]
    donor: str
    tick: Tick | None = None
    _known: dict[frozenset[Node], Float[np.ndarray, " example"]] = field(default_factory=dict)

    def learn(self, singles: Mapping[Node, Float[np.ndarray, " example"]]) -> None:
        """Take over what was measured elsewhere."""
        self._known |= {frozenset((head,)): np.asarray(values) for head, values in singles.items()}

    def each(self, members: Sequence[Node]) -> Float[np.ndarray, " example"]:
        """Give a set's release on every conflict."""
        self.measure([tuple(members)])
        return self._known[frozenset(members)] if members else np.zeros(len(self.examples))

    def mean(self, members: Sequence[Node]) -> float:
        """Give a set's mean release."""
        values = self.each(members)
        return float(np.nanmean(values)) if (~np.isnan(values)).any() else float("nan")

    def added(self, members: Sequence[Node], heads: Sequence[Node]) -> list[float]:
        """Give the mean release of a set with one more head, for each of several."""
        unknown = [head for head in heads if frozenset((*members, head)) not in self._known]
        if unknown:
            compute = partial(self._margins, sorted(members), [(head,) for head in unknown])
            depends, made = {"members": sorted(members), "heads": unknown}, [(*members, head) for head in unknown]
            self._measured("set and one more head", depends, made, compute)
        return [self.mean((*members, head)) for head in heads]

    def measure(self, sets: Sequence[Members]) -> None:
        """Measure sets that may share nothing."""
        unknown = list(dict.fromkeys(tuple(sorted(one)) for one in sets if one and frozenset(one) not in self._known))
        if unknown:
            self._measured("releases of sets", {"sets": unknown}, unknown, partial(self._margins, (), unknown))

    def pairs(self, heads: Sequence[Node]) -> None:
        """Measure all pairs of some heads."""
        ordered = sorted(heads)
        wanted = list(combinations(ordered, 2))
        if not all(frozenset(pair) in self._known for pair in wanted):
            self._measured("pairs of heads", {"heads": ordered}, wanted, partial(self._pairs, ordered))

    def _measured(
        self,
        name: str,
        depends: Mapping[str, object],
        sets: Sequence[Members],
        compute: Callable[[Chunk, str], Float[np.ndarray, "set batch"]],
    ) -> None:

        def release(chunk: Chunk) -> Arrays:
            def change(cell: str) -> np.ndarray:
                found = compute(chunk, cell) - chunk.margin(cell)
                if 2 * len(self.chunks) * chunk.run(cell).trace_bytes > HELD_BYTES:
                    chunk.drop_traces(cell)
                return found

            return {"release": mirrored("va", change).T}

        found = gathered(self.chunks, self.examples, name, {"donor": self.donor, **depends}, release, "")["release"]
        self._known |= zip(map(frozenset, sets), np.ascontiguousarray(found.T), strict=True)

    def _margins(
        self, under: Sequence[Node], sets: Sequence[Members], chunk: Chunk, cell: str
    ) -> Float[np.ndarray, "set batch"]:
        """M in a cell with some heads edited, and each of several sets edited on top."""
        engine, candidates, run = chunk.bench.engine, chunk.bench.candidates, chunk.run(cell)
        if under:
            run = engine.record_edited(run, chunk.z(cell, under, self.donor))
        order = sorted(sets, key=min)
        changed = chunk.changed(run, [run.plan(chunk.z(cell, one, self.donor)) for one in order])
        scores = {one: chunk.scores(edited) for one, edited in zip(order, changed, strict=True)}
        if self.tick is not None:
            self.tick(len(sets))
        return candidates.margin(np.stack([scores[one] for one in sets]), chunk.examples)

    def _pairs(self, heads: Sequence[Node], chunk: Chunk, cell: str) -> Float[np.ndarray, "set batch"]:
        """All pairs: each head edited once, and every later one on top of it."""
        later = [(one, [(two,) for two in heads[i + 1 :]]) for i, one in enumerate(heads[:-1])]
        return np.concatenate([self._margins((one,), rest, chunk, cell) for one, rest in later])


MARGIN = 0.05
CONTROLS: tuple[tuple[str, str, str, str], ...] = (
    ("see", "va", "see", "picture"),
    ("audio-only", "audio_only", "ask", "sound"),
    ("factual heard", "aa", "ask", "sound"),
    ("factual seen", "aa", "see", "sound"),
    ("control", "va", "control", "own"),
    ("silent video", "v_muted", "ask", "none"),
    ("text-only", "text_only", "ask", "kl"),
)


def _items(
    chunk: Chunk, control: tuple[str, str, str, str], heads: Sequence[Node], donor: str
) -> dict[str, Float[np.ndarray, " batch"]]:
    """What counts as right before and after, 1 or 0 per conflict (for KL: 0 and the divergence)."""
    (_, cell, question, right), candidates, examples = control, chunk.bench.candidates, chunk.examples
    run = chunk.run(cell, question)
    (edited,) = chunk.bench.engine.changed(run, [run.plan(chunk.z(cell, heads, donor, question))])
    before, after = run.logits, edited.logits
    if right == "kl":
        log_p, log_q = after.double().log_softmax(-1), before.double().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).cpu().numpy()
        return {"before": np.zeros(len(examples)), "after": divergence}
    tops = [candidates.tops(logits, examples) for logits in (before, after)]
    missing = tops[1] == UNREAD  # this conflict has no such edit (a mean that leaves every other conflict out)
    if right == "own":
        was, now = np.ones(len(examples)), (before.argmax(-1) == after.argmax(-1)).cpu().numpy()
    elif right == "none":
        # The rate that must not rise, turned round so that a rise of it is a fall here.
        was, now = (top < 0 for top in tops)
    else:
        was, now = (top == getattr(candidates, right)[examples] for top in tops)
    return {"before": was.astype(np.float64), "after": np.where(missing, np.nan, now)}


def controls(chunks: Sequence[Chunk], heads: Sequence[Node], donor: str, half: Half) -> list[dict[str, Any]]:
    """Run every control with the set edited: a row of `specificity` each; what cannot be measured is said there."""
    rows: list[dict[str, Any]] = []
    for control in CONTROLS:
        name, *_, right = control
        depends = {"control": control, "heads": [list(head) for head in heads], "donor": donor}
        compute = partial(_items, control=control, heads=heads, donor=donor)
        try:
            found = gathered(chunks, half.examples, "a control", depends, compute, "")
            rows.append(_row(name, right, found["before"], found["after"], half.boot))
        except AvLensError as refused:
            rows.append({"control": name, "n": 0, "verdict": f"not measured: {refused}"})
    return rows


def _row(name: str, right: str, before: np.ndarray, after: np.ndarray, boot: Inference) -> dict[str, Any]:
    if right == "kl":
        n, mean = int((~np.isnan(after)).sum()), float(np.nanmean(after))
        return {"control": name, "n": n, "before": 0.0, "after": mean, "verdict": "reported: KL in nats"}
    harm = non_inferiority(before, after, boot, margin=MARGIN)
    was, now = (1 - harm.before, 1 - harm.after) if right == "none" else (harm.before, harm.after)
    return {"control": name, "margin": MARGIN} | vars(harm) | {"before": was, "after": now}
