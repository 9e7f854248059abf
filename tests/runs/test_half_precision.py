"""Traces and replays in half precision without stored scores: as near to float32 as eager attention is.

Eager attention rounds scores and pattern to bfloat16; kernels round what was read, once. Norms, products and MLPs round
as much in both, so that neither is nearer: the two are compared by their distance from the same weights in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import ELSEWHERE, copied, held_at, move
from small_av import small_inputs, small_model
from tiny import tiny_hf_model, tiny_processor
from torch._subclasses.fake_tensor import FakeTensorMode

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError
from av_lens.families import decoder, kernels
from av_lens.families.decoder import causal_mask, flash
from av_lens.interventions import Plan, Site, cut, scale, zero
from av_lens.replay import stacks

COARSE = (torch.bfloat16, torch.float16)


@cache
def models(dtype: torch.dtype) -> tuple[Any, Any]:
    """A model in half precision, and the same rounded weights in float32."""
    coarse = avl.load("tiny", hf_model=tiny_hf_model(dtype=dtype), processor=tiny_processor())
    exact = avl.load("tiny", hf_model=tiny_hf_model(dtype=dtype).float(), processor=tiny_processor())
    return coarse, exact


def plans(model: Any) -> list[Plan]:
    heads = [(layer, head) for layer in range(model.spec.n_layers) for head in range(model.spec.n_heads)]
    kinds = [Plan(zero(Site("mlp_out", 1, positions="audio"))), Plan(cut("generation", "video", layers=[1, 3]))]
    return [*(Plan(zero(Site("z", layer, head, "suffix"))) for layer, head in heads), *kinds]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).square().mean().sqrt())


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("device", [None, "cpu"])
@torch.no_grad()
def test_replays_are_as_near_to_float32_as_hooked_runs(dtype, device):
    coarse, exact = models(dtype)
    x = small_inputs((0, 1))
    trace = coarse.trace(x, attention="flash", device=device)
    assert (trace.flash, trace.hooked_because) == (True, "")
    listed = plans(coarse)
    found = trace.replay(listed)
    truth = exact.trace(x).replay(listed)
    eager = torch.stack([run(coarse, x, plan=plan).logits for plan in listed])
    assert error(found, truth) <= 1.25 * error(eager, truth)
    assert error(trace.logits("all"), exact(x)) <= 1.25 * error(coarse(x), exact(x))
    spread = float((truth - truth[-1]).abs().max())
    assert float((found - eager).abs().max()) < 0.05 * float(truth.abs().max()) < spread


@pytest.mark.parametrize("dtype", COARSE)
@torch.no_grad()
def test_an_edit_that_changes_nothing_moves_the_last_places_alone(dtype):
    coarse, _ = models(dtype)
    x = small_inputs((0,))
    trace = coarse.trace(x, attention="flash")
    nulls = [Plan(scale(Site("z", layer, head, "suffix"), 1.0)) for layer in range(4) for head in range(4)]
    moved = (trace.replay(nulls) - trace.logits()).abs()
    unit = torch.finfo(dtype).eps * float(trace.logits().abs().max())
    assert float(moved.max()) <= 4 * unit
    assert float(moved.max(-1).values.median()) <= 2 * unit
    real = (trace.replay([Plan(zero(Site("z", 1, 2, "suffix")))]) - trace.logits()).abs().max()
    assert float(real) > 8 * unit


def test_on_a_cpu_half_precision_is_eager_unless_asked():
    coarse, exact = models(torch.bfloat16)
    x = small_inputs((0,))
    assert not coarse.trace(x).flash
    assert exact.trace(x).flash
    with pytest.raises(InputError, match=r"unknown attention 'fast'"):
        coarse.trace(x, attention="fast")


def test_a_saved_trace_keeps_its_way(tmp_path):
    coarse, _ = models(torch.bfloat16)
    x = small_inputs((0,))
    for way in ("flash", "eager"):
        trace = coarse.trace(x, attention=way)
        opened = avl.Trace.load(trace.save(tmp_path / way), coarse, x)
        assert opened.flash == (way == "flash")
        plan = Plan(zero(Site("z", 1, 2, "suffix")))
        assert torch.equal(opened.replay([plan]), trace.replay([plan]))


@torch.no_grad()
def test_gradients_and_generation_go_on_from_such_a_trace():
    coarse, exact = models(torch.bfloat16)
    x = small_inputs((0,))
    trace = coarse.trace(x, attention="flash")
    sites = [Site("z", layer, positions="suffix") for layer in range(4)]
    metric = lambda logits: logits[:, -1, 5].float() - logits[:, -1, 9].float()  # noqa: E731
    own, wanted = (one.gradients(sites, metric).gradient for one in (trace, exact.trace(x)))
    for found, truth in zip(own, wanted, strict=True):
        np.testing.assert_allclose(found.float(), truth, atol=0.05 * float(truth.abs().max()), rtol=0)
    assert len(trace.generate(Plan(), max_new_tokens=4)[0].tokens[0]) == len(x.spans) + 4


def test_a_kernel_that_fails_its_proof_is_not_used(monkeypatch):
    """On a device whose kernels give something else, the first trace says so and scores are written out."""
    model = avl.load("tiny", hf_model=tiny_hf_model(), processor=tiny_processor())
    x = small_inputs((0,))
    wanted = small_model().trace(x).logits()
    plain = decoder.on_cpu
    monkeypatch.setitem(decoder.KERNELS, "cpu", lambda *given: (plain(*given)[0] * 1.5, plain(*given)[1]))
    for _ in range(2):
        trace = model.trace(x)
        assert (trace.flash, trace.hooked_because) == (False, "")
        torch.testing.assert_close(trace.logits(), wanted, atol=1e-5, rtol=0)
    broken = avl.load("tiny", hf_model=tiny_hf_model(), processor=tiny_processor())
    assert "a restart does not reproduce" in broken.trace(x, attention="flash").hooked_because


SIZES = [(40, 40, True, False), (3, 37, False, True), (1, 50, False, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys", "causal", "masked"), SIZES)
def test_the_kernels_of_cuda_are_called_as_they_ask(monkeypatch, dtype, rows, keys, causal, masked):
    """Shapes, devices and the mask's alignment, which fake tensors check; their numbers nobody could measure here."""
    called: list[str] = []
    monkeypatch.setattr(kernels, "can_use_flash_attention", lambda asked: dtype != torch.float32)
    monkeypatch.setattr(kernels, "can_use_efficient_attention", lambda asked: True)
    for name in ("_by_flash_attention", "_memory_efficiently"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, n=name, k=kernel: called.append(n) or k(*given))
    with torch.no_grad(), FakeTensorMode():
        q, k, v = (torch.empty(2, 4, n, 64, device="cuda", dtype=dtype) for n in (rows, keys, keys))
        mask = torch.empty(1, 1, rows, keys, device="cuda", dtype=dtype) if masked else None
        found, weight = flash(q, k, v, 0.125, mask=mask, causal=causal)
        assert (found.shape, found.dtype, found.device.type) == (q.shape, dtype, "cuda")
        assert (weight.shape, weight.dtype) == ((2, 4, rows), torch.float32)
    assert called[0] == ("_by_flash_attention" if dtype != torch.float32 and not masked else "_memory_efficiently")


def test_a_masks_rows_begin_where_the_kernel_wants_them():
    q = torch.zeros(2, 4, 3, 64, dtype=torch.bfloat16)
    mask = torch.randn(2, 1, 3, 37)
    given = kernels.aligned(mask, q)
    assert torch.equal(given, mask.to(q).expand(2, 4, 3, 37))
    assert given.stride(-2) % 16 == 0
    assert given.stride(-1) == 1


@torch.no_grad()
def test_no_scores_are_written_out_on_cuda(monkeypatch):
    trace = small_model().trace(small_inputs())
    for name in ("can_use_flash_attention", "can_use_efficient_attention"):
        monkeypatch.setattr(kernels, name, lambda asked: True)
    model, largest = copied(trace.model), 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        move(model, mode, ELSEWHERE)
        fake = held_at(trace, mode, ELSEWHERE, model, masked=False)
        plan = Plan(zero(Site("z", 0, 1, "suffix"))).compile(model.spec, trace.spans, batch=2)
        start = int(trace.spans.suffix.positions[0])
        plain = decoder.causal_mask

        def sized(n: int, like: torch.Tensor) -> torch.Tensor:
            nonlocal largest
            largest = max(largest, n if like.ndim == 4 and like.shape[-2:] == (n, n) else 0)
            return plain(n, like)

        monkeypatch.setattr(decoder, "causal_mask", sized)
        stacks.restarted(fake, [plan], start, range(3))
    assert largest == 0, "scores were written out under a causal mask"


def test_a_mask_and_a_plain_product_agree_with_the_kernel():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16, generator=generator) for n in (30, 30, 30))
    with torch.no_grad():
        by_kernel = flash(q, k, v, 0.25, causal=True)
        by_mask = flash(q, k, v, 0.25, mask=causal_mask(30, q))
    with torch.enable_grad():
        plainly = flash(q, k, v, 0.25, causal=True)
    for one in (by_mask, plainly):
        for found, wanted in zip(one, by_kernel, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
