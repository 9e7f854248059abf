"""Cuts of attention edges, and the control cuts that remove as much of something else (protocol section 8).

    equal mass    as much value-weighted attention as the cut removes from the unedited run, taken away elsewhere: the
                  same edges in other heads of layers at most one away (whole heads in random order, of the last one as
                  many keys as fit best); where these move too little, layer by layer other keys in the same heads
                  that hold no media and are no queries of the cut
    other heads   the same edges in as many heads: for each that is cut one outside the set, at most one layer away
    equal count   as many other keys in the same heads, where three times as many other keys exist

The masses are means over the examples that run together. A control whose mass is not within a quarter of the cut's
(`matches`) is none and is not measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.interventions import Cut, Plan, cut

EQUAL_MASS, OTHER_HEADS, EQUAL_COUNT = "equal mass", "other heads", "equal count"
CLOSE = 1.25  # a control's mass is at most so many times the cut's, and at least one such part of it


@dataclass(frozen=True, eq=False)
class EdgeCut:
    """One set of edges on one layout."""

    query: Any  # the queries as `cut` takes them (roles keep growing while decoding)
    queries: tuple[int, ...]  # their positions in the prompt
    keys: tuple[int, ...]  # the keys' positions
    heads: Mapping[int, tuple[int, ...] | None]  # the query heads in each layer; all of them where it says None
    n_heads: int  # heads of a layer
    options: Mapping[str, Any]  # further options of `cut`

    @property
    def empty(self) -> bool:
        """Whether there is nothing to cut: no head, no key, or no query now or while decoding."""
        decoding = isinstance(self.query, str) and "generated" in self.query
        return not self.heads or not self.keys or not (self.queries or decoding)

    @property
    def backwards(self) -> bool:
        """Whether every key comes after the last query, which cannot read it."""
        return bool(self.keys and self.queries) and min(self.keys) > max(self.queries)

    def plan(self, keys: Sequence[int] | None = None) -> Plan:
        """Make the cut."""
        chosen = self.keys if keys is None else tuple(keys)
        if self.empty or not chosen:
            return Plan()
        together: dict[tuple[int, ...] | None, list[int]] = {}
        for layer, heads in self.heads.items():
            together.setdefault(heads, []).append(layer)
        return Plan([self._cut(chosen, layers, heads) for heads, layers in together.items()])

    def fraction(self, share: float, seed: int) -> Plan:
        """Cut some of the keys only."""
        order = np.random.default_rng([seed, 1]).permutation(len(self.keys))
        kept = order[: max(1, round(share * len(self.keys)))]
        return self.plan(sorted(self.keys[i] for i in kept))

    def equal_count(self, n_prompt: int, seed: Sequence[int]) -> Plan | None:
        """Cut as many other keys."""
        others = sorted(set(range(min(n_prompt, max(self.queries, default=-1) + 1))) - set(self.keys))
        if not self.keys or len(others) < 3 * len(self.keys):
            return None
        drawn = np.random.default_rng([*seed, 2]).choice(others, len(self.keys), replace=False)
        return self.plan(sorted(drawn.tolist()))

    def equal_mass(
        self, mass: Float[np.ndarray, "layer head pos"], others: Sequence[int], seed: Sequence[int]
    ) -> tuple[Plan, float]:
        """Remove as much value-weighted attention elsewhere."""
        wanted = sum(self._in_layer(mass, layer).sum() for layer in self.heads)
        if not wanted > 0:
            return Plan(), float("nan")
        rng = np.random.default_rng([*seed, 3])
        cuts, removed = self._other_heads(mass, float(wanted), rng)
        if not matches(removed / wanted):
            cuts, removed = max((cuts, removed), self._other_keys(mass, others, rng), key=itemgetter(1))
        return Plan(cuts), float(removed / wanted)

    def other_heads(self, n_layers: int, seed: Sequence[int]) -> Plan | None:
        """Cut the same edges in as many other heads."""
        free, rng, cuts = self._free(n_layers), np.random.default_rng([*seed, 4]), list[Cut]()
        for layer in (own for own in self.heads for _ in self._rows(own)):
            near = [pair for pair in free if abs(pair[0] - layer) <= 1]
            if not near:
                return None
            drawn = near[int(rng.integers(len(near)))]
            free.remove(drawn)
            cuts.append(self._cut(self.keys, [drawn[0]], (drawn[1],)))
        return Plan(cuts)

    def mass(self, mass: Float[np.ndarray, "layer head pos"]) -> float:
        """What the cut removes of the mass."""
        whole = sum(float(mass[layer][self._rows(layer)].sum()) for layer in self.heads)
        cut_off = sum(float(self._in_layer(mass, layer).sum()) for layer in self.heads)
        return cut_off / whole if whole > 0 else float("nan")

    def _rows(self, layer: int) -> list[int]:
        heads = self.heads[layer]
        return list(range(self.n_heads)) if heads is None else list(heads)

    def _free(self, n_layers: int) -> list[tuple[int, int]]:
        """The heads outside the cut in layers at most one away."""
        near = [layer for layer in range(n_layers) if any(abs(layer - own) <= 1 for own in self.heads)]
        taken = {(layer, head) for layer in self.heads for head in self._rows(layer)}
        return [(layer, head) for layer in near for head in range(self.n_heads) if (layer, head) not in taken]

    def _in_layer(self, mass: np.ndarray, layer: int) -> np.ndarray:
        return mass[layer][self._rows(layer)][:, list(self.keys)]

    def _other_heads(self, mass: np.ndarray, target: float, rng: np.random.Generator) -> tuple[list[Cut], float]:
        free, cuts, left = self._free(len(mass)), list[Cut](), target
        for layer, head in (free[i] for i in rng.permutation(len(free))):
            of_head = mass[layer, head][list(self.keys)]
            keys, found = self.keys, float(of_head.sum())
            if not (fits := found <= left):
                keys, found = prefix(rng.permutation(list(self.keys)), of_head, left, self.keys)
            if len(keys) and found > 0:
                cuts.append(self._cut(keys, [layer], (head,)))
            left -= found
            if not fits:
                break
        return cuts, target - left

    def _other_keys(self, mass: np.ndarray, others: Sequence[int], rng: np.random.Generator) -> tuple[list[Cut], float]:
        cuts, removed = list[Cut](), 0.0
        for layer in self.heads:
            target = float(self._in_layer(mass, layer).sum())
            by_key = mass[layer][self._rows(layer)][:, list(others)].sum(0)
            keys, found = prefix(rng.permutation(list(others)), by_key, target, others)
            cuts += [self._cut(keys, [layer], self.heads[layer])] if keys else []
            removed += found
        return cuts, removed

    def _cut(self, keys: Sequence[int], layers: Sequence[int], heads: tuple[int, ...] | None) -> Cut:
        return cut(self.query, tuple(keys), layers=layers, heads=heads, **self.options)


def matches(ratio: Any) -> Any:
    """Whether a control's mass is close enough to the cut's to be called equal."""
    return (ratio >= 1 / CLOSE) & (ratio <= CLOSE)


def prefix(
    order: np.ndarray, masses: Float[np.ndarray, " key"], target: float, keys: Sequence[int]
) -> tuple[list[int], float]:
    """Take keys in a given order until their mass comes as close to a target as it can."""
    by_key = dict(zip(keys, masses.tolist(), strict=True))
    sums = np.cumsum([0.0, *(by_key[key] for key in order.tolist())])
    n = int(np.abs(sums - target).argmin())
    return sorted(order[:n].tolist()), float(sums[n])
