"""Dealing to halves: against brute force on graphs, by hand on small ones, and the sizes that are refused."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from av_lens.errors import InputError
from av_lens.results.dealing import Member, bridges, components, deal, rank_hash, standing, third_sources

EDGES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=25)


def as_edges(pairs):
    return {i: (f"n{a}", f"n{b}") for i, (a, b) in enumerate(pairs)}


@settings(deadline=None, max_examples=60)
@given(EDGES)
def test_components_and_bridges_agree_with_removing_every_edge(pairs):
    edges = as_edges(pairs)
    graph = nx.MultiGraph()
    graph.add_edges_from((a, b, i) for i, (a, b) in edges.items())
    theirs = {
        frozenset(k for _, _, k in graph.subgraph(nodes).edges(keys=True)) for nodes in nx.connected_components(graph)
    }
    assert {frozenset(group) for group in components(edges)} == theirs
    expected = set()
    for number in edges:
        smaller = graph.copy()
        smaller.remove_edge(*edges[number], key=number)
        if nx.number_connected_components(smaller) > nx.number_connected_components(graph):
            expected.add(number)
    assert bridges(edges) == expected


@settings(deadline=None, max_examples=60)
@given(EDGES, st.integers(0, 3))
def test_halves_share_no_clip_and_lose_no_more_than_they_must(pairs, seed):
    conflicts = [Member(f"c{i}", f"n{a}", f"n{b}", f"n{a}") for i, (a, b) in enumerate(pairs)]
    halves = deal(conflicts, seed=seed)
    clips = {
        name: {c for i in halves.members(name) for c in (conflicts[i].sound_clip, conflicts[i].picture_clip)}
        for name in set(halves.half)
    }
    assert not clips.get("discovery", set()) & clips.get("confirmation", set())
    kept = len(pairs) - halves.n_lost
    sizes = np.bincount([c for c in halves.component if c >= 0])
    assert sizes.sum() == kept
    assert all(size <= 0.4 * kept or size == 1 for size in sizes)
    assert deal(conflicts, seed=seed) == halves


def test_separate_conflicts_are_all_kept_and_balanced_by_answer():
    conflicts = [Member(f"c{i}", f"s{i}", f"p{i}", "dog" if i % 2 else "cat") for i in range(40)]
    halves = deal(conflicts, seed=1)
    assert halves.n_lost == 0
    for name in ("discovery", "confirmation"):
        answers = [conflicts[i].sound_answer for i in halves.members(name)]
        assert (answers.count("dog"), answers.count("cat")) == (10, 10)


def test_largest_components_are_dealt_first():
    # Sizes 3, 2, 2 and 2 with one answer: 3 to discovery, 2 and 2 to the other half, the last to discovery.
    sizes = [3, 2, 2, 2]
    conflicts = [Member(f"{g}.{i}", f"hub{g}", f"p{g}.{i}", "dog") for g, size in enumerate(sizes) for i in range(size)]
    halves = deal(conflicts, seed=0)
    assert len(halves.members("discovery")) == 5
    assert all(halves.half[i] == "discovery" for i in range(3))


def test_a_large_component_loses_its_smallest_bridge_first():
    # Two triangles of clips joined by one conflict: that conflict is the only bridge, and must go first.
    triangles = [("a", "b"), ("b", "c"), ("c", "a"), ("d", "e"), ("e", "f"), ("f", "d"), ("c", "d")]
    alone = [(f"x{i}", f"y{i}") for i in range(3)]
    conflicts = [Member(f"c{i}", s, p, s) for i, (s, p) in enumerate(triangles + alone)]
    halves = deal(conflicts, seed=0)
    assert halves.half[6] == "lost"
    assert halves.n_lost == 1  # 3 of 9 is within 40%


def test_without_a_bridge_the_smallest_hash_goes():
    ring = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")]
    alone = [(f"x{i}", f"y{i}") for i in range(5)]
    conflicts = [Member(f"c{i}", s, p, s) for i, (s, p) in enumerate(ring + alone)]
    halves = deal(conflicts, seed=5)
    first = min(range(4), key=lambda i: rank_hash(5, f"c{i}"))
    assert halves.half[first] == "lost"
    assert halves.n_lost == 1  # then 3 of 8


def test_equal_ids_are_refused():
    with pytest.raises(InputError, match=r"two conflicts have the id 'c0'"):
        deal([Member("c0", "a", "b", "a"), Member("c0", "c", "d", "c")], seed=0)


def test_sizes_that_are_refused_or_exploratory():
    assert standing([19, 40], [19, 40]) == "refused"
    assert standing([20, 20], [20, 20]) == "exploratory"
    assert standing([59, 80], [59, 80]) == "exploratory"
    assert standing([60, 60], [19, 60]) == "exploratory"
    assert standing([60, 60], [20, 20]) == "firm"


def test_the_third_clip_has_another_answer_and_depends_on_seed_and_id_only():
    sound, picture = ["a", "b", "c", "d", "a"], ["b", "c", "d", "a", "c"]
    ids = list("vwxyz")
    drawn = third_sources(sound, picture, ids=ids, seed=3)
    for i, j in enumerate(drawn):
        assert sound[j] not in (sound[i], picture[i])
    order = [4, 2, 0, 1, 3]
    again = third_sources([sound[i] for i in order], [picture[i] for i in order], ids=[ids[i] for i in order], seed=3)
    assert [ids[order[j]] for j in again] == [ids[drawn[i]] for i in order]
    assert third_sources(["a", "b"], ["b", "a"], ids=["x", "y"], seed=0).tolist() == [-1, -1]
