"""The places that a method visits in turn: positions by words, which axes are iterated, and how positions are cut.

In a flow (`"video -> generation"`) `sinks` stands for the positions of protocol section 3, and `a - b` leaves positions
out. A window's seconds are on the model's clock; a box holds its picture tokens at all times together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import combinations, product
from operator import or_, sub
from typing import Any

import numpy as np
from jaxtyping import Float

from av_lens.errors import InputError, InterventionError, unknown
from av_lens.families.decoder import component_named
from av_lens.interventions import Site
from av_lens.interventions.edits import resolve_positions
from av_lens.spans import ROLES, Span, SpanMap

SINKS = "sinks"


@dataclass(frozen=True)
class Flow:
    """A directed set of attention edges, in words."""

    text: str  # as it was written
    source: str  # the side that is read (keys)
    target: str  # the side that reads (queries)

    @classmethod
    def parsed(cls, text: str) -> Flow:
        """Read `"source -> target"`."""
        sides = [side.strip() for side in text.split("->")]
        if len(sides) != 2 or not all(sides):
            raise InputError(
                f"{text!r} is no flow: write 'source -> target', what is read and who reads it, such as "
                "'video -> generation' or 'media - sinks -> question'."
            )
        return cls(f"{sides[0]} -> {sides[1]}", sides[0], sides[1])

    @property
    def names_sinks(self) -> bool:
        """Whether either side needs the sinks."""
        return has_sinks(self.source) or has_sinks(self.target)


def has_sinks(words: str) -> bool:
    """Whether an expression needs the sinks."""
    return SINKS in {word.strip() for word in words.replace("-", "|").split("|")}


def is_plain(words: str) -> bool:
    """Whether an expression is role names joined by `|`, as `SpanMap` and `Site` take them."""
    return "-" not in words and not has_sinks(words)


def named_span(words: str, spans: SpanMap, sinks: Any = ()) -> Span:
    """Find the positions that an expression names."""
    parts = ([word.strip() for word in part.split("|")] for part in words.split("-"))
    named = ([spans.span(sinks) if word == SINKS else spans[word] for word in part] for part in parts)
    return reduce(sub, [reduce(or_, part, spans.span([])) for part in named])


UNITS = ("layer", "head", "group", "layers:WIDTH", "pair", "coalition:ORDERS")
AXES = (*UNITS, "span", "pos", "window:SECONDSs", "box:ROWSxCOLS")

Head = tuple[int, int]
Edited = tuple[int, tuple[int, ...] | None]  # A layer and the heads of it that are edited, or None for all of it
Place = tuple[Any, tuple[int, ...]]  # A label and positions that are edited together


@dataclass(frozen=True)
class Axes:
    """What is iterated: layers, heads or sets of them (`unit`), and how positions are cut (`places`, `seconds`, `box`).

    `width` is the layers of a window, or the orders of a coalition; without `places` all positions are edited together.
    """

    unit: str = "layer"
    width: int = 1
    places: str | None = None
    seconds: float = 0.0
    box: tuple[int, int] = (0, 0)

    @classmethod
    def parsed(cls, over: str) -> Axes:
        """Read names of axes, separated by spaces."""
        units, places = list[dict[str, Any]](), list[dict[str, Any]]()
        sized = {"layers": _count, "coalition": _count, "window": _seconds, "box": _box}
        for word in over.split():
            name, _, size = word.partition(":")
            known = name in sized if size else word in ("layer", "head", "group", "pair", "span", "pos")
            if not known:
                raise InputError(unknown("axis", word, AXES))
            found = sized[name](word, size) if size else {}
            if name in ("span", "pos", "window", "box"):
                places.append({"places": name} | found)
            elif name != "layer":
                units.append({"unit": name} | found)
        if len(places) > 1 or len(units) > 1 or not (units or "layer" in over.split()):
            raise InputError(
                f"over={over!r}: name one of layer, head, group, layers:3, pair, coalition:32, and at most one of "
                "span, pos, window:0.5s, box:4x4; such as 'layer head' or 'layer span'."
            )
        return cls(**{name: value for given in (*units, *places) for name, value in given.items()})

    @property
    def heads(self) -> bool:
        """Whether heads are told apart."""
        return self.unit not in ("layer", "layers")

    def check(self, name: str, spec: Any, *, grouped: Sequence[str] = ("group", "pair", "coalition")) -> None:
        """Refuse a component that cannot be iterated so; units that are `grouped` need query heads."""
        found = component_named(name)
        if self.heads and found.head_axis is None:
            raise InterventionError(
                f"{name} has no heads to iterate; write over='layer', or name z, result, q, k or v."
            )
        if not found.layered:
            raise InterventionError(f"{name} belongs to no layer, so layers of it cannot be iterated.")
        if self.unit in grouped and Site(name, 0).n_heads(spec) != spec.n_heads:
            raise InterventionError(f"{name} has key-value heads: write over='head', each is a group's already.")

    def cut(self, spans: SpanMap, at: str | Span | None) -> list[Place]:
        """Cut the positions into places that are visited in turn: one where no axis of positions is iterated."""
        if at is None:
            at = "generation" if self.places is None else None
        allowed = resolve_positions(at, spans, what="patch at").index
        if self.places is None:
            return [("all", allowed)]
        if self.places == "pos":
            return [(position, (position,)) for position in allowed]
        named: Iterator[tuple[Any, Span]]
        if self.places == "span":
            named = ((role, spans[role]) for role in ROLES)
        elif self.places == "box":
            named = _boxes(spans, self.box)
        else:
            ends = spans.end_s[~np.isnan(spans.end_s)]
            starts = np.arange(0.0, float(ends.max()) if len(ends) else 0.0, self.seconds).tolist()
            named = ((round(start, 6), spans["media"].between(start, start + self.seconds)) for start in starts)
        inside = set(allowed)
        found = [(label, tuple(p for p in span.positions.tolist() if p in inside)) for label, span in named]
        found = [(label, positions) for label, positions in found if positions]
        if not found:
            raise InputError(f"over={self.places!r} finds no position in this input: it has {spans!r}.")
        return found

    def cut_alike(self, spans: Sequence[SpanMap], at: str | Span | None) -> tuple[list[list[Place]], list[Any]]:
        """Cut several inputs' positions into places of the same names: each input's places, and the names."""
        places = [self.cut(one, at) for one in spans]
        labels = [label for label, _ in places[0]]
        if any([label for label, _ in cut] != labels for cut in places):
            raise InputError(f"these inputs have different {self.places}s; take one layout at a time.")
        return places, labels


@dataclass(frozen=True, eq=False)
class Visits:
    """What is edited in turn: every target at every place; a coalition's are the growing sets of its `orders`."""

    axes: Axes
    component: str
    dims: dict[str, Any]
    targets: list[tuple[Edited, ...]]
    orders: list[list[Head]] = field(default_factory=list)
    places: list[list[Place]] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, axes: Axes, component: str, spec: Any, *, heads: Sequence[Head] | None = None, seed: int = 0) -> Visits:
        """List the targets: of pairs and coalitions those among `heads`, or among all."""
        n_layers, n_heads = spec.n_layers, Site(component, 0).n_heads(spec)
        numbered = {"layer": np.arange(n_layers), "head": np.arange(n_heads)}
        if axes.unit == "layer":
            return cls(axes, component, {"layer": numbered["layer"]}, [((layer, None),) for layer in range(n_layers)])
        if axes.unit == "layers":
            if axes.width > n_layers:
                raise InputError(f"layers:{axes.width} is wider than the model, which has {n_layers} layers.")
            windows = [range(first, first + axes.width) for first in range(n_layers - axes.width + 1)]
            labels = {"layers": [f"{window[0]}-{window[-1]}" for window in windows]}
            return cls(axes, component, labels, [tuple((one, None) for one in window) for window in windows])
        if axes.unit in ("head", "group"):
            n = n_heads if axes.unit == "head" else spec.n_kv_heads
            sets = [tuple(range(i * (n_heads // n), (i + 1) * (n_heads // n))) for i in range(n)]
            dims = {"layer": numbered["layer"], axes.unit: np.arange(n)}
            return cls(axes, component, dims, [((layer, some),) for layer in range(n_layers) for some in sets])
        chosen = _chosen_heads(heads, n_layers, n_heads)
        if axes.unit == "pair":
            pairs = list(combinations(chosen, 2))
            names = ["+".join(f"L{layer}H{head}" for layer, head in pair) for pair in pairs]
            return cls(axes, component, {"pair": names}, [together(pair) for pair in pairs])
        orders = random_orders(chosen, axes.width, seed)
        growing = [together(order[: i + 1]) for order in orders for i in range(len(order))]
        return cls(axes, component, numbered | {"figure": ["estimate", "error"]}, growing, orders)

    def at(self, spans: Sequence[SpanMap], at: str | Span | None) -> Visits:
        """Cut the positions of every input (or stack), which must have places of the same names."""
        places, labels = self.axes.cut_alike(spans, at)
        return replace(self, places=places, labels=labels)

    @property
    def layers(self) -> list[int]:
        """The layers that are edited at all."""
        return sorted({layer for target in self.targets for layer, _ in target})

    @property
    def shape(self) -> tuple[int, int]:
        """Targets and places."""
        return len(self.targets), len(self.labels)

    @property
    def labelled(self) -> dict[str, Any]:
        """Every axis with its labels."""
        return self.dims | ({} if self.axes.places is None else {self.axes.places: self.labels})

    def said(self, at: str | Span | None) -> str:
        """Say at which positions edits were made."""
        return str(at) if at is not None else "generation" if self.axes.places is None else "all"


def positions_of(places: Sequence[Place]) -> list[int]:
    """List the positions of all places, ascending."""
    return sorted({position for _, positions in places for position in positions})


def together(heads: Sequence[Head]) -> tuple[Edited, ...]:
    """Group heads by layer."""
    layers = sorted({layer for layer, _ in heads})
    return tuple((layer, tuple(sorted(head for at, head in heads if at == layer))) for layer in layers)


def random_orders(heads: Sequence[Head], n: int, seed: int) -> list[list[Head]]:
    """Draw orders of heads, each followed by its reverse: antithetic orders halve much of the error."""
    rng = np.random.default_rng(seed)
    drawn = [[heads[i] for i in rng.permutation(len(heads))] for _ in range((n + 1) // 2)]
    return [order for one in drawn for order in (one, one[::-1])][:n]


def shapley(
    gains: Float[np.ndarray, "example order step"], orders: Sequence[Sequence[Head]], shape: tuple[int, int]
) -> Float[np.ndarray, "example layer head figure"]:
    """Average each head's gain over orders; its standard error counts an order and its reverse once."""
    found = np.full((len(gains), *shape, 2), np.nan)
    for head in orders[0]:
        seen = np.stack([gains[:, n, order.index(head)] for n, order in enumerate(orders)], axis=-1)
        pairs = np.stack([seen[:, i : i + 2].mean(-1) for i in range(0, len(orders), 2)], axis=-1)
        error = pairs.std(-1, ddof=1) / np.sqrt(pairs.shape[1]) if pairs.shape[1] > 1 else np.nan
        found[:, *head, 0], found[:, *head, 1] = seen.mean(-1), error
    return found


def _chosen_heads(heads: Sequence[Head] | None, n_layers: int, n_heads: int) -> list[Head]:
    everything = list(product(range(n_layers), range(n_heads)))
    chosen = everything if heads is None else [(int(layer), int(head)) for layer, head in heads]
    for head in chosen:
        if head not in everything:
            raise InputError(f"head {head} is out of range: the model has {n_layers} layers of {n_heads} heads.")
    if len(set(chosen)) < max(2, len(chosen)):
        raise InputError(f"sets of heads need at least two different heads; got {chosen}.")
    return chosen


def _count(word: str, size: str) -> dict[str, Any]:
    if not size.isdigit() or int(size) < 1:
        raise InputError(f"over={word!r}: write a whole number after the colon, such as layers:3 or coalition:32.")
    return {"width": int(size)}


def _seconds(word: str, size: str) -> dict[str, Any]:
    with suppress(ValueError):
        if (seconds := float(size.removesuffix("s"))) > 0:
            return {"seconds": seconds}
    raise InputError(f"over={word!r}: write a window's length in seconds, such as window:0.5s.")


def _box(word: str, size: str) -> dict[str, Any]:
    sizes = size.split("x")
    if len(sizes) != 2 or not all(one.isdigit() and int(one) > 0 for one in sizes):
        raise InputError(f"over={word!r}: write a box's rows and columns in picture tokens, such as box:4x4.")
    return {"box": (int(sizes[0]), int(sizes[1]))}


def _boxes(spans: SpanMap, size: tuple[int, int]) -> Iterator[tuple[str, Span]]:
    """Cut the picture's grid of tokens into boxes, at all times together; those at the border may be smaller."""
    rows, cols = int(spans.row.max()) + 1, int(spans.col.max()) + 1
    for top, left in product(range(0, rows, size[0]), range(0, cols, size[1])):
        bottom, right = min(top + size[0], rows), min(left + size[1], cols)
        yield f"rows {top}:{bottom} cols {left}:{right}", spans.media.box(slice(top, bottom), slice(left, right))
