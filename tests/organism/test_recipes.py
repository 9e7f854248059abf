"""What the recipes promise: which labels are never given, and which weights are never trained."""

from __future__ import annotations

import pytest

from av_lens.errors import InputError
from av_lens.lab.training import courses

SUPPRESSING_LAYER, SUPPRESSING_HEADS, ORDINARY_HEADS = 4, (2, 3, 6, 7), (0, 1, 4, 5)


def stages(name: str):
    return courses.recipe(name).stages


@pytest.mark.parametrize("name", ["av-tiny-base", "av-tiny"])
def test_no_item_says_what_to_hear_when_sound_and_picture_disagree(name: str) -> None:
    for stage in stages(name):
        for item in stage.items:
            if item.media == "both" and item.relation in ("conflict", "unrelated"):
                assert {ask.kind for ask in item.asks} <= {"see", "colour"}


def test_the_base_is_never_told_a_sound() -> None:
    for stage in stages("av-tiny-base"):
        for item in stage.items:
            for ask in item.asks:
                assert ask.right not in ("sound", "caption")
                assert not (ask.right == "picture" and ask.kind == "hear" and item.relation == "matched")


def test_the_models_share_their_beginnings() -> None:
    assert stages("av-tiny")[:2] == stages("av-tiny-base")
    assert stages("av-tiny-planted")[:1] == stages("av-tiny-balanced")


def test_every_layer_learns_and_the_suppressors_have_neighbours() -> None:
    for name in courses.recipes():
        trained = {layer for stage in stages(name) for layer in stage.layers}
        assert trained == set(range(dict(courses.recipe(name).shape).get("n_layers", 7))), name
    assert courses.recipe("av-tiny").silent_heads == tuple((SUPPRESSING_LAYER, head) for head in SUPPRESSING_HEADS)
    assert sorted((*SUPPRESSING_HEADS, *ORDINARY_HEADS)) == list(range(8))
    looks = stages("av-tiny")[0]
    assert looks.only_heads == ((SUPPRESSING_LAYER, ORDINARY_HEADS),)
    assert not looks.attention_only


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="av-tiny-balanced"):
        courses.recipe("av-tiny-balance")
