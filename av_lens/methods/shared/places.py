"""The places that a method visits in turn: which axes are iterated, and how positions are cut.

"head", "layer head"    every head of every layer
"layer"                 every layer
"layer span"            every role's positions
"layer pos"             every position
"layer window:0.5s"     the media of every half second (the model's clock)
"layer box:4x4"         every box of 4 x 4 picture tokens, at all times together
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.errors import InputError, unknown
from av_lens.interventions.sites import resolve_positions
from av_lens.spans import ROLES, Span, SpanMap

UNITS = ("layer", "head", "group", "layers:WIDTH", "pair", "coalition:ORDERS")
AXES = (*UNITS, "span", "pos", "window:SECONDSs", "box:ROWSxCOLS")

Head = tuple[int, int]
Edited = tuple[int, tuple[int, ...] | None]
"""A layer and the heads of it that are edited, or None for all of it."""


@dataclass(frozen=True)
class Axes:
    """What is iterated: layers, heads or sets of them, and how positions are cut.

    Attributes:
        unit: "layer", "head", "group", "layers", "pair" or "coalition".
        width: layers of a window, or random orders of a coalition.
        places: the name of the axis of positions, or None where all are edited together.
        seconds: the length of a window, for windows.
        box: rows and columns of a box in picture tokens, for boxes.
    """

    unit: str
    width: int = 1
    places: str | None = None
    seconds: float = 0.0
    box: tuple[int, int] = (0, 0)

    @property
    def heads(self) -> bool:
        """Whether heads are told apart."""
        return self.unit not in ("layer", "layers")

    @classmethod
    def parsed(cls, over: str) -> Axes:
        """Read what a caller wrote.

        Args:
            over: names of axes, separated by spaces.

        Returns:
            The axes.

        Raises:
            InputError: an unknown axis, or two axes of positions.
        """
        places: list[dict[str, Any]] = []
        units: list[dict[str, Any]] = []
        for word in over.split():
            name, _, size = word.partition(":")
            if name == "window" and size:
                places.append({"places": "window", "seconds": _seconds(word)})
            elif name == "box" and size:
                places.append({"places": "box", "box": _box(word)})
            elif word in ("span", "pos"):
                places.append({"places": word})
            elif word in ("head", "group", "pair"):
                units.append({"unit": word})
            elif name in ("layers", "coalition") and size:
                units.append({"unit": name, "width": _count(word, size)})
            elif word != "layer":
                raise InputError(unknown("axis", word, AXES))
        if len(places) > 1 or len(units) > 1 or not (units or "layer" in over.split()):
            raise InputError(
                f"over={over!r}: name one of layer, head, group, layers:3, pair, coalition:32, and at most one of "
                "span, pos, window:0.5s, box:4x4; such as 'layer head' or 'layer span'."
            )
        found: dict[str, Any] = {"unit": "layer"}
        for given in (*units, *places):
            found |= given
        return cls(**found)

    def targets(
        self, spec: Any, n_heads: int, *, heads: Sequence[Head] | None = None, seed: int = 0
    ) -> tuple[dict[str, Any], list[tuple[Edited, ...]]]:
        """List what is edited together, in turn.

        Args:
            spec: the model's sizes.
            n_heads: heads of the component that is edited.
            heads: the heads of which pairs and coalitions are made; None for all.
            seed: of a coalition's random orders.

        Returns:
            The labels of each axis, and what is edited for each of their combinations in order; for coalitions the
            growing sets of every order.

        Raises:
            InputError: heads that the model has not, too few of them, or a window wider than the model.
        """
        layers = range(spec.n_layers)
        if self.unit == "layer":
            return {"layer": np.arange(spec.n_layers)}, [((layer, None),) for layer in layers]
        if self.unit == "layers":
            if self.width > spec.n_layers:
                raise InputError(f"layers:{self.width} is wider than the model, which has {spec.n_layers} layers.")
            windows = [range(first, first + self.width) for first in range(spec.n_layers - self.width + 1)]
            labels = [f"{window[0]}-{window[-1]}" for window in windows]
            return {"layers": labels}, [tuple((layer, None) for layer in window) for window in windows]
        numbered = {"layer": np.arange(spec.n_layers), "head": np.arange(n_heads)}
        if self.unit == "head":
            return numbered, [((layer, (head,)),) for layer in layers for head in range(n_heads)]
        if self.unit == "group":
            size = n_heads // spec.n_kv_heads
            groups = [tuple(range(g * size, (g + 1) * size)) for g in range(spec.n_kv_heads)]
            return {"layer": numbered["layer"], "group": np.arange(spec.n_kv_heads)}, [
                ((layer, group),) for layer in layers for group in groups
            ]
        chosen = _chosen_heads(heads, spec.n_layers, n_heads)
        if self.unit == "pair":
            pairs = list(combinations(chosen, 2))
            return {"pair": ["+".join(f"L{layer}H{head}" for layer, head in pair) for pair in pairs]}, [
                together(pair) for pair in pairs
            ]
        orders = random_orders(chosen, self.width, seed)
        return numbered | {"figure": ["estimate", "error"]}, [
            together(order[: i + 1]) for order in orders for i in range(len(order))
        ]

    def cut(self, spans: SpanMap, at: str | Span | None) -> list[tuple[Any, tuple[int, ...]]]:
        """Cut the positions into the places that are patched in turn.

        Args:
            spans: the input's spans.
            at: the positions to be cut, or edited together.

        Returns:
            A label and positions for each place; one place where no axis of positions is iterated.
        """
        if at is None:
            at = "generation" if self.places is None else None
        allowed = resolve_positions(at, spans, what="patch at").index
        if self.places is None:
            return [("all", allowed)]
        if self.places == "pos":
            return [(position, (position,)) for position in allowed]
        inside = set(allowed)
        if self.places == "span":
            named = [(role, tuple(p for p in spans[role].positions.tolist() if p in inside)) for role in ROLES]
        elif self.places == "box":
            named = [(label, tuple(p for p in span if p in inside)) for label, span in _boxes(spans, self.box)]
        else:
            ends = spans.end_s[~np.isnan(spans.end_s)]
            starts = np.arange(0.0, float(ends.max()) if len(ends) else 0.0, self.seconds)
            cuts = ((round(float(s), 6), spans["media"].between(float(s), float(s) + self.seconds)) for s in starts)
            named = [(start, tuple(p for p in span.positions.tolist() if p in inside)) for start, span in cuts]
        named = [(label, positions) for label, positions in named if positions]
        if not named:
            raise InputError(f"over={self.places!r} finds no position in this input: it has {spans!r}.")
        return named

    def cut_alike(
        self, spans: Sequence[SpanMap], at: str | Span | None
    ) -> tuple[list[list[tuple[Any, tuple[int, ...]]]], list[Any]]:
        """Cut several inputs' positions into places of the same names.

        Args:
            spans: each input's spans.
            at: as in `cut`.

        Returns:
            Each input's places, and their labels.

        Raises:
            InputError: the inputs do not have the same places.
        """
        places = [self.cut(one, at) for one in spans]
        labels = [label for label, _ in places[0]]
        if any([label for label, _ in cut] != labels for cut in places):
            raise InputError(f"these inputs have different {self.places}s; take one layout at a time.")
        return places, labels


def together(heads: Sequence[Head]) -> tuple[Edited, ...]:
    """Group heads by layer.

    Args:
        heads: (layer, head) pairs.

    Returns:
        Each layer with its heads.
    """
    layers = sorted({layer for layer, _ in heads})
    return tuple((layer, tuple(sorted(head for at, head in heads if at == layer))) for layer in layers)


def random_orders(heads: Sequence[Head], n: int, seed: int) -> list[list[Head]]:
    """Draw orders of heads, each followed by its reverse: antithetic orders halve much of the error.

    Args:
        heads: the heads.
        n: how many orders.
        seed: of the draw.

    Returns:
        The orders.
    """
    rng = np.random.default_rng(seed)
    orders: list[list[Head]] = []
    for _ in range((n + 1) // 2):
        order = [heads[i] for i in rng.permutation(len(heads))]
        orders += [order, order[::-1]]
    return orders[:n]


def shapley(
    gains: Float[np.ndarray, "order step"], orders: Sequence[Sequence[Head]], shape: tuple[int, int]
) -> Float[np.ndarray, "layer head figure"]:
    """Average each head's gain over orders.

    Args:
        gains: what each step of each order added.
        orders: the heads in the order in which they were added.
        shape: layers and heads of the model.

    Returns:
        The estimate and its standard error over orders (an order and its reverse count once); NaN at other heads.
    """
    found = np.full((*shape, 2), np.nan)
    if not len(orders):
        return found
    by_head: dict[Head, list[float]] = {}
    for order, steps in zip(orders, gains, strict=True):
        for head, gain in zip(order, steps, strict=True):
            by_head.setdefault(head, []).append(float(gain))
    for head, seen in by_head.items():
        pairs = [float(np.mean(seen[i : i + 2])) for i in range(0, len(seen), 2)]
        error = np.std(pairs, ddof=1) / np.sqrt(len(pairs)) if len(pairs) > 1 else np.nan
        found[head] = (np.mean(seen), error)
    return found


def _chosen_heads(heads: Sequence[Head] | None, n_layers: int, n_heads: int) -> list[Head]:
    everything = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    chosen = everything if heads is None else [(int(layer), int(head)) for layer, head in heads]
    for head in chosen:
        if head not in everything:
            raise InputError(f"head {head} is out of range: the model has {n_layers} layers of {n_heads} heads.")
    if len(set(chosen)) < max(2, len(chosen)):
        raise InputError(f"sets of heads need at least two different heads; got {chosen}.")
    return chosen


def _count(word: str, size: str) -> int:
    if not size.isdigit() or int(size) < 1:
        raise InputError(f"over={word!r}: write a whole number after the colon, such as layers:3 or coalition:32.")
    return int(size)


def _seconds(word: str) -> float:
    text = word.removeprefix("window:").removesuffix("s")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"over={word!r}: write a window's length in seconds, such as window:0.5s.")
    return seconds


def _box(word: str) -> tuple[int, int]:
    sizes = word.removeprefix("box:").split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise InputError(f"over={word!r}: write a box's rows and columns in picture tokens, such as box:4x4.")
    return int(sizes[0]), int(sizes[1])


def _boxes(spans: SpanMap, size: tuple[int, int]) -> Iterator[tuple[str, Span]]:
    """Cut the picture's grid of tokens into boxes, at all times together; those at the border may be smaller."""
    rows, cols = int(spans.row.max()) + 1, int(spans.col.max()) + 1
    for top in range(0, rows, size[0]):
        for left in range(0, cols, size[1]):
            bottom, right = min(top + size[0], rows), min(left + size[1], cols)
            yield f"rows {top}:{bottom} cols {left}:{right}", spans.media.box(slice(top, bottom), slice(left, right))
