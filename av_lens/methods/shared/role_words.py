"""Positions by words: `"video"`, `"question|header"`, `"media - sinks"`, and flows `"video -> generation"`.

A flow names where information comes from and where it goes: `"video -> generation"` is what the queries at the
generation position read from the video's keys. `sinks` stands for the media positions that the questioner reads far
more than others (protocol section 3, `core.attention_mass.sink_positions`); `a - b` leaves positions out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from av_lens.errors import InputError
from av_lens.spans import Span, SpanMap

SINKS = "sinks"


@dataclass(frozen=True)
class Flow:
    """A directed set of attention edges, in words.

    Attributes:
        text: as it was written.
        source: the side that is read (keys).
        target: the side that reads (queries).
    """

    text: str
    source: str
    target: str

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
    return SINKS in _names(words)


def is_plain(words: str) -> bool:
    """Whether an expression is role names joined by `|`, as `SpanMap` and `Site` take them."""
    return "-" not in words and not has_sinks(words)


def named_span(words: str, spans: SpanMap, sinks: Any = ()) -> Span:
    """Find the positions that an expression names."""
    first, *without = words.split("-")
    found = _union(first, spans, sinks)
    for part in without:
        found = found - _union(part, spans, sinks)
    return found


def _union(words: str, spans: SpanMap, sinks: Any) -> Span:
    found = spans.span([])
    for word in words.split("|"):
        name = word.strip()
        found = found | (spans.span(sinks) if name == SINKS else spans[name])
    return found


def _names(words: str) -> set[str]:
    return {word.strip() for word in words.replace("-", "|").split("|")}
