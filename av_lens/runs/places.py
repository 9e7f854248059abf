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
from typing import Any

import numpy as np

from av_lens.errors import InputError, unknown
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair
from av_lens.interventions.sites import resolve_positions
from av_lens.spans import ROLES, Span, SpanMap

AXES = ("layer", "head", "span", "pos", "window:SECONDSs", "box:ROWSxCOLS")


@dataclass(frozen=True)
class Axes:
    """What is iterated: heads or not, and how positions are cut.

    Attributes:
        heads: whether every head is patched by itself.
        places: the name of the axis of positions, or None where all are edited together.
        seconds: the length of a window, for windows.
        box: rows and columns of a box in picture tokens, for boxes.
    """

    heads: bool
    places: str | None = None
    seconds: float = 0.0
    box: tuple[int, int] = (0, 0)

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
        words = over.split()
        places: list[dict[str, Any]] = []
        for word in words:
            if word.startswith("window:"):
                places.append({"places": "window", "seconds": _seconds(word)})
            elif word.startswith("box:"):
                places.append({"places": "box", "box": _box(word)})
            elif word in ("span", "pos"):
                places.append({"places": word})
            elif word not in ("layer", "head"):
                raise InputError(unknown("axis", word, AXES))
        if not words or len(places) > 1 or not {"layer", "head"} & set(words):
            raise InputError(
                f"over={over!r}: name layer or head, and at most one of span, pos, window:0.5s, box:4x4; such as "
                "'layer head' or 'layer span'."
            )
        return cls("head" in words, **(places[0] if places else {}))

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

    def labelled(self, n_heads: int, labels: list[Any], n_layers: int) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Name the axes after example.

        Args:
            n_heads: heads of a layer.
            labels: the places.
            n_layers: layers.

        Returns:
            The shape of the axes, and their labels.
        """
        found: dict[str, Any] = {"layer": np.arange(n_layers)}
        if self.heads:
            found["head"] = np.arange(n_heads)
        if self.places is not None:
            found[self.places] = labels
        return tuple(len(labels) for labels in found.values()), found


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


def layout_stacks(pairs: Sequence[Pair], size: int) -> Iterator[list[int]]:
    """Group pairs of one layout.

    Args:
        pairs: the pairs.
        size: examples that run together, at most.

    Yields:
        Numbers of pairs.
    """
    yield from input_stacks([pair.clean for pair in pairs], size)


def input_stacks(inputs: Sequence[AVInputs], size: int) -> Iterator[list[int]]:
    """Group inputs of one layout.

    Args:
        inputs: the inputs, each one example or a stack.
        size: examples that run together, at most.

    Yields:
        Numbers of inputs.
    """
    layouts: list[list[int]] = []
    for number, x in enumerate(inputs):
        for group in layouts:
            first = inputs[group[0]]
            if first.layout == x.layout and first.spans.layout_difference(x.spans) is None:
                group.append(number)
                break
        else:
            layouts.append([number])
    for group in layouts:
        current: list[int] = []
        for number in group:
            if current and sum(len(inputs[n]) for n in current) + len(inputs[number]) > size:
                yield current
                current = []
            current.append(number)
        yield current
