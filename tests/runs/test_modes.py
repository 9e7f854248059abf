"""What torch's users try first works, or says what to write."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from tiny import letter, tiny_clip, tiny_hf_model, tiny_processor

import av_lens as avl
from av_lens.errors import AvLensError, InputError, ModelError
from av_lens.model import check_model, load


def unchecked(function):
    """As a user's Python runs it: without the tests' own checks of types."""
    return inspect.unwrap(function)


def test_modes_and_gradients_return_the_model(model):
    assert model.train() is model
    assert model.training
    assert model.hf_model.training
    with pytest.raises(ModelError, match=r"call model\.eval\(\) before tracing"):
        model.trace(model.encode(tiny_clip(), "What?"))
    assert model.eval() is model
    assert not any(module.training for module in model.hf_model.modules())
    assert model.requires_grad_(False) is model
    assert not any(weight.requires_grad for weight in model.parameters())
    model.requires_grad_(True)
    model("what?", return_type="loss").backward()
    assert any(weight.grad is not None for weight in model.parameters())
    model.zero_grad()
    assert all(weight.grad is None for weight in model.parameters())


def test_modules_and_hook_points_are_the_bridges(model):
    assert len(list(model.modules())) == len(dict(model.named_modules())) > 50
    assert "blocks" in dict(model.named_children())
    assert {point.name for point in model.hook_points()} <= set(model.hook_dict)


@torch.no_grad()
def test_another_precision_is_the_one_that_a_checkpoint_is_loaded_in(tmp_path):
    tiny_hf_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    wanted, model = load(tmp_path, dtype=torch.bfloat16), load(tmp_path)
    x = model.encode(tiny_clip(), "What?")
    model.trace(x)
    assert model.bfloat16() is model
    assert model.dtype == model.cfg.dtype == torch.bfloat16
    assert torch.equal(model(x), wanted(x))
    assert torch.equal(model.trace(x).logits(), wanted.trace(x).logits())
    assert torch.equal(model.float()(x), wanted.to(torch.float32)(x))
    assert model.to("cpu", torch.float64).dtype == torch.float64
    assert model.to(device="cpu", dtype=torch.float16).cpu().dtype == torch.float16


def test_what_cannot_be_changed_is_refused(model):
    with pytest.raises(ModelError, match=r"handed in, and another precision rewrites.*Pass dtype= to avl\.load"):
        model.half()
    with pytest.raises(InputError, match=r"torch\.int64 is no precision"):
        model.to(torch.int64)
    with pytest.raises(InputError, match="this model cannot be moved to 'nowhere'"):
        model.to("nowhere")
    with pytest.raises(ModelError, match=r"first model\.to\(\.\.\.\), then model\.compatible\(\)"):
        model.compatible().half()


def test_a_model_that_is_handed_in_is_cast_as_a_checkpoint_is_loaded():
    model = load(hf_model=tiny_hf_model(), processor=tiny_processor(), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.hf_model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32


def test_inputs_answer_as_huggingfaces_do(model, x):
    assert torch.equal(x.input_ids, x.tensors["input_ids"])
    assert torch.equal(x["input_ids"], x.ids)
    assert bool(x.attention_mask.all())
    assert "attention_mask" in x
    assert "labels" not in x
    assert list(x.keys()) == list(x.tensors)
    assert dict(x).keys() == x.tensors.keys()
    with torch.no_grad():
        assert torch.equal(model.hf_model(**x).logits, model(x))
    with pytest.raises(InputError, match=r"unknown tensor 'input_id'\. Did you mean 'input_ids'"):
        x["input_id"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), "torch"])
def test_inputs_copy_and_pickle(model, x, copied, tmp_path):
    if copied == "torch":
        torch.save(x, tmp_path / "x.pt")
        y = torch.load(tmp_path / "x.pt", weights_only=False)
    else:
        y = copied(x)
    assert y.spans.roles == x.spans.roles
    assert y.questions == x.questions
    with pytest.raises(TypeError):
        y.tensors["input_ids"] = None
    with torch.no_grad():
        assert torch.equal(model(y), model(x))
    two = copied(avl.AVInputs.stack([x, x])) if callable(copied) else y
    assert torch.equal(two[0].ids, x.ids)


def test_pairs_copy_and_pickle(x):
    pair = pickle.loads(pickle.dumps(copy.deepcopy(avl.Pair(clean=x, corrupt=x))))
    assert torch.equal(pair.clean.ids, x.ids)


def test_a_path_is_a_clip(model, tmp_path):
    path = tiny_clip().save(tmp_path / "dog.mp4")
    wanted = model.encode(avl.load_clip(path), "What?")
    for given in (path, str(path)):
        assert torch.equal(model.encode(given, "What?")["pixel_values_videos"], wanted["pixel_values_videos"])
    assert len(model.encode([path, path], "What?")) == 2
    with pytest.raises(AvLensError, match=r"nowhere\.mp4"):
        model.encode("nowhere.mp4", "What?")
    encode = unchecked(type(model.encoder).encode)
    with pytest.raises(InputError, match="takes a Clip, the path of a file, or None for text alone, not ndarray"):
        encode(model.encoder, tiny_clip().frames, "What?")
    with pytest.raises(InputError, match="asks a text, or a list of them, not Clip"):
        encode(model.encoder, None, tiny_clip())


def test_methods_say_what_they_compare(model, x):
    M = avl.logit_diff("a", "b")
    for verb in (avl.patch, avl.path_patch, avl.attribution_patch, avl.edge_attribution):
        with pytest.raises(InputError, match=rf"{verb.__name__} compares two aligned inputs, and got AVInputs: pass"):
            unchecked(verb)(model, x, metric=M)
        with pytest.raises(InputError, match=r"metric= says what is measured: avl\.logit_diff"):
            unchecked(verb)(model, avl.Pair(clean=x, corrupt=x))
    with pytest.raises(InputError, match="patch compares two aligned inputs, and got nothing"):
        avl.patch(model, [], metric=M)
    with pytest.raises(InputError, match=r"patch compares two aligned inputs, and got AVInputs: pass\s+avl\.Pair"):
        unchecked(avl.patch)(model, x)
    with pytest.raises(InputError, match="mean_difference compares two aligned inputs, and got str"):
        unchecked(avl.methods.mean_difference)(model, "x", layer=1)
    with pytest.raises(InputError, match=r"pass inputs .*not Clip"):
        avl.logit_lens(model, tiny_clip())


def test_reprs_fit_a_screen(model, x):
    z = avl.Site("z", 1, positions="suffix")
    plan = avl.Plan([avl.zero(avl.Site("z", layer, head)) for layer in range(4) for head in range(4)])
    trace, clip, metric = model.trace(x), tiny_clip(), avl.metrics.logit(letter("a"))
    conflict = avl.Conflict(sound=clip, picture=clip, question="What?", answers=("a", "b"))
    nouns = [
        x, x.spans, x.spans.audio, x.clips[0], avl.Pair(clean=x, corrupt=x), conflict, conflict.cells(model), model,
        plan, plan.edits[0], avl.Plan(avl.replace(z, torch.zeros(1, 12, 4, 16))), plan.compile(model.spec, x.spans),
        trace, trace.schedule([plan] * 9), trace.gradients(z, metric), avl.sweep(trace, [plan], metric),
        avl.run(model, x, capture=["z", "pattern"]), model.generate(x, max_new_tokens=3, return_type="result"),
        avl.logit_diff("a", "b"), avl.metrics.kl(torch.zeros(1, 300)), avl.logit_diff(letter("a"), letter("b")).bind(),
        check_model(model, full=False), avl.methods.Judge(server="http://localhost:1", model="m", cache="c"),
    ]  # fmt: skip
    for noun in nouns:
        lines = sum(1 + len(line) // 120 for line in repr(noun).splitlines())
        assert lines <= 10, f"{type(noun).__name__}: {repr(noun)[:200]}"
    assert repr(plan).endswith("... 16 in all))")
    assert "float32 [1, 12, 4, 16]" in repr(nouns[10])
