"""A list of prompts gives what each prompt gives alone, whichever side it is padded on, under every verb."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_hf_model, tiny_processor, untouched

from av_lens.core import run
from av_lens.errors import InputError
from av_lens.families.decoder import hook_name
from av_lens.interventions import Plan
from av_lens.model import load

WORDS = ("what", "do you", "hear", "a dog", "the siren?", "!", "is it", "loud")
NEW = 3
OPTIONS = {"max_new_tokens": NEW, "eos_token_id": None}  # a random model may end at once


@pytest.fixture(scope="module")
def pair():
    hf_model = tiny_hf_model(n_layers=2)
    reference = untouched(hf_model)
    return load(hf_model=hf_model, processor=tiny_processor()), reference


@pytest.fixture
def model(pair):
    return pair[0]


def drawn(seed: int, most: int = 4) -> list[str]:
    """Two to four prompts of up to forty tokens; one of a single token in every other list."""
    rng = np.random.default_rng(seed)
    prompts = [" ".join(rng.choice(WORDS, rng.integers(1, 8))) for _ in range(rng.integers(2, most + 1))]
    return [*prompts, "?"] if seed % 2 else prompts


def halve(value, hook):
    value = value.clone()
    value[..., 1, :] *= 0.5
    return value


NAMES = Z, PATTERN = hook_name("z", 1), hook_name("pattern", 0)
EDIT = [(hook_name("z", 0), halve)]
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def agree(model, reference, prompts: list[str]) -> None:
    """Every verb on the list, padded on each side: as each prompt alone, and as HuggingFace with its own padding."""
    alone = [model.run_with_cache(prompt, list(NAMES)) for prompt in prompts]
    hooked = [model.run_with_hooks(prompt, fwd_hooks=EDIT) for prompt in prompts]
    losses = [float(model(prompt, return_type="loss")) for prompt in prompts]
    said = [model.generate(prompt, return_type="result", **OPTIONS) for prompt in prompts]
    edited = [model.generate(prompt, fwd_hooks=EDIT, **OPTIONS)[0, -NEW:].tolist() for prompt in prompts]
    for side in ("left", "right"):
        padded = model.tokenizer(prompts, padding=True, padding_side=side, return_tensors="pt")
        ids, mask = padded["input_ids"], padded["attention_mask"]
        rows = [row.bool() for row in mask]
        wanted = reference(**padded).logits
        logits, loss = model(prompts, return_type="both", padding_side=side)
        _, cache = model.run_with_cache(prompts, list(NAMES), padding_side=side)
        both = model.run_with_hooks(prompts, fwd_hooks=EDIT, padding_side=side)
        assert torch.equal(model.to_tokens(prompts, padding_side=side), ids)
        assert torch.equal(model(ids, attention_mask=mask), logits)
        assert torch.equal(model(ids), logits)  # the pads are seen
        for number, row in enumerate(rows):
            torch.testing.assert_close(logits[number, row], alone[number][0][0], **NEAR)
            torch.testing.assert_close(logits[number, row], wanted[number, row], **NEAR)
            torch.testing.assert_close(cache[Z][number, row], alone[number][1][Z][0], **NEAR)
            torch.testing.assert_close(cache[PATTERN][number][:, row][:, :, row], alone[number][1][PATTERN][0], **NEAR)
            torch.testing.assert_close(both[number, row], hooked[number][0], **NEAR)
        counts = [int(row.sum()) - 1 for row in rows]  # a prompt weighs as many tokens as it foretells
        total = sum(one * count for one, count in zip(losses, counts, strict=True) if count)
        torch.testing.assert_close(float(loss), total / sum(counts), **NEAR)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # a pad foretells nothing
        torch.testing.assert_close(loss, reference(**padded, labels=labels).loss, **NEAR)
        out = model.generate(prompts, padding_side=side, return_type="result", **OPTIONS)
        assert out.tokens[:, -NEW:].tolist() == [one.tokens[0, -NEW:].tolist() for one in said]
        torch.testing.assert_close(out.logits, torch.cat([one.logits for one in said]), **NEAR)
        assert torch.equal(out.tokens, model.generate(ids, attention_mask=mask, **OPTIONS))
        tokens = model.generate(prompts, fwd_hooks=EDIT, padding_side=side, **OPTIONS)
        assert tokens[:, -NEW:].tolist() == edited


def test_a_list_is_its_prompts(pair):
    agree(*pair, drawn(1, most=2))


@pytest.mark.slow
def test_two_hundred_lists_are_their_prompts(pair):
    for seed in range(200):
        agree(*pair, drawn(seed))


@torch.no_grad()
def test_the_last_position_is_every_prompts_last_unless_the_tokenizer_pads_right(model):
    prompts = ["hear", "what do you hear?"]
    alone = torch.cat([model(prompt)[:, -1] for prompt in prompts])
    torch.testing.assert_close(model(prompts)[:, -1], alone, rtol=1e-5, atol=1e-5)
    model.tokenizer.padding_side = "right"
    try:
        logits = model(prompts)
        torch.testing.assert_close(logits[0, 3], alone[0], rtol=1e-5, atol=1e-5)
        assert (logits[0, -1] - alone[0]).abs().max() > 1e-2
    finally:
        model.tokenizer.padding_side = "left"


@torch.no_grad()
def test_a_mask_that_is_given_is_what_is_read(model):
    ids = model.to_tokens("what do you hear?")
    mask = torch.ones_like(ids)
    assert torch.equal(model(ids, attention_mask=mask), model(ids))
    mask[:, :5] = 0
    torch.testing.assert_close(model(ids, attention_mask=mask)[:, 5:], model("do you hear?"), rtol=1e-5, atol=1e-5)
    pads = torch.cat([torch.full((1, 2), model.tokenizer.pad_token_id), ids], dim=1)
    torch.testing.assert_close(model(pads)[:, 2:], model(ids), rtol=1e-5, atol=1e-5)
    read = model(pads, attention_mask=torch.ones_like(pads))
    assert (read[:, 2:] - model(ids)).abs().max() > 1e-2


@torch.no_grad()
def test_the_loss_per_token_is_zero_at_pads(model):
    losses = model(["hear", "what do you hear?"], return_type="loss", loss_per_token=True)
    assert losses.shape == (2, 16)
    assert (losses[0, :-3] == 0).all()
    assert (losses[0, -3:] > 0).all()


def test_what_cannot_be_read_is_refused(model):
    ids = model.to_tokens("what?")
    with pytest.raises(InputError, match=r"takes 0 and 1 for each of the ids \(1, 5\), and got \(1, 4\)"):
        model(ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(InputError, match="row 0 of the ids is padding alone"):
        model(ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(InputError, match=r"padding_side= has nothing to act on here: ids are tokens already"):
        model(ids, padding_side="left")
    with pytest.raises(InputError, match="attention_mask= has nothing to act on here: text gets the mask"):
        model("what?", attention_mask=torch.ones_like(ids))
    with pytest.raises(InputError, match=r"unknown padding_side 'lef'\. Did you mean 'left'"):
        model(["what?", "a"], padding_side="lef")
    with pytest.raises(InputError, match="prompt 1 of 2 is empty"):
        model(["what?", ""])
    with pytest.raises(InputError, match="the prompt is empty"):
        model("")
    with pytest.raises(InputError, match="no token for a text's beginning"):
        model("what?", prepend_bos=True)
    with pytest.raises(InputError, match="5000 tokens, and the model 4096 positions"):
        model("a" * 5000)


def test_what_needs_to_know_its_positions_takes_no_text(model):
    with pytest.raises(InputError, match=r"trace takes AVInputs.*not list.*model\.encode\(None, question\)"):
        model.trace(["what?", "a"])
    with pytest.raises(InputError, match="run takes AVInputs"):
        run(model, "what?")
    with pytest.raises(InputError, match=r"generate\(plan=\) takes AVInputs"):
        model.generate("what?", plan=Plan([]))
