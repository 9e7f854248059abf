"""Cut edges: what is left sums to what it should, whole rows go silent, and the generation position is cut too."""

from __future__ import annotations

import pytest
import torch
from small_av import small_inputs, small_model

from av_lens.core import run
from av_lens.core.budget import ModelSpec
from av_lens.interventions import Plan, cut
from av_lens.interventions.edges import cut_scores_, silence_
from av_lens.interventions.edits import resolve_positions
from av_lens.spans import SpanMap

SPEC = ModelSpec(n_layers=2, n_heads=2, n_kv_heads=1, d_model=4, d_head=2, d_mlp=8, d_vocab=5)
SPANS = SpanMap.of_roles(["video", "audio", "question", "generation"])


def edges(query, *, offset=0, n_query=4, n_key=4, **options):
    """The cut edges of head 0 as `[query][key]`."""
    found = cut(query, "audio", layers=[0], **options).bound(SPEC, SPANS).mask(2, n_query, n_key, offset=offset)
    return None if found is None else found[0].int().tolist()


def test_generated_includes_the_generation_position_unless_it_is_left_out():
    assert edges("generated") == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert edges("generated", include_generation=False) is None


def test_cuts_go_on_while_decoding():
    assert edges("generated", offset=4, n_query=1, n_key=5) == [[0, 1, 0, 0, 0]]
    assert edges("generated", include_generation=False, offset=5, n_query=1, n_key=6) == [[0, 1, 0, 0, 0, 0]]
    assert edges("question", offset=4, n_query=1, n_key=5) is None
    own = cut("generated", "generated", layers=[0]).bound(SPEC, SPANS).mask(2, 1, 6, offset=5)
    assert own is not None
    assert own[0].int().tolist() == [[0, 0, 0, 0, 1, 1]]


def test_a_head_that_is_not_named_keeps_its_edges():
    mask = cut("generation", "audio|video", layers=[0], heads=1).bound(SPEC, SPANS).mask(2, 4, 4, offset=0)
    assert mask is not None
    assert mask.sum((1, 2)).tolist() == [0, 2]


def causal_scores(n=3):
    """Masked as a model masks: future keys hold the dtype's finite minimum, not minus infinity."""
    return torch.tensor([[1.0, 2.0, 3.0]] * n).masked_fill(torch.ones(n, n).triu(1).bool(), torch.finfo().min)[
        None, None
    ]


def test_remaining_weights_are_renormalised_by_hand():
    scores = causal_scores()
    dead = cut_scores_(scores, torch.tensor([[[False] * 3, [False] * 3, [True, False, False]]]))
    pattern = scores.softmax(-1)
    assert not dead.any()
    torch.testing.assert_close(pattern[0, 0, 2], torch.tensor([0.0, 1 / (1 + torch.e), torch.e / (1 + torch.e)]))
    torch.testing.assert_close(pattern[0, 0, 1], causal_scores().softmax(-1)[0, 0, 1])


def test_a_row_whose_every_key_is_cut_reads_nothing_and_never_the_future():
    scores = causal_scores()
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 1] = torch.tensor([True, True, False])  # position 1 may read keys 0 and 1 only: nothing is left
    dead = cut_scores_(scores, mask)
    pattern = scores.softmax(-1)
    silence_(pattern, dead)
    assert dead.tolist() == [[[False, True, False]]]
    assert pattern[0, 0, 1].tolist() == [0.0, 0.0, 0.0]
    assert torch.isfinite(pattern).all()


def test_gradients_through_a_silenced_row_are_finite():
    leaf = causal_scores().requires_grad_()
    scores = leaf.clone()
    dead = cut_scores_(scores, torch.ones(1, 3, 3, dtype=torch.bool))
    pattern = scores.softmax(-1).clone()
    silence_(pattern, dead)
    pattern.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("renormalize", [True, False])
def test_in_the_model_cut_keys_get_no_weight_and_rows_sum_as_they_should(renormalize):
    model, x = small_model(), small_inputs()
    keys = resolve_positions("video", x.spans).index
    base = run(model, x, capture="pattern").cache["pattern", 1]
    plan = Plan(cut("generated", "video", layers=[1], heads=2, renormalize=renormalize))
    edited = run(model, x, plan=plan, capture="pattern")
    pattern = edited.cache["pattern", 1]
    at = x.spans.generation_position
    assert float(base[:, 2, at, list(keys)].detach().sum(-1).min()) > 0.01  # there was weight to lose
    assert float(pattern[:, 2, at, list(keys)].detach().abs().max()) == 0.0
    left = base[:, 2, at].detach().clone()
    left[:, list(keys)] = 0.0
    wanted = left / left.sum(-1, keepdim=True) if renormalize else left
    torch.testing.assert_close(pattern[:, 2, at].detach(), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(pattern[:, [0, 1, 3]], base[:, [0, 1, 3]])
    torch.testing.assert_close(pattern[:, 2, :at], base[:, 2, :at])
    hooks = ["attn.hook_attn_scores", "attn.hook_pattern"] if renormalize else ["attn.hook_pattern"]
    assert edited.fired == {(0, f"blocks.1.{hook}"): 1 for hook in hooks}


def test_in_the_model_a_position_without_keys_writes_nothing():
    model, x = small_model(), small_inputs()
    at = x.spans.generation_position
    out = run(model, x, plan=Plan(cut("generation", range(at + 1), layers=[2])), capture=["z", "attn_out"])
    assert float(out.cache["z", 2][:, at].detach().abs().max()) == 0.0
    assert float(out.cache["attn_out", 2][:, at].detach().abs().max()) == 0.0
    assert float(out.cache["z", 2][:, at - 1].detach().abs().min()) > 0.0


def test_swapped_roles_do_not_pass_in_silence():
    x = small_inputs()
    with pytest.raises(Exception, match=r"were the two swapped"):
        run(small_model(), x, plan=Plan(cut("video", "generation")))
