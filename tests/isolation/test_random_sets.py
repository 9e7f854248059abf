"""Random control sets: matched by layer and norm, never holding a member, all of them where they are few."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from av_lens.isolation.sets.confirmation import doubling, random_sets
from av_lens.isolation.sets.sets import cumulative, head_names


def test_sets_are_matched_by_layer_and_norm():
    norms = np.ones((6, 8))
    norms[3, 4:] = 5.0  # too large to match
    members = [(3, 0), (3, 1), (3, 2)]
    found, widened = random_sets(members, norms, seed=0)
    assert (len(found), widened) == (200, 0)
    for one in found:
        assert len(set(one)) == 3
        assert not set(one) & set(members)
        assert all(2 <= layer <= 4 for layer, _ in one)
        assert all(norms[head] == 1.0 for head in one)
    assert len(set(found)) == 200
    assert random_sets(members, norms, seed=0)[0] == found
    assert random_sets(members, norms, seed=1)[0] != found


def test_where_few_exist_all_are_used():
    norms = np.full((1, 9), 1.0)
    norms[0, 0] = 1.5
    found, widened = random_sets([(0, 0), (0, 1)], norms, seed=0)
    assert (len(found), widened) == (21, 0)  # 7 heads, two at a time


def test_where_few_exist_for_many_members_all_are_used_too():
    # 11 members share 13 candidates: 78 sets, though 13^11 draws would hardly ever be of distinct heads.
    members = [(0, head) for head in range(11)]
    found, widened = random_sets(members, np.ones((1, 24)), seed=0)
    assert (len(found), widened) == (78, 0)
    outside = [(0, head) for head in range(11, 24)]
    assert set(found) == {tuple(h for h in outside if h not in left) for left in combinations(outside, 2)}


def test_where_no_norm_matches_the_three_nearest_stand_in():
    norms = np.array([[10.0, 11.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    found, widened = random_sets([(0, 0), (0, 1)], norms, seed=0)
    assert widened == 0
    assert sorted(found) == [((0, 2), (0, 3)), ((0, 2), (0, 4)), ((0, 3), (0, 4))]  # three sets, and no more are made


def test_nothing_outside_the_set_gives_no_control():
    assert random_sets([(0, 0), (0, 1)], np.ones((1, 2)), seed=0) == ([], 0)


def test_where_members_share_their_only_match_the_pools_grow_until_p_can_fall_below_5_percent():
    norms = np.array([[10.0, 11.0, 6.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]])  # one head matches, and it matches both
    found, widened = random_sets([(0, 0), (0, 1)], norms, seed=0)
    assert widened == 6
    assert len(found) == 21  # all pairs of the 7 others; after 5 more there were 15
    assert all(not set(one) & {(0, 0), (0, 1)} for one in found)


def test_small_helpers():
    assert cumulative([(1, 2), (0, 1)]) == [((1, 2),), ((1, 2), (0, 1))]
    assert doubling(12) == [1, 2, 4, 8, 12]
    assert doubling(8) == [1, 2, 4, 8]
    assert doubling(0) == []
    assert head_names([(5, 0), (5, 3)]) == "L5H0 L5H3"
