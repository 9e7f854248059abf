"""Sets of heads edited together and those that they are compared with: what they release and what else they break.

* Random sets, at least 200, matched by layer: for each member a head outside the set within one layer whose mean norm
  of z W_O is within a factor 2 of the member's, else the 3 nearest in norm. Where fewer sets exist all are used.
* As many top heads for `see`: those whose zeroing most lowers score(picture's answer) - score(sound's) under `see`,
  mirrored like every effect.
* Cumulative edits: the first member, the first two, ... in the order in which the search took them in.

How sets are found is `set_search`; how they are confirmed, `set_confirmation`.

Sets that the search asks for nearly always share all members but one. `SetReleases.added` measures a set with each of
several further heads: the shared members are edited once, and each further head restarts at its own layer
(`edited_runs`). Values are releases, [change of M in va - change of M in av] / 2, per conflict.

| control | cell, question | right |
|---|---|---|
| see | `va`, see | the picture's answer |
| audio-only | `audio_only`, its own question | the sound's answer |
| factual heard | `aa`, its own question | the (one) answer |
| factual seen | `aa`, see | the (one) answer |
| control | `va`, control | the unedited run's own most likely token |
| silent video | `v_muted`, its own question | none: the rate of any candidate answer must not *rise* |
| text-only | the bare question | none: KL(edited || unedited) is reported |

One item per conflict. Right means that the most likely token of the whole vocabulary belongs to the answer. Choices
where the protocol is silent: the donor `blank_muted` is asked the control's own question where the layout is the same
(audio alone and bare text: the conflict's own question, aligned from the end); `mean_other` is the same z everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from av_lens.errors import AvLensError
from av_lens.isolation.measuring.bench import Chunk, Half, gathered
from av_lens.isolation.measuring.effects import Request, edited_readings, measure_requests, mirrored
from av_lens.isolation.measuring.engine import Head
from av_lens.isolation.measuring.scoring import UNREAD
from av_lens.isolation.measuring.store import Arrays
from av_lens.isolation.naming.roles import head_means
from av_lens.results.statistics import Bootstrap, non_inferiority

RANDOM_SETS = 200
NORM_FACTOR, NEAREST = 2.0, 3
FEWEST_SETS = 20
MOST_LISTED = 20_000
"""Sets of as many heads as the members' pools hold are listed one by one up to so many, else drawn."""


@dataclass(frozen=True, eq=False)
class SetEffect:
    """What editing sets together does, per set and example: the effect on C, and which answer `va` then gets."""

    release: Float[np.ndarray, "set example"]
    says_sound: Float[np.ndarray, "set example"]
    says_picture: Float[np.ndarray, "set example"]


def release_of_sets(
    chunks: Sequence[Chunk],
    sets: Sequence[Sequence[Head]],
    donors: Sequence[str],
    examples: Int[np.ndarray, " example"],
    stage: str = "",
) -> SetEffect:
    """Edit sets together in `va` and `av`, each by its donor, and measure the release."""
    depends = {"sets": [list(one) for one in sets], "donors": list(donors)}
    compute = partial(_chunk_release, sets=sets, donors=donors)
    found = gathered(chunks, examples, "sets", depends, compute, stage)
    return SetEffect(**{name: np.ascontiguousarray(values.T) for name, values in found.items()})


def _chunk_release(chunk: Chunk, sets: Sequence[Sequence[Head]], donors: Sequence[str]) -> dict[str, np.ndarray]:
    """Edit the sets in `va` and `av` of one stack: `[batch, set]` of each figure."""
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


def top_see_heads(chunks: Sequence[Chunk], n: int) -> list[Head]:
    """Find the heads that `see` needs most, by zeroing each: those whose zeroing moves M towards the sound's answer."""
    heads = chunks[0].bench.engine.heads
    zeroed = Request("va", "zero", question="see")
    examples = np.concatenate([chunk.examples for chunk in chunks])
    found = measure_requests(chunks, [zeroed], heads=heads, examples=examples)
    mean = head_means(found[zeroed].margin).ravel()
    return [heads[j] for j in np.argsort(-mean, kind="stable")[:n]]


def random_sets(
    members: Sequence[Head], norms: Float[np.ndarray, "layer head"], *, seed: int, n: int = RANDOM_SETS
) -> tuple[list[tuple[Head, ...]], int]:
    """Draw control sets matched to a set by layer and by how much each member writes.

    Where members share so few matching heads that no set of distinct heads can be drawn, each member's pool is widened
    by its next nearest heads within one layer, one at a time, until there are 20 sets (so that p can fall below .05) or
    no more heads.
    """
    found = _drawn(_pools(members, norms, 0), seed=seed, n=n)
    wider, most = 0, 3 * norms.shape[1]
    while wider < most and (not found if not wider else len(found) < FEWEST_SETS):
        wider += 1
        found = _drawn(_pools(members, norms, wider), seed=seed, n=n)
    return found, wider if found else 0


def _pools(members: Sequence[Head], norms: np.ndarray, wider: int) -> list[list[Head]]:
    """Each member's candidates: within one layer and a factor 2 in norm, else the 3 nearest; and some more."""
    pools: list[list[Head]] = []
    for layer, head in members:
        near = [
            (other_layer, other)
            for other_layer in range(max(0, layer - 1), min(norms.shape[0], layer + 2))
            for other in range(norms.shape[1])
            if (other_layer, other) not in members
        ]
        ratio = {h: abs(np.log(max(norms[h], 1e-12) / max(norms[layer, head], 1e-12))) for h in near}
        near.sort(key=lambda h: ratio[h])
        within = sum(ratio[h] <= np.log(NORM_FACTOR) for h in near)
        pools.append(near[: (within or NEAREST) + wider])
    return pools


def _drawn(pools: Sequence[Sequence[Head]], *, seed: int, n: int) -> list[tuple[Head, ...]]:
    """All distinct sets where there are few, else n drawn ones."""
    if not pools or not all(pools):
        return []
    rng = np.random.default_rng(seed)
    heads = sorted({head for pool in pools for head in pool})
    if math.comb(len(heads), len(pools)) <= MOST_LISTED:
        found = [one for one in combinations(heads, len(pools)) if _matched(one, pools)]
        return [found[i] for i in rng.permutation(len(found))[:n]] if len(found) > n else found
    drawn: dict[tuple[Head, ...], None] = {}
    for _ in range(100 * n):
        one = tuple(pool[int(rng.integers(len(pool)))] for pool in pools)
        if len(set(one)) == len(one):
            drawn.setdefault(tuple(sorted(one)))
        if len(drawn) == n:
            break
    return list(drawn)


def _matched(heads: Sequence[Head], pools: Sequence[Sequence[Head]]) -> bool:
    """Whether every member can have one of these heads from its own pool."""
    allowed = csr_matrix(np.array([[head in pool for pool in pools] for head in heads], dtype=np.int8))
    return bool((maximum_bipartite_matching(allowed, perm_type="column") >= 0).all())


def cumulative(members: Sequence[Head]) -> list[tuple[Head, ...]]:
    """List a set's beginnings: the first member, the first two, ..."""
    return [tuple(members[: k + 1]) for k in range(len(members))]


def doubling(n: int) -> list[int]:
    """List 1, 2, 4, ... up to n, n included."""
    sizes = [2**k for k in range(n.bit_length()) if 2**k < n]
    return [*sizes, n] if n else []


@dataclass(eq=False)
class BuiltSet:
    """A set built on discovery: members in the order of the search, donor, release there, the start that led to it."""

    members: tuple[Head, ...]
    donor: str
    discovery_release: float
    screen: str = ""
    chosen: bool = False
    random: list[tuple[Head, ...]] = field(default_factory=list)
    widened: int = 0

    @property
    def name(self) -> str:
        """What the set is called in the tables."""
        return f"searched set ({self.donor})"


def head_names(heads: Sequence[Head]) -> str:
    """Write heads as words."""
    return " ".join(f"L{layer}H{head}" for layer, head in heads)


def curve_row(
    arm: str, members: Sequence[Head], donor: str, effect: SetEffect, row: int, draw: int, half: Half
) -> dict[str, Any]:
    """Write one row of the ablation table."""
    release = effect.release[row]
    out: dict[str, Any] = {"arm": arm, "k": len(members), "draw": draw, "members": head_names(members), "donor": donor}
    out |= {name: float(np.nanmean(getattr(effect, name)[row])) for name in ("says_sound", "says_picture")}
    bounds, share = half.boot.mean(release), half.shares(release)
    out |= {"low": float(bounds.low), "high": float(bounds.high), "share": float(share.value)}
    return out | {"release": float(np.nanmean(release))}


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
            compute = partial(self._margins, sorted(members), [(head,) for head in unknown])
            depends, made = {"members": sorted(members), "heads": unknown}, [(*members, head) for head in unknown]
            self._measured("set and one more head", depends, made, compute)
        return [self.mean((*members, head)) for head in heads]

    def measure(self, sets: Sequence[Members]) -> None:
        """Measure sets that may share nothing."""
        unknown = list(dict.fromkeys(tuple(sorted(one)) for one in sets if one and frozenset(one) not in self._known))
        if unknown:
            self._measured("releases of sets", {"sets": unknown}, unknown, partial(self._margins, (), unknown))

    def pairs(self, heads: Sequence[Head]) -> None:
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
        """Measure sets on every chunk, in both cells, and keep what each releases."""

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
        self, under: Sequence[Head], sets: Sequence[Members], chunk: Chunk, cell: str
    ) -> Float[np.ndarray, "set batch"]:
        """M in a cell with some heads edited, and each of several sets edited on top."""
        engine, candidates, run = chunk.bench.engine, chunk.bench.candidates, chunk.run(cell)
        if under:
            run = engine.record_edited(run, chunk.z(cell, under, self.donor))
        order = sorted(sets, key=min)
        changed = engine.changed(run, [run.plan(chunk.z(cell, one, self.donor)) for one in order])
        scores = {one: candidates.scores(edited.logits) for one, edited in zip(order, changed, strict=True)}
        if self.tick is not None:
            self.tick(len(sets))
        return candidates.margin(np.stack([scores[one] for one in sets]), chunk.examples)

    def _pairs(self, heads: Sequence[Head], chunk: Chunk, cell: str) -> Float[np.ndarray, "set batch"]:
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
    chunk: Chunk, control: tuple[str, str, str, str], heads: Sequence[Head], donor: str
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
    tops = [candidates.read(logits, examples).top for logits in (before, after)]
    missing = tops[1] == UNREAD  # this conflict has no such edit (a mean that leaves every other conflict out)
    if right == "own":
        was, now = np.ones(len(examples)), (before.argmax(-1) == after.argmax(-1)).cpu().numpy()
    elif right == "none":
        # The rate that must not rise, turned round so that a rise of it is a fall here.
        was, now = (top < 0 for top in tops)
    else:
        was, now = (top == getattr(candidates, right)[examples] for top in tops)
    return {"before": was.astype(np.float64), "after": np.where(missing, np.nan, now)}


def controls(chunks: Sequence[Chunk], heads: Sequence[Head], donor: str, half: Half) -> list[dict[str, Any]]:
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


def _row(name: str, right: str, before: np.ndarray, after: np.ndarray, boot: Bootstrap) -> dict[str, Any]:
    if right == "kl":
        n, mean = int((~np.isnan(after)).sum()), float(np.nanmean(after))
        return {"control": name, "n": n, "before": 0.0, "after": mean, "verdict": "reported: KL in nats"}
    harm = non_inferiority(before, after, boot, margin=MARGIN)
    was, now = (1 - harm.before, 1 - harm.after) if right == "none" else (harm.before, harm.after)
    return {"control": name, "margin": MARGIN} | vars(harm) | {"before": was, "after": now}
