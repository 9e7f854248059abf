"""Equal pictures are held once, by cells and by stacks of them, as long as somebody holds them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from av_lens.inputs import AVInputs, Conflict, Encoder
from av_lens.inputs.model_inputs import SMALLEST, shared

PIXELS = "pixel_values_videos"


@pytest.fixture
def cells(encoder, processor, hf, make_clip):
    # An encoder whose memory keeps one thing only, so that what is shared is not shared by it.
    forgetful = Encoder(processor, hf.config, encoder.position_ids, cache_bytes=1)
    fields = {"sound": make_clip(2.0, seed=1, size=(168, 168)), "picture": make_clip(2.0, seed=2, size=(168, 168))}
    return Conflict(**fields, question="What do you hear?", answers=("dog", "cat")).cells(forgetful)


def test_cells_that_show_one_picture_hold_one_tensor(cells):
    shown = {name: cells[name].tensors[PIXELS] for name in ("va", "vv", "v_muted", "aa", "av", "blank_a", "blank_v")}
    assert shown["va"].nbytes > SMALLEST
    assert shown["va"] is shown["vv"] is shown["v_muted"]
    assert shown["aa"] is shown["av"]
    assert shown["blank_a"] is shown["blank_v"]
    assert len({value.data_ptr() for value in shown.values()}) == 3


def test_stacks_share_and_nothing_is_changed(cells):
    apart = [AVInputs.stack([cells[one], cells[two]]) for one, two in (("va", "aa"), ("vv", "av"), ("aa", "va"))]
    one, two, turned = (shared(stack) for stack in apart)
    assert one.tensors[PIXELS] is two.tensors[PIXELS]
    assert one.tensors[PIXELS] is not turned.tensors[PIXELS]
    for before, after in zip(apart, (one, two, turned), strict=True):
        assert before.tensors.keys() == after.tensors.keys()
        for name, value in before.tensors.items():
            same = (
                torch.equal(value, after.tensors[name])
                if isinstance(value, torch.Tensor)
                else value == after.tensors[name]
            )
            assert same, name
        assert after.parts == before.parts


def test_equal_bytes_of_another_shape_or_kind_are_not_shared_and_nothing_is_kept_alive(cells):
    x = cells["va"]
    flat = torch.zeros(SMALLEST, dtype=torch.uint8)
    first = shared(
        replace(x, tensors={**x.tensors, "one": flat, "two": flat.view(2, -1), "three": flat.view(torch.int8)})
    )
    again = shared(replace(x, tensors={**x.tensors, "one": flat.clone()}))
    assert first.tensors["one"] is again.tensors["one"]
    assert first.tensors["two"].shape == (2, SMALLEST // 2)
    assert first.tensors["three"].dtype == torch.int8
    held = [weakref.ref(first.tensors[name]) for name in ("one", "two", "three")]
    del first, again, flat
    gc.collect()
    assert [one() for one in held] == [None] * 3
