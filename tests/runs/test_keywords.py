"""No keyword is dropped in silence: what a verb does not heed is refused with the near word, or in words."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from av_lens.core import run
from av_lens.core.calls import REFUSED
from av_lens.errors import AvLensError, InputError, InterventionError
from av_lens.families.decoder import hook_name

Z, RESULT = hook_name("z", 2), hook_name("result", 1)


def nothing(value, hook):
    return None


MISSPELT = {
    "stop_layer, stop_at_layer": lambda m, x: m(x, stop_layer=2),
    "retrun_type, return_type": lambda m, x: m(x, retrun_type="loss"),
    "atention_mask, attention_mask": lambda m, x: m(x.ids, atention_mask=x.attention_mask),
    "padding_sides, padding_side": lambda m, x: m("a", padding_sides="left"),
    "names_filters, names_filter": lambda m, x: m.run_with_cache(x, names_filters=Z),
    "fwd_hook, fwd_hooks": lambda m, x: m.run_with_hooks(x, fwd_hook=[(Z, nothing)]),
    "fwdhooks, fwd_hooks": lambda m, x: m.generate(x, fwdhooks=[(Z, nothing)]),
    "budget_g, budget_gb": lambda m, x: m.run_with_cache(x, budget_g=1),
    "devices, device": lambda m, x: m.run_with_cache(x, devices="cpu"),
    "position_id, position_ids": lambda m, x: m.run_with_hooks(x, position_id=None),
    "reset_hook_end, reset_hooks_end": lambda m, x: m.run_with_hooks(x, reset_hook_end=False),
    "clear_context, clear_contexts": lambda m, x: m.hooks(clear_context=True).__enter__(),
    "max_new_token, max_new_tokens": lambda m, x: m.generate(x, max_new_token=3),
    "temprature, temperature": lambda m, x: m.generate(x, temprature=0.5),
    "prefx, prefix": lambda m, x: m.encode(None, "a", prefx="b"),
    "budget, budget_gb": lambda m, x: m.trace(x, budget=1),
    "fold_lns, fold_ln": lambda m, x: m.enable_compatibility_mode(fold_lns=True),
    "prepend_boss, prepend_bos": lambda m, x: m.to_tokens("a", prepend_boss=False),
    "prepend_bo, prepend_bos": lambda m, x: m.to_str_tokens("a", prepend_bo=False),
    "stop_layers, stop_at_layer": lambda m, x: m.bound(x)(m.bound(x).ids, stop_layers=2),
}


@pytest.mark.parametrize("words", MISSPELT)
def test_a_misspelt_keyword_is_refused_with_the_near_word(model, x, words):
    wrong, near = words.split(", ")
    with pytest.raises(InputError, match=rf"unknown keyword of .* '{wrong}'\. Did you mean '{near}'"):
        MISSPELT[words](model, x)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.bound(x).run_with_cache(m.bound(x).ids, name_filter=Z),
        lambda m, x: m.trace(x).generate([], temperatur=0.5),
        lambda m, x: m.generate(x, stop_at_eos=False),
    ],
)
def test_others_are_refused_too(model, x, call):
    with pytest.raises(InputError, match=r"keyword of|takes no"):
        call(model, x)


def test_every_keyword_of_the_bridges_forward_works_or_is_refused_in_words(model):
    """The list is TransformerLens's own; a keyword that it gains fails here until it is known to work."""
    ids = model.to_tokens("what is it?")
    ones = torch.ones_like(ids)
    heeded = {
        "return_type": "loss",
        "loss_per_token": True,
        "prepend_bos": False,
        "padding_side": "right",
        "attention_mask": ones,
        "labels": ids,
        "stop_at_layer": 2,
    }
    for name in set(inspect.signature(TransformerBridge.forward).parameters) - {"self", "input", "kwargs"}:
        if name in heeded:
            given = ["what is it?", "a"] if name in ("prepend_bos", "padding_side") else ids
            options = {name: heeded[name]} | ({"return_type": "loss"} if name in ("labels", "loss_per_token") else {})
            model(given, **options)
        else:
            with pytest.raises(InputError, match=f"takes no {name}=: {REFUSED[name][:20]}"):
                model(ids, **{name: None})


@torch.no_grad()
def test_keywords_that_transformer_lens_knows_do_what_they_say(model, x):
    _, cache = model.run_with_cache(x, [Z])
    logits, small = model.run_with_cache(x, [Z], remove_batch_dim=True, device="cpu", pos_slice=-1)
    assert torch.equal(small[Z], cache[Z][0, -1:])
    assert logits.ndim == 3
    plain = model.run_with_cache(x, [Z], return_cache_object=False)[1]
    assert type(plain) is dict
    stream, _ = model.run_with_cache(x, [hook_name("z", 1)], stop_at_layer=2)
    assert torch.equal(stream, model(x, stop_at_layer=2))
    assert torch.equal(stream, model(x, stop_at_layer=-2))
    shapes = []
    model.run_with_hooks(x, fwd_hooks=[(Z, lambda v, hook: shapes.append(v.shape))], remove_batch_dim=True)
    assert shapes == [cache[Z].shape[1:]]

    def halved(value, hook):
        return value * 0.5

    both = model.run_with_hooks(x, fwd_hooks=[(Z, halved)], remove_batch_dim=True)
    assert torch.equal(both, model.run_with_hooks(x, fwd_hooks=[(Z, halved)]))
    model.run_with_hooks(x, fwd_hooks=[(Z, halved)], reset_hooks_end=False)
    assert torch.equal(model(x), both)
    model.reset_hooks()
    assert not torch.equal(model(x), both)


def test_gradients_are_cached_where_they_are_asked_for(model, x):
    loss, cache = model.run_with_cache(x, [Z], incl_bwd=True, return_type="loss")
    assert loss.ndim == 0
    assert cache[f"{Z}_grad"].abs().max() > 0


def test_a_stop_that_would_not_stop_is_refused(model, x):
    with pytest.raises(InputError, match=r"stop_at_layer=4: the layers are 0 to 3"):
        model(x, stop_at_layer=4)
    with pytest.raises(InputError, match="gives the stream, so return_type='loss' is not there"):
        model(x, stop_at_layer=2, return_type="loss")
    with pytest.raises(InputError, match=r"unknown return_type 'logit'\. Did you mean 'logits'"):
        model.run_with_cache(x, return_type="logit")


def test_media_by_keyword_are_refused(model, x):
    with pytest.raises(InputError, match=r"takes no input_features=: media go in by model\.encode"):
        model(x.ids, input_features=x["input_features"])
    with pytest.raises(InputError, match=r"attention_mask= has nothing to act on here: AVInputs hold their tokens"):
        model(x, attention_mask=x.attention_mask)
    with pytest.raises(InputError, match="takes no past_kv_cache=: keys and values are kept"):
        model(x, past_kv_cache=None)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5}, {"top_k": 5}, {"num_beams": 1, "early_stopping": True}],
)
def test_what_greedy_decoding_would_leave_out_is_refused(model, x, options):
    with pytest.raises(InputError, match=r"(?s)do not go together: .*early_stopping|do not go together: .*do_sample"):
        model.generate(x, **options)


NONE = (lambda name: name.endswith("hook_zz"), [])


@pytest.mark.parametrize("filtered", NONE, ids=["function", "list"])
@pytest.mark.parametrize("verb", ["cache", "hooks", "context", "bwd", "generate", "add_hook", "capture"])
def test_a_filter_that_selects_nothing_is_refused(model, x, verb, filtered):
    if filtered == [] and verb not in ("cache", "capture"):
        filtered = lambda name: False  # noqa: E731
    calls = {
        "cache": lambda: model.run_with_cache(x, filtered),
        "hooks": lambda: model.run_with_hooks(x, fwd_hooks=[(filtered, nothing)]),
        "context": lambda: model.hooks(fwd_hooks=[(filtered, nothing)]).__enter__(),
        "bwd": lambda: model.hooks(bwd_hooks=[(filtered, nothing)]).__enter__(),
        "generate": lambda: model.generate(x, fwd_hooks=[(filtered, nothing)]),
        "add_hook": lambda: model.add_hook(filtered, nothing),
        "capture": lambda: run(model, x, capture=filtered),
    }
    with pytest.raises(InterventionError, match=r"selects none of the model's \d+ hooks.*such as .*hook"):
        calls[verb]()


def test_a_hook_that_never_fires_is_told(model, x):
    with pytest.raises(InterventionError, match=r"the hook at 'audio_encoder\.hook_out' never fired"):
        model.run_with_hooks("what?", fwd_hooks=[("audio_encoder.hook_out", nothing)])
    with pytest.raises(InterventionError, match=r"those that a function selects never fired"):
        model.run_with_hooks("what?", fwd_hooks=[(lambda name: name.startswith("audio_encoder"), nothing)])
    with pytest.raises(InterventionError, match=rf"the hook at '{Z}' never fired.*stop_at_layer"):
        model.run_with_hooks(x, fwd_hooks=[(Z, nothing)], stop_at_layer=1)
    with pytest.raises(InterventionError, match="never passed through audio_encoder"):
        model.run_with_cache("what?", ["audio_encoder.hook_out"])
    with pytest.raises(InterventionError, match=r"never passed through blocks\.2"):
        model.run_with_cache(x, [Z, hook_name("z", 0)], stop_at_layer=1)
    with pytest.raises(InterventionError, match=r"'audio_encoder\.hook_out' never fired"):
        model.generate("what?", fwd_hooks=[("audio_encoder.hook_out", nothing)], max_new_tokens=1)


def test_hooks_that_could_not_act_are_refused(model, x):
    with pytest.raises(InterventionError, match="before a backward pass can reach bwd_hooks"):
        model.run_with_hooks(x, bwd_hooks=[(Z, nothing)])
    with pytest.raises(InterventionError, match=r"pairs, not 'blocks"):
        inspect.unwrap(type(model).run_with_hooks)(model, x, fwd_hooks=(Z, nothing))
    with pytest.raises(InterventionError, match=r"call model\.set_use_attn_result\(True\) first"):
        model.run_with_hooks(x, fwd_hooks=[(RESULT, nothing)], reset_hooks_end=False)
    with pytest.raises(InterventionError, match=r"fires only while use_attn_result is on"):
        model.add_hook(RESULT, nothing)
    with pytest.raises(InterventionError, match=r"unknown hook 'blocks\.1\.attn\.hook_zed'\. Did you mean"):
        model.add_hook("blocks.1.attn.hook_zed", nothing)
    with pytest.raises(InputError, match=r"unknown dir 'backward'"):
        model.add_hook(Z, nothing, dir="backward")
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_points())


def test_what_a_cache_does_not_hold_it_names_with_what_to_write(model, x):
    with torch.no_grad():
        _, cache = model.run_with_cache(x, [Z])
        assert torch.equal(cache["z", 2], cache[Z])
        assert torch.equal(cache["z", -2], cache[Z])
        assert isinstance(cache, ActivationCache)
        with pytest.raises(KeyError, match=r"hook_z was not kept\. Run again with model\.run_with_cache"):
            cache["z", 1]
        with pytest.raises(AvLensError, match=r"1\.attn\.hook_result was not kept: it fires only in a run that"):
            model.run_with_cache(x)[1]["result", 1]
        assert model.run_with_cache(x, [RESULT])[1]["result", 1].shape == (1, len(x.spans), 4, 64)
        with pytest.raises(AvLensError, match=r"unknown activation 'blocks\.2\.attn\.hook_zed'|unknown activation"):
            cache["zed", 2]
        assert len(repr(model.run_with_cache(x)[1])) < 400
        assert len(repr(run(model, x, capture=["z"]).cache)) < 400
