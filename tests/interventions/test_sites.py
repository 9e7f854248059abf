"""Sites: what is refused, and how; positions as roles, spans and integers."""

from __future__ import annotations

import pytest
import torch

from av_lens.core.budget import ModelSpec
from av_lens.errors import InputError, InterventionError
from av_lens.interventions import Plan, Site, add, cut, mean, replace, scale, zero
from av_lens.interventions.edits import resolve_positions
from av_lens.spans import SpanMap

SPEC = ModelSpec(n_layers=4, n_heads=4, n_kv_heads=2, d_model=8, d_head=2, d_mlp=16, d_vocab=11)
SPANS = SpanMap.of_roles(["boundary", "video", "audio", "audio", "question", "header", "generation"])


def refused(edit, spec=SPEC, batch=2) -> str:
    with pytest.raises(InterventionError) as error:
        Plan(edit).compile(spec, SPANS, batch=batch)
    return str(error.value)


def test_an_unknown_component_is_refused_with_the_nearest():
    with pytest.raises(InterventionError, match=r"unknown component 'resid_per'. Did you mean 'resid_pre'"):
        Site("resid_per", 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("z",), "z belongs to a layer"),
        (("embed", 2), "embed belongs to no layer"),
        (("resid_pre", 1, 3), "resid_pre has no head axis .*batch pos d_model"),
        (("z", 1, (2, 2)), "name one head twice"),
    ],
)
def test_a_site_that_cannot_exist_is_refused(arguments, text):
    with pytest.raises(InterventionError, match=text):
        Site(*arguments)


def test_layers_past_the_end_are_refused():
    assert "layer 4 is past the end: the model has 4 layers, 0 to 3" in refused(zero(Site("z", 4)))
    assert "layer 4 is past the end" in refused(cut("generation", "audio", layers=range(3, 6)))
    assert "negative" in refused(zero(Site("z", -1)))


def test_heads_of_keys_are_key_value_heads_and_the_error_says_so():
    text = refused(zero(Site("v", 1, head=2)))
    assert "2 key-value heads" in text
    assert "query head h reads key-value head h // 2" in text
    assert "name q, scores, pattern, z or result" in text
    assert "head 4 of z is out of range: it has 4 heads" in refused(zero(Site("z", 1, head=4)))
    Plan(zero(Site("z", 1, head=3))).compile(SPEC, SPANS)


def test_positions_outside_the_input_are_refused():
    assert "names position 7, but the input has 7 positions" in refused(zero(Site("z", 1, positions=[3, 7])))
    assert "names no position" in refused(zero(Site("z", 1, positions="image")))
    with pytest.raises(InputError, match=r"unknown role 'vidoe'. Did you mean 'video'"):
        Plan(zero(Site("z", 1, positions="vidoe"))).compile(SPEC, SPANS)


def test_roles_spans_and_integers_name_the_same_positions():
    for positions in ("audio|generation", SPANS["audio"] | SPANS["generation"], [6, 2, 3, 3]):
        assert resolve_positions(positions, SPANS).index == (2, 3, 6)
    assert resolve_positions("suffix", SPANS).index == (4, 5, 6)
    assert resolve_positions(None, SPANS).index == tuple(range(7))


def test_only_generated_and_all_positions_grow_while_decoding():
    assert resolve_positions("generated", SPANS).decode
    assert resolve_positions(None, SPANS).decode
    assert not resolve_positions("suffix", SPANS).decode


def test_values_of_a_wrong_shape_are_refused_with_the_shape_that_is_wanted():
    site = Site("z", 1, head=(0, 2), positions="audio")
    text = refused(replace(site, torch.zeros(2, 3, 2, 2)))
    assert "the value has shape (2, 3, 2, 2); wanted [batch, 2 positions, 2 heads, 2] for 2 examples" in text
    assert "wanted [batch, 1 positions, 8]" in refused(
        add(Site("resid_mid", 0, positions="generation"), torch.zeros(7))
    )
    assert "shape (3, 2, 2, 2)" in refused(replace(site, torch.zeros(3, 2, 2, 2)))
    for shape in [(2, 2, 2, 2), (1, 2, 2, 2), (2, 2, 2), (2, 1, 2, 2)]:
        Plan(replace(site, torch.zeros(shape))).compile(SPEC, SPANS, batch=2)


def test_plans_hold_edits_only_and_add_up():
    with pytest.raises(InterventionError, match=r"a plan holds edits and cuts, not Site"):
        Plan([Site("z", 1)])
    both = Plan(zero(Site("z", 2, positions="audio"))) + Plan(cut("generation", "video", layers=[1]))
    assert (len(both), both.first_layer, both.first_position(SPANS)) == (2, 1, 2)
    assert (Plan().first_layer, Plan().first_position(SPANS)) == (-1, 7)


def test_an_edge_that_cannot_exist_is_refused():
    assert "no edge to cut: the keys 'generation' start at position 6, after the last query 3" in refused(
        cut("audio", "generation", layers=[1])
    )
    with pytest.raises(InterventionError, match=r"no layer is named"):
        cut("generation", "audio", layers=[])


def by_hand(edit, activation):
    """Apply an edit to `[batch, pos, head, d]` and give the new activation."""
    new = activation.clone()
    assert edit.bound(SPEC, SPANS, 2).apply_(new, 0)
    return new


def test_every_kind_of_edit_against_a_hand_computed_value():
    old = torch.arange(2 * 7 * 4 * 2, dtype=torch.float32).reshape(2, 7, 4, 2)
    site = Site("z", 1, head=(3, 0), positions=[2, 6])
    new = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]])
    found = by_hand(replace(site, new), old)
    assert found[1, 2, 3].tolist() == [1.0, 2.0]
    assert found[0, 6, 0].tolist() == [7.0, 8.0]
    untouched = torch.ones(2, 7, 4, dtype=torch.bool)
    untouched[:, [2, 2, 6, 6], [3, 0, 3, 0]] = False
    assert torch.equal(found[untouched], old[untouched])
    assert by_hand(zero(site), old)[:, [2, 6]][:, :, [0, 3]].abs().sum() == 0
    assert by_hand(scale(site, 3.0), old)[0, 2, 3].tolist() == [3 * 22.0, 3 * 23.0]
    assert by_hand(add(site, torch.tensor([0.5, -0.5])), old)[1, 6, 0].tolist() == [56 + 48 + 0.5, 56 + 49 - 0.5]
    average = by_hand(mean(site, torch.stack([new[0], 3 * new[0]])), old)
    assert average[0, 6, 3].tolist() == [10.0, 12.0]
