"""Memory of a run: attention in blocks beyond the budget, equal to the whole; what must be whole is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import Tensors, tiny_clip, tiny_model

import av_lens as avl
from av_lens.errors import BudgetError
from av_lens.families import blocks as attention
from av_lens.families.blocks import RealAttentionBridge, score_budget, score_gigabytes
from av_lens.families.decoder import hook_name

SMALL = 4e-3  # GB: less than the whole scores of `x`, more than its logits and the caches below
EXACT = {"atol": 1e-6, "rtol": 1e-6}
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def x(model):
    found = model.encode(tiny_clip(10.0), "What do you hear?")
    assert score_gigabytes(4 * len(found.spans) ** 2, itemsize=4) > SMALL
    return found


def beside_scores(name: str) -> bool:
    return name.endswith(("hook_z", "hook_rot_q", "hook_v", "hook_resid_post"))


@pytest.fixture
def blocks(monkeypatch):
    """How many queries each block took."""
    taken: list[int] = []
    plain = RealAttentionBridge._attended

    def counted(self, query, key, value, mask, hooked=True):
        if not hooked:
            taken.append(query.shape[2])
        return plain(self, query, key, value, mask, hooked)

    monkeypatch.setattr(RealAttentionBridge, "_attended", counted)
    return taken


@pytest.mark.parametrize("n_kv_heads", HEADS.values(), ids=HEADS)
@torch.no_grad()
def test_blocks_equal_the_whole(blocks, n_kv_heads):
    model = tiny_model(n_kv_heads=n_kv_heads)
    x = model.encode(tiny_clip(10.0), "What do you hear?")
    wanted, whole = model.run_with_cache(x, beside_scores)
    assert not blocks
    logits, cache = model.run_with_cache(x, beside_scores, budget_gb=SMALL)
    assert sum(blocks) == 4 * len(x.spans)
    assert max(blocks) < len(x.spans)
    torch.testing.assert_close(logits, wanted, **EXACT)
    assert cache.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(cache[name], whole[name], **EXACT)
    torch.testing.assert_close(model(x, budget_gb=SMALL), wanted, **EXACT)
    run = avl.run(model, x, capture=["z"], budget_gb=SMALL)
    torch.testing.assert_close(run.logits, wanted[:, -1:], **EXACT)


@pytest.mark.parametrize("component", ["q", "v", "rot_k", "z", "result", "q_input"])
@torch.no_grad()
def test_edits_beside_the_scores_act_as_on_the_whole(model, x, blocks, component):
    def mixed(value, hook):
        return value + value.roll(1, dims=1)

    hooks = [(hook_name(component, 1), mixed)]
    wanted = model.run_with_hooks(x, fwd_hooks=hooks)
    assert not blocks
    torch.testing.assert_close(model.run_with_hooks(x, fwd_hooks=hooks, budget_gb=SMALL), wanted, **EXACT)
    assert len(blocks) > 4
    assert (wanted - model(x)).abs().max() > 1e-3


@torch.no_grad()
def test_padded_rows_and_several_examples(model, blocks):
    ids = torch.randint(0, 200, (2, 300), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :70] = 0  # its first rows see no key at all
    padded = Tensors({"input_ids": ids, "attention_mask": mask})
    wanted = model(padded)
    torch.testing.assert_close(model(padded, budget_gb=SMALL), wanted, **EXACT)
    assert blocks


@torch.no_grad()
def test_generation_in_blocks_says_the_same(model, x, blocks):
    plan = avl.Plan(avl.zero(avl.Site("z", 1, head=2)))
    for options in ({}, {"plan": plan}):
        wanted = model.generate(x, max_new_tokens=4, return_type="result", **options)
        blocks.clear()
        found = model.generate(x, max_new_tokens=4, return_type="result", budget_gb=SMALL, **options)
        assert blocks
        assert torch.equal(found.tokens, wanted.tokens)
        torch.testing.assert_close(found.logits, wanted.logits, **EXACT)
    shapes = []
    seen = (hook_name("logits"), lambda value, hook: shapes.append(value.shape[1]))
    few = model.generate(x, max_new_tokens=2, fwd_hooks=[seen], budget_gb=1e-4)
    assert shapes == [1, 1], "a long prompt's logits were made at every position"
    assert torch.equal(few, model.generate(x, max_new_tokens=2))


def test_gradients_equal_and_no_pattern_is_kept_for_them(model, x, blocks):
    weights = [p for p in model.hf_model.model.language_model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(x).square().sum(), weights)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        logits = model(x, budget_gb=SMALL)
    forward = len(blocks)
    found = torch.autograd.grad(logits.square().sum(), weights)
    assert len(blocks) == 2 * forward > 0
    assert max(kept) < 4 * len(x.spans) ** 2
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


def test_recomputed_blocks_drop_the_same_edges(monkeypatch, x):
    model = tiny_model(attention_dropout=0.5)
    model.hf_model.train()
    weights = [model.hf_model.model.language_model.embed_tokens.weight]

    def gradient():
        torch.manual_seed(0)
        return torch.autograd.grad(model(x, budget_gb=SMALL).square().sum(), weights)[0]

    with torch.random.fork_rng():
        found = gradient()
        monkeypatch.setattr(attention, "checkpoint", lambda block, *ends, **options: block(*ends))
        torch.testing.assert_close(found, gradient(), **EXACT)


@pytest.mark.parametrize("mask", ["none", "padding", "rows", "whole", "broadcast"])
def test_every_form_of_mask_is_cut_with_its_block(model, mask):
    attended, generator = model.bridge.blocks[0].attn, torch.Generator().manual_seed(0)
    n, n_keys = 37, 50
    query = torch.randn(2, 4, n, 16, generator=generator)
    key, value = (torch.randn(2, 4, n_keys, 16, generator=generator) for _ in range(2))
    drawn = -torch.rand(2, 1, n_keys, n_keys, generator=generator)
    given = {
        "none": None,
        "padding": drawn[0, :, 0],
        "rows": drawn[0, :, -n:],
        "whole": drawn,
        "broadcast": drawn[:, :, :1],
    }[mask]
    wanted = attended._attended(query, key, value, given, hooked=False)[0]
    torch.testing.assert_close(attended._attended_in_blocks(query, key, value, given, 16), wanted, **EXACT)


@pytest.mark.parametrize("component", ["scores", "pattern"])
@pytest.mark.parametrize("kind", ["fwd_hooks", "bwd_hooks"])
def test_hooks_that_need_whole_scores_are_refused_before_the_run(model, x, component, kind):
    name, runs = hook_name(component, 2), []
    hooks = {kind: [(name, lambda value, hook: None)]}
    first = (hook_name("resid_pre", 0), lambda value, hook: runs.append(1))
    with pytest.raises(BudgetError) as error, model.hooks(fwd_hooks=[first]), model.hooks(**hooks):
        model(x, budget_gb=SMALL)
    text = str(error.value)
    assert f"whole attention scores of 1 x {len(x.spans)} positions would take about" in text
    assert f"beyond budget_gb=0.004, and {name} asks for them" in text
    assert "Hook z, q, k or v instead, run under torch.no_grad(), hook fewer layers, give at most" in text
    assert not runs
    with torch.no_grad(), pytest.raises(BudgetError) as error:
        model.generate(x, fwd_hooks=[(name, lambda value, hook: None)], budget_gb=SMALL)
    assert "no_grad" not in str(error.value)
    with score_budget(SMALL), model.hooks(**hooks), pytest.raises(BudgetError, match=name):
        model.bridge(x.ids[:, :1].repeat(1, 400))


def test_the_positions_that_an_error_names_fit(model, x):
    hooks = [(hook_name("pattern", 2), lambda value, hook: None)]
    with torch.no_grad(), pytest.raises(BudgetError) as error:
        model.run_with_hooks(x, fwd_hooks=hooks, budget_gb=SMALL)
    fits = int(str(error.value).partition("at most ")[2].split()[0])
    ids = torch.zeros(1, fits, dtype=torch.long)
    with torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=hooks, budget_gb=SMALL)
        with pytest.raises(BudgetError):
            model.run_with_hooks(torch.zeros(1, fits + 1, dtype=torch.long), fwd_hooks=hooks, budget_gb=SMALL)


def test_one_whole_layer_beside_layers_in_blocks(model, x, blocks):
    """Four patterns kept for gradients would pass the budget, the one that is hooked does not."""
    n, seen = len(x.spans), []
    budget = score_gigabytes(4 * n * n, itemsize=4, kept_layers=2)
    hooks = [(hook_name("pattern", 2), lambda value, hook: seen.append(value.shape))]
    logits = model.run_with_hooks(x, fwd_hooks=hooks, budget_gb=budget)
    assert seen == [(1, 4, n, n)]
    assert sum(blocks) == 3 * n
    torch.testing.assert_close(logits, model(x), **EXACT)


def test_a_cache_of_patterns_counts_a_layers_own_scores(model, x):
    name = hook_name("pattern", 2)
    stored = 4 * 4 * len(x.spans) ** 2 / 1e9
    with torch.no_grad(), pytest.raises(BudgetError, match=r"names_filter=lambda name: name\.endswith"):
        model.run_with_cache(x, name, budget_gb=2 * stored)
    with torch.no_grad():
        assert name in model.run_with_cache(x, name, budget_gb=3.01 * stored)[1]


def test_logits_of_every_position_are_refused_before_the_run(model, x):
    n = len(x.spans)
    need = n * 266 * 4 / 1e9
    wanted = rf"the logits of 1 x {n} positions and 266 tokens would take about .* avl\.run\(model, x, logits_at="
    for run in (model, model.run_with_hooks):
        with pytest.raises(BudgetError, match=wanted):
            run(x, budget_gb=0.9 * need)
    with pytest.raises(BudgetError, match=wanted):
        model(x, return_type="loss", budget_gb=2.9 * need)
    model(x, stop_at_layer=1, budget_gb=0.9 * need)
    assert avl.run(model, x, budget_gb=0.9 * need).logits.shape == (1, 1, 266)


LONG = """
import resource, sys
import torch
from tiny import tiny_model
model = tiny_model(d_model=96, n_heads=6, n_kv_heads=2, n_layers=2)
ids = torch.randint(0, 200, (1, 13478), generator=torch.Generator().manual_seed(0))
if sys.argv[1] == "forward":
    assert model(ids).requires_grad
else:
    model.generate(ids, max_new_tokens=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["forward", "generate"])
def test_thirteen_thousand_positions(verb):
    """Whole scores are 4.4 GB a layer, and a forward that keeps them for gradients took more than 20 GB."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LONG, verb], cwd=tests.parent, capture_output=True, text=True, check=False,
        env=environment(tests),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4.0


def environment(tests: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests / "toys")]),
        "OMP_NUM_THREADS": "1",
    }
