"""How far one has to read: into how many files a head patch and an isolation enter (`pytest -s` prints which)."""

from __future__ import annotations

import entered
import pytest
from small_av import small_clip, small_inputs, small_model
from tiny import letter

import av_lens as avl

MOST = {"a head patch": 24, "an isolation": 32}
ANSWERS = ("a", "b", "c", "d")


def read(what: str, call) -> None:
    found = entered.entered(call)
    print(f"\n{what}: {entered.shown(found)}")
    assert len(found) <= MOST[what], f"{what} enters {len(found)} files, more than {MOST[what]}"


def test_a_head_patch():
    model, x = small_model(), small_inputs((0, 1))
    pair = avl.Pair(clean=x[0], corrupt=x[1])
    metric = avl.logit_diff(letter("a"), letter("b"))
    read("a head patch", lambda: avl.patch(model, pair, over="head", at="generation", metric=metric))


@pytest.mark.slow
def test_an_isolation():
    pairs = [(ANSWERS[i % 4], ANSWERS[(i + 1) % 4]) for i in range(40)]
    conflicts = [
        avl.Conflict(sound=small_clip(2 * i, 1.0), picture=small_clip(2 * i + 1, 1.0), question="What?", answers=pair)
        for i, pair in enumerate(pairs)
    ]
    read("an isolation", lambda: avl.isolate(small_model(), conflicts, gate="report", s=0.03))
