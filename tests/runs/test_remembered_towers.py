"""Encoders that remember give the same to the bit, run once for each clip, and forget everything afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from av_lens.families.adapter import Rows
from av_lens.media import Clip
from av_lens.model import load
from av_lens.model.binding import TowerMemory, key_of, remembered_towers


@pytest.fixture(scope="module")
def model():
    return load("av-tiny-planted")


def clip(seed):
    made = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 255, (4, 3, 56, 56), dtype=torch.uint8, generator=made)
    return Clip.from_arrays(
        frames=frames.numpy().transpose(0, 2, 3, 1),
        times=np.arange(4) * 0.5,
        waveform=torch.randn(32_000, generator=made).numpy() * 0.1,
        rate=16_000,
        duration=2.0,
    )


class Counter:
    """Counts the runs of both encoders."""

    def __init__(self, model):
        self.runs = {"audio": 0, "vision": 0}
        bridge = model.bridge
        towers = {"audio": bridge.audio_encoder.original_component, "vision": bridge.vision_encoder.original_component}
        self.handles = [
            tower.register_forward_hook(lambda *_, name=name: self.runs.__setitem__(name, self.runs[name] + 1))
            for name, tower in towers.items()
        ]

    def __enter__(self):
        return self.runs

    def __exit__(self, *caught):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def test_each_clip_is_encoded_once_and_the_logits_are_the_same_to_the_bit(model):
    first, second = clip(1), clip(2)
    crossed = second.with_sound(first)
    inputs = [model.encode(one, "What do you hear?") for one in (first, second, crossed, first.muted())]
    plain = [model(x) for x in inputs]
    with Counter(model) as runs, remembered_towers(model):
        for _ in range(2):
            for x, expected in zip(inputs, plain, strict=True):
                assert torch.equal(model(x), expected)
    assert runs == {"audio": 3, "vision": 2}
    with Counter(model) as runs:
        model(inputs[0])
    assert runs == {"audio": 1, "vision": 1}


@torch.no_grad()
def test_a_hook_on_an_encoder_is_heard_and_does_not_stay(model):
    x = model.encode(clip(1), "What do you hear?")
    plain = model(x)
    with remembered_towers(model):
        model(x)
        silenced = model.run_with_hooks(x, fwd_hooks=[("audio_encoder.hook_out", lambda a, hook: a * 0)])
        blind = model.run_with_hooks(x, fwd_hooks=[("vision_encoder.hook_in", lambda a, hook: a * 0)])
        again = model(x)
    assert torch.equal(again, plain)
    assert not torch.equal(silenced, plain)
    assert torch.equal(blind, model.run_with_hooks(x, fwd_hooks=[("vision_encoder.hook_in", lambda a, hook: a * 0)]))


def test_with_gradients_on_nothing_is_remembered_and_an_error_leaves_nothing_behind(model):
    x = model.encode(clip(1), "What do you hear?")
    with Counter(model) as runs, remembered_towers(model):
        model(x)
        model(x)
    assert runs == {"audio": 2, "vision": 2}
    with pytest.raises(RuntimeError, match="stop"), remembered_towers(model):
        raise RuntimeError("stop")
    assert model.bridge.vision_encoder.memory is None


@torch.no_grad()
def test_the_longest_unused_goes_first_and_what_cannot_be_hashed_is_not_kept():
    runs = []

    class Tower(torch.nn.Module):
        def forward(self, number, **more):
            runs.append(int(number))
            return {"out": number.float().repeat(10)}

    def ask(memory, number, **more):
        return memory(Tower(), (torch.tensor([number]),), more)["out"][0].item()

    memory = TowerMemory(Rows("out"), most=80)  # two outputs of 40 bytes
    assert [ask(memory, n) for n in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert runs == [1, 2, 3, 2]  # 2 had gone when 3 came
    runs.clear()
    assert ask(memory, 1, what=object()) == 1
    assert runs == [1]
    assert key_of((torch.ones(2),), {}) != key_of((torch.ones(2, 1),), {})
    assert key_of((torch.ones(2),), {"a": 1}) != key_of((torch.ones(2),), {"a": 2})
