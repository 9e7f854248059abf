"""What is remembered, and what goes first."""

from __future__ import annotations

from av_lens.inputs.memory import Memory


def test_the_least_recently_used_goes_first():
    made: list[str] = []

    def make(name: str):
        made.append(name)
        return name * 3

    memory: Memory[str] = Memory(9, len)
    for name in ("a", "b", "c", "a", "d", "a", "b"):
        assert memory.once(name, lambda name=name: make(name)) == name * 3
    # a b c fill 9; d pushes out b (a was used since); the last b pushes out c.
    assert made == ["a", "b", "c", "d", "b"]
    assert memory.hits == 2
    assert len(memory) == 3


def test_one_value_is_kept_whatever_it_costs():
    memory: Memory[str] = Memory(2, len)
    assert memory.once("x", lambda: "long") == "long"
    assert len(memory) == 1
    assert memory.once("y", lambda: "longer") == "longer"
    assert len(memory) == 1
