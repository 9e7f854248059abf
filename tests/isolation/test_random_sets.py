"""Random control sets: matched by layer and norm, never holding a member, all of them where they are few."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from av_lens.isolation.measuring.engine import MLP
from av_lens.isolation.sets.confirmation import doubling
from av_lens.isolation.sets.matching import SUBSETS, first_edition, matched_sets, subsets_of
from av_lens.isolation.sets.sets import cumulative, head_names


def joint():
    raise AssertionError("no MLP needs subsets here")


def with_mlps(norms, mlps=1.0):
    """The heads' norms, and as their last column the MLPs'."""
    return np.column_stack([norms, np.full(len(norms), mlps)])


def test_sets_are_matched_by_layer_and_norm():
    norms = np.ones((6, 8))
    norms[3, 4:] = 5.0  # too large to match
    members = [(3, 0), (3, 1), (3, 2)]
    for drawn in (
        lambda seed: matched_sets(members, with_mlps(norms), joint, seed=seed),
        lambda seed: first_edition(members, norms, seed=seed),
    ):
        found, widened = drawn(0)
        assert (len(found), widened) == (200, "")
        for one in found:
            assert len(set(one)) == 3
            assert not set(one) & set(members)
            assert all(2 <= layer <= 4 for layer, _ in one)
            assert all(head >= 0 and norms[layer, head] == 1.0 for layer, head in one)
        assert len(set(found)) == 200
        assert drawn(0)[0] == found
        assert drawn(1)[0] != found


def test_where_few_exist_all_are_used():
    norms = np.full((1, 9), 1.0)
    norms[0, 0] = 1.5
    found, widened = matched_sets([(0, 0), (0, 1)], with_mlps(norms), joint, seed=0)
    assert (len(found), widened) == (21, "")  # 7 heads, two at a time


def test_where_few_exist_for_many_members_all_are_used_too():
    # 11 members share 13 candidates: 78 sets, though 13^11 draws would hardly ever be of distinct heads.
    members = [(0, head) for head in range(11)]
    found, widened = matched_sets(members, with_mlps(np.ones((1, 24))), joint, seed=0)
    assert (len(found), widened) == (78, "")
    outside = [(0, head) for head in range(11, 24)]
    assert set(found) == {tuple(h for h in outside if h not in left) for left in combinations(outside, 2)}


@pytest.mark.parametrize(
    ("away", "norm", "widened"),
    [
        (0, 3.0, "norms within a factor 4"),
        (2, 1.0, "two layers"),
        (3, 1.0, "any layer"),
        (0, 9.0, "any norm"),
    ],
)
def test_the_pool_is_widened_step_by_step_and_the_step_is_told(away, norm, widened):
    norms = np.full((away + 1, 9), 99.0)  # which match nothing but by the last step
    norms[0, :2], norms[away, 2:] = 1.0, norm
    found, said = matched_sets([(0, 0), (0, 1)], with_mlps(norms), joint, seed=0)
    assert (said, len(found)) == (widened, 21)


def test_too_few_sets_are_all_used_after_the_last_step():
    found, said = matched_sets([(0, 0), (0, 1)], with_mlps(np.ones((1, 5))), joint, seed=0)
    assert (len(found), said) == (3, "any norm")
    assert matched_sets([(0, 0), (0, 1)], with_mlps(np.ones((1, 2))), joint, seed=0)[0] == []


def test_an_mlp_is_matched_by_mlps_and_then_by_subsets_of_one_layers_heads():
    heads, layers, subsets = 6, 4, subsets_of(6)
    assert len(subsets) == 2**heads - 1
    measured = np.array([[float(len(one)) for one in subsets]] * layers)  # k heads write k
    measured[:, [one == (0, 1, 2) for one in subsets].index(True)] = 50.0  # the median does not see it
    norms = with_mlps(np.ones((layers, heads)), 3.2)
    found, said = matched_sets([(2, MLP)], norms, lambda: (subsets, measured), seed=0)
    assert said == SUBSETS
    assert len(found) == 3 + layers * comb(heads, 3)  # the other MLPs, and all threes of heads
    assert {one for one in found if one[0][1] == MLP} == {((layer, MLP),) for layer in (0, 1, 3)}
    assert all(len(one) == 3 and len({layer for layer, _ in one}) == 1 for one in found if one[0][1] != MLP)
    many, said = matched_sets([(9, MLP)], with_mlps(np.ones((30, 2)), 3.0), joint, seed=0)
    assert (said, len(many)) == ("any layer", 29)  # MLPs enough


def test_a_set_of_an_mlp_and_a_head_is_matched_by_one_of_each_and_no_node_twice():
    norms, subsets = with_mlps(np.ones((2, 4)), 1.0), subsets_of(4)
    measured = np.array([[float(len(one)) for one in subsets]] * 2)
    found, said = matched_sets([(0, MLP), (0, 1)], norms, lambda: (subsets, measured), seed=0)
    assert said == SUBSETS  # one MLP and 7 heads make 7 sets
    assert all((0, MLP) not in one and (0, 1) not in one and len(one) == 2 for one in found)
    assert sum((1, MLP) in one for one in found) == 7
    assert len(found) == 7 + comb(7, 2)  # single heads stand in for the MLP


def test_subsets_of_many_heads_are_drawn():
    found = subsets_of(28)
    sizes = {size: sum(len(one) == size for one in found) for size in range(1, 28)}
    assert sizes[1] == 28
    assert 250 < sizes[14] <= 300
    assert found == subsets_of(28)


# The first edition's pools.


def test_where_no_norm_matches_the_three_nearest_stand_in():
    norms = np.array([[10.0, 11.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    found, widened = first_edition([(0, 0), (0, 1)], norms, seed=0)
    assert widened == ""
    assert sorted(found) == [((0, 2), (0, 3)), ((0, 2), (0, 4)), ((0, 3), (0, 4))]  # three sets, and no more are made


def test_nothing_outside_the_set_gives_no_control():
    assert first_edition([(0, 0), (0, 1)], np.ones((1, 2)), seed=0) == ([], "")


def test_where_members_share_their_only_match_the_pools_grow_until_p_can_fall_below_5_percent():
    norms = np.array([[10.0, 11.0, 6.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]])  # one head matches, and it matches both
    found, widened = first_edition([(0, 0), (0, 1)], norms, seed=0)
    assert widened == "the 6 next nearest in norm"
    assert len(found) == 21  # all pairs of the 7 others; after 5 more there were 15
    assert all(not set(one) & {(0, 0), (0, 1)} for one in found)


def test_small_helpers():
    assert cumulative([(1, 2), (0, 1)]) == [((1, 2),), ((1, 2), (0, 1))]
    assert doubling(12) == [1, 2, 4, 8, 12]
    assert doubling(8) == [1, 2, 4, 8]
    assert doubling(0) == []
    assert head_names([(5, 0), (5, 3), (6, MLP)]) == "L5H0 L5H3 MLP 6"
