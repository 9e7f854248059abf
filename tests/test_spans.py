"""Spans are sets with runs; times select by overlap, boxes by row and column; names are never guessed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from av_lens.errors import InputError
from av_lens.spans import ROLES, Span, SpanMap

N = 40
POSITIONS = st.sets(st.integers(0, N - 1))


def example_map() -> SpanMap:
    """Two chunks by hand: video 2 patches of 2x2 and 4 sounds of 40 ms each, then text."""
    roles = ["boundary"] + (["video"] * 4 + ["audio"] * 4) * 2 + ["boundary", "question", "header", "generation"]
    n = len(roles)
    start, end = np.full(n, np.nan), np.full(n, np.nan)
    row, col = np.full(n, -1), np.full(n, -1)
    source_start, source_end = np.full(n, np.nan), np.full(n, np.nan)
    for chunk in range(2):
        video, audio = 1 + 8 * chunk + np.arange(4), 5 + 8 * chunk + np.arange(4)
        start[video], end[video] = chunk, chunk + 1
        source_start[video], source_end[video] = chunk + 0.1, chunk + 0.6
        row[video], col[video] = [0, 0, 1, 1], [0, 1, 0, 1]
        k = 4 * chunk + np.arange(4)
        start[audio], end[audio] = k * 0.04, (k + 1) * 0.04
        source_start[audio], source_end[audio] = k * 0.04, (k + 1) * 0.04
    tokens = tuple(f"t{i}" for i in range(n))
    return SpanMap(tuple(roles), tokens, start, end, source_start, source_end, row, col)


def span(positions: set[int]) -> Span:
    return Span(np.array(sorted(positions), dtype=np.int64))


@settings(max_examples=40, deadline=None)
@given(POSITIONS, POSITIONS)
def test_set_algebra_is_that_of_sets(a: set[int], b: set[int]):
    assert set(span(a) | span(b)) == a | b
    assert set(span(a) & span(b)) == a & b
    assert set(span(a) - span(b)) == a - b
    assert (span(a) - span(b)) | (span(a) & span(b)) == span(a)
    assert len(span(a)) == len(a)


@settings(max_examples=40, deadline=None)
@given(POSITIONS)
def test_runs_rebuild_the_positions_and_never_touch(a: set[int]):
    runs = span(a).runs
    assert {p for start, stop in runs for p in range(start, stop)} == a
    assert all(start < stop for start, stop in runs)
    assert all(runs[i][1] < runs[i + 1][0] for i in range(len(runs) - 1))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([r for r in ROLES if r != "generation"]), min_size=1, max_size=30))
def test_roles_partition_the_positions(roles: list[str]):
    spans = SpanMap.of_roles([*roles, "generation"])
    named = [spans[role] for role in ROLES]
    assert sum(len(s) for s in named) == len(spans)
    assert sorted(p for s in named for p in s) == list(range(len(spans)))
    assert all((a & b) == span(set()) for i, a in enumerate(named) for b in named[:i])
    assert spans.media == spans.audio | spans.video | spans.image
    assert spans["question | header"] == spans.question | spans.header
    assert spans.suffix == spans.question | spans.header | spans.generation
    assert spans.generation_position == len(roles)


def brute_between(spans: SpanMap, start: float, end: float, clock: str) -> list[int]:
    low, high = (spans.start_s, spans.end_s) if clock == "model" else (spans.source_start_s, spans.source_end_s)
    return [
        p
        for p in range(len(spans))
        if np.isfinite(low[p]) and round(low[p], 6) < round(end, 6) and round(high[p], 6) > round(start, 6)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 60), st.sampled_from(["model", "source"]))
def test_between_keeps_what_overlaps(start: int, length: int, clock: str):
    spans = example_map()
    a, b = start * 0.04, (start + length) * 0.04
    assert spans.all.between(a, b, clock=clock).positions.tolist() == brute_between(spans, a, b, clock)


def test_between_by_hand():
    spans = example_map()
    assert spans.audio.between(0.08, 0.2).positions.tolist() == [7, 8, 13]
    assert spans.video.between(0.5, 1.0).positions.tolist() == [1, 2, 3, 4]
    assert spans.video.between(0.7, 1.0, clock="source").positions.tolist() == []
    assert spans.video.between(1, 2).positions.tolist() == [9, 10, 11, 12]
    assert spans.all.between(0, 99) == spans.media


def test_box_by_hand():
    spans = example_map()
    assert spans.video.box(1, 0).positions.tolist() == [3, 11]
    assert spans.video.box(row=slice(0, 1)).positions.tolist() == [1, 2, 9, 10]
    assert spans.media.box(col=range(1, 2)).positions.tolist() == [2, 4, 10, 12]
    assert spans.video.box(-1, -1).positions.tolist() == [4, 12]
    assert spans.video.box() == spans.video
    assert spans.video.between(1, 2).box(0, 0).positions.tolist() == [9]


def test_extended_adds_generated_positions_and_keeps_the_asked_one():
    spans = example_map()
    longer = spans.extended(2, ["a", "b"])
    assert len(longer) == len(spans) + 2
    assert longer.generated.positions.tolist() == [len(spans), len(spans) + 1]
    assert longer.generation_position == spans.generation_position == len(spans) - 1
    assert longer.tokens[-2:] == ("a", "b")
    assert np.isnan(longer.start_s[-1])
    assert longer.row[-1] == -1


def test_layout_difference_sees_roles_times_and_patches_but_not_tokens():
    spans = example_map()
    assert spans.layout_difference(example_map()) is None
    for name, at in (("start_s", 6), ("col", 2), ("row", 12)):
        column = getattr(spans, name).copy()
        column[at] += 1
        changed = SpanMap(**{**{k: getattr(spans, k) for k in spans.__dataclass_fields__}, name: column})
        assert spans.layout_difference(changed) == at
    assert spans.layout_difference(spans.extended(1)) == len(spans)


def test_maps_and_spans_cannot_be_changed():
    spans = example_map()
    with pytest.raises(ValueError, match="read-only"):
        spans.start_s[0] = 0.0
    with pytest.raises(ValueError, match="read-only"):
        spans.audio.positions[0] = 0


def test_printing_shows_runs_and_seconds():
    text = str(example_map())
    assert "1:5     video          4  0.00-1.00 s" in text
    assert repr(example_map()).startswith("SpanMap(21 positions: audio 8, video 8, boundary 2, question 1")
    assert repr(example_map().audio) == "Span(8 positions: 5:9 13:17)"


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda s: s["vidoe"], r"unknown role 'vidoe'. Did you mean 'video'\? Known: system, audio, video"),
        (lambda s: s["audio|questoin"], "Did you mean 'question'"),
        (lambda s: s.audio.between(0, 1, clock="sauce"), "unknown clock 'sauce'. Did you mean 'source'"),
        (lambda s: s.audio.between(1, 1), "is empty: the end must lie after the start"),
        (lambda s: s.audio.box(0, 0), "this span holds none: start from spans.video"),
        (lambda s: s.video.box(row=2), "row 2 is outside the picture's grid, whose rows are 0 to 1"),
        (lambda s: Span(np.array([1, 2])).between(0, 1), "needs the prompt's map"),
        (lambda s: Span(np.array([2, 1])), "increasing and not negative"),
        (lambda s: s.span([99]), "position 99 is outside the prompt, which has 21 positions"),
        (lambda s: SpanMap.of_roles(["audio", "sound"]), "unknown role 'sound'"),
        (lambda s: SpanMap.of_roles(["generation", "generation"]), "one generation position"),
        (lambda s: SpanMap.of_roles(["audio"]).generation_position, "no generation position"),
        (lambda s: s.audio | SpanMap.of_roles(["audio"] * 3).audio, "prompts of different layouts"),
    ],
)
def test_what_is_refused_says_why(ask, text: str):
    with pytest.raises(InputError, match=text):
        ask(example_map())


def test_nothing_answers_to_any_name():
    with pytest.raises(AttributeError):
        _ = example_map().sound
