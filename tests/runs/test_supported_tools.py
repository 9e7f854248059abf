"""TransformerLens's own tools, unchanged: on bridge, wrapper and bound bridge equal, or refused alike.

On text all three can run. On audio-visual input only a bound bridge has the media: there the tools are compared with
runs made by hand.
"""

from __future__ import annotations

import einops
import pytest
import torch
import transformer_lens
from tiny import tiny_clip, tiny_hf_model, tiny_model, tiny_processor
from transformer_lens import patching
from transformer_lens.benchmarks import main_benchmark
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.tools.analysis import attribution_patch, direct_logit_attribution, logit_lens

from av_lens.checkpoints import shipped
from av_lens.errors import InputError
from av_lens.families.decoder import hook_name
from av_lens.families.qwen2_5_omni import FAMILY, Qwen2_5OmniThinkerAdapter
from av_lens.inputs import Pair
from av_lens.model import load

RIGHT, WRONG = 5, 7
SUPPORTED_TOOLS: tuple[str, ...] = (
    "patching.generic_activation_patch",
    "patching.get_act_patch_resid_pre",
    "patching.get_act_patch_resid_mid",
    "patching.get_act_patch_attn_out",
    "patching.get_act_patch_mlp_out",
    "patching.get_act_patch_attn_head_out_by_pos",
    "patching.get_act_patch_attn_head_q_by_pos",
    "patching.get_act_patch_attn_head_k_by_pos",
    "patching.get_act_patch_attn_head_v_by_pos",
    "patching.get_act_patch_attn_head_pattern_by_pos",
    "patching.get_act_patch_attn_head_out_all_pos",
    "patching.get_act_patch_attn_head_pattern_all_pos",
    "patching.get_act_patch_block_every",
    "patching.get_act_patch_direct_path",
    "tools.analysis.direct_logit_attribution",
    "tools.analysis.logit_lens",
    "tools.analysis.attribution_patch",
    "ActivationCache.decompose_resid",
    "ActivationCache.accumulated_resid",
    "ActivationCache.stack_head_results",
    "ActivationCache.logit_attrs",
)
"""TransformerLens's tools that run unchanged through `HookedAVLLM.bound`."""

SWEEPS = [
    name.partition(".")[2]
    for name in SUPPORTED_TOOLS
    if name.startswith("patching.get_act_patch_") and "direct" not in name
]


def difference(logits):
    return logits[0, -1, RIGHT] - logits[0, -1, WRONG]


@pytest.fixture(scope="module")
def model():
    return tiny_model(n_layers=2)


@pytest.fixture(scope="module")
def compatible(model):
    return model.compatible()


@pytest.fixture(scope="module")
def short(model):
    """Two short texts of one length."""
    return [model.to_tokens(text) for text in ("a cat", "a dog")]


@pytest.fixture(scope="module")
def pair(model):
    return Pair(
        *(),
        **{side: model.encode(tiny_clip(sound_seed=seed), "What?") for side, seed in (("clean", 0), ("corrupt", 1))},
    )


class Text:
    """Ids of text as an input."""

    def __init__(self, ids):
        self.tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def subjects(model, ids):
    """Bridge, wrapper, bound bridge, each with the ids that it takes."""
    bound = model.bound(Text(ids))
    return {"bridge": (model.bridge, ids), "wrapper": (model, ids), "bound": (bound, bound.ids)}


def outcome(call):
    try:
        return call()
    except Exception as error:
        return error


def assert_alike(outcomes):
    first = outcomes["bridge"]
    for who, found in outcomes.items():
        if isinstance(first, Exception):
            assert isinstance(found, Exception), f"{who} gave a number where the bridge refuses: {first}"
            assert isinstance(found, ValueError) == isinstance(first, ValueError)
        else:
            assert not isinstance(found, Exception), f"{who} refused: {found}"
            torch.testing.assert_close(found, first, rtol=0, atol=1e-5)


def test_the_list_names_real_tools():
    for name in SUPPORTED_TOOLS:
        place = transformer_lens
        for part in name.split("."):
            if part == "tools":
                from transformer_lens import tools as place
            else:
                place = getattr(place, part)
        assert callable(place), name


@pytest.mark.parametrize("name", SWEEPS)
@torch.no_grad()
def test_patching_sweeps_agree_on_text(model, short, name):
    tool = getattr(patching, name)
    clean, corrupt = short
    found = {}
    for who, (subject, ids) in subjects(model, corrupt).items():
        cache = model.bridge.run_with_cache(clean)[1]
        found[who] = outcome(lambda subject=subject, ids=ids, cache=cache: tool(subject, ids, cache, difference))
    assert_alike(found)
    assert not isinstance(found["bridge"], Exception)
    assert found["bridge"].std() > 0


@pytest.mark.parametrize("unit", ["component", "layer", "head"])
@torch.no_grad()
def test_direct_logit_attribution_agrees_or_is_refused(model, compatible, short, unit):
    def attribute(subject, ids):
        return direct_logit_attribution(subject, ids, RIGHT, WRONG, unit=unit).attribution

    for who in (model, compatible):
        found = {k: outcome(lambda s=s, ids=ids: attribute(s, ids)) for k, (s, ids) in subjects(who, short[0]).items()}
        assert isinstance(found["bridge"], ValueError) == (who is model)
        assert_alike(found)


@torch.no_grad()
def test_logit_lens_agrees(model, compatible, short):
    for who in (model, compatible):
        found = {
            k: outcome(lambda s=s, ids=ids: logit_lens(s, ids).values)
            for k, (s, ids) in subjects(who, short[0]).items()
        }
        assert_alike(found)
        assert not isinstance(found["bridge"], Exception)


def test_attribution_patching_agrees(model, short):
    clean, corrupt = short
    two = model.bound(type("Two", (), {"clean": Text(clean), "corrupt": Text(corrupt)})())
    found = {
        "bridge": scores(model.bridge, clean, corrupt),
        "wrapper": scores(model, clean, corrupt),
        "bound": scores(two, two.clean_ids, two.corrupt_ids),
    }
    assert_alike(found)


def scores(subject, clean, corrupt):
    result = attribution_patch(subject, clean, corrupt, difference)
    return torch.tensor(
        [float(value) for _, value in sorted(result.node_scores.items(), key=lambda item: str(item[0]))]
    )


@torch.no_grad()
def test_caches_take_the_stream_apart_alike(model, compatible, short):
    for who in (model, compatible):
        found = {method: {} for method in ("decompose_resid", "accumulated_resid", "stack_head_results", "logit_attrs")}
        for k, (subject, ids) in subjects(who, short[0]).items():
            cache = subject.run_with_cache(ids)[1]
            found["decompose_resid"][k] = cache.decompose_resid(apply_ln=True)
            found["accumulated_resid"][k] = cache.accumulated_resid(apply_ln=True, incl_mid=True)
            found["stack_head_results"][k] = cache.stack_head_results(incl_remainder=True)
            stack = cache.decompose_resid(pos_slice=-1)
            found["logit_attrs"][k] = outcome(
                lambda cache=cache, stack=stack: cache.logit_attrs(stack, RIGHT, pos_slice=-1, incorrect_tokens=WRONG)
            )
        if who is model:  # unfolded, the bridge's number is wrong; the wrapper refuses it
            assert isinstance(found["logit_attrs"].pop("wrapper"), InputError)
        for outcomes in found.values():
            assert_alike(outcomes)


# Audio-visual input: the bound bridge against runs by hand.


@torch.no_grad()
def test_head_patches_by_position_are_the_runs_made_by_hand(model, pair):
    bound = model.bound(pair)
    _, clean = bound.run_with_cache(bound.clean_ids)
    grid = patching.get_act_patch_attn_head_out_by_pos(bound, bound.corrupt_ids, clean, difference)
    n = len(pair.clean.spans)
    assert grid.shape == (2, n, 4)
    generator = torch.Generator().manual_seed(0)
    heard = pair.clean.spans["audio"].positions
    for layer, head in ((0, 1), (1, 3)):
        for pos in (n - 1, int(heard[0]), int(torch.randint(0, n, (), generator=generator))):
            donor = model.run_with_cache(pair.clean, [hook_name("z", layer)])[1][hook_name("z", layer)]

            def put(value, hook, pos=pos, head=head, donor=donor):
                value = value.clone()
                value[:, pos, head] = donor[:, pos, head]
                return value

            byhand = difference(model.run_with_hooks(pair.corrupt, fwd_hooks=[(hook_name("z", layer), put)]))
            torch.testing.assert_close(grid[layer, pos, head], byhand, rtol=0, atol=1e-5)
    base = difference(model(pair.corrupt))
    assert (grid - base).abs().max() > 1e-3
    same = patching.get_act_patch_attn_head_out_all_pos(
        bound, bound.corrupt_ids, bound.run_with_cache(bound.corrupt_ids)[1], difference
    )
    torch.testing.assert_close(same, base.expand_as(same), rtol=0, atol=1e-6)


@torch.no_grad()
def test_direct_attribution_sums_to_the_logit_difference_of_heard_and_seen_input(compatible, pair):
    bound = compatible.bound(pair.clean)
    logits = bound(bound.ids)
    unembedded = difference(logits) - (compatible.b_U[RIGHT] - compatible.b_U[WRONG])
    for unit in ("component", "head"):
        shares = direct_logit_attribution(bound, bound.ids, RIGHT, WRONG, unit=unit).attribution
        torch.testing.assert_close(shares.sum(), unembedded, rtol=0, atol=1e-4)
    other = direct_logit_attribution(compatible.bound(pair.corrupt), pair.corrupt.ids, RIGHT, WRONG).attribution
    assert not torch.allclose(other, direct_logit_attribution(bound, bound.ids, RIGHT, WRONG).attribution)


@torch.no_grad()
def test_the_logit_lens_ends_in_the_models_own_logits(model, pair):
    bound = model.bound(pair.clean)
    lens = logit_lens(bound, bound.ids, positions=None)
    torch.testing.assert_close(lens.values[-1], model(pair.clean), rtol=0, atol=1e-4)
    stream = model.run_with_cache(pair.clean, [hook_name("resid_post", 0)])[1][hook_name("resid_post", 0)]
    norm = model.ln_final.weight * stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(lens.values[1], norm @ model.W_U, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_decomposition_of_a_bound_run_closes_with_its_media(model, pair):
    bound = model.bound(pair.clean)
    cache = bound.run_with_cache(bound.ids)[1]
    stack = cache.decompose_resid(mode="full")
    torch.testing.assert_close(stack.sum(0), cache[hook_name("resid_post", 1)], rtol=0, atol=1e-4)
    heads = cache.stack_head_results(incl_remainder=True)
    total = einops.reduce(heads, "head batch pos d_model -> batch pos d_model", "sum")
    torch.testing.assert_close(total, cache[hook_name("resid_post", 1)], rtol=0, atol=1e-4)


def test_attribution_patching_sees_both_media(model, pair):
    bound = model.bound(pair)
    found = scores(bound, bound.clean_ids, bound.corrupt_ids)
    assert found.abs().max() > 0
    none = scores(bound, bound.clean_ids, bound.clean_ids)
    assert none.abs().max() == 0


@torch.no_grad()
def test_direct_paths_are_patched_between_both_media(model, pair):
    bound = model.bound(pair)
    caches = [bound.run_with_cache(ids)[1] for ids in (bound.clean_ids, bound.corrupt_ids)]
    grid = patching.get_act_patch_direct_path(bound, bound.corrupt_ids, *caches, difference, 0, 1, verbose=False)
    base = difference(model(pair.corrupt))
    assert (grid[1] - base).abs().max() > 1e-5
    assert not model.cfg.use_split_qkv_input


def test_tools_on_the_wrapper_are_refused_for_ids_that_stand_for_media(model, compatible, pair):
    for who in (model, compatible):
        with pytest.raises(InputError, match="no media"):
            direct_logit_attribution(who, pair.clean.ids, RIGHT)
        with pytest.raises(InputError, match="no media"):
            logit_lens(who, pair.clean.ids)


# TransformerLens opens the model itself.


@torch.no_grad()
def test_the_entry_point_lets_transformer_lens_build_the_bridge(model, monkeypatch):
    """Nothing is registered by hand: the installed package's entry point is all that TransformerLens is told."""
    monkeypatch.setattr(ArchitectureAdapterFactory, "_adapters", dict(SUPPORTED_ARCHITECTURES))
    monkeypatch.setattr(ArchitectureAdapterFactory, "_entry_points_discovered", False)
    thinker = tiny_hf_model(n_layers=2)
    bridge = build_bridge_from_module(
        thinker, FAMILY.architecture, hf_config=thinker.config, tokenizer=tiny_processor().tokenizer
    )
    assert type(bridge.adapter) is Qwen2_5OmniThinkerAdapter
    assert torch.equal(bridge("a cat"), model("a cat"))


def test_transformer_lens_cannot_open_the_folder_itself():
    """Should this ever work, docs/hooks.md has to say so."""
    with pytest.raises(ValueError, match="Could not determine supported architecture"):
        TransformerBridge.boot_transformers(str(shipped() / "av-tiny"))


@pytest.mark.slow
def test_transformer_lens_own_suite_passes_whole(monkeypatch, capsys):
    """Every one of its benchmarks for a multimodal decoder; what it would load by name is `load`'s bridge."""
    folder = str(shipped() / "av-tiny")
    monkeypatch.setattr(TransformerBridge, "boot_transformers", lambda name, **options: load(name).bridge)
    monkeypatch.setattr(main_benchmark, "get_auto_model_class", lambda name, **options: FAMILY.model_class)
    results = main_benchmark.run_benchmark_suite(folder, phases=[1, 2, 3, 7, 8], verbose=False)
    failed = {f"{one.phase} {one.name}": one.message for one in results if not one.passed}
    assert failed == {}
    assert len(results) == 41
    assert not [one.name for one in results if one.severity.name in ("SKIPPED", "DANGER", "ERROR")]
    assert {one.phase for one in results} == {1, 2, 3, 7, 8}
