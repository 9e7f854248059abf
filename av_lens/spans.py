"""Which position is what: spans and the map that partitions a prompt into them.

A media position has an interval on two clocks, in seconds: the *model's* (what its position ids say) and the *source's*
(the true times behind it). Times are half-open, `[start, end)`, and NaN where a position has none; rows and columns are
-1 there. In the layout with separate video and audio each block's model clock starts at 0 with its own first position.

Example:
    >>> spans = SpanMap.of_roles(["boundary", "audio", "audio", "question", "generation"])
    >>> spans.audio.runs
    ((1, 3),)
    >>> spans["audio|question"].positions.tolist()
    [1, 2, 3]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64

from av_lens.errors import InputError, unknown

ROLES = ("system", "audio", "video", "image", "boundary", "question", "header", "generation", "generated")
GROUPS = {"media": ("audio", "video", "image"), "suffix": ("question", "header", "generation")}
CLOCKS = ("model", "source")
_TOLERANCE = 1e-6  # s: interval ends that touch do not overlap
_COLUMNS = ("start_s", "end_s", "source_start_s", "source_end_s", "row", "col")
Selection = int | slice | range | None


def role_runs(roles: Sequence[str]) -> list[tuple[str, int, int]]:
    """Cut roles into runs of equal ones: role, start and stop of each, in order."""
    cuts = [0, *(i for i in range(1, len(roles)) if roles[i] != roles[i - 1]), len(roles)]
    return [(roles[a], a, b) for a, b in itertools.pairwise(cuts) if b > a]


def _frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False)
class Span:
    """A set of positions of one prompt, in increasing order.

    Attributes:
        positions: the positions, `[pos]`, int64, increasing.
        source: the map they were selected from (None for positions given by hand); `between` and `box` need it.
    """

    positions: Int64[np.ndarray, " pos"]
    source: SpanMap | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        unsorted = len(self.positions) > 1 and bool((np.diff(self.positions) <= 0).any())
        if unsorted or (len(self.positions) > 0 and int(self.positions[0]) < 0):
            raise InputError(f"a span's positions are increasing and not negative; got {self.positions.tolist()[:12]}")
        if self.source is not None and len(self.positions) and int(self.positions[-1]) >= len(self.source):
            raise InputError(f"position {int(self.positions[-1])} is past the end: the prompt has {len(self.source)}")
        object.__setattr__(self, "positions", _frozen(self.positions))

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Maximal runs of neighbouring positions, each `(start, stop)` with stop excluded."""
        parts = np.split(self.positions, np.flatnonzero(np.diff(self.positions) != 1) + 1)
        return tuple((int(part[0]), int(part[-1]) + 1) for part in parts if len(part))

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions.tolist())

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int | np.integer) and bool((self.positions == position).any())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Span) and np.array_equal(self.positions, other.positions)

    def __hash__(self) -> int:
        return hash(self.positions.tobytes())

    def __or__(self, other: Span) -> Span:
        return self._combined(np.union1d(self.positions, other.positions), other)

    def __and__(self, other: Span) -> Span:
        return self._combined(np.intersect1d(self.positions, other.positions), other)

    def __sub__(self, other: Span) -> Span:
        return self._combined(np.setdiff1d(self.positions, other.positions), other)

    def _combined(self, positions: np.ndarray, other: Span) -> Span:
        mine, theirs = self.source, other.source
        if mine is not None and theirs not in (None, mine) and mine.layout_difference(theirs) is not None:
            raise InputError(
                "these two spans belong to prompts of different layouts, so their positions mean different things. "
                "Combine spans of one prompt, or of prompts with the same layout."
            )
        return Span(positions.astype(np.int64), mine if mine is not None else theirs)

    def __repr__(self) -> str:
        shown = " ".join(f"{a}" if b == a + 1 else f"{a}:{b}" for a, b in self.runs[:6])
        more = f" and {len(self.runs) - 6} more runs" if len(self.runs) > 6 else ""
        return f"Span({len(self)} positions: {shown}{more})" if len(self) else "Span(empty)"

    def between(self, start_s: float | int, end_s: float | int, clock: str = "model") -> Span:
        """Keep the positions whose interval overlaps `[start_s, end_s)`; positions without a time are left out.

        Args:
            start_s: start in seconds.
            end_s: end in seconds, excluded: an interval that only touches it is not kept.
            clock: "model" (the position ids') or "source" (the true times of the frames or samples).

        Returns:
            The span of those positions, possibly empty.

        Raises:
            InputError: for an unknown clock, an empty interval, or a span without its map.
        """
        columns = self._source("between")
        if clock not in CLOCKS:
            raise InputError(unknown("clock", clock, CLOCKS))
        if not end_s > start_s:
            raise InputError(f"between({start_s}, {end_s}) is empty: the end must lie after the start, in seconds")
        starts, ends = columns.start_s[self.positions], columns.end_s[self.positions]
        if clock == "source":
            timed = np.isfinite(starts)
            starts, ends = columns.source_start_s[self.positions], columns.source_end_s[self.positions]
            if (timed & np.isnan(starts)).any():
                raise InputError(
                    "the examples of this stack differ in their true times, so the source clock selects other "
                    'positions in each: ask x[i].spans, or use clock="model"'
                )
        keep = (starts < end_s - _TOLERANCE) & (ends > start_s + _TOLERANCE)
        return Span(self.positions[keep], columns)

    def box(self, row: Selection = None, col: Selection = None) -> Span:
        """Keep the positions whose patch lies in the given rows and columns of the picture's grid of tokens.

        Args:
            row: a row, a slice or a range of rows (0 is the top), or None for all.
            col: a column, a slice or a range of columns (0 is the left), or None for all.

        Returns:
            The span of those positions; sound and text are never in it.

        Raises:
            InputError: for a row or column outside the grid, or a span that holds no picture.
        """
        columns = self._source("box")
        rows, cols = columns.row[self.positions], columns.col[self.positions]
        on_picture = rows >= 0
        if not on_picture.any():
            raise InputError("box() selects patches of a picture, and this span holds none: start from spans.video")
        keep = on_picture & _within(rows, row, "row") & _within(cols, col, "col")
        return Span(self.positions[keep], columns)

    def _source(self, verb: str) -> SpanMap:
        if self.source is None:
            raise InputError(
                f"{verb}() needs the prompt's map: select the span from x.spans, e.g. x.spans.span([3, 4])"
            )
        return self.source


def _within(values: np.ndarray, chosen: Selection, axis: str) -> np.ndarray:
    if chosen is None:
        return np.ones(len(values), dtype=bool)
    size = int(values.max()) + 1
    if isinstance(chosen, slice):
        return np.isin(values, np.arange(size)[chosen])
    wanted = [chosen] if isinstance(chosen, int) else list(chosen)
    outside = [value for value in wanted if not -size <= value < size]
    if outside:
        raise InputError(f"{axis} {outside[0]} is outside the picture's grid, whose {axis}s are 0 to {size - 1}")
    return np.isin(values, [value % size for value in wanted])


class _Role:
    """Makes `spans.audio` read as `spans["audio"]`: one attribute per known name, and no other answers."""

    def __init__(self, name: str, doc: str) -> None:
        self.name = name
        self.__doc__ = doc

    def __get__(self, spans: SpanMap | None, owner: type[SpanMap]) -> Span:
        if spans is None:
            raise InputError(f"SpanMap.{self.name} is a span of one prompt: ask x.spans.{self.name}")
        return spans[self.name]


@dataclass(frozen=True, eq=False)
class SpanMap:
    """An exact partition of a prompt's positions into roles, with the times and patch of each media position.

    Attributes:
        roles: the leaf role of every position.
        tokens: every position's token as text.
        start_s: start on the model's clock, seconds, NaN off media, `[pos]`.
        end_s: end on the model's clock, `[pos]`.
        source_start_s: true time of the first frame or sample behind the position, `[pos]`.
        source_end_s: true time at which the last of them ends, `[pos]`.
        row: patch row in the grid of tokens, -1 off pictures, `[pos]`.
        col: patch column, -1 off pictures, `[pos]`.
    """

    roles: tuple[str, ...]
    tokens: tuple[str, ...]
    start_s: Float64[np.ndarray, " pos"]
    end_s: Float64[np.ndarray, " pos"]
    source_start_s: Float64[np.ndarray, " pos"]
    source_end_s: Float64[np.ndarray, " pos"]
    row: Int64[np.ndarray, " pos"]
    col: Int64[np.ndarray, " pos"]

    def __post_init__(self) -> None:
        for role in dict.fromkeys(self.roles):
            if role not in ROLES:
                raise InputError(unknown("role", role, ROLES))
        for name in _COLUMNS:
            column: np.ndarray = getattr(self, name)
            if len(column) != len(self.roles):
                raise InputError(f"{name} has {len(column)} entries for {len(self.roles)} positions")
            object.__setattr__(self, name, _frozen(column))
        if len(self.tokens) != len(self.roles):
            raise InputError(f"{len(self.tokens)} tokens for {len(self.roles)} positions")
        if self.roles.count("generation") > 1:
            raise InputError("a prompt has one generation position: the last, where the answer is asked")

    @classmethod
    def of_roles(cls, roles: Iterable[str], tokens: Sequence[str] | None = None) -> SpanMap:
        """A map of roles without times or patches, for text or for tests.

        Args:
            roles: the role of every position.
            tokens: every position's token; empty strings when left out.

        Returns:
            The map.
        """
        named = tuple(roles)
        none, off = np.full(len(named), np.nan), np.full(len(named), -1, dtype=np.int64)
        return cls(named, tuple(tokens) if tokens is not None else ("",) * len(named), none, none, none, none, off, off)

    @cached_property
    def _role_array(self) -> np.ndarray:
        return np.array(self.roles, dtype=object)

    def __len__(self) -> int:
        return len(self.roles)

    def __getitem__(self, name: str) -> Span:
        """The span of a role, of a group ("media", "suffix"), or of a union of them ("question|header")."""
        wanted: set[str] = set()
        for part in name.split("|"):
            role = part.strip()
            if role not in ROLES and role not in GROUPS:
                raise InputError(unknown("role", role, (*ROLES, *GROUPS)))
            wanted.update(GROUPS.get(role, (role,)))
        here = [position for position, role in enumerate(self.roles) if role in wanted]
        return Span(np.array(here, dtype=np.int64), self)

    def span(self, positions: Iterable[int]) -> Span:
        """A span of positions given by number.

        Args:
            positions: positions of this prompt, in any order; negative ones count from the end.

        Returns:
            The span.

        Raises:
            InputError: for a position outside the prompt.
        """
        wanted = [int(p) for p in positions]
        for position in wanted:
            if not -len(self) <= position < len(self):
                raise InputError(f"position {position} is outside the prompt, which has {len(self)} positions")
        return Span(np.unique(np.array([p % len(self) for p in wanted], dtype=np.int64)), self)

    system = _Role("system", "The system message's text.")
    audio = _Role("audio", "The sound's positions.")
    video = _Role("video", "The video's positions.")
    image = _Role("image", "The still picture's positions.")
    boundary = _Role(
        "boundary", "The begin and end tokens of media, and the framing of turns before the question's end."
    )
    question = _Role("question", "The user's text.")
    header = _Role("header", "All between the question and the asked position: the assistant's header, the prefix.")
    generation = _Role("generation", "The last position of the prompt, where the answer is asked.")
    generated = _Role("generated", "Positions of an answer, after the prompt.")
    media = _Role("media", "All sound and picture positions.")
    suffix = _Role("suffix", "Question, header and generation position: all of the prompt that follows the media.")

    @property
    def all(self) -> Span:
        """Every position."""
        return Span(np.arange(len(self), dtype=np.int64), self)

    @property
    def generation_position(self) -> int:
        """The one position whose logits are the answer's.

        Raises:
            InputError: if the prompt has none.
        """
        found = np.flatnonzero(self._role_array == "generation")
        if len(found) != 1:
            raise InputError("this map has no generation position: encode a question, or give one position that role")
        return int(found[0])

    def extended(self, n: int, tokens: Sequence[str] | None = None) -> SpanMap:
        """The map of the same prompt with `n` generated positions after it; the generation position stays.

        Args:
            n: how many positions to add.
            tokens: their text; empty strings when left out.

        Returns:
            The longer map.
        """
        if n < 0 or (tokens is not None and len(tokens) != n):
            given = "no" if tokens is None else len(tokens)
            raise InputError(f"extended({n}) with {given} tokens: give one per position")
        tail = SpanMap.of_roles(["generated"] * n, tokens)
        columns = {name: np.concatenate([getattr(self, name), getattr(tail, name)]) for name in _COLUMNS}
        return SpanMap(roles=self.roles + tail.roles, tokens=self.tokens + tail.tokens, **columns)

    def layout_difference(self, other: SpanMap) -> int | None:
        """The first position at which two maps differ in role, model clock or patch; None where they are one layout.

        Args:
            other: the other map.

        Returns:
            The position, or None. Tokens and source times may differ within one layout.
        """
        n = min(len(self), len(other))
        same = self._role_array[:n] == other._role_array[:n]
        for name in ("start_s", "end_s", "row", "col"):
            mine, theirs = getattr(self, name)[:n], getattr(other, name)[:n]
            same &= (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))
        if not same.all():
            return int(np.flatnonzero(~same)[0])
        return None if len(self) == len(other) else n

    def __str__(self) -> str:
        lines = [f"{len(self)} positions"]
        for role, start, stop in role_runs(self.roles):
            timed = not np.isnan(self.start_s[start])
            seconds = f"  {self.start_s[start]:.2f}-{self.end_s[stop - 1]:.2f} s" if timed else ""
            lines.append(f"  {start:>5}:{stop:<5} {role:<10} {stop - start:>5}{seconds}")
        shown = lines if len(lines) <= 26 else [*lines[:18], f"  ... {len(lines) - 25} more runs", *lines[-7:]]
        return "\n".join(shown)

    def __repr__(self) -> str:
        counts = {role: self.roles.count(role) for role in ROLES if role in self.roles}
        return f"SpanMap({len(self)} positions: {', '.join(f'{role} {n}' for role, n in counts.items())})"
