"""How far one has to read: into how many files a head patch and an isolation enter (`pytest -s` prints which).

The isolation is that of the fake model, quick: what is counted is the main job itself, without the rooms that run a
model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import entered
from fake_model import FakeModel, fake_conflicts, isolated
from small_av import small_inputs, small_model
from tiny import letter

import av_lens as avl
from av_lens.spans import SpanMap

MOST = {"a head patch": 24, "an isolation": 45}


def read(what: str, call: Callable[[], Any]) -> None:
    found = entered.entered(call)
    print(f"\n{what}: {entered.shown(found)}")
    assert len(found) <= MOST[what], f"{what} enters {len(found)} files, more than {MOST[what]}: {', '.join(found)}"


def test_a_head_patch():
    model, x, patch = small_model(), small_inputs((0, 1)), avl.patch
    pair = avl.Pair(clean=x[0], corrupt=x[1])
    metric = avl.logit_diff(letter("a"), letter("b"))
    read("a head patch", lambda: patch(model, pair, over="head", at="generation", metric=metric))


def test_an_isolation():
    conflicts = fake_conflicts(44)
    read("an isolation", lambda: isolated(FakeModel(), conflicts, s=0.1, quick=True))


def test_what_is_counted_is_what_is_called():
    found = entered.entered(lambda: SpanMap.of_roles(["video", "generation"]))
    assert set(found) >= {"spans.py"}
    assert "SpanMap.of_roles" in found["spans.py"]
    assert "methods/activation_patching.py" not in found
