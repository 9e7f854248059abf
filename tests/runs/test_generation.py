"""Generation is HuggingFace's, token for token, with and without hooks; hooks act at every decoding step."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_clip, tiny_hf_model, tiny_processor, untouched

from av_lens.errors import InputError, InterventionError
from av_lens.families.decoder import hook_name
from av_lens.interventions import Plan, Site, replace, zero
from av_lens.model import load

OPTIONS = {"eos_token_id": None}  # a random model may end at once


@pytest.fixture(scope="module")
def pair():
    hf_model = tiny_hf_model()
    reference = untouched(hf_model)
    return load(hf_model=hf_model, processor=tiny_processor()), reference


@pytest.fixture(scope="module", params=["in_video", "separate"])
def x(pair, request):
    return pair[0].encode(tiny_clip(), "What?", sound=request.param)


def greedy(reference, x, n=16):
    return reference.generate(**x.tensors, max_new_tokens=n, do_sample=False, **OPTIONS)


def test_greedy_tokens_are_huggingfaces(pair, x):
    model, reference = pair
    wanted = greedy(reference, x)
    assert wanted.shape[1] == len(x.spans) + 16
    assert len(set(wanted[0, len(x.spans) :].tolist())) > 3
    assert torch.equal(model.generate(x, max_new_tokens=16, **OPTIONS), wanted)


def test_an_identity_hook_and_an_identity_plan_change_no_token(pair, x):
    model, reference = pair
    wanted = greedy(reference, x)
    hooks = [(hook_name("resid_mid", 1), lambda value, hook: value.clone())]
    assert torch.equal(model.generate(x, max_new_tokens=16, fwd_hooks=hooks, **OPTIONS), wanted)
    name = hook_name("z", 2)
    with torch.no_grad():
        z = model.run_with_cache(x, [name])[1][name]
    same = Plan(
        [
            replace(
                Site("z", 2, positions="question|generation"), z[:, x.spans["question|generation"].positions.tolist()]
            )
        ]
    )
    out = model.generate(x, max_new_tokens=16, plan=same, return_type="result", **OPTIONS)
    assert torch.equal(out.tokens, wanted)
    assert list(out.fired.values()) == [1]


def test_hooks_fire_on_the_prompt_and_at_every_step(pair, x):
    model, _ = pair
    lengths, keys = [], []
    hooks = [
        (hook_name("resid_pre", 1), lambda value, hook: lengths.append(value.shape[1])),
        (hook_name("pattern", 1), lambda value, hook: keys.append(tuple(value.shape[2:]))),
        (hook_name("embed"), lambda value, hook: lengths.append(value.shape[1])),
    ]
    model.generate(x, max_new_tokens=4, fwd_hooks=hooks, **OPTIONS)
    n = len(x.spans)
    assert lengths == [n, n, 1, 1, 1, 1, 1, 1]
    assert keys == [(n, n), (1, n + 1), (1, n + 2), (1, n + 3)]


def test_a_plan_acts_while_decoding_as_in_a_run_over_the_whole_text(pair, x):
    """A head silenced everywhere, while decoding too: each new token is the likeliest of one hooked forward."""
    model, _ = pair
    plan = Plan([zero(Site("z", 1, head=2))])
    out = model.generate(x, max_new_tokens=5, plan=plan, return_type="result", **OPTIONS)
    assert sum(out.fired.values()) == 5

    def silence(value, hook):
        value = value.clone()
        value[:, :, 2] = 0.0
        return value

    tensors = dict(x.tensors) | {"input_ids": out.tokens, "attention_mask": torch.ones_like(out.tokens)}
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=[(hook_name("z", 1), silence)]):
        logits = model.hf_model(**tensors).logits[:, len(x.spans) - 1 : -1]
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)
    assert torch.equal(out.tokens[:, len(x.spans) :], logits.argmax(-1))
    plain = model.generate(x, max_new_tokens=5, return_type="result", **OPTIONS)
    assert (plain.logits - out.logits).abs().max() > 1e-3


def test_what_comes_back(pair, x):
    model, _ = pair
    tokens = model.generate(x, max_new_tokens=3, **OPTIONS)
    text = model.generate(x, max_new_tokens=3, return_type="text", **OPTIONS)
    assert text == model.tokenizer.decode(tokens[0, len(x.spans) :], skip_special_tokens=True)
    out = model.generate(x, max_new_tokens=3, return_type="result", **OPTIONS)
    assert torch.equal(out.tokens, tokens)
    assert out.text == (text,)
    assert out.logits.shape == (1, 3, 266)
    assert dict(out.fired) == {}
    with torch.no_grad():
        torch.testing.assert_close(out.logits[:, 0], model(x)[:, -1], rtol=0, atol=1e-5)


def test_a_batch_generates_as_its_examples_do(pair):
    model, reference = pair
    x = model.encode([tiny_clip(seed=0), tiny_clip(seed=1)], "What?")
    assert torch.equal(model.generate(x, max_new_tokens=4, **OPTIONS), greedy(reference, x, 4))
    texts = model.generate(x, max_new_tokens=4, return_type="text", **OPTIONS)
    assert len(texts) == 2


def test_sampling_draws_from_its_seed_and_leaves_the_global_generator_alone(pair, x):
    model, _ = pair
    before = torch.random.get_rng_state()
    one, two, other = (model.generate(x, max_new_tokens=12, do_sample=True, seed=seed, **OPTIONS) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_refusals(pair, x):
    model, _ = pair
    with pytest.raises(InputError, match=r"unknown return_type 'texts'. Did you mean 'text'"):
        model.generate(x, return_type="texts")
    with pytest.raises(InputError, match="pass seed=0"):
        model.generate(x, do_sample=True)
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, not 0"):
        model.generate(x, max_new_tokens=0)
    with pytest.raises(InterventionError, match="Did you mean"):
        model.generate(x, fwd_hooks=[("blocks.0.attn.hook_zz", lambda value, hook: None)])


def test_a_model_that_names_no_end_ends_at_the_tokenizers(pair):
    """A thinker taken out of a full checkpoint has no end token of its own."""
    model, reference = pair
    x = model.encode(tiny_clip(), "What?")
    end = int(greedy(reference, x, 3)[0, -1])
    settings, tokenizer = model.hf_model.generation_config, model.tokenizer
    before, word = settings.eos_token_id, tokenizer.eos_token
    settings.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    try:
        tokens = model.generate(x, max_new_tokens=8)
    finally:
        settings.eos_token_id, tokenizer.eos_token = before, word
    assert tokens.shape[1] <= len(x.spans) + 3
    assert tokens[0, -1] == end


# TransformerLens's own generation, on the bridge.

OWN = {"do_sample": False, "verbose": False, "return_type": "tokens"}


def text_tensors(model, texts):
    return dict(model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("texts", ["what is it ?", ["what is it ?", "dog"]])
def test_the_bridges_own_generation_is_huggingfaces_on_text(pair, texts, cached):
    model, reference = pair
    wanted = reference.generate(**text_tensors(model, texts), max_new_tokens=8, do_sample=False, **OPTIONS)
    out = model.bridge.generate(texts, max_new_tokens=8, stop_at_eos=False, use_past_kv_cache=cached, **OWN)
    assert torch.equal(out, wanted)


def test_the_bridges_own_generation_is_huggingfaces_on_media(pair, x):
    model, reference = pair
    wanted, n = greedy(reference, x, 8), len(x.spans)
    for given in (dict(x.tensors), {k: v for k, v in x.tensors.items() if k != "attention_mask"}):
        out = model.bridge.generate(given.pop("input_ids"), max_new_tokens=8, stop_at_eos=False, **OWN, **given)
        assert torch.equal(out, wanted)
    tensors = dict(x.tensors)
    out = model.bridge.generate(
        tensors.pop("input_ids"), max_new_tokens=8, eos_token_id=int(wanted[0, n + 2]), **OWN, **tensors
    )
    first = wanted[0, n:].tolist().index(int(wanted[0, n + 2])) + 1
    assert torch.equal(out, wanted[:, : n + first])
    text = model.bridge.generate("dog", max_new_tokens=4, stop_at_eos=False, **OWN)  # the media's shift is forgotten
    assert torch.equal(
        text, reference.generate(**text_tensors(model, "dog"), max_new_tokens=4, do_sample=False, **OPTIONS)
    )


@torch.no_grad()
def test_a_cache_is_continued_at_its_own_positions(pair, x):
    """A prompt of text in between, which nothing shifts; steps of two, without positions or a mask."""
    model, _ = pair
    longer = torch.cat([x.ids, x.ids[:, :4]], dim=1)
    tensors = dict(x.tensors) | {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    wanted = model.hf_model(**tensors).logits[:, -4:]
    cache = model.hf_model(**x.tensors, use_cache=True).past_key_values
    model.bridge(model.to_tokens("a dog"))
    steps = [
        model.hf_model(input_ids=longer[:, a : a + 2], past_key_values=cache).logits for a in (-4, -2 + len(longer[0]))
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, rtol=0, atol=1e-4)


def test_the_bridge_refuses_placeholders_without_their_media(pair, x):
    model, _ = pair
    with pytest.raises(InputError, match=r"placeholders of audio, but input_features did not come with them"):
        model.bridge(x.ids)
    heard = {name: x.tensors[name] for name in ("input_features", "feature_attention_mask")}
    with pytest.raises(InputError, match=r"placeholders of video, but pixel_values_videos did not"):
        model.bridge(x.ids, **heard)
    tensors = dict(x.tensors)  # without a cache TransformerLens hands the media to the first step alone
    with pytest.raises(InputError, match="leave use_past_kv_cache on"):
        model.bridge.generate(
            tensors.pop("input_ids"), max_new_tokens=2, stop_at_eos=False, use_past_kv_cache=False, **OWN, **tensors
        )
