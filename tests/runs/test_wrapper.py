"""The wrapper: TransformerLens's protocols, caches within a budget, gated hooks, refusals."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_clip, tiny_model
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights

from av_lens.core.budget import ModelSpec, cache_bytes
from av_lens.errors import BudgetError, InputError, InterventionError, ModelError
from av_lens.families.decoder import GATES, hook_name
from av_lens.model.forwarding import FORWARDED


def test_it_satisfies_transformer_lens_protocols(model):
    assert isinstance(model, TransformerLensModel)
    assert isinstance(model, TransformerLensModelWithWeights)
    assert not isinstance(object(), TransformerLensModel)


@pytest.mark.parametrize("name", FORWARDED)
def test_what_is_forwarded_is_the_bridges_own(model, name):
    ours, theirs = getattr(model, name), getattr(model.bridge, name)
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, torch.nn.Module | bool):
        assert ours is theirs
    elif callable(theirs):
        ours = getattr(ours, "__wrapped__", ours)  # some wait for the model's turn
        assert ours.__func__ is theirs.__func__
        assert ours.__self__ is model.bridge
    else:
        assert type(ours) is type(theirs)


def test_what_is_not_forwarded_is_not_answered(model):
    with pytest.raises(AttributeError):
        _ = model.loss_fn


def test_its_sizes(model):
    assert model.spec == ModelSpec(n_layers=4, n_heads=4, n_kv_heads=2, d_model=64, d_head=16, d_mlp=128, d_vocab=266)
    assert model.W_U.shape == (64, 266)
    assert model.W_O.shape == (4, 4, 16, 64)
    assert repr(model) == (
        "HookedAVLLM('external', 4 layers, 4 heads on 2 key-value heads, d_model 64, float32 on cpu)"
    )


@torch.no_grad()
def test_a_cache_under_both_names_of_a_hook(model, x):
    logits, cache = model.run_with_cache(x)
    assert torch.equal(logits, model(x))
    assert torch.equal(cache["blocks.1.hook_resid_post"], cache["resid_post", 1])
    assert torch.equal(cache["blocks.1.hook_resid_post"], cache["blocks.2.hook_in"])
    assert "blocks.1.attn.hook_result" not in cache
    assert len(cache) > 150


@torch.no_grad()
def test_a_filter_keeps_what_it_names(model, x):
    names = [hook_name("z", 1), hook_name("pattern", 2)]
    assert set(model.run_with_cache(x, names)[1]) >= set(names)
    assert set(model.run_with_cache(x, names[0])[1]) >= {names[0]}
    ends = model.run_with_cache(x, lambda name: name.endswith("hook_z"))[1]
    assert set(ends) == {hook_name("z", layer) for layer in range(4)}


@torch.no_grad()
def test_gated_hooks_open_for_the_run_that_names_them_and_close_after(model, x):
    result = hook_name("result", 1)
    _, cache = model.run_with_cache(x, [result])
    assert cache[result].shape == (1, len(x.spans), 4, 64)
    seen = []
    model.run_with_hooks(x, fwd_hooks=[(result, lambda value, hook: seen.append(value.shape))])
    assert seen == [(1, len(x.spans), 4, 64)]
    with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_mlp_in"), lambda value, hook: seen.append(1))]):
        assert model.cfg.use_hook_mlp_in
        model(x)
    assert len(seen) == 1 + 4
    assert not any(getattr(model.cfg, gate) for gate in GATES)


@torch.no_grad()
def test_a_switch_that_was_left_on_stays_on(model, x):
    model.set_use_attn_result(True)
    try:
        model.run_with_cache(x, [hook_name("q_input", 0)])
        assert model.cfg.use_attn_result
        assert not model.cfg.use_split_qkv_input
    finally:
        model.set_use_attn_result(False)


@torch.no_grad()
def test_switches_close_when_the_run_fails(model, x):
    def fail(value, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        model.run_with_hooks(x, fwd_hooks=[(hook_name("result", 1), fail)])
    assert not model.cfg.use_attn_result
    assert not model.hook_dict[hook_name("result", 1)].fwd_hooks


def test_two_ways_to_fork_one_stream_are_refused_together(model, x):
    with pytest.raises(InterventionError, match="cannot fire in one run"):
        model.run_with_cache(x, [hook_name("attn_in", 0), hook_name("q_input", 0)])


@pytest.mark.parametrize("run", ["run_with_cache", "run_with_hooks", "hooks"])
def test_unknown_hooks_are_refused_with_the_nearest(model, x, run):
    wrong = "blocks.1.attn.hook_zed"
    nothing = [(wrong, lambda value, hook: None)]
    calls = {
        "run_with_cache": lambda: model.run_with_cache(x, [wrong]),
        "run_with_hooks": lambda: model.run_with_hooks(x, fwd_hooks=nothing),
        "hooks": lambda: model.hooks(bwd_hooks=nothing).__enter__(),
    }
    with pytest.raises(InterventionError, match=r"unknown hook 'blocks\.1\.attn\.hook_zed'\. Did you mean 'blocks\.1"):
        calls[run]()


@torch.no_grad()
def test_the_estimate_is_what_a_cache_takes(model, x):
    forks = ("hook_q_input", "hook_k_input", "hook_v_input")
    filters = (
        lambda name: True,
        lambda name: name.startswith("blocks") and not name.endswith(forks),
        lambda name: name.endswith(forks),
        lambda name: name.endswith(("hook_resid_post", "hook_resid_pre", "hook_z")),
        lambda name: name.endswith("hook_normalized"),
    )
    for accept in filters:
        _, cache = model.run_with_cache(x, accept)
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in cache.values()}
        towers = {cache[n].untyped_storage().data_ptr() for n in cache.cache_dict if n.startswith(("audio", "vision"))}
        real = sum(size for place, size in storages.items() if place not in towers)
        estimate = cache_bytes(cache.cache_dict, model.spec, batch=1, n_pos=len(x.spans), itemsize=4)
        assert real * 0.95 <= estimate <= real * 1.05


def test_the_estimate_at_7b_width_is_what_was_measured():
    """Two layers, 1,000 positions, bfloat16: everything that is not gated took 0.99 GB."""
    spec = ModelSpec(n_layers=2, n_heads=28, n_kv_heads=4, d_model=3584, d_head=128, d_mlp=18944, d_vocab=152064)
    names = [name for name in tiny_model().hook_dict if not name.startswith(("blocks.2", "blocks.3"))]
    names = [name for name in names if not name.endswith(("_input", "attn_in", "result", "mlp_in"))]
    assert cache_bytes(names, spec, batch=1, n_pos=1000, itemsize=2) == pytest.approx(0.99e9, rel=0.1)


def test_a_cache_beyond_the_budget_is_refused_with_a_filter_that_fits(model, x):
    with pytest.raises(BudgetError) as error:
        model.run_with_cache(x, budget_gb=1e-3)
    text = str(error.value)
    assert "beyond budget_gb=0.001" in text
    shown = text.partition("names_filter=")[2].removesuffix(".")
    accept = eval(shown)
    _, cache = model.run_with_cache(x, accept, budget_gb=1e-3)
    assert len(cache) > 0
    with pytest.raises(BudgetError, match="raise budget_gb"):
        model.run_with_cache(x, budget_gb=1e-9)


def test_placeholders_without_media_are_refused(model, x):
    with pytest.raises(InputError, match="hold placeholders of media, but no media"):
        model(x.ids)
    with pytest.raises(InputError, match="not dict"):
        model(dict(x.tensors))


@torch.no_grad()
def test_text_and_ids_run_like_the_bridge(model):
    ids = model.to_tokens("what is it ?")
    assert torch.equal(model(ids), model.bridge(ids))
    assert torch.equal(model("what is it ?"), model.bridge(ids))
    torch.testing.assert_close(model(ids, return_type="loss"), model.bridge(ids, return_type="loss"))


@torch.no_grad()
def test_text_after_media_runs_as_if_nothing_had_been(model, x):
    """The wrapped model keeps the last input's position offset; a later run must not inherit it."""
    ids = model.to_tokens("what is it ?")
    before = model(ids)
    model(x)
    model.generate(x, max_new_tokens=2)
    assert torch.equal(model(ids), before)


@torch.no_grad()
def test_stopping_at_a_layer_gives_its_input(model, x):
    _, cache = model.run_with_cache(x, [hook_name("resid_pre", 2)])
    assert torch.equal(model(x, stop_at_layer=2), cache[hook_name("resid_pre", 2)])


def test_tokens_there_and_back(model, x):
    assert model.to_tokens("ab").tolist() == [[64 + 1, 64 + 2]] or model.to_string(model.to_tokens("ab")[0]) == "ab"
    assert model.to_str_tokens("ab") == ["a", "b"]
    assert torch.equal(model.to_tokens(x), x.ids)
    assert model.to_str_tokens(x) == list(x.tokens)
    assert model.to_single_token("a") == model.to_tokens("a").item()
    with pytest.raises(InputError) as error:
        model.to_single_token("dog")
    assert "'dog' is no single token: 'd' 'o' 'g'." in str(error.value)


def test_unfolded_directions_are_refused_where_products_with_them_would_be_wrong(model):
    with pytest.raises(InputError, match="folded"):
        model.tokens_to_residual_directions(5)
    compatible = model.compatible()
    assert torch.equal(compatible.tokens_to_residual_directions(5), compatible.W_U[:, 5])


def test_compatible_is_a_new_model_with_the_same_log_probs(model, x):
    with torch.no_grad():
        before = model(x)
        other = model.compatible()
        torch.testing.assert_close(other(x).log_softmax(-1), before.log_softmax(-1), rtol=0, atol=1e-5)
        assert torch.equal(model(x), before)
    assert torch.equal(other.ln_final.weight, torch.ones(64))
    assert not torch.equal(model.ln_final.weight, torch.ones(64))
    assert other.encode(tiny_clip(), "What?").ids.tolist() == x.ids.tolist()


def test_a_model_that_was_handed_in_is_not_rewritten(model):
    with pytest.raises(ModelError, match=r"handed in.*model.compatible\(\)"):
        model.enable_compatibility_mode()
    assert not model.compatibility_mode
