"""A bound bridge serves each input its own media, or refuses."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_clip, tiny_model
from transformer_lens.model_bridge import TransformerBridge

from av_lens.errors import InputError
from av_lens.families.decoder import hook_name
from av_lens.inputs import Pair


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pair(model):
    """One picture with two sounds: equal ids, different media."""
    clean, corrupt = (model.encode(tiny_clip(sound_seed=seed), "What?") for seed in (0, 1))
    assert torch.equal(clean.ids, corrupt.ids)
    return Pair(clean=clean, corrupt=corrupt)


@torch.no_grad()
def test_it_is_a_bridge_with_the_same_modules_that_adds_the_media(model, pair):
    bound = model.bound(pair.clean)
    assert type(bound) is TransformerBridge
    assert bound.blocks is model.bridge.blocks
    assert bound.processor is model.processor
    wanted = model(pair.clean)
    assert torch.equal(bound(bound.ids), wanted)
    assert torch.equal(bound(pair.clean.ids), wanted)
    assert torch.equal(bound(bound.ids.clone()), wanted)
    assert torch.equal(bound(bound.ids[0]), wanted)
    with pytest.raises(InputError, match="did not come with them"):
        model.bridge(pair.clean.ids)


@torch.no_grad()
def test_repetition_along_the_batch_repeats_the_media(model, pair):
    bound, wanted = model.bound(pair.clean), model(pair.clean)
    for ids in (bound.ids.repeat(3, 1), bound.ids.expand(3, -1)):
        logits = bound(ids)
        assert logits.shape[0] == 3
        torch.testing.assert_close(logits, wanted.expand(3, -1, -1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_stack_is_served_whole_row_by_row_and_repeated(model):
    x = model.encode([tiny_clip(seed=0), tiny_clip(seed=1)], "What?")
    bound, wanted = model.bound(x), model(x)
    assert torch.equal(bound(bound.ids), wanted)
    torch.testing.assert_close(bound(bound.ids[1:]), wanted[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(bound(bound.ids[:1]), wanted[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(bound(bound.ids.repeat(2, 1)), wanted.repeat(2, 1, 1), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="belong to no input that was bound"):
        bound(bound.ids[1:].clone())


@torch.no_grad()
def test_a_pair_is_told_apart_by_identity(model, pair):
    bound = model.bound(pair)
    assert torch.equal(bound.clean_ids, bound.corrupt_ids)
    clean, corrupt = model(pair.clean), model(pair.corrupt)
    assert not torch.equal(clean, corrupt)
    assert torch.equal(bound(bound.clean_ids), clean)
    assert torch.equal(bound(bound.corrupt_ids), corrupt)
    assert torch.equal(bound(bound.corrupt_ids[:1]), corrupt)
    assert torch.equal(bound.run_with_cache(bound.clean_ids)[0], clean)
    assert torch.equal(bound.run_with_hooks(bound.corrupt_ids, fwd_hooks=[]), corrupt)


def test_copies_of_a_pairs_ids_are_refused_never_guessed(model, pair):
    bound = model.bound(pair)
    for copied in (bound.clean_ids.clone(), bound.corrupt_ids + 0, bound.clean_ids.repeat(2, 1), pair.clean.ids):
        with pytest.raises(InputError, match=r"could be either\. Pass bound\.clean_ids or bound\.corrupt_ids"):
            bound(copied)


@torch.no_grad()
def test_a_pair_with_different_questions_is_told_apart_by_its_ids(model):
    clean, corrupt = (model.encode(tiny_clip(), question) for question in ("What?", "Whom?"))
    bound = model.bound(type("Two", (), {"clean": clean, "corrupt": corrupt})())
    assert torch.equal(bound(clean.ids.clone()), model(clean))
    assert torch.equal(bound(corrupt.ids.clone()), model(corrupt))


def test_other_ids_text_and_lists_are_refused(model, pair):
    bound = model.bound(pair.clean)
    wrong = bound.ids.clone()
    wrong[0, -1] += 1
    for ids in (wrong, bound.ids[:, :-1], model.to_tokens("what")):
        with pytest.raises(InputError, match="belong to no input that was bound"):
            bound(ids)
    for other in ("what is it ?", ["what"], pair.clean):
        with pytest.raises(InputError, match=r"runs its own ids, not .*; pass bound\.ids"):
            bound(other)


@pytest.mark.parametrize("name", ["generate", "generate_stream", "hf_generate"])
def test_generation_is_refused(model, pair, name):
    with pytest.raises(InputError, match=r"call model.generate\(x"):
        getattr(model.bound(pair.clean), name)(pair.clean.ids)


def test_the_shared_weights_are_not_rewritten_through_it(model, pair):
    with pytest.raises(InputError, match=r"model.compatible\(\).bound\(x\)"):
        model.bound(pair.clean).enable_compatibility_mode()
    assert not model.compatibility_mode


@torch.no_grad()
def test_a_stream_re_enters_at_a_later_layer_with_its_own_positions(model, pair):
    bound = model.bound(pair.clean)
    logits, cache = bound.run_with_cache(bound.ids)
    again = bound(cache[hook_name("resid_pre", 2)], start_at_layer=2)
    assert torch.equal(again, logits)
    twice = bound(cache[hook_name("resid_pre", 2)].repeat(2, 1, 1), start_at_layer=2)
    torch.testing.assert_close(twice, logits.repeat(2, 1, 1), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="a stream of 5 positions fits 0 of the inputs"):
        bound(cache[hook_name("resid_pre", 2)][:, :5], start_at_layer=2)


@torch.no_grad()
def test_hooks_set_through_it_are_the_models_hooks_and_are_gone_after(model, pair):
    bound, name = model.bound(pair.clean), hook_name("z", 1)
    zeroed = bound.run_with_hooks(bound.ids, fwd_hooks=[(name, lambda value, hook: torch.zeros_like(value))])
    ours = model.run_with_hooks(pair.clean, fwd_hooks=[(name, lambda value, hook: torch.zeros_like(value))])
    assert torch.equal(zeroed, ours)
    assert not model.hook_dict[name].fwd_hooks
